"""The results of `mquant eval` and `mquant compare`, read from their JSON.

Keys of `mquant.eval/1`: `source`, `text.name`, `tokens`, `context`, `perplexity`,
`parent_perplexity`, `kl_nats`, `top1_agreement`. Keys of `mquant.compare/1`: `source`, and `roles`,
rows with `role` and `relative_error`. The card leaves out a value that is missing or null.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mquant.errors import SourceError
from mquant.untrusted import MAX_TEXT_BYTES, open_named, parse_json

_MOST: Final = 1e12


@dataclass(frozen=True)
class Measured:
    """The measured accuracy. None or an empty value means: not measured.

    `kl` is the mean divergence in nats per token, `agreement` the part of positions with the
    parent's most likely token, `errors` relative L2 errors of the weights by role.
    """

    text: str = ""
    tokens: int | None = None
    context: int | None = None
    perplexity: float | None = None
    parent: float | None = None
    kl: float | None = None
    agreement: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def anything(self) -> bool:
        """Whether any figure is known."""
        return bool(self.errors) or self.perplexity is not None


def read_eval(path: Path, name: str) -> dict[str, Any]:
    """Return the figures of an evaluation of the checkpoint `name`, as keywords of `Measured`.

    Raises DataFileError for a file that cannot be read, SourceError for another document.
    """
    document = _document(path, "mquant.eval/1", name)
    text = document.get("text")
    text = text.get("name") if isinstance(text, dict) else text
    return {
        "text": text if isinstance(text, str) else "",
        "tokens": _count(document.get("tokens")),
        "context": _count(document.get("context")),
        "perplexity": _number(document.get("perplexity")),
        "parent": _number(document.get("parent_perplexity")),
        "kl": _number(document.get("kl_nats")),
        "agreement": _number(document.get("top1_agreement")),
    }


def read_compare(path: Path, name: str) -> dict[str, Any]:
    """Return the figures of a comparison of the checkpoint `name`, as keywords of `Measured`.

    Raises DataFileError for a file that cannot be read, SourceError for another document.
    """
    roles = _document(path, "mquant.compare/1", name).get("roles")
    errors = {
        row["role"]: _number(row.get("relative_error"))
        for row in (roles if isinstance(roles, list) else [])
        if isinstance(row, dict) and isinstance(row.get("role"), str)
    }
    return {"errors": {role: error for role, error in errors.items() if error}}


def _document(path: Path, schema: str, name: str) -> dict[str, Any]:
    try:
        with open_named(path, "Check the path.", MAX_TEXT_BYTES) as file:
            value = parse_json(file.read())
    except ValueError:
        value = None
    verb = schema.partition("/")[0].removeprefix("mquant.")
    fix = f"Write the file with: mquant {verb} ... --format json > {path.name}"
    if not isinstance(value, dict) or value.get("schema") != schema:
        raise SourceError(f"{path} is no result of mquant {verb} ({schema}).", fix)
    if value.get("ok") is not True:
        raise SourceError(f"{path} describes a run of mquant {verb} that failed.", fix)
    source = value.get("source")
    if not isinstance(source, str) or _last(source) != _last(name):
        raise SourceError(f"{path} is about {str(source)[:96]}, not about {name}.", fix)
    return value


def _last(name: str) -> str:
    """Return a folder's name, or a repo's without its owner, so that both names compare equal."""
    return name.rpartition("/")[2]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _MOST else None  # NaN and infinity give None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST else None
