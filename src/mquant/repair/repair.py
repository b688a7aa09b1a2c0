"""Repair a checkpoint with its parent: into a new folder, in place, or for its hub repo."""

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Unpack, cast

from mquant import __version__
from mquant.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    Assembly,
    AssemblyReader,
    Checkpoint,
    Source,
)
from mquant.checkpoint.hashing import sha256_of
from mquant.engines.importance import importance_fingerprint, weigher
from mquant.errors import SourceError
from mquant.events import Emit, Note, silent
from mquant.output import (
    WORK,
    ShardSet,
    apply,
    as_table,
    calibration_of,
    is_staged,
    known_table,
    link,
    stage,
)
from mquant.plan import BAD, PARENT
from mquant.repair.diagnose import Diagnosis, assemble
from mquant.runs.run import Result, Run, RunOptions
from mquant.runs.run_spec import RunSpec
from mquant.runs.unchanged import Origin, digests_now
from mquant.verify.digests import refuse_changed

_NAMED: Final = 1000
"""The most modules that a repair's record names: all routers of any model, not all experts."""


def repair(diagnosis: Diagnosis, out: Path, **options: Unpack[RunOptions]) -> Result:
    """Write the repair of `diagnosis` into `out`, or resume an earlier run.

    For a local checkpoint, `out` becomes the whole repaired checkpoint: unchanged shards are hard
    links. For a hub repo, `out` gets only the files that have to be uploaded. Raises as
    `mquant.runs.convert.convert`.
    """
    job = _Repair(diagnosis, whole=bool(diagnosis.bad.source.folders))
    with Run.claim(out, job.spec, fetch=job.fetch(options), **options) as run:
        return job.carry_out(run)


def repair_in_place(diagnosis: Diagnosis, **options: Unpack[RunOptions]) -> Result:
    """Repair a folder itself. After a kill, `finish_in_place` or a second call finishes the repair.

    The new files are written and judged in a hidden folder inside. Until then the checkpoint does
    not change; afterwards, while the files are moved, the checkpoint has no config.json.
    """
    (root,) = diagnosis.bad.source.folders
    job = _Repair(diagnosis, whole=False)
    with Run.claim(root / WORK, job.spec, fetch=job.fetch(options), **options) as run:
        result = job.carry_out(run)
    stage(root, diagnosis.obsolete)
    apply(root)
    return replace(result, out=root)


def finish_in_place(root: Path) -> bool:
    """Finish an in-place repair that was stopped while files were moved; return whether one was."""
    staged = is_staged(root)
    if staged:
        apply(root)
    return staged


def _engine(bad: Source) -> dict[str, Any]:
    """Return the engine that made a checkpoint, by its mquant.json, where anything may stand."""
    return {"name": "stream", "versions": {}, **as_table(known_table(bad).get("engine"))}


@dataclass(frozen=True, kw_only=True)
class _RepairSpec(RunSpec):
    """The specification of a repair, which reads two checkpoints."""

    bad: Origin
    good: Origin

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The broken checkpoint, and its parent."""
        return self.bad, self.good


@dataclass(frozen=True)
class _Repair:
    """A repair into OUT: if `whole`, of all files, else of the files that change."""

    diagnosis: Diagnosis
    whole: bool

    @property
    def bad(self) -> Checkpoint:
        return self.diagnosis.bad

    @property
    def kept(self) -> list[str]:
        return sorted(self.diagnosis.repair_plan.kept)

    @cached_property
    def spec(self) -> RunSpec:
        repair_plan, parent = self.diagnosis.repair_plan, self.diagnosis.parent.source
        own = self.diagnosis.own_files
        sides = dict.fromkeys(own if self.whole else (), self.bad.source)
        return _RepairSpec(
            bad=Origin(self.bad, self.bad.source.identity(), BAD),
            good=Origin(self.diagnosis.parent, parent.identity(), PARENT),
            plan=repair_plan.right,
            written=repair_plan.rewritten,
            indexed=repair_plan.plan,
            source=assemble(self.bad.source, parent),
            parent=parent.identity(),
            fingerprint=self._fingerprint(),
            side_files={**sides, **dict.fromkeys(self.diagnosis.missing, parent)},
            engine=_engine(self.bad.source),
            stage="repair",
            protected=(*parent.folders, *(self.bad.source.folders if self.whole else ())),
            beside=tuple(self.kept) if self.whole else (),
            elsewhere=() if self.whole else (*self.kept, *own),
            extra_record=self._record(),
        )

    def carry_out(self, run: Run) -> Result:
        if run.done:
            return run.result(fresh=False)
        from mquant.engines import stream  # numba

        weigh = weigher(self.spec.plan.recipe, self.diagnosis.importance)
        self._check_parent(run)
        run.source_digests = digests_now(run.source, self._diagnosed(), run.emit)
        parent_bytes = 0

        def engine(output: ShardSet) -> None:
            nonlocal parent_bytes
            with closing(AssemblyReader(cast(Assembly, run.source))) as reader:
                stream.run(reader, output, run.threads, weigh, run.emit)
                parent_bytes += reader.bytes_read.get(self.diagnosis.parent.source, 0)

        run.write_shards(engine)
        self._compare(run)
        self._link(run)
        result = run.finish(partial(self._judge, run), self._kept_files(run.emit))
        return replace(result, parent_bytes=parent_bytes)

    def _diagnosed(self) -> list[str]:
        """Return the files of the broken checkpoint, as diagnosed, that the run reads."""
        if not self.bad.source.folders:
            return []  # the hub lists the digests
        others = (*self.diagnosis.own_files, CONFIG_NAME, INDEX_NAME)
        paths = [path for path in self.spec.read if path.startswith(BAD)]
        return [*paths, *(BAD + name for name in others if name in self.bad.source.files)]

    def _check_parent(self, run: Run) -> None:
        """Raise SourceError if a file that the parent gives is not as its mquant.json says."""
        parent, parts = self.diagnosis.parent.source, cast(Assembly, run.source).parts
        read = {inner for path in self.spec.stamps for s, inner in [parts[path]] if s is parent}
        refuse_changed(parent, run.emit, read)

    def _compare(self, run: Run) -> None:
        """Warn of shards that were made again and are not the shards that mquant.json recorded."""
        files = as_table(known_table(self.bad.source).get("files"))
        for shard in self.spec.shards.shards:
            recorded = as_table(files.get(shard.name))
            same_size = recorded.get("bytes") == shard.file_bytes
            if same_size and recorded.get("sha256") != run.digests[shard.name]:
                message = f"{shard.name} was made again, and is not the shard in mquant.json"
                fix = "check that PARENT is the parent of the checkpoint."
                run.emit(Note("warning", f"{message}: {fix}"))

    def fetch(self, options: RunOptions) -> Callable[[], Source]:
        """Return a function that downloads the shards of a broken hub repo that the repair reads.

        A parent on the hub is read by ranges and not downloaded.
        """
        shards = {action.source.shard for action in self.spec.shards.actions}
        needed = sorted(shard for shard in shards if shard.startswith(BAD))
        return partial(self.spec.source.materialize, options.get("emit", silent), needed)

    def _fingerprint(self) -> dict[str, str]:
        origin = hashlib.sha256()
        for action in self.diagnosis.repair_plan.plan.actions:
            origin.update(f"{action.source.shard}\0{action.outputs[0].name}\n".encode())
        return {
            **{f"repaired {k}": v for k, v in self.bad.source.identity().items()},
            **self.diagnosis.parent.source.identity(),
            "plan": self.diagnosis.repair_plan.plan.fingerprint,
            "origin": origin.hexdigest(),
            "engine": "stream",
            **importance_fingerprint(
                self.diagnosis.repair_plan.right.recipe, self.diagnosis.importance
            ),
        }

    def _kept_files(self, emit: Emit) -> dict[str, dict[str, Any]]:
        """Return `bytes` and `sha256` of the files of the result that the run does not write."""
        source = self.bad.source
        names = list(self.kept)
        if not self.whole:
            names += self.diagnosis.own_files
        known = getattr(source, "sha256", {})
        unknown = {name: source.files[name] for name in names if name not in known}
        digests = {**known, **dict(sha256_of(source, unknown, emit))}
        files = as_table(known_table(source).get("files"))
        for name in self.kept:
            recorded = as_table(files.get(name)).get("sha256")
            if recorded not in (None, digests[name]):
                raise SourceError(
                    f"{name} of {source.name} has changed: its sha256 is {digests[name]}; "
                    f"mquant.json says {str(recorded)[:64]}.",
                    "Repair without --depth structure: then changed shards are made again.",
                )
        return {name: {"bytes": source.files[name], "sha256": digests[name]} for name in names}

    def _link(self, run: Run) -> None:
        for folder in self.bad.source.folders if self.whole else ():
            for name in self.kept:
                link(folder / name, run.out / name)

    def _record(self) -> dict[str, Any]:
        """Return the entry `repairs` of mquant.json: the earlier repairs, and this repair."""
        plan = self.diagnosis.repair_plan
        repairs = known_table(self.bad.source).get("repairs", [])
        modules = list(dict.fromkeys(action.module for action in plan.replaced))
        entry = {
            "mquant": __version__,
            "checkpoint": self.bad.source.identity(),
            "findings": [
                {"rule": finding.rule, "message": finding.message}
                for finding in self.diagnosis.report.findings
            ],
            "replaced": plan.replaced_by_role,
            "modules": modules[:_NAMED],
            "renamed": len(plan.renamed),
            "dropped": list(plan.dropped[:_NAMED]),
            "parent_bytes": plan.parent_bytes,
        }
        repairs = [*(repairs if isinstance(repairs, list) else []), entry]
        return {**calibration_of(self.bad.source), "repairs": repairs}

    def _judge(self, run: Run, made: Source) -> None:
        """Judge the structure of the whole repaired checkpoint, also of shards outside of OUT."""
        parts = {path: (made, path) for path in made.files}
        own = () if self.whole else self.diagnosis.own_files
        names = (*self.kept, *own)
        parts |= {name: (self.bad.source, name) for name in names if name not in parts}
        run.judge(Assembly(made.name, parts))
