"""Publish a checkpoint: push verified bytes only; no half-uploaded repo looks complete.

All files but the index and config.json are uploaded first, and compared with mquant.json in the
repo; only then the index and config.json follow in one commit, in this order. Then the repo itself
is verified. Files that the repo already has are not uploaded again, so a second run resumes the
first.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Final

from mquant import __version__
from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, Folder, is_shard
from mquant.checkpoint.hashing import sha256_of
from mquant.checkpoint.hub import HubRepo
from mquant.checkpoint.upload import HubWriter
from mquant.data_files import cache
from mquant.errors import OutputError, SourceError
from mquant.events import Emit, Note, Progress
from mquant.family import Family
from mquant.output import LAST, RECORD, Record, read_record
from mquant.output.disk import read_own, write_whole
from mquant.text import names, plural
from mquant.untrusted import parse_json
from mquant.verify.judge import Depth, Report, verify

_MOST_NOTE_BYTES: Final = 64_000_000
# Files that people add to a finished checkpoint, and that no loader reads.
_PAPERS: Final = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf")
_TITLES: Final = ("LICENSE", "LICENCE", "NOTICE")
_NOT_LAST: Final = "Add files; index and config.json come last"


@dataclass(frozen=True)
class Shipment:
    """The folder of the checkpoint to publish, and the record in mquant.json."""

    source: Folder
    record: Record

    @property
    def files(self) -> Mapping[str, int]:
        """The size in bytes of every file, by path."""
        return self.source.files

    @property
    def last(self) -> tuple[str, ...]:
        """The files of the last commit, in order."""
        return tuple(name for name in LAST if name in self.files)

    @property
    def first(self) -> tuple[str, ...]:
        """The files that are uploaded before the last commit."""
        return tuple(name for name in self.files if name not in LAST)

    @cached_property
    def key(self) -> str:
        """The sha256 of mquant.json, which lists the sha256 of the files that mquant wrote."""
        return hashlib.sha256(self.source.read(RECORD)).hexdigest()

    @cached_property
    def sha256(self) -> Mapping[str, str]:
        """The sha256 of each file that mquant wrote, as mquant.json says."""
        return {RECORD: self.key} | {name: sha for name, (_, sha) in self.record.files.items()}


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the verdicts on the local files and on the repo.

    `remote` is None if the local files are broken: then nothing was uploaded. `local` is None if an
    earlier run verified the local files. `sent` lists the files that the repo did not have.
    """

    local: Report | None
    remote: Report | None
    page: str
    private: bool
    sent: tuple[str, ...]


def load(source: Folder) -> Shipment:
    """Return the files to publish. Raises SourceError if the files differ from mquant.json.

    Only names and sizes are compared here; `push` compares the content.
    """
    record = read_record(source)
    if record is None:
        raise SourceError(
            f"{source.name} has no {RECORD}, which lists the checkpoint's files and their sha256.",
            "Write a checkpoint with mquant quantize, or repair this one with mquant repair.",
        )
    sizes = {name: size for name, (size, _) in record.files.items()}
    missing = [name for name in sizes if name not in source.files]
    if missing or CONFIG_NAME not in sizes:
        raise SourceError(
            f"{source.name} lacks {names(missing or [CONFIG_NAME])}, which its {RECORD} names.",
            "Run the command that wrote the checkpoint again, then push the whole checkpoint.",
        )
    changed = [name for name, size in sizes.items() if source.files[name] != size]
    if changed:
        raise _changed(source, changed[0])
    unlisted = [name for name in source.files if name not in sizes and not _is_paper(name)]
    if unlisted:
        raise SourceError(
            f"{names(unlisted)} in {source.name} {'are' if len(unlisted) > 1 else 'is'} not in its "
            f"{RECORD}.",
            "Move what mquant did not write to another folder: a loader may read such files.",
        )
    return Shipment(source, record)


def push(
    shipment: Shipment,
    repo: str,
    families: Mapping[str, Family],
    emit: Emit,
    *,
    public: bool = False,
    replace: bool = False,
) -> Pushed:
    """Verify the files, upload those that the repo lacks, and verify the repo.

    Raises OutputError without a token; for a public repo, or a repo that holds another checkpoint,
    unless the options allow it; and if the hub refuses or cannot be reached. Raises SourceError if
    the files differ from mquant.json.
    """
    writer = HubWriter(repo, shipment.files, emit)
    hub = writer.repo
    private = hub.private if hub else not public
    if not private and not public:
        raise OutputError(
            f"{repo} is public: a push publishes the checkpoint.",
            "Give --public to publish the checkpoint, or give another repo.",
        )
    note = cache() / "push" / f"{shipment.key}.json"
    missing = _missing(shipment, hub)
    replacing = _is_other(hub, missing, _extra(shipment, hub))
    if replacing and not replace:
        raise OutputError(
            f"{repo} holds another checkpoint.",
            "Give another repo, or --replace: the repo lacks config.json until the upload ends.",
        )
    local = _judge(shipment, families, note, emit)
    if local is not None and local.count("error"):
        return Pushed(local, None, writer.page, private, ())
    if local is not None:
        local.raise_if_undecided()
    if hub is None:
        writer.create(private=private)
    elif public and private:
        emit(Note("warning", f"{repo} stays private: change its visibility in its settings."))
    if replacing and hub is not None:
        removed = [name for name in reversed(LAST) if name in hub.files]
        if removed:
            writer.commit("Remove config.json until all files are uploaded", removed)
    _send(shipment, writer, missing, emit)
    remote = verify(writer.made, families, Depth.STRUCTURE, emit=emit)
    with suppress(OSError):  # a cache that cannot be written has no note
        note.unlink(missing_ok=True)
    return Pushed(local, remote, writer.page, writer.made.private, tuple(missing))


def _send(shipment: Shipment, writer: HubWriter, missing: list[str], emit: Emit) -> None:
    """Upload the missing files; the last commit follows the commit that was compared."""
    first = [name for name in shipment.first if name in missing]
    total, done = sum(shipment.files[name] for name in first), 0
    for name in first:
        emit(Progress("upload", done, total))
        writer.upload(name, shipment.source.path(name), shipment.sha256.get(name))
        done += shipment.files[name]
        if writer.full:
            writer.commit(_NOT_LAST)
    writer.commit(_NOT_LAST)
    emit(Progress("upload", done, total))
    _check_sent(shipment, writer.made, shipment.first)
    for name in shipment.last:
        if not _same(shipment, writer.made, name):
            writer.upload(name, shipment.source.read(name), shipment.sha256.get(name))
    extra = _extra(shipment, writer.made)
    writer.commit("Add index and config.json: the checkpoint is complete", extra)
    _check_sent(shipment, writer.made, shipment.last)


def _check_sent(shipment: Shipment, hub: HubRepo, sent: tuple[str, ...]) -> None:
    unsent = [name for name in sent if not _same(shipment, hub, name)]
    if unsent:
        raise OutputError(
            f"{hub.repo_id} does not have the recorded content of {names(unsent)}.",
            "Run the same command again to upload the missing files.",
        )


def _missing(shipment: Shipment, hub: HubRepo | None) -> list[str]:
    """Return the files that the repo lacks, or has with other content."""
    return [name for name in shipment.files if hub is None or not _same(shipment, hub, name)]


def _same(shipment: Shipment, hub: HubRepo, name: str) -> bool:
    """Return whether the repo has a file's recorded content, or the local content of a paper."""
    if hub.files.get(name) != shipment.files[name]:
        return False
    recorded = shipment.sha256.get(name)
    if recorded and name in hub.sha256:
        return hub.sha256[name] == recorded
    content = shipment.source.read(name)  # git's id says nothing of a sha256
    if recorded and hashlib.sha256(content).hexdigest() != recorded:
        raise _changed(shipment.source, name)
    return hub.lists(name, content)


def _extra(shipment: Shipment, hub: HubRepo | None) -> list[str]:
    """Return the repo's shards and index that the checkpoint lacks: loaders would read them."""
    files = hub.files if hub else {}
    return [
        name
        for name in files
        if name not in shipment.files and (is_shard(name) or name == INDEX_NAME)
    ]


def _is_other(hub: HubRepo | None, missing: list[str], extra: list[str]) -> bool:
    """Return whether the repo holds another checkpoint: not only the card and side files differ."""
    differs = any(is_shard(name) or name in LAST for name in missing)
    return bool(extra) or (hub is not None and CONFIG_NAME in hub.files and differs)


def _judge(
    shipment: Shipment, families: Mapping[str, Family], note: Path, emit: Emit
) -> Report | None:
    """Compare all bytes with mquant.json and verify the files; None if an earlier run did so.

    A run that finds no error writes `note`: the release of mquant, and the files' sizes and times.
    """
    stamps = {name: list(stamp) for name, stamp in shipment.source.stamps.items()}
    state = {"mquant": __version__, "stamps": stamps}
    if _read_note(note) == state:
        emit(Note("info", "These bytes were verified before."))
        return None
    _check_bytes(shipment, emit)
    report = verify(shipment.source, families, Depth.NUMBERS, emit=emit)
    if not report.count("error") and not report.undecided:
        with suppress(OSError):  # the note only saves the next push some time
            write_whole(note, [json.dumps(state).encode()])
    return report


def _read_note(note: Path) -> object:
    """Return what an earlier run wrote to `note`; None if there is no note, or no valid JSON."""
    raw = read_own(note, _MOST_NOTE_BYTES)
    try:
        return None if raw is None else parse_json(raw)
    except ValueError:
        return None


def _check_bytes(shipment: Shipment, emit: Emit) -> None:
    files = shipment.record.files
    sizes = {name: size for name, (size, _) in files.items()}
    for name, digest in sha256_of(shipment.source, sizes, emit):
        if digest != files[name][1]:
            raise _changed(shipment.source, name)
    emit(Note("info", f"sha256 of {plural(len(files), 'file')} as {RECORD} says."))


def _changed(source: Folder, name: str) -> SourceError:
    return SourceError(
        f"{name} in {source.name} is not the file that {RECORD} says: the file was changed.",
        "Write the checkpoint again, or copy the file again; mquant verify says what is wrong.",
    )


def _is_paper(name: str) -> bool:
    file = PurePosixPath(name).name
    return name == RECORD or file.lower().endswith(_PAPERS) or file.upper().startswith(_TITLES)
