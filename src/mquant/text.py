"""Format values for a person: sizes, counts, name lists, and untrusted strings."""

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Final

_DIGITS: Final = re.compile(r"(?<=\.)\d+(?=\.|$)")

Numbers = tuple[int, ...]


def clean(text: str) -> str:
    """Return the text on one line, with every character escaped that a terminal could obey.

    Names, config values and paths are untrusted: an escape sequence could hide or fake a line of
    the output. `isprintable` is false for controls, line ends, bidi marks and surrogates.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def names(items: list[str] | tuple[str, ...], shown: int = 3) -> str:
    """Return `a, b, c and 59 more`: a list of names, short enough for a sentence."""
    head = ", ".join(items[:shown])
    return head if len(items) <= shown else f"{head} and {len(items) - shown:,} more"


def size(count: int) -> str:
    """Return bytes in decimal units: `80.14 GB`."""
    if count < 1000:
        return f"{count} B"
    units = iter(("kB", "MB", "GB", "TB", "PB"))
    value, unit = count / 1000, next(units)
    while value >= 999.5 and unit != "PB":
        value, unit = value / 1000, next(units)
    digits = 2 if value < 100 else 1
    return f"{value:,.{digits}f} {unit}"


def binary_size(count: int) -> str:
    """Return bytes in binary units, the units of memory: `74.64 GiB`."""
    value, unit = count / 1024, "KiB"
    for bigger in ("MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, bigger
    return f"{value:,.2f} {unit}"


def both_sizes(count: int) -> str:
    """Return bytes in both units: `80.14 GB (74.64 GiB)`."""
    return f"{size(count)} ({binary_size(count)})"


def plural(count: int, noun: str) -> str:
    """Return a count and its noun: `1 shard`, `56 shards`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def compress(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return names that differ only in numbers as (pattern, count): `layers.{0..61}.gate`, 62."""
    families: dict[str, list[Numbers]] = {}
    for name in names:
        key = _DIGITS.sub("#", name.replace("#", "##"))
        families.setdefault(key, []).append(tuple(map(int, _DIGITS.findall(name))))
    return [
        (_fill(key, box), _volume(box))
        for key, tuples in families.items()
        for box in _boxes(sorted(set(tuples)))
    ]


def _boxes(tuples: list[Numbers]) -> list[list[list[int]]]:
    """Cover number tuples by products of number lists, cut along the first number if necessary."""
    columns = [sorted(set(column)) for column in zip(*tuples, strict=True)]
    if _volume(columns) == len(tuples):
        return [columns]
    same_rest: dict[tuple[Numbers, ...], list[int]] = {}
    for first, group in groupby(tuples, key=lambda numbers: numbers[0]):
        same_rest.setdefault(tuple(numbers[1:] for numbers in group), []).append(first)
    return [[firsts, *box] for rest, firsts in same_rest.items() for box in _boxes(list(rest))]


def _volume(columns: list[list[int]]) -> int:
    count = 1
    for column in columns:
        count *= len(column)
    return count


def _fill(key: str, columns: list[list[int]]) -> str:
    parts = re.split(r"(?<=\.)#(?=\.|$)", key)
    filled = parts[0]
    for column, part in zip(columns, parts[1:], strict=True):
        filled += (str(column[0]) if len(column) == 1 else "{" + _runs(column) + "}") + part
    return filled.replace("##", "#")


def _runs(numbers: list[int]) -> str:
    runs = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(runs)
