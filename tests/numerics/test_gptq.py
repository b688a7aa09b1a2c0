"""GPTQ and sweeps lower the error of the outputs; upstream decodes the tensors to the values."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from mquant.numerics import gptq
from mquant.numerics.floats import BF16, FLOATS, Array, Floats
from mquant.numerics.gptq import Rounded, Rounding, round_set
from mquant.numerics.hessian import hessian_of
from mquant.numerics.kernels import pack_into
from mquant.numerics.scaled import scaled
from mquant.numerics.thresholds import thresholds
from mquant.schemes import FP8_BLOCK, FP8_DYNAMIC, NVFP4A16, W4A16, Scheme, SchemeTensor
from numerics.test_scale_search import searched, weight_of

INT8: Final = Scheme(
    "INT8",
    (
        SchemeTensor("weight_packed", "I32", lambda rows, columns: (rows, columns // 4)),
        *W4A16.parts[1:],
    ),
    {**W4A16.config_group, "weights": {**W4A16.config_group["weights"], "num_bits": 8}},
)
SCHEMES: Final = (NVFP4A16, FP8_DYNAMIC, FP8_BLOCK, W4A16, INT8)
EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
ALONE: Final = Rounding("minmax", "stored", damp=0.01)
COLUMNS: Final = 256


def weights_of(seed: int, *rows: int, columns: int = COLUMNS) -> list[Floats]:
    """Return weights [rows, columns] whose numbers are BF16."""
    rng = np.random.default_rng(seed)
    shapes = ((count, columns) for count in rows)
    return [
        (rng.standard_normal(shape) * 0.02).astype(BF16.value).astype(np.float32)
        for shape in shapes
    ]


def inputs_of(seed: int, count: int, columns: int = COLUMNS) -> Floats:
    """Return inputs whose channels are correlated, and of different sizes, as in a model.

    Inputs of different seeds have the same distribution.
    """
    model = np.random.default_rng(7)
    mixed = model.standard_normal((columns // 4, columns)) / np.sqrt(columns // 4)
    sizes = np.exp(model.standard_normal(columns) / 2)
    rng = np.random.default_rng([seed, 1])
    common = rng.standard_normal((count, columns // 4)) @ mixed
    noise = rng.standard_normal((count, columns)) / 2
    inputs: Floats = ((common + noise) * sizes).astype(np.float32)
    return inputs


def loss(weights: list[Floats], rounded: list[Rounded], hessian: Array) -> float:
    """Return the error of the outputs, over the outputs, as squares."""
    pairs = [(w.astype(np.float64), made.values) for w, made in zip(weights, rounded, strict=True)]
    lost = sum(float(np.sum(((w - q) @ hessian) * (w - q))) for w, q in pairs)
    return lost / sum(float(np.sum((w @ hessian) * w)) for w, _ in pairs)


def decompressed(made: Rounded, scheme: Scheme) -> torch.Tensor:
    """Return the weight to which compressed-tensors decompresses the tensors."""
    state = {suffix: as_torch(array) for suffix, array in made.tensors.items()}
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    group = {key: value for key, value in scheme.config_group.items() if key != "format"}
    arguments = QuantizationScheme(targets=["Linear"], **group)
    weight: torch.Tensor = compressor.decompress(state, arguments)["weight"]
    return weight


def as_torch(array: Array) -> torch.Tensor:
    foreign = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    if array.dtype.name not in foreign:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(foreign[array.dtype.name])


@EACH_SCHEME
@pytest.mark.parametrize("known", [True, False], ids=["inputs", "no inputs"])
def test_values_are_what_compressed_tensors_decompresses(scheme: Scheme, known: bool) -> None:
    weights = weights_of(1, 48, 16)
    weights[0][3] = 0
    weights[1] *= 64  # one global scale for both
    hessian = hessian_of(inputs_of(1, 500)) if known else None

    rounded = round_set(weights, hessian, scheme, Rounding(sweeps=1))

    for weight, made in zip(weights, rounded, strict=True):
        theirs = decompressed(made, scheme)
        assert theirs.dtype == torch.bfloat16
        assert (theirs.float().numpy() == made.values.astype(BF16.value).astype(np.float32)).all()
        assert not made.values[(weight == 0).all(axis=1)].any()
        assert np.abs(made.values - weight).max() < 0.5 * np.abs(weight).max()
        shapes = [part.shape(*weight.shape) for part in scheme.parts]
        assert [array.shape for array in made.tensors.values()] == shapes
        assert [*made.tensors] == [part.suffix for part in scheme.parts]


def of_llmcompressor(weight: Floats, hessian: Floats, scheme: Scheme, rounding: Rounding) -> Floats:
    """Return what llmcompressor's GPTQ makes of a weight under the scales of `rounding`."""
    (scales,) = scaled([weight], scheme, BF16, rounding.scales, None)
    shared = scales.tensors.get("weight_global_scale")
    values = scales.tensors["weight_scale"].astype(np.float32)
    group = {key: value for key, value in scheme.config_group.items() if key != "format"}
    arguments = QuantizationScheme(targets=["Linear"], **group).weights
    assert arguments is not None
    arguments.actorder = "weight" if rounding.order == "descending" else None
    scale = torch.from_numpy(values)[None]
    made, _, fallen_back = quantize_weight(
        torch.from_numpy(weight.copy())[None],
        torch.from_numpy(hessian.copy())[None],
        scale,
        torch.zeros_like(scale),
        None if shared is None else torch.from_numpy(shared.copy()),
        arguments,
        percdamp=rounding.damp,
    )
    assert not fallen_back.any()
    result: Floats = made[0].numpy()
    return result


@pytest.mark.upstream
@EACH_SCHEME
@pytest.mark.parametrize("order", ["stored", "descending"])
def test_gptq_is_that_of_llmcompressor(scheme: Scheme, order: Any) -> None:
    (weight,), hessian = weights_of(2, 128), hessian_of(inputs_of(2, 2000))
    rounding = Rounding("minmax", order, damp=0.01)

    ours = round_set([weight], hessian, scheme, rounding)
    theirs = of_llmcompressor(weight, hessian, scheme, rounding)

    # One code that is rounded the other way changes those after it.
    assert (np.abs(ours[0].values - theirs) < 1e-6).mean() > 0.98
    expected = loss([weight], [Rounded({}, theirs)], hessian)
    assert loss([weight], ours, hessian) < 1.002 * expected


def test_each_step_of_the_method_lowers_the_error_of_nvfp4_outputs() -> None:
    weights, hessian = weights_of(3, 128, 64), hessian_of(inputs_of(3, 4000))
    methods = [
        (None, Rounding("minmax")),
        (None, Rounding("search")),
        (hessian, Rounding("search", "stored")),
        (hessian, Rounding("hessian", "stored")),
        (hessian, Rounding("hessian")),
        (hessian, Rounding("hessian", sweeps=1)),
        (hessian, Rounding("hessian", sweeps=3)),
    ]

    losses = [loss(weights, round_set(weights, h, NVFP4A16, r), hessian) for h, r in methods]

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[1]


@EACH_SCHEME
def test_gptq_lowers_the_error_of_new_inputs(scheme: Scheme) -> None:
    weights, new = weights_of(4, 64), hessian_of(inputs_of(5, 4000))
    hessian = hessian_of(inputs_of(4, 4000))

    alone = loss(weights, round_set(weights, None, scheme, Rounding()), new)

    assert loss(weights, round_set(weights, hessian, scheme, Rounding()), new) < 0.7 * alone


@given(st.integers(0, 2**32 - 1), st.sampled_from(SCHEMES), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_no_sweep_raises_the_error(seed: int, scheme: Scheme, rows: int) -> None:
    rng = np.random.default_rng(seed)
    (weight,) = weights_of(seed, rows, columns=128)
    inputs = inputs_of(seed, int(rng.integers(1, 300)), 128)
    inputs *= np.exp(2 * rng.standard_normal(128)).astype(np.float32)
    inputs[:, rng.random(128) < rng.choice([0, 0.5])] = 0
    hessian = hessian_of(inputs)
    damped = hessian.astype(np.float64)
    damped[np.diag_indices(128)] += 0.02 * np.mean(np.diag(hessian)[np.diag(hessian) > 0])

    losses = [
        loss([weight], round_set([weight], hessian, scheme, Rounding(sweeps=count)), damped)
        for count in range(5)
    ]

    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(losses))


@EACH_SCHEME
def test_independent_inputs_round_each_weight_to_nearest(scheme: Scheme) -> None:
    weights = weights_of(6, 32, 48)
    hessian = np.diag(np.exp(np.random.default_rng(6).standard_normal(COLUMNS) * 3))
    rounding = Rounding("search", sweeps=2)

    compensated = round_set(weights, hessian.astype(np.float32), scheme, rounding)

    nearest = round_set(weights, None, scheme, rounding)
    assert all((a.values == b.values).all() for a, b in zip(compensated, nearest, strict=True))


def test_dead_columns_are_rounded_to_nearest() -> None:
    weights, inputs = weights_of(7, 64), inputs_of(7, 1000)
    dead = np.arange(COLUMNS) % 5 == 0
    inputs[:, dead] = 0

    rounded = round_set(weights, hessian_of(inputs), NVFP4A16, Rounding("search", sweeps=1))

    (nearest,) = round_set(weights, None, NVFP4A16, Rounding("search"))
    assert (rounded[0].values[:, dead] == nearest.values[:, dead]).all()
    assert (rounded[0].values[:, ~dead] != nearest.values[:, ~dead]).any()


@EACH_SCHEME
def test_no_inputs_at_all_round_to_nearest(scheme: Scheme) -> None:
    weights, hessian = weights_of(8, 32), np.zeros((COLUMNS, COLUMNS), np.float32)

    rounded = round_set(weights, hessian, scheme, Rounding("search", sweeps=1))

    (nearest,) = round_set(weights, None, scheme, Rounding("search"))
    assert (rounded[0].values == nearest.values).all()


def test_more_damping_helps_if_tokens_are_few() -> None:
    weights, inputs = weights_of(9, 64), inputs_of(9, COLUMNS // 2)
    hessian, new = hessian_of(inputs), hessian_of(inputs_of(10, 4000))

    blind = loss(weights, round_set(weights, hessian, NVFP4A16, Rounding()), new)
    told = round_set(weights, hessian, NVFP4A16, Rounding(), tokens=len(inputs))

    assert loss(weights, told, new) < 0.92 * blind


def test_without_inputs_nvfp4_has_the_bytes_of_the_stream_engine() -> None:
    weights = weights_of(11, 32, 16)
    weights[0][0, :64] *= np.float32(1e-6)  # tiny numbers, which keep their signs
    words = [weight.astype(BF16.value).view(BF16.word) for weight in weights]

    rounded = round_set(weights, None, NVFP4A16, Rounding())

    shared, codes = searched(*(weight_of(word, BF16) for word in words))
    for word, code, made in zip(words, codes, rounded, strict=True):
        packed = np.empty(word.size // 2, np.uint8)
        pack_into(word.reshape(-1), thresholds("BF16", float(shared)), code, packed)
        assert made.tensors["weight_global_scale"] == shared
        assert (made.tensors["weight_scale"].view(np.uint8).reshape(-1) == code).all()
        assert (made.tensors["weight_packed"].reshape(-1) == packed).all()


@EACH_SCHEME
def test_threads_over_slices_of_rows_change_no_byte(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "_ROWS", 32)
    weights, hessian = weights_of(12, 100, 33), hessian_of(inputs_of(12, 800))
    pieces = list[Any]()

    with ThreadPoolExecutor(2) as pool:

        def mapped(function: Callable[[Any], Any], items: Any) -> Any:
            pieces.extend(items)
            return pool.map(function, pieces)

        threaded = round_set(weights, hessian, scheme, Rounding(sweeps=1), rows=mapped)

    assert len(pieces) == 4 + 2
    assert_same(threaded, round_set(weights, hessian, scheme, Rounding(sweeps=1)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", [FP8_DYNAMIC, FP8_BLOCK, W4A16], ids=lambda each: each.name)
def test_scales_are_stored_in_the_dtype_of_the_weights(scheme: Scheme, dtype: str) -> None:
    (made,) = round_set(weights_of(13, 16), None, scheme, Rounding("minmax"), own=FLOATS[dtype])

    assert made.tensors["weight_scale"].dtype == FLOATS[dtype].value


def assert_same(some: list[Rounded], others: list[Rounded]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        for suffix in one.tensors:
            assert raw(one.tensors[suffix]) == raw(other.tensors[suffix]), suffix
        assert (one.values == other.values).all()


def raw(array: Array) -> bytes:
    return array.tobytes()
