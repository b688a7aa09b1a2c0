"""Carry out a plan: check what can be checked, claim OUT, run the engine, finish, verify."""

import os
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
from mquant.events import Emit, Note, Progress, silent
from mquant.findings import size
from mquant.output import (
    PARTIAL,
    Claim,
    Ledger,
    ShardSet,
    State,
    discard,
    examine,
    file_names,
    finish,
    is_there,
    side_files,
)
from mquant.plan import Plan
from mquant.workflows.verify import Depth, verify


class Engine(StrEnum):
    """What does the arithmetic."""

    AUTO = "auto"
    STREAM = "stream"
    ONESHOT = "oneshot"


_MOST_CORES: Final = 16
# Packages whose versions can change the bytes an engine makes.
_DECISIVE: Final[dict[Engine, tuple[str, ...]]] = {
    Engine.STREAM: (),
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
    """The engine that will run: `auto` takes the streaming one, as no scheme needs data yet."""
    return Engine.STREAM if wanted is Engine.AUTO else wanted


def quantize(
    plan: Plan,
    out: Path,
    *,
    engine: Engine = Engine.AUTO,
    workers: int | None = None,
    restart: bool = False,
    emit: Emit = silent,
) -> Result:
    """Write the checkpoint that `plan` describes into `out`, or go on with what is there of it.

    `workers`: how many fused sets the streaming engine has under way; None: as many as the cores
    can use. Raises Refused for a plan with errors, MissingExtra without the engine's packages,
    OutputError for an OUT that is not ours, is in use or too small, and what the engine raises.
    Until it returns there is no config.json in `out`, so nothing there looks like a checkpoint.
    """
    if plan.refusals:
        raise Refused(plan.refusals)
    engine = choose_engine(engine)
    versions = _versions(engine)
    source = plan.survey.checkpoint.source
    local = source.root if isinstance(source, Folder) else None
    identity = source.identity()
    fingerprint = {**identity, "plan": plan.fingerprint, "engine": engine.value, **versions}
    look = partial(examine, out, local, fingerprint)
    claim = look(restart=restart)
    if claim.state is State.DONE:
        return Result(out, plan, engine, fresh=False)
    _check_disk(out, claim, plan)
    folder = source if isinstance(source, Folder) else _download(source, emit)
    ledger = Ledger(out)
    try:
        claim = look(restart=restart)  # again: now nobody else can change it
        if claim.state is State.DONE:
            return Result(out, plan, engine, fresh=False)
        run = Run(plan.reading_from(folder), out, engine, workers, emit)
        digests = run.make_shards(ledger, claim, fingerprint)
        provenance = _provenance(plan, engine, identity, versions, fingerprint)
        finish(out, run.plan, digests, provenance, run.judge, emit)
        ledger.complete()
    finally:
        ledger.release()
    return Result(out, plan, engine, fresh=True)


def default_workers() -> int:
    """One for each core this process may use, and one more to keep the disk busy meanwhile.

    No disk is faster than 16 cores.
    """
    return min(len(os.sched_getaffinity(0)), _MOST_CORES) + 1


def free_disk(out: Path) -> int:
    """Bytes free where `out` is, or will be."""
    existing = next(path for path in (out, *out.absolute().parents) if is_there(path))
    return shutil.disk_usage(existing).free


def _versions(engine: Engine) -> dict[str, str]:
    try:
        return {package: version(package) for package in _DECISIVE[engine]}
    except PackageNotFoundError:
        raise MissingExtra(f"The {engine} engine", engine.value) from None


def _check_disk(out: Path, claim: Claim, plan: Plan) -> None:
    ours = (out / (name + end) for name in claim.files for end in ("", PARTIAL))
    held = sum(path.stat().st_blocks * 512 for path in ours if path.is_file())
    free = free_disk(out) + held
    files = plan.survey.checkpoint.source.files
    needed = plan.file_bytes + sum(files[path] for path in side_files(plan.survey.checkpoint))
    if free < needed:
        raise OutputError(
            f"{out} needs {size(needed)}, {size(free)} are free there.",
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


@dataclass(frozen=True)
class Run:
    """The part of a run between claiming OUT and finishing it. `plan` reads from a folder."""

    plan: Plan
    out: Path
    engine: Engine
    workers: int | None
    emit: Emit

    @property
    def source(self) -> Folder:
        """The folder that is read."""
        source = self.plan.survey.checkpoint.source
        if not isinstance(source, Folder):
            raise TypeError(f"{source.name} is no folder")
        return source

    def make_shards(
        self, ledger: Ledger, claim: Claim, fingerprint: dict[str, str]
    ) -> dict[str, str]:
        """Make all shards, but for what an earlier run made; returns their sha256, by name."""
        # oneshot starts over: its modules come in the order of the model, not of the output.
        recorded = claim.recorded if self.engine is Engine.STREAM else None
        shards = {shard.name for shard in self.plan.shards} if recorded else set()
        discard(self.out, [name for name in claim.files if name not in shards])
        ledger.begin(fingerprint, file_names(self.plan), afresh=recorded is None)
        stamps = {name: self.source.stamps[name] for name in self.plan.survey.checkpoint.shards}
        ledger.read_from(stamps)
        output = ShardSet(self.out, self.plan, ledger, recorded, stamps, self.emit)
        try:
            self._run_engines(output)
            output.finish()
        except BaseException:
            self._tell(output, "are done; the same command goes on from there")
            raise
        finally:
            output.abandon()
        self._look_again()
        return output.digests

    def _run_engines(self, output: ShardSet) -> None:
        from mquant.engines import stream  # numba

        self._tell(output, "were done before")
        self.emit(Progress("quantize", output.done_bytes, self.plan.source_bytes))
        if self.engine is Engine.ONESHOT:
            from mquant.engines import oneshot  # torch and transformers: seconds, and optional

            oneshot.run(self.plan, output.write, self.emit)
        # After oneshot, what is left are the tensors that are copied.
        stream.run(self.source, output, self.workers or default_workers())

    def _tell(self, output: ShardSet, what: str) -> None:
        if self.engine is Engine.STREAM and output.done_bytes:
            done, total = size(output.done_bytes), size(self.plan.source_bytes)
            self.emit(Note("info", f"{done} of {total} {what}."))

    def _look_again(self) -> None:
        """Read the shards' headers back: tensors, dtypes and shapes as planned, and no other."""
        folder = Folder(self.out)
        for shard in self.plan.shards:
            found = {(t.name, t.dtype, t.shape) for t in read_header(folder, shard.name)}
            planned = {(o.name, o.dtype, o.shape) for job in shard.jobs for o in job.outputs}
            if found != planned:
                odd = min(name for name, _, _ in found ^ planned)
                raise EngineError(
                    f"{shard.name} in {self.out} is not what was planned ({odd}).",
                    "Please report this; OUT has no config.json, so nothing will load it.",
                )

    def judge(self, result: Source) -> None:
        """Judge what was made as `mquant verify OUT --against SRC` does.

        Of what the streaming engine made only the structure: reading all of it back would take
        longer than making it. What was asked for knowingly (--allow-unsafe) does not count, and
        what the parent lacks is told but does not count either: the output has the parent's
        config.json, key by key.
        """
        families = {self.plan.family.name: self.plan.family}
        if self.engine is Engine.STREAM:
            report = verify(result, families, Depth.STRUCTURE, emit=self.emit)
        else:
            report = verify(result, families, parent=self.source, emit=self.emit)
        known = {finding.rule for finding in self.plan.findings} | {"config-key-missing"}
        for finding in report.findings:
            if finding.severity == "error" and finding.rule not in known:
                raise EngineError(
                    f"What was made is wrong ({finding.rule}): {finding.message}",
                    "Please report this; OUT has no config.json, so nothing will load it.",
                )
            self.emit(Note("warning", finding.message))


__all__ = ["Engine", "Result", "choose_engine", "default_workers", "free_disk", "quantize"]
