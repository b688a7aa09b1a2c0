"""Carry out a plan: check what can be checked, claim OUT, run the engine, finish, verify."""

import shutil
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from mquant import __version__
from mquant.checkpoint import Folder, Source, read_header
from mquant.errors import EngineError, MissingExtra, OutputError, Refused
from mquant.events import Emit, Note, silent
from mquant.findings import size
from mquant.output import Claim, Ledger, ShardSet, State, examine, file_names, finish
from mquant.plan import Plan
from mquant.workflows.verify import verify


class Engine(StrEnum):
    """What does the arithmetic."""

    AUTO = "auto"
    ONESHOT = "oneshot"


# Packages whose versions can change the bytes an engine makes.
_DECISIVE: Final = {
    Engine.ONESHOT: ("llmcompressor", "compressed-tensors", "torch", "transformers"),
}


@dataclass(frozen=True)
class Result:
    """A finished output folder. `fresh` is False where an earlier run had made it already."""

    out: Path
    plan: Plan
    engine: Engine
    fresh: bool


def choose_engine(wanted: Engine) -> Engine:
    """The engine that will run."""
    return Engine.ONESHOT if wanted is Engine.AUTO else wanted


def quantize(
    plan: Plan,
    out: Path,
    *,
    engine: Engine = Engine.AUTO,
    restart: bool = False,
    emit: Emit = silent,
) -> Result:
    """Write the checkpoint that `plan` describes into `out`.

    Raises Refused for a plan with errors, MissingExtra without the engine's packages, OutputError
    for an OUT that is not ours, is in use or too small, and what the engine raises. Until it
    returns there is no config.json in `out`, so nothing there looks like a checkpoint.
    """
    if plan.refusals:
        raise Refused(plan.refusals)
    engine = choose_engine(engine)
    versions = _versions(engine)
    source = plan.survey.checkpoint.source
    local = source.root if isinstance(source, Folder) else None
    identity = source.identity()
    fingerprint = {**identity, "plan": plan.fingerprint, "engine": engine.value, **versions}
    claim = examine(out, local, fingerprint, restart=restart)
    if claim.state is State.DONE:
        return Result(out, plan, engine, fresh=False)
    _check_disk(out, claim, plan)
    if local is None:
        plan = plan.reading_from(_download(source, emit))
    ledger = Ledger(out, claim, fingerprint)
    try:
        ledger.record(file_names(plan))
        _run(plan, out, emit)
        _look_again(plan, out)
        provenance = _provenance(plan, engine, identity, versions, fingerprint)
        finish(out, plan, provenance, partial(_judge, plan, emit=emit), emit)
        ledger.complete()
    finally:
        ledger.release()
    return Result(out, plan, engine, fresh=True)


def free_disk(out: Path) -> int:
    """Bytes free where `out` is, or will be."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _run(plan: Plan, out: Path, emit: Emit) -> None:
    from mquant.engines import oneshot  # torch and transformers: seconds, and optional

    shards = ShardSet(out, plan, emit)
    try:
        oneshot.run(plan, shards.write, emit)
        shards.finish()
    finally:
        shards.abandon()


def _versions(engine: Engine) -> dict[str, str]:
    try:
        return {package: version(package) for package in _DECISIVE[engine]}
    except PackageNotFoundError:
        raise MissingExtra(f"The {engine} engine", engine.value) from None


def _check_disk(out: Path, claim: Claim, plan: Plan) -> None:
    held = sum((out / f).stat().st_size for f in claim.files if (out / f).is_file())
    free = free_disk(out) + held
    if free < plan.file_bytes:
        raise OutputError(
            f"{out} needs {size(plan.file_bytes)}, {size(free)} are free there.",
            "Free space, or give a folder on another disk with -o.",
        )


def _download(source: Source, emit: Emit) -> Folder:
    from mquant.checkpoint.download import download
    from mquant.checkpoint.hub import HubRepo

    if not isinstance(source, HubRepo):
        raise TypeError(f"cannot download from {type(source).__name__}")
    emit(Note("info", f"Downloading {source.name}."))
    return Folder(download(source, emit))


def _provenance(
    plan: Plan,
    engine: Engine,
    identity: dict[str, str],
    versions: dict[str, str],
    fingerprint: dict[str, str],
) -> dict[str, Any]:
    """What mquant.json says besides the files: equal for equal runs, wherever they ran."""
    return {
        "mquant": __version__,
        "source": identity,
        "family": plan.family.name,
        "recipe": plan.recipe.model_dump(mode="json"),
        "engine": {"name": engine.value, "versions": versions},
        "fingerprint": fingerprint,
        "totals": {
            "source": {
                "tensors": len(plan.survey.members),
                "bytes": plan.source_bytes,
            },
            "output": {
                "tensors": plan.output_tensors,
                "bytes": plan.output_bytes,
            },
        },
    }


def _look_again(plan: Plan, out: Path) -> None:
    """Read the shards' headers back: every tensor, dtype and shape as planned, and no other."""
    folder = Folder(out)
    for shard in plan.shards:
        found = {(t.name, t.dtype, t.shape) for t in read_header(folder, shard.name)}
        planned = {(o.name, o.dtype, o.shape) for job in shard.jobs for o in job.outputs}
        if found != planned:
            odd = min(name for name, _, _ in found ^ planned)
            raise EngineError(
                f"{shard.name} in {out} is not what was planned ({odd}).",
                "Please report this; OUT has no config.json, so nothing will load it.",
            )


def _judge(plan: Plan, result: Source, emit: Emit) -> None:
    """Judge what was made as `mquant verify OUT --against SRC` does.

    What was asked for knowingly (--allow-unsafe) does not count, and what the parent lacks is told
    but does not count either: the output has the parent's config.json, key by key.
    """
    source = plan.survey.checkpoint.source
    report = verify(result, {plan.family.name: plan.family}, parent=source, emit=emit)
    known = {finding.rule for finding in plan.findings} | {"config-key-missing"}
    for finding in report.findings:
        if finding.severity == "error" and finding.rule not in known:
            raise EngineError(
                f"What was made is wrong ({finding.rule}): {finding.message}",
                "Please report this; OUT has no config.json, so nothing will load it.",
            )
        emit(Note("warning", finding.message))


__all__ = ["Engine", "Result", "choose_engine", "free_disk", "quantize"]
