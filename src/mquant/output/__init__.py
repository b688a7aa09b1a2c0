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
from mquant.output.folder import RECORD, Claim, State, discard, examine, is_finished, other_run
from mquant.output.joint import (
    MOST_SHARES,
    Joint,
    check_version,
    claim,
    dissolve,
    is_taken,
    look,
    read_joint,
    take_share,
    turn,
)
from mquant.output.ledger import LEDGER, SHARES, Ledger, Recorded, ledger_name, read_ledger
from mquant.output.record import Record, read_record
from mquant.output.shards import Follow, ShardSet, complete_shards, counted

__all__ = [
    "LEDGER",
    "MODELOPT_NAME",
    "MOST_SHARES",
    "PARTIAL",
    "RECIPE_NAME",
    "RECORD",
    "SHARES",
    "WORK",
    "Claim",
    "Follow",
    "Joint",
    "Ledger",
    "Record",
    "Recorded",
    "ShardSet",
    "State",
    "apply",
    "check_version",
    "claim",
    "complete_shards",
    "config_json",
    "counted",
    "discard",
    "dissolve",
    "examine",
    "file_names",
    "finish",
    "index_json",
    "is_finished",
    "is_staged",
    "is_taken",
    "is_there",
    "ledger_name",
    "link",
    "look",
    "other_run",
    "read_joint",
    "read_ledger",
    "read_record",
    "side_files",
    "stage",
    "take_share",
    "turn",
]
