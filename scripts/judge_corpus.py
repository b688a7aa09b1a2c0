"""Have vLLM judge every case of the tests' corpus, and compare its verdicts with mquant's.

Run it: scripts/test-loaders.sh, or python scripts/judge_corpus.py [--check]

The script writes docs/loaders.md and tests/data/vllm-verdicts.json; with `--check`, it fails if one
of the files differs from what the script would write. The script always fails if `mquant verify`
finds no error in a checkpoint that vLLM refuses or loads wrong, or that the corpus calls wrong in
its numbers alone; and if `mquant verify` finds an error in any other checkpoint.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mquant.checkpoint import Folder
from mquant.family_files import load_families
from mquant.verify.judge import Depth, verify
from mquant.verify.loaders.ask_vllm import PROBE, Verdict, read_verdict
from mquant.verify.loaders.install import find_python

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

from corpus import Case  # noqa: E402  (the tests' folder is no package)
from corpus_found import CASES  # noqa: E402
from run import TRAINED, quantize_nvfp4  # noqa: E402

PAGE, DATA = ROOT / "docs/loaders.md", ROOT / "tests/data/vllm-verdicts.json"
OWN = Path(__file__).with_name("loaders.md")
"""The first part of the page, which is written by hand."""
HEAD = """## What vLLM does with broken checkpoints, and what `mquant verify` reports

Written by `scripts/test-loaders.sh`, which breaks the tiny trained checkpoint in {count} ways, has
`mquant verify` judge each result, and has vLLM {version} load its headers; do not edit. The text
above is that of scripts/loaders.md.

vLLM *refuses* a checkpoint, *loads* the checkpoint, or *loads wrong*: vLLM drops tensors, leaves
parameters unset, or spreads or converts tensors, without a message. No load check sees a fault in
the numbers alone: such cases say why they are wrong. mquant's errors are **bold**, its warnings are
not; an info is listed only if the case is about this info.

`mquant verify` does not ask vLLM here: a model of vLLM's loader (`src/mquant/loader_model/vllm/`)
predicts from headers and config.json what vLLM does, and errors about loading count only if the
model says that vLLM does not load the checkpoint. `scripts/differential.py` holds the model to vLLM
by random checkpoints.

vLLM is *not asked* if its CPU build has no kernel for a layer. The kernels of NVFP4, of FP8 in
blocks and of packed integers need a GPU too, but the probe stands in for these kernels, because
every kernel loads the same tensors. Experts in INT8 stay not asked.

| case | mquant verify | vLLM | its words, or what it does |
| --- | --- | --- | --- |
"""


def main() -> int:
    """Judge all cases, write or check the files, and return the exit code."""
    with tempfile.TemporaryDirectory() as where:
        rows = judge(Path(where))
    version = rows[0][2].version
    page = (
        OWN.read_text("utf-8")
        + HEAD.format(count=len(rows) - 1, version=version)
        + "".join(line(case, rules, verdict) for case, rules, verdict in rows)
    )
    verdicts = {case.name: {"verdict": v.verdict, "words": words(v)} for case, _, v in rows}
    data = json.dumps({"vllm": version, "verdicts": verdicts}, indent=1) + "\n"
    bad = [
        case.name
        for case, rules, verdict in rows
        if ("error" in rules.values()) != case.is_wrong(verdict.verdict)
    ]
    for name in bad:
        print(f"disagreement: {name}")
    for path, text in ((PAGE, page), (DATA, data)):
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            print(f"{path.relative_to(ROOT)} is not what vLLM {version} says now")
            bad.append(path.name)
    print(f"{len(rows)} cases, vLLM {version}: {len(bad)} disagreements")
    return bool(bad)


def judge(folder: Path) -> list[tuple[Case, dict[str, str], Verdict]]:
    """Return each case with mquant's rules and their severity, and vLLM's verdict."""
    good = quantize_nvfp4(TRAINED, folder / "good", shard_bytes=10**6)
    families = load_families()
    rules_of: list[dict[str, str]] = []
    pairs: list[tuple[Path, Path]] = []
    for number, case in enumerate(CASES):
        place = folder / str(number)
        place.mkdir()
        bad = case.make(good, place)
        report = verify(Folder(bad), families, Depth.NUMBERS)
        shown = [f for f in report.findings if f.severity != "info" or f.rule in case.rules]
        rules = {finding.rule: finding.severity for finding in shown}
        rules_of.append(rules | ({"(not judged)": ""} if report.undecided else {}))
        pairs.append((bad, place / "vllm.json"))
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(ask_vllm, (pairs[i::cores] for i in range(cores))))
    answers = [json.loads(path.read_text("utf-8")) for _, path in pairs]
    return [
        (case, rules, read_verdict(answer))
        for case, rules, answer in zip(CASES, rules_of, answers, strict=True)
    ]


def ask_vllm(pairs: list[tuple[Path, Path]]) -> None:
    """Have one vLLM process judge folders and write each verdict to the folder's file."""
    paths = [str(path) for pair in pairs for path in pair]
    subprocess.run(
        [str(find_python()), "-I", str(PROBE), *paths],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def words(verdict: Verdict) -> str:
    """Return vLLM's words, shortened and without paths, which change from run to run."""
    text = verdict.words or " ".join(finding.message for finding in verdict.findings)
    text = text.partition(" For further information")[0]
    return " ".join(
        "PATH" if part.lstrip("'`{").startswith("/") else part for part in text.split()
    )[:160]


def line(case: Case, rules: dict[str, str], verdict: Verdict) -> str:
    """Return a row of the table."""
    findings = ", ".join(f"**{r}**" if s == "error" else r for r, s in rules.items()) or "clean"
    vllm = words(verdict) or (f"({case.silent})" if case.silent else "")
    cells = (case.name, findings, verdict.verdict, vllm)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
