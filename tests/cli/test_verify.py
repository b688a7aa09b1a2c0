"""`mquant verify` prints a verdict, sets its exit code, and reads only headers of a hub repo."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner, Result

from fakehub import FakeHub, hub
from make import Row, make_checkpoint, make_row, without
from mquant.cli.app import app
from mquant.findings import RULES, VERIFIED
from mutate import changed, mutated, setting
from run import TRAINED

__all__ = ["hub"]  # the fixture


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def document(*arguments: object) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(verify(*arguments, "--format", "json").stdout)
    assert value["schema"] == "mquant.verify/1"
    return value


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "plain", config={"num_mtp_modules": 0})


def shown(result: Result) -> str:
    return " ".join(result.stdout.split())


def test_a_clean_verdict_names_what_was_not_judged(plain: Path) -> None:
    result = verify(plain)
    assert result.exit_code == 0
    assert shown(result) == (
        "Clean for vLLM 0.32: 47 tensors, 0 quantized modules, checked structure and numbers. "
        "Not judged: 3 rules (no mquant.json says what the files were), 12 rules (no parent was "
        "given), 6 rules (no loader was asked). "
        "The loaders of SGLang and TensorRT-LLM are not modelled."
    )
    assert result.stderr == ""


@pytest.mark.upstream
def test_against_the_parent(trained: Path) -> None:
    result = verify(trained, "--against", TRAINED)
    assert result.exit_code == 0
    assert shown(result).startswith(
        "Clean for vLLM 0.32: 327 tensors, 102 quantized modules, checked structure and numbers, "
        "compared with tiny-minimax-m2 (a sample of its weights). "
        "Not judged: 6 rules (no loader was asked). "
        "The loaders of SGLang and TensorRT-LLM are not modelled. · "
    )
    assert "(all of its weights)" in shown(verify(trained, "--against", TRAINED, "--depth", "full"))


def test_errors_come_first_and_exit_with_three(plain: Path, tmp_path: Path) -> None:
    bad = mutated(plain, tmp_path, edit=without("lm_head"), total_size=1)
    result = verify(bad)
    assert result.exit_code == 3
    assert shown(result).startswith("Broken for vLLM 0.32: 1 error, 1 warning in 46 tensors")
    assert result.stdout.index("✗ The checkpoint lacks lm_head.weight") < result.stdout.index("! ")
    report = document(bad)
    assert (report["ok"], report["errors"], report["warnings"]) == (False, 1, 1)
    assert [f["rule"] for f in report["findings"]] == ["tensor-missing", "total-size-wrong"]
    assert report["verdict"].startswith("Broken for vLLM 0.32: ")


def test_warnings_fail_only_on_request(plain: Path, tmp_path: Path) -> None:
    bad = mutated(plain, tmp_path, total_size=1)
    result = verify(bad)
    assert (result.exit_code, shown(result)[:37]) == (0, "Sound for vLLM 0.32, with 1 warning: ")
    assert verify(bad, "--fail-on", "warning").exit_code == 3
    assert verify(plain, "--fail-on", "warning").exit_code == 0


def test_quiet_still_says_what_fails_the_run(plain: Path, tmp_path: Path) -> None:
    bad = mutated(plain, tmp_path, total_size=1)
    assert verify(bad, "--format", "quiet").output == ""
    failed = verify(bad, "--format", "quiet", "--fail-on", "warning")
    assert (failed.exit_code, failed.stdout) == (3, "")
    assert "! " in failed.stderr


def test_information_is_shown_and_never_fails_the_run(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "verify.xml"
    result = verify(trained, "--fail-on", "warning", "--junit", file)
    assert (result.exit_code, shown(result)[:34]) == (0, "Clean for vLLM 0.32: 327 tensors, ")
    assert "· config.json says num_mtp_modules 3, but there is no tensor" in shown(result)
    assert "· With FP4 Marlin kernels, by tensor-parallel size: vLLM" in shown(result)
    report = document(trained)
    assert (report["ok"], report["errors"], report["warnings"]) == (True, 0, 0)
    assert {f["rule"]: f["severity"] for f in report["findings"]} == {
        "mtp-without-tensors": "info",
        "tensor-parallel": "info",
    }
    assert verify(trained, "--format", "quiet", "--fail-on", "warning").output == ""
    suite = ElementTree.parse(file).getroot()
    (case,) = suite.findall("*[@name='tensor-parallel']")
    assert [part.tag for part in case] == ["system-out"]
    assert suite.get("failures") == "0"


def test_depth_decides_what_is_read(plain: Path, tmp_path: Path) -> None:
    edit = changed("model.norm.weight", data=setting(slice(None), 0xFF))
    bad = mutated(plain, tmp_path, edit=edit)
    assert verify(bad).exit_code == 3
    assert verify(bad, "--depth", "structure").exit_code == 0
    assert document(bad, "--depth", "structure")["checked"] == ["structure"]


def test_json_says_what_was_checked(plain: Path) -> None:
    report = document(plain)
    not_judged = report.pop("not_judged")
    assert {rule["why"] for rule in not_judged} == {
        "no parent was given",
        "no loader was asked",
        "no mquant.json says what the files were",
    }
    assert {"rule": "vllm-refuses", "why": "no loader was asked"} in not_judged
    assert report == {
        "schema": "mquant.verify/1",
        "ok": True,
        "findings": [],
        "verdict": "Clean for vLLM 0.32: 47 tensors, 0 quantized modules, "
        "checked structure and numbers.",
        "source": "plain",
        "family": "minimax_m2",
        "quantization": None,
        "tensors": 47,
        "quantized_modules": 0,
        "parent": None,
        "checked": ["structure", "numbers"],
        "sampled": False,
        "errors": 0,
        "warnings": 0,
        "bytes_read": None,
        "requests": None,
        "loader": None,
        "stands_for": {"name": "vllm", "version": "0.32", "how": "model"},
        "not_modelled": ["SGLang", "TensorRT-LLM"],
    }


def test_quiet_tells_errors_on_stderr(plain: Path, tmp_path: Path) -> None:
    result = verify(mutated(plain, tmp_path, edit=without("lm_head")), "--format", "quiet")
    assert result.stdout == ""
    assert "lacks lm_head.weight" in result.stderr


def test_an_unreadable_checkpoint_is_a_sentence_and_exits_with_1(
    tmp_path: Path, plain: Path
) -> None:
    for arguments in ((tmp_path / "none",), (tmp_path,), (plain, "--against", tmp_path / "none")):
        result = verify(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ")


@pytest.mark.upstream
def test_only_headers_of_a_hub_repo_are_read(hub: FakeHub, trained: Path) -> None:
    hub.add("org/tiny", trained)
    result = verify("org/tiny")
    assert result.exit_code == 0
    assert "Clean for vLLM 0.32: 327 tensors, 102 quantized modules, checked structure." in shown(
        result
    )
    weights = sum(path.stat().st_size for path in trained.glob("*.safetensors"))
    assert hub.bytes_served < weights / 10
    hub.forget()
    report = document("org/tiny")
    assert report["requests"] == len(hub.requests)
    assert 0 < report["bytes_read"] <= hub.bytes_served
    asked = [request.path for request in hub.requests if request.host == "127.0.0.1"]
    assert len(asked) == len(set(asked)), "no file is asked for twice"
    assert "in 15 requests from the hub" in shown(verify("org/tiny"))


@pytest.mark.upstream
def test_a_hub_repo_against_its_parent_is_sampled(hub: FakeHub, trained: Path) -> None:
    hub.add("org/tiny", trained)
    hub.add("org/parent", TRAINED)
    assert verify("org/tiny", "--against", "org/parent").exit_code == 0
    assert document("org/tiny", "--against", TRAINED)["errors"] == 0


def test_missing_and_gated_repos_are_a_sentence_and_exit_with_1(hub: FakeHub, plain: Path) -> None:
    hub.add("org/gated", plain, access="gated")
    hub.add("org/open", plain)
    for arguments in (("org/none",), ("org/gated",), ("org/open", "--revision", "v9")):
        result = verify(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ")


def test_verify_loads_no_torch(plain: Path) -> None:
    code = (
        "import sys; from mquant.cli import app as _; from mquant.cli.app import app\n"
        f"try: app(['verify', {str(plain)!r}])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_junit_has_a_case_for_each_rule(trained: Path, tmp_path: Path) -> None:
    bad = mutated(
        trained, tmp_path, edit=without(".w1.weight_scale"), total_size=1, config={"x\x1b": "\x00"}
    )
    file = tmp_path / "verify.xml"
    assert verify(bad, "--junit", file).exit_code == 3
    suite = ElementTree.parse(file).getroot()
    cases = {case.get("name"): case for case in suite}
    verified = [rule.id for rule in RULES.values() if rule.needs in VERIFIED]
    assert set(cases) == set(verified)
    assert cases["part-missing"].find("failure") is not None
    assert cases["total-size-wrong"].find("system-out") is not None
    skipped = cases["vllm-refuses"].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "no loader was asked"
    assert len(cases["router-quantized"]) == 0
    assert suite.get("tests") == str(len(cases))
    assert suite.get("failures") == str(len(suite.findall("*/failure")))
    verify(bad, "--junit", file, "--fail-on", "warning")
    failing = ElementTree.parse(file).getroot().find("*[@name='total-size-wrong']/failure")
    assert failing is not None


def test_a_junit_file_that_cannot_be_written_is_one_sentence(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "verify.xml").mkdir()
    result = verify(plain, "--junit", tmp_path / "verify.xml")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path}/verify.xml cannot be written: Is a dir")


def test_a_run_that_fails_leaves_a_junit_error_and_not_an_older_file(tmp_path: Path) -> None:
    file = tmp_path / "verify.xml"
    assert verify(tmp_path / "other", "--junit", file).exit_code == 1
    assert verify(tmp_path / "none", "--junit", file).exit_code == 1
    suite = ElementTree.parse(file).getroot()
    (error,) = suite.findall("testcase/error")
    assert "none" in str(error.get("message"))
    assert suite.get("errors") == "1"


def test_a_wrong_command_line_removes_the_older_junit_file(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "verify.xml"
    assert verify(plain, "--junit", file).exit_code == 0
    assert verify(plain, "--revision", "v1", "--junit", file).exit_code == 2
    assert not file.exists()


def test_a_file_that_mquant_did_not_write_is_no_junit_file(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    for file in (plain / "config.json", tmp_path / "config.json"):
        before = file.read_bytes()
        result = verify(plain, "--junit", file)
        assert result.exit_code == 1
        assert "config.json exists, and mquant did not write it." in result.stderr
        assert file.read_bytes() == before


def test_an_interrupted_run_leaves_a_junit_error(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mquant.verify.judge.verify", interrupt)
    file = tmp_path / "verify.xml"
    assert verify(plain, "--junit", file).exit_code == 130
    assert len(ElementTree.parse(file).getroot().findall("testcase/error")) == 1


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A checkpoint of a model_type that nobody knows, with quantized routers."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
    config = {
        "model_type": "olmo2",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "ignore": ["lm_head", "model.embed_tokens"],
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": group},
        },
    }

    def edit(rows: list[Row]) -> list[Row]:
        edited: list[Row] = []
        for row in rows:
            if not row[0].endswith("o_proj.weight"):
                edited.append(row)
                continue
            module = row[0].removesuffix(".weight")
            edited.append(make_row(f"{module}.weight_packed", "U8", (4, 32)))
            edited.append(make_row(f"{module}.weight_scale", "F8_E4M3", (4, 4)))
            edited.append(make_row(f"{module}.weight_global_scale", "F32", (1,)))
        return edited

    return make_checkpoint(tmp_path / "strange", edit=edit, config=config)


def test_an_open_verdict_exits_with_1(strange: Path, tmp_path: Path) -> None:
    file = tmp_path / "verify.xml"
    result = verify(strange, "--depth", "structure", "--junit", file)
    assert result.exit_code == 1
    assert shown(result).startswith("Not judged: ")
    assert "Clean" not in result.stdout
    assert "Whether vLLM takes strange could not be judged: model_type 'olmo2'" in (result.stderr)
    assert "mquant verify SRC --loader vllm" in result.stderr
    suite = ElementTree.parse(file).getroot()
    assert suite.find("*[@name='router-quantized']/skipped") is not None
    assert len(suite.findall("testcase/error")) == 1
    report = document(strange, "--depth", "structure")
    assert "router-quantized" in {rule["rule"] for rule in report["not_judged"]}


def test_an_error_goes_before_an_open_verdict(strange: Path) -> None:
    (strange / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "model-00009-of-00009.safetensors"}})
    )
    assert verify(strange, "--depth", "structure").exit_code == 3


@pytest.mark.parametrize(("answer", "code"), [("loads", 0), ("refuses", 3), ("not asked", 1)])
def test_the_loader_decides_an_open_verdict(
    strange: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    import mquant.verify.loaders.ask_vllm as loader

    broken = {"refuses": loader.VLLM_REFUSES, "not asked": loader.VLLM_NOT_ASKED}
    findings = tuple(
        rule.finding("vLLM", "It stops.") for key, rule in broken.items() if key == answer
    )
    verdict = loader.Verdict("0.32.0", answer, "", findings)
    monkeypatch.setattr("mquant.verify.loaders.install.find_python", lambda _: Path("python"))
    monkeypatch.setattr("mquant.verify.judge.ask", lambda *_: verdict)
    result = verify(strange, "--depth", "structure", "--loader", "vllm")
    assert result.exit_code == code
    assert f"vLLM 0.32.0: {answer}." in shown(result)


def test_verify_ignore_does_not_pass_an_open_verdict(strange: Path) -> None:
    result = CliRunner().invoke(app, ["verify-ignore", str(strange)])
    assert result.exit_code == 1
    assert "could not be judged" in result.stderr


def test_no_card_is_written_on_an_open_verdict(strange: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    arguments = ["card", str(strange), "--depth", "structure", "-o", str(card)]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert not card.exists()


def test_a_plain_checkpoint_of_an_unknown_family_has_an_open_verdict(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", config={"model_type": "olmo2"})
    assert verify(plain).exit_code == 1


def test_the_action_in_the_docs_runs_a_command_that_exists() -> None:
    page = (Path(__file__).parents[2] / "docs/ci.md").read_text("utf-8")
    action = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    (run,) = (
        step["run"] for step in action["jobs"]["verify"]["steps"] if "mquant verify" in str(step)
    )
    options = [word for word in run.split() if word.startswith("--")]
    text = verify("--help").stdout
    assert options == ["--fail-on", "--junit"]
    assert all(option in text for option in options)
