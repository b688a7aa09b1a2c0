"""`open_checkpoint` names missing and malformed files, and disagreements of index and headers."""

import json
import os
import shutil
from pathlib import Path

import pytest

from checkpoint.two_shards import FIRST, SECOND, weight_map
from judges import opened
from make import make_checkpoint, make_row, write_index, write_shard
from mquant.checkpoint import CONFIG_NAME, INDEX_NAME
from mquant.errors import HeaderError, SourceError
from mquant.findings import Finding

NORM = "model.norm.weight"


def finding(path: Path) -> Finding:
    """Return the only finding of a checkpoint."""
    (only,) = opened(path).findings
    assert only.severity == "error"
    return only


def failure(path: Path) -> tuple[str, str]:
    """Return the message and the fix of the error that opening a checkpoint raises."""
    with pytest.raises(SourceError) as caught:
        opened(path)
    return caught.value.message, caught.value.fix


# --- missing and malformed files


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert failure(tmp_path / "none") == (
        f"{tmp_path}/none does not exist.",
        "Give an existing folder, or a hub repo id such as org/model.",
    )


def test_a_file_is_not_a_checkpoint_folder(src: Path) -> None:
    assert failure(src / FIRST) == (
        f"{src / FIRST} is not a folder.",
        "Give the checkpoint's folder.",
    )


def test_a_folder_without_config_is_no_checkpoint(src: Path) -> None:
    (src / CONFIG_NAME).unlink()

    assert failure(src) == (
        "src has no config.json, so it is no checkpoint.",
        "Give the folder that holds config.json and the .safetensors files.",
    )


def test_a_folder_without_weights_is_refused(src: Path) -> None:
    (src / FIRST).unlink()
    (src / SECOND).rename(src / "pytorch_model.bin")

    assert failure(src) == (
        "src has no .safetensors file.",
        "Download the weights, or convert them to safetensors first.",
    )


def test_a_dangling_link_is_a_missing_file(src: Path) -> None:
    (src / SECOND).unlink()
    (src / SECOND).symlink_to(src / "nowhere")

    assert finding(src).rule == "shard-missing"


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' * 200_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
    ids=[
        "empty",
        "cut off",
        "not text",
        "deep lists",
        "deep tables",
        "huge number",
        "list",
        "null",
    ],
)
def test_a_json_file_that_is_no_object_is_named(
    src: Path, name: str, content: bytes, what: str
) -> None:
    (src / name).write_bytes(content)

    assert failure(src) == (f"{name} is {what}.", "Get the file again.")


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": None},
        {"weight_map": {"\x1b[2J": "a"}},
        {"weight_map": {"a": "b\n"}},
    ],
)
def test_an_index_without_a_usable_weight_map_is_refused(src: Path, index: object) -> None:
    (src / INDEX_NAME).write_text(json.dumps(index))

    assert failure(src) == (
        "model.safetensors.index.json has no usable weight_map.",
        "Get the file again.",
    )


def test_an_invalid_header_is_an_error_that_names_the_shard(src: Path) -> None:
    os.truncate(src / SECOND, 5)

    with pytest.raises(HeaderError) as caught:
        opened(src)
    assert caught.value.message == f"{SECOND} is 5 bytes long, too short for a safetensors file."


# --- disagreements of index and headers


def test_a_missing_shard_is_named(src: Path) -> None:
    (src / SECOND).unlink()

    problem = finding(src)

    assert (problem.rule, problem.where) == ("shard-missing", SECOND)
    assert problem.message == f"{INDEX_NAME} names shards that do not exist: {SECOND}."
    assert problem.fix == "Download the missing shards."


def test_a_path_in_the_index_is_never_followed(src: Path, tmp_path: Path) -> None:
    shutil.move(src / SECOND, tmp_path / SECOND)
    outside = {
        name: shard.replace(SECOND, f"../{SECOND}") for name, shard in weight_map(src).items()
    }
    write_index(src, outside)

    assert finding(src).message == (f"{INDEX_NAME} names shards that do not exist: ../{SECOND}.")


def test_an_indexed_tensor_that_no_shard_holds_is_named(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src")
    write_index(src, {**weight_map(src), "model.ghost.weight": FIRST})

    problem = finding(src)

    assert (problem.rule, problem.where) == ("index-without-tensor", "model.ghost.weight")
    assert problem.message == (
        f"{INDEX_NAME} lists 1 tensor (model.ghost.weight), which no shard holds."
    )
    assert problem.fix == f"Get the shards and {INDEX_NAME} again, from one revision."


def test_tensors_the_index_lacks_are_counted_and_named(src: Path) -> None:
    index = weight_map(src)
    lost = [name for name in opened(src).tensors if "experts.0." in name]
    write_index(src, {name: shard for name, shard in index.items() if name not in lost})

    problem = finding(src)

    assert problem.rule == "tensor-not-in-index"
    assert problem.message == (
        f"The shards hold 6 tensors ({lost[0]}, {lost[1]}, {lost[2]} and 3 more) that "
        f"{INDEX_NAME} lacks."
    )


def test_an_index_that_names_the_wrong_shard_is_reported(src: Path) -> None:
    write_index(src, {**weight_map(src), NORM: FIRST})

    problem = finding(src)

    assert (problem.rule, problem.where) == ("index-wrong-shard", NORM)
    assert problem.message == f"{INDEX_NAME} names the wrong shard for 1 tensor ({NORM})."


def test_a_tensor_stored_twice_is_named_with_both_shards(src: Path) -> None:
    write_shard(src / "zz.safetensors", [make_row(NORM, "BF16", (64,))])
    write_index(src, {**weight_map(src), "model.spare": "zz.safetensors"})

    problem = next(f for f in opened(src).findings if f.rule == "tensor-stored-twice")

    assert (problem.rule, problem.where) == ("tensor-stored-twice", NORM)
    assert problem.message == f"{NORM} is stored twice, in {SECOND} and in zz.safetensors."
    assert problem.fix == "Remove the shard that does not belong to this checkpoint."


def test_a_shard_that_the_index_does_not_name_is_not_read(src: Path) -> None:
    write_shard(src / "zz.safetensors", [make_row(NORM, "BF16", (64,))])

    (problem,) = opened(src).findings

    assert (problem.rule, problem.severity) == ("shard-not-in-index", "warning")
    assert problem.message == f"{INDEX_NAME} does not name zz.safetensors, which is not read."
    assert "zz.safetensors" not in opened(src).shards


def test_several_shards_without_an_index_are_reported(tmp_path: Path) -> None:
    problem = finding(make_checkpoint(tmp_path / "src", index=False))

    assert (problem.rule, problem.where) == ("index-missing", INDEX_NAME)
    assert problem.message == f"There are 2 shards but no {INDEX_NAME}."
    assert problem.fix == f"Download {INDEX_NAME} too."
