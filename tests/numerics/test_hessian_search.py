"""The search finds, for every block, the code of the smallest error of the outputs."""

from typing import Final

import numpy as np
import pytest

from mquant.numerics.floats import E2M1, E4M3, Array, Floats
from mquant.numerics.hessian import damped, hessian_of
from mquant.numerics.hessian_search import factored, search_codes
from numerics.test_gptq import inputs_of, weights_of
from numerics.test_hessian import diagonal_blocks

EVERY_CODE: Final = np.arange(1, 127)
KEPT: Final = 0.65


def nearest(numbers: Array) -> Array:
    """Return the E2M1 values nearest to numbers, with signs."""
    places = np.abs(np.minimum(np.abs(numbers), 6)[..., None] - E2M1).argmin(axis=-1)
    values: Array = np.sign(numbers) * E2M1[places]
    return values


def errors(block: Array, hessian: Array, divisors: Array, compensated: bool) -> Array:
    """Return the error of a block of 16 weights under each divisor, as the formulas say."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    x, ordered = block[order].astype(np.float64), hessian[order][:, order]
    e = np.zeros((len(divisors), 16))
    for j in range(16):
        target = np.repeat(x[j], len(divisors))
        if compensated:  # where elements j and later would go if they were not rounded
            target = target + (e[:, :j] @ ordered[:j, j:] @ np.linalg.inv(ordered[j:, j:]))[:, 0]
        e[:, j] = x[j] - nearest(target / divisors) * divisors
    total: Array = np.einsum("ci,ij,cj->c", e, ordered, e)
    return total


def best(
    block: Array, hessian: Array, shared: np.float32, compensated: bool
) -> tuple[float, Array]:
    """Return the least error of the codes that keep 0.65 of the largest weight, and all errors."""
    divisors = E4M3[EVERY_CODE].astype(np.float64) / shared
    found = errors(block, hessian, divisors, compensated)
    allowed = 6 * divisors >= KEPT * np.abs(block).max()
    return float(found[allowed].min()), found


@pytest.mark.parametrize("compensated", [False, True])
def test_codes_have_the_smallest_errors(compensated: bool) -> None:
    over = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        (weight,) = weights_of(seed, 4, columns=64)
        weight *= np.exp(rng.standard_normal((4, 1))).astype(np.float32)
        blocks = diagonal_blocks(damped(hessian_of(inputs_of(seed, 200, 64)), 0.1))
        shared = np.float32(2688 / np.abs(weight).max() / rng.uniform(1.5, 4))

        codes = search_codes(weight, factored(blocks), shared, compensated=compensated)

        for row, number in np.ndindex(codes.shape):
            block, hessian = weight[row, number * 16 : number * 16 + 16], blocks[number]
            least, found = best(block, hessian.astype(np.float64), shared, compensated)
            over.append(found[codes[row, number] - 1] / least - 1)
    assert np.min(over) > -1e-4
    # Codes far above that of the largest weight are not tried, and win a little once in a while.
    assert np.mean(np.array(over) < 1e-4) > 0.95
    assert np.mean(over) < 0.006


def test_blocks_of_zeros_get_a_scale() -> None:
    blocks = diagonal_blocks(damped(hessian_of(inputs_of(1, 200, 64)), 0.1))
    zeros: Floats = np.zeros((3, 64), np.float32)

    codes = search_codes(zeros, factored(blocks), np.float32(1000), compensated=True)

    assert (codes == 0x20).all()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**60])
def test_the_size_of_weights_and_inputs_does_not_matter(size: float) -> None:
    (weight,) = weights_of(2, 8, columns=64)
    hessian = damped(hessian_of(inputs_of(2, 200, 64)), 0.1)
    shared = np.float32(2688 / np.abs(weight).max() / 2)
    codes = search_codes(weight, factored(diagonal_blocks(hessian)), shared, compensated=False)

    again = search_codes(
        weight * np.float32(size),
        factored(diagonal_blocks(hessian * np.float32(2.0**60))),
        shared / np.float32(size),
        compensated=False,
    )

    assert (again == codes).all()
