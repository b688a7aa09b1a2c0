"""`--junit FILE`: the file after a killed run and a wrong command line; pipes; files that stay."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from make import make_checkpoint
from mquant.cli.app import app

OLDER = '<?xml version="1.0"?>\n<testsuite name="older"><testcase name="all-is-well"/></testsuite>'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


def verify(*arguments: object) -> int:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)]).exit_code


def test_a_usage_error_of_the_command_line_removes_an_older_report(
    checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "verify.xml"
    file.write_text(OLDER)
    assert verify(checkpoint, "--depth", "none-such", "--junit", file) == 2
    assert not file.exists()


def test_a_killed_run_leaves_a_report_without_a_verdict(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "verify.xml"
    file.write_text(OLDER)
    code = (
        "import os, signal, sys; import mquant.verify.judge as judge\n"
        "judge.verify = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from mquant.cli.app import app; app()"
    )
    arguments = ["verify", str(checkpoint), "--junit", str(file)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    suite = ElementTree.parse(file).getroot()
    (error,) = suite.findall("testcase/error")
    assert error.get("message") == "The run ended before the verdict."


def test_a_path_that_no_file_can_have_is_said_before_the_verdict(
    checkpoint: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        app, ["verify", str(checkpoint), "--junit", str(tmp_path / ("a" * 254))]
    )
    assert result.exit_code == 1
    assert "File name too long" in result.stderr
    assert "Clean" not in result.stdout


def test_a_pipe_gets_one_report(checkpoint: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert verify(checkpoint, "--junit", pipe) == 0
    reader.join()
    assert ElementTree.fromstring(read[0]).get("failures") == "0"
    assert pipe.is_fifo()


def test_the_family_file_is_no_junit_file(checkpoint: Path, tmp_path: Path) -> None:
    family = tmp_path / "family.yaml"
    family.write_text("name: x  # <testsuite")
    assert verify(checkpoint, "--family", family, "--junit", family) == 1
    assert family.read_text() == "name: x  # <testsuite"


def test_an_interrupted_process_leaves_no_older_report(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "verify.xml"
    file.write_text(OLDER)
    code = (
        "import time; import mquant.verify.judge as judge\n"
        "judge.verify = lambda *_, **__: (print('here', flush=True), time.sleep(60))\n"
        "from mquant.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "verify", str(checkpoint), "--junit", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(0.1)
        run.terminate()
        assert run.wait() == 130
    assert "all-is-well" not in file.read_text()
    assert len(ElementTree.parse(file).getroot().findall("testcase/error")) == 1
