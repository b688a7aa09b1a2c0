"""The tasks of a Ray cluster write the bytes of one process, even if workers or the driver die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import ray

from judges import hashes
from make import Row, make_checkpoint
from mquant.errors import EngineError, MquantError, OutputError, Refused
from mquant.events import Emit, Event, Note, Progress, silent
from mquant.output import SHARES, is_taken, ledger_name
from mquant.runs import ray_cluster
from mquant.runs.run import Result
from mquant.runs.shares import Shares
from ray_runs import SHARD_BYTES, connect, holder, on_ray, once_begun, run_of, units_still_valid
from run import quantize_nvfp4, shares_of


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[str]:
    """The address of a cluster of this machine, with two CPUs and so with two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        yield connect("local", num_cpus=2)
        ray.shutdown()


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the driver look often, so that a busy machine hides no share under way."""
    monkeypatch.setattr(ray_cluster, "_LOOK_SECONDS", 0.05)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("ray") / "src",
        layers=2,
        experts=24,
        hidden=128,
        intermediate=128,
        shards=3,
    )


@pytest.fixture(scope="module")
def expected(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file's hash after a run of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return hashes(quantize_nvfp4(src, out, shard_bytes=SHARD_BYTES))


@pytest.fixture
def ledgers(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """The text of each share's ledger when all shares are done, by number."""
    texts: dict[int, str] = {}
    finish = Shares.finish

    def keep_and_finish(self: Shares, emit: Emit = silent) -> Result | None:
        for number in self.numbers:
            texts[number] = (self.out / ledger_name(number, self.shared.of)).read_text()
        return finish(self, emit)

    monkeypatch.setattr(Shares, "finish", keep_and_finish)
    return texts


def test_two_workers_write_the_bytes_of_one_process(
    src: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    events: list[Event] = []
    result = on_ray(src, tmp_path / "out", events.append)
    assert result.fresh
    assert hashes(tmp_path / "out") == expected
    steps = [event for event in events if isinstance(event, Progress) and event.stage == "quantize"]
    assert max(event.workers for event in steps) in (1, 2)  # a worker may not have begun yet
    assert steps[-1] == Progress("quantize", steps[-1].total, steps[-1].total)
    assert [event.done for event in steps] == sorted(event.done for event in steps)
    count = len(result.plan.shards)
    assert count > 4
    message = f"On Ray: {count} shares to make, with 1 CPU each; there are 2 CPUs on 1 node."
    assert Note("info", message) in events
    assert not on_ray(src, tmp_path / "out").fresh


def test_a_killed_worker_costs_only_its_own_jobs(
    src: Path,
    expected: dict[str, str],
    tmp_path: Path,
    ledgers: dict[int, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, killed = tmp_path / "out", list[tuple[int, str]]()
    run = run_of(src, out)

    def kill(number: int) -> None:
        ledger = out / ledger_name(number, run.shared.of)
        os.kill(holder(ledger), signal.SIGKILL)
        killed.append((number, ledger.read_text()))

    on_ray(src, out, once_begun(out, 3, kill))
    assert hashes(out) == expected
    ((number, before),) = killed
    for other, text in ledgers.items():
        starts = text.count('{"sources"')
        assert starts == (2 if other == number else 1)
        assert len(units_still_valid(text)) == len(set(units_still_valid(text)))
    after = ledgers[number].removeprefix(before)
    assert len(after) < len(ledgers[number])
    assert len(units_still_valid(before)) >= 3
    assert set(units_still_valid(before)).isdisjoint(units_still_valid(after))
    assert capfd.readouterr() == ("", ""), "Ray's own report of it is not for our reader"


def test_a_share_whose_worker_dies_every_time_is_one_sentence(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly() -> Callable[..., None]:
        def share(*arguments: object) -> None:
            os.kill(os.getpid(), 9)

        return share

    monkeypatch.setattr(ray_cluster, "_task", deadly)
    monkeypatch.setattr(ray_cluster, "_RETRIES", 1)
    with pytest.raises(EngineError) as caught:
        on_ray(src, tmp_path / "out")
    assert caught.value.message.endswith(" was lost 2 times (WorkerCrashedError).")
    assert not (tmp_path / "out/config.json").exists()


def test_nan_is_the_same_sentence_as_in_a_single_process(tmp_path: Path) -> None:
    def spoil(rows: list[Row]) -> None:
        name, dtype, shape, data = rows[-5]
        values = np.frombuffer(bytearray(data), ml_dtypes.bfloat16)
        values[7] = np.nan
        rows[-5] = (name, dtype, shape, values.tobytes())

    src = make_checkpoint(tmp_path / "src", layers=2, experts=24, edit=spoil)
    with pytest.raises(MquantError) as alone:
        quantize_nvfp4(src, tmp_path / "alone")
    with pytest.raises(MquantError) as caught:
        on_ray(src, tmp_path / "out")
    assert "NaN or infinite" in caught.value.message
    assert (caught.value.message, caught.value.fix) == (alone.value.message, alone.value.fix)
    assert (caught.value.exit_code, caught.value.__cause__) == (1, None)
    assert (tmp_path / "out" / SHARES).exists()


def test_an_unexpected_failure_names_the_share(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty() -> Callable[..., None]:
        def share(*arguments: object) -> None:
            raise ZeroDivisionError("division by zero")

        return share

    monkeypatch.setattr(ray_cluster, "_task", faulty)
    with pytest.raises(EngineError) as caught:
        on_ray(src, tmp_path / "out")
    assert " failed unexpectedly: ZeroDivisionError: division by zero." in caught.value.message


def test_an_interrupted_run_resumes(src: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_ray(src, out, once_begun(out, 2, interrupt))
    assert not (out / "config.json").exists()
    run = run_of(src, out)
    assert not any(is_taken(out, number, run.shared.of) for number in run.numbers)
    done = sum(map(run.done_bytes, run.numbers))
    assert done > 0
    events: list[Event] = []
    on_ray(src, out, events.append)
    first = next(event for event in events if isinstance(event, Progress))
    assert first.done == done
    assert hashes(out) == expected


@pytest.mark.parametrize(
    ("tasks", "workers", "cpus", "threads"),
    [(5, None, 1, 2), (1, None, 2, 3), (5, 1, 1, 1), (5, 2, 1, 2), (5, 9, 2, 9)],
)
def test_tasks_share_out_the_cpus_and_have_a_thread_more(
    tasks: int, workers: int | None, cpus: int, threads: int
) -> None:
    assert ray_cluster._fit(tasks, workers, silent) == (cpus, threads)


def test_shares_that_were_made_by_jobs_are_not_made_again(
    src: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = shares_of(src, out, 3, SHARD_BYTES)
    run.make(2)
    before = {shard.name: (out / shard.name).stat().st_mtime_ns for shard in run.parts[1].shards}
    events: list[Event] = []
    on_ray(src, out, events.append)
    assert any("2 shares to make" in event.message for event in events if isinstance(event, Note))
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert hashes(out) == expected


def test_no_task_is_sent_out_if_all_shares_are_done(
    src: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        shares_of(src, tmp_path / "out", 2, SHARD_BYTES).make(number)
    monkeypatch.setattr(ray_cluster, "_connected", None)
    assert on_ray(src, tmp_path / "out").fresh
    assert hashes(tmp_path / "out") == expected


@pytest.mark.parametrize("side", ["out", "source"])
def test_a_node_that_does_not_see_the_storage_is_named(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    out, hidden = tmp_path / "out", str(tmp_path / "hidden")
    if side == "out":
        monkeypatch.setattr(ray_cluster, "SHARES", "../hidden")
    else:
        monkeypatch.setattr(ray_cluster, "_paths", lambda order: [hidden])
    with pytest.raises(MquantError) as caught:
        on_ray(src, out)
    assert caught.value.message.startswith(f"Node {os.uname().nodename} does not see ")
    assert caught.value.message.endswith("hidden.")
    assert "storage that all nodes mount" in caught.value.fix


def test_a_node_with_another_mquant_is_named(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mquant import __version__

    monkeypatch.setattr(ray_cluster, "__version__", "9.9.9")
    with pytest.raises(MquantError) as caught:
        on_ray(src, tmp_path / "out")
    node = os.uname().nodename
    assert caught.value.message == (
        f"The driver's mquant is 9.9.9, that of node {node} is {__version__}."
    )
    assert caught.value.fix == "Install mquant 9.9.9 on all nodes."


def test_refusals_come_before_a_task_is_sent_out(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_share_out", None)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="mquant did not make it"):
        on_ray(src, tmp_path)
    broken = make_checkpoint(tmp_path / "broken", edit=lambda rows: rows[:-1])
    with pytest.raises(Refused):
        on_ray(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CONNECT = """
import os, signal
from mquant.events import silent
from mquant.runs.ray_cluster import _connected
def ours(signum, frame): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, ours)
told = 0
with _connected(silent):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        told += 1
try:
    os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    told += 1
print("told", told)
"""


def test_sigterm_keeps_our_handler_during_and_after_a_silent_connection(
    two_workers: str,
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CONNECT],
        env={**os.environ, "RAY_ADDRESS": two_workers},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "told 2\n", "")


DRIVER = """
from pathlib import Path
from ray_runs import connect, on_ray
connect({address!r})
on_ray(Path({src!r}), Path({out!r}))
"""


def test_a_killed_driver_can_be_run_again(
    src: Path, expected: dict[str, str], tmp_path: Path, two_workers: str
) -> None:
    out = tmp_path / "out"
    code = DRIVER.format(address=two_workers, src=str(src), out=str(out))
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}
    ) as driver:
        deadline = time.monotonic() + 60
        while not list(out.glob("*.safetensors")) and time.monotonic() < deadline:
            assert driver.poll() is None
            time.sleep(0.05)
        driver.kill()
    assert not (out / "config.json").exists()
    events: list[Event] = []
    on_ray(src, out, events.append)  # the killed driver's workers may still be at work
    assert next(event for event in events if isinstance(event, Progress)).done > 0
    assert hashes(out) == expected
