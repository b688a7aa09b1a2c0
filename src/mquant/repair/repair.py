"""Mend a checkpoint with its parent: into a new folder, in place, or as files for its hub repo."""

import hashlib
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mquant import __version__
from mquant.checkpoint import (
    Assembly,
    AssemblyReader,
    Checkpoint,
    Folder,
    Source,
    read_json,
)
from mquant.checkpoint.hashing import sha256_of
from mquant.engines.importance import importance_fingerprint, weigher
from mquant.errors import EngineError, SourceError
from mquant.events import Emit, Note, silent
from mquant.output import (
    RECORD,
    WORK,
    Ledger,
    State,
    apply,
    examine,
    file_names,
    finish,
    index_json,
    is_staged,
    link,
    side_files,
    stage,
)
from mquant.plan import BAD, Plan
from mquant.repair.diagnose import Diagnosis, assemble
from mquant.runs.run import Making, check_disk, default_workers, provenance
from mquant.verify.judge import Depth, verify

_NAMED: Final = 1000
"""Modules that a repair's record names, at most: all routers of any model, not all experts."""


@dataclass(frozen=True)
class Repaired:
    """A mended checkpoint. `fresh` is False where an earlier run had made it already.

    `parent_bytes` counts what was read of the parent's shards, besides their headers.
    """

    out: Path
    fresh: bool
    parent_bytes: int = 0


def repair(
    diagnosis: Diagnosis,
    out: Path,
    *,
    workers: int | None = None,
    restart: bool = False,
    emit: Emit = silent,
) -> Repaired:
    """Write what `diagnosis` says into `out`, or go on with what is there of it.

    Of a local checkpoint that is all of it: shards without a change are hard links. Of a hub repo
    it is the files that have to be uploaded.
    """
    whole = isinstance(diagnosis.bad.source, Folder)
    return _Run(diagnosis, out, whole, emit).carry_out(workers, restart=restart)


def repair_in_place(
    diagnosis: Diagnosis, *, workers: int | None = None, restart: bool = False, emit: Emit = silent
) -> Repaired:
    """Mend a folder itself, through a hidden one inside it. Killed anywhere, a rerun finishes it.

    Until all that is new is whole and judged the checkpoint is as it was; then, for as long as
    renames take, it has no config.json.
    """
    bad = diagnosis.bad.source
    if not isinstance(bad, Folder):
        raise TypeError(f"{bad.name} is no folder")
    run = _Run(diagnosis, bad.root / WORK, False, emit)
    made = run.carry_out(workers, restart=restart)
    stage(bad.root, diagnosis.obsolete)
    apply(bad.root)
    return replace(made, out=bad.root)


def finish_in_place(root: Path) -> bool:
    """Finish an in-place repair that was stopped while files were moved; whether there was one."""
    staged = is_staged(root)
    if staged:
        apply(root)
    return staged


@dataclass(frozen=True)
class _Run:
    """A repair into `out`, of the `whole` checkpoint or of what changes in it."""

    diagnosis: Diagnosis
    out: Path
    whole: bool
    emit: Emit

    @property
    def bad(self) -> Checkpoint:
        return self.diagnosis.bad

    @property
    def plan(self) -> Plan:
        """The shards to write."""
        return self.diagnosis.mending.rewritten

    @property
    def kept(self) -> list[str]:
        return sorted(self.diagnosis.mending.kept)

    @property
    def sides(self) -> dict[str, Source]:
        """The side files to write: those it lacks, and, for a new folder, its own."""
        own = side_files(self.bad, cards=True) if self.whole else ()
        missing = dict.fromkeys(self.diagnosis.missing, self.diagnosis.parent.source)
        return {**dict.fromkeys(own, self.bad.source), **missing}

    def carry_out(self, workers: int | None, *, restart: bool) -> Repaired:
        mending, parent = self.diagnosis.mending, self.diagnosis.parent.source
        sources = [parent, self.bad.source] if self.whole else [parent]
        folders = [source.root for source in sources if isinstance(source, Folder)]
        fingerprint = self._fingerprint()
        elsewhere = () if self.whole else (*self.kept, *side_files(self.bad, cards=True))

        claim = examine(self.out, folders, fingerprint, restart=restart, elsewhere=elsewhere)
        if claim.state is State.DONE:
            return Repaired(self.out, fresh=False)
        beside = sum(source.files[path] for path, source in self.sides.items())
        check_disk(self.out, claim.files, self.plan.file_bytes + beside)
        assembly = assemble(self._local_bad(), parent)
        shards = self._kept_files()
        ledger = Ledger(self.out)
        try:
            claim = examine(self.out, folders, fingerprint, restart=restart, elsewhere=elsewhere)
            if claim.state is State.DONE:
                return Repaired(self.out, fresh=False)
            with closing(AssemblyReader(assembly)) as reader:
                making = self._making(assembly)
                weigh = weigher(mending.right.recipe, self.diagnosis.importance)
                from mquant.engines import stream  # numba

                digests = making.shards(
                    ledger,
                    claim,
                    fingerprint,
                    lambda output: stream.run(reader, output, workers or default_workers(), weigh),
                )
                parent_bytes = reader.bytes_read.get(parent, 0)
            for shard in self.plan.shards:
                described = {"bytes": shard.file_bytes, "sha256": digests[shard.name]}
                shards[shard.name] = described
            self._link()
            index, more = index_json(mending.plan), self._record(fingerprint)
            finish(self.out, mending.right, index, shards, self.sides, more, self._judge, self.emit)
            ledger.complete()
        finally:
            ledger.release()
        return Repaired(self.out, fresh=True, parent_bytes=parent_bytes)

    def _fingerprint(self) -> dict[str, str]:
        origin = hashlib.sha256()
        for action in self.diagnosis.mending.plan.actions:
            origin.update(f"{action.source.shard}\0{action.outputs[0].name}\n".encode())
        return {
            **{f"repaired {k}": v for k, v in self.bad.source.identity().items()},
            **self.diagnosis.parent.source.identity(),
            "plan": self.diagnosis.mending.plan.fingerprint,
            "origin": origin.hexdigest(),
            "engine": "stream",
            **importance_fingerprint(
                self.diagnosis.mending.right.recipe, self.diagnosis.importance
            ),
        }

    def _local_bad(self) -> Source:
        """The broken checkpoint where its shards can be read: of a repo, those needed, here."""
        from mquant.checkpoint.download import download
        from mquant.checkpoint.hub import HubRepo

        source = self.bad.source
        if not isinstance(source, HubRepo):
            return source
        needed = {a.source.shard for a in self.plan.actions if a.source.shard.startswith(BAD)}
        wanted = sorted(path.removeprefix(BAD) for path in needed)
        return Folder(download(source, self.emit, only=wanted)) if wanted else source

    def _making(self, assembly: Assembly) -> Making:
        kept = self.kept if self.whole else ()
        files = (*kept, *file_names(self.plan, self.sides))
        used = {path for unit in self.plan.units for path in unit.files}
        stamps = {path: assembly.stamps[path] for path in sorted(used)}
        return Making(self.plan, self.out, files, stamps, self.emit, "repair")

    def _kept_files(self) -> dict[str, dict[str, Any]]:
        """`bytes` and `sha256` of what belongs to the result and is not written."""
        source = self.bad.source
        names = list(self.kept)
        if not self.whole:
            names += side_files(self.bad, cards=True)
        known = getattr(source, "sha256", {})
        unknown = {name: source.files[name] for name in names if name not in known}
        digests = {**known, **dict(sha256_of(source, unknown, self.emit))}
        return {name: {"bytes": source.files[name], "sha256": digests[name]} for name in names}

    def _link(self) -> None:
        source = self.bad.source
        if not self.whole or not isinstance(source, Folder):
            return
        for name in self.kept:
            link(source.path(name), self.out / name)

    def _record(self, fingerprint: dict[str, str]) -> dict[str, Any]:
        """What mquant.json says besides the files."""
        mending, parent = self.diagnosis.mending, self.diagnosis.parent
        earlier = _earlier(self.bad)
        engine = earlier.get("engine", {"name": "stream", "versions": {}})
        repairs = earlier.get("repairs", [])
        modules = list(dict.fromkeys(action.module for action in mending.replaced))
        this = {
            "mquant": __version__,
            "checkpoint": self.bad.source.identity(),
            "findings": [
                {"rule": found.rule, "message": found.message}
                for found in self.diagnosis.report.findings
            ],
            "replaced": mending.replaced_by_role,
            "modules": modules[:_NAMED],
            "renamed": len(mending.renamed),
            "dropped": list(mending.dropped[:_NAMED]),
            "parent_bytes": mending.parent_bytes,
        }
        return {
            **provenance(mending.right, parent.source.identity(), engine, fingerprint),
            "repairs": [*(repairs if isinstance(repairs, list) else []), this],
        }

    def _judge(self, result: Source) -> None:
        """Judge the structure of what was made, the files that stay elsewhere included.

        What the parent lacks does not count, as in `quantize`.
        """
        parts = {path: (result, path) for path in result.files}
        parts |= {name: (self.bad.source, name) for name in self.kept if name not in parts}
        family = self.diagnosis.mending.right.family
        made = Assembly(result.name, parts)
        for finding in verify(made, {family.name: family}, Depth.STRUCTURE).findings:
            if finding.severity == "error" and finding.rule != "config-key-missing":
                raise EngineError(
                    f"What was made is wrong ({finding.rule}): {finding.message}",
                    "Please report this; OUT has no config.json, so nothing will load it.",
                )
            if finding.severity != "info":
                self.emit(Note("warning", finding.message))


def _earlier(bad: Checkpoint) -> dict[str, Any]:
    """The broken checkpoint's own mquant.json; empty without one that can be read."""
    try:
        return read_json(bad.source, RECORD) if RECORD in bad.source.files else {}
    except SourceError:
        return {}


__all__ = ["Repaired", "finish_in_place", "repair", "repair_in_place"]
