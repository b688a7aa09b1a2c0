"""Writing: atomic shards at planned sizes, the claim on OUT, and the order of finishing."""

from mquant.output.disk import PARTIAL, is_there
from mquant.output.finish import file_names, finish, side_files
from mquant.output.folder import RECORD, Claim, State, discard, examine
from mquant.output.ledger import LEDGER, Ledger, Recorded
from mquant.output.shards import ShardSet

__all__ = [
    "LEDGER",
    "PARTIAL",
    "RECORD",
    "Claim",
    "Ledger",
    "Recorded",
    "ShardSet",
    "State",
    "discard",
    "examine",
    "file_names",
    "finish",
    "is_there",
    "side_files",
]
