"""Upstream's own tools as judges of mquant's files, and helpers that compare checkpoints."""

import hashlib
import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from mquant.checkpoint import Folder, open_checkpoint
from mquant.checkpoint.checkpoint import Checkpoint

IGNORE = ["lm_head", "model.embed_tokens", r"re:.*block_sparse_moe\.gate$", r"re:.*norm$"]


def model_free_ptq(
    src: Path, out: Path, ignore: list[str] | None = None, scheme: str = "NVFP4A16"
) -> Path:
    """Quantize with llmcompressor's model_free_ptq."""
    from llmcompressor import model_free_ptq as upstream

    upstream(str(src), str(out), scheme=scheme, ignore=ignore or IGNORE, device="cpu")
    return out


def oneshot_and_save(src: Path, out: Path) -> Path:
    """Quantize as users do: load with transformers, call `oneshot`, then `save_pretrained`."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(src, dtype="auto")
    recipe = QuantizationModifier(
        targets="Linear", scheme="NVFP4A16", ignore=["lm_head", r"re:.*block_sparse_moe\.gate$"]
    )
    oneshot(model=model, recipe=recipe, processor=object())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # save_pretrained warns of memory
        model.save_pretrained(out, save_compressed=True)
    return out


def one_shard(src: Path, out: Path) -> Path:
    """Write a checkpoint as one shard: model_free_ptq rejects some legal cuts between shards."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    tensors: dict[str, Any] = {}
    for shard in sorted(src.glob("*.safetensors")):
        tensors |= load_file(shard)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((src / "config.json").read_bytes())
    return out


def converted_by(converter: Any, src: Path, out: Path) -> Path:
    """Write all tensors as a converter of compressed-tensors returns them, with an empty config."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for shard in sorted(src.glob("*.safetensors")):
        tensors |= load_file(shard)
    converted = {name: tensor.contiguous() for name, tensor in converter.process(tensors).items()}
    out.mkdir()
    save_file(converted, out / "model.safetensors")
    (out / "config.json").write_text("{}", encoding="utf-8")
    return out


def opened(path: Path) -> Checkpoint:
    """Open a checkpoint folder and read its headers."""
    return open_checkpoint(Folder(path))


def data(checkpoint: Checkpoint, name: str) -> bytes:
    """Return the bytes of one tensor."""
    tensor = checkpoint.tensors[name]
    return checkpoint.source.read(tensor.shard, tensor.start, tensor.end)


def hashes(folder: Path) -> dict[str, str]:
    """Return path in the folder -> sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def held(folder: Path) -> int:
    """Return the bytes of all files in a folder, while a run writes; reserved bytes count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # the run has just deleted the file
                total += Path(parent, name).stat().st_size
    return total


def largest(folder: Path) -> int:
    """Return the bytes of the largest shard in a folder."""
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def differences(left: Path, right: Path, names: set[str]) -> list[str]:
    """Return those of `names` whose dtype, shape or bytes differ between two folders."""
    a, b = opened(left), opened(right)
    return [
        name
        for name in sorted(names)
        if name not in a.tensors
        or name not in b.tensors
        or (a.tensors[name].dtype, a.tensors[name].shape)
        != (b.tensors[name].dtype, b.tensors[name].shape)
        or data(a, name) != data(b, name)
    ]


def quantized_names(folder: Path) -> set[str]:
    """Return the names of the tensors that only a quantized module has."""
    suffixes = (".weight_packed", ".weight_scale", ".weight_global_scale")
    return {name for name in opened(folder).tensors if name.endswith(suffixes)}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
