"""Train the small MiniMax-M2 checkpoint that the tests quantize, and write it with hub names.

    python scripts/train_tiny_moe.py [--out tests/fixtures/tiny-minimax-m2] [--steps 1400]
        [--hidden 256 --intermediate 64 --layers 3 --kv-heads 2]

scripts/accuracy.py trains larger models. The steps, in the order of this file:
    1. text        the sources of Python's standard library; a few modules are held out
    2. tokenizer   byte-level BPE, trained on that text
    3. training    transformers' MiniMaxM2ForCausalLM in F32 on the CPU; the routing bias moves
                   after each step so that no expert starves (DeepSeek's loss-free balancing)
    4. pruning     one-shot, as REAP does it: the experts of least gate value x output norm go
    5. writing     BF16 (router and routing bias stay F32), hub names, shards cut in fused sets
About six minutes on one core. Same arguments, versions and kind of CPU: same bytes. Needs torch,
transformers, tokenizers and safetensors, and perplexity.py beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from perplexity import load_model, mean_loss

hf: Any = transformers  # only partly typed

SKIPPED = {"test", "tests", "site-packages", "lib2to3", "idlelib", "encodings", "pydoc_data"}
HELD_OUT = ("contextlib.py", "csv.py", "graphlib.py", "textwrap.py")  # never trained on
BOS, EOS, ROLE = "]~!b[", "[e~[", "]~b]"  # the hub model's names for these three tokens
VOCABULARY, EXPERTS, KEPT, LAYERS = 2048, 16, 10, 3
WINDOW, BATCH = 256, 4  # tokens in a window, windows in a batch
MUON_RATE, BIAS_RATE = 0.02, 0.01
# Parameters that AdamW trains, not Muon. Larger rates for the embedding lower the loss sooner, but
# the embedding then outweighs the experts' output, and damage to the experts would hardly show.
ADAM_RATES = {"embed_tokens": 0.01, "lm_head": 0.02, "gate": 0.01, "norm": 0.01}
CALIBRATION = 64  # windows of training text that REAP measures

# The first tensor of each shard except the first shard. Every cut splits a fused set.
SHARD_STARTS = (
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.block_sparse_moe.experts.4.w2.weight",
    "model.layers.2.self_attn.v_proj.weight",
)

# config.json as MiniMax publishes it; its multi-token prediction modules are never published.
# fmt: off
CONFIG: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1] * LAYERS,
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
                 "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"},
    "head_dim": 32, "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 64,
    "max_position_embeddings": 2048, "model_type": "minimax_m2", "mtp_transformer_layers": 1,
    "num_attention_heads": 8, "num_experts_per_tok": 4, "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2, "num_local_experts": KEPT, "num_mtp_modules": 3,
    "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rotary_dim": 16,
    "scoring_func": "sigmoid", "shared_intermediate_size": 0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.46.1", "use_cache": True,
    "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": VOCABULARY,
}
TOKENIZER_CONFIG = {
    "bos_token": BOS, "eos_token": EOS, "additional_special_tokens": [ROLE],
    "clean_up_tokenization_spaces": False, "model_max_length": CONFIG["max_position_embeddings"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION_CONFIG = {"do_sample": True, "temperature": 1.0, "top_k": 40, "top_p": 0.95}
# fmt: on

CODE = """\
# Stands for the remote code that such checkpoints carry: to be copied, and never to be run.
raise ImportError("code from a checkpoint is never executed")
"""
TEXT_FILES = {
    "chat_template.jinja": """\
{{- ']~!b[' }}
{%- for message in messages %}{{ ']~b]' ~ message.role ~ '\\n' ~ message.content ~ '[e~[\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ ']~b]assistant\\n' }}{% endif %}
""",
    "configuration_minimax_m2.py": CODE,
    "modeling_minimax_m2.py": CODE,
    "README.md": """\
# A tiny MiniMax-M2 for tests
The parent's readme. It describes the parent only, so a quantized copy must not carry it.
""",
    "LICENSE": """\
These files were made for tests by training on the sources of Python's standard library, and are
published under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0

The text that was learnt, and the held-out text that perplexity is measured on, are Copyright (c)
2001 Python Software Foundation; All Rights Reserved, and are licensed under the PSF License
Agreement: https://docs.python.org/3/license.html
""",
}

# ------------------------------------------------------------------------- 1. text, 2. tokenizer


def read_library() -> tuple[list[str], str]:
    """Return the ASCII sources of the standard library: training texts and the held-out text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: dict[str, str] = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # _sysconfigdata* and config-* hold the paths of the machine that built this Python.
        private = parts[0].startswith(("_sysconfigdata", "config-"))
        if not private and SKIPPED.isdisjoint(parts) and path.read_bytes().isascii():
            sources["/".join(parts)] = path.read_text(encoding="ascii")
    held_out = "".join(sources.pop(name) for name in HELD_OUT)
    return [text for _, text in sorted(sources.items())], held_out


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer, like GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, ROLE)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Return all documents as one row of token ids; EOS ends each document."""
    rows = (row.ids for row in tokenizer.encode_batch([text + EOS for text in documents]))
    return torch.tensor([token for row in rows for token in row])


# ------------------------------------------------------------------------------------ 3. training


def build_model(experts: int) -> Any:
    """Return a model of transformers' own class with random weights."""
    ends = {"bos_token_id": 0, "eos_token_id": 1}  # the class's defaults are beyond our vocabulary
    config = hf.MiniMaxM2Config(**CONFIG | ends | {"num_local_experts": experts})
    # transformers 5 ignores rotary_dim and would rotate the whole head.
    config.rope_parameters["partial_rotary_factor"] = CONFIG["rotary_dim"] / CONFIG["head_dim"]
    return hf.MiniMaxM2ForCausalLM(config)


def moe_blocks(model: Any) -> list[Any]:
    """Return the block with router, experts and routing bias of each layer."""
    return [layer.mlp for layer in model.model.layers]


@torch.no_grad()
def muon_step(matrices: list[Tensor], momenta: list[Tensor], rate: float) -> None:
    """Update parameters like torch.optim.Muon (orthogonalized momentum), stacks of matrices too."""
    for p, momentum in zip(matrices, momenta, strict=True):
        gradient: Any = p.grad
        momentum.lerp_(gradient, 0.05)
        x = gradient.lerp(momentum, 0.95).view(-1, *p.shape[-2:])
        tall = p.size(-2) > p.size(-1)
        x = x.mT if tall else x
        x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
        for _ in range(5):  # Newton-Schulz: brings all singular values near 1
            a = x @ x.mT
            a = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, a, x, beta=3.4445)
        update = (x.mT if tall else x).reshape(p.shape)
        p.mul_(1 - 0.1 * rate)
        p.sub_(update, alpha=rate * max(1.0, p.size(-2) / p.size(-1)) ** 0.5)


def train(model: Any, tokens: Tensor, steps: int) -> Iterator[tuple[int, float]]:
    """Train in place; yield (step, mean loss since the last yield) 20 times."""
    load: dict[int, Tensor] = {}  # layer -> how many tokens each expert got in this step

    def count(layer: int, chosen: Tensor) -> None:
        load[layer] = torch.bincount(chosen.flatten(), minlength=EXPERTS).float()

    for layer, moe in enumerate(moe_blocks(model)):
        moe.gate.register_forward_hook(lambda _gate, _in, out, layer=layer: count(layer, out[2]))

    matrices, groups = dict(model.named_parameters()), []
    for kind, rate in ADAM_RATES.items():
        names = [name for name in matrices if name.endswith(f"{kind}.weight")]
        groups.append({"params": [matrices.pop(name) for name in names], "rate": rate})
    momenta = [torch.zeros_like(p) for p in matrices.values()]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    windows = tokens.unfold(0, WINDOW + 1, WINDOW)
    epochs = math.ceil(steps * BATCH / len(windows))
    order = torch.cat([torch.randperm(len(windows)) for _ in range(epochs)])
    losses: list[float] = []
    for step in range(steps):
        factor = min((step + 1) / 50, 1.0) * (1 - step / steps)  # warm up, then fall to zero
        batch = windows[order[step * BATCH : (step + 1) * BATCH]]
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss: Any = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon_step(list(matrices.values()), momenta, MUON_RATE * factor)
        for group in adam.param_groups:
            group["lr"] = group["rate"] * factor
        adam.step()
        model.zero_grad()
        for layer, moe in enumerate(moe_blocks(model)):  # favour idle experts, curb busy experts
            direction = torch.sign(load[layer].mean() - load[layer])
            moe.e_score_correction_bias += BIAS_RATE * factor * direction
        losses.append(loss.item())
        if (step + 1) * 20 // steps > step * 20 // steps:
            yield step + 1, sum(losses) / len(losses)
            losses.clear()
    model.eval()


# ------------------------------------------------------------------------------------- 4. pruning


@torch.no_grad()
def measure_experts(model: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return [layer, expert]: REAP's saliency, and the number of tokens routed to the expert."""
    saliency, routed = torch.zeros(2, CONFIG["num_hidden_layers"], EXPERTS)

    def observe(layer: int, experts: Any, hidden: Tensor, chosen: Tensor, gates: Tensor) -> None:
        for expert in range(EXPERTS):
            token, slot = torch.where(chosen == expert)
            gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            output = (functional.silu(gate) * up) @ experts.down_proj[expert].T
            saliency[layer, expert] += (gates[token, slot] * output.norm(dim=-1)).sum()
            routed[layer, expert] += len(token)

    for layer, moe in enumerate(moe_blocks(model)):
        moe.experts.register_forward_pre_hook(
            lambda experts, args, layer=layer: observe(layer, experts, *args)
        )
    for batch in torch.split(windows, BATCH):
        model(input_ids=batch, use_cache=False)
    for moe in moe_blocks(model):
        moe.experts._forward_pre_hooks.clear()
    assert routed.min() > 0, "an expert is never used"
    return saliency / routed, routed


def prune(model: Any, kept: list[list[int]]) -> Any:
    """Return a copy of the model with only the `kept` experts of each layer, in their old order."""
    state = dict(model.state_dict())
    cut = ("gate.weight", "e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj")
    for layer, experts in enumerate(kept):
        for name in cut:
            name = f"model.layers.{layer}.mlp.{name}"
            state[name] = state[name][experts]
    pruned = build_model(KEPT)
    pruned.load_state_dict(state)
    return pruned.eval()


# ------------------------------------------------------------------------------------- 5. writing


def hub_tensors(model: Any) -> dict[str, Tensor]:
    """Return the weights by hub name, layer after layer, in BF16; router and bias stay in F32."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith((".gate.weight", ".e_score_correction_bias")):
            tensors[name] = tensor
        elif name.endswith(".gate_up_proj"):
            w13 = tensor.to(torch.bfloat16)
        elif name.endswith(".down_proj"):
            experts = name.removesuffix("down_proj")
            for expert, w2 in enumerate(tensor.to(torch.bfloat16)):
                w1, w3 = w13[expert].chunk(2)
                for number, weight in enumerate((w1, w2, w3), 1):
                    tensors[f"{experts}{expert}.w{number}.weight"] = weight.contiguous()
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    return tensors


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON with a line end, like the files of a hub repository."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_checkpoint(out: Path, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write the checkpoint with all its side files."""
    out.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if name in SHARD_STARTS:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", index)
    write_json(out / "config.json", CONFIG)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    ends = {f"{end}_token_id": tokenizer.token_to_id(t) for end, t in (("bos", BOS), ("eos", EOS))}
    write_json(out / "generation_config.json", ends | GENERATION_CONFIG)
    for name, text in TEXT_FILES.items():
        (out / name).write_text(text)


@torch.no_grad()
def load_and_compare(out: Path, pruned: Any, sample: Tensor) -> Any:
    """Load the written checkpoint with transformers, and compare it with the model in memory."""
    for name, p in pruned.named_parameters():
        if not name.endswith("gate.weight"):
            p.copy_(p.to(torch.bfloat16))
    loaded = load_model(out)
    torch.testing.assert_close(loaded(sample).logits, pruned(sample).logits)
    return loaded


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    fixtures = Path("tests/fixtures")
    parser.add_argument("--out", type=Path, default=fixtures / "tiny-minimax-m2")
    parser.add_argument("--heldout", type=Path, default=fixtures / "heldout.txt")
    parser.add_argument("--steps", type=int, default=1400, help=f"of {BATCH} x {WINDOW} tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=CONFIG["hidden_size"])
    parser.add_argument("--intermediate", type=int, default=CONFIG["intermediate_size"])
    parser.add_argument("--layers", type=int, default=LAYERS, help="3 or more")
    parser.add_argument("--kv-heads", type=int, default=CONFIG["num_key_value_heads"])
    return parser.parse_args()


def main() -> None:
    """Run all steps and write their record, training.json."""
    args = arguments()
    CONFIG.update(hidden_size=args.hidden, intermediate_size=args.intermediate)
    CONFIG.update(num_hidden_layers=args.layers, attn_type_list=[1] * args.layers)
    CONFIG["num_key_value_heads"] = args.kv_heads
    torch.set_num_threads(1)  # fixes the order of every sum
    torch.use_deterministic_algorithms(True)  # and fill no fresh memory: that only costs time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(args.seed)

    documents, held_out_text = read_library()
    tokenizer = train_tokenizer(documents)
    tokens = encode(tokenizer, documents)
    held_out = torch.tensor(tokenizer.encode(held_out_text).ids)
    args.heldout.write_text(held_out_text)
    print(f"{len(tokens)} tokens to train on, {len(held_out)} held out")

    model = build_model(EXPERTS)
    curve: dict[int, float] = {}
    for step, loss in train(model, tokens, args.steps):
        curve[step] = round(loss, 4)
        print(f"step {step:5d}  loss {loss:.4f}", flush=True)

    calibration = tokens.unfold(0, WINDOW, len(tokens) // CALIBRATION)[:CALIBRATION]
    saliency, routed = measure_experts(model, calibration)
    kept = [sorted(row.topk(KEPT).indices.tolist()) for row in saliency]
    pruned = prune(model, kept)
    losses = {"before pruning, F32": mean_loss(model, held_out)}
    losses["after pruning, F32"] = mean_loss(pruned, held_out)

    write_checkpoint(args.out, hub_tensors(pruned), tokenizer)
    loaded = load_and_compare(args.out, pruned, held_out[None, :WINDOW])
    losses["after pruning, BF16"] = mean_loss(loaded, held_out)
    perplexities = {name: round(math.exp(loss), 4) for name, loss in losses.items()}
    print(*(f"{value:10.4f}  {name}" for name, value in perplexities.items()), sep="\n")

    libraries = {lib.__name__: lib.__version__ for lib in (torch, transformers, tokenizers)}
    record = {
        "arguments": {"steps": args.steps, "seed": args.seed},
        "versions": {"python": platform.python_version()} | libraries,
        "tokens of text": {"to train on": len(tokens), "held out": len(held_out)},
        "tokens seen in training": args.steps * BATCH * WINDOW,
        "tokens seen in calibration": calibration.numel(),
        "training loss by step": curve,
        "held-out perplexity": perplexities,
        "experts kept by layer": kept,
        "saliency by layer": [[round(x, 4) for x in row] for row in saliency.tolist()],
        "tokens routed by layer": [[int(x) for x in row] for row in routed.tolist()],
    }
    write_json(args.out / "training.json", record)


if __name__ == "__main__":
    main()
