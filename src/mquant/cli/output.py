"""The one sink of the command line: the result on stdout, everything else on stderr.

    with output("plan", output_format) as out:
        out.put(totals=...)          # keys of the JSON envelope
        out.show(table)              # what a person sees, at once
        out.report(findings)         # for a person and in the envelope

However the block ends, `output` prints the error if any, and the envelope, and sets the exit code.
"""

import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final, TextIO

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from mquant.cli.interrupt import INTERRUPTED, received
from mquant.errors import MquantError, OutputError, Refused
from mquant.findings import Finding
from mquant.text import clean

_ERRORS: Final = frozenset({"error"})
_MARKS: Final = {"error": ("✗", "bold red"), "warning": ("!", "bold yellow"), "info": ("·", "cyan")}


class Format(StrEnum):
    """The format of the result on stdout."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Output:
    """What one run of a verb prints. Strings may come from files: they are shown, never obeyed."""

    def __init__(self, verb: str, output_format: Format) -> None:
        self.format = output_format
        self._verb = verb
        self._keys: dict[str, Any] = {}
        self._findings: list[Finding] = []
        self._error: dict[str, str] | None = None

    def show(self, *parts: RenderableType) -> None:
        """Print for a person, at once; print nothing in the other formats."""
        if self.format is Format.HUMAN:
            text = _draw(parts, sys.stdout)
            # Padding to the right edge is noise in a file, and folds in a narrower terminal.
            write("\n".join(line.rstrip() for line in text.split("\n")))

    def put(self, **keys: Any) -> None:
        """Add keys to the JSON envelope. The keys are printed even if the verb fails later."""
        self._keys.update(keys)

    def report(self, findings: Iterable[Finding], *, failing: frozenset[str] = _ERRORS) -> None:
        """Add findings to the result. `quiet` prints only findings that fail the verb, on stderr.

        `failing` are the severities that fail the verb.
        """
        for finding in findings:
            if finding in self._findings:
                continue
            self._findings.append(finding)
            if self.format is Format.HUMAN:
                _tell(finding)
            elif self.format is Format.QUIET and finding.severity in failing:
                _tell(finding, stderr=True)

    def note(self, message: str, style: str = "") -> None:
        """Print one line on stderr; print nothing if `quiet` is set."""
        if self.format is not Format.QUIET:
            _say(message, style)

    def fail(self, error: MquantError) -> None:
        """Print an error on stderr, and add the error to the envelope."""
        known = self._findings
        self._error = {"message": error.message, "fix": error.fix}
        refusals = error.findings if isinstance(error, Refused) else ()
        fresh = [finding for finding in refusals if finding not in known]
        self._findings = [*known, *fresh]
        seen = self.format is Format.QUIET or (self.format is Format.HUMAN and sys.stdout.isatty())
        if refusals and not fresh and seen:
            _say("Refused, for the reasons above; nothing was written.", "bold red")
            return
        prefix = "" if isinstance(error, Refused) else "Error: "
        _say(prefix + error.message, "bold red")
        if error.fix:
            _say(error.fix)
        for finding in refusals[1:]:
            _tell(finding, stderr=True)

    def crash(self, error: BaseException) -> None:
        """Print an unexpected exception as an error: a bug in mquant."""
        if os.environ.get("MQUANT_TRACEBACK"):
            write("".join(traceback.format_exception(error)), stderr=True)
        self.fail(
            MquantError(
                f"mquant failed unexpectedly: {type(error).__name__}: {error}.",
                "Please report this error and the command; MQUANT_TRACEBACK=1 adds the traceback.",
            )
        )

    def interrupted(self) -> None:
        """Print that the run was interrupted, and add that sentence to the envelope."""
        self._error = {"message": INTERRUPTED, "fix": ""}
        _say(INTERRUPTED)

    def close(self, *, ok: bool) -> None:
        """Print the envelope if the format is JSON."""
        if self.format is not Format.JSON:
            return
        envelope: dict[str, Any] = {
            "schema": f"mquant.{self._verb}/1",
            "ok": ok,
            "findings": [finding.to_json() for finding in self._findings],
        }
        if self._error is not None:
            envelope["error"] = self._error
        # Only ASCII: a bidi mark or a lone surrogate in a name must not reach the terminal.
        write(json.dumps({**envelope, **self._keys}, indent=2, allow_nan=False) + "\n")


@contextmanager
def output(verb: str, output_format: Format) -> Iterator[Output]:
    """Yield the output of one run of a verb. Turn every error into a sentence and an exit code."""
    out = Output(verb, output_format)
    code = 0
    try:
        yield out
    except typer.Exit as stop:
        code = stop.exit_code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 -- no traceback for any error
        code = _tell_error(out, error)
    try:
        out.close(ok=code == 0)
    except OutputError as error:
        told = _tell_error(out, error)
        code = code or told
    if code:
        raise typer.Exit(code)


def exit_code(run: Callable[[], object]) -> int:
    """Run the command line, which ends by SystemExit; return the exit code.

    An error that arises outside of a verb becomes a sentence, too.
    """
    out, code = Output("", Format.HUMAN), 0
    try:
        run()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else bool(stop.code)
    except OSError as error:  # of the help, or of a file for shell completion
        message = f"{error.filename or 'stdout'} cannot be written: {error.strerror}."
        code = _tell_error(out, OutputError(message))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 -- no traceback for any error
        code = _tell_error(out, error)
    try:
        write("")  # at the interpreter's own flush it is too late for a sentence
    except OutputError as error:
        code = code or _tell_error(out, error)
    return code


def _tell_error(out: Output, error: BaseException) -> int:
    """Print an error; return the exit code."""
    if received() or isinstance(error, KeyboardInterrupt):
        out.interrupted()
        return 130
    if isinstance(error, MquantError):
        out.fail(error)
        return error.exit_code
    out.crash(error)
    return 1


def plain_console(file: TextIO) -> Console:
    """Return a console that prints strings unchanged: no markup, no emoji, no highlighting."""
    return Console(file=file, markup=False, emoji=False, highlight=False)


def write(text: str, *, stderr: bool = False) -> None:
    """Write `text` and flush. A reader who closes the pipe early (`| head`) is no error.

    Raises OutputError if stdout cannot take the result, e.g. on a full disk.
    """
    stream = sys.stderr if stderr else sys.stdout
    try:
        _write_whole(stream, text)
    except BrokenPipeError:
        _abandon(stream)
    except OSError as error:
        _abandon(stream)
        if not stderr:
            raise OutputError(
                f"The result cannot be written to stdout: {error.strerror}."
            ) from error


def _write_whole(stream: TextIO, text: str) -> None:
    if not isinstance(stream, io.TextIOWrapper):  # rich's, above a progress bar
        stream.write(text)
        stream.flush()
        return
    # With PYTHONUNBUFFERED a stream writes once, and drops what a full disk did not take.
    stream.flush()
    left = memoryview(text.encode(stream.encoding, stream.errors or "strict"))
    while left:
        written = stream.buffer.write(left)
        if not written:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        left = left[written:]
    stream.flush()


def _abandon(stream: TextIO) -> None:
    # Drop the buffer, so that the interpreter's flush at exit does not fail again.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


def _say(message: str, style: str = "") -> None:
    write(_draw([Text(clean(message), style)], sys.stderr, soft_wrap=True), stderr=True)


def _tell(finding: Finding, *, stderr: bool = False) -> None:
    mark, style = _MARKS[finding.severity]
    lines = [Text.assemble((mark, style), " ", clean(finding.message))]
    if finding.fix:
        lines.append(Text("  " + clean(finding.fix), "dim"))
    # A fix is not wrapped, so that it can be copied.
    write(_draw(lines, sys.stderr if stderr else sys.stdout, soft_wrap=True), stderr=stderr)


class _Page(io.StringIO):
    """A string buffer with the properties of a stream, into which rich draws for the stream."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def _draw(parts: Iterable[RenderableType], stream: TextIO, *, soft_wrap: bool = False) -> str:
    page = _Page(stream)
    console = plain_console(page)
    for part in parts:
        console.print(part, soft_wrap=soft_wrap, crop=False)
    return page.getvalue()
