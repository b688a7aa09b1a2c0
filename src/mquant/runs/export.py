"""Export NVFP4 to ModelOpt's layout, for TensorRT-LLM, and back to compressed-tensors' layout."""

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Unpack

import numpy as np

from mquant.checkpoint import Source, TensorInfo, open_checkpoint, reader_of
from mquant.errors import Refused
from mquant.events import silent
from mquant.family import Family
from mquant.findings import Finding
from mquant.loader_model.modules import MODELOPT_NAME
from mquant.loader_model.storage import SUFFIXES, StorageFormat
from mquant.numerics.reciprocal import reciprocal, recovered
from mquant.output import RECIPE_NAME, as_table, known_table
from mquant.plan import Target, hf_quant_config, make_export_plan, scalars, survey_for
from mquant.runs.convert import convert
from mquant.runs.run import Result, RunOptions
from mquant.verify.numbers import GLOBAL_SCALE_INVALID

_ORIGIN: Final = "compressed_tensors"
"""The key of mquant.json that holds the quantization config and scales from before an export."""


def export(
    source: Source,
    families: Mapping[str, Family],
    target: Target,
    out: Path,
    **options: Unpack[RunOptions],
) -> Result:
    """Write a checkpoint in the layout of `target` into `out`, or resume an earlier run.

    Codes and block scales are copied; global scales become their reciprocals. Raises Refused if the
    checkpoint is not in the other layout, or if a scale has no reciprocal; and as `convert`.
    """
    checkpoint = open_checkpoint(source)
    surveyed = survey_for(checkpoint, families, target)
    folder = source.materialize(options.get("emit", silent))
    origin = (
        as_table(known_table(folder).get(_ORIGIN)) if target is Target.COMPRESSED_TENSORS else {}
    )
    known = origin.get("scales")
    numbers = _numbers(folder, list(scalars(surveyed)))
    values, irreversible = _reciprocals(numbers, target, known if isinstance(known, dict) else {})
    plan = make_export_plan(surveyed, target, values, _declared(origin))
    files, record = dict[str, bytes](), dict[str, Any]()
    if RECIPE_NAME in folder.files:  # the recipe still describes the same codes
        files[RECIPE_NAME] = folder.read(RECIPE_NAME)
    if target is Target.MODELOPT:
        text = json.dumps(hf_quant_config(plan), indent=2, ensure_ascii=False) + "\n"
        files[MODELOPT_NAME] = text.encode()
        record[_ORIGIN] = {
            "quantization_config": checkpoint.config.get("quantization_config"),
            "scales": irreversible,
        }
    return convert(plan, out, "export", files=files, record=record, **options)


def _numbers(folder: Source, tensors: list[TensorInfo]) -> dict[str, np.float32]:
    """Return the values of F32 scalars, by name."""
    scales: dict[str, np.float32] = {}
    with closing(reader_of(folder)) as reader:
        for info in tensors:
            raw = bytearray(4)
            reader.read_into(info.shard, info.start, memoryview(raw))
            scales[info.name] = np.frombuffer(raw, "<f4")[0]
    return scales


def _reciprocals(
    numbers: Mapping[str, np.float32], target: Target, known: Mapping[str, Any]
) -> tuple[dict[str, bytes], dict[str, float]]:
    """Return the bytes of every reciprocal, and the numbers that no reciprocal gives back, by name.

    `known` has such numbers of an earlier export, by their names in compressed-tensors. Raises
    Refused for a number without a finite, positive reciprocal.
    """
    values: dict[str, bytes] = {}
    irreversible: dict[str, float] = {}
    for name, number in numbers.items():
        inverse = reciprocal(number)
        if not (number > 0 and np.isfinite(inverse) and inverse > 0):
            raise Refused([_invalid(name, number)])
        if target is Target.COMPRESSED_TENSORS:
            inverse = _known(name, number, known)
        elif recovered(inverse) != number:
            irreversible[name] = float(number)
        values[name] = np.array(inverse, "<f4").tobytes()
    return values, irreversible


def _known(name: str, factor: np.float32, known: Mapping[str, Any]) -> np.float32:
    """Return the number that was exported as `factor`: from mquant.json, else the likeliest."""
    module, _, suffix = name.rpartition(".")
    as_modelopt = SUFFIXES[StorageFormat.MODELOPT_NVFP4]
    exported = SUFFIXES[StorageFormat.NVFP4][as_modelopt.index(suffix)]
    number = known.get(f"{module}.{exported}")
    if isinstance(number, float) and reciprocal(np.float32(number)) == factor:
        return np.float32(number)
    return recovered(factor)


def _invalid(name: str, number: np.float32) -> Finding:
    return GLOBAL_SCALE_INVALID.finding(
        name,
        f"{name} is {number}: it has no reciprocal that is a number above zero.",
        "Get the checkpoint again, or repair it: mquant repair.",
    )


def _declared(origin: Mapping[str, Any]) -> Mapping[str, Any] | None:
    config = origin.get("quantization_config")
    if isinstance(config, dict) and config.get("quant_method") == Target.COMPRESSED_TENSORS:
        return config
    return None
