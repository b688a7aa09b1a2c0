"""SIGINT and SIGTERM: any number of them, at any time, end mquant with exit code 130.

Until `install`, a signal ends the interpreter in the interpreter's own way: so this module and
`mquant.cli` import only what is loaded already, or in no time.
"""

import atexit
import math
import os
import signal
import sys
import time

INTERRUPTED = "Interrupted; it is safe to run the same command again."
_SAME_SECONDS = 1.0
"""`timeout` and some shells send an interrupt twice."""
_since: float | None = -math.inf
"""The time of the first signal; None while a verb runs undisturbed."""


def install() -> None:
    """Handle SIGTERM, and SIGINT unless the caller has the process ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
            # The interpreter's last steps would give a late signal the system's default: a kill.
            atexit.register(signal.signal, number, signal.SIG_IGN)
    sys.unraisablehook = _send_again


def stoppable(*, now: bool) -> None:
    """Say whether the next signal raises KeyboardInterrupt, or ends the process at once."""
    global _since
    _since = None if now else -math.inf


def received() -> bool:
    """Return whether a signal has stopped the verb, whatever libraries made of the exception."""
    return _since is not None and _since > -math.inf


def tell() -> None:
    """Print that the run was interrupted, without Python's streams."""
    try:
        os.write(2, f"{INTERRUPTED}\n".encode())
    except OSError:
        return  # nobody reads


def _stop(_number: int, _frame: object) -> None:
    global _since
    if _since is None:
        _since = time.monotonic()
        raise KeyboardInterrupt
    if time.monotonic() - _since > _SAME_SECONDS:
        tell()
        os._exit(130)  # as safe for the files as a kill


def _send_again(lost: "sys.UnraisableHookArgs") -> None:
    """Send the signal again if the interpreter drops KeyboardInterrupt, as in `__del__`."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    import threading

    stoppable(now=True)
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
