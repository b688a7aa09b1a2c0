"""scripts/differential.py makes the same cases from a seed, and says where two judges disagree.

A function stands in for vLLM; the script itself asks vLLM.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import pytest

import differential
import differential_ask
from differential import Case, draw, main, smallest
from differential_ask import LATER, Answer, Judgement, compare
from differential_draft import MUTATIONS, Draft, Unfit, chance
from differential_formats import base, families, forms
from mquant.checkpoint import Folder, open_checkpoint
from mquant.schemes import SCHEMES

ONLY = sorted(families())
LOADS, REFUSES, UNASKED = Answer("loads"), Answer("refuses"), Answer("not asked")
CLEAN, BROKEN, UNDECIDED = (
    Judgement("clean"),
    Judgement("broken", rules=frozenset({"a"})),
    Judgement("not judged"),
)


def always(answer: Answer) -> Callable[[Sequence[Path]], list[Answer]]:
    return lambda folders: [answer] * len(folders)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_makes_the_same_checkpoints(tmp_path: Path) -> None:
    for number in range(10):
        first, second = (draw(7, number, ONLY) for _ in range(2))
        a = first.make()[0].write(tmp_path / f"{number}-a")
        b = second.make()[0].write(tmp_path / f"{number}-b")
        assert content(a) == content(b)
    assert draw(7, 1, ONLY) != draw(8, 1, ONLY)


def test_at_least_a_third_of_the_cases_are_good() -> None:
    cases = [draw(0, number, ONLY) for number in range(60)]
    good = [case for case in cases if all(MUTATIONS[name].good for name, _ in case.steps)]
    several = [case for case in cases if len(case.steps) > 1]
    assert len(good) >= 20
    assert len(several) >= 10


@pytest.mark.parametrize("family", ONLY)
def test_every_format_is_a_whole_checkpoint(family: str, tmp_path: Path) -> None:
    unfit = {}
    for number, form in enumerate(forms()):
        try:
            draft = base(families()[family], form, chance("0"))
        except Unfit as error:  # AWQ knows some families only; FP8 in blocks needs shapes of 128
            unfit[form] = str(error)
            continue
        checkpoint = open_checkpoint(Folder(draft.write(tmp_path / str(number))))
        assert checkpoint.findings == ()
        assert checkpoint.tensors.keys() == draft.tensors.keys()
    assert len(unfit) <= 2, unfit


def test_every_mutation_changes_some_checkpoint() -> None:
    unused = dict(MUTATIONS)
    for family in ONLY:
        for form in forms():
            for name in list(unused):
                if changes(family, form, name):
                    del unused[name]
    assert unused.keys() == set()


@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_vl_moe"])
def test_mutations_leave_the_schemes_and_families_of_mquant_alone(family: str) -> None:
    def state() -> list[object]:
        return [*(scheme.config_group for scheme in SCHEMES.values()), families()[family].synth]

    before = deepcopy(state())
    for mutation in MUTATIONS.values():
        draft = base(families()[family], "recipe nvfp4", chance("0"))
        with suppress(Unfit):
            if mutation.fits(draft):
                mutation.apply(draft, chance("0"))
    assert state() == before


def changes(family: str, form: str, name: str) -> bool:
    """Return whether a mutation changes a family's checkpoint in a format."""
    try:
        draft = base(families()[family], form, chance(form))
        changed: Draft = draft.copy()
        if not MUTATIONS[name].fits(changed):
            return False
        MUTATIONS[name].apply(changed, chance(name))
    except Unfit:
        return False
    return differential._differs(draft, changed)


@pytest.mark.parametrize(
    ("answer", "judgement", "agreement"),
    [
        (LOADS, CLEAN, "agree"),
        (REFUSES, BROKEN, "agree"),
        (Answer("loads wrong"), BROKEN, "agree"),
        (REFUSES, CLEAN, "called clean"),
        (Answer("loads wrong"), CLEAN, "called clean"),
        (LOADS, BROKEN, "called broken"),
        (LOADS, Judgement("broken", rules=frozenset(LATER)), "later"),
        (LOADS, Judgement("broken", rules=frozenset({*LATER, "a"})), "called broken"),
        (LOADS, UNDECIDED, "not judged"),
        (REFUSES, UNDECIDED, "not judged"),
        (UNASKED, CLEAN, "not asked"),
    ],
)
def test_two_verdicts_agree_or_not(answer: Answer, judgement: Judgement, agreement: str) -> None:
    assert compare(answer, judgement) == agreement


@pytest.mark.parametrize(
    ("answer", "judgement", "counts", "code"),
    [
        (LOADS, CLEAN, (6, 6, 0, 0, 0), 0),
        (REFUSES, CLEAN, (0, 6, 6, 0, 0), 1),
        (LOADS, BROKEN, (0, 6, 0, 0, 0), 1),
        (LOADS, UNDECIDED, (0, 6, 0, 6, 0), 1),
        (UNASKED, CLEAN, (0, 0, 0, 0, 6), 1),
    ],
)
def test_the_last_line_and_the_exit_code_say_whether_the_figures_hold(
    answer: Answer,
    judgement: Judgement,
    counts: tuple[int, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(differential, "judge", lambda _: judgement)
    assert main(["--seed", "1", "--cases", "6", "--only", "llama,qwen3"], always(answer)) == code
    last = "{} of {} agree, {} refused or wrong called clean, {} not judged, {} not asked"
    assert capsys.readouterr().out.splitlines()[-1] == last.format(*counts)


def test_a_crash_of_verify_judges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyError("layers")

    monkeypatch.setattr(differential_ask, "verify", crash)
    assert differential_ask.judge(tmp_path) == Judgement("not judged", "KeyError: 'layers'")


def test_a_disagreement_keeps_only_the_mutations_that_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(differential, "judge", lambda _: CLEAN)
    needed = ("another model_type", "1")
    steps = (("several shards", "0"), needed, ("torch_dtype is called dtype", "2"))
    case = Case("1/0", "llama", "BF16", steps)

    def ask(folders: Sequence[Path]) -> list[Answer]:
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        return [LOADS if config["model_type"] == "llama" else REFUSES for config in configs]

    found = list(differential.outcomes([(3, case)], ask, None))
    (small,) = smallest(found, ask)
    assert small.number == 3
    assert small.case.steps == (needed,)


def test_disagreements_are_kept_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differential, "judge", lambda _: CLEAN)
    arguments = ["--seed", "1", "--case", "4", "--keep", str(tmp_path)]
    main(arguments, always(REFUSES))
    (kept,) = tmp_path.iterdir()
    assert (kept / "config.json").exists()
