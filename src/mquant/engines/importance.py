"""The importance file: how much an error in each input channel of a quantized module counts.

The file is a safetensors file with one F32 vector [in] for every module that is quantized, under
the module's hub name without `.weight`: `model.layers.0.self_attn.q_proj`, or, for a routed expert,
`model.layers.0.block_sparse_moe.experts.3.w1`. A vector holds the mean square of the module's input
over the tokens that reach the module. Multiplying all vectors of a fused set by one factor does not
change the result. If a vector is all zeros, all channels count alike. The metadata says which
calibration data the file was measured on.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mquant.checkpoint import (
    Stamp,
    TensorInfo,
    header_length,
    parse_header,
    parse_metadata,
    stamp,
)
from mquant.checkpoint.headers import PREFIX_BYTES
from mquant.errors import DataFileError, SourceError, UsageError
from mquant.numerics.floats import Floats
from mquant.plan import Plan
from mquant.recipe import Recipe
from mquant.text import names
from mquant.untrusted import open_named, parse_json

_FIX: Final = "Write the file with mquant calibrate, from this checkpoint and this recipe."


CALIBRATION: Final = "mquant.calibration"
"""The key of the metadata that has the record of the samples, as JSON (see `tokens.samples`)."""


@dataclass(frozen=True)
class Importance:
    """An importance file, checked against a plan.

    `calibration` is what the file says of the data that it was measured on; empty if nothing.
    `of` reads one vector at a time: the vectors of a large model are 300 MB.
    """

    path: Path
    sha256: str
    vectors: dict[str, TensorInfo]
    file_stamp: Stamp
    calibration: Mapping[str, Any]

    def of(self, module: str) -> Floats:
        """Read a module's vector, float32 [in]. Any number of threads may call this method.

        Raises SourceError if the file has changed since it was checked.
        """
        info = self.vectors[module]
        with open_named(self.path, _FIX) as file:
            raw = os.pread(file.fileno(), info.nbytes, info.start)
            if stamp(os.fstat(file.fileno())) != self.file_stamp:
                raise SourceError(
                    f"{self.path.name} changed while it was read.",
                    "Wait until no process writes to the file, then run the same command again.",
                )
        return np.frombuffer(bytearray(raw), "<f4")


def read_importance(path: Path | None, plan: Plan) -> Importance | None:
    """Open the importance file that the user gave, or return None.

    Raises UsageError if the recipe does not search scales, and DataFileError as `open_importance`.
    """
    if path is None:
        return None
    if plan.recipe.scales != "search":
        raise UsageError(
            f"Recipe {plan.recipe.name} has no scales searched, so --importance has no effect.",
            "Take recipe nvfp4-opt, or leave out --importance.",
        )
    return open_importance(path, plan)


def importance_fingerprint(recipe: Recipe, importance: Importance | None) -> dict[str, str]:
    """Return the fingerprint entry of the importance file; empty if no scales are searched."""
    if recipe.scales != "search":
        return {}
    return {"importance": importance.sha256 if importance else "none"}


def weigher(recipe: Recipe, importance: Importance | None) -> Callable[[str], Floats] | None:
    """Return a function from a module's name to its importance; None if no scales are searched."""
    if recipe.scales != "search":
        return None
    from mquant.engines.stream import alike  # numba

    return importance.of if importance else alike


def open_importance(path: Path, plan: Plan) -> Importance:
    """Read the whole file once, and check its names, dtypes, shapes and values.

    Raises DataFileError if the file cannot be read, has other modules than `plan` quantizes, or
    holds NaN, infinity or a number below zero.
    """
    with open_named(path, _FIX) as file:
        file_stamp = stamp(os.fstat(file.fileno()))
        first = file.read(PREFIX_BYTES)
        raw = file.read(header_length(first, file_stamp[0], path.name))
        vectors = {info.name: info for info in parse_header(raw, file_stamp[0], path.name)}
        _check_names(path.name, vectors, plan)
        digest = hashlib.sha256(first + raw)
        for info in vectors.values():  # in the order of the file, which has no holes
            data = file.read(info.nbytes)
            digest.update(data)
            _check_values(path.name, info, data)
    return Importance(path, digest.hexdigest(), vectors, file_stamp, _calibration(raw, path.name))


def _calibration(raw: bytes, file: str) -> Mapping[str, Any]:
    try:
        stated = parse_json(parse_metadata(raw, file).get(CALIBRATION, "{}").encode())
    except ValueError:
        stated = None
    if not isinstance(stated, dict):
        raise DataFileError(f"{file} says in no valid JSON what it was measured on.", _FIX)
    return stated


def _check_names(file: str, vectors: dict[str, TensorInfo], plan: Plan) -> None:
    widths = {a.module: a.source.shape[1] for a in plan.actions if a.scheme}
    if unknown := [name for name in vectors if name not in widths]:
        raise DataFileError(f"{file} has {names(unknown)}, which the plan does not quantize.", _FIX)
    for name, info in vectors.items():
        if info.dtype != "F32" or info.shape != (widths[name],):
            raise DataFileError(
                f"{name} in {file} is {info.dtype} {list(info.shape)}; its module needs "
                f"F32 [{widths[name]}].",
                _FIX,
            )
    if missing := [name for name in widths if name not in vectors]:
        raise DataFileError(
            f"{file} lacks {len(missing):,} of {len(widths):,} modules, the first is {missing[0]}.",
            _FIX,
        )


def _check_values(file: str, info: TensorInfo, data: bytes) -> None:
    values = np.frombuffer(data, "<f4")
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        channel = int(np.argmax(wrong))
        raise DataFileError(
            f"{info.name} in {file} has {values[channel]:g} for channel {channel:,}; "
            "importance is a finite number, zero or more.",
            _FIX,
        )
