"""What a run makes, and what tells one run from another."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mquant import __version__
from mquant.checkpoint import Source, Stamp
from mquant.events import Emit
from mquant.output import Recorded, file_names
from mquant.plan import Plan
from mquant.runs.unchanged import Origin


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """The specification of what a run makes, and the fingerprint that tells the run from others.

    `plan` decides what config.json, recipe.yaml and mquant.json say. `source` holds the tensors of
    the work units, `parent` is the identity of the parent. `fingerprint` is equal exactly for runs
    that make the same bytes. `side_files` maps each side file to the source that holds it.
    `written` is the plan of the shards to write, and `indexed` the plan of all shards in the index,
    if these are not the shards of `plan`. `beside` are files of the result that the run links into
    OUT instead of writing them, `elsewhere` are files of the result that OUT never holds.
    `protected` are folders that OUT must not overlap. `engine` and `extra_record` go into
    mquant.json.
    """

    plan: Plan
    source: Source
    parent: dict[str, str]
    fingerprint: dict[str, str]
    side_files: Mapping[str, Source]
    engine: Mapping[str, Any]
    stage: str
    protected: tuple[Path, ...]
    written: Plan | None = None
    indexed: Plan | None = None
    beside: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    extra_record: Mapping[str, Any] = field(default_factory=dict)
    resumes: bool = True
    """Whether the engine can resume from the work units in the ledger."""
    working: tuple[str, ...] = ()
    """The files that the engine needs in OUT to resume, and that OUT does not hold in the end."""

    @property
    def shards(self) -> Plan:
        """The plan of the shards to write."""
        return self.written or self.plan

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that OUT holds in the end."""
        return (*self.beside, *file_names(self.shards, self.side_files))

    @property
    def file_bytes(self) -> int:
        """The bytes of the shards and side files that the run writes."""
        side_bytes = sum(source.files[path] for path, source in self.side_files.items())
        return self.shards.file_bytes + side_bytes

    def resumable(self, recorded: Recorded | None) -> Recorded | None:
        """Return what counts of an earlier run of which the ledger has `recorded`."""
        return recorded if self.resumes else None

    @cached_property
    def read(self) -> tuple[str, ...]:
        """The files that the work units read, sorted."""
        return tuple(sorted({path for unit in self.shards.units for path in unit.files}))

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """The stamps of the files that the work units read; equal on all machines."""
        stamps = self.source.stamps
        return {path: stamps[path] for path in self.read}

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The checkpoints that the source consists of."""
        return (Origin(self.plan.survey.checkpoint, self.parent),)

    @property
    def record(self) -> dict[str, Any]:
        """The content of mquant.json without the files: equal for equal runs on any machine."""
        plan = self.plan
        return {
            "mquant": __version__,
            "source": self.parent,
            "family": plan.family.name,
            "recipe": plan.recipe.model_dump(mode="json"),
            "engine": dict(self.engine),
            "fingerprint": self.fingerprint,
            "totals": {
                "source": {"tensors": len(plan.survey.members), "bytes": plan.source_bytes},
                "output": {"tensors": plan.output_tensors, "bytes": plan.output_bytes},
            },
            **self.extra_record,
        }

    def measured(self, source: Source, emit: Emit) -> dict[str, Any]:
        """Return what mquant.json says beside `record`, from a look at the data in `source`.

        The shards are complete. `emit` receives what a person should know of it.
        """
        return {}
