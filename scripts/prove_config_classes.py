"""Find the models that vLLM builds as mquant predicts of another model's config.json.

    python scripts/prove_config_classes.py [--check] [--loader PYTHON]

vLLM builds what `architectures` names; transformers reads config.json by its model_type, with that
model's attributes and defaults. The script gives good checkpoints of every family, and those whose
config.json has changed, each of the model_types below, and asks `mquant verify` and vLLM. It writes
src/mquant/loader_model/vllm/config_pairs.yaml: the model_types, and the architectures of which
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
from differential_ask import Asker, compare, judge, vllm
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
    ("recipe nvfp4", "a switch of config.json is flipped"),
)
"""Formats, each with the change of config.json."""
MODEL_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""The model_types that people write into the config.json of another model."""
HEAD = """\
# Models that vLLM builds of a config.json that transformers reads as that of another model, where
# vLLM's verdict is known to be the predicted one. Written by scripts/prove_config_classes.py.
"""


def pairs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write the checkpoints; yield the architecture of each, and its folder."""
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
            yield architecture, draft.write(path)


def proven(ask: Asker) -> list[str]:
    """Return the architectures of which `verify` calls nothing clean that vLLM does not load."""
    with tempfile.TemporaryDirectory() as folder:
        made = list(pairs(Path(folder)))
        every = {architecture for architecture, _ in made}
        lists = {"model_types": [*MODEL_TYPES], "architectures": [*every]}
        answers = ask([path for _, path in made])
        wrong = set()
        with mock.patch.object(config_names, "_pairs", return_value=lists):
            for (architecture, path), answer in zip(made, answers, strict=True):
                if (found := compare(answer, judge(path))) == "called clean":
                    print(f"{found}: {path.name}: {answer.words[:150]}")
                    wrong.add(architecture)
    return sorted(every - wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the file, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--loader", type=Path, help="the Python of an environment that has vLLM")
    options = parser.parse_args(arguments)
    architectures = proven(vllm(options.loader or find_python()))
    lists = {"model_types": MODEL_TYPES, "architectures": architectures}
    text = HEAD
    for key, names in lists.items():
        text += f"{key}:\n" + "".join(f"  - {name}\n" for name in names)
    if options.check:
        return int(FILE.read_text("utf-8") != text)
    FILE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
