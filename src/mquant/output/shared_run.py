"""A run in shares: many processes fill OUT, perhaps on many machines.

`mquant-shares.json` says what is made, in how many shares, and from which job spec. The first
process writes the file, and the process that finishes the run deletes it last:

    {"schema": "mquant.shares/1", "mquant": "0.1.0", "of": 16, "fingerprint": {...}, "order": {...}}

Each share has its own ledger, which the share's process locks while the share is under way. A
process that begins a share holds the lock of OUT for a moment; a process that finishes the run
holds the lock until the run is finished. So no process can begin a share while the run is being
finished, finish the run while a share is under way, or fill OUT as a whole in the meantime.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mquant import __version__
from mquant.errors import InUse, OutputError
from mquant.output.disk import fsync_folder, out_of_space, read_own
from mquant.output.finish import write_file
from mquant.output.folder import State, examine, other_run
from mquant.output.ledger import LEDGER, SHARES, Ledger, is_ledger, ledger_name
from mquant.untrusted import parse_json

MOST_SHARES: Final = 10_000
"""The limit on shares: no checkpoint has more shards."""
_SCHEMA: Final = "mquant.shares/1"
_MOST_BYTES: Final = 8_000_000
_TURN_SECONDS: Final = 60.0  # a thousand processes that begin at once wait for each other
_AWAY: Final = "Give another folder with -o, or delete this one."


@dataclass(frozen=True)
class SharedRun:
    """The content of mquant-shares.json: what a run in shares makes, and in how many shares.

    `job_spec` is the job spec in JSON, for processes that make the plan again. `mquant` is the
    version that began the run. All processes must have this version: another version could compute
    other bytes.
    """

    of: int
    fingerprint: dict[str, Any]
    job_spec: dict[str, Any]
    mquant: str = __version__


def read_shared_run(out: Path) -> SharedRun | None:
    """Return the run in shares that fills OUT, or None. Raises OutputError for an invalid file."""
    if not os.path.lexists(out / SHARES):
        return None
    raw = read_own(out / SHARES, _MOST_BYTES)
    try:
        match parse_json(raw or b""):
            case {
                "schema": str(schema),
                "mquant": str(version),
                "of": int(of),
                "fingerprint": dict(fingerprint),
                "order": dict(job_spec),
            } if schema == _SCHEMA and 1 <= of <= MOST_SHARES:
                return SharedRun(of, fingerprint, job_spec, version)
    except ValueError:
        pass
    if not os.path.lexists(out / SHARES):
        return None  # the run was finished just then
    raise OutputError(f"{out / SHARES} is not a file that mquant wrote.", _AWAY)


def look(out: Path, sources: Sequence[Path], shared: SharedRun) -> State:
    """Return the state of OUT for this run in shares; write nothing.

    Raises OutputError if mquant did not make OUT, or if OUT belongs to another run, another number
    of shares, another version of mquant, or a run that makes OUT as a whole.
    """
    existing = read_shared_run(out)
    if existing is None:
        try:
            state = examine(out, sources, shared.fingerprint, restart=False).state
        except OutputError:
            if os.path.lexists(out / SHARES):  # another process claimed OUT just then
                return look(out, sources, shared)
            raise
        if state is State.UNFINISHED:
            raise OutputError(
                f"{out} is being made as a whole, not in shares.",
                "Run the same command without --share and --cluster, or give another -o.",
            )
        return state
    check_version(out, existing)
    if existing.fingerprint != shared.fingerprint:
        raise other_run(out, existing.fingerprint, shared.fingerprint, _AWAY)
    if existing.of != shared.of:
        raise OutputError(
            f"{out} is being made in {existing.of:,} shares, not in {shared.of:,}.",
            f"Take shares of {existing.of}, as in --share 1/{existing.of}; or give another -o.",
        )
    return State.UNFINISHED


def check_version(out: Path, shared: SharedRun) -> None:
    """Raise OutputError if another version of mquant began the run."""
    if shared.mquant != __version__:
        version = shared.mquant[:40]
        raise OutputError(
            f"{out} was begun by mquant {version}, this is mquant {__version__}.",
            f"Use mquant {version}, or give another folder with -o.",
        )


def claim(out: Path, sources: Sequence[Path], shared: SharedRun) -> State:
    """Claim OUT for this run in shares if OUT is free, under the lock of OUT. Raises as `look`."""
    with folder_lock(out):
        state = look(out, sources, shared)
        if state is State.FREE:
            content = {
                "schema": _SCHEMA,
                "mquant": shared.mquant,
                "of": shared.of,
                "fingerprint": shared.fingerprint,
                "order": shared.job_spec,
            }
            write_file(out, SHARES, [json.dumps(content).encode()])
            state = State.UNFINISHED
    return state


def take_share(
    out: Path, sources: Sequence[Path], shared: SharedRun, number: int, patience: float = 0.0
) -> Ledger | None:
    """Claim a share; if another process holds the share, wait up to `patience` seconds.

    Returns None if the run is finished. Raises InUse if another process still holds the share,
    OutputError as `look`.
    """
    if look(out, sources, shared) is State.DONE:
        return None
    try:
        ledger = Ledger(out, ledger_name(number, shared.of), patience)
    except InUse:
        raise InUse(
            f"Another mquant is making share {number:,} of {shared.of:,} in {out}.",
            "Wait for the other mquant, or take another share.",
        ) from None
    try:
        state = claim(out, sources, shared)
    except BaseException:
        ledger.release()
        raise
    if state is State.DONE:
        ledger.release()
        return None
    return ledger


def is_taken(out: Path, number: int, of: int) -> bool:
    """Return whether a process holds a share. The caller must hold the lock of OUT."""
    name = ledger_name(number, of)
    if not (out / name).exists():
        return False
    try:
        Ledger(out, name).release()
    except InUse:
        return True
    return False


@contextmanager
def folder_lock(out: Path) -> Iterator[Ledger]:
    """Hold the lock of OUT. Waits for another process up to a minute, then raises InUse."""
    ledger = Ledger(out, patience=_TURN_SECONDS)
    try:
        yield ledger
    finally:
        ledger.release()


def delete_share_files(out: Path) -> None:
    """Delete the share ledgers and mquant-shares.json."""
    with out_of_space(out / SHARES, 0):
        for path in out.iterdir():
            if is_ledger(path.name) and path.name != LEDGER:
                path.unlink()
        fsync_folder(out)
        (out / SHARES).unlink()
        fsync_folder(out)
