"""A hostile tokenizer takes bounded memory, or is refused in a sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hostile_inputs import tokenizer_json

TOKENIZE = """
import pathlib, resource, sys
from mquant.checkpoint import Folder
from mquant.errors import MquantError
from mquant.tokens.text_tokens import read_tokens
try:
    read_tokens(pathlib.Path(sys.argv[1]), [Folder(pathlib.Path(sys.argv[2]))], 100)
except MquantError as error:
    print(error.message)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_a_tokenizer_that_blows_a_text_up_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    grow = {"type": "Replace", "pattern": {"String": "w"}, "content": "w" * 1000}
    long = "w" * 1_000_000
    vocab = {long: 0, "w1": 1}
    hostile: list[dict[str, Any]] = [
        {"normalizer": {"type": "Sequence", "normalizers": [grow, grow, grow]}},
        {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": long}},
    ]
    (tmp_path / "text").write_text("w2 w3 " * 40_000)
    for number, change in enumerate(hostile):
        folder = tmp_path / f"src{number}"
        folder.mkdir()
        table = {**json.loads(tokenizer_json()), **change}
        (folder / "tokenizer.json").write_text(json.dumps(table))
        ran = subprocess.run(
            [sys.executable, "-c", TOKENIZE, tmp_path / "text", folder],
            capture_output=True,
            text=True,
            check=True,
        )
        message, memory = ran.stdout.splitlines()
        assert message.startswith("tokenizer.json cannot tokenize 240,000 bytes of text in ")
        assert int(memory) < 500_000  # kB
