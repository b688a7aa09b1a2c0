"""Quantize a hub repo through a scratch folder in OUT that never holds all files of the repo."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mquant.checkpoint import Source, TensorInfo
from mquant.errors import OutputError, SourceError, UsageError
from mquant.output import ShardObserver, ShardSet
from mquant.plan import Plan, WorkUnit
from mquant.runs.run import Run
from mquant.text import size

if TYPE_CHECKING:
    from mquant.checkpoint.hub import HubRepo
    from mquant.checkpoint.spool import Spool

_SCRATCH: Final = ".mquant-scratch"
"""The folder in OUT that source files are downloaded to."""


def _hub_of(source: Source) -> "HubRepo":
    """Return the source as a hub repo. Raises UsageError if the source is a folder."""
    from mquant.checkpoint.hub import HubRepo

    if not isinstance(source, HubRepo):
        raise UsageError(
            f"{source.name} is a folder, which mquant reads directly and without a scratch.",
            "Leave --scratch out.",
        )
    return source


def check_scratch(scratch: int, least: int) -> None:
    """Raise OutputError if the scratch cannot hold the files that are needed at one time."""
    if scratch < least:
        raise OutputError(
            f"--scratch {size(scratch)} is not enough: files of {size(least)} are needed at the "
            "same time.",
            f"Give {size(2 * least)}, so that some are downloaded while others are read.",
        )


def least_scratch(plan: Plan) -> int:
    """Return the bytes of the files of a hub repo that are needed at one time.

    Raises UsageError if the source is a folder.
    """
    from mquant.checkpoint.spool import least_room, parts_of

    units = dict(enumerate(plan.units))
    tensors = plan.survey.checkpoint.tensors.values()
    return least_room(parts_of(_hub_of(plan.survey.checkpoint.source), tensors, _reads(units)))


class _Frees(ShardObserver):
    """An observer that deletes source files that no work unit needs any more."""

    def __init__(self, spool: "Spool") -> None:
        self._spool = spool

    def settled(self, units: Iterable[int]) -> None:
        """Free the source files of work units that are on disk."""
        self._spool.done(units)

    def stop(self) -> None:
        """Wake every reader that waits for a file: the run ends early."""
        self._spool.stop()


@contextmanager
def spooled(run: Run, output: ShardSet, room: int) -> Iterator["Spool"]:
    """Yield a reader of the source's files, of which OUT holds at most `room` bytes at a time.

    A file is deleted when the work units that read the file are counted. If the run stops, the
    files stay for the next run.
    """
    from mquant.checkpoint.spool import Spool, parts_of

    repo, tensors = _hub_of(run.source), run.plan.survey.checkpoint.tensors.values()
    work = _reads(output.numbered)
    parts = parts_of(repo, tensors, work)
    spool = Spool(repo, run.out / _SCRATCH, room, parts, work, run.emit)
    output.observe(_Frees(spool))
    with spool:
        yield spool
    spool.clear()


def check_side_files(run: Run) -> None:
    """Raise SourceError if a side file in OUT differs from the file that the hub lists."""
    if run.source.folders:
        return
    repo = _hub_of(run.source)
    for path in run.spec.side_files:
        if not repo.lists(path, (run.out / path).read_bytes()):
            raise SourceError(
                f"{path} of {repo.repo_id} is not the file that {repo.host} lists.",
                "Run the same command again: the run downloads the file again.",
            )


def _reads(units: Mapping[int, WorkUnit]) -> dict[int, list[TensorInfo]]:
    return {number: [t for a in unit.actions for t in a.read] for number, unit in units.items()}
