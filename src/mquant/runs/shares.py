"""A run in shares: processes write the shards of one plan, and one process completes OUT.

The processes need not know each other, run at the same time, or run on one machine: the ledgers in
OUT say what is done. A process that takes a stopped share again resumes the share.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from mquant.checkpoint import Stamp, stamp
from mquant.errors import OutputError, UsageError
from mquant.events import Emit, Note, silent
from mquant.output import (
    LEDGER,
    SHARES,
    Claim,
    Ledger,
    Recorded,
    SharedRun,
    State,
    check_disk,
    check_version,
    claim,
    complete_shards,
    delete_share_files,
    folder_lock,
    is_finished,
    is_taken,
    ledger_name,
    look,
    other_run,
    read_ledger,
    read_shared_run,
    take_share,
    units_still_valid,
)
from mquant.plan import Plan, ShardPlan, shares
from mquant.runs.job_spec import JobSpec
from mquant.runs.quantize import judge, run_engine
from mquant.runs.run import Result, Run
from mquant.runs.spec import Engine, QuantizeSpec, prepare
from mquant.runs.unchanged import tell_unread
from mquant.text import names, size
from mquant.verify.digests import refuse_changed


@dataclass(frozen=True)
class Shares:
    """A plan in shares, which processes write into `out`. Shares are numbered from 1."""

    spec: QuantizeSpec
    shared: SharedRun
    out: Path

    @cached_property
    def parts(self) -> tuple[Plan, ...]:
        """The plan of each share."""
        return shares(self.spec.plan, self.shared.of)

    @property
    def numbers(self) -> range:
        """The numbers of all shares."""
        return range(1, self.shared.of + 1)

    def look(self) -> State:
        """Return the state of OUT for this run; write nothing. Raises as `claim`."""
        return look(self.out, self.spec.protected, self.shared)

    def check_disk(self) -> None:
        """Raise OutputError if OUT as a whole does not fit on the disk."""
        check_disk(self.out, self.spec.files, self.spec.file_bytes)

    def claim(self) -> State:
        """Claim OUT for this run if OUT is free; return DONE if the run was finished before.

        Raises OutputError if mquant did not make OUT, or if OUT belongs to another run or another
        number of shares.
        """
        return claim(self.out, self.spec.protected, self.shared)

    def make(
        self, number: int, *, workers: int | None = None, patience: float = 0.0, emit: Emit = silent
    ) -> bool:
        """Make or resume a share; return False if the share was done before.

        If another process holds the share, wait up to `patience` seconds, then raise InUse. Raises
        as `quantize`.
        """
        part = self.parts[number - 1]
        if self.look() is State.DONE:
            tell_unread(self.spec.source, self.spec.stamps, emit, self.out)
            return False
        if self.is_done(number):
            return False
        self.check_disk()
        if not part.shards:
            self.claim()
            emit(Note("info", f"Share {number:,} of {self.shared.of:,} has no shard to make."))
            return True
        files = {path for unit in part.units for path in unit.files}
        refuse_changed(self.spec.source, emit, files)
        source = self.spec.source.materialize(emit, sorted(files))
        ledger = take_share(self.out, self.spec.protected, self.shared, number, patience)
        if ledger is None:
            return False
        try:
            names = tuple(shard.name for shard in part.shards)
            claim = Claim(State.UNFINISHED, names, self.recorded(number))
            run = Run(self.out, self.spec, source, ledger, claim, part, emit, workers)
            run_engine(run, self.spec, files=names)
        finally:
            ledger.release()
        return True

    def finish(self, emit: Emit = silent) -> Result | None:
        """Complete the checkpoint; return None if the checkpoint was complete before.

        Raises OutputError if a share is not done, or is being made.
        """
        result = None
        with folder_lock(self.out) as ledger:
            if read_shared_run(self.out) is not None:
                if not is_finished(self.out, self.spec.fingerprint, emit):
                    spec, claim = self.spec, Claim(State.UNFINISHED)
                    run = Run(self.out, spec, spec.source, ledger, claim, spec.plan, emit)
                    run.digests = _gather(self)
                    run.assemble(partial(judge, run, spec))
                    result = run.result(fresh=True)
                delete_share_files(self.out)
        return result

    def recorded(self, number: int) -> Recorded | None:
        """Return the content of a share's ledger, or None if there is no ledger of this run."""
        recorded = read_ledger(self.out, ledger_name(number, self.shared.of))
        matches = recorded is not None and recorded.fingerprint == self.spec.fingerprint
        return recorded if matches else None

    def digests(self, number: int) -> dict[str, str]:
        """Return the sha256 of the complete shards of a share, by name."""
        part, recorded = self.parts[number - 1], self.recorded(number)
        return complete_shards(self.out, part, recorded, self.spec.stamps) if recorded else {}

    def is_done(self, number: int) -> bool:
        """Return whether all shards of a share are complete; False for a share without shards."""
        part = self.parts[number - 1]
        return bool(part.shards) and len(self.digests(number)) == len(part.shards)

    def done_bytes(self, number: int) -> int:
        """Return the bytes of the source that the share need not read any more."""
        part, recorded = self.parts[number - 1], self.recorded(number)
        done = units_still_valid(part, recorded, self.spec.stamps) if recorded else set()
        return sum(unit.source_bytes for index, unit in enumerate(part.units) if index in done)

    def spoiled(self, number: int) -> list[ShardPlan]:
        """Return the shards that the share completed, and that are gone or not as recorded."""
        part, recorded = self.parts[number - 1], self.recorded(number)
        if recorded is None:
            return []
        done = units_still_valid(part, recorded, self.spec.stamps)
        whole = complete_shards(self.out, part, recorded, self.spec.stamps)
        return [
            shard
            for shard, units in zip(part.shards, part.numbers, strict=True)
            if shard.name in recorded.shards and shard.name not in whole and done.issuperset(units)
        ]


class Watch:
    """The progress of all processes, from the ledgers. A ledger is read only if it changed."""

    def __init__(self, run: Shares) -> None:
        self._run = run
        self._ledgers: dict[int, tuple[Stamp | None, int]] = {}  # stamp, done bytes

    def done_bytes(self) -> int:
        """Return the bytes of the source that no process need read any more."""
        for number, part in enumerate(self._run.parts, 1):
            if part.shards:
                self._look_at(number)
        return sum(done for _, done in self._ledgers.values())

    def at_work(self) -> int:
        """Return how many shares are begun and not done, as of the last `done_bytes`."""
        parts = self._run.parts
        return sum(
            last_stamp is not None and done < parts[number - 1].source_bytes
            for number, (last_stamp, done) in self._ledgers.items()
        )

    def _look_at(self, number: int) -> None:
        path = self._run.out / ledger_name(number, self._run.shared.of)
        try:
            now = stamp(path.stat())
        except OSError:
            now = None
        if number not in self._ledgers or self._ledgers[number][0] != now:
            self._ledgers[number] = now, self._run.done_bytes(number)


def in_shares(plan: Plan, job_spec: JobSpec, out: Path, of: int) -> Shares:
    """Return the run of a plan in `of` shares.

    Raises as `prepare`, and UsageError for a recipe that needs data.
    """
    if plan.recipe.needs_data:
        raise UsageError(
            f"Recipe {plan.recipe.name} sends data through the whole model, so there are no shares "
            "of it.",
            "Leave out --share and --cluster.",
        )
    spec = prepare(plan, Engine.STREAM, job_spec.importance_file)
    return Shares(spec, SharedRun(of, spec.fingerprint, job_spec.to_json()), out)


def reopen(out: Path) -> Shares | None:
    """Return the run in shares that is under way in OUT, or None.

    Raises OutputError for an invalid mquant-shares.json, another version of mquant or a source that
    has changed, SourceError for a source that is gone, and as `prepare`.
    """
    shared = read_shared_run(out)
    if shared is None:
        return None
    check_version(out, shared)
    try:
        job_spec = JobSpec.read(shared.job_spec)
    except ValueError as error:
        raise OutputError(
            f"The job spec in {out / SHARES} is invalid ({error}).",
            "Give another folder with -o, or delete this one.",
        ) from None
    run = in_shares(job_spec.plan(), job_spec, out, shared.of)
    if run.shared.fingerprint != shared.fingerprint:
        fix = "Restore the source as it was; or delete OUT, and run again."
        raise other_run(out, shared.fingerprint, run.shared.fingerprint, fix)
    return run


def finish_shares(out: Path, emit: Emit = silent) -> Result | None:
    """Complete the checkpoint in OUT; return None if the checkpoint was complete before.

    Raises OutputError if OUT has no shares or if a share is not done, and as `quantize`.
    """
    run = reopen(out)
    result = run.finish(emit) if run else None
    if result is None:
        if not is_finished(out, emit=emit):
            raise OutputError(
                f"{out} holds no shares to finish.",
                "Make shares first: mquant quantize ... --share i/N. A run without shares is "
                "finished by its own command.",
            )
        if (out / LEDGER).exists():
            Ledger(out).release()  # the process that finished OUT was killed before its release
    return result


def _gather(run: Shares) -> dict[str, str]:
    """Return the sha256 of all shards. Raises OutputError if a share is not done or is in use."""
    out, of = run.out, run.shared.of
    digests: dict[str, str] = {}
    pending: list[int] = []
    for number, part in enumerate(run.parts, 1):
        if not part.shards:
            continue
        digests |= run.digests(number)
        whole = all(shard.name in digests for shard in part.shards)
        if not whole or is_taken(out, number, of):
            pending.append(number)
    if not pending:
        return digests
    spoiled = [shard for number in pending for shard in run.spoiled(number)]
    left = sum(run.parts[n - 1].source_bytes - run.done_bytes(n) for n in pending)
    left += sum(unit.source_bytes for shard in spoiled for unit in shard.units)
    total = run.spec.plan.source_bytes
    one = len(pending) == 1
    are = "are" if len(spoiled) > 1 else "is"
    why = f" {names([s.name for s in spoiled])} {are} gone or not as recorded." if spoiled else ""
    raise OutputError(
        f"Share{'' if one else 's'} {_and(pending)} of {of:,} {'is' if one else 'are'} not done: "
        f"{size(left)} of {size(total)} are still to be read.{why}",
        f"Run the same mquant quantize with --share {pending[0]}/{of}"
        f"{'' if one else ' and so on'}, or with --cluster ray; then run mquant finish again.",
    )


def _and(numbers: list[int], shown: int = 12) -> str:
    """Return `2, 5 and 9`; for many numbers, the first ones and how many more there are."""
    head = [f"{number:,}" for number in numbers[:shown]]
    if len(numbers) > shown:
        return f"{', '.join(head)} and {len(numbers) - shown:,} more"
    return " and ".join(filter(None, (", ".join(head[:-1]), head[-1])))
