"""What `mquant eval` and `mquant compare` measured, from their JSON.

Of `mquant.eval/1`: `text` (the text's name), `tokens`, `perplexity` with `parent` and `quantized`,
`kl` (mean, in nats per token). Of `mquant.compare/1`: `roles`, a table from role to its
`relative_error` (L2 of the difference by L2 of the parent's weights). What a document leaves out,
the card does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mquant.errors import SourceError

_MOST_BYTES: Final = 50_000_000
_MOST: Final = 1e12


@dataclass(frozen=True)
class Measured:
    """Accuracy, as far as it was measured: None, and empty, where it was not."""

    text: str = ""
    tokens: int | None = None
    parent: float | None = None
    quantized: float | None = None
    kl: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def anything(self) -> bool:
        """Whether there is a figure at all."""
        return bool(self.errors) or {self.parent, self.quantized, self.kl} != {None}


def read_eval(path: Path) -> dict[str, Any]:
    """The figures of an evaluation, as keywords of `Measured`. Raises SourceError."""
    document = _document(path, "mquant.eval/1")
    perplexity = document.get("perplexity")
    perplexity = perplexity if isinstance(perplexity, dict) else {}
    text, tokens = document.get("text"), document.get("tokens")
    return {
        "text": text if isinstance(text, str) else "",
        "tokens": tokens if type(tokens) is int else None,
        "parent": _number(perplexity.get("parent")),
        "quantized": _number(perplexity.get("quantized")),
        "kl": _number(document.get("kl")),
    }


def read_compare(path: Path) -> dict[str, Any]:
    """The figures of a comparison, as keywords of `Measured`. Raises SourceError."""
    roles = _document(path, "mquant.compare/1").get("roles")
    found = {
        role: _number(table.get("relative_error"))
        for role, table in (roles if isinstance(roles, dict) else {}).items()
        if isinstance(table, dict)
    }
    return {"errors": {role: value for role, value in found.items() if value is not None}}


def _document(path: Path, schema: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MOST_BYTES))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    except (ValueError, RecursionError):
        value = None
    verb = schema.partition("/")[0].removeprefix("mquant.")
    if not isinstance(value, dict) or value.get("schema") != schema:
        raise SourceError(
            f"{path} is no result of mquant {verb} ({schema}).",
            f"Make it with: mquant {verb} ... --format json > {path.name}",
        )
    if value.get("ok") is False:
        raise SourceError(f"{path} is of a run of mquant {verb} that failed.", "Run it again.")
    return value


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _MOST else None  # NaN and infinity are not, either


__all__ = ["Measured", "read_compare", "read_eval"]
