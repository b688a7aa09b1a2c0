"""Making the shards of a plan in OUT: what all verbs that write checkpoints have in common."""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mquant import __version__
from mquant.checkpoint import Folder, Source, Stamp, read_header
from mquant.errors import EngineError, OutputError, UsageError
from mquant.events import Emit, Note, Progress
from mquant.output import PARTIAL, Claim, Ledger, ShardSet, discard, is_there
from mquant.plan import Plan
from mquant.text import size

MOST_CORES: Final = 16
"""No disk is faster."""


@dataclass(frozen=True)
class Making:
    """Shards being made in a claimed OUT.

    `plan` has the shards to make, whose tensors come from files with these `stamps`; `files` are
    all that OUT will hold in the end. `stage` is what progress is called. `away`: shards
    do not stay in OUT, and these, with their sha256, are whole elsewhere already.
    """

    plan: Plan
    out: Path
    files: tuple[str, ...]
    stamps: Mapping[str, Stamp]
    emit: Emit
    stage: str
    away: Mapping[str, str] | None = None

    def shards(
        self,
        ledger: Ledger,
        claim: Claim,
        fingerprint: dict[str, str],
        run: Callable[[ShardSet], None],
        *,
        resume: bool = True,
    ) -> dict[str, str]:
        """Have `run` make all shards; returns their sha256, by name.

        `resume`: what an earlier run made counts, and is gone on with.
        """
        recorded = claim.recorded if resume else None
        shards = {shard.name for shard in self.plan.shards} if recorded else set()
        discard(self.out, [name for name in claim.files if name not in shards])
        ledger.begin(fingerprint, self.files, afresh=recorded is None)
        ledger.read_from(self.stamps)
        output = ShardSet(
            self.out,
            self.plan,
            ledger,
            recorded,
            self.stamps,
            self.emit,
            stage=self.stage,
            away=self.away,
        )
        try:
            self._tell(output, "were done before", resume=resume)
            self.emit(Progress(self.stage, output.done_bytes, self.plan.source_bytes))
            run(output)
            output.finish()
        except BaseException:
            self._tell(output, "are done; the same command goes on from there", resume=resume)
            raise
        finally:
            output.abandon()
        if self.away is None:
            check_headers_as_planned(Folder(self.out), self.plan)
        return output.digests

    def _tell(self, output: ShardSet, what: str, *, resume: bool) -> None:
        if resume and output.done_bytes:
            done, total = size(output.done_bytes), size(self.plan.source_bytes)
            self.emit(Note("info", f"{done} of {total} {what}."))


def check_headers_as_planned(made: Source, plan: Plan) -> None:
    """Read the shards' headers back: tensors, dtypes and shapes as planned, and no other.

    Raises EngineError where they are not.
    """
    for shard in plan.shards:
        found = {(t.name, t.dtype, t.shape) for t in read_header(made, shard.name)}
        planned = {(o.name, o.dtype, o.shape) for unit in shard.units for o in unit.outputs}
        if found != planned:
            odd = min(name for name, _, _ in found ^ planned)
            raise EngineError(
                f"{shard.name} in {made.name} is not what was planned ({odd}).",
                "Please report this; it has no config.json, so nothing will load it.",
            )


def provenance(
    plan: Plan, source: dict[str, str], engine: Mapping[str, Any], fingerprint: dict[str, str]
) -> dict[str, Any]:
    """What mquant.json says besides the files: equal for equal runs, wherever they ran."""
    return {
        "mquant": __version__,
        "source": source,
        "family": plan.family.name,
        "recipe": plan.recipe.model_dump(mode="json"),
        "engine": dict(engine),
        "fingerprint": fingerprint,
        "totals": {
            "source": {"tensors": len(plan.survey.members), "bytes": plan.source_bytes},
            "output": {"tensors": plan.output_tensors, "bytes": plan.output_bytes},
        },
    }


def materialize(source: Source, emit: Emit, only: Collection[str] | None = None) -> Folder:
    """The source as a folder of this machine: itself, or, of a hub repo, what is downloaded.

    `only` are the files that are needed of it; None: all.
    """
    if isinstance(source, Folder):
        return source
    from mquant.checkpoint.download import download
    from mquant.checkpoint.hub import HubRepo

    if not isinstance(source, HubRepo):
        raise TypeError(f"cannot download from {type(source).__name__}")
    emit(Note("info", f"Downloading {source.name}."))
    return Folder(download(source, emit, only))


def check_plain(plan: Plan, reader: str) -> None:
    """Raise UsageError where what runs the model, called `reader`, cannot read the source."""
    if any(action.stored for action in plan.actions):
        raise UsageError(
            f"{reader} reads BF16, F16 and F32; the source's weights lie in FP8.",
            "Make a BF16 checkpoint first: mquant dequantize.",
        )


def default_workers() -> int:
    """One for each core this process may use, and one more to keep the disk busy meanwhile."""
    return min(len(os.sched_getaffinity(0)), MOST_CORES) + 1


def free_disk(out: Path) -> int:
    """Bytes free where `out` is, or will be."""
    existing = next(path for path in (out, *out.absolute().parents) if is_there(path))
    return shutil.disk_usage(existing).free


def check_disk(out: Path, ours: Iterable[str], needed: int) -> None:
    """Raise OutputError where `needed` bytes do not fit, what we hold there already counted."""
    held = (out / (name + end) for name in ours for end in ("", PARTIAL))
    free = free_disk(out) + sum(map(_disk_of, held))
    if free < needed:
        raise OutputError(
            f"{out} needs {size(needed)}, {size(free)} are free there.",
            "Free space, or give a folder on another disk with -o.",
        )


def _disk_of(path: Path) -> int:
    """Bytes on disk of a file; 0 of what is none, or is renamed by others just now."""
    try:
        return path.stat().st_blocks * 512 if path.is_file() else 0
    except FileNotFoundError:
        return 0


__all__ = [
    "MOST_CORES",
    "Making",
    "check_disk",
    "check_headers_as_planned",
    "check_plain",
    "default_workers",
    "free_disk",
    "materialize",
    "provenance",
]
