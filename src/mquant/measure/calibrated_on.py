"""Whether the text of an evaluation is the data that the checkpoint was calibrated on."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mquant.checkpoint import Source
from mquant.findings import Finding, rule
from mquant.output import CALIBRATION, as_table, calibration_of
from mquant.text import clean
from mquant.tokens.overlap import overlap
from mquant.tokens.tokenizer import Integers
from mquant.untrusted import open_named

_ANOTHER: Final = "Evaluate on a text that is not in the calibration data."

CALIBRATED_ON_TEXT: Final = rule(
    "calibrated-on-text",
    "A checkpoint is evaluated on another text than the one it was calibrated on.",
    "Calibration fits the weights to its data, so the checkpoint is better on these data than on "
    "others. mquant compares the file with mquant.json, and the text's tokens with a sketch of the "
    "calibrated ones: edited text, and an overlap of a few hundred tokens, may go unnoticed.",
    _ANOTHER,
    severity="warning",
    needs="run",
)


def calibrated_on(source: Source, text: Path, ids: Integers) -> Iterator[Finding]:
    """Yield a finding if mquant.json says that `text`, or a part of its tokens, was calibrated on.

    `ids` are the tokens that are evaluated. Raises DataFileError if the text cannot be read.
    """
    stated = calibration_of(source).get(CALIBRATION, {})
    data = as_table(stated.get("data"))
    share = overlap(ids, stated.get("sketch"))
    if _is_same(text, data):
        yield CALIBRATED_ON_TEXT.finding(
            text.name, f"{text.name} is the file that the checkpoint was calibrated on."
        )
    elif share:
        name = data.get("name")
        whose = f" ({clean(name[:96])})" if isinstance(name, str) else ""
        yield CALIBRATED_ON_TEXT.finding(
            text.name,
            f"About {share:.1%} of the evaluated tokens are in the data that the checkpoint was "
            f"calibrated on{whose}.",
        )


def _is_same(text: Path, data: dict[str, Any]) -> bool:
    """Return whether a text has the size and the sha256 of the calibration data."""
    with open_named(text, "Give a file of text in UTF-8.") as file:
        if file.seek(0, 2) != data.get("bytes"):
            return False
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest() == data.get("sha256")
