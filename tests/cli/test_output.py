"""Every verb uses the same streams, formats and exit codes, and escapes strings from files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import mquant.plan  # noqa: F401 -- registers the rules
from mquant.cli.app import app
from mquant.cli.output import Format, Output, output
from mquant.cli.progress import progress
from mquant.errors import MquantError, Refused, UsageError
from mquant.events import Note, Progress
from mquant.findings import Finding
from mquant.text import clean

BAD = Finding("tensor-unknown", "error", "x", "The tensor x is odd.", "Remove it.")
WORSE = Finding("tensor-missing", "error", "y", "The tensor y is gone.", "Get it.")
WARNING = Finding("shard-not-in-index", "warning", "z", "The tensor z is large.")

MQUANT = [sys.executable, "-m", "mquant"]


def run(body: Callable[[Output], None], form: str = "human") -> Result:
    """Return the result of a verb that runs `body`."""
    verbs = typer.Typer()

    @verbs.command()
    def verb() -> None:
        with output("verb", Format(form)) as out:
            body(out)

    return CliRunner().invoke(verbs, [])


def failing(error: BaseException) -> Callable[[Output], None]:
    def body(out: Output) -> None:
        out.put(answer=42)
        out.show("the answer is 42")
        raise error

    return body


# --- streams and exit codes


def test_the_result_is_on_stdout_and_notes_are_on_stderr() -> None:
    def body(out: Output) -> None:
        out.note("working")
        out.show("done")

    result = run(body)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "done\n", "working\n")


def test_an_error_is_its_sentence_and_its_fix_on_stderr() -> None:
    result = run(failing(MquantError("The disk is full.", "Free space.")))
    assert result.exit_code == 1
    assert result.stdout == "the answer is 42\n"
    assert result.stderr == "Error: The disk is full.\nFree space.\n"


def test_a_usage_error_exits_with_2() -> None:
    assert run(failing(UsageError("No."))).exit_code == 2


def test_a_verb_may_choose_its_exit_code() -> None:
    result = run(failing(typer.Exit(3)), "json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["ok"] is False


def test_a_refusal_names_every_reason_on_stderr() -> None:
    result = run(failing(Refused([BAD, WORSE])))
    assert result.exit_code == 1
    assert result.stderr == (
        "Refused: The tensor x is odd. There are 2 findings.\n"
        "Remove it.\n"
        "✗ The tensor y is gone.\n"
        "  Get it.\n"
    )


def test_ctrl_c_is_one_sentence_and_130() -> None:
    result = run(failing(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert result.stderr == "Interrupted; it is safe to run the same command again.\n"


def test_a_bug_is_one_sentence_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MQUANT_TRACEBACK", raising=False)
    result = run(failing(ZeroDivisionError("by zero")))
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: mquant failed unexpectedly: ZeroDivisionError: by zero.\n"
        "Please report this error and the command; MQUANT_TRACEBACK=1 adds the traceback.\n"
    )


def test_a_bug_shows_its_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQUANT_TRACEBACK", "1")
    result = run(failing(ZeroDivisionError("by zero")))
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert "mquant failed unexpectedly: ZeroDivisionError: by zero." in result.stderr


def test_a_reader_who_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m mquant families show minimax_m2 | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*MQUANT, "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        "Error: The result cannot be written to stdout: No space left on device.\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_fills_in_the_middle_of_the_result_is_an_error(
    tmp_path: Path, unbuffered: str
) -> None:
    """Unbuffered, a stream drops what the disk did not take, and raises nothing."""
    limited = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100, 100)); "
    command = [sys.executable, "-c", f"{limited}from mquant.cli import main; main()", "recipes"]
    with (tmp_path / "out").open("w") as out:
        done = subprocess.run(
            command,
            stdout=out,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            text=True,
            check=False,
        )
    assert (tmp_path / "out").stat().st_size == 100
    assert done.returncode == 1
    assert done.stderr == "Error: The result cannot be written to stdout: File too large.\n"


# --- formats


def test_json_has_schema_ok_and_findings_before_the_verbs_keys() -> None:
    def body(out: Output) -> None:
        out.put(answer=42)
        out.report([WARNING])
        out.show("not in JSON")

    result = run(body, "json")
    assert json.loads(result.stdout) == {
        "schema": "mquant.verb/1",
        "ok": True,
        "findings": [WARNING.to_json()],
        "answer": 42,
    }
    assert list(json.loads(result.stdout)) == ["schema", "ok", "findings", "answer"]


def test_json_keeps_the_details_when_the_verb_fails() -> None:
    result = run(failing(MquantError("The disk is full.", "Free space.")), "json")
    assert json.loads(result.stdout) == {
        "schema": "mquant.verb/1",
        "ok": False,
        "findings": [],
        "error": {"message": "The disk is full.", "fix": "Free space."},
        "answer": 42,
    }
    assert result.stderr == "Error: The disk is full.\nFree space.\n"


def test_json_lists_the_findings_of_a_refusal_once() -> None:
    def body(out: Output) -> None:
        out.report([BAD])
        raise Refused([BAD, WORSE])

    document = json.loads(run(body, "json").stdout)
    assert document["findings"] == [BAD.to_json(), WORSE.to_json()]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("by zero")])
def test_json_comes_also_from_an_interrupted_or_broken_run(error: BaseException) -> None:
    document = json.loads(run(failing(error), "json").stdout)
    assert document["ok"] is False
    assert document["answer"] == 42


def test_quiet_prints_nothing_on_stdout_and_tells_errors_on_stderr() -> None:
    def body(out: Output) -> None:
        out.note("working")
        out.show("result")
        out.report([WARNING, BAD])

    result = run(body, "quiet")
    assert result.stdout == ""
    assert result.stderr == "✗ The tensor x is odd.\n  Remove it.\n"


def test_findings_are_never_wrapped() -> None:
    long = Finding("tensor-unknown", "error", "x", "word " * 60 + "end.", "fix " * 60 + "end.")
    result = run(lambda out: out.report([long]))
    assert len(result.stdout.splitlines()) == 2


def test_piped_output_has_no_escapes_and_no_padding() -> None:
    done = subprocess.run([*MQUANT, "recipes"], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert not [line for line in done.stdout.splitlines() if line != line.rstrip()]


# --- strings from files


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb", r"a\u202eb"),
        ("\ud800", r"\ud800"),
        ("专家 [bold]", "专家 [bold]"),
    ],
)
def test_characters_that_a_terminal_obeys_are_escaped(hostile: str, shown: str) -> None:
    assert clean(hostile) == shown


def test_markup_in_a_finding_is_shown_as_it_is() -> None:
    finding = Finding("tensor-unknown", "error", "x", "No [red]such[/red] [/tensor] :smile:.")
    result = run(lambda out: out.report([finding]))
    assert result.stdout == "✗ No [red]such[/red] [/tensor] :smile:.\n"


def test_escapes_in_an_error_do_not_reach_the_terminal() -> None:
    result = run(failing(MquantError("No \x1b]0;title\x07 file.")))
    assert result.stderr == "Error: No \\x1b]0;title\\x07 file.\n"


def test_json_is_ascii() -> None:
    result = run(lambda out: out.put(name="\u202e\ud800\x1b"), "json")
    assert result.stdout.isascii()
    assert json.loads(result.stdout)["name"] == "\u202e\ud800\x1b"


# --- the app


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from mquant.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'llmcompressor', 'huggingface_hub', 'httpx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "mquant 0.1.0\n")


VERBS = ["inspect", "plan", "quantize", "recipes", "families", "synth"]


@pytest.mark.parametrize("verb", [*VERBS, "recipes show", "families show"])
def test_every_verb_has_one_example_and_the_same_formats(verb: str) -> None:
    result = CliRunner().invoke(app, [*verb.split(), "--help"], terminal_width=200)
    assert result.stdout.count("Example: mquant ") == 1
    assert "human|json|quiet" in result.stdout


def test_an_unknown_verb_or_option_is_a_usage_error() -> None:
    assert CliRunner().invoke(app, ["quantise"]).exit_code == 2
    assert CliRunner().invoke(app, ["plan", "--recipee", "x"]).exit_code == 2
    assert CliRunner().invoke(app, ["recipes", "--format", "xml"]).exit_code == 2


def test_bash_completes_verbs_and_recipes() -> None:
    def complete(words: str) -> list[str]:
        env = {"_MQUANT_COMPLETE": "complete_bash", "COMP_WORDS": words}
        env["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        return subprocess.run(
            MQUANT, capture_output=True, text=True, env={**os.environ, **env}, check=False
        ).stdout.split()

    assert "quantize" in complete("mquant qu")
    assert "nvfp4" in complete("mquant plan --recipe nv")


# --- progress


def test_notes_are_lines_and_progress_is_silent_without_a_terminal() -> None:
    def body(out: Output) -> None:
        with progress(out) as emit:
            emit(Progress("Writing", 1, 2))
            emit(Note("warning", "There is no [licence] file."))

    result = run(body)
    assert result.stderr == "There is no [licence] file.\n"
    assert run(body, "quiet").stderr == ""


def test_a_terminal_gets_a_bar_with_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def terminal() -> Iterator[None]:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        yield

    def body(out: Output) -> None:
        with terminal(), progress(out) as emit:
            emit(Progress("Writing", 0, 2_000_000))
            emit(Note("info", "There is no licence file."))
            emit(Progress("Writing", 2_000_000, 2_000_000))

    stderr = run(body).stderr
    assert "Writing" in stderr
    assert "2.0/2.0 MB" in stderr
    assert "There is no licence file." in stderr
