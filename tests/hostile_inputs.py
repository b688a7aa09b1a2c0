"""Random hostile files that verbs read beside a checkpoint, and the commands that read the files.

One `random.Random` decides everything, as in `hostile`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import yaml
from typer.testing import CliRunner

from hostile_changes import YAMLS, dumped, twisted
from mquant.checkpoint import build_header
from mquant.cli.app import app

WORDS: Final = [f"w{number}" for number in range(30)]
TEXTS: Final = (
    b"", b"w1", b"\xff\xfe", b"w1 w2 \xe2\x82", "\u202e w1 \x1b[2J".encode(), b"w1 w2 " * 300_000,
    b"\0" * 1000, b"w" * 2_000_000, b"{" * 5000,
)  # fmt: skip
URLS: Final = (
    "", "x", "http://", "http://[", "http://127.0.0.1:99999", "http://127.0.0.1:9/\x1b[2J",
    "http://a\nb", "https://\ud800", "file:///etc/passwd", "http://u:p@127.0.0.1:9", "http://\u202e",
)  # fmt: skip
NAMES: Final = (
    "", ".", "..", "/", "a\nb", "\x1b[2J", "x" * 300, "a/" * 3000, "~nobody", "-", "org/model/x",
    "/dev/zero", "/dev/null", "/proc/self/mem", "../x", "[red]x",
)  # fmt: skip
ANSWERS: Final[tuple[Any, ...]] = (
    None, "", "[" * 5000, "\x1b[2J", "</think>" * 1000, "391", '{"a": NaN}', "\u202ex", "def f(: ",
    "```python\nwhile True: pass\n```", "9" * 5000,
)  # fmt: skip


def tokenizer_json() -> str:
    """Return a tokenizer.json of 30 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    text: str = tokenizer.to_str()
    return text


class Inputs:
    """The files in a folder, each good or hostile, and made when a command needs the file."""

    def __init__(self, where: Path, good: Mapping[str, bytes], random: Random) -> None:
        self.where, self.good, self.random = where, good, random
        self._names: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """Return the path of a file like `name`, which `write` writes; or the name of no file."""
        path = str(self.where / f"{self.random.randrange(10**9)}-{name}")
        if self.random.random() < 0.08:
            return self.random.choice(NAMES)
        self._names[path] = name
        return path

    def write(self, command: list[str]) -> None:
        """Write the files that a command reads."""
        for argument in command:
            if name := self._names.pop(argument, None):
                if self.random.random() < 0.25:
                    self._special(Path(argument))
                elif self.random.random() < 0.8:
                    Path(argument).write_bytes(self._changed(name, self.good[name]))
                else:
                    Path(argument).write_bytes(self.good[name])

    def _changed(self, name: str, raw: bytes) -> bytes:
        random = self.random
        match name.rpartition(".")[2]:
            case "yaml" if random.random() < 0.3:
                return random.choice(YAMLS).encode()
            case "yaml":
                value = _loaded_yaml(raw)
                for _ in range(random.choice((1, 1, 3))):
                    value = twisted(value, random)
                return dumped(value, random)
            case "json":
                value = json.loads(raw)
                for _ in range(random.choice((1, 1, 3))):
                    value = twisted(value, random)
                return dumped(value, random)
            case "safetensors" if random.random() < 0.6:
                return random.choice(
                    (b"", raw[:9], raw + b"x", b"\xff" * 20, raw[:-4] + b"\xff" * 4)
                )
            case "safetensors":
                size = int.from_bytes(raw[:8], "little")
                head = dumped(twisted(json.loads(raw[8 : 8 + size]), random), random)
                return len(head).to_bytes(8, "little") + head + raw[8 + size :]
            case "jsonl" if random.random() < 0.5:
                return dumped(
                    twisted({"text": "w1", "messages": [{"role": "user"}]}, random), random
                )
        return random.choice(TEXTS)

    def _special(self, path: Path) -> None:
        match self.random.randrange(8):
            case 0:
                os.mkfifo(path)
            case 1:
                path.symlink_to("/dev/zero")
            case 2:
                path.mkdir()
            case 3:
                path.symlink_to(path.name)
            case 4:
                path.touch()
                os.truncate(path, 2**40)
            case 5:
                path.touch(0)  # nobody may read the file, but root may
            case 6:
                path.symlink_to(self.where / "elsewhere" / "secret.json")
            case _:
                pass  # no such file


def good_inputs(bases: Path) -> dict[str, bytes]:
    """Return the good content of each kind of file, and write OUT with the first of two shares."""
    inputs = {f"self_attn.{part}_proj": 32 for part in "qkv"} | {"self_attn.o_proj": 64}
    for expert in range(2):
        at = f"block_sparse_moe.experts.{expert}"
        inputs |= {f"{at}.w1": 32, f"{at}.w3": 32, f"{at}.w2": 16}
    rows = [(f"model.layers.0.{name}", "F32", (wide,)) for name, wide in inputs.items()]
    header = build_header(rows, keep_order=True)[0]
    about = {"repo": "org/x", "base_model": "org/y", "companions": [{"repo": "a/b", "what": "c"}]}
    configs = Path(__file__).parent.parent / "configs"
    text = b"w1 w2 w3 w4 " * 50
    (bases / "text.txt").write_bytes(text)
    pair = [str(bases / "nvfp4"), "--against", str(bases / "bf16"), "--format", "json"]
    share = ["--recipe", "nvfp4", "--share", "1/2", "-o", str(bases / "shares")]
    CliRunner().invoke(app, ["quantize", str(bases / "bf16"), *share])
    return {
        "text.txt": text,
        "data.jsonl": b'{"text": "w1 w2 w3"}\n' * 3,
        "about.yaml": yaml.safe_dump({**about, "citation": "x"}).encode(),
        "family.yaml": (configs / "minimax_m2.yaml").read_bytes(),
        "recipe.yaml": (bases / "recipe.yaml").read_bytes(),
        "importance.safetensors": header + b"\0\0\x80?" * sum(inputs.values()),
        "eval.json": _output(["eval", *pair, "--text", str(bases / "text.txt"), "--context", "8"]),
        "compare.json": _output(["compare", *pair]),
    }


@cache
def _loaded_yaml(raw: bytes) -> Any:
    return yaml.safe_load(raw)


def _output(command: list[str]) -> bytes:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return result.stdout.encode()


def commands(
    src: str, where: Path, inputs: Inputs, random: Random, server: str
) -> Iterator[list[str]]:
    """Yield command lines of three verbs, mostly of those that `hostile.commands` leaves out."""
    out = where / "out-more"
    form = random.choice((["--format", "json"], [], ["--format", "quiet"]))
    family = ["--family", inputs("family.yaml")] if random.random() < 0.3 else []
    bf16 = str(where / "bf16")
    parent = random.choice((bf16, bf16, src))
    mine = random.choice((src, src, str(where / "nvfp4")))
    share = random.choice(("1/2", "2/1", "0/0"))
    measures = ["--tokens", "20", "--context", "8", "--text", inputs("text.txt")]
    verbs = [
        ["plan", src, "--recipe", inputs("recipe.yaml"), *family],
        ["quantize", bf16, "--recipe", inputs("recipe.yaml"), "-o", f"{out}-q", *family],
        ["quantize", random.choice((src, bf16)), "--recipe", "nvfp4-opt", "-o", f"{out}-i",
         "--importance", inputs("importance.safetensors")],
        ["quantize", src, "--recipe", "nvfp4", "-o", f"{out}-s", "--share", share],
        ["finish", str(where / "out-shares")],
        ["finish", src],
        ["compare", mine, "--against", parent, *family],
        ["eval", mine, *measures, *random.choice(([], ["--against", parent]))],
        ["report", mine, "-o", f"{out}.html", *random.choice((
            ["--against", parent, *measures], ["--eval", inputs("eval.json")],
            ["--compare", inputs("compare.json")], measures))],
        ["card", mine, "-o", f"{out}.md", *random.choice((
            ["--about", inputs("about.yaml")], ["--eval", inputs("eval.json")],
            ["--compare", inputs("compare.json")], ["--from", parent], ["--from", parent])),
         *family],
        ["export", mine, "--to", "modelopt", "-o", f"{out}-e"],
        ["dequantize", mine, "-o", f"{out}-d"],
        ["push", mine, "org/new", *random.choice(([], ["--public"], ["--dry-run"], ["--replace"]))],
        ["smoke", random.choice((server, server, server, *URLS)), "--timeout", "1",
         *random.choice(([], ["--checkpoint", mine], ["--model", "x"]))],
        ["synth", f"{out}-y", "--family", inputs("family.yaml"), "--layers", "1", "--experts", "2"],
        ["families", "check", inputs("family.yaml")],
        ["families", "show", random.choice(("minimax_m2", *NAMES))],
        ["recipes", "show", random.choice(("nvfp4", *NAMES))],
        ["families"], ["recipes"],
        ["loader", "install", random.choice(NAMES)],
        [random.choice(("inspect", "verify", "verify-ignore", "plan")), random.choice(NAMES)],
        ["repair", mine, "--from", parent, "-o", f"{out}-r", "--depth", "structure", *family],
    ]  # fmt: skip
    for command in random.sample(verbs, 3):
        inputs.write(command)
        yield [*command, *form]


def data_commands(src: str, where: Path, inputs: Inputs, random: Random) -> Iterator[list[str]]:
    """Yield the command lines of verbs that calibrate: they import torch, which takes 500 MB."""
    data = inputs("data.jsonl")
    inputs.write([data])
    if random.random() < 0.3 and Path(data).is_file():
        data = str(Path(data).rename(f"{data}{random.choice(('.txt', '.parquet'))}"))
    yield ["calibrate", random.choice((src, str(where / "bf16"))), "--data", data,
           "-o", str(where / "out.safetensors")]  # fmt: skip
    yield ["quantize", str(where / "bf16"), "--recipe", "nvfp4-w4a4", "--data", data,
           "-o", str(where / "out-data")]  # fmt: skip


def spoil_shares(where: Path, bases: Path, random: Random) -> None:
    """Copy an OUT of unfinished shares, with a hostile record of the shares."""
    if not (bases / "shares").is_dir():
        return
    shutil.copytree(bases / "shares", where / "out-shares")
    path = where / "out-shares" / "mquant-shares.json"
    if random.random() < 0.8:
        path.write_bytes(dumped(twisted(json.loads(path.read_bytes()), random), random))


def is_json(text: str) -> bool:
    """Return whether a text is JSON as RFC 8259 defines it: NaN and Infinity are none."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def control_characters(text: str) -> bool:
    """Return whether a terminal would obey a character of the text."""
    return bool(re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text))
