"""The tree of all errors that mquant raises.

    MquantError                 one sentence (what, where) and a fix
    ├── UsageError              the command line is wrong                  (exit 2)
    ├── SourceError             a checkpoint is missing or unreadable      (exit 1)
    │   └── HeaderError         a safetensors header is invalid            (exit 1)
    ├── DataFileError           a file that the user named is wrong        (exit 1)
    ├── Refused                 the plan must not be carried out           (exit 1)
    ├── NotJudged               a deciding check could not be made         (exit 1)
    ├── OutputError             OUT is foreign, full, or disappeared       (exit 1)
    │   └── InUse               another process works in OUT               (exit 1)
    ├── EngineError             an engine failed or left the plan          (exit 1)
    ├── LoaderError             a loader is not installed                  (exit 1)
    └── MissingExtra            an optional dependency is not installed    (exit 1)

The command line prints `message`, then `fix`, and exits with `exit_code`; nothing else in the
program prints or exits. A finding (`mquant.findings`) describes a checkpoint; an error says why the
program stops.
"""

from collections.abc import Sequence

from mquant.findings import Finding


class MquantError(Exception):
    """An error that a person can act on: `message` says what and where, `fix` what to do."""

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class UsageError(MquantError):
    """A wrong command line."""

    exit_code = 2


class SourceError(MquantError):
    """A missing, gated or unreadable checkpoint."""


class HeaderError(SourceError):
    """A safetensors header that is malformed, or does not match its file."""


class DataFileError(MquantError):
    """A wrong file that the user named: a recipe, a family, a text, an importance file."""


class Refused(MquantError):
    """A plan that must not be carried out; `findings` say why, by name."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        first = findings[0]
        tail = f" There are {len(findings)} findings." if len(findings) > 1 else ""
        super().__init__(f"Refused: {first.message}{tail}", first.fix)
        self.findings = tuple(findings)


class NotJudged(MquantError):
    """A check that could not be made, but decides whether a loader accepts a checkpoint."""


class OutputError(MquantError):
    """An output folder that another program wrote, that is full, or that disappeared."""


class InUse(OutputError):
    """An output folder in which another process works. The user can wait and try again."""


class EngineError(MquantError):
    """A failure of an engine, or an output of an engine that differs from the plan."""


class LoaderError(MquantError):
    """A loader that is not installed, or cannot be installed."""


class MissingExtra(MquantError):
    """An optional dependency that is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed.", f"Run: pip install 'mquant[{extra}]'"
        )
