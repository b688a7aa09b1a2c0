"""How loaders match entries of `ignore`, `targets` and similar lists against module names.

The entries are untrusted, and some regular expressions never end. So every entry that is not a
plain comparison is matched in a separate process, which is killed when its time is up.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from mquant.errors import SourceError

MAX_ENTRIES: Final = 100_000
MAX_LENGTH: Final = 1_000
MAX_MATCHES: Final = 3_000_000
"""Limit on the matches of all entries together, because matches are held in memory."""
TIME_LIMIT: Final = 30.0
"""Seconds for all entries. A dozen expressions on a model of 30,000 modules take about one."""


class Style(StrEnum):
    """The matching rules of one loader. An entry always matches the name that equals it.

    NAMES (compressed-tensors, in vLLM): also `re:` and an expression, anchored at the start only.
    GLOBS (ModelOpt, in vLLM): also any part of the name, or a glob for the whole name.
    PARTS (FP8, in transformers): also whole dotted parts of the name.
    EXACT (FP8, in vLLM): nothing more.
    """

    NAMES = "names"
    GLOBS = "globs"
    PARTS = "parts"
    EXACT = "exact"


@dataclass(frozen=True)
class Matches:
    """The names that each entry matches; `bad` has the entries that no loader can read, and why."""

    by_entry: Mapping[str, frozenset[str]]
    bad: Mapping[str, str]

    @cached_property
    def names(self) -> frozenset[str]:
        """The names that at least one entry matches."""
        return frozenset().union(*self.by_entry.values())


def match(entries: Sequence[str], names: Iterable[str], style: Style) -> Matches:
    """Match entries against names as loaders do.

    Raises SourceError for a list that is too long, or takes too long, to be judged.
    """
    if len(entries) > MAX_ENTRIES or any(len(entry) > MAX_LENGTH for entry in entries):
        raise SourceError(
            f"The ignore list cannot be judged: it has more than {MAX_ENTRIES:,} entries, or one "
            f"of more than {MAX_LENGTH:,} characters.",
            "Write fewer and shorter entries, such as `re:` patterns.",
        )
    if not entries:
        return Matches({}, {})
    present = frozenset(names)
    distinct = list(dict.fromkeys(entries))
    slow = [entry for entry in distinct if not _is_plain(entry, style)]
    known = sorted(present) if slow else []
    answers = dict(zip(slow, _ask(slow, known, style), strict=True)) if slow else {}
    by_entry: dict[str, frozenset[str]] = {}
    bad: dict[str, str] = {}
    for entry in distinct:
        answer = answers.get(entry)
        if isinstance(answer, str):
            bad[entry] = answer
        elif answer is not None:
            by_entry[entry] = frozenset(known[number] for number in answer)
        else:
            by_entry[entry] = frozenset({entry}) & present
    return Matches(by_entry, bad)


def _is_plain(entry: str, style: Style) -> bool:
    return style is Style.EXACT or (style is Style.NAMES and not entry.startswith("re:"))


# The program prints a line for each entry: the indexes of the matched names, or the fault.
_PROGRAM: Final = r"""
import fnmatch, json, re, resource, sys

resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
task = json.load(sys.stdin)
left = task["most"]

def test(entry, style):
    if style == "names":
        return re.compile(entry[3:]).match
    if style == "parts":
        return lambda name: f".{entry}." in f".{name}."
    glob = re.compile(fnmatch.translate(entry)).match
    return lambda name: entry in name or glob(name)

for entry in task["entries"]:
    try:
        matches = test(entry, task["style"])
        answer = [number for number, name in enumerate(task["names"]) if matches(name)]
        left -= len(answer)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        answer = str(error) or type(error).__name__
    if left < 0:
        sys.exit("too many matches")
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
"""


def _ask(entries: Sequence[str], names: Sequence[str], style: Style) -> list[list[int] | str]:
    task = json.dumps(
        {"entries": entries, "names": names, "style": style.value, "most": MAX_MATCHES}
    )
    # -I and -S: Python runs no code of the environment or this folder, and starts fast.
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        run = subprocess.run(  # noqa: S603 -- our own program; untrusted input goes to stdin
            command, input=task.encode(), capture_output=True, timeout=TIME_LIMIT, check=True
        )
    except subprocess.TimeoutExpired as timeout:
        entry = entries[min((timeout.stdout or b"").count(b"\n"), len(entries) - 1)]
        raise SourceError(
            f"The ignore list cannot be judged: matching reached {entry!r} in {TIME_LIMIT:g} s.",
            "Write a simpler entry, without repeats inside repeats; vLLM would take as long.",
        ) from None
    except subprocess.CalledProcessError as failure:
        many = b"too many matches" in failure.stderr
        what = f"its entries match more than {MAX_MATCHES:,} names" if many else "its process died"
        raise SourceError(
            f"The ignore list cannot be judged: {what}.",
            "Write fewer and simpler entries; check that this machine has memory left.",
        ) from None
    except OSError as error:
        raise SourceError(
            f"The ignore list cannot be judged: its process failed ({type(error).__name__}).",
            "Check that this machine has memory and processes left.",
        ) from error
    return [json.loads(line) for line in run.stdout.splitlines()]
