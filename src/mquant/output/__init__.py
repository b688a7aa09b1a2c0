"""The output folder OUT: the claim on OUT, the ledger, the shards, and the files around them."""

from mquant.output.disk import PARTIAL, check_disk, free_disk, link
from mquant.output.document import Document
from mquant.output.finish import (
    LAST,
    RECIPE_NAME,
    file_names,
    finish,
    index_json,
    side_files,
    source_notes,
)
from mquant.output.folder import Claim, State, discard, examine, is_finished, other_run
from mquant.output.in_place import JOURNAL, WORK, apply, is_staged, stage
from mquant.output.ledger import LEDGER, SHARES, Ledger, Recorded, ledger_name, read_ledger
from mquant.output.mquant_json import (
    CALIBRATION,
    RECORD,
    Record,
    as_table,
    calibration_of,
    known_table,
    own_table,
    read_record,
)
from mquant.output.shards import ShardObserver, ShardSet, complete_shards, units_still_valid
from mquant.output.shared_run import (
    SharedRun,
    check_version,
    claim,
    delete_share_files,
    folder_lock,
    is_taken,
    look,
    read_shared_run,
    take_share,
)
from mquant.output.states import STATES, StatesFile
from mquant.plan import config_json

__all__ = [
    "CALIBRATION",
    "JOURNAL",
    "LAST",
    "LEDGER",
    "PARTIAL",
    "RECIPE_NAME",
    "RECORD",
    "SHARES",
    "STATES",
    "WORK",
    "Claim",
    "Document",
    "Ledger",
    "Record",
    "Recorded",
    "ShardObserver",
    "ShardSet",
    "SharedRun",
    "State",
    "StatesFile",
    "apply",
    "as_table",
    "calibration_of",
    "check_disk",
    "check_version",
    "claim",
    "complete_shards",
    "config_json",
    "delete_share_files",
    "discard",
    "examine",
    "file_names",
    "finish",
    "folder_lock",
    "free_disk",
    "index_json",
    "is_finished",
    "is_staged",
    "is_taken",
    "known_table",
    "ledger_name",
    "link",
    "look",
    "other_run",
    "own_table",
    "read_ledger",
    "read_record",
    "read_shared_run",
    "side_files",
    "source_notes",
    "stage",
    "take_share",
    "units_still_valid",
]
