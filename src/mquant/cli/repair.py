"""`mquant repair`: repair a broken checkpoint with its parent."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from mquant.cli.options import (
    DryRun,
    FamilyFile,
    FormatChoice,
    From,
    Importance,
    Out,
    Restart,
    Revision,
    Src,
    Workers,
)
from mquant.cli.output import Format, Output, output
from mquant.cli.progress import progress
from mquant.cli.source import default_out, example, open_source
from mquant.cli.tables import facts
from mquant.errors import UsageError
from mquant.loader_model.vllm.predict import VERSION
from mquant.text import names, plural, size

if TYPE_CHECKING:
    from mquant.checkpoint import Source
    from mquant.repair.diagnose import Diagnosis
    from mquant.runs.run import Result


Compared = Annotated[
    Literal["structure", "numbers", "full"] | None,
    typer.Option(
        "--depth",
        help="structure: verify headers and JSON; numbers: all data too, and compare a sample with "
        "PARENT; full: compare all. Default: numbers for a folder, structure for a hub repo; "
        "nothing is compared with a PARENT on the hub.",
    ),
]
InPlace = Annotated[
    bool,
    typer.Option("--in-place", help="Repair SRC itself. If interrupted, run the command again."),
]


def repair(
    src: Src = None,
    parent: From = None,
    out_folder: Out = None,
    in_place: InPlace = False,
    dry_run: DryRun = False,
    depth: Compared = None,
    importance: Importance = None,
    workers: Workers = None,
    restart: Restart = False,
    family: FamilyFile = None,
    revision: Revision = None,
    output_format: FormatChoice = Format.HUMAN,
) -> None:
    """Repair a broken checkpoint with its parent.

    SRC is compared with the parent as `verify --against` does, at the same --depth.
    If vLLM loads the tensors with another config.json, only config.json is mended. Otherwise
    tensors that loaders refuse quantized, or that are missing, downcast, renamed or wrong, are
    replaced by the tensors of a correct run, in their old shards. Unchanged shards are hard-linked.
    For a hub repo only the files to upload are written.

    Example: mquant repair ./MiniMax-M2.7-REAP-NVFP4 --from ./MiniMax-M2.7-REAP -o ./Repaired
    """
    with output("repair", output_format) as out:
        source = _source(src, parent, revision, out_folder, in_place=in_place)
        from mquant.checkpoint import Folder
        from mquant.family_files import load_families
        from mquant.repair.diagnose import diagnose
        from mquant.repair.repair import finish_in_place, repair_in_place
        from mquant.repair.repair import repair as repair_into
        from mquant.verify.judge import Depth

        if in_place and isinstance(source, Folder) and not dry_run and finish_in_place(source.root):
            out.put(out=str(source.root), needed=True)
            out.show(Text.assemble(("Repaired", "bold green"), f" {source.root}"))
            return
        original = open_source(parent, None, example(repair))
        with progress(out) as emit:
            chosen = None if depth is None else Depth(depth)
            diagnosis = diagnose(
                source, original, load_families(family), chosen, emit, importance=importance
            )
        # Findings that the repair corrects do not fail this run.
        out.report(diagnosis.report.findings, failing=frozenset())
        _tell(out, diagnosis)
        if dry_run or not diagnosis.needed:
            return
        with progress(out) as emit:
            if in_place:
                result = repair_in_place(diagnosis, workers=workers, restart=restart, emit=emit)
            else:
                folder = out_folder or default_out(source, "repaired")
                result = repair_into(diagnosis, folder, workers=workers, restart=restart, emit=emit)
        _tell_done(out, diagnosis, result, in_place=in_place)


def _source(
    src: str | None,
    parent: str | None,
    revision: str | None,
    out_folder: Path | None,
    *,
    in_place: bool,
) -> "Source":
    if parent is None:
        raise UsageError("--from is missing: the checkpoint SRC was made from.", example(repair))
    if in_place and out_folder is not None:
        raise UsageError("-o and --in-place exclude each other.", "Leave out -o or --in-place.")
    source = open_source(src, revision, example(repair))
    from mquant.checkpoint import Folder

    if in_place and not isinstance(source, Folder):
        raise UsageError(
            f"--in-place is for folders; {source.name} is a hub repo.",
            "Leave out --in-place: the files to upload are written into a folder.",
        )
    return source


def _tell(out: Output, diagnosis: "Diagnosis") -> None:
    plan = diagnosis.repair_plan
    rewritten = plan.rewritten
    out.put(
        source=diagnosis.bad.source.name,
        parent=diagnosis.parent.source.name,
        needed=diagnosis.needed,
        made_by=diagnosis.made_by or None,
        replaced=[action.source.name for action in plan.replaced],
        renamed=dict(plan.renamed),
        dropped=list(plan.dropped),
        config_differs=diagnosis.config_differs,
        side_files=list(diagnosis.missing),
        parent_bytes=plan.parent_bytes,
        shards={
            "kept": sorted(plan.kept),
            "rewritten": [shard.name for shard in rewritten.shards],
            "bytes": rewritten.file_bytes,
        },
    )
    if not diagnosis.needed:
        known = plan.right.family.vllm is not None
        why = f"vLLM {VERSION} loads every tensor of SRC" if known else "SRC has no fault"
        why += _compared(diagnosis)
        out.show(Text(f"Nothing to repair: {why}.", "bold green"))
        return
    out.show(facts(list(_facts(diagnosis))))


def _compared(diagnosis: "Diagnosis") -> str:
    """Return how many weights were compared with the parent's, as the end of a sentence."""
    report = diagnosis.report
    if report.parent is None:
        return "; its weights were not compared with the parent's (--depth numbers does)"
    weights = "a sample of its weights is" if report.sampled else "all of its weights are"
    more = " (--depth full compares all)" if report.sampled else ""
    return f"; {weights} as near to the parent's as rounding allows{more}"


def _facts(diagnosis: "Diagnosis") -> Iterator[tuple[str, str]]:
    from mquant.verify.digests import SHARD_NOT_AS_RECORDED

    plan = diagnosis.repair_plan
    for role, count in plan.replaced_by_role.items():
        tensors = [action.source_bytes for action in plan.replaced if action.role.value == role]
        yield f"From the parent: {role}", f"{plural(count, 'tensor')}, {size(sum(tensors))}"
    if plan.replaced and any(f.rule == SHARD_NOT_AS_RECORDED.id for f in diagnosis.report.findings):
        yield (
            "Why so much",
            "mquant.json has a sha256 for each shard, none for a tensor: "
            "all tensors of a changed shard are made again",
        )
    if plan.renamed:
        old, new = next(iter(plan.renamed.items()))
        yield "Renamed", f"{plural(len(plan.renamed), 'tensor')} ({old} is {new})"
    if plan.dropped:
        first = plan.dropped[0]
        tensors_left = plural(len(plan.dropped), "tensor")
        yield "Left out", f"{tensors_left} that are wrong or do not belong ({first})"
    if diagnosis.missing:
        yield "Side files", ", ".join(diagnosis.missing)
    changes = diagnosis.config_changes
    yield "config.json", f"changes in {names(changes)}" if changes else "stays as it is"
    count, rewritten = len(plan.kept), plan.rewritten
    bytes_ = size(rewritten.file_bytes)
    yield "Shards", f"{count} stay, {len(rewritten.shards)} written ({bytes_})"


def _tell_done(out: Output, diagnosis: "Diagnosis", result: "Result", *, in_place: bool) -> None:
    from mquant.checkpoint import Folder

    out.put(out=str(result.out), already_done=not result.fresh, read_of_parent=result.parent_bytes)
    verb = "Repaired" if result.fresh else "Already done:"
    out.show(Text.assemble((verb, "bold green"), f" {result.out}"))
    if isinstance(diagnosis.bad.source, Folder):
        return
    commands = list(_upload(diagnosis, result.out))
    out.put(commands=commands)
    out.show("Upload the changed files in one commit, then verify the repo:")
    out.show(*(Text(f"  {command}") for command in commands))


def _upload(diagnosis: "Diagnosis", folder: Path) -> Iterator[str]:
    repo = diagnosis.bad.source
    delete = [word for path in diagnosis.obsolete for word in ("--delete", path)]
    yield shlex.join(
        ["hf", "upload", repo.name, str(folder), ".", *delete, "--commit-message", "Repair"]
    )
    yield shlex.join(["mquant", "verify", repo.name])
