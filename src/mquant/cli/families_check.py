"""`mquant families check`: test a family file on a checkpoint made from the file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from mquant.cli.options import FormatChoice
from mquant.cli.output import Format, Output, output
from mquant.cli.source import open_source
from mquant.cli.tables import facts, table
from mquant.errors import DataFileError, Refused
from mquant.text import clean, plural, size

if TYPE_CHECKING:
    from mquant.checkpoint import Checkpoint, Source
    from mquant.family import Family
    from mquant.findings import Finding

_DECIDING: Final = "nvfp4"
_MOST_BYTES: Final = 1_000_000_000
_MOST_TENSORS: Final = 100_000

File = Annotated[Path, typer.Argument(metavar="FILE", help="The family file.")]
AgainstSrc = Annotated[
    str | None,
    typer.Option(
        "--against", metavar="SRC", help="A checkpoint: also say what of the file does not fit it."
    ),
]
Refusals = dict[str, tuple["Finding", ...]]


def check(
    file: File, against: AgainstSrc = None, output_format: FormatChoice = Format.HUMAN
) -> None:
    """Check a family file: its keys and rows, and whether recipes accept its tiny checkpoint.

    `mquant synth --family FILE` writes the same checkpoint. Recipes that need data are left out.
    With --against, every tensor of SRC is compared with the rows: names, layers and shapes. Exit
    code 1: the file is wrong, or does not fit SRC, or nvfp4 refuses the checkpoint for another
    reason than that its experts have biases.

    Example: mquant families check ./my_model.yaml
    """
    with output("families.check", output_format) as out:
        from mquant.data_files import temporary_folder
        from mquant.family_files import load_families

        family = load_families(file)[str(file)]
        out.put(**_described(family))
        out.show(_render(family))
        if against is not None:
            _compare(out, family, file, open_source(against, None))
        with temporary_folder() as folder:
            checkpoint = _tiny(family, Path(folder) / "tiny")
            refusals = _refusals(checkpoint, family)
        out.put(
            checkpoint={"tensors": len(checkpoint.tensors), "bytes": checkpoint.nbytes},
            recipes=[
                {"name": name, "plans": not findings, "findings": [f.to_json() for f in findings]}
                for name, findings in refusals.items()
            ],
        )
        out.show(_recipes(checkpoint, refusals))
        from mquant.plan.never_quantized import EXPERT_BIAS

        if wrong := tuple(f for f in refusals[_DECIDING] if f.rule != EXPERT_BIAS.id):
            raise Refused(wrong)


def _compare(out: Output, family: "Family", file: Path, source: "Source") -> None:
    """Say what of a family file does not fit a checkpoint. Raises DataFileError if anything."""
    from mquant.checkpoint import open_checkpoint
    from mquant.family_draft.against import differences

    found = differences(family, open_checkpoint(source))
    out.put(against=source.name, differences=[asdict(each) for each in found])
    if not found:
        out.show("", Text(clean(f"The file fits every tensor of {source.name}."), "green"))
        return
    rows = table(("difference", "left"), ("tensors", "right"), ("row or tensor", "left"))
    for each in found:
        rows.add_row(each.kind, f"{each.count:,}", clean(f"{each.name}: {each.says}"))
    out.show("", rows)
    raise DataFileError(
        f"{file.name} does not fit {source.name}: {plural(len(found), 'difference')}.",
        "Correct the family file.",
    )


def _described(family: "Family") -> dict[str, Any]:
    return {
        "name": family.name,
        "title": family.title,
        "model_types": list(family.model_types),
        "rows": len(family.tensors),
        "roles": dict(Counter(row.role.value for row in family.tensors)),
        "fused_sets": {
            name: [row.name for row in rows] for name, rows in family.fused_sets.items()
        },
        "blocks": dict(family.blocks),
    }


def _tiny(family: "Family", folder: Path) -> "Checkpoint":
    """Write the family's tiny checkpoint. Raises DataFileError if the checkpoint is not tiny."""
    from mquant.checkpoint import Folder, open_checkpoint
    from mquant.synth import Precision, Sizes, make_config, make_tensors, synth

    config = make_config(family, Sizes(), Precision.BF16, tiny=True)
    total = 0
    for number, tensor in enumerate(make_tensors(family, config, Precision.BF16), 1):
        total += tensor.nbytes
        if total > _MOST_BYTES or number > _MOST_TENSORS:
            raise DataFileError(
                f"{family.name}: the checkpoint of synth.tiny has more than {size(_MOST_BYTES)}, "
                f"or more than {_MOST_TENSORS:,} tensors.",
                "Set smaller sizes in synth.tiny.",
            )
    return open_checkpoint(Folder(synth(folder, family).path))


def _refusals(checkpoint: "Checkpoint", family: "Family") -> Refusals:
    """Return the refusals of each recipe that needs no data; empty for a recipe that accepts."""
    from mquant.plan import make_plan
    from mquant.recipe import load_recipes

    recipes = {name: recipe for name, recipe in load_recipes().items() if not recipe.needs_data}
    return {
        name: make_plan(checkpoint, recipe, {family.name: family}).refusals
        for name, recipe in recipes.items()
    }


def _render(family: "Family") -> RenderableType:
    roles = Counter(row.role.value for row in family.tensors)
    fused = {name: ", ".join(row.short for row in rows) for name, rows in family.fused_sets.items()}
    return Group(
        Text.assemble((clean(family.title), "bold"), f"  family {clean(family.name)}"),
        "",
        facts(
            [
                ("model_type", ", ".join(family.model_types)),
                ("Rows", f"{len(family.tensors):,}"),
                ("Roles", ", ".join(f"{role} {count:,}" for role, count in roles.items())),
                *_listed("Fused sets", fused),
                *_listed("Blocks", family.blocks),
            ]
        ),
    )


def _listed(title: str, rows: Mapping[str, str]) -> list[tuple[str, str]]:
    lines = [f"{name}: {text}" for name, text in rows.items()] or ["none"]
    return [(title if number == 0 else "", line) for number, line in enumerate(lines)]


def _recipes(checkpoint: "Checkpoint", refusals: Refusals) -> RenderableType:
    rows = table(("recipe", "left"), ("plan", "left"))
    for name, why in refusals.items():
        cell = Text("refused: " + clean(why[0].message), "red") if why else Text("made", "green")
        rows.add_row(clean(name), cell)
    amount = f"{plural(len(checkpoint.tensors), 'tensor')}, {size(checkpoint.nbytes)}"
    return Group("", f"Plans of a tiny checkpoint ({amount}):", "", rows)
