"""`mquant inspect`: describe a checkpoint."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from mquant.cli.options import FamilyFile, FormatChoice, Revision, Src
from mquant.cli.output import Format, output
from mquant.cli.source import example, open_source
from mquant.cli.tables import facts, table
from mquant.text import both_sizes, clean, names, plural, size

if TYPE_CHECKING:
    from mquant.verify.inspect import Inspection, Portion


_ROUTERS = {None: "none", True: "quantized", False: "not quantized"}


def inspect(
    src: Src = None,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Say what a checkpoint is, and what is unusual about it, from its headers alone.

    Example: mquant inspect MiniMaxAI/MiniMax-M2
    """
    with output("inspect", output_format) as out:
        source = open_source(src, revision, example(inspect))
        from mquant.checkpoint import open_checkpoint
        from mquant.family_files import load_families
        from mquant.verify.inspect import inspect as look

        inspection = look(open_checkpoint(source), load_families(family))
        out.put(**inspection.to_json())
        out.show(render(inspection))
        out.report(inspection.findings)


def render(inspection: "Inspection") -> RenderableType:
    """Render the inspection for a person, without the findings."""
    return Group(
        Text(clean(inspection.name), "bold"),
        "",
        facts(_facts(inspection)),
        "",
        _portions("role", inspection.roles),
        "",
        _portions("dtype", inspection.dtypes),
        "",
    )


def _facts(inspection: "Inspection") -> list[tuple[str, str]]:
    from mquant.loader_model.vllm.predict import VERSION

    family = inspection.family or f"unknown (model_type {inspection.model_type})"
    experts = _count(inspection.experts)
    if inspection.pruned:
        experts += f" of the family's {inspection.unpruned_experts}: looks expert-pruned"
    parameters = _count(inspection.parameters)
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if (inspection.parameters or 0) >= unit:
            parameters += f" ({(inspection.parameters or 0) / unit:,.2f} {name})"
            break
    shards = plural(inspection.shards, "shard")
    return [
        ("Family", family),
        ("Quantized", inspection.quantization or "no"),
        *([("KV cache", clean(inspection.kv_cache))] if inspection.kv_cache else []),
        *([("Excluded", _excluded(inspection))] if inspection.excluded else []),
        *_precisions(inspection),
        ("Routers", _ROUTERS[inspection.routers_quantized]),
        (f"vLLM {VERSION}", clean(inspection.vllm)),
        ("Layers", _count(inspection.layers)),
        ("Experts", experts),
        ("Top-k", _count(inspection.experts_per_token)),
        ("Context", _count(inspection.context, " tokens")),
        ("Vocabulary", _count(inspection.vocabulary, " tokens")),
        ("Parameters", parameters),
        ("Tensors", f"{inspection.tensors:,} in {shards}"),
        ("Bytes", both_sizes(inspection.bytes)),
    ]


def _excluded(inspection: "Inspection") -> str:
    count = len(inspection.excluded)
    entries = "1 entry" if count == 1 else f"{count:,} entries"
    return f"{entries}: {clean(names(inspection.excluded))}"


def _precisions(inspection: "Inspection") -> list[tuple[str, str]]:
    """Return a line for all roles that are stored alike, in the order of the roles."""
    lines: dict[str, list[str]] = {}
    for each in inspection.precisions:
        stored = " and ".join(each.formats) or "not known"
        plain = each.bits is None or each.bits in (16.0, 32.0)
        lines.setdefault(stored if plain else f"{stored} ({each.bits:g} bits a weight)", []).append(
            each.role.replace("_", " ")
        )
    rows = [f"{stored}: {', '.join(roles)}" for stored, roles in lines.items()]
    return [("Weights" if number == 0 else "", row) for number, row in enumerate(rows)]


def _count(value: int | None, unit: str = "") -> str:
    return "not known" if value is None else f"{value:,}{unit}"


def _portions(title: str, portions: "tuple[Portion, ...]") -> RenderableType:
    rows = table((title, "left"), ("tensors", "right"), ("bytes", "right"))
    for portion in portions:
        rows.add_row(clean(portion.name), f"{portion.tensors:,}", size(portion.bytes))
    return rows
