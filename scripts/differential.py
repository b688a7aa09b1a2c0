"""Hold `mquant verify` to vLLM: both judge random small checkpoints, good ones and broken ones.

    python scripts/differential.py --seed S --cases N [--only FAMILY,...] [--case I] [--keep DIR]
                                   [--loader PYTHON]

A case is a checkpoint of a family that ships, in one of the formats of differential_formats.py,
changed by up to three mutations (differential_config, _lists, ...). At least a third
of the cases are good: unchanged, or changed in ways that loaders do not mind. Checkpoints consist
of headers and JSON, so `verify` judges their structure, and vLLM loads headers only.

The script prints every disagreement in its smallest form (mutations that it does not need are left
out), the agreement by family and by format, and in its last line the sum. It exits with 0 if both
agree in 99.5 % of the cases, `verify` calls nothing clean that vLLM refuses or loads wrong, and
vLLM could be asked in 90 %. A case depends on the seed and its number only: `--case` repeats one.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import get_args

import differential_config
import differential_files
import differential_lists
import differential_modelopt
import differential_parts
import differential_schemes
import differential_tensors
from differential_ask import Agreement, Answer, Asker, Judgement, compare, judge, vllm
from differential_draft import MUTATIONS, Draft, Unfit, chance
from differential_formats import base, families, forms
from mquant.verify.loaders.install import find_python

REGISTERED = (
    differential_config,
    differential_files,
    differential_lists,
    differential_modelopt,
    differential_parts,
    differential_schemes,
    differential_tensors,
)
BATCH = 400  # cases of one round of vLLM processes, whose start takes seconds
SHRUNK = 150  # disagreements that are made smaller; more would take longer than the run itself
GOOD = 0.4
ENOUGH, NOT_ASKED = 0.995, 0.1


@dataclass(frozen=True)
class Case:
    """A checkpoint to make: `steps` are mutations, each with the seed of its choices."""

    seed: str
    family: str
    form: str
    steps: tuple[tuple[str, str], ...]

    def make(self) -> tuple[Draft, list[str]]:
        """Return the draft and what each step changed. Raises Unfit if a step does not apply."""
        draft = base(families()[self.family], self.form, chance(f"{self.seed}/base"))
        done = []
        for name, seed in self.steps:
            detail = MUTATIONS[name].apply(draft, chance(seed))
            done.append(f"{name}: {detail}" if detail else name)
        return draft, done


@dataclass(frozen=True)
class Outcome:
    """A case, what its steps changed, both verdicts, and whether they agree."""

    number: int
    case: Case
    done: list[str]
    answer: Answer
    judgement: Judgement

    @property
    def agreement(self) -> Agreement:
        """Whether both verdicts agree."""
        return compare(self.answer, self.judgement)

    @property
    def kind(self) -> tuple[str, str, str]:
        """What disagreements have in common: how, by which mutations, in which format."""
        names = " + ".join(name for name, _ in self.case.steps) or "(unchanged)"
        return self.agreement, names, self.case.form


def draw(seed: int, number: int, only: Sequence[str]) -> Case:
    """Return the case of a number. The same arguments give the same case."""
    own = f"{seed}/{number}"
    random = chance(own)
    while True:
        family = random.choice(only)
        case = Case(own, family, random.choice(forms()), ())
        try:
            draft, _ = case.make()
            break
        except Unfit:
            continue
    good = random.random() < GOOD
    count = random.choice((0, 0, 1, 1, 2) if good else (1, 1, 1, 2, 3))
    for _ in range(count):
        case = replace(case, steps=(*case.steps, _step(draft, case, random, good=good)))
    return case


def _step(draft: Draft, case: Case, random: Random, *, good: bool) -> tuple[str, str]:
    """Return a mutation that changes the draft, and change the draft."""
    known = [mutation for _, mutation in sorted(MUTATIONS.items())]
    mutations = [m for m in known if (m.good or not good) and m.fits(draft)]
    weights = [mutation.weight for mutation in mutations]
    while True:
        (mutation,) = random.choices(mutations, weights)
        seed = f"{case.seed}/{len(case.steps)}/{random.random()}"
        changed = draft.copy()
        try:
            mutation.apply(changed, chance(seed))
        except Unfit:
            continue
        if _differs(draft, changed):
            mutation.apply(draft, chance(seed))
            return mutation.name, seed


def _differs(a: Draft, b: Draft) -> bool:
    def state(draft: Draft) -> object:
        return draft.tensors, draft.config, draft.files, draft.cuts, len(draft.edits)

    return state(a) != state(b) or list(a.tensors) != list(b.tensors)


# ------------------------------------------------------------------------------------- asking


def outcomes(cases: Iterable[tuple[int, Case]], ask: Asker, keep: Path | None) -> Iterator[Outcome]:
    """Yield the outcome of every case that can be made; keep the folders of disagreements."""
    batch: list[tuple[int, Case]] = []
    for numbered in cases:
        batch.append(numbered)
        if len(batch) == BATCH:
            yield from _batch(batch, ask, keep)
            batch = []
    if batch:
        yield from _batch(batch, ask, keep)


def _batch(batch: list[tuple[int, Case]], ask: Asker, keep: Path | None) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory(prefix="mquant-differential-") as where:
        made: list[tuple[int, Case, list[str], Path]] = []
        for number, case in batch:
            try:
                draft, done = case.make()
            except Unfit:  # a smaller form lacks what a later step changes
                continue
            folder = draft.write(Path(where, f"{len(made)}"))
            made.append((number, case, done, folder))
        folders = [folder for *_, folder in made]
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(ask, folders)
            judgements = [judge(folder) for folder in folders]
        for (number, case, done, folder), answer, judgement in zip(
            made, answers.result(), judgements, strict=True
        ):
            outcome = Outcome(number, case, done, answer, judgement)
            if keep and outcome.agreement not in ("agree", "not asked"):
                shutil.copytree(folder, keep / f"{number}-{len(case.steps)}", dirs_exist_ok=True)
            yield outcome


def smallest(found: Sequence[Outcome], ask: Asker) -> list[Outcome]:
    """Return each disagreement with as few mutations as show the same disagreement."""
    smaller = [
        (number, replace(outcome.case, steps=steps))
        for number, outcome in enumerate(found)
        for count in range(len(outcome.case.steps))
        for steps in combinations(outcome.case.steps, count)
    ]
    best = list(found)
    for outcome in outcomes(smaller, ask, None):
        old = best[outcome.number]
        fewer = len(outcome.case.steps) < len(old.case.steps)
        if fewer and outcome.agreement == found[outcome.number].agreement:
            best[outcome.number] = replace(outcome, number=old.number)
    return best


# ----------------------------------------------------------------------------------- printing


def show(outcome: Outcome, seed: int) -> None:
    """Print one disagreement."""
    case, answer, said = outcome.case, outcome.answer, outcome.judgement
    print(
        f"\n{outcome.agreement}: case {outcome.number} of seed {seed}, {case.family}, {case.form}"
    )
    for step in outcome.done or ["(unchanged)"]:
        print(f"  made by  {step}")
    print(f"  verify   {said.verdict}{f': {said.words[:300]}' if said.words else ''}")
    stage = f" ({answer.stage})" if answer.stage else ""
    print(f"  vLLM     {answer.verdict}{stage}: {answer.words[:300]}".rstrip(": "))


def table(title: str, found: Sequence[Outcome], key: Callable[[Outcome], str]) -> None:
    """Print the agreement of each part of the cases."""
    columns = get_args(Agreement)
    print(f"\n{title:34}" + "".join(f"{column:>15}" for column in columns))
    parts: Counter[tuple[str, str]] = Counter((key(o), o.agreement) for o in found)
    for name in sorted({name for name, _ in parts}):
        print(f"{name:34}" + "".join(f"{parts[name, column] or '-':>15}" for column in columns))


def kinds(found: Iterable[Outcome], most: int = 40) -> None:
    """Print how often each kind of disagreement was found."""
    print("\nkinds of disagreement, in their smallest form")
    for (agreement, names, form), count in Counter(o.kind for o in found).most_common(most):
        print(f"{count:5}  {agreement:14} {names} | {form}")


def summary(found: Sequence[Outcome]) -> tuple[str, bool]:
    """Return the last line, and whether the figures hold."""
    counts = Counter(outcome.agreement for outcome in found)
    agree, clean = counts["agree"] + counts["later"], counts["called clean"]
    asked = len(found) - counts["not asked"]
    line = (
        f"{agree} of {asked} agree, {clean} refused or wrong called clean, "
        f"{counts['not judged']} not judged, {counts['not asked']} not asked"
    )
    holds = agree >= ENOUGH * asked and not clean
    return line, holds and asked > 0 and counts["not asked"] <= NOT_ASKED * len(found)


def main(arguments: Sequence[str] | None = None, ask: Asker | None = None) -> int:
    """Run the cases and return the exit code. `ask` replaces vLLM in tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--keep", type=Path, help="keep the checkpoints of disagreements here")
    parser.add_argument("--loader", type=Path, help="the Python of an environment that has vLLM")
    options = parser.parse_args(arguments)
    only = options.only.split(",") if options.only else sorted(families())
    ask = ask or vllm(options.loader or find_python())
    numbers = range(options.cases) if options.case is None else [options.case]
    start = time.monotonic()
    drawn = ((number, draw(options.seed, number, only)) for number in numbers)
    found = list(outcomes(drawn, ask, options.keep))
    asked = time.monotonic()
    apart = [o for o in found if o.agreement not in ("agree", "later", "not asked")]
    shrunk = smallest(apart[:SHRUNK], ask) + apart[SHRUNK:]
    for outcome in shrunk if options.case is None or shrunk else found:
        show(outcome, options.seed)
    kinds(shrunk)
    table("family", found, lambda outcome: outcome.case.family)
    table("format", found, lambda outcome: outcome.case.form)
    loads = sum(outcome.answer.verdict == "loads" for outcome in found)
    print(
        f"\nseed {options.seed}: {len(found)} cases, {loads} of them load; {asked - start:.0f} s, "
        f"and {time.monotonic() - asked:.0f} s to make {len(apart)} disagreements smaller"
    )
    line, holds = summary(found)
    print(line)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
