"""Compare the files of a checkpoint with the sizes and digests in its mquant.json.

A hub's listed sha256 stands for a file that the hub stores. Files without a listed digest are read:
shards only if the depth reads all data, other files always.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, Source, is_shard
from mquant.checkpoint.hashing import differing
from mquant.checkpoint.hub import HubRepo
from mquant.errors import SourceError
from mquant.events import Emit, Note, silent
from mquant.findings import Finding, Knowledge, rule
from mquant.output import RECORD, read_record
from mquant.verify.tally import Tally

_DECISIVE: Final = (CONFIG_NAME, INDEX_NAME, "hf_quant_config.json")
_AGAIN: Final = "Get the file again, or repair the checkpoint: mquant repair SRC --from PARENT."

SHARD_NOT_AS_RECORDED: Final = rule(
    "shard-not-as-recorded",
    "Every shard has the size and the sha256 that mquant.json lists.",
    "A shard that was changed, or copied badly, loads without an error and computes other numbers.",
    _AGAIN,
    knowing=("digests", "shard digests"),
)
CONFIG_NOT_AS_RECORDED: Final = rule(
    "config-not-as-recorded",
    "config.json, the index and hf_quant_config.json are the files that mquant.json lists.",
    "These files decide how loaders read the shards.",
    _AGAIN,
    knowing=("digests",),
)
SIDE_FILE_NOT_AS_RECORDED: Final = rule(
    "side-file-not-as-recorded",
    "All other files are the files that mquant.json lists.",
    "An owner may edit a tokenizer or a generation config on purpose; a bad copy looks the same.",
    "Get the file again; or, if the change was made on purpose, nothing to do.",
    severity="warning",
    knowing=("digests",),
)


@dataclass(frozen=True)
class Compared:
    """The findings of a comparison with mquant.json, and what could not be compared.

    `same` are the files that are as recorded, `shards` the shards that are not. `unknown` says why
    files were not compared.
    """

    findings: tuple[Finding, ...] = ()
    same: frozenset[str] = frozenset()
    shards: frozenset[str] = frozenset()
    unknown: Mapping[Knowledge, str] = field(default_factory=dict)


def check_digests(
    source: Source, emit: Emit, *, data: bool, only: Collection[str] | None = None
) -> Compared:
    """Compare a checkpoint, or the files of `only`, with its mquant.json.

    `data`: read the shards too, with progress. Raises SourceError if a file cannot be read.
    """
    try:
        record = read_record(source)
    except SourceError:
        return Compared(unknown={"digests": f"{RECORD} is invalid"})
    if record is None or not record.files:
        return Compared(unknown={"digests": f"no {RECORD} says what the files were"})
    listed = source.sha256 if isinstance(source, HubRepo) else {}
    unknown: dict[Knowledge, str] = {}
    tally, known, same = Tally(), dict[str, str](), set[str]()
    for path, (size, digest) in record.files.items():
        if only is not None and path not in only:
            continue
        actual = source.files.get(path)
        if actual is None:
            _add(tally, path, f"{path}, which {RECORD} lists, is missing")
        elif actual != size:
            _add(tally, path, f"{path} has {actual:,} bytes; {RECORD} says {size:,}")
        elif path not in listed and is_shard(path) and not data:
            unknown["shard digests"] = "the shards were not read at this depth"
        elif listed.get(path, digest) != digest:
            _add(tally, path, _unlike(path, listed[path], digest))
        else:
            same.add(path)
            if path not in listed:
                known[path] = digest
    if only is None and any(is_shard(path) and path not in record.files for path in source.files):
        unknown["shard digests"] = f"{RECORD} does not list every shard"
    for path, digest in differing(source, known, emit if data else silent):
        _add(tally, path, _unlike(path, digest, known[path]))
    shards = frozenset(filter(is_shard, tally.places))
    return Compared(tally.findings(), frozenset(same - tally.places), shards, unknown)


def check_measured(source: Source, parent: Source | None, emit: Emit) -> tuple[Finding, ...]:
    """Compare two checkpoints that are measured whole with their mquant.json.

    A changed file of `source` is a finding: a damage may be measured, but not unmentioned. Raises
    SourceError for a changed file of `parent`, by which `source` is measured.
    """
    if parent is not None:
        refuse_changed(parent, emit)
    return check_digests(source, emit, data=True).findings


def refuse_changed(source: Source, emit: Emit, only: Collection[str] | None = None) -> None:
    """Raise SourceError if a shard, the index or config.json is not the file in mquant.json.

    Another side file may have been edited on purpose: that is a warning. `only`: the files to
    compare; None: all. A source without mquant.json is not compared.
    """
    for finding in check_digests(source, emit, data=True, only=only).findings:
        message = f"In {source.name}, {finding.message}"
        if finding.severity == "error":
            raise SourceError(message, finding.fix)
        emit(Note("warning", message))


def _add(tally: Tally, path: str, message: str) -> None:
    other = CONFIG_NOT_AS_RECORDED if path in _DECISIVE else SIDE_FILE_NOT_AS_RECORDED
    tally.add(SHARD_NOT_AS_RECORDED if is_shard(path) else other, path, message)


def _unlike(path: str, actual: str, recorded: str) -> str:
    return f"{path} has changed: its sha256 is {actual}; {RECORD} says {recorded}"
