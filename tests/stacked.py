"""Checkpoints of a family like Qwen3-MoE, with the experts of a layer in one tensor on disk."""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from judges import opened
from make import NUMPY
from mquant.checkpoint import build_header
from mquant.family import Family
from mquant.family_files import load_families, load_family
from mquant.synth import synth

EXPERTS: Final = "model.layers.{layer}.mlp.experts"
GATE, UP, DOWN = (f"{EXPERTS}.{{expert}}.{x}_proj.weight" for x in ("gate", "up", "down"))
Layout = tuple[dict[str, Any], ...]
ROWS: Final[Layout] = (
    {"name": f"{EXPERTS}.gate_up_proj", "holds": [GATE, UP]},
    {"name": f"{EXPERTS}.down_proj", "holds": [DOWN]},
)
TRANSPOSED: Final[Layout] = tuple({**stack, "transposed": True} for stack in ROWS)
INTERLEAVED: Final[Layout] = ({**ROWS[0], "interleaved": True}, ROWS[1])
BOTH: Final[Layout] = ({**TRANSPOSED[0], "interleaved": True}, TRANSPOSED[1])
APART: Final[Layout] = tuple(
    {"name": f"model.layers.{{layer}}.moe.{name}_proj.weight", "holds": [row]}
    for name, row in (("gate", GATE), ("up", UP), ("down", DOWN))
)
LAYOUTS: Final = {
    "rows": ROWS,
    "transposed": TRANSPOSED,
    "interleaved": INTERLEAVED,
    "transposed and interleaved": BOTH,
    "apart": APART,
}
BIASES: Final = [
    {
        "name": f"{EXPERTS}.{{expert}}.{name}_proj.bias",
        "role": "other",
        "block": "moe",
        "shape": [size],
    }
    for name, size in (
        ("gate", "moe_intermediate_size"),
        ("up", "moe_intermediate_size"),
        ("down", "hidden_size"),
    )
]
OF_BIASES: Final[Layout] = tuple(
    {**stack, "name": f"{stack['name']}_bias", "holds": [h[:-6] + "bias" for h in stack["holds"]]}
    for stack in BOTH
)


def family(folder: Path, stacks: Layout, **content: Any) -> Family:
    """Return a family like Qwen3-MoE, whose experts may lie in the tensors `stacks`."""
    path = folder / "stacked.yaml"
    path.write_text(yaml.safe_dump({"like": "qwen3_moe", "stacks": list(stacks), **content}))
    return load_family(path)


def of_each_expert(folder: Path, own: Family | None = None) -> Path:
    """Write a checkpoint with a tensor for each expert."""
    plain = (own or load_families()["qwen3_moe"]).model_copy(update={"stacks": ()})
    return synth(folder, plain).path


def arrays(folder: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint by name."""
    checkpoint = opened(folder)
    return {
        name: np.frombuffer(
            checkpoint.source.read(info.shard, info.start, info.end), NUMPY[info.dtype]
        ).reshape(info.shape)
        for name, info in checkpoint.tensors.items()
    }


def with_stacks(src: Path, out: Path, stacks: Layout, layers: range = range(2)) -> Path:
    """Write the checkpoint `src` with its experts, in some layers, in the tensors `stacks`."""
    tensors = arrays(src)
    for layer in layers:
        for stack in stacks:
            held = [
                [tensors.pop(name) for name in _named(hold, layer, tensors)]
                for hold in stack["holds"]
            ]
            parts = [_joined(stack, list(expert)) for expert in zip(*held, strict=True)]
            tensors[stack["name"].replace("{layer}", str(layer))] = np.stack(parts)
    return write(src, out, tensors)


def write(src: Path, out: Path, tensors: dict[str, Any]) -> Path:
    """Write tensors in one shard, with the config.json of `src`."""
    out.mkdir()
    dtypes = {dtype: name for name, dtype in NUMPY.items()}
    rows = [(name, dtypes[value.dtype], value.shape) for name, value in tensors.items()]
    header, offsets = build_header(rows)
    data = b"".join(tensors[name].tobytes() for name in sorted(offsets, key=lambda n: offsets[n]))
    (out / "model.safetensors").write_bytes(header + data)
    (out / "config.json").write_text(json.dumps(json.loads((src / "config.json").read_bytes())))
    return out


def _named(hold: str, layer: int, tensors: dict[str, Any]) -> list[str]:
    names = (hold.format(layer=layer, expert=expert) for expert in range(999))
    return [name for name in names if name in tensors]


def _joined(stack: dict[str, Any], parts: list[Any]) -> Any:
    if stack.get("interleaved"):
        joined = np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    else:
        joined = np.concatenate(parts)
    return joined.T if stack.get("transposed") else joined
