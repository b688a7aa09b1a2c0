"""The command line: the only place that prints, draws and exits."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run mquant and exit with its exit code."""
    signal.signal(signal.SIGTERM, _stop)
    # numpy's linear algebra keeps a thread spinning on every core; `eval` starts its own threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        # An ASCII locale has no ✗: write an escape sequence instead of failing.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        from mquant.cli.app import app  # here, so that Ctrl-C during imports is caught too

        app(prog_name="mquant")
    except KeyboardInterrupt:
        from mquant.cli.output import INTERRUPTED, write

        write(INTERRUPTED + "\n", stderr=True)
        sys.exit(130)


def _stop(signum: int, frame: FrameType | None) -> None:
    """Handle SIGTERM like Ctrl-C: print one sentence and exit with code 130."""
    raise KeyboardInterrupt


__all__ = ["main"]
