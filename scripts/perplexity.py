"""Perplexity of checkpoints on a text, measured with transformers in F32 on the CPU.

    python scripts/perplexity.py CHECKPOINT [CHECKPOINT ...] --text tests/fixtures/heldout.txt

A checkpoint is a folder with config.json, a tokenizer and *.safetensors. Unquantized checkpoints
are loaded as they are. NVFP4 checkpoints in compressed-tensors format are first dequantized into a
temporary folder, because transformers 5 loads such experts without an error but ignores their
global scales. compressed-tensors' own code dequantizes, so that another project's code judges
mquant's quantizer. Code from a checkpoint is never run.

Needs torch, transformers, safetensors and, for quantized checkpoints, compressed-tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WINDOW = 256  # tokens scored together: no token attends further back than its window
BATCH = 16  # windows per forward pass
PACKED = "weight_packed"
CONFIG, INDEX = "config.json", "model.safetensors.index.json"


# ------------------------------------------------------------------ a quantized folder becomes BF16


def dequantize(src: Path, dst: Path) -> None:
    """Write the quantized checkpoint `src` to `dst` in BF16, with the names that its parent had."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((src / CONFIG).read_text())
    quantization = QuantizationConfig.model_validate(config.pop("quantization_config"))
    (scheme,) = quantization.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")

    dst.mkdir(parents=True, exist_ok=True)
    for file in src.iterdir():  # the tokenizer and the like, but neither weights nor code
        if file.suffix in (".json", ".jinja", ".txt") and file.name not in (CONFIG, INDEX):
            shutil.copyfile(file, dst / file.name)
    (dst / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    weight_map: dict[str, str] = {}
    total_size = 0
    with ExitStack() as stack:
        # A weight and its scales may be in different shards, so all shards are open at once.
        shards = {
            path.name: stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(src.glob("*.safetensors"))
        }
        holder = {name: shard for shard in shards.values() for name in list(shard.keys())}
        for file_name, shard in shards.items():
            out: dict[str, torch.Tensor] = {}
            for name in sorted(shard.keys()):
                module, _, leaf = name.rpartition(".")
                if leaf == PACKED:
                    parts = {
                        part: holder[f"{module}.{part}"].get_tensor(f"{module}.{part}")
                        for part in (PACKED, "weight_scale", "weight_global_scale")
                    }
                    weight = compressor.decompress(parts, scheme)["weight"]
                    out[f"{module}.weight"] = weight.to(torch.bfloat16)
                elif f"{module}.{PACKED}" not in holder:
                    out[name] = shard.get_tensor(name)
            if out:
                save_file(out, dst / file_name, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(out, file_name)
                total_size += sum(tensor.nbytes for tensor in out.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (dst / INDEX).write_text(json.dumps(index, indent=2) + "\n")


# ------------------------------------------------------------------------------- the measurement


def load_model(folder: Path) -> Any:
    """Load the unquantized checkpoint in `folder`, in F32, with the RoPE of its config."""
    import torch
    import transformers

    hf: Any = transformers  # only partly typed
    hf.utils.logging.disable_progress_bar()
    config = hf.AutoConfig.from_pretrained(folder)
    if hasattr(config, "rotary_dim"):
        # transformers 5 ignores rotary_dim and would rotate the whole head.
        config.rope_parameters["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    model, report = hf.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    if any(report.values()):  # transformers itself would only warn of missing or unknown tensors
        raise ValueError(f"{folder}: {report}")
    return model.eval()


def mean_loss(model: Any, tokens: torch.Tensor, window: int = WINDOW) -> float:
    """Return the mean negative log-likelihood (nats) of `tokens` in windows of `window` + 1 tokens.

    Neighbouring windows share one token, so that all tokens but the very first are predicted once.
    """
    import torch
    from torch.nn.functional import cross_entropy

    full = (len(tokens) - 1) // window
    batches = list(torch.split(tokens[: full * window + 1].unfold(0, window + 1, window), BATCH))
    if full * window + 1 < len(tokens):
        batches.append(tokens[full * window :][None])
    total = 0.0
    with torch.inference_mode():
        for batch in batches:
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            targets = batch[:, 1:].flatten()
            total += cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    return total / (len(tokens) - 1)


def perplexity(folder: Path, text: str) -> float:
    """Return the perplexity of the checkpoint in `folder`, quantized or not, on `text`."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # no warnings about generating text
    config = json.loads((folder / CONFIG).read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    if method not in (None, "compressed-tensors"):
        raise ValueError(f"{folder}: cannot dequantize {method!r}")
    with tempfile.TemporaryDirectory() as scratch:
        if method is not None:
            dequantize(folder, Path(scratch))
            folder = Path(scratch)
        model = load_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        return math.exp(mean_loss(model, tokens))


def main() -> None:
    """Print the perplexity of each checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, required=True, help="the text to score, in UTF-8")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()

    text = args.text.read_text(encoding="utf-8")
    results = {}
    for folder in args.checkpoints:
        results[str(folder)] = perplexity(folder, text)
        if not args.json:
            print(f"perplexity {results[str(folder)]:8.4f}  {folder}", flush=True)
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
