"""A run in shares on a Ray cluster, with a task for each share. No other module imports Ray.

The driver makes the plan and claims OUT before the driver sends a task. A task gets OUT and the
number of its share, and reads the rest in OUT, as `mquant finish` does. Work units that a lost
worker had counted stay counted, so that Ray's retry of the task resumes after them.
"""

import logging
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

from mquant import __version__
from mquant.checkpoint import Stamp, stamp
from mquant.errors import EngineError, MissingExtra, MquantError
from mquant.events import Emit, Note, Progress, silent
from mquant.output import SHARES, State, read_shared_run
from mquant.plan import Plan
from mquant.runs.job_spec import FolderAt, JobSpec
from mquant.runs.run import Result, RunOptions
from mquant.runs.shares import Shares, Watch, in_shares, reopen
from mquant.runs.spec import Engine
from mquant.runs.workers import MOST_CORES
from mquant.text import plural, size

if TYPE_CHECKING:
    import ray

Sentences = tuple[str, str]
"""The message and fix of an error: plain strings, which any node can return."""

_RETRIES: Final = 5
_LOOK_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 30.0
_ANSWER_SECONDS: Final = 5.0
# A network file system releases a lost node's locks after its lease, usually 90 seconds.
_LOCK_SECONDS: Final = 150.0
_SAME_PATH: Final = "Put source and OUT on storage that all nodes mount at the same path."


def quantize_on_ray(
    plan: Plan, job_spec: JobSpec, out: Path, **options: Unpack[RunOptions]
) -> Result:
    """Write the checkpoint that `plan` describes into `out`, in tasks of a Ray cluster.

    The cluster is the one at RAY_ADDRESS, else one that runs on this machine, else one that is
    started for this run. `workers` are threads in each task; None: as many as the CPUs allow.
    Complete shares are not made again. Raises as `quantize`, and MissingExtra without Ray.
    """
    workers, emit = options.get("workers"), options.get("emit", silent)
    shared = read_shared_run(out)
    of = shared.of if shared else max(len(plan.shards), 1)
    run = in_shares(plan, job_spec, out.absolute(), of)
    if run.look() is State.DONE:
        return Result(out, plan, Engine.STREAM.value, fresh=False)
    run.check_disk()
    todo = [n for n in run.numbers if run.parts[n - 1].shards and not run.is_done(n)]
    if todo:
        with _connected(emit):
            if run.claim() is not State.DONE:
                _share_out(run, job_spec, todo, workers, emit)
    result = run.finish(emit)
    cast = result.cast if result else None
    return Result(out, plan, Engine.STREAM.value, fresh=result is not None, cast=cast)


def _share_out(
    run: Shares, job_spec: JobSpec, todo: list[int], workers: int | None, emit: Emit
) -> None:
    """Make the shares with these numbers in tasks."""
    import ray

    cpus, threads = _fit(len(todo), workers, emit)
    task: Any = ray.remote(_task()).options(
        num_cpus=cpus, max_retries=_RETRIES, retry_exceptions=False, scheduling_strategy="SPREAD"
    )
    seen = [str(run.out / SHARES), *_paths(job_spec)]
    arguments = (str(run.out), seen, threads, __version__)
    pending = {task.remote(number, *arguments): number for number in todo}
    watch, total = Watch(run), run.spec.plan.source_bytes
    try:
        while pending:
            emit(Progress("quantize", watch.done_bytes(), total, watch.at_work()))
            ready, _ = ray.wait(list(pending), timeout=_LOOK_SECONDS)
            for reference in ready:
                _take(reference, pending.pop(reference), run.shared.of)
    except BaseException:
        _stop(list(pending))
        done = watch.done_bytes()
        emit(Note("info", f"{size(done)} of {size(total)} are done; the same command resumes."))
        raise
    emit(Progress("quantize", watch.done_bytes(), total))


def _take(reference: "ray.ObjectRef[Any]", number: int, of: int) -> None:
    """Get the result of a task. Raises the error that the task ended with."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    what = f"share {number:,} of {of:,}"
    try:
        sentences: Sentences | None = ray.get(reference)
    except RayTaskError as error:
        cause = getattr(error, "cause", error)
        raise EngineError(
            f"The worker at {what} failed unexpectedly: {type(cause).__name__}: {cause}.",
            "Please report this error, with the command that you ran.",
        ) from None
    except RayError as error:
        raise EngineError(
            f"The worker at {what} was lost {_RETRIES + 1} times ({type(error).__name__}).",
            "Ray's logs say why; if memory ran out, a larger --workers lets fewer tasks run at a "
            "time. The same command resumes.",
        ) from None
    if sentences is not None:
        raise MquantError(*sentences)


def _stop(pending: list[Any]) -> None:
    """Cancel tasks as Ctrl-C does, so that their complete work units are counted."""
    import ray
    from ray.exceptions import RayError

    with suppress(RayError):  # the error that stopped the run says more
        for reference in pending:
            ray.cancel(reference)
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=_STOP_SECONDS)


def _fit(tasks: int, workers: int | None, emit: Emit) -> tuple[int, int]:
    """Return the CPUs and the threads of a task, for so many `tasks`.

    A task gets an equal part of all CPUs, or `workers` - 1 CPUs: at least 1, at most 16 or the CPUs
    of the smallest node. A task has a thread for each CPU, and one more to keep the disk busy.
    """
    import ray

    listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # ray's own
    alive = (int(node["Resources"].get("CPU", 0)) for node in listed if node["Alive"])
    nodes = [cpus for cpus in alive if cpus]  # a head node often has no CPUs for tasks
    most = min([MOST_CORES, *nodes])
    share = sum(nodes) // max(tasks, 1) if workers is None else workers - 1
    cpus = max(1, min(share, most))
    emit(
        Note(
            "info",
            f"On Ray: {plural(tasks, 'share')} to make, with {plural(cpus, 'CPU')} each; there are "
            f"{plural(sum(nodes), 'CPU')} on {plural(len(nodes), 'node')}.",
        )
    )
    return cpus, workers or cpus + 1


def _paths(job_spec: JobSpec) -> list[str]:
    source = [job_spec.source.folder] if isinstance(job_spec.source, FolderAt) else []
    return source + ([job_spec.importance] if job_spec.importance else [])


def _task() -> Callable[[int, str, list[str], int, str], Sentences | None]:
    """Return the function of a worker. Ray sends its code, as a node may have another mquant."""

    def share(
        number: int, out: str, seen: list[str], threads: int, version: str
    ) -> tuple[str, str] | None:
        from platform import node

        try:
            from mquant import __version__ as installed
        except ImportError:
            installed = "none"
        if installed != version:
            return (
                f"The driver's mquant is {version}, that of node {node()} is {installed}.",
                f"Install mquant {version} on all nodes.",
            )
        from mquant.runs.ray_cluster import work

        return work(number, out, seen, threads)

    return share


def work(number: int, out: str, seen: list[str], threads: int) -> Sentences | None:
    """Make a share in a worker, and return the sentences of an error, or None."""
    for path in seen:
        if not os.path.lexists(path):
            return f"Node {platform.node()} does not see {path}.", _SAME_PATH
    try:
        shares = Path(out) / SHARES
        run = _reopened(out, stamp(shares.stat()))
        if run is not None:
            run.make(number, workers=threads, patience=_LOCK_SECONDS)
    except MquantError as error:
        return error.message, error.fix
    return None


@lru_cache(maxsize=1)
def _reopened(out: str, _stamp: Stamp) -> Shares | None:
    """Return the run in shares, cached: a worker makes many shares, and a plan takes seconds."""
    return reopen(Path(out))


@contextmanager
def _connected(emit: Emit) -> Iterator[None]:
    """Connect to a Ray cluster, with Ray's own messages turned off, and disconnect in the end."""
    try:
        import ray
    except ImportError:
        raise MissingExtra("--cluster ray", "ray") from None
    # Ray would print reports of lost workers to stdout.
    ray._private.worker._worker_logs_enabled = False
    if ray.is_initialized():
        yield
        return
    try:
        with _keeping_sigterm():
            _connect(emit)
        yield
    finally:
        with _keeping_sigterm():
            ray.shutdown()


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, and raise KeyboardInterrupt in place of Ray's SystemExit.

    Ray's `init` installs a handler of its own, and `shutdown` removes the handler.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _connect(emit: Emit) -> None:
    import ray

    requested = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            _address(requested, emit),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"There is no Ray cluster at {requested or 'hand'}: {error}.",
            "Start a cluster: `ray start --head`, or correct RAY_ADDRESS; see docs/scale-out.md.",
        ) from error


def _address(requested: str | None, emit: Emit) -> str | None:
    """Return the address for `ray.init`: None for Ray's own choice, "local" for a new cluster.

    Ray chooses RAY_ADDRESS (`requested`), else a running cluster of this machine, else a new one.
    Raises ConnectionError if the cluster at `requested` does not answer.
    """
    from ray._private.services import canonicalize_bootstrap_address

    if requested and "://" in requested:
        raise ConnectionError("this address is for clients, but the driver runs in the cluster")
    address = canonicalize_bootstrap_address(None)  # type: ignore[arg-type]  # it takes None
    if address is None or _answers(address):
        return None
    if requested:
        raise ConnectionError("the cluster does not answer")
    # A crashed cluster leaves its address file behind.
    emit(Note("info", f"The Ray cluster at {address} does not answer; mquant starts one here."))
    return "local"


def _answers(address: str) -> bool:
    """Return whether a process listens at `host:port`; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
