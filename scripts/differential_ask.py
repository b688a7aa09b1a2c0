"""Ask vLLM and `mquant verify` about checkpoints, and compare their verdicts."""

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from mquant.checkpoint import Folder
from mquant.family_files import load_families
from mquant.verify.judge import Depth, verify
from mquant.verify.loaders.ask_vllm import PROBE, read_verdict

LATER: Final[dict[str, str]] = {
    "kv-scale-invalid": "vLLM looks at the scales of a KV cache after loading",
    "top-k-beyond-experts": "vLLM routes after loading",
    "tensor-stored-twice": "every loader takes one of the two; which one is right, no header says",
}
"""Rules about what no load check sees, and why. Errors of these rules alone are no disagreement."""
_START, _SECONDS = 120, 20  # at most, to import vLLM and for a checkpoint, on a busy machine

Agreement = Literal["agree", "later", "called clean", "called broken", "not judged", "not asked"]


@dataclass(frozen=True)
class Answer:
    """A loader's verdict (`loads`, `refuses`, `loads wrong`, `not asked`), its stage and words."""

    verdict: str
    stage: str = ""
    words: str = ""


@dataclass(frozen=True)
class Judgement:
    """The verdict of `verify`: `clean`, `broken` or `not judged`, and the first rule and message.

    `rules` are the rules of all errors.
    """

    verdict: str
    words: str = ""
    rules: frozenset[str] = frozenset()


Asker = Callable[[Sequence[Path]], list[Answer]]
"""A function that asks a loader about folders."""


def judge(folder: Path) -> Judgement:
    """Return what `mquant verify` says from headers and JSON alone; an exception judges nothing."""
    try:
        report = verify(Folder(folder), load_families(), Depth.STRUCTURE)
    except Exception as error:  # noqa: BLE001  (a bug of verify is a disagreement, not the end)
        return Judgement("not judged", f"{type(error).__name__}: {error}")
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if errors:
        first = f"{errors[0].rule}: {errors[0].message}"
        return Judgement("broken", first, frozenset(finding.rule for finding in errors))
    if report.undecided:
        return Judgement("not judged", report.undecided)
    return Judgement("clean")


def compare(answer: Answer, judgement: Judgement) -> Agreement:
    """Return whether a loader's verdict and that of `verify` agree."""
    if answer.verdict == "not asked":
        return "not asked"
    if judgement.verdict == "not judged":
        return "not judged"
    loads = answer.verdict == "loads"
    if loads == (judgement.verdict == "clean"):
        return "agree"
    if not loads:
        return "called clean"
    return "later" if judgement.rules <= LATER.keys() else "called broken"


def vllm(python: Path) -> Asker:
    """Return a function that asks the vLLM of a Python, in a process for each core."""

    def ask(folders: Sequence[Path]) -> list[Answer]:
        cores = min(len(os.sched_getaffinity(0)), -(-len(folders) // 4)) or 1
        parts = [folders[start::cores] for start in range(cores)]
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda part: _probe(python, part), parts))
        return [_answer(folder) for folder in folders]

    return ask


def _result(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.vllm.json")


def _probe(python: Path, folders: Iterable[Path]) -> None:
    """Have one vLLM process load folders and write each result beside its folder."""
    paths = [str(path) for folder in folders for path in (folder, _result(folder))]
    with suppress(subprocess.TimeoutExpired):  # a folder without a result is not asked
        subprocess.run(
            [str(python), "-I", str(PROBE), *paths],
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_START + _SECONDS * len(paths),
        )


def _answer(folder: Path) -> Answer:
    try:
        reported: dict[str, Any] = json.loads(_result(folder).read_text("utf-8"))
    except (OSError, ValueError):
        return Answer("not asked", "start", "it gave no answer")
    verdict = read_verdict(reported)
    words = verdict.words or " ".join(finding.message for finding in verdict.findings)
    return Answer(verdict.verdict, str(reported.get("stage", "")), words)
