"""A checkpoint as its headers, index and config describe it; no weight is read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from threading import Lock
from typing import Any, Final, TypeVar

from mquant.checkpoint.headers import PREFIX_BYTES, TensorInfo, header_length, parse_header
from mquant.checkpoint.source import Source
from mquant.errors import HeaderError, SourceError
from mquant.findings import Finding, Rule, rule
from mquant.text import names
from mquant.untrusted import INDEX, MAX_INDEX_BYTES, MAX_TENSORS, RECORD, TooMuch, parse_json

INDEX_NAME: Final = "model.safetensors.index.json"
CONFIG_NAME: Final = "config.json"
MAX_CONFIG_BYTES: Final = 8_000_000
MAX_TOKENIZER_BYTES: Final = 64_000_000
# Header bytes of all shards: 1,000,000 tensors, plus half as much for long names.
MAX_HEADER_BYTES_IN_ALL: Final = 200_000_000
MAX_SHARDS: Final = 10_000
# Prefix and header usually come together, in one request to a hub or one local read.
FIRST_READ: Final = 64 * 1024

_FEWER_SHARDS: Final = (
    "Remove the shards that do not belong to the checkpoint; the largest known model has 497,387 "
    "tensors."
)

T = TypeVar("T")
R = TypeVar("R")

SHARD_DAMAGED: Final = rule(
    "shard-damaged",
    "Every shard's header is valid and describes the file as it is, to its last byte.",
    "A truncated or damaged shard does not load, or loads wrong numbers.",
    "Download the shard again.",
    if_loads="error",
)
SHARD_MISSING: Final = rule(
    "shard-missing",
    "Every shard that the index names exists.",
    "Loaders stop, or leave the shard's tensors uninitialised.",
    "Download the missing shards.",
    if_loads="error",
)
INDEX_MISSING: Final = rule(
    "index-missing",
    "Several shards come with an index.",
    "vLLM reads every shard in the folder; other loaders look for a single shard, and stop.",
    "Download model.safetensors.index.json too.",
    severity="warning",
    as_source="error",
)
TENSOR_STORED_TWICE: Final = rule(
    "tensor-stored-twice",
    "Every tensor is stored once.",
    "The order of files decides which copy is loaded.",
    "Remove the shard that does not belong to this checkpoint.",
)
INDEX_WITHOUT_TENSOR: Final = rule(
    "index-without-tensor",
    "Every tensor that the index lists is in a shard.",
    "vLLM reads the shards, other loaders stop. (A tensor that the model lacks is an error of "
    "its own.)",
    "Get the shards and the index again, from one revision.",
    severity="warning",
    as_source="error",
)
INDEX_WRONG_SHARD: Final = rule(
    "index-wrong-shard",
    "The index names the shard that holds the tensor.",
    "vLLM reads the shards; tools that read by the index fail, or find nothing.",
    "Get the shards and the index again, from one revision.",
    severity="warning",
    as_source="error",
)
SHARD_NOT_IN_INDEX: Final = rule(
    "shard-not-in-index",
    "The index names every shard.",
    "Loaders skip the shard: the shard costs a download, or should have been loaded.",
    "Remove the file, or get the index again, from one revision.",
    severity="warning",
)
TENSOR_NOT_IN_INDEX: Final = rule(
    "tensor-not-in-index",
    "Every tensor in the shards is in the index.",
    "vLLM loads the tensor, other loaders do not: they load different models.",
    "Get the shards and the index again, from one revision.",
    severity="warning",
    as_source="error",
)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that headers, index and config.json say of a checkpoint.

    `tensors` is keyed by name, in natural order of shards and positions. `config` is the raw JSON.
    `findings` are disagreements of index and headers. `total_size` is the index's claim of all
    tensors' bytes, if the index has a number; `index` maps each tensor to the shard that the index
    claims. `again` are tensors stored once more, under the name of a tensor in `tensors`.
    """

    source: Source
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]
    findings: tuple[Finding, ...]
    total_size: int | None = None
    index: Mapping[str, str] = field(default_factory=dict)
    again: tuple[TensorInfo, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def lost_shards(self) -> bool:
        """Whether shards are missing or damaged; a lost shard may have held any missing tensor."""
        lost = {SHARD_DAMAGED.id, SHARD_MISSING.id}
        return any(finding.rule in lost for finding in self.findings)

    @property
    def side_files(self) -> tuple[str, ...]:
        """Files that are neither weights nor their index nor config.json."""
        return tuple(
            path
            for path in self.source.files
            if path != CONFIG_NAME and not is_weights(path) and "/." not in f"/{path}"
        )


def open_checkpoint(source: Source, *, tolerant: bool = False) -> Checkpoint:
    """Read config.json, the index and every header of a checkpoint.

    Raises SourceError if config.json is missing, no shard exists, or a file is unreadable, and
    HeaderError if a header is invalid. Missing shards, disagreements of index and headers, and
    tensors stored twice are findings. With `tolerant`, which is for judging, an invalid header is a
    finding too, and all the shards that an index names may be missing.
    """
    if CONFIG_NAME not in source.files:
        raise SourceError(
            f"{source.name} has no config.json, so it is no checkpoint.",
            "Give the folder that holds config.json and the .safetensors files.",
        )
    config = read_json(source, CONFIG_NAME)
    index, total_size = _read_index(source)
    shards = tuple(sorted(path for path in source.files if is_shard(path)))
    if not shards and not (tolerant and index):
        raise SourceError(
            f"{source.name} has no .safetensors file.",
            "Download the weights, or convert them to safetensors first.",
        )
    shards, findings = _named(shards, index)
    if len(shards) > MAX_SHARDS:
        raise SourceError(
            f"{source.name} has {len(shards):,} shards; mquant reads {MAX_SHARDS:,} at most.",
            "Write the weights into larger files.",
        )
    tensors: dict[str, TensorInfo] = {}
    again: list[TensorInfo] = []
    unreadable: list[Finding] = []
    for tensor in _read_headers(source, shards, unreadable if tolerant else None):
        if tensor.name in tensors:
            findings.append(_stored_twice(tensor, tensors[tensor.name]))
            again.append(tensor)
        else:
            tensors[tensor.name] = tensor
    findings += sorted(unreadable, key=lambda finding: finding.where)
    if index is not None:
        index = _with_names_of(tensors, index)
        damaged = {finding.where for finding in unreadable}
        readable = {name: shard for name, shard in index.items() if shard not in damaged}
        findings += _index_findings(readable, tensors, source.files)
    elif len(shards) > 1:
        findings.append(
            INDEX_MISSING.finding(
                INDEX_NAME,
                f"There are {len(shards)} shards but no {INDEX_NAME}.",
                f"Download {INDEX_NAME} too.",
                "source",
            )
        )
    return Checkpoint(
        source, config, tensors, shards, tuple(findings), total_size, index or {}, tuple(again)
    )


def is_weights(path: str) -> bool:
    """Return whether a file's name is that of weights, in any format, or of their index."""
    endings = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".h5")
    return path.endswith(endings)


def has_chat_template(source: Source) -> bool:
    """Return whether tokenizer_config.json holds a chat template, as older tools wrote it."""
    name = "tokenizer_config.json"
    if not 0 < source.files.get(name, 0) <= MAX_TOKENIZER_BYTES:
        return False
    return b'"chat_template"' in source.read(name)


def read_header(source: Source, shard: str) -> tuple[TensorInfo, ...]:
    """Read the tensors of one shard."""
    return parse_header(read_first(source, shard)[PREFIX_BYTES:], source.files[shard], shard)


def read_first(source: Source, shard: str) -> bytes:
    """Return a shard's bytes before its data.

    Raises HeaderError if the header's length cannot be true.
    """
    first, end = _beginning(source, shard)
    return first[:end] if end <= len(first) else source.read(shard, 0, end)


def read_json(source: Source, path: str) -> dict[str, Any]:
    """Read a JSON object of the checkpoint. Raises SourceError if the file holds something else."""
    most, limits, too_large = MAX_CONFIG_BYTES, RECORD, f"{path} is too large to be valid."
    fix = "Get the file again."
    if path == INDEX_NAME:
        most, limits, fix = MAX_INDEX_BYTES, INDEX, _FEWER_SHARDS
        too_large = f"{path} is too large: mquant reads {MAX_TENSORS:,} tensors at most."
    if source.files.get(path, 0) > most:
        raise SourceError(too_large, fix)
    try:
        value = parse_json(source.read(path), limits, most_bytes=most)
    except TooMuch:
        raise SourceError(too_large, fix) from None
    except ValueError:
        raise SourceError(f"{path} is not valid JSON.", "Get the file again.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object.", "Get the file again.")
    return value


def _beginning(source: Source, shard: str) -> tuple[bytes, int]:
    """Return a shard's first bytes, and the end of its header, which may lie beyond these bytes."""
    size = source.files[shard]
    first = source.read(shard, 0, min(FIRST_READ, size))
    return first, PREFIX_BYTES + header_length(first[:PREFIX_BYTES], size, shard)


def _read_headers(
    source: Source, shards: tuple[str, ...], unreadable: list[Finding] | None
) -> Iterator[TensorInfo]:
    """Yield every tensor of the shards, or add a finding to `unreadable` for an invalid header.

    The headers of all shards are counted before the first is parsed, because parsed headers take
    several times as much memory; then one after the other is parsed. Without `unreadable`, an
    invalid header raises HeaderError. A network or disk error always raises: such an error says
    nothing about the shard.
    """
    allowed = _Allowance(source.name)

    def read(shard: str) -> bytes | HeaderError:
        try:
            first, end = _beginning(source, shard)
        except HeaderError as error:
            return error
        allowed.spend(nbytes=end)
        read_whole = end > len(first)
        raw = source.read(shard, PREFIX_BYTES, end) if read_whole else first[PREFIX_BYTES:end]
        allowed.spend(tensors=raw.count(b"{") - 2)  # the header's own, and that of its metadata
        return raw

    raws = _map(read, shards)
    raws.reverse()
    for shard in shards:
        raw = raws.pop()
        try:
            if isinstance(raw, HeaderError):
                raise raw
            yield from parse_header(raw, source.files[shard], shard)
        except HeaderError as error:
            if unreadable is None:
                raise
            unreadable.append(SHARD_DAMAGED.finding(shard, error.message, error.fix))


class _Allowance:
    """The limit on all headers of a checkpoint together. Threads share the limit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nbytes, self._tensors = MAX_HEADER_BYTES_IN_ALL, MAX_TENSORS
        self._lock = Lock()

    def spend(self, *, nbytes: int = 0, tensors: int = 0) -> None:
        with self._lock:
            self._nbytes -= nbytes
            self._tensors -= max(tensors, 0)
            if self._nbytes < 0 or self._tensors < 0:
                raise SourceError(
                    f"The headers of {self._name} hold more than any checkpoint's: more than "
                    f"{MAX_TENSORS:,} tensors, or {MAX_HEADER_BYTES_IN_ALL:,} bytes.",
                    _FEWER_SHARDS,
                )


def _with_names_of(tensors: Mapping[str, TensorInfo], index: Mapping[str, str]) -> dict[str, str]:
    """Return the index with the tensors' own strings: JSON has a string for each name and shard."""
    shards: dict[str, str] = {}
    return {
        tensors[name].name if name in tensors else name: shards.setdefault(shard, shard)
        for name, shard in index.items()
    }


def _read_index(source: Source) -> tuple[dict[str, str] | None, int | None]:
    if INDEX_NAME not in source.files:
        return None, None
    index = read_json(source, INDEX_NAME)
    table, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(table, dict) or not all(
        isinstance(shard, str) and (name + shard).isprintable() for name, shard in table.items()
    ):
        raise SourceError(f"{INDEX_NAME} has no usable weight_map.", "Get the file again.")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return table, total if type(total) is int else None


def _named(
    shards: tuple[str, ...], index: dict[str, str] | None
) -> tuple[tuple[str, ...], list[Finding]]:
    """Return the shards that loaders read (all, or those that the index names), and findings."""
    indexed = set((index or {}).values())
    named = tuple(shard for shard in shards if shard in indexed)
    unnamed = [shard for shard in shards if shard not in named]
    if not named or not unnamed:
        return shards, []
    what = f"{names(unnamed)}, which {'is' if len(unnamed) == 1 else 'are'} not read"
    message = f"{INDEX_NAME} does not name {what}."
    fix = "Remove the file, or get the index again, from one revision."
    return named, [SHARD_NOT_IN_INDEX.finding(unnamed[0], message, fix)]


def is_shard(path: str) -> bool:
    """Return whether a file of a checkpoint holds weights of the checkpoint."""
    # Weights in subfolders (an "original/" copy, adapters) belong to something else.
    return path.endswith(".safetensors") and len(PurePosixPath(path).parts) == 1


def _stored_twice(tensor: TensorInfo, first: TensorInfo) -> Finding:
    return TENSOR_STORED_TWICE.finding(
        tensor.name,
        f"{tensor.name} is stored twice, in {first.shard} and in {tensor.shard}.",
        "Remove the shard that does not belong to this checkpoint.",
    )


def _index_findings(
    index: dict[str, str], tensors: dict[str, TensorInfo], files: Iterable[str]
) -> list[Finding]:
    present = set(files)
    findings: list[Finding] = []

    def report(rule: Rule, bad: list[str], sentence: str, fix: str) -> None:
        if bad:
            what = f"{len(bad):,} tensor{'s' if len(bad) > 1 else ''} ({names(bad)})"
            findings.append(rule.finding(bad[0], sentence.format(what), fix, "source"))

    missing = sorted({shard for shard in index.values() if shard not in present})
    if missing:
        findings.append(
            SHARD_MISSING.finding(
                missing[0],
                f"{INDEX_NAME} names shards that do not exist: {names(missing)}.",
                "Download the missing shards.",
            )
        )
    absent = [n for n, shard in index.items() if shard in present and n not in tensors]
    misplaced = [n for n, shard in index.items() if n in tensors and tensors[n].shard != shard]
    extra = [n for n in tensors if n not in index]
    fix = f"Get the shards and {INDEX_NAME} again, from one revision."
    report(INDEX_WITHOUT_TENSOR, absent, INDEX_NAME + " lists {}, which no shard holds.", fix)
    report(INDEX_WRONG_SHARD, misplaced, INDEX_NAME + " names the wrong shard for {}.", fix)
    report(TENSOR_NOT_IN_INDEX, extra, "The shards hold {} that " + INDEX_NAME + " lacks.", fix)
    return findings


def _map(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    # Headers are small and many: on a hub each header costs a round trip.
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(function, items))
