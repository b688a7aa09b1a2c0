"""A storage format keeps its long name, which plans digest, and its short name in compare."""

import pytest

from mquant.loader_model.storage import StorageFormat


@pytest.mark.parametrize(
    ("storage", "long", "short"),
    [
        (StorageFormat.FP8_BLOCK, "FP8 in blocks", "FP8"),
        (StorageFormat.FP8, "compressed-tensors FP8", "FP8"),
        (StorageFormat.NVFP4, "compressed-tensors NVFP4", "NVFP4"),
        (StorageFormat.MODELOPT_NVFP4, "ModelOpt NVFP4", "ModelOpt NVFP4"),
        (StorageFormat.INT, "packed integers", "packed integers"),
    ],
)
def test_the_names_of_formats_do_not_change(storage: StorageFormat, long: str, short: str) -> None:
    assert (str(storage), storage.short) == (long, short)
