"""Write the sizes of releases in four and eight bits into docs/families.md.

    python scripts/released_sizes.py [--check]

Each release is written as headers only, with the shapes of its config.json, in the format that the
family's file has in `synth.formats`; the size of the result is that of a plan. `--check` writes
nothing, and fails if the page differs.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mquant.checkpoint import Folder, open_checkpoint
from mquant.family import Family
from mquant.family_files import load_families
from mquant.plan import Plan, make_plan
from mquant.recipe import find_recipe
from mquant.synth import Precision, synth

PAGE: Final = Path(__file__).parent.parent / "docs/families.md"
HEAD: Final = """
## Releases in four and eight bits

Written by `scripts/released_sizes.py`. The releases' own sizes, from the shapes in config.json, and
those of `mquant plan --recipe nvfp4`. MXFP4 becomes NVFP4 with the same codes and a scale for 16
weights instead of 32; what is BF16 in the result was FP8, or is BF16 in the release too.

| family | `mquant synth --dtype` | tensors | GB | as NVFP4, tensors | GB |
| --- | --- | --- | --- | --- | --- |
"""


def section() -> str:
    """Return the section of the page."""
    rows = (row for family in load_families().values() for row in _rows(family))
    return HEAD + "".join(rows)


def _rows(family: Family) -> Iterator[str]:
    for dtype in family.synth.formats:
        with tempfile.TemporaryDirectory() as folder:
            src = Path(folder) / "src"
            made = synth(src, family, precision=Precision(dtype), shapes_only=True)
            plan = make_plan(open_checkpoint(Folder(src)), find_recipe("nvfp4"), load_families())
        cells = (family.title, f"`{dtype}`", f"{made.tensors:,}", f"{made.nbytes / 1e9:,.1f}")
        yield f"| {' | '.join((*cells, *_result(plan)))} |\n"


def _result(plan: Plan) -> tuple[str, str]:
    if plan.refusals:
        return f"plan refuses ({plan.refusals[0].rule})", ""
    return f"{plan.output_tensors:,}", f"{plan.output_bytes / 1e9:,.1f}"


def main() -> int:
    """Write the section, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = PAGE.read_text("utf-8")
    page = before.partition(HEAD.partition("\n\n")[0])[0] + section()
    if options.check:
        print("" if page == before else f"{PAGE.name} is behind: run scripts/released_sizes.py")
        return int(page != before)
    PAGE.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
