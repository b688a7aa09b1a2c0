"""Writing: atomic shards at planned sizes, the claim on OUT, and the order of finishing."""

from mquant.output.finish import file_names, finish
from mquant.output.folder import LEDGER, RECORD, Claim, Ledger, State, examine
from mquant.output.shards import ShardSet, ShardWriter

__all__ = [
    "LEDGER",
    "RECORD",
    "Claim",
    "Ledger",
    "ShardSet",
    "ShardWriter",
    "State",
    "examine",
    "file_names",
    "finish",
]
