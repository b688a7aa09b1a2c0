"""Compare the source of a run with what is known of it, before the run and after it."""

from collections.abc import Collection, Iterable, Iterator

from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, Assembly, Folder, Source
from mquant.errors import SourceError
from mquant.events import Emit, Note
from mquant.verify.digests import check_digests

Read = tuple[Source, str]
"""A source, and a file that was read from it."""


def refuse_changed(source: Source, emit: Emit, only: Collection[str] | None = None) -> None:
    """Raise SourceError if a shard, the index or config.json is not the file in mquant.json.

    Another side file may have been edited on purpose: that is a warning. `only`: the files to
    compare; None: all. A source without mquant.json is not compared.
    """
    for finding in check_digests(source, emit, data=True, only=only).findings:
        if finding.severity == "error":
            raise SourceError(finding.message, finding.fix)
        emit(Note("warning", finding.message))


def check_unchanged(read: Iterable[Read]) -> None:
    """Raise SourceError if one of the files on this machine has changed since it was listed."""
    for source, path in read:
        for folder, name in _local(source, path):
            folder.check([name])


def described_by(source: Source) -> list[Read]:
    """Return the files that a plan is made from, beside the headers."""
    return [(source, name) for name in (CONFIG_NAME, INDEX_NAME) if name in source.files]


def _local(source: Source, path: str) -> Iterator[tuple[Folder, str]]:
    if isinstance(source, Assembly):
        yield from _local(*source.parts[path])
    elif isinstance(source, Folder):
        yield source, path
