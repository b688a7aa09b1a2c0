"""Writing: atomic shards at planned sizes, the claim on OUT, and the order of finishing."""

from mquant.output.apply import WORK, apply, is_staged, stage
from mquant.output.disk import PARTIAL, is_there, link
from mquant.output.finish import (
    MODELOPT_NAME,
    RECIPE_NAME,
    config_json,
    file_names,
    finish,
    index_json,
    side_files,
)
from mquant.output.folder import RECORD, Claim, State, discard, examine
from mquant.output.ledger import LEDGER, Ledger, Recorded
from mquant.output.record import Record, read_record
from mquant.output.shards import Follow, ShardSet

__all__ = [
    "LEDGER",
    "MODELOPT_NAME",
    "PARTIAL",
    "RECIPE_NAME",
    "RECORD",
    "WORK",
    "Claim",
    "Follow",
    "Ledger",
    "Record",
    "Recorded",
    "ShardSet",
    "State",
    "apply",
    "config_json",
    "discard",
    "examine",
    "file_names",
    "finish",
    "index_json",
    "is_staged",
    "is_there",
    "link",
    "read_record",
    "side_files",
    "stage",
]
