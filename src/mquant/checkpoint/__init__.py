"""Read checkpoints: headers as hostile input, folders and hub repos, and one view of all."""

from mquant.checkpoint.assembly import Assembly, AssemblyReader
from mquant.checkpoint.checkpoint import (
    CONFIG_NAME,
    FIRST_READ,
    INDEX_NAME,
    Checkpoint,
    has_chat_template,
    is_shard,
    is_weights,
    open_checkpoint,
    read_first,
    read_header,
    read_json,
)
from mquant.checkpoint.headers import (
    Held,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
    parse_metadata,
)
from mquant.checkpoint.reader import RangeReader, Reader, reader_of
from mquant.checkpoint.source import Folder, Overlay, Source, Stamp, changed, stamp

__all__ = [
    "CONFIG_NAME",
    "FIRST_READ",
    "INDEX_NAME",
    "Assembly",
    "AssemblyReader",
    "Checkpoint",
    "Folder",
    "Held",
    "Overlay",
    "RangeReader",
    "Reader",
    "Source",
    "Stamp",
    "TensorInfo",
    "build_header",
    "changed",
    "has_chat_template",
    "header_length",
    "is_shard",
    "is_weights",
    "open_checkpoint",
    "parse_header",
    "parse_metadata",
    "read_first",
    "read_header",
    "read_json",
    "reader_of",
    "stamp",
]
