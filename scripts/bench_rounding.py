"""Time GPTQ on one expert of the real shapes, beside BLAS's rate of products in the same run.

    python scripts/bench_rounding.py [--tokens 1700] [--sweeps 3] [--scheme NVFP4A16]

One thread, whose own processor time counts: other work on the machine slows it less. `products` are
the products of matrices that the step asks of BLAS: those of the Hessian and its factor, of GPTQ
and of sweeps; `of sgemm` is their rate over that of a square sgemm.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from mquant.numerics.floats import BF16, Floats
from mquant.numerics.gptq import Rounding, hessian_of, prepare_rounding, round_set
from mquant.schemes import SCHEMES

SETS = {"gate, up": (2, 1536, 3072), "down": (1, 3072, 1536)}


def main() -> None:
    """Print a table: a row for each fused set of an expert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1700, help="tokens routed to the expert")
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--scheme", default="NVFP4A16")
    options = parser.parse_args()
    scheme = SCHEMES[options.scheme]
    rng = np.random.default_rng(0)
    print("| set | sweeps | Hessian, s | rounding, s | products, GFLOP | GFLOP/s | of sgemm |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (count, rows, columns) in SETS.items():
        inputs = inputs_of(rng, options.tokens, columns)
        weights = [weight_of(rng, rows, columns) for _ in range(count)]
        square = rng.standard_normal((columns, columns), np.float32)
        for sweeps in sorted({0, options.sweeps}):
            rounding = Rounding(sweeps=sweeps)
            prepare_rounding(scheme, rounding)
            rate = 2 * columns**3 / best(partial(np.matmul, square, square))
            first = best(partial(hessian_of, inputs))
            hessian = hessian_of(inputs)
            make = partial(round_set, weights, hessian, scheme, rounding)
            second = best(partial(make, tokens=options.tokens))
            work = options.tokens * columns**2 + columns**3 / 3
            work += count * rows * columns**2 * (1 + 2 * sweeps)
            speed = work / (first + second)
            print(
                f"| {name} | {sweeps} | {first:.2f} | {second:.2f} | {work / 1e9:.0f} "
                f"| {speed / 1e9:.0f} | {speed / rate:.0%} |"
            )


def inputs_of(rng: np.random.Generator, tokens: int, columns: int) -> Floats:
    """Return inputs whose channels have different sizes."""
    sizes = np.exp(rng.standard_normal(columns, np.float32) / 2)
    return rng.standard_normal((tokens, columns), np.float32) * sizes


def weight_of(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    """Return a weight whose numbers are BF16."""
    weight = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    return weight.astype(BF16.value).astype(np.float32)


def best(work: Callable[[], Any]) -> float:
    """Return the least of three processor times, in seconds."""
    times = []
    for _ in range(3):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
