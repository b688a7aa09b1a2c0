"""Rotary position embeddings (RoPE): the frequencies that config.json asks for, and the rotation.

The formulas are those of transformers 5.17 (`modeling_rope_utils.py`), in float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mquant.forward.refuse import refuse
from mquant.weights.decode import Floats

_KINDS: Final = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """A rotation of the first numbers of a head, in pairs, by angles that grow with the position.

    `frequencies` are those of the pairs, in radians a token. `scale` multiplies cosines and sines.
    `scores` multiplies the scores of latent attention (DeepSeek's `mscale_all_dim`, squared).
    `neighbours`: a pair is two numbers side by side, not one of each half.
    """

    frequencies: Floats
    scale: float = 1.0
    scores: float = 1.0
    neighbours: bool = False

    def angles(self, count: int) -> tuple[Floats, Floats]:
        """Return cosines and sines, each [count, 1, pairs], of positions 0 to `count` - 1."""
        angles = np.arange(count, dtype=np.float32)[:, None, None] * self.frequencies
        scale = np.float32(self.scale)
        return np.cos(angles) * scale, np.sin(angles) * scale

    def rotate(self, heads: Floats, angles: tuple[Floats, Floats]) -> None:
        """Rotate `heads` [n, heads, size] in place."""
        cos, sin = angles
        half = cos.shape[-1]
        if self.neighbours:
            first, second = heads[..., 0 : 2 * half : 2], heads[..., 1 : 2 * half : 2]
        else:
            first, second = heads[..., :half], heads[..., half : 2 * half]
        rotated = first * cos - second * sin
        second[:] = second * cos + first * sin
        first[:] = rotated


def rope_of(
    settings: Mapping[str, Any],
    size: int,
    *,
    theta: float,
    share: float,
    context: int,
    neighbours: bool,
) -> Rope:
    """Return the rotation of a head of `size` numbers.

    `settings` are the keys of config.json; without a base and a share of the head to rotate there,
    these are `theta` and `share`. Raises SourceError for a rotation that mquant does not know, or
    not for windows of `context` tokens.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = {"mrope": "default", "su": "longrope"}.get(kind, kind)
    if kind not in _KINDS:
        refuse(f"mquant does not know RoPE of type {kind}, only {', '.join(_KINDS)}")
    base = rope.get("rope_theta") or settings.get("rope_theta") or theta
    part = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    rotated = settings.get("rotary_dim") or int(size * (share if part is None else part))
    if not 0 < rotated <= size or rotated % 2:
        refuse(f"config.json rotates {rotated} of the {size} numbers of a head")
    old = rope.get("original_max_position_embeddings") or settings.get(
        "original_max_position_embeddings", settings.get("max_position_embeddings")
    )
    if rope.get("llama_4_scaling_beta") and context > old:
        refuse(f"mquant does not know the scores of positions from {old} on")
    steps = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    plain: Floats = (1.0 / np.power(np.float32(base), steps)).astype(np.float32)
    if kind == "linear":
        return Rope((plain / np.float32(rope["factor"])).astype(np.float32), neighbours=neighbours)
    if kind == "llama3":
        return Rope(_llama3(plain, rope, old), neighbours=neighbours)
    factor = rope.get("factor") or settings.get("max_position_embeddings", old or 1) / (old or 1)
    if kind == "yarn":
        all_dim = rope.get("mscale_all_dim")
        scores = _mscale(factor, all_dim) ** 2 if all_dim else 1.0
        frequencies = _yarn(plain, rope, factor, base, old)
        return Rope(frequencies, _yarn_scale(rope, factor), scores, neighbours)
    if kind == "longrope":
        stretch = np.float32(rope["long_factor" if context > old else "short_factor"])
        scale = rope.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
        return Rope((plain / stretch).astype(np.float32), float(scale), neighbours=neighbours)
    return Rope(plain, neighbours=neighbours)


def _llama3(plain: Floats, rope: Mapping[str, Any], old: int) -> Floats:
    """Stretch wavelengths much longer than the `old` context; short wavelengths stay."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = old * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    stretched: Floats = (plain * (smooth + (1 - smooth) / rope["factor"])).astype(np.float32)
    return stretched


def _yarn(plain: Floats, rope: Mapping[str, Any], factor: float, base: float, old: int) -> Floats:
    """Stretch pairs that turn at most `beta_slow` times in `old` tokens.

    Pairs that turn `beta_fast` times and more stay, and those between the two are mixed
    (https://arxiv.org/abs/2309.00071).
    """
    size = 2 * len(plain)

    def pair(turns: float) -> float:
        return size * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    steps = np.arange(len(plain), dtype=np.float32)
    ramp = np.clip((steps - low) / ((high - low) or 0.001), 0, 1).astype(np.float32)
    mixed: Floats = (plain / np.float32(factor) * ramp + plain * (1 - ramp)).astype(np.float32)
    return mixed


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
