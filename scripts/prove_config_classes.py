"""Find the models that vLLM builds as mquant predicts of another model's config.json.

    python scripts/prove_config_classes.py [--check] [--loader PYTHON]

vLLM builds what `architectures` names; transformers reads config.json by its model_type, with that
model's attributes and defaults. The script gives good checkpoints of every family, and those whose
config.json has changed, each of the model_types below, and asks `mquant verify` and vLLM. It writes
src/mquant/loader_model/vllm/config_pairs.yaml: each architecture with the model_types with which
`verify` calls nothing clean that vLLM refuses or loads wrongly. Other pairs are not judged. With
`--check`, it fails if the file differs.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from unittest import mock

import differential_config  # noqa: F401  (registers MUTATIONS)
from differential_ask import Asker, judge, vllm
from differential_draft import MUTATIONS, Unfit, chance
from differential_formats import base, families
from mquant.loader_model.vllm import config_names
from mquant.verify.loaders.install import find_python

FILE = Path(config_names.__file__).with_name("config_pairs.yaml")
VARIANTS = (
    ("BF16", ""),
    ("recipe nvfp4", ""),
    ("BF16", "config.json lacks a key"),
    ("BF16", "config.json has another count"),
    ("BF16", "a switch of config.json is flipped"),
    ("recipe nvfp4", "a switch of config.json is flipped"),
)
"""Formats, each with the change of config.json."""
MODEL_TYPES = (
    "deepseek_v2",
    "llama",
    "minimax",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""The model_types that people write into the config.json of another model."""
HEAD = """\
# Architecture -> model_types of other models. vLLM builds the architecture of a config.json that
# transformers reads by the model_type, and does what is predicted. Written by
# scripts/prove_config_classes.py.
"""


Pair = tuple[str, str]
"""An architecture and a model_type."""


def made(folder: Path) -> Iterator[tuple[Pair, Path]]:
    """Write the checkpoints; yield the pair of each, and its folder."""
    for name, kind, (form, change) in product(sorted(families()), MODEL_TYPES, VARIANTS):
        path = folder / f"{name} of {kind}, {form}, {change or 'unchanged'}"
        try:
            draft = base(families()[name], form, chance(path.name))
            [architecture] = draft.config["architectures"]
            if change:
                MUTATIONS[change].apply(draft, chance(path.name))
        except Unfit:
            continue
        if draft.config.get("model_type") != kind:
            draft.config["model_type"] = kind
            yield (architecture, kind), draft.write(path)


def proven(ask: Asker) -> dict[str, list[str]]:
    """Return the model_types of each architecture with which `verify` calls nothing wrong clean."""
    known = mock.patch.object(config_names, "is_known_pair", return_value=True)
    with tempfile.TemporaryDirectory() as folder, known:
        drafts = list(made(Path(folder)))
        clean = [(pair, path) for pair, path in drafts if judge(path).verdict == "clean"]
        wrong = set()
        for (pair, path), answer in zip(clean, ask([path for _, path in clean]), strict=True):
            if answer.verdict != "loads":
                print(f"{answer.verdict}: {path.name}: {answer.words[:150]}")
                wrong.add(pair)
    print(f"vLLM was asked about {len(clean)} of {len(drafts)} checkpoints")
    right: dict[str, list[str]] = {}
    for architecture, kind in sorted({pair for pair, _ in drafts} - wrong):
        right.setdefault(architecture, []).append(kind)
    return right


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the file, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--loader", type=Path, help="the Python of an environment that has vLLM")
    options = parser.parse_args(arguments)
    right = proven(vllm(options.loader or find_python()))
    text = HEAD + "".join(f"{name}: [{', '.join(kinds)}]\n" for name, kinds in right.items())
    if options.check:
        return int(FILE.read_text("utf-8") != text)
    FILE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
