"""Measure the accuracy of every recipe and of llmcompressor, and write docs/accuracy.md.

    python scripts/accuracy.py [MODEL ...] [--data FILE] [--text FILE]

MODEL: folders that scripts/train_tiny_moe.py wrote. The default is the tests' fixture and two
larger models, which are first trained into out/accuracy, for half an hour.

`mquant quantize` quantizes each checkpoint, one process a recipe, timed with start-up.
llmcompressor's observers and compressed-tensors' compressor quantize the same weights in memory,
timed alone. Every result is dequantized to BF16, and transformers runs the result in F32, on text
that was not trained on: perplexity, and the mean Kullback-Leibler divergence of the result's
next-token distribution from the parent's. The default calibration text (--data) is a part of the
training text.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bench_search import tensor as as_tensor
from bench_search import theirs, values
from mquant.checkpoint import Folder, open_checkpoint
from mquant.family_files import load_families
from mquant.plan import Plan, make_plan
from mquant.recipe import find_recipe, load_recipes
from perplexity import load_model
from train_tiny_moe import read_library

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests/fixtures/tiny-minimax-m2"
OBSERVERS = {
    "memoryless_minmax": "llmcompressor: minmax",
    "memoryless_mse": "llmcompressor: memoryless_mse",
    "nvfp4_expanded_mse": "llmcompressor: expanded MSE",
}
WEIGHED = "nvfp4-opt with --importance"
WINDOW = 256
TRAINED = {
    # 128 divides all sides of m8, so blocks of 128 x 128 fit.
    "m8": {"steps": 600, "hidden": 384, "intermediate": 128, "layers": 4, "kv-heads": 4},
    "m13": {"steps": 400, "hidden": 512, "intermediate": 96, "layers": 6},
}


@dataclass
class Row:
    """The result of one recipe or observer on one model. `note` says why numbers are missing."""

    name: str
    seconds: float = 0.0
    error: float = math.nan
    kl: float = math.nan
    perplexity: float = math.nan
    size: float = math.nan
    note: str = ""


def main() -> None:
    """Train missing models, quantize, measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, help="calibration text; default: training text")
    parser.add_argument("--text", type=Path, default=ROOT / "tests/fixtures/heldout.txt")
    parser.add_argument("--recipes", help="names of recipes, separated by commas; default: all")
    parser.add_argument("--tokens", type=int, default=16 * 1024, help="the most tokens of the text")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/accuracy.md")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    models = options.models or [FIXTURE, *train()]
    with tempfile.TemporaryDirectory() as where:
        data = options.data or calibration(Path(where) / "calibration.txt")
        pages = []
        for model in models:
            judge = Judge(model, options.text, options.tokens)
            recipes = options.recipes.split(",") if options.recipes else [*load_recipes()]
            rows = list(measure(model, recipes, data, judge, Path(where)))
            pages.append((model, judge, rows))
            print(table(rows), flush=True)
    options.out.write_text(page(pages), encoding="utf-8")


def train() -> list[Path]:
    """Return the folders of two larger models; train a model if its folder is missing."""
    folder = ROOT / "out/accuracy"
    for seed, (name, sizes) in enumerate(TRAINED.items(), start=2):
        if not (folder / name / "training.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            files = ["--out", str(folder / name), "--heldout", str(folder / "heldout.txt")]
            script = str(ROOT / "scripts/train_tiny_moe.py")
            options = [f"--{key}={value}" for key, value in {**sizes, "seed": seed}.items()]
            command = [sys.executable, script, *files, *options]
            subprocess.run(command, check=True)
    return [folder / name for name in TRAINED]


def calibration(path: Path) -> Path:
    """Write a part of the models' training text, one document a line, as JSON; return the path."""
    documents, _ = read_library()
    chosen = documents[:: max(1, len(documents) // 64)]
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"text": text[:1000]}) + "\n" for text in chosen))
    return path


class Judge:
    """The parent's predictions on a text, with which other models are compared."""

    def __init__(self, parent: Path, text: Path, most: int) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(parent)
        ids = tokenizer(text.read_text("utf-8"), add_special_tokens=False)["input_ids"][: most + 1]
        whole = (len(ids) - 1) // WINDOW
        self.windows = torch.tensor(ids[: whole * WINDOW + 1]).unfold(0, WINDOW + 1, WINDOW)
        self.parameters = open_checkpoint(Folder(parent)).parameters
        self.parent = list(self._predict(parent))
        self.perplexity = self.of(parent)[1]

    def of(self, folder: Path) -> tuple[float, float]:
        """Return the mean KL (nats a token) from the parent and the perplexity of a checkpoint."""
        kl = loss = 0.0
        for window, parent, log_probs in zip(
            torch.split(self.windows, 8), self.parent, self._predict(folder), strict=True
        ):
            kl += float((parent.exp() * (parent - log_probs)).sum(dtype=torch.float64))
            targets = window[:, 1:].unsqueeze(-1)
            loss -= float(log_probs.gather(-1, targets).sum(dtype=torch.float64))
        count = self.windows.shape[0] * WINDOW
        return kl / count, math.exp(loss / count)

    def _predict(self, folder: Path) -> Iterator[torch.Tensor]:
        model = load_model(folder)
        with torch.inference_mode():
            for window in torch.split(self.windows, 8):
                logits = model(input_ids=window[:, :-1], use_cache=False).logits
                yield logits.float().log_softmax(-1)


def measure(
    model: Path, recipes: list[str], data: Path, judge: Judge, where: Path
) -> Iterator[Row]:
    """Yield the rows of the recipes, then the rows of llmcompressor's observers."""
    for recipe in map(find_recipe, recipes):
        options = ["--data", str(data)] if recipe.needs_data else []
        yield ours(model, recipe.name, recipe.name, options, judge, where)
        if recipe.scales == "search":
            file = where / "importance.safetensors"
            file.unlink(missing_ok=True)
            run("calibrate", model, "--recipe", recipe.name, "--data", data, "-o", file)
            yield ours(model, WEIGHED, recipe.name, ["--importance", str(file)], judge, where)
    plan = make_plan(open_checkpoint(Folder(model)), find_recipe("nvfp4"), load_families())
    for observer, name in OBSERVERS.items():
        yield upstream(model, plan, observer, name, judge, where)


def ours(model: Path, name: str, recipe: str, options: list[str], judge: Judge, where: Path) -> Row:
    """Return the row of `mquant quantize`, timed as a process."""
    out = where / "out"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    process = run("quantize", model, "--recipe", recipe, "-o", out, *options, check=False)
    seconds = time.perf_counter() - start
    if process.returncode:
        return Row(name, note=process.stderr.splitlines()[0].partition(" (and")[0])
    return judged(Row(name, seconds), model, out, judge, where)


def upstream(model: Path, plan: Plan, observer: str, name: str, judge: Judge, where: Path) -> Row:
    """Return the row of an llmcompressor observer, whose tensors replace mquant's in the output."""
    out = where / "out"
    shutil.rmtree(out, ignore_errors=True)
    run("quantize", model, "--recipe", "nvfp4", "-o", out)
    seconds = 0.0
    new: dict[str, torch.Tensor] = {}
    for unit in (unit for shard in plan.shards for unit in shard.units if unit.scheme):
        weights = [as_tensor(values(plan.survey.checkpoint, a.source.name)) for a in unit.actions]
        set_seconds, members = theirs(unit, weights, observer)
        seconds += set_seconds
        for action, parts in zip(unit.actions, members, strict=True):
            named = zip(action.outputs, parts, strict=True)
            new |= {output.name: torch.from_numpy(np.array(part)) for output, part in named}
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        for key in tensors.keys() & new.keys():
            tensors[key] = new[key].view(tensors[key].dtype).reshape(tensors[key].shape)
        save_file(tensors, shard, metadata={"format": "pt"})
    (out / "mquant.json").unlink()  # it lists the digests of other shards
    return judged(Row(name, seconds), model, out, judge, where)


def judged(row: Row, model: Path, out: Path, judge: Judge, where: Path) -> Row:
    """Fill a row with the size, error, KL and perplexity of a quantized checkpoint."""
    plain = where / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    parent, quantized = open_checkpoint(Folder(model)), open_checkpoint(Folder(out))
    row.size = quantized.nbytes / parent.nbytes
    if quantized.config["quantization_config"]["format"] == "pack-quantized":
        unpack(out, plain)
        row.kl, row.perplexity = judge.of(plain)
        return row  # AWQ scales weights, so a weight error against the parent means nothing
    run("dequantize", out, "-o", plain)
    row.kl, row.perplexity = judge.of(plain)
    errors = []
    for name, weight in weights_of(plain).items():
        original = values(parent, name).astype(np.float32)
        if name not in quantized.tensors or quantized.tensors[name].dtype != "BF16":
            errors.append(np.linalg.norm(weight - original) / np.linalg.norm(original))
    row.error = float(np.mean(errors))
    return row


def unpack(out: Path, plain: Path) -> None:
    """Write grouped INT4 weights as BF16, decoded by compressed-tensors' own code."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shutil.copytree(out, plain, ignore=shutil.ignore_patterns("*.safetensors*", "mquant.json"))
    tensors = {
        key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()
    }
    for packed in [key for key in tensors if key.endswith(".weight_packed")]:
        name = packed.removesuffix("_packed")
        shape = torch.Size(tensors.pop(f"{name}_shape").tolist())
        scale = tensors.pop(f"{name}_scale")
        codes = unpack_from_int32(tensors.pop(packed), 4, shape)
        groups = codes.view(shape[0], scale.shape[1], -1) * scale.unsqueeze(-1)
        tensors[name] = groups.reshape(shape).to(torch.bfloat16)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text("utf-8"))
    config.pop("quantization_config")
    (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")


def weights_of(folder: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return the matrices of linear layers, in F32, by name."""
    checkpoint = open_checkpoint(Folder(folder))
    names = [name for name in checkpoint.tensors if "_proj." in name or ".experts." in name]
    return {name: values(checkpoint, name).astype(np.float32) for name in names}


def run(*arguments: object, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run `mquant` in a process. Raises RuntimeError if it fails and `check` is set."""
    command = [sys.executable, "-m", "mquant", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and process.returncode:
        raise RuntimeError(f"{' '.join(command[3:])}: {process.stderr}")
    return process


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown, in their order."""
    head = "| recipe | size | weight error | KL, nats/token | perplexity | seconds |\n"
    lines = [head + "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        if row.note:
            lines.append(f"| {row.name} | {row.note} | | | | |")
            continue
        error = "" if math.isnan(row.error) else f"{row.error:.4f}"
        lines.append(
            f"| {row.name} | {row.size:.1%} | {error} | {row.kl:.5f} | "
            f"{row.perplexity:.3f} | {row.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def page(results: list[tuple[Path, Judge, list[Row]]]) -> str:
    """Return the text of docs/accuracy.md."""
    parts = [HEAD]
    for model, judge, rows in results:
        tokens = judge.windows.shape[0] * WINDOW
        parts.append(
            f"## {model.name}: {judge.parameters / 1e6:.1f} million parameters\n\n"
            f"The parent's perplexity is {judge.perplexity:.3f}, on {tokens:,} tokens.\n\n"
            + table(rows)
        )
    parts.append(summary([rows for _, _, rows in results]))
    return "\n".join(parts)


def summary(results: list[list[Row]]) -> str:
    """Return a table of each KL over the KL of expanded MSE, as the mean over all models."""
    base = OBSERVERS["nvfp4_expanded_mse"]
    ratios: dict[str, list[float]] = {}
    for rows in results:
        least = next(row.kl for row in rows if row.name == base)
        for row in rows:
            if not row.note:
                ratios.setdefault(row.name, []).append(row.kl / least)
    lines = ["## Compared with llmcompressor's expanded MSE\n"]
    lines += ["| | KL / KL of expanded MSE, mean over the models | models |", "| --- | --- | --- |"]
    lines += [f"| {name} | {np.mean(kls):.3f} | {len(kls)} |" for name, kls in ratios.items()]
    return "\n".join(lines) + "\n"


HEAD = """# Accuracy

Written by `scripts/accuracy.py`, which also trains the models; do not edit. The models are small,
trained for minutes on the sources of Python's standard library: these models rank methods, but do
not predict the loss of a large model.

*weight error* is the mean over all quantized matrices of |decoded - parent| / |parent| (L2). *KL*
is the divergence of the next-token distribution from the parent's. Activations are not quantized:
recipes that quantize activations are measured by their weights alone. *seconds* is the time of
`mquant` as a whole process, with start-up, or of llmcompressor's observers alone, on weights in
memory. `w4a16-awq` is llmcompressor's AWQ: the tests check that every tensor equals the tensor of
plain `oneshot`. The weight error is left out for `w4a16-awq`, because AWQ scales weights away from
the parent's.
"""


if __name__ == "__main__":
    main()
