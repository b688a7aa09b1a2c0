"""`mquant plan` shows the output of a run, its disk and memory, and why a run is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from make import make_checkpoint, without
from mquant.checkpoint import Folder, open_checkpoint
from mquant.cli.app import app
from mquant.family_files import load_families
from mquant.plan import make_plan
from mquant.recipe import find_recipe
from mquant.runs import forecast
from mquant.runs.forecast import Resources, memory_available, memory_needed

LLMCOMPRESSOR = """\
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      targets: [Linear]
      scheme: NVFP4A16
      ignore: [lm_head]
"""
ROUTER_MESSAGE = (
    "Recipe reap would quantize 2 routers (model.layers.0.block_sparse_moe.gate, "
    "model.layers.1.block_sparse_moe.gate); vLLM 0.32 refuses such a checkpoint."
)


def plan(src: Path, *arguments: str, recipe: str | Path = "nvfp4") -> Result:
    return CliRunner().invoke(app, ["plan", str(src), "--recipe", str(recipe), *arguments])


def document(result: Result) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(result.stdout)
    assert value["schema"] == "mquant.plan/1"
    return value


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def reap(tmp_path: Path) -> Path:
    """The first recipe of this project, which ignores lm_head only."""
    path = tmp_path / "reap.yaml"
    path.write_text(LLMCOMPRESSOR)
    return path


# --- a good plan


def test_totals(model: Path) -> None:
    result = plan(model, "--format", "json")
    assert result.exit_code == 0
    report = document(result)
    assert report["ok"] is True
    assert report["totals"]["source"] == {"tensors": 47, "bytes": 166_944}
    output = report["totals"]["output"]
    assert (output["tensors"], output["shards"]) == (47 + 2 * 32, 1)
    assert output["bytes"] == sum(role["bytes_after"] for role in report["roles"])
    assert output["file_bytes"] == sum(shard["bytes"] for shard in report["shards"])


def test_every_role_has_a_scheme_or_a_reason_to_stay(model: Path) -> None:
    roles = document(plan(model, "--format", "json"))["roles"]
    kept = {role["role"]: role["reason"] for role in roles if role["scheme"] is None}
    assert {role["role"]: role["scheme"] for role in roles if role["scheme"]} == {
        "expert": "NVFP4A16",
        "attention": "NVFP4A16",
    }
    assert kept == {
        "router": "loaders may refuse a quantized router",
        "routing_bias": "not a weight; it steers the routing",
        "embedding": "loaders may refuse quantized embeddings",
        "head": "loaders may refuse a quantized lm_head",
        "norm": "norms are vectors",
    }


def test_a_role_in_numbers(model: Path) -> None:
    roles = {role["role"]: role for role in document(plan(model, "--format", "json"))["roles"]}
    expert = roles["expert"]
    # Half a byte a weight, one byte for 16 of them, four bytes for each of 24 matrices.
    weights = expert["bytes_before"] // 2
    assert expert["bytes_after"] == weights // 2 + weights // 16 + 4 * 24
    assert expert["bits_per_weight"] == round(expert["bytes_after"] * 8 / weights, 4)
    assert (roles["router"]["tensors"], roles["router"]["bits_per_weight"]) == (2, 32)


def test_the_ignore_list_is_the_one_that_will_be_written(model: Path) -> None:
    assert document(plan(model, "--format", "json"))["ignore"] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.1.block_sparse_moe.gate",
    ]


def test_shards_are_named_and_sized(model: Path) -> None:
    report = document(plan(model, "--format", "json", "--max-shard-size", "20kB"))
    names = [shard["name"] for shard in report["shards"]]
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) == report["totals"]["output"]["shards"] > 2
    assert sum(shard["tensors"] for shard in report["shards"]) == 47 + 2 * 32


def test_a_person_sees_the_plan_within_80_columns(model: Path) -> None:
    result = plan(model, "-o", "out")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0] == "model  family minimax_m2, recipe nvfp4"
    assert "Source  47 tensors, 166.9 kB (163.03 KiB)" in lines
    assert "Ignore  lm_head" in lines
    assert "        model.layers.{0..1}.block_sparse_moe.gate (2)" in lines
    assert [line for line in lines if line.startswith("Disk") and line.endswith("free for out")]
    assert [line for line in lines if line.startswith("Memory")]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("columns", ["20", "40"])
def test_a_narrow_terminal_cuts_no_number_off(
    model: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = plan(model).stdout.splitlines()
    assert "…" not in "".join(lines)
    assert [line.split()[-1] for line in lines if line.startswith("expert")] == ["NVFP4A16"]


def test_many_shards_are_shortened(model: Path) -> None:
    lines = plan(model, "--max-shard-size", "4kB").stdout.splitlines()
    shards = [line for line in lines if ".safetensors" in line or "more ..." in line]
    assert len(shards) == 5


def test_a_plan_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan(model, "-o", str(tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_quiet_prints_nothing(model: Path) -> None:
    result = plan(model, "--format", "quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_a_plan_loads_no_torch(model: Path) -> None:
    code = (
        "import sys; from mquant.cli import main\n"
        f"sys.argv = ['mquant', 'plan', {str(model)!r}, '--recipe', 'nvfp4', '--format', 'quiet']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print(sorted({'torch', 'transformers', 'llmcompressor'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- refused


def test_a_recipe_that_would_quantize_the_routers_is_refused(model: Path, reap: Path) -> None:
    result = plan(model, recipe=reap)
    assert result.exit_code == 1
    fix = (
        "Use ignore: [lm_head, model.embed_tokens, "
        r"'re:model\.layers\.\d+\.block_sparse_moe\.gate$'] (or --allow-unsafe to do so anyway)."
    )
    assert result.stderr == f"Refused: {ROUTER_MESSAGE}\n{fix}\n"
    assert f"✗ {ROUTER_MESSAGE}\n  {fix}\n" in result.stdout


def test_a_refused_plan_is_shown_whole(model: Path, reap: Path) -> None:
    result = plan(model, "--format", "json", recipe=reap)
    report = document(result)
    assert (result.exit_code, report["ok"]) == (1, False)
    assert [finding["rule"] for finding in report["findings"]] == ["router-quantized"]
    assert report["error"]["message"] == f"Refused: {ROUTER_MESSAGE}"
    assert {"totals", "roles", "ignore", "shards", "resources"} <= report.keys()
    assert {r["role"]: r["scheme"] for r in report["roles"]}["router"] == "NVFP4A16"


def test_allow_unsafe_turns_a_refusal_into_a_warning(model: Path, reap: Path) -> None:
    result = plan(model, "--allow-unsafe", recipe=reap)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"! {ROUTER_MESSAGE}" in result.stdout


def test_the_advised_ignore_list_is_accepted(model: Path, reap: Path) -> None:
    fix = document(plan(model, "--format", "json", recipe=reap))["error"]["fix"]
    ignore = fix.removeprefix("Use ignore: ").partition(" (or")[0]
    reap.write_text(LLMCOMPRESSOR.replace("[lm_head]", ignore))
    assert plan(model, recipe=reap).exit_code == 0


def test_a_shape_that_16_does_not_divide_is_shown_as_such(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", intermediate=24)
    result = plan(model, "--format", "json")
    assert result.exit_code == 1
    misfits = [role for role in document(result)["roles"] if role["bits_per_weight"] is None]
    assert [(role["role"], role["tensors"], role["reason"]) for role in misfits] == [
        ("expert", 8, "its shape or dtype does not fit")
    ]
    assert "NVFP4A16: its shape or dtype" in plan(model).stdout


def test_an_unknown_family_has_no_plan_but_findings(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", config={"model_type": "gpt2"})
    result = plan(model, "--format", "json")
    report = document(result)
    assert result.exit_code == 1
    assert [finding["rule"] for finding in report["findings"]] == ["family-unknown"]


def test_every_problem_of_a_broken_checkpoint_is_shown(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", edit=without("w3.weight", "lm_head"))
    rules = {f["rule"] for f in document(plan(model, "--format", "json"))["findings"]}
    assert {"fused-set-incomplete", "tensor-missing"} <= rules


# --- usage


def test_without_recipe_there_is_an_example(model: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(model)])
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: --recipe is missing.\n"
        "Example: mquant plan MiniMaxAI/MiniMax-M2 --recipe nvfp4  (mquant recipes lists them)\n",
    )


def test_a_wrong_shard_size_is_a_usage_error(model: Path) -> None:
    result = plan(model, "--max-shard-size", "5 apples")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: '5 apples' is no size.\n")


def test_an_unknown_recipe_is_a_usage_error(model: Path) -> None:
    result = plan(model, recipe="nvfp5")
    assert result.exit_code == 2
    assert "There is no recipe 'nvfp5'" in result.stderr


# --- disk, memory and data


def test_too_little_disk_and_memory_are_warnings(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Resources(
        Path("out"),
        disk_needed=75_000,
        disk_available=10,
        memory_needed=10**10,
        memory_available=10**9,
    )
    monkeypatch.setattr(forecast, "forecast", lambda plan, out: small)
    result = plan(model, "-o", "out")
    assert result.exit_code == 0
    assert "! out needs 75.00 kB, 10 B are free there.\n" in result.stdout
    assert "! A run takes about 10.00 GB of memory, 1.00 GB are free.\n" in result.stdout


def test_an_out_that_mquant_did_not_write_is_a_warning(model: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    result = plan(model, "-o", str(tmp_path / "theirs"), "--format", "json")
    assert result.exit_code == 0
    assert [(f["rule"], f["severity"]) for f in document(result)["findings"]] == [
        ("out-not-free", "warning")
    ]


def test_memory_follows_the_widest_job_not_the_model(tmp_path: Path) -> None:
    def needed(layers: int) -> int:
        model = make_checkpoint(tmp_path / str(layers), layers=layers)
        checkpoint = open_checkpoint(Folder(model))
        return memory_needed(make_plan(checkpoint, find_recipe("nvfp4"), load_families()))

    assert needed(1) == needed(3)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_000_000 * 1024),
        ({"cgroup/memory.max": "max\n"}, 8_000_000 * 1024),
        ({"cgroup/memory.max": "4096\n"}, 4096),
        ({"cgroup/a/memory.max": "8192\n", "cgroup/a/b/memory.max": "max\n"}, 8192),
        ({"cgroup/memory/a/b/memory.limit_in_bytes": "2048\n"}, 2048),
    ],
)
def test_free_memory_is_the_least_of_machine_and_control_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    version_1 = any("/memory/" in name for name in files)
    entry = "7:memory:/a/b\n" if version_1 else "0::/a/b\n"
    meminfo = "MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n"
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": entry, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_available(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_free_memory_is_known_without_proc(tmp_path: Path) -> None:
    assert memory_available(tmp_path, tmp_path) > 0


def test_the_plan_says_that_a_recipe_needs_data(model: Path) -> None:
    result = plan(model, recipe="nvfp4-w4a4")
    assert result.exit_code == 0
    assert "Data    256 samples of 2,048 tokens at most, from --data\n" in result.stdout
    limits = {"samples": 256, "length": 2048, "seed": 0}
    assert document(plan(model, "--format", "json", recipe="nvfp4-w4a4"))["calibration"] == limits
    assert document(plan(model, "--format", "json"))["calibration"] is None


def test_a_dry_run_shows_the_plan_and_refuses_without_data(model: Path) -> None:
    arguments = ["quantize", str(model), "--recipe", "nvfp4-w4a4", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "256 samples of 2,048 tokens at most, from --data" in result.stdout
    sentence = "Error: Recipe nvfp4-w4a4 needs calibration data, which --data names.\n"
    assert result.stderr.startswith(sentence)
    assert CliRunner().invoke(app, [*arguments, "--data", "texts.txt"]).exit_code == 0
