"""Any number of signals, at any time, is exit code 130; a closed stdout is 1. Nothing is silent."""

import subprocess
import sys

import pytest

from mquant.cli.interrupt import INTERRUPTED

SENTENCE = f"{INTERRUPTED}\n"
# The command line, with a verb of the test.
BODY = """
import os, signal, sys, time, types
import mquant.cli
from mquant.cli import interrupt
def send(number=signal.SIGINT): os.kill(os.getpid(), number)
class Dropped:
    def __del__(self): send()
def app(prog_name):
{}
sys.modules["mquant.cli.app"] = types.SimpleNamespace(app=app)
mquant.cli.main()
"""


def run(*lines: str) -> tuple[int, str]:
    code = BODY.format("\n".join("    " + line for line in lines))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_one_signal_is_one_sentence(number: str) -> None:
    assert run(f"send(signal.{number})", "time.sleep(9)") == (130, SENTENCE)


def test_a_signal_that_comes_twice_does_not_disturb_the_cleanup() -> None:
    cleanup = (
        "finally:",
        "    send()",
        "    send(signal.SIGTERM)",
        "    print('clean', file=sys.stderr)",
    )
    assert run("try:", "    send()", *cleanup) == (130, f"clean\n{SENTENCE}")


def test_a_second_signal_ends_a_cleanup_that_takes_long() -> None:
    cleanup = ("finally:", "    interrupt._SAME_SECONDS = 0", "    send()", "    time.sleep(9)")
    assert run("try:", "    send()", *cleanup) == (130, SENTENCE)


def test_an_interrupt_that_the_interpreter_drops_comes_again() -> None:
    assert run("Dropped()", "time.sleep(9)") == (130, SENTENCE)


def test_an_interrupt_that_a_library_turns_into_its_own_error_is_an_interrupt() -> None:
    library = ("try:", "    send()", "except KeyboardInterrupt:", "    pass")
    assert run(*library, "raise ValueError('KeyboardInterrupt: ')") == (130, SENTENCE)


def test_an_interrupt_of_code_from_a_string_is_an_interrupt() -> None:
    assert run("exec('send()')") == (130, SENTENCE)


def test_a_signal_at_the_end_of_the_interpreter_changes_nothing() -> None:
    assert run("sys.modules['__main__'].kept = Dropped()") == (0, "")


def test_a_process_that_ignores_sigint_goes_on() -> None:
    code = BODY.format("    send()").replace("mquant.cli.main()", "interrupt.install()")
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + code + "send()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("streams", "code", "stderr"),
    [
        (">&-", 1, "Error: stdout is closed, so the result cannot be printed.\n"),
        (">&- 2>&-", 1, ""),
        ("2>&- >/dev/null", 0, ""),
        ("<&- >/dev/null", 0, ""),
    ],
)
def test_closed_streams(streams: str, code: int, stderr: str) -> None:
    command = f"{sys.executable} -m mquant --version {streams}; echo $?"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{code}\n", stderr)


def test_a_full_disk_under_the_help_is_one_sentence() -> None:
    command = f"{sys.executable} -m mquant --help >/dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: stdout cannot be written: No space left on device.\n"
