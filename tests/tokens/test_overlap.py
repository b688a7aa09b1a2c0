"""A sketch of the calibrated tokens says how much of a text was calibrated on."""

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mquant.tokens.overlap import WINDOW, overlap, sketch
from mquant.tokens.tokenizer import Integers


def text(seed: int, count: int) -> Integers:
    return np.random.default_rng(seed).integers(0, 50_000, count)


DATA = [text(seed, 2048) for seed in range(64)]


def test_the_same_tokens_are_found_wherever_they_stand() -> None:
    known = sketch([text(0, 500)])
    around = np.concatenate([text(1, 333), text(0, 500)[100:400], text(2, 222)])

    assert overlap(text(0, 500), known) == 1
    assert overlap(text(0, 500)[7:100], known) == 1
    assert overlap(around, known) == pytest.approx((300 - WINDOW + 1) / (len(around) - WINDOW + 1))
    assert overlap(text(3, 500), known) == 0


def test_the_share_is_estimated_where_the_data_have_more_runs_than_the_sketch_holds() -> None:
    known = sketch(DATA)
    half = np.concatenate([*DATA[:4], text(99, 8192)])

    assert overlap(half, known) == pytest.approx(0.5, abs=0.1)
    assert overlap(DATA[9], known) == 1
    assert overlap(text(99, 16_384), known) == 0


def test_a_sketch_is_bounded_and_does_not_depend_on_the_order() -> None:
    known = sketch(DATA)
    assert len(base64.b64decode(known)) == 2048 * 8
    assert known == sketch(reversed(DATA))


@given(st.integers(0, WINDOW - 1))
def test_less_than_a_run_of_tokens_has_no_hash(count: int) -> None:
    assert sketch([text(0, count)]) == ""
    assert overlap(text(0, count), sketch([text(0, 99)])) == 0


@pytest.mark.parametrize("hostile", [None, 5, [], "", "no base64!", "AAAA", "é", "A" * 10**6])
def test_what_is_no_sketch_holds_nothing(hostile: Any) -> None:
    assert overlap(text(0, 500), hostile) == 0
