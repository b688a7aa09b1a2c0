"""Runs that are killed. Each run has its own process, forked from a server with loaded kernels."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from mquant.checkpoint import Folder
from mquant.engines import stream
from mquant.events import silent
from mquant.family_files import load_families
from mquant.output import LEDGER, ShardSet
from mquant.repair.diagnose import diagnose
from mquant.repair.repair import repair_in_place
from mquant.runs.quantize import quantize
from mquant.runs.shares import finish_shares
from run import plan_of, quantize_nvfp4, shares_of

_SERVER = multiprocessing.get_context("forkserver")


def run_and_die(src: Path, out: Path, shard_bytes: int, unit: int, *, counted: bool) -> int | None:
    """Quantize, kill the process when `unit` units are done, and return the exit code.

    If `counted` is true, every unit is in the ledger before the next unit begins; if not, no unit
    is in the ledger before its shard is whole. One worker does the same units every time.
    """
    return _outcome(_start(_die_after, src, out, shard_bytes, unit, counted))


def run_and_kill(src: Path, out: Path, shard_bytes: int, seconds: float) -> int | None:
    """Quantize, kill the process `seconds` after the ledger appears, and return the exit code."""
    process = _start(quantize_nvfp4, src, out, silent, shard_bytes)
    ledger = out / LEDGER
    deadline = time.monotonic() + 30
    while process.is_alive() and not ledger.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.join(seconds)
    process.kill()
    return _outcome(process)


def make_shares(src: Path, out: Path, shard_bytes: int, of: int) -> list[int | None]:
    """Make all shares at the same time, each in its own process; return the exit codes."""
    numbers = range(1, of + 1)
    processes = [_start(_share_and_die, src, out, shard_bytes, n, of, None) for n in numbers]
    return [_outcome(process) for process in processes]


def share_and_die(
    src: Path, out: Path, shard_bytes: int, number: int, of: int, unit: int
) -> int | None:
    """Make a share, kill the process when `unit` of its units are counted; return the exit code."""
    return _outcome(_start(_share_and_die, src, out, shard_bytes, number, of, unit))


def finish_and_die(out: Path, changes: int) -> int | None:
    """Finish a run in shares, and kill the process after `changes` renames or deletions in OUT."""
    return _outcome(_start(_finish_and_die, out, changes))


def calibrate_and_die(
    src: Path, recipe: str, out: Path, text: str, after: tuple[type, str, int]
) -> int | None:
    """Quantize with calibration data, and kill the process; return the exit code.

    `after` is the call that the process does not survive: a class, a method, and which of the calls
    of the method. One worker does the same calls every time.
    """
    return _outcome(_start(_calibrate_and_die, src, recipe, out, text, after))


def repair_and_die(bad: Path, parent: Path, changes: int) -> int | None:
    """Repair in place, and kill the process after `changes` renames or deletions in the folder."""
    return _outcome(_start(_die_after_changes, bad, parent, changes))


def _start(target: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    _SERVER.set_forkserver_preload(["warm"])
    process = _SERVER.Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        # The server finds `warm` by it.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        process.start()
    return process


def _outcome(process: ForkServerProcess) -> int | None:
    process.join(60)
    code = process.exitcode
    process.close()
    return code


def _die_after(src: Path, out: Path, shard_bytes: int, unit: int, counted: bool) -> None:
    _die_when_done(unit, counted=counted)
    quantize_nvfp4(src, out, shard_bytes=shard_bytes, workers=1)


def _share_and_die(
    src: Path, out: Path, shard_bytes: int, number: int, of: int, unit: int | None
) -> None:
    if unit is not None:
        _die_when_done(unit, counted=True)
    shares_of(src, out, of, shard_bytes).make(number, workers=1)


def _die_when_done(unit: int, *, counted: bool) -> None:
    complete = ShardSet._complete
    done = 0

    def complete_and_die(self: ShardSet, index: int) -> None:
        nonlocal done
        complete(self, index)
        if counted:
            self.commit()
        done += 1
        if done == unit:
            os.kill(os.getpid(), signal.SIGKILL)

    ShardSet._complete = complete_and_die  # type: ignore[method-assign]
    stream._COMMIT_SECONDS = 1000.0  # type: ignore[misc]


def _die_after_changes(bad: Path, parent: Path, changes: int) -> None:
    _count_changes(changes)
    repair_in_place(diagnose(Folder(bad), Folder(parent), load_families()))


def _finish_and_die(out: Path, changes: int) -> None:
    _count_changes(changes)
    finish_shares(out)


def _calibrate_and_die(
    src: Path, recipe: str, out: Path, text: str, after: tuple[type, str, int]
) -> None:
    owner, name, left = after
    method = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        result = method(*arguments, **named)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)
    quantize(plan_of(src, recipe), out, data=text, workers=1)


def _count_changes(changes: int) -> None:
    left = changes

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **named)

        return call

    for name in ("rename", "replace", "unlink", "rmdir"):
        setattr(Path, name, counted(getattr(Path, name)))
