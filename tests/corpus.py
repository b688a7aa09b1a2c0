"""Cases that break or harmlessly vary a good checkpoint, and the rules that `verify` must report.

`rules` holds errors and warnings. `silent` is the reason why a checkpoint is wrong that vLLM does
not refuse: the checkpoint loads without an error and computes other values, which headers do not
show, or vLLM's CPU build cannot be asked.
"""

import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Final

import numpy as np

import schemes
from judges import opened, read_json
from make import Edit, Row, renamed, without, write_index, write_shard
from mquant.checkpoint import INDEX_NAME
from mutate import changed, mutated, scalar, setting

EXPERT: Final = "model.layers.1.block_sparse_moe.experts.3."
ATTENTION: Final = "model.layers.1.self_attn."
GATE: Final = "model.layers.0.block_sparse_moe.gate."
GLOBAL: Final = "weight_global_scale"


@dataclass(frozen=True)
class Case:
    """One checkpoint: its differences from the good checkpoint."""

    name: str
    rules: frozenset[str] = frozenset()
    edit: Edit | None = None
    config: Mapping[str, Any] | Callable[[dict[str, Any]], object] | None = None
    index: Callable[[dict[str, str]], dict[str, str] | None] | None = None
    total_size: int | None = None
    files: Callable[[Path], object] | None = None
    silent: str = ""

    def is_wrong(self, verdict: str) -> bool:
        """Return whether `verify` must find an error if `verdict` is vLLM's verdict."""
        return verdict not in ("loads", "not asked") or bool(self.silent)

    def make(self, good: Path, folder: Path) -> Path:
        """Write the checkpoint into `folder`, and return its path."""
        config = self.config
        if callable(config):
            before = read_json(good / "config.json")
            table = deepcopy(before)
            config(table)
            config = {**dict.fromkeys(before.keys() - table.keys(), ...), **table}
        bad = mutated(
            good,
            folder,
            edit=self.edit,
            config=config,
            index=self.index,
            total_size=self.total_size,
        )
        if self.files is not None:
            self.files(bad)
        return bad


def _without(*ends: str) -> Edit:
    """Return an edit that drops the tensors whose names end with one of `ends`."""
    return lambda rows: [r for r in rows if not any(r[0].endswith(e) for e in ends)]


def _renamed(*pairs: tuple[str, str]) -> Edit:
    return lambda rows: reduce(lambda old, pair: renamed(old, *pair), pairs, rows)


def _plus(*rows: Row) -> Edit:
    return lambda old: [*old, *rows]


def _row(name: str, dtype: str, shape: tuple[int, ...], value: int = 0) -> Row:
    size = {"F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1}[dtype]
    return name, dtype, shape, bytes([value]) * (int(np.prod(shape)) * size)


def _quantized(*modules: str) -> Edit:
    """Return an edit that gives plain modules the tensors of quantized ones (the origin bug)."""

    def edit(rows: list[Row]) -> list[Row]:
        result: list[Row] = []
        for name, dtype, shape, raw in rows:
            module = name.removesuffix(".weight")
            if not any(module.endswith(end) for end in modules):
                result.append((name, dtype, shape, raw))
                continue
            out, wide = shape
            result += [
                _row(f"{module}.weight_packed", "U8", (out, wide // 2), 0x22),
                _row(f"{module}.weight_scale", "F8_E4M3", (out, wide // 16), 0x38),
                (f"{module}.{GLOBAL}", "F32", (1,), np.float32(2688).tobytes()),
            ]
        return result

    return edit


def _then(*edits: Edit) -> Edit:
    return lambda rows: reduce(lambda old, edit: edit(old) or old, edits, rows)


def _copied(part: str, new: str) -> Edit:
    def edit(rows: list[Row]) -> list[Row]:
        return [*rows, *((r[0].replace(part, new), *r[1:]) for r in rows if part in r[0])]

    return edit


def _mapped(end: str, change: Callable[[bytes], bytes]) -> Edit:
    def edit(rows: list[Row]) -> list[Row]:
        return [(n, d, s, change(raw) if n.endswith(end) else raw) for n, d, s, raw in rows]

    return edit


def _reciprocal(raw: bytes) -> bytes:
    return (1 / np.frombuffer(raw, "<f4")).astype("<f4").tobytes()


def _quant(**keys: Any) -> Callable[[dict[str, Any]], None]:
    """Change keys of quantization_config; `...` removes a key."""

    def change(config: dict[str, Any]) -> None:
        table = config["quantization_config"]
        table.update(keys)
        for key in [key for key, value in table.items() if value is ...]:
            del table[key]

    return change


def _both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], object]:
    return lambda config: [change(config) for change in changes]


def _group(**keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        (group,) = config["quantization_config"]["config_groups"].values()
        group.update(keys)

    return change


def _weights(**keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["weights"].update(keys)

    return change


def _ignoring(*entries: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] += entries

    return change


def _plus_one(key: str, more: int = 1) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config[key] += more

    return change


def _cast(name: str) -> Edit:
    """Return an edit that stores a BF16 tensor as F32, or an F32 tensor as BF16."""

    def edit(rows: list[Row]) -> list[Row]:
        result: list[Row] = []
        for n, dtype, shape, raw in rows:
            if n != name:
                result.append((n, dtype, shape, raw))
            elif dtype == "BF16":
                wide = np.frombuffer(raw, "<u2").astype("<u4") << 16
                result.append((n, "F32", shape, wide.tobytes()))
            else:
                top = (np.frombuffer(raw, "<u4") >> 16).astype("<u2")
                result.append((n, "BF16", shape, top.tobytes()))
        return result

    return edit


def _resized(name: str, resize: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Edit:
    """Return an edit that gives a tensor another shape, and cuts or repeats its bytes."""

    def edit(rows: list[Row]) -> list[Row]:
        result = []
        for n, dtype, shape, raw in rows:
            if n == name:
                fresh = resize(shape)
                nbytes = len(raw) * int(np.prod(fresh)) // int(np.prod(shape))
                result.append((n, dtype, fresh, (raw * (nbytes // len(raw) + 1))[:nbytes]))
            else:
                result.append((n, dtype, shape, raw))
        return result

    return edit


def _one_expert_plain(rows: list[Row]) -> list[Row]:
    kept = [r for r in rows if EXPERT not in r[0]]
    shapes = {w: next(r[2] for r in rows if r[0] == f"{EXPERT}{w}.weight_packed") for w in _W}
    return kept + [_row(f"{EXPERT}{w}.weight", "BF16", (o, i * 2)) for w, (o, i) in shapes.items()]


_W: Final = ("w1", "w2", "w3")
_NAN: Final = "NaN spreads through all that is computed from it"
_INPUTS: Final = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": "local"}  # fmt: skip


def _case(name: str, *rules: str, **how: Any) -> Case:
    return Case(name, frozenset(rules), **how)


def _last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def _truncate(folder: Path) -> None:
    shard = _last_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-64])


def _duplicate(folder: Path) -> None:
    shutil.copy(_last_shard(folder), folder / "model-extra.safetensors")


def _twice(folder: Path) -> None:
    """Store the last norm in a second shard of the index, too, with other values."""
    table = read_json(folder / INDEX_NAME)["weight_map"]
    extra = "model-99999-of-99999.safetensors"
    norm = opened(folder).tensors["model.norm.weight"]
    write_shard(folder / extra, [_row(norm.name, "BF16", norm.shape, 0x40)])
    write_index(folder, {**table, "model.spare": extra}, opened(folder).nbytes)


def _without_first(index: dict[str, str]) -> dict[str, str]:
    return dict(list(index.items())[1:])


def _swap_shards(index: dict[str, str]) -> dict[str, str]:
    shards = sorted(set(index.values()))
    name = next(n for n, shard in index.items() if shard == shards[0])
    return {**index, name: shards[-1]}


OF_NVFP4A16: Final = (
    _case("the good checkpoint"),
    # Quantized routers, head and embeddings, which no loader accepts
    _case("the origin bug: all routers quantized", "router-quantized", edit=_quantized("moe.gate")),
    _case("one router quantized", "router-quantized", edit=_quantized("0.block_sparse_moe.gate")),
    _case("a router with a lone weight_scale", "router-quantized", edit=_plus(_row(GATE + "weight_scale", "F8_E4M3", (10, 8)))),
    _case("a router with an input_global_scale", "router-quantized", edit=_plus(_row(GATE + "input_global_scale", "F32", (1,)))),
    _case("a router with ModelOpt's weight_scale_2", "router-quantized", edit=_plus(_row(GATE + "weight_scale_2", "F32", ()))),
    _case("lm_head quantized", "head-quantized", edit=_quantized("lm_head")),
    _case("embeddings quantized", "embedding-quantized", edit=_quantized("embed_tokens")),
    _case("routers, head and embeddings quantized", "router-quantized", "head-quantized", "embedding-quantized", edit=_quantized("moe.gate", "lm_head", "embed_tokens")),
    # Names
    _case("experts as plain oneshot names them", "expert-names", edit=_renamed((".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."))),
    _case("one expert as plain oneshot names it", "expert-names", edit=_renamed((EXPERT + "w1.", EXPERT + "gate_proj."), (EXPERT + "w2.", EXPERT + "down_proj."), (EXPERT + "w3.", EXPERT + "up_proj."))),
    _case("mlp for block_sparse_moe", "tensor-renamed", edit=_renamed((".block_sparse_moe.", ".mlp."))),
    _case("an unknown tensor under an expert", "tensor-unknown", edit=_plus(_row(EXPERT + "w4.weight_scale", "F8_E4M3", (64, 8)))),
    _case("an unknown tensor in a layer", "tensor-unknown", edit=_plus(_row("model.layers.0.extra.weight", "BF16", (8, 8)))),
    _case("a bias that the model has not", "tensor-unknown", edit=_plus(_row(ATTENTION + "q_proj.bias", "BF16", (128,)))),
    _case("a prefix before every name", "tensor-unknown", edit=_renamed(("model.layers.", "language_model.layers."))),
    # Missing tensors
    _case("an expert's codes missing", "part-missing", edit=_without(EXPERT + "w1.weight_packed")),
    _case("an expert's block scales missing", "part-missing", edit=_without(EXPERT + "w2.weight_scale")),
    _case("an expert's global scale missing", "part-missing", edit=_without(EXPERT + "w3." + GLOBAL)),
    _case("all global scales missing", "part-missing", edit=_without(GLOBAL)),
    _case("codes of q missing", "part-missing", edit=_without(ATTENTION + "q_proj.weight_packed")),
    _case("block scales of k missing", "part-missing", edit=_without(ATTENTION + "k_proj.weight_scale")),
    _case("the global scale of v missing", "part-missing", edit=_without(ATTENTION + "v_proj." + GLOBAL)),
    _case("o missing", "tensor-missing", edit=without(ATTENTION + "o_proj.")),
    _case("k missing", "fused-set-incomplete", edit=without(ATTENTION + "k_proj.")),
    _case("w3 of an expert missing", "fused-set-incomplete", edit=without(EXPERT + "w3.")),
    _case("an expert missing", "expert-gap", edit=without(EXPERT)),
    _case("a layer missing", "tensor-missing", edit=without("model.layers.2.")),
    _case("a layer's experts missing", "tensor-missing", edit=without("layers.1.block_sparse_moe.experts.")),
    _case("lm_head missing", "tensor-missing", edit=_without("lm_head.weight")),
    _case("embeddings missing", "tensor-missing", edit=_without("embed_tokens.weight")),
    _case("the last norm missing", "tensor-missing", edit=_without("model.norm.weight")),
    _case("a norm of q missing", "tensor-missing", edit=_without(ATTENTION + "q_norm.weight")),
    _case("a router missing", "tensor-missing", edit=_without(GATE + "weight")),
    _case("a routing bias missing", "tensor-missing", edit=_without("layers.1.block_sparse_moe.e_score_correction_bias")),
    # Numbers of experts and layers
    _case("one more expert than config.json says", "experts-disagree", edit=_copied(".experts.9.", ".experts.10.")),
    _case("one expert less than config.json says", "experts-disagree", edit=without(".experts.9.")),
    _case("config.json of the unpruned model", "experts-disagree", config=_plus_one("num_local_experts", 6)),
    _case("one layer more than config.json says", "layers-disagree", config=_plus_one("num_hidden_layers", -1)),
    _case("one layer less than config.json says", "tensor-missing", config=_plus_one("num_hidden_layers")),
    # Plain modules among quantized modules
    _case("one plain expert among quantized ones", "experts-mixed", edit=_one_expert_plain),
    _case("a module with both weight and codes", "weight-stored-twice", edit=_plus(_row(ATTENTION + "o_proj.weight", "BF16", (128, 128)))),
    # Shapes and dtypes
    _case("half of an expert's block scales", "part-shape", edit=_resized(EXPERT + "w1.weight_scale", lambda s: (s[0] // 2, s[1]))),
    _case("an expert's block scales per row", "part-shape", edit=_resized(EXPERT + "w1.weight_scale", lambda s: (s[0], 1))),
    _case("block scales of q cut short", "part-shape", edit=_resized(ATTENTION + "q_proj.weight_scale", lambda s: (s[0], s[1] // 2))),
    _case("codes of an expert cut short", "part-shape", edit=_resized(EXPERT + "w2.weight_packed", lambda s: (s[0] // 2, s[1]))),
    _case("an expert's block scales as U8", "part-dtype", edit=changed(EXPERT + "w1.weight_scale", dtype="U8")),
    _case("block scales of q as U8", "part-dtype", edit=changed(ATTENTION + "q_proj.weight_scale", dtype="U8")),
    _case("all block scales as U8", "part-dtype", edit=lambda rows: [(n, "U8" if n.endswith("weight_scale") else d, s, r) for n, d, s, r in rows]),
    _case("codes as I8", "part-dtype", edit=changed(EXPERT + "w1.weight_packed", dtype="I8")),
    _case("a global scale per row", "part-shape", edit=_resized(ATTENTION + "o_proj." + GLOBAL, lambda s: (2,))),
    _case("a global scale without a dimension", edit=changed(ATTENTION + "o_proj." + GLOBAL, shape=())),
    _case("lm_head of another vocabulary", "shape-disagrees", edit=_resized("lm_head.weight", lambda s: (s[0] // 2, s[1]))),
    _case("a router of fewer experts", "shape-disagrees", edit=_resized(GATE + "weight", lambda s: (s[0] - 1, s[1]))),
    _case("a norm in F32", edit=_cast("model.norm.weight")),
    _case("a router in BF16", edit=_cast(GATE + "weight")),
    # Values of tensors
    _case("w1 and w3 of one expert differ in their global scale", "global-scale-differs", edit=changed(EXPERT + "w1." + GLOBAL, data=scalar(1234.5)), silent="w1's scale is applied to w3"),
    _case("q, k and v differ in their global scale", "global-scale-differs", edit=changed(ATTENTION + "k_proj." + GLOBAL, data=scalar(1234.5)), silent="the largest is applied to all"),
    _case("an infinite global scale", "global-scale-invalid", edit=changed(EXPERT + "w2." + GLOBAL, data=scalar(float("inf"))), silent="every weight is zero"),
    _case("a global scale that is NaN", "global-scale-invalid", edit=changed(EXPERT + "w2." + GLOBAL, data=scalar(float("nan"))), silent=_NAN),
    _case("a global scale of zero", "global-scale-invalid", edit=changed(ATTENTION + "o_proj." + GLOBAL, data=scalar(0)), silent="every weight is infinite"),
    _case("a negative global scale", "global-scale-invalid", edit=changed(ATTENTION + "o_proj." + GLOBAL, data=scalar(-2000)), silent="every weight has the other sign"),
    _case("global scales of ModelOpt's convention", "global-scales-reciprocal", edit=_mapped(GLOBAL, _reciprocal), silent="weights are off by the scale's square"),
    _case("a block scale that is NaN", "scale-not-finite", edit=changed(EXPERT + "w1.weight_scale", data=setting(5, 0x7F)), silent=_NAN),
    _case("a negative block scale", "scale-negative", edit=changed(EXPERT + "w1.weight_scale", data=setting(5, 0xB8)), silent="kernels without a sign read another scale"),
    _case("block scales of zero", "scale-zero", edit=changed(EXPERT + "w1.weight_scale", data=setting(slice(0, 9), 0)), silent="the blocks are zero"),
    _case("NaN in a norm", "value-not-finite", edit=changed("model.norm.weight", data=setting(slice(0, 2), 0xFF)), silent=_NAN),
    _case("NaN in lm_head", "value-not-finite", edit=changed("lm_head.weight", data=setting(slice(0, 2), 0xFF)), silent=_NAN),
    _case("NaN in a routing bias", "value-not-finite", edit=changed("model.layers.0.block_sparse_moe.e_score_correction_bias", data=setting(slice(0, 4), 0xFF)), silent=_NAN),
    # quantization_config
    _case("no quantization_config", "quantization-undeclared", config={"quantization_config": ...}),
    _case("an empty ignore", "ignore-uncovered", config=_quant(ignore=[])),
    _case("no ignore", "ignore-uncovered", config=_quant(ignore=...)),
    _case("ignore with lm_head alone, as in the origin bug, over plain routers", "ignore-uncovered", config=_quant(ignore=["lm_head"])),
    _case("an entry that matches nothing", "ignore-unmatched", config=_ignoring("model.layers.9.nothing")),
    _case("an expression that is none", "ignore-bad-entry", config=_ignoring("re:(")),
    _case("quantized q, k and v in ignore", "ignored-but-quantized", config=_ignoring(*(f"{ATTENTION}{p}_proj" for p in "qkv"))),
    _case("a third of q, k and v in ignore", "fused-set-split", config=_ignoring(ATTENTION + "q_proj")),
    _case("quantized o in ignore", "ignored-but-quantized", config=_ignoring(ATTENTION + "o_proj")),
    _case("quantized experts in ignore by vLLM's name", "ignored-but-quantized", config=_ignoring(r"re:.*mlp\.experts.*")),
    _case("quantized experts in ignore by the hub's name", "ignore-hub-only", config=_ignoring(r"re:.*block_sparse_moe\.experts.*")),
    _case("experts targeted by the hub's name", "quantized-not-targeted", config=_group(targets=[r"re:.*self_attn\..*_proj$", r"re:.*block_sparse_moe\.experts.*"])),
    _case("experts targeted by vLLM's name", config=_group(targets=[r"re:.*self_attn\..*_proj$", r"re:.*mlp\.experts.*"])),
    _case("attention not targeted", "quantized-not-targeted", config=_group(targets=[r"re:.*mlp\.experts.*"])),
    _case("another format", "format-differs", config=_both(_quant(format="float-quantized"), _group(format="float-quantized"))),
    _case("no quantization_status", config=_quant(quantization_status=...)),
    _case("groups of 32", "weights-misdeclared", config=_weights(group_size=32)),
    _case("8 bits", "weights-misdeclared", config=_weights(num_bits=8)),
    _case("integers", "weights-misdeclared", config=_weights(type="int")),
    _case("activations declared, without their scales", "activation-scales-missing", config=_group(input_activations=_INPUTS)),
    _case("scales of activations that are not declared", "activation-scales-undeclared", edit=_plus(_row(ATTENTION + "o_proj.input_global_scale", "F32", (1,), 0x3F))),
    _case("no config_groups", "quantization-config-invalid", config=_quant(config_groups={})),
    _case("an unknown strategy", "quantization-config-invalid", config=_weights(strategy="rows")),
    _case("an unknown quant_method", "quantization-config-invalid", config=_quant(quant_method="best")),
    _case("no quant_method", "quantization-config-invalid", config=_quant(quant_method=...)),
    # The rest of config.json
    _case("no rotary_dim", "config-key-missing", config={"rotary_dim": ...}),
    _case("no scoring_func", "config-key-missing", config={"scoring_func": ...}),
    _case("no architectures", "config-key-missing", config={"architectures": ...}),
    _case("another hidden_size", "shape-disagrees", config=_plus_one("hidden_size", 128)),
    _case("another intermediate_size", "shape-disagrees", config=_plus_one("intermediate_size", 64)),
    _case("another vocab_size", "shape-disagrees", config=_plus_one("vocab_size", 64)),
    _case("other key and value heads", "shape-disagrees", config=_plus_one("num_key_value_heads", 2)),
    _case("one module of MTP advertised", "mtp-without-tensors", "tensor-parallel", config={"num_mtp_modules": 1}),
    _case("no MTP advertised", config={"use_mtp": False, "num_mtp_modules": 0}),
    # Files and index
    _case("a truncated shard", "shard-damaged", files=_truncate),
    _case("a missing shard", "shard-missing", files=lambda folder: _last_shard(folder).unlink()),
    _case("no index", "index-missing", files=lambda folder: (folder / INDEX_NAME).unlink()),
    _case("a tensor that the index lacks", "tensor-not-in-index", index=_without_first),
    _case("a tensor that the index has elsewhere", "index-wrong-shard", index=_swap_shards),
    _case("a tensor that only the index has", "index-without-tensor", index=lambda table: {**table, "model.more.weight": min(table.values())}),
    _case("another total_size", "total-size-wrong", total_size=1),
    _case("a shard beside those of the index", "shard-not-in-index", files=_duplicate),
    _case("a tensor in two shards, with other values", "tensor-stored-twice", files=_twice, silent="the last shard's is loaded"),
    _case("a scale of the KV cache", edit=_plus(_row(ATTENTION + "k_scale", "F32", (1,), 0x3F))),
    _case("a scale of the KV cache, by llmcompressor's older name", "tensor-unknown", edit=_plus(_row(ATTENTION + "k_proj.output_scale", "F32", (1,), 0x3F))),
)  # fmt: skip
OF_OTHER_SCHEMES: Final = (
    _case("activations in NVFP4, too", edit=schemes.with_input_scales, config=schemes.w4a4),
    _case("activations in NVFP4, an input's scale missing", "activation-scales-missing", edit=_then(schemes.with_input_scales, _without(EXPERT + "w1.input_global_scale")), config=schemes.w4a4),
    _case("ModelOpt's NVFP4", edit=schemes.as_modelopt, config=schemes.modelopt),
    _case("ModelOpt's NVFP4 of weights alone", edit=_then(schemes.as_modelopt, _without(".input_scale")), config=_both(schemes.modelopt, _quant(quant_algo="W4A16_NVFP4"))),
    _case("ModelOpt's NVFP4, a second scale missing", "part-missing", edit=_then(schemes.as_modelopt, _without(ATTENTION + "o_proj.weight_scale_2")), config=schemes.modelopt),
    _case("ModelOpt's NVFP4, routers not excluded", "ignore-uncovered", edit=schemes.as_modelopt, config=_both(schemes.modelopt, _quant(ignore=["lm_head"]))),
    _case("FP8 with a scale per channel", edit=schemes.FP8_CHANNEL, config=schemes.fp8_channel),
    _case("FP8 with a scale per channel, one missing", "part-missing", edit=_then(schemes.FP8_CHANNEL, _without(EXPERT + "w2.weight_scale")), config=schemes.fp8_channel),
    _case("FP8 with a scale per block", edit=schemes.FP8_BLOCKS, config=schemes.fp8_blocks),
    _case("FP8 with a scale per block, one cut short", "part-shape", edit=_then(schemes.FP8_BLOCKS, _resized(ATTENTION + "o_proj.weight_scale_inv", lambda s: (s[0] // 2, s[1]))), config=schemes.fp8_blocks),
    _case("4-bit integers in groups of 32", edit=schemes.INT4, config=schemes.int4),
    _case("4-bit integers, scales missing", "part-missing", edit=_then(schemes.INT4, _without(EXPERT + "w3.weight_scale")), config=schemes.int4),
    _case("8-bit integers, activations too", edit=schemes.INT8, config=schemes.int8),
)  # fmt: skip
CASES: Final = OF_NVFP4A16 + OF_OTHER_SCHEMES
