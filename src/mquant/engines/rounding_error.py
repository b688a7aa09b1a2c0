"""How far the stream engine's result is from the weights that a source stores quantized."""

from collections import deque

import numpy as np

from mquant.engines.dequantized_rows import decoded
from mquant.engines.stream import PIECE, Importance, Reader, make
from mquant.numerics.dequantize import decode_fp4, decode_fp8, nvfp4_table
from mquant.numerics.floats import BF16, FLOATS, Array, Words
from mquant.plan import Action, WorkUnit


def squared_error(
    reader: Reader, unit: WorkUnit, importance: Importance | None = None
) -> tuple[float, float]:
    """Quantize a work unit of stored weights; return sums of squares: of the error, of the source.

    The source counts as BF16, as the engine reads it. Memory holds the set three times. Raises
    SourceError as `make`.
    """
    made = make(reader, unit, importance)
    error = power = 0.0
    for action in unit.actions:
        source, result = _source(reader, action), _result(action, made)
        for start in range(0, len(source), PIECE):
            part = slice(start, start + PIECE)
            before, after = (
                BF16.values(words[part]).astype(np.float64) for words in (source, result)
            )
            error += float(np.sum(np.square(after - before)))
            power += float(np.sum(np.square(before)))
    return error, power


def _source(reader: Reader, action: Action) -> Words:
    codes = np.empty(max(PIECE // 2, action.source.shape[1]), np.uint8)
    weight = np.empty(action.weight_bytes, np.uint8)
    deque(decoded(reader, action, weight, codes, PIECE, again=False), maxlen=0)
    return weight.view(BF16.word)


def _result(action: Action, made: dict[str, bytes]) -> Words:
    words = np.empty(action.source.elements, np.uint16)
    outputs = [(output, made[output.name]) for output in action.outputs]
    codes, scales = (np.frombuffer(raw, np.uint8) for _, raw in outputs[:2])
    if action.scheme and action.scheme.format == "nvfp4-pack-quantized":
        (scale,) = np.frombuffer(outputs[2][1], "<f4")
        decode_fp4(codes, scales, nvfp4_table(float(scale), divide=True), words)
    else:
        output, raw = outputs[1]
        values: Array = FLOATS[output.dtype].values(FLOATS[output.dtype].words(raw))
        block = action.scheme.config_group["weights"]["block_structure"] if action.scheme else None
        shape = (block[0], block[1]) if block else (1, action.source.shape[1])
        values = values.astype(np.float32).reshape(output.shape)
        decode_fp8(codes.reshape(action.source.shape), values, shape, 0, words)
    return words
