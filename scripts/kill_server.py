"""Run mquant in forked processes that die at a given change of a file, for kill_everywhere.py.

The server has the preloaded library (kill_preload.c). It loads the modules that a whole command has
loaded, so that each later command costs a fork and its own work. A line of JSON on stdin asks for
one command; a line of JSON on stdout answers. `here` runs the command in the server itself: then
kernels are compiled and caches are warm for all later processes.
"""

import atexit
import ctypes
import importlib
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

SECONDS = 180
"""The longest time of a command."""


def main() -> None:
    """Answer commands until stdin ends."""
    library = ctypes.CDLL(None)
    library.kill_count.restype = ctypes.c_long
    library.kill_list.restype = ctypes.c_char_p
    library.kill_start.argtypes = (ctypes.c_char_p,)
    library.kill_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import typer.main
    from huggingface_hub.utils import _detect_agent

    from mquant.checkpoint import retry
    from mquant.cli.app import app

    typer.main.get_command = cache(typer.main.get_command)  # making the verbs takes 0.1 s
    typer.main.get_command(app)
    _detect_agent._registry = _detect_agent._EMPTY_REGISTRY  # else each process asks the hub
    retry.BACKOFF_SECONDS = 0.0  # type: ignore[misc]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a module may print when it is loaded
    for line in sys.stdin:
        job = json.loads(line)
        code = _warm(job) if job["here"] else _fork(job, library)
        listed = library.kill_list().decode(errors="replace").splitlines()
        answer = {"code": code, "count": library.kill_count(), "listed": listed}
        print(json.dumps(answer), file=answers, flush=True)


def _fork(job: dict[str, Any], library: Any) -> int:
    assert threading.active_count() == 1, "a fork would lose threads"
    process = os.fork()
    if not process:
        os._exit(_child(job, library))
    _, status = os.waitpid(process, 0)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # the children of a killed command
    with suppress(FileNotFoundError):
        for name in Path(job["modules"]).read_text().split():
            with suppress(Exception):  # some modules exist only while their package is loaded
                importlib.import_module(name)
        Path(job["modules"]).unlink()
    return os.waitstatus_to_exitcode(status)


def _child(job: dict[str, Any], library: Any) -> int:
    os.setsid()
    signal.alarm(SECONDS)
    _divert(job["log"])
    os.chdir(job["folder"])
    library.kill_arm(job["root"].encode(), job["at"], job["torn"])
    sys.addaudithook(partial(_count_start, library))
    before = {*sys.modules}
    code = _run(job["command"])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if late := {*sys.modules} - before:
        Path(job["modules"]).write_text(" ".join(sorted(late)))
    return code


def _count_start(library: Any, event: str, args: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        command = " ".join(map(str, args[1]))
        library.kill_start(command.partition("\n")[0].encode())  # an operation is one line


def _warm(job: dict[str, Any]) -> int:
    outputs = os.dup(1), os.dup(2)
    before = Path.cwd()
    _divert(job["log"])
    os.chdir(job["folder"])
    code = _run(job["command"])
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(before)
    os.dup2(outputs[0], 1)
    os.dup2(outputs[1], 2)
    return code


def _run(command: list[str]) -> int:
    from mquant.cli import main as mquant

    sys.argv = ["mquant", *command]
    try:
        mquant()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _divert(log: str) -> None:
    target = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


if __name__ == "__main__":
    main()
