"""Sizes and lists of names are parsed and printed as people write and read them."""

import pytest

from mquant.cli.text import parse_size
from mquant.errors import UsageError
from mquant.text import binary_size, compress, size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1GiB", 2**30),
        ("1.5 gb", 1_500_000_000),
        ("4096", 4096),
        ("12b", 12),
    ],
)
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "1e9", "5 GB extra", "9" * 99])
def test_a_wrong_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_sizes_as_people_read_them() -> None:
    assert [size(n) for n in (0, 999, 1000, 5_000_000_000, 278_359_184_384)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "5.00 GB",
        "278.4 GB",
    ]
    assert binary_size(80_140_558_496) == "74.64 GiB"


def test_names_that_differ_in_numbers_become_one_pattern() -> None:
    gates = [f"model.layers.{n}.gate" for n in range(62)]
    experts = [f"layers.{n}.experts.{e}.w1" for n in (0, 1, 5) for e in range(4)]
    assert compress(["lm_head", *gates]) == [
        ("lm_head", 1),
        ("model.layers.{0..61}.gate", 62),
    ]
    assert compress(experts) == [("layers.{0..1,5}.experts.{0..3}.w1", 12)]
    assert compress([*experts, "layers.1.experts.9.w1"]) == [
        ("layers.{0,5}.experts.{0..3}.w1", 8),
        ("layers.1.experts.{0..3,9}.w1", 5),
    ]
