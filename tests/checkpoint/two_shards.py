"""The shards' names and the index of a small checkpoint of two shards."""

import json
from pathlib import Path

from mquant.checkpoint import INDEX_NAME

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def weight_map(path: Path) -> dict[str, str]:
    table: dict[str, str] = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    return table
