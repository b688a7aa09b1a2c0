"""A Hessian sums outer products of inputs; its factors are those of linear algebra."""

from typing import Final

import numpy as np
import pytest

from mquant.numerics.floats import Array, Floats
from mquant.numerics.hessian import (
    Curvature,
    add_inputs,
    curvature,
    damped,
    hessian_of,
)
from numerics.test_gptq import inputs_of

SIZES: Final = pytest.mark.parametrize("columns", [16, 128, 144, 400])
BOTH: Final = pytest.mark.parametrize("descending", [False, True])


def diagonal_blocks(matrix: Array) -> Array:
    """Return the blocks of 16 x 16 on the diagonal, [in / 16, 16, 16]."""
    count = len(matrix) // 16
    blocks = matrix.reshape(count, 16, count, 16)
    result: Array = blocks[np.arange(count), :, np.arange(count)]
    return result


def test_inputs_add_up() -> None:
    inputs = inputs_of(1, 9000)

    hessian = hessian_of(inputs[:5000])
    add_inputs(hessian, inputs[5000:])

    exact = inputs.T.astype(np.float64) @ inputs
    assert np.abs(hessian - exact).max() < 1e-5 * np.abs(exact).max()
    assert (hessian == hessian.T).all()


@SIZES
@BOTH
def test_the_factors_are_unit_triangular_and_give_the_damped_hessian(
    columns: int, descending: bool
) -> None:
    hessian = hessian_of(inputs_of(2, 1000, columns))

    curved = curvature(hessian, 0.01, descending=descending)

    order = curved.order
    assert sorted(order) == [*range(columns)]
    diagonal = hessian.diagonal()[order]
    assert (diagonal[:-1] >= diagonal[1:]).all() or not descending
    assert (order == np.arange(columns)).all() or descending
    mean = np.mean(hessian.diagonal(), dtype=np.float64)
    expected = (hessian + 0.01 * mean * np.eye(columns)) / 2 ** np.round(np.log2(mean))
    product = (curved.feedback.astype(np.float64) * curved.pivots) @ curved.feedback.T
    assert (np.triu(curved.feedback) == curved.feedback).all()
    assert (curved.feedback.diagonal() == 1).all()
    largest = np.abs(expected).max()
    assert np.abs(curved.hessian - expected[order][:, order]).max() < 1e-6 * largest
    assert np.abs(product - curved.hessian).max() < 1e-5 * largest


@SIZES
@BOTH
def test_the_cost_of_compensated_errors_is_the_inverse_of_the_inverse(
    columns: int, descending: bool
) -> None:
    hessian = hessian_of(inputs_of(3, 1000, columns))
    inverse = np.linalg.inv(damped(hessian, 0.01).astype(np.float64))

    curved = curvature(hessian, 0.01, descending=descending)

    blocks = np.linalg.inv(diagonal_blocks(inverse))
    assert np.abs(curved.compensated_blocks() - blocks).max() < 1e-4 * blocks.max()
    assert np.abs(curved.compensated_diagonal() * inverse.diagonal() - 1).max() < 1e-4


def test_a_hessian_without_factors_is_damped_until_it_has_factors() -> None:
    hessian = np.array([[1, 3], [3, 1]], np.float32)

    curved = curvature(hessian, 0.01, descending=False)

    assert curved.hessian.tolist() == [[11, 3], [3, 11]]  # damping of 10
    product = (curved.feedback * curved.pivots) @ curved.feedback.T
    assert np.allclose(product, curved.hessian)


def test_one_token_is_enough_for_factors() -> None:
    inputs = inputs_of(4, 1, 400) * np.float32(1e4)

    curved: Curvature = curvature(hessian_of(inputs), 0.0, descending=True)

    assert np.isfinite(curved.feedback).all()
    assert (curved.pivots > 0).all()


def test_inputs_whose_squares_overflow_are_refused() -> None:
    with np.errstate(over="ignore"):
        hessian = hessian_of(inputs_of(6, 10, 32) * np.float32(1e20))

    with pytest.raises(ValueError, match="not finite"):
        curvature(hessian, 0.01, descending=True)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_the_size_of_inputs_does_not_matter(size: float) -> None:
    inputs: Floats = inputs_of(5, 500, 128)
    power = np.float32(2.0 ** np.round(np.log2(size)))

    one = curvature(hessian_of(inputs), 0.01, descending=True)
    other = curvature(hessian_of(inputs * power), 0.01, descending=True)

    assert (one.feedback == other.feedback).all()
    assert (one.order == other.order).all()
