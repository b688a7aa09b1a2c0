"""The command line: the only place that prints, draws and exits."""

import gc
import os
import sys

from mquant.cli import interrupt


def main() -> None:
    """Run mquant and exit with its exit code."""
    interrupt.install()
    # Names and tensors are in no cycles: looking for cycles among them takes a third of the time.
    gc.set_threshold(100_000, 50, 1_000)
    _check_streams()
    try:
        interrupt.stoppable(now=True)
        # numpy's linear algebra keeps a thread spinning on every core; `eval` starts its own.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from mquant.cli.output import exit_code

        code = exit_code(_run)
    except KeyboardInterrupt:
        interrupt.tell()
        code = 130
    if code == 130:
        # Not sys.exit: `python -m` kills itself if the interrupt came inside of `exec`, and threads
        # that wait for a hub would be waited for.
        os._exit(code)
    interrupt.stoppable(now=False)
    sys.exit(code)


def _run() -> None:
    from mquant.cli.app import app
    from mquant.data_files import settle_folders

    settle_folders()
    app(prog_name="mquant")


def _check_streams() -> None:
    """Exit with 1 if stdout is closed; send to nowhere what goes to a closed stderr."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # else a file that mquant writes would get the number of the closed stream
    os.close(number)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")
    if sys.stdout is None:
        sys.exit("Error: stdout is closed, so the result cannot be printed.")
    for stream in (sys.stdout, sys.stderr):
        # An ASCII locale has no ✗: write an escape sequence instead of failing.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


__all__ = ["main"]
