"""A synthetic checkpoint has its family's tensors and config, and other libraries load it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mquant.family import Family
from mquant.family_files import load_families
from mquant.family_rows import Role
from mquant.plan import survey
from mquant.synth import Sizes, Synthetic, synth
from synthetic import family, numbers, opened, tiny

__all__ = ["family", "tiny"]

GOLDEN = Path(__file__).parent / "data/minimax-m2.7-reap-154.tensors.tsv.gz"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, family: Family) -> Path:
    """Return a checkpoint with the real model's shapes, whose data are holes."""
    path = tmp_path_factory.mktemp("synth") / "full"
    synthetic = synth(path, family, sizes=Sizes(layers=62, experts=154), shapes_only=True)
    assert synthetic == Synthetic(path, 29_267, 139_149_203_788, 278_357_089_584, synthetic.shards)
    return path


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
from mquant.family_files import load_families
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
