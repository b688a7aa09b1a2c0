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


__all__ = ["Finding", "Severity"]
