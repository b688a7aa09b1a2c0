"""Quantize with every shipped recipe, and have vLLM load the result's headers.

Run it: scripts/test-loaders.sh, or python scripts/judge_recipes.py

The source is the tests' trained checkpoint, or a synthetic checkpoint for recipes whose blocks do
not divide the trained checkpoint's shapes. The script fails if `mquant verify` is not clean, or if
vLLM does anything but load.
"""

import sys
import tempfile
from pathlib import Path

from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.plan import Plan, make_plan
from mquant.recipe import Calibration, Recipe, load_recipes
from mquant.runs.quantize import quantize
from mquant.verify.judge import Depth, verify
from mquant.verify.loaders.install import find_python

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from run import FIXTURES, TRAINED, wide

TEXT = str(FIXTURES / "heldout.txt")


def main() -> int:
    """Try each recipe, and return the number of recipes that fail as exit code."""
    failed = 0
    with tempfile.TemporaryDirectory() as where:
        divisible = wide(Path(where) / "wide")
        for name, recipe in load_recipes().items():
            plans = [
                plan for src in (TRAINED, divisible) if not (plan := planned(src, recipe)).refusals
            ]
            failed += not plans or not loads(plans[0], Path(where) / name)
    return failed


def planned(src: Path, recipe: Recipe) -> Plan:
    """Return the plan of a recipe for a checkpoint, with little calibration data."""
    few = recipe.model_copy(update={"calibration": Calibration(samples=4, length=64)})
    return make_plan(open_checkpoint(Folder(src)), few, load_families())


def loads(plan: Plan, out: Path) -> bool:
    """Carry out a plan, print the verdicts, and return whether both are good."""
    quantize(plan, out, data=TEXT if plan.recipe.needs_data else None)
    parent = plan.survey.checkpoint.source
    report = verify(Folder(out), load_families(), Depth.FULL, parent, vllm=find_python())
    wrong = [finding.rule for finding in report.findings if finding.severity != "info"]
    verdict = report.loader.verdict if report.loader else "not asked"
    print(f"{plan.recipe.name}, {parent.name}: {', '.join(wrong) or 'clean'}; vLLM: {verdict}")
    return not wrong and verdict == "loads"


if __name__ == "__main__":
    sys.exit(main())
