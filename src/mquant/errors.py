"""Every way mquant can fail, as one tree.

    MquantError                 one sentence: what, where; and its fix
    ├── UsageError              the command line makes no sense            (exit 2)
    ├── SourceError             a checkpoint is missing or unreadable      (exit 1)
    │   └── HeaderError         a safetensors header is not to be trusted  (exit 1)
    ├── DataFileError           a recipe or family file is wrong           (exit 1)
    ├── Refused                 the plan must not be carried out           (exit 1)
    ├── NotJudged               what decides could not be judged          (exit 1)
    ├── OutputError             OUT is not ours, full, or went away        (exit 1)
    │   └── InUse               another process is at work in it           (exit 1)
    ├── EngineError             an engine failed or disobeyed the plan     (exit 1)
    ├── LoaderError             a loader to be asked is not there          (exit 1)
    └── MissingExtra            an optional dependency is not installed    (exit 1)

The command line prints `message`, then `fix`, and leaves with `exit_code`; nothing else in the
program prints or exits. Findings (`mquant.findings`) are what was found *in* a checkpoint; errors
are why the program stops.
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
    """The command line makes no sense."""

    exit_code = 2


class SourceError(MquantError):
    """A checkpoint is missing, gated or unreadable."""


class HeaderError(SourceError):
    """A safetensors header is malformed, or lies about its file."""


class DataFileError(MquantError):
    """A recipe or a family file is wrong."""


class Refused(MquantError):
    """A plan that must not be carried out; `findings` say why, by name."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        first = findings[0]
        more = len(findings) - 1
        tail = f" There {'are' if more > 1 else 'is'} {more} more." if more else ""
        super().__init__(f"Refused: {first.message}{tail}", first.fix)
        self.findings = tuple(findings)


class NotJudged(MquantError):
    """Something that decides whether a loader takes a checkpoint could not be judged."""


class OutputError(MquantError):
    """The output folder is not ours, is full, or went away."""


class InUse(OutputError):
    """Another process works in the output folder. The user can wait and try again."""


class EngineError(MquantError):
    """An engine failed, or wrote something other than the plan says."""


class LoaderError(MquantError):
    """A loader is not installed, or cannot be installed."""


class MissingExtra(MquantError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed.", f"Run: pip install 'mquant[{extra}]'"
        )
