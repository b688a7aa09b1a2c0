"""What was found in a checkpoint: the one type of a plan's refusals and a verifier's report."""

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, odd or worth knowing.

    `rule` is a stable id; `where` names the tensor, file or key (the first of them, where there
    are many); `message` is one sentence; `fix` says what to do.
    """

    rule: str
    severity: Severity
    where: str
    message: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """The finding as it stands in every JSON envelope."""
        return asdict(self)


def names(items: list[str] | tuple[str, ...], shown: int = 3) -> str:
    """`a, b, c and 59 more`: a list of names that stays a sentence."""
    head = ", ".join(items[:shown])
    return head if len(items) <= shown else f"{head} and {len(items) - shown:,} more"


def size(count: int) -> str:
    """Bytes in decimal units: `80.14 GB`."""
    if count < 1000:
        return f"{count} B"
    units = iter(("kB", "MB", "GB", "TB", "PB"))
    value, unit = count / 1000, next(units)
    while value >= 999.5 and unit != "PB":
        value, unit = value / 1000, next(units)
    digits = 2 if value < 100 else 1
    return f"{value:,.{digits}f} {unit}"


__all__ = ["Finding", "Severity", "names", "size"]
