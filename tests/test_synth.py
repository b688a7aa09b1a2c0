"""A synthetic checkpoint has its family's tensors and config, and other libraries load it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from mquant.checkpoint import Checkpoint, Folder, open_checkpoint
from mquant.errors import OutputError, UsageError
from mquant.events import Event, Progress
from mquant.family import Family, Role, load_families
from mquant.plan import survey
from mquant.synth import Precision, Sizes, Synthetic, synth

GOLDEN = Path(__file__).parent / "data/minimax-m2.7-reap-154.tensors.tsv.gz"


@pytest.fixture(scope="module")
def family() -> Family:
    return load_families()["minimax_m2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, family: Family) -> Path:
    path = tmp_path_factory.mktemp("synth") / "tiny"
    synth(path, family)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, family: Family) -> Path:
    """Return a checkpoint with the real model's shapes, whose data are holes."""
    path = tmp_path_factory.mktemp("synth") / "full"
    synthetic = synth(path, family, sizes=Sizes(layers=62, experts=154), shapes_only=True)
    assert synthetic == Synthetic(path, 29_267, 139_149_203_788, 278_357_089_584, synthetic.shards)
    return path


def opened(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(Folder(path))
    assert checkpoint.findings == ()
    return checkpoint


def numbers(path: Path, name: str) -> "np.ndarray[Any, np.dtype[Any]]":
    """Return a tensor's values, read with mquant's own headers."""
    dtypes = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    dtypes["F8_E4M3"] = ml_dtypes.float8_e4m3fn
    checkpoint = opened(path)
    info = checkpoint.tensors[name]
    raw = checkpoint.source.read(info.shard, info.start, info.end)
    return np.frombuffer(raw, dtypes[info.dtype]).reshape(info.shape).astype(np.float32)


def content(path: Path) -> dict[str, bytes]:
    folder = Folder(path)
    return {name: folder.read(name) for name in folder.files}


def test_real_shapes_match_the_golden_listing(full: Path) -> None:
    lines = gzip.decompress(GOLDEN.read_bytes()).decode().splitlines()
    golden = [tuple(line.split("\t")) for line in lines if not line.startswith("#")]
    checkpoint = opened(full)
    rows = [
        (info.name, info.dtype, "x".join(map(str, info.shape)))
        for info in checkpoint.tensors.values()
    ]
    assert len(golden) == 29_267
    assert sorted(rows) == sorted(golden)
    assert checkpoint.parameters == 139_149_203_788
    assert checkpoint.nbytes == 278_357_089_584


def test_real_shapes_take_no_disk(full: Path) -> None:
    files = [path.stat() for path in full.iterdir()]
    assert sum(file.st_size for file in files) > 278_000_000_000
    assert sum(file.st_blocks * 512 for file in files) < 20_000_000
    assert all(file.st_size < 5_100_000_000 for file in files)


def test_real_shapes_plan_in_a_gigabyte_of_memory(full: Path) -> None:
    code = """
import json, sys
from pathlib import Path
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family import load_families
from mquant.plan import make_plan
from mquant.recipe import find_recipe
plan = make_plan(
    open_checkpoint(Folder(Path(sys.argv[1]))), find_recipe("nvfp4"), load_families()
)
assert plan.findings == (), plan.findings
print(json.dumps({
    "tensors": sum(shard.tensors for shard in plan.shards),
    "bytes": plan.output_bytes,
    # Not ru_maxrss: a child process starts with the ru_maxrss of its parent.
    "memory": int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024,
}))
"""
    command = [sys.executable, "-c", code, str(full)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    facts = json.loads(process.stdout)
    assert facts["tensors"] == 87_051
    assert facts["bytes"] == 80_140_558_496
    assert facts["memory"] < 1_000_000_000


def test_config_is_the_real_models(full: Path, tiny: Path, family: Family) -> None:
    config = opened(full).config
    assert config.pop("attn_type_list") == [1] * 62
    assert config == family.synth.config
    assert opened(tiny).config.keys() == {"attn_type_list", *family.synth.config}
    assert opened(tiny).config["attn_type_list"] == [1] * 2


def test_the_tiny_checkpoint_is_whole_and_small(tiny: Path) -> None:
    checkpoint = opened(tiny)
    result = survey(checkpoint, load_families())
    assert (result.layers, result.experts, result.findings) == (2, 8, ())
    assert checkpoint.nbytes < 2_000_000
    assert {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(checkpoint.side_files)
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.nbytes
    assert list(index["weight_map"]) == sorted(checkpoint.tensors)


def test_safetensors_opens_every_file(tiny: Path) -> None:
    names = set()
    for path in tiny.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            names |= set(file.keys())
            assert file.metadata() == {"format": "pt"}
    assert names == opened(tiny).tensors.keys()


def test_values_are_plausible(tiny: Path) -> None:
    family = load_families()["minimax_m2"]
    for name, info in opened(tiny).tensors.items():
        meaning = family.classify(name)
        assert meaning
        values = numbers(tiny, name)
        assert np.isfinite(values).all()
        mean, std = (1, 0.05) if meaning.row.role is Role.NORM else (0, 0.02)
        assert abs(values.mean() - mean) < 6 * std / info.elements**0.5
        assert 0.3 * std < values.std() < 2 * std
    one, other = (
        numbers(tiny, f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight")
        for expert in (0, 1)
    )
    assert not (one == other).all()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, tiny: Path, family: Family) -> None:
    synth(tmp_path / "again", family)
    assert content(tmp_path / "again") == content(tiny)
    synth(tmp_path / "other", family, seed=1)
    other = content(tmp_path / "other")
    differ = {name for name, raw in content(tiny).items() if raw != other[name]}
    assert differ == {"model-00001-of-00001.safetensors"}


def test_a_value_depends_on_seed_and_name_alone(tmp_path: Path, tiny: Path, family: Family) -> None:
    synth(tmp_path / "out", family, sizes=Sizes(layers=3), max_shard_bytes=100_000)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (numbers(tmp_path / "out", name) == numbers(tiny, name)).all()


def test_shards_are_filled_in_the_family_s_order(tmp_path: Path, family: Family) -> None:
    synth(tmp_path / "out", family, max_shard_bytes=100_000)
    checkpoint = opened(tmp_path / "out")
    assert len(checkpoint.shards) > 5
    total = f"{len(checkpoint.shards):05d}"
    assert checkpoint.shards[0] == f"model-00001-of-{total}.safetensors"
    shard_bytes = dict.fromkeys(checkpoint.shards, 0)
    for info in checkpoint.tensors.values():
        shard_bytes[info.shard] += info.nbytes
    assert max(shard_bytes.values()) <= 100_000
    # Shards ignore fused sets: some fused sets are cut, as in real releases.
    experts = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    assert any(
        checkpoint.tensors[experts.format(layer, expert, "w1")].shard
        != checkpoint.tensors[experts.format(layer, expert, "w3")].shard
        for layer in range(2)
        for expert in range(8)
    )


@pytest.mark.parametrize(
    ("precision", "stored", "declared"),
    [
        (Precision.BF16, "BF16", "bfloat16"),
        (Precision.FP16, "F16", "float16"),
        (Precision.FP32, "F32", "float32"),
    ],
)
def test_the_precision_sets_the_dtypes(
    tmp_path: Path, family: Family, precision: Precision, stored: str, declared: str
) -> None:
    synth(tmp_path / "out", family, precision=precision)
    checkpoint = opened(tmp_path / "out")
    assert checkpoint.config["torch_dtype"] == declared
    for name, info in checkpoint.tensors.items():
        exact = name.endswith((".gate.weight", "e_score_correction_bias"))
        assert info.dtype == ("F32" if exact else stored)


def test_fp8_block_stores_attention_and_experts_in_fp8(tmp_path: Path, family: Family) -> None:
    sizes = Sizes(hidden=320, intermediate=192)
    synth(tmp_path / "out", family, sizes=sizes, precision=Precision.FP8_BLOCK)
    checkpoint = opened(tmp_path / "out")
    assert checkpoint.config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
    assert checkpoint.config["torch_dtype"] == "bfloat16"
    dtypes: dict[str, set[str]] = {}
    for name, info in checkpoint.tensors.items():
        meaning = family.classify(name)
        if name.endswith(".weight_scale_inv"):
            weight = checkpoint.tensors[name.removesuffix("_scale_inv")]
            assert weight.dtype == "F8_E4M3"
            assert info.dtype == "F32"
            assert info.shape == tuple(-(-size // 128) for size in weight.shape)
        else:
            assert meaning
            dtypes.setdefault(meaning.row.role, set()).add(info.dtype)
    assert dtypes == {
        "embedding": {"BF16"},
        "norm": {"BF16"},
        "attention": {"F8_E4M3"},
        "router": {"F32"},
        "routing_bias": {"F32"},
        "expert": {"F8_E4M3"},
        "head": {"BF16"},
    }
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    codes, scales = numbers(tmp_path / "out", name), numbers(tmp_path / "out", f"{name}_scale_inv")
    assert codes.shape == (320, 192)
    assert scales.shape == (3, 2)
    values = codes * np.kron(scales, np.ones((128, 128), np.float32))[:320, :192]
    assert 0.018 < values.std() < 0.022
    assert np.abs(codes).max() > 300


def test_fp8_block_of_the_unpruned_release_has_its_tensors(tmp_path: Path, family: Family) -> None:
    synthetic = synth(
        tmp_path / "out",
        family,
        sizes=Sizes(experts=256),
        precision=Precision.FP8_BLOCK,
        shapes_only=True,
    )
    assert synthetic.tensors == 96_103


def test_sizes_are_kept_and_consistent(tmp_path: Path, family: Family) -> None:
    sizes = Sizes(layers=3, experts=1, hidden=96, intermediate=48, vocab=100)
    synth(tmp_path / "out", family, sizes=sizes)
    checkpoint = opened(tmp_path / "out")
    config = checkpoint.config
    assert config["num_experts_per_tok"] == 1
    assert len(config["attn_type_list"]) == 3
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (100, 96)
    assert survey(checkpoint, load_families()).findings == ()
    # A tokenizer needs 256 ids for the bytes, and the vocabulary has 100.
    assert checkpoint.side_files == ("generation_config.json",)


def test_impossible_sizes_are_refused(tmp_path: Path, family: Family) -> None:
    with pytest.raises(UsageError, match="--layers is 0"):
        synth(tmp_path / "out", family, sizes=Sizes(layers=0))
    dense = family.model_copy(
        update={"config": family.config.model_copy(update={"experts": "", "top_k": ""})}
    )
    with pytest.raises(UsageError, match="MiniMax-M2 has no experts"):
        synth(tmp_path / "out", dense, sizes=Sizes(experts=4))
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_not_empty_is_refused(tmp_path: Path, family: Family) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty") as caught:
        synth(tmp_path, family)
    assert caught.value.exit_code == 1
    assert "Give another folder" in caught.value.fix
    with pytest.raises(OutputError, match="is a file"):
        synth(tmp_path / "mine.txt", family)
    with pytest.raises(OutputError, match="cannot be written"):
        synth(tmp_path / "mine.txt" / "out", family)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_little_disk_is_refused_before_a_byte_is_written(
    tmp_path: Path, family: Family
) -> None:
    with pytest.raises(OutputError, match="are free there"):
        synth(tmp_path / "out", family, sizes=Sizes(vocab=10**13))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existed", [True, False])
def test_a_run_that_fails_leaves_no_file(tmp_path: Path, family: Family, existed: bool) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done > event.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(out, family, max_shard_bytes=100_000, emit=stop)
    assert out.exists() == existed
    assert not existed or not any(out.iterdir())


def test_an_empty_folder_is_accepted_and_progress_adds_up(tmp_path: Path, family: Family) -> None:
    events: list[Event] = []
    synthetic = synth(tmp_path, family, emit=events.append)
    assert events[-1] == Progress("synth", synthetic.nbytes, synthetic.nbytes)
    assert opened(tmp_path).nbytes == synthetic.nbytes


def test_large_tensors_take_little_memory(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from mquant.family import load_families
from mquant.synth import Sizes, synth
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

before = peak()
result = synth(Path(sys.argv[1]), load_families()["minimax_m2"], sizes=Sizes(layers=1, vocab=10**6))
print(result.nbytes, peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    size, memory = map(int, process.stdout.split())
    assert size > 500_000_000
    assert memory < 50_000_000


def test_the_command_line_reports_the_checkpoint_or_an_error(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "mquant", "synth", *arguments, "--format", "json"]
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        return process.returncode, json.loads(process.stdout)

    options = ("out", "--family", "minimax_m2", "--layers", "3", "--experts", "10", "--shapes-only")
    assert run(*options, "--dtype", "fp16", "--max-shard-size", "1GB") == (
        0,
        {
            "schema": "mquant.synth/1",
            "ok": True,
            "findings": [],
            "path": "out",
            "tensors": 3 + 3 * (10 + 30),
            "bytes": (checkpoint := opened(tmp_path / "out")).nbytes,
            "parameters": checkpoint.parameters,
            "shards": len(checkpoint.shards),
        },
    )
    assert checkpoint.config["hidden_size"] == 3072
    again, envelope = run(*options)
    assert again == 1
    assert envelope["error"]["message"] == "out is not empty."
    for misuse in (("--family", "minimax_m2"), ("new",), ("new", "--family", "gpt2")):
        code, envelope = run(*misuse)
        assert code == 2
        assert "mquant synth OUT --family minimax_m2" in envelope["error"]["fix"]


@pytest.mark.upstream
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_loads_the_tiny_checkpoint_whole(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = "def f(x): return x  # \u00e4\u4e2d\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), 256)
    assert torch.isfinite(logits).all()
