"""What a plan starts from if the source is quantized, and when a BF16 parent would be better."""

from collections.abc import Iterable, Sequence
from typing import Final

from mquant.findings import Finding, rule
from mquant.plan.action import Action
from mquant.plan.members import as_stored
from mquant.plan.survey import Survey
from mquant.text import plural

SOURCE_DEQUANTIZED: Final = rule(
    "source-dequantized",
    "The source's weights are not quantized.",
    "A quantized source was already rounded once.",
    "",
    severity="info",
    needs="plan",
)
SOURCE_CAST: Final = rule(
    "source-cast",
    "Weights in MXFP4 become NVFP4 with the source's codes.",
    "Both formats hold E2M1 codes: the cast loses nothing where the exponents allow.",
    "mquant plan --exact reads the scales, and says whether any block loses.",
    severity="info",
    needs="plan",
)
SOURCE_KEPT: Final = rule(
    "source-kept",
    "Weights that the recipe wants as they are stay as the source stores them.",
    "Codes and scales keep their bytes, so these weights are those of the source.",
    "Give the role another scheme to change its weights.",
    severity="info",
    needs="plan",
)
ROUNDED_TWICE: Final = rule(
    "rounded-twice",
    "No weight that the source rounded is rounded again.",
    "The error of the second rounding comes on top of the first.",
    "If there is a BF16 parent, quantize the parent: its weights are rounded once.",
    severity="info",
    needs="plan",
)


def dequantizes(surveyed: Survey) -> list[Finding]:
    """Return a finding that names the formats to dequantize, if the source is quantized."""
    stored = [member.stored for member in surveyed.members if member.stored]
    if not stored or not surveyed.readable:
        return []
    formats = " and ".join(sorted({weight.described for weight in stored}))
    left_out = len(surveyed.checkpoint.tensors) - len(as_stored(surveyed.members))
    return [
        SOURCE_DEQUANTIZED.finding(
            stored[0].codes.name,
            f"{surveyed.checkpoint.source.name} is quantized ({formats}): {len(stored):,} weights "
            f"are dequantized to BF16 as they are read; {left_out:,} tensors that only these "
            "weights need, and quantization_config, are left out.",
        )
    ]


def starts_from(surveyed: Survey, actions: Sequence[Action]) -> list[Finding]:
    """Return findings that say what becomes of the weights that the source stores quantized.

    There is one action for each member.
    """
    if not surveyed.readable:
        return []
    name = surveyed.checkpoint.source.name
    kept = [a for a in actions if a.already]
    cast = [a for a in actions if a.cast]
    decoded = [a for a in actions if a.stored and not a.as_stored and not a.cast]
    twice = [a for a in decoded if a.scheme]
    findings = [] if kept or cast else dequantizes(surveyed)
    if decoded and not findings:
        findings.append(
            SOURCE_DEQUANTIZED.finding(
                decoded[0].source.name,
                f"{name} is quantized: {_weights(decoded)} dequantized to BF16 as they are read.",
            )
        )
    if cast:
        findings.append(
            SOURCE_CAST.finding(
                cast[0].source.name,
                f"{name} is quantized: {_weights(cast)} cast to NVFP4 with the source's codes.",
            )
        )
    if kept:
        schemes = " and ".join(sorted({a.already.name for a in kept if a.already}))
        findings.append(
            SOURCE_KEPT.finding(
                kept[0].source.name,
                f"{name} is quantized: {_weights(kept)} kept as the source stores them, as "
                f"{schemes}.",
            )
        )
    if twice:
        findings.append(
            ROUNDED_TWICE.finding(
                twice[0].source.name,
                f"{_weights(twice)} rounded a second time, so a BF16 parent of {name} would be "
                "better to start from.",
            )
        )
    return findings


def _weights(actions: Sequence[Action]) -> str:
    """Return how many weights of which formats, and the verb: `96 weights (MXFP4) are`."""
    formats = sorted(_formats(actions))
    verb = "is" if len(actions) == 1 else "are"
    return f"{plural(len(actions), 'weight')} ({' and '.join(formats)}) {verb}"


def _formats(actions: Iterable[Action]) -> set[str]:
    return {action.stored.described for action in actions if action.stored}
