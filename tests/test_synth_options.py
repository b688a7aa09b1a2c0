"""The seed, the sizes and the precision determine a synthetic checkpoint."""

from pathlib import Path

import numpy as np
import pytest

from family_cases import DEEP
from mquant.errors import UsageError
from mquant.events import Event, Note
from mquant.family import Family
from mquant.family_files import load_families
from mquant.loader_model.modules import read_modules
from mquant.plan import survey
from mquant.synth import Precision, Sizes, synth
from synthetic import content, family, numbers, opened, tiny

__all__ = ["family", "tiny"]


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


@pytest.mark.parametrize("name", DEEP)
def test_a_tiny_checkpoint_in_fp8_blocks_is_one_that_vllm_loads(tmp_path: Path, name: str) -> None:
    synth(tmp_path / "out", load_families()[name], precision=Precision.FP8_BLOCK)
    assert read_modules(opened(tmp_path / "out"), load_families()).outcome.loads


def test_sizes_that_cut_a_block_are_a_warning(tmp_path: Path, family: Family) -> None:
    notes: list[Event] = []
    synth(
        tmp_path / "out",
        family,
        sizes=Sizes(intermediate=192),
        precision=Precision.FP8_BLOCK,
        emit=notes.append,
    )
    (note,) = [note for note in notes if isinstance(note, Note)]
    assert note.message.startswith("vLLM 0.32 refuses this checkpoint: ")
