"""Ask transformers' own models for the names, shapes and dtypes of the hub's tensors.

    python scripts/transformers_names.py CONFIG_JSON [CONFIG_JSON ...] [--brief]

needs `mquant loader install transformers`. For every config.json a line of JSON tells what
transformers' model of it has on the meta device, with its conversion undone: what `save_pretrained`
would write. A small depth (num_hidden_layers, and the lists that have one entry a layer) makes an
answer small and quick. The dtype is BF16 if the config states none. The keys of an answer:

    id            the path of the config.json
    transformers  the version
    verdict       ok; no model: transformers has none; failed: it stopped
    why           if the verdict is not ok
    class         the class of the model
    tensors       {name on disk: [shape, dtype]}
    tied          {parameter's name: the parameter that is on disk in its stead}
    accepts       {name: [shape, dtype]}: what loading takes too: experts fused in one tensor, if
                  `tensors` has one for each expert; names with a prefix that loading drops (so has
                  the hub Gemma 3); the transposed shape of a name in `tensors`, if loading
                  transposes such (so has the hub Qwen3-VL's experts)
    not_loaded    names in `tensors` that transformers would not load again: its undoing errs
    ignored       patterns of names that transformers passes over on purpose, such as MTP

--brief replaces `tensors` and `accepts` by their numbers. Other scripts call `ask`: one process
answers many questions.
"""

import argparse
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mquant.errors import LoaderError
from mquant.verify.loaders.install import TRANSFORMERS

INSIDE = Path(__file__).with_name("transformers_inside.py")


def ask(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return transformers' answer about each config, by the configs' ids.

    Raises LoaderError if transformers is not installed, or its process dies.
    """
    if not TRANSFORMERS.installed:
        raise LoaderError(
            "transformers is not installed in an environment of its own.",
            "Run: mquant loader install transformers (2 GB, a few minutes).",
        )
    lines = [json.dumps({"id": name, "config": config}) for name, config in configs.items()]
    done = subprocess.run(
        [str(TRANSFORMERS.python), "-I", str(INSIDE)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise LoaderError(f"transformers' process died: {last}", "Run it again with fewer configs.")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer["id"]: answer for answer in answers}


def main() -> None:
    """Print an answer a config.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG_JSON")
    parser.add_argument("--brief", action="store_true", help="numbers instead of names")
    options = parser.parse_args()
    configs = {str(path): json.loads(path.read_text()) for path in options.configs}
    for answer in ask(configs).values():
        if options.brief:
            answer |= {key: len(answer[key]) for key in ("tensors", "accepts") if key in answer}
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
