"""AWQ's factors are llmcompressor's, and the best of them lowers the error of the outputs."""

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.transform.awq.base import AWQModifier

from mquant.numerics.awq_scales import candidate_factors, errors_of, normalized_sum
from mquant.numerics.floats import BF16, Floats
from mquant.numerics.hessian import hessian_of
from mquant.schemes import W4A16
from numerics.test_gptq import inputs_of, weights_of

ARGUMENTS = QuantizationArgs(num_bits=4, group_size=128, strategy="group", symmetric=True)


def factors_of(inputs: Floats, *weights: Floats) -> Floats:
    sums = sum(normalized_sum(weight, 128) for weight in weights)
    means = np.abs(inputs).mean(axis=0, dtype=np.float64)
    return candidate_factors(means, np.asarray(sums) / sum(map(len, weights)))


@pytest.mark.upstream
def test_weights_have_llmcompressors_means() -> None:
    weights, layers = weights_of(1, 40, 24), list[torch.nn.Module]()
    for weight in weights:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = torch.from_numpy(weight)
        layer.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=ARGUMENTS)
        layers.append(layer)

    ours = sum(normalized_sum(weight, 128) for weight in weights) / np.float64(64)

    theirs = AWQModifier._compute_layer_means(layers).detach().numpy()
    assert np.allclose(ours, theirs, rtol=1e-6)


def test_factors_follow_the_formula_after_ones() -> None:
    inputs, (weight,) = inputs_of(2, 100), weights_of(2, 40)
    x = torch.from_numpy(np.abs(inputs).mean(axis=0))
    w = torch.from_numpy(normalized_sum(weight, 128) / 40)

    ones, *factors = factors_of(inputs, weight)

    assert (ones == 1).all()
    for step, ours in enumerate(factors):  # as AWQModifier._compute_best_scale has it
        ratio = step / 18
        theirs = (x.pow(ratio) / (w.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        theirs = theirs / (theirs.max() * theirs.min()).sqrt()
        assert np.allclose(ours, theirs.numpy(), rtol=1e-4)


def test_dead_columns_leave_factors_finite() -> None:
    inputs, (weight,) = inputs_of(3, 100), weights_of(3, 40)
    inputs[:, ::3] = 0
    weight[:, ::5] = 0

    factors = factors_of(inputs, weight)

    assert np.isfinite(factors).all()
    assert (factors > 0).all()


def test_errors_are_those_of_the_outputs() -> None:
    inputs, weights = inputs_of(4, 300), weights_of(4, 48, 16)
    factors = factors_of(inputs, *weights)

    errors = errors_of(weights, hessian_of(inputs), W4A16, factors)

    for factor, error in zip(factors, errors, strict=True):
        lost = 0.0
        for weight in weights:
            multiplied = torch.from_numpy(weight * factor).bfloat16()
            groups = multiplied.reshape(len(weight), -1, 128)
            scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), ARGUMENTS)
            made = fake_quantize(multiplied.float(), scale.float(), zero, ARGUMENTS)
            outputs = inputs @ (weight - made.numpy() / factor).T
            lost += float(np.sum(outputs.astype(np.float64) ** 2))
        assert error == pytest.approx(lost, rel=1e-3)


def test_rows_stand_for_all_rows() -> None:
    inputs, (weight,) = inputs_of(5, 300), weights_of(5, 700)
    factors = factors_of(inputs, weight)

    sampled = errors_of([weight], hessian_of(inputs), W4A16, factors)

    parts = [weight[:250], weight[250:500], weight[500:]]
    exact = errors_of(parts, hessian_of(inputs), W4A16, factors)
    assert np.allclose(sampled, exact, rtol=0.1)


def test_the_best_factors_lower_the_error() -> None:
    inputs, weights = inputs_of(6, 300), weights_of(6, 64)
    inputs[:, ::16] *= 8
    inputs = inputs.astype(BF16.value).astype(np.float32)

    errors = errors_of(weights, hessian_of(inputs), W4A16, factors_of(inputs, *weights))

    assert errors.min() < 0.8 * errors[0]
