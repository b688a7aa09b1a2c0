"""Compare the source of a run with what is known of it, before the run and after it."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from mquant.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    Assembly,
    Checkpoint,
    Folder,
    Source,
    open_checkpoint,
)
from mquant.checkpoint.hashing import differing
from mquant.checkpoint.hub import HubRepo
from mquant.errors import MquantError, SourceError
from mquant.events import Emit, Note, silent
from mquant.text import names
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


def accept_touched(
    checkpoint: Checkpoint, local: Source, paths: Iterable[str], identity: Mapping[str, str]
) -> list[str]:
    """Return the files of `paths` whose ctime or inode has changed, and take their stamps anew.

    A hard link, a chmod or a copy changes ctime or inode, and no byte. `checkpoint` is what the
    plan was made from, and `identity` is its source's; `local` has its files on this machine. If a
    file has another size, mtime, header, JSON, sample or known digest, return none, and take no
    stamp. The other bytes of a shard without a known digest may have changed.
    """
    if not isinstance(local, Folder):
        return []
    before = local.stamps
    touched = local.look_again(path for path in paths if path in local.files)
    if touched and not _is_same(checkpoint, local, touched, identity):
        local.stamps = before
        return []
    return touched


def _is_same(
    checkpoint: Checkpoint, local: Folder, touched: Collection[str], identity: Mapping[str, str]
) -> bool:
    """Return whether the touched files are, as far as known, those that the plan was made from."""
    if isinstance(checkpoint.source, HubRepo):
        known = {path: checkpoint.source.digest(path) for path in touched}
        return not any(differing(local, known, silent))
    try:
        refuse_changed(local, silent, touched)
        now = open_checkpoint(local)
    except MquantError:
        return False
    json = (now.config, now.index) == (checkpoint.config, checkpoint.index)
    return json and now.tensors == checkpoint.tensors and local.identity() == identity


def tell_unread(source: Source, paths: Iterable[str], emit: Emit, out: Path | None = None) -> None:
    """Say what was not compared if a run finds its output `out` done; None: in a hub repo.

    The fingerprint of a source on this machine has names, sizes and samples, and no digest of its
    large files is recorded. So a file that changed after `out` was made may look the same.
    """
    local = [place for path in paths for place in _local(source, path)]
    if not local:
        return
    emit(Note("info", "The source's names, sizes and samples were compared, not every byte."))
    made = (out / CONFIG_NAME).stat().st_mtime_ns if out else math.inf
    newer = [name for folder, name in local if max(folder.stamps[name][1:3]) > made]
    if newer:
        changed = f"{names(newer)} may have changed after {out} was made"
        emit(Note("warning", f"{changed}: the times say so. If so, give --restart."))


def described_by(source: Source) -> list[Read]:
    """Return the files that a plan is made from, beside the headers."""
    return [(source, name) for name in (CONFIG_NAME, INDEX_NAME) if name in source.files]


def _local(source: Source, path: str) -> Iterator[tuple[Folder, str]]:
    if isinstance(source, Assembly):
        yield from _local(*source.parts[path])
    elif isinstance(source, Folder):
        yield source, path
