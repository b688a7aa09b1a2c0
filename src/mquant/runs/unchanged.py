"""Compare the source of a run with what is known of it, before the run and after it."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mquant.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    Assembly,
    Checkpoint,
    Folder,
    Source,
    open_checkpoint,
)
from mquant.checkpoint.hashing import differing, sha256_of
from mquant.checkpoint.hub import HubRepo
from mquant.errors import MquantError
from mquant.events import Emit, Note, silent
from mquant.text import names
from mquant.verify.digests import refuse_changed

Read = tuple[Source, str]
"""A source, and a file that was read from it."""


def check_unchanged(read: Iterable[Read]) -> None:
    """Raise SourceError if one of the files on this machine has changed since it was listed."""
    for source, path in read:
        for folder, name in _local(source, path):
            folder.check([name])


class Origin(NamedTuple):
    """A checkpoint that a run reads, and its identity when the run was planned.

    `prefix` stands before the names of its files in the source of the run.
    """

    checkpoint: Checkpoint
    identity: Mapping[str, str]
    prefix: str = ""


def digests_now(source: Source, paths: Iterable[str], emit: Emit) -> dict[str, str]:
    """Return the sha256 of the files on this machine. Raises as `check_unchanged`.

    If a file is touched later, its digest decides (see `accept_touched`).
    """
    sizes = {path: source.files[path] for path in paths if any(_local(source, path))}
    digests = dict(sha256_of(source, sizes, emit))
    check_unchanged((source, path) for path in sizes)
    return digests


def accept_touched(
    origin: Origin,
    source: Source,
    read: Iterable[str],
    sides: Iterable[str],
    digests: Mapping[str, str],
) -> dict[str, bool]:
    """Return the files whose ctime or inode has changed, and take their stamps anew.

    A hard link, a chmod or a copy changes ctime or inode, and no byte. `source` has the files of
    `origin` on this machine. `read` are the files in `source` that work units read, `sides` the
    names of side files, `digests` are known sha256 of files in `source`. If a file has another
    size, mtime, digest, header, JSON or sample, return none, and take no stamp. A file maps to True
    if its digest is known, so that no byte has changed; else bytes without a sample may have
    changed.
    """
    others = [origin.prefix + name for name in (*sides, CONFIG_NAME, INDEX_NAME)]
    found = [
        (folder, name, path)
        for path in (*read, *others)
        if path.startswith(origin.prefix) and path in source.files
        for folder, name in _local(source, path)
    ]
    if not found:
        return {}
    local, by_name = found[0][0], {name: path for _, name, path in found}
    before = local.stamps
    touched = local.look_again(by_name)
    known = {name: _digest(origin, name) or digests.get(by_name[name], "") for name in touched}
    known = {name: digest for name, digest in known.items() if digest}
    unknown = [name for name in touched if name not in known]
    if any(differing(local, known, silent)) or not _is_same(origin, local, unknown):
        local.stamps = before
        return {}
    return {by_name[name]: name in known for name in touched}


def tell_touched(touched: Mapping[str, bool], emit: Emit) -> None:
    """Say which files were touched, and what follows; `touched` as `accept_touched` returns it."""
    what = f"{names([*touched])}: ctime or inode changed (a chmod, a hard link or a copy?)"
    again = "what was made from changed shards is made again"
    emit(Note("warning", f"{what}; {'no byte changed' if all(touched.values()) else again}."))


def _digest(origin: Origin, name: str) -> str:
    source = origin.checkpoint.source
    return source.digest(name) if isinstance(source, HubRepo) else ""


def _is_same(origin: Origin, local: Folder, touched: Collection[str]) -> bool:
    """Return whether the touched files are, as far as known, those that the plan was made from."""
    if not touched:
        return True
    try:
        refuse_changed(local, silent, touched)
        now = open_checkpoint(local)
    except MquantError:
        return False
    planned = origin.checkpoint
    json = (now.config, now.index) == (planned.config, planned.index)
    return json and now.tensors == planned.tensors and local.identity() == origin.identity


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
