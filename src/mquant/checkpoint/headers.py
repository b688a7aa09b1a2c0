"""safetensors headers, read as hostile input.

A file is 8 bytes of little-endian header length, a JSON header, then the data. A header may lie:
lengths, offsets and shapes are checked against each other and against the file's size before
anything is allocated or read.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from sys import intern
from types import MappingProxyType
from typing import Any, Final

from mquant.dtypes import BITS, RANK, nbytes
from mquant.errors import HeaderError
from mquant.untrusted import HEADER, TooMuch, parse_json

MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own limit
MAX_NAME_LENGTH: Final = 1024
PREFIX_BYTES: Final = 8
_KEYS: Final = {"dtype", "shape", "data_offsets"}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a shard. `start` and `end` are byte positions in the file itself.

    `held` is given if a tensor on disk holds this tensor and others. If the tensor's bytes are not
    one after another (`held.scattered`), the tensor's bytes are somewhere in [start, end).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int
    held: "Held | None" = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        if self.held is not None and self.held.scattered:
            return nbytes(self.dtype, self.shape)
        return self.end - self.start

    @property
    def scattered(self) -> bool:
        """Whether the tensor's bytes are not one after another in the file."""
        return self.held is not None and self.held.scattered

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Held:
    """The place of a tensor in a tensor on disk that holds the tensors of all experts.

    `by` is the tensor on disk. An expert's part of it has `rows` and `columns`. The expert's tensor
    is every `step`-th row of the part, `first` being the first; if `transposed`, every `step`-th
    column, and the columns are the tensor's rows.
    """

    by: TensorInfo
    rows: int
    columns: int
    first: int = 0
    step: int = 1
    transposed: bool = False

    @property
    def scattered(self) -> bool:
        """Whether the tensor's bytes are not one after another in the file."""
        return self.transposed or self.step > 1


def header_length(prefix: bytes, file_size: int, shard: str) -> int:
    """Return the length of the JSON header, from the file's first 8 bytes.

    Raises HeaderError if the file is too short or the length cannot be true.
    """
    if len(prefix) < PREFIX_BYTES or file_size < PREFIX_BYTES:
        raise HeaderError(
            f"{shard} is {file_size} bytes long, too short for a safetensors file.",
            "Download the file again.",
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{shard} claims a header of {length:,} bytes; the format allows {MAX_HEADER_BYTES:,}.",
            "The file is damaged or not a safetensors file (a Git LFS pointer?): get it again.",
        )
    if PREFIX_BYTES + length > file_size:
        raise HeaderError(
            f"{shard} is truncated: its header needs {PREFIX_BYTES + length:,} bytes, "
            f"the file has {file_size:,}.",
            "Download the file again.",
        )
    return length


def parse_header(raw: bytes, file_size: int, shard: str) -> tuple[TensorInfo, ...]:
    """Return the tensors of a shard in file order, from the JSON header.

    Raises HeaderError on invalid JSON, duplicate or absurd names, unknown dtypes, shapes that
    disagree with offsets, holes, overlaps, and data that ends before or after the file does.
    """
    base = PREFIX_BYTES + len(raw)
    entries = _load(raw, shard)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(shard, "__metadata__ is not a table of strings")
    tensors = [_tensor(name, entry, base, shard) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_layout(tensors, base, file_size, shard)
    return tuple(tensors)


def parse_metadata(raw: bytes, shard: str) -> dict[str, str]:
    """Return the metadata in a JSON header that `parse_header` takes."""
    metadata: dict[str, str] = _load(raw, shard).get("__metadata__") or {}
    return metadata


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    *,
    keep_order: bool = False,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> tuple[bytes, dict[str, int]]:
    """Return a shard's first bytes, and each tensor's position in the file.

    `tensors` has names, dtypes and shapes. safetensors' own writer writes the same bytes for the
    same tensors with `{"format": "pt"}`: tensors by descending dtype, then by name, padded with
    spaces to 8 bytes. With `keep_order` the tensors are stored in the order given.
    """
    ordered = tensors if keep_order else sorted(tensors, key=lambda t: (-RANK[t[1]], t[0]))
    # Put together from texts: a dict and two lists for each tensor take several times the memory.
    stated = json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"))
    entries = [f'{{"__metadata__":{stated}']
    position = 0
    offsets: dict[str, int] = {}
    for name, dtype, shape in ordered:
        end = position + nbytes(dtype, shape)
        sizes = ",".join(map(str, shape))
        entries.append(
            f'{json.dumps(name, ensure_ascii=False)}:{{"dtype":"{dtype}","shape":[{sizes}],'
            f'"data_offsets":[{position},{end}]}}'
        )
        offsets[name] = position
        position = end
    raw = (",".join(entries) + "}").encode()
    raw += b" " * (-len(raw) % 8)
    base = PREFIX_BYTES + len(raw)
    first = len(raw).to_bytes(PREFIX_BYTES, "little") + raw
    return first, {name: base + offset for name, offset in offsets.items()}


def _load(raw: bytes, shard: str) -> dict[str, Any]:
    """Return the header's object, with a tuple (dtype, shape, start, end) for each sound entry.

    Entries become tuples while the text is parsed: a dict and two lists for every tensor of a shard
    would take several times the memory of the result.
    """
    shapes: dict[Shape, Shape] = {}  # one object for equal shapes

    def from_pairs(pairs: list[tuple[str, Any]]) -> object:
        table = dict(pairs)
        if len(table) != len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise _damaged(shard, f"{name[:60]!r} appears twice")
        return table if _fault(table) else _compact(table, shapes)

    def integer(text: str) -> int:
        return -1 if text.startswith("-") else int(text)  # safetensors refuses -0, too

    number = integer if b"-" in raw else None  # None: json's own, which is faster
    try:
        entries = parse_json(raw, HEADER, object_pairs_hook=from_pairs, parse_int=number)
    except TooMuch:
        raise _damaged(shard, "it holds more than any checkpoint's") from None
    except ValueError:
        raise _damaged(shard, "it is not valid UTF-8 JSON") from None
    if not isinstance(entries, dict):
        raise _damaged(shard, "it is not a JSON object")
    return entries


def _fault(entry: object) -> str:
    """Return why an entry is not of a tensor, as the end of a sentence; empty if it is."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        return "has other keys than dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"has the unknown dtype {str(dtype)[:40]!r}"
    if not _naturals(shape) or len(shape) > 8 or math.prod(filter(None, shape)) >= 2**53:
        return "has an invalid shape"
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has invalid data_offsets"
    return ""


def _compact(entry: dict[str, Any], shapes: dict[Shape, Shape]) -> tuple[str, Shape, int, int]:
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    return intern(entry["dtype"]), shapes.setdefault(shape, shape), start, end


def _tensor(name: str, entry: object, base: int, shard: str) -> TensorInfo:
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise _damaged(shard, f"{name[:60]!r} is no tensor name")
    if not isinstance(entry, tuple):
        raise _damaged(shard, f"{name} {_fault(entry)}")
    dtype, shape, start, end = entry
    try:
        size = nbytes(dtype, shape)
    except ValueError:
        raise _damaged(shard, f"{name} does not fill whole bytes") from None
    if size != end - start:
        raise _damaged(
            shard, f"{name} is {dtype} {list(shape)}, {size:,} bytes, but has {end - start:,}"
        )
    return TensorInfo(name, dtype, shape, shard, base + start, base + end)


def _naturals(value: object) -> bool:
    # 2**53: every JSON reader reads smaller integers exactly; also keeps sizes within 64 bits.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**53 for item in value
    )


def _check_layout(tensors: list[TensorInfo], base: int, file_size: int, shard: str) -> None:
    position = base
    for tensor in tensors:
        if tensor.start != position:
            hole = tensor.start > position
            what = "there is a hole before" if hole else "other tensors overlap"
            raise _damaged(shard, f"{what} {tensor.name}")
        position = tensor.end
    if position > file_size:
        raise HeaderError(
            f"{shard} is truncated: its tensors end at byte {position:,}, "
            f"the file at {file_size:,}.",
            "Download the file again.",
        )
    if position < file_size:
        raise _damaged(shard, f"its tensors end at byte {position:,}, the file at {file_size:,}")


def _damaged(shard: str, why: str) -> HeaderError:
    return HeaderError(
        f"The header of {shard} is invalid: {why}.",
        "The file is damaged or was written by a broken tool: get it again.",
    )
