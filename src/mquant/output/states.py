"""The hidden states of a calibrated run, in a file of OUT from which a stopped run goes on.

The file is a line of JSON, and the numbers in float32:

    {"schema": "mquant.states/1", "key": "...", "layers": 3, "shape": [65536, 3072],
     "said": {...}, "sha256": "..."}

The file replaces the one of the layer before, whole or not at all. `key` tells what the states were
computed from. A file with another key, or with another sha256 of line and numbers, counts for
nothing: then the run computes all layers again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from mquant.output.disk import out_of_space, write_whole
from mquant.untrusted import parse_json

STATES: Final = "mquant-states.bin"
_SCHEMA: Final = "mquant.states/1"
_LONGEST_LINE: Final = 64_000_000
_PIECE: Final = 16 << 20

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class StatesFile:
    """The file of the states in a folder that a run has claimed."""

    def __init__(self, folder: Path, key: str) -> None:
        """Name the file; `key` tells what the states are computed from."""
        self._path = folder / STATES
        self._key = key

    def read(self) -> tuple[int, Floats, Mapping[str, Any]] | None:
        """Return layers, states [n, hidden] and what was said; None without a whole file."""
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with os.fdopen(file, "rb") as opened:
            try:
                return self._parsed(opened)
            except (OSError, ValueError):
                return None

    def _parsed(self, file: BinaryIO) -> tuple[int, Floats, Mapping[str, Any]] | None:
        line = file.readline(_LONGEST_LINE)
        left = os.fstat(file.fileno()).st_size - len(line)
        match parse_json(line):
            case {
                "layers": int(layers),
                "shape": [int(rows), int(columns)],
                "said": dict(said),
                "sha256": str(digest),
            } if 0 < left == 4 * rows * columns and rows > 0:
                states = np.fromfile(file, "<f4").reshape(rows, columns)
                if digest == self._digest(layers, states, said):
                    return layers, states, said
        return None

    def save(self, layers: int, states: Floats, said: Mapping[str, Any]) -> None:
        """Replace the file, durably. Raises OutputError."""
        head = {
            "schema": _SCHEMA,
            "key": self._key,
            "layers": layers,
            "shape": states.shape,
            "said": said,
            "sha256": self._digest(layers, states, said),
        }
        data = _bytes(states)
        pieces = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
        with out_of_space(self._path, len(data)):
            write_whole(self._path, [json.dumps(head).encode() + b"\n", *map(bytes, pieces)])

    def _digest(self, layers: int, states: Floats, said: Mapping[str, Any]) -> str:
        digest = hashlib.sha256(json.dumps([_SCHEMA, self._key, layers, said]).encode())
        digest.update(_bytes(states))
        return digest.hexdigest()

    def delete(self) -> None:
        """Delete the file, if there is one. Raises OutputError."""
        with out_of_space(self._path, 0):
            self._path.unlink(missing_ok=True)


def _bytes(states: Floats) -> memoryview:
    raw: Bytes = np.ascontiguousarray(states, "<f4").reshape(-1).view(np.uint8)
    return raw.data
