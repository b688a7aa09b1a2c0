"""`open_checkpoint` lists a folder's tensors, and reports how index, headers and files disagree."""

import json
import os
import shutil
from pathlib import Path

import pytest

from make import adding, make_checkpoint, make_row, write_index, write_shard
from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, Folder, open_checkpoint
from mquant.errors import HeaderError, SourceError
from mquant.findings import Finding

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src")


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(Folder(path))


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


def weight_map(path: Path) -> dict[str, str]:
    table: dict[str, str] = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    return table


# --- sound checkpoints


def test_a_sound_checkpoint_has_no_findings(src: Path) -> None:
    checkpoint = opened(src)

    assert checkpoint.findings == ()
    assert checkpoint.shards == (FIRST, SECOND)
    assert {t.name: t.shard for t in checkpoint.tensors.values()} == weight_map(src)
    assert checkpoint.config["model_type"] == "minimax_m2"


def test_bytes_and_parameters_are_those_of_the_tensors(src: Path) -> None:
    checkpoint = opened(src)

    assert checkpoint.nbytes == json.loads((src / INDEX_NAME).read_text())["metadata"]["total_size"]
    narrow = [t for t in checkpoint.tensors.values() if t.dtype == "BF16"]
    wide = [t for t in checkpoint.tensors.values() if t.dtype == "F32"]
    assert checkpoint.parameters == sum(t.nbytes for t in narrow) // 2 + (
        sum(t.nbytes for t in wide) // 4
    )


def test_a_tensor_is_stored_where_its_header_says(tmp_path: Path) -> None:
    row = make_row("lm_head.weight", "BF16", (4, 16), 7)
    src = make_checkpoint(tmp_path / "src", edit=lambda rows: [*rows[:-1], row])

    tensor = opened(src).tensors["lm_head.weight"]

    assert Folder(src).read(tensor.shard, tensor.start, tensor.end) == row[3]


def test_a_single_shard_needs_no_index(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", shards=1)

    assert not (src / INDEX_NAME).exists()
    assert opened(src).findings == ()


def test_shards_in_subfolders_are_not_read(src: Path) -> None:
    shutil.copytree(src, src / "original", ignore=lambda *_: {"original"})

    checkpoint = opened(src)

    assert checkpoint.shards == (FIRST, SECOND)
    assert checkpoint.findings == ()


def test_side_files_are_all_but_weights_index_config_and_hidden_files(src: Path) -> None:
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer/merges.txt",
        "LICENSE",
        "README.md",
        "modeling_minimax_m2.py",
        "pytorch_model.bin",
        "model.gguf",
        "original/consolidated.safetensors",
        "original/config.json",
        ".gitattributes",
        ".git/HEAD",
        ".cache/huggingface/x.lock",
    ):
        (src / name).parent.mkdir(exist_ok=True, parents=True)
        (src / name).write_text("x")

    assert opened(src).side_files == (
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "modeling_minimax_m2.py",
        "original/config.json",
        "tokenizer.json",
        "tokenizer/merges.txt",
    )


def test_hidden_files_are_not_listed(src: Path) -> None:
    for name in (".gitattributes", ".cache/x.json"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text("x")

    assert list(Folder(src).files) == [CONFIG_NAME, FIRST, SECOND, INDEX_NAME]


def test_a_hub_cache_of_links_is_read_through_its_links(src: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in src.iterdir():
        (snapshot / file.name).symlink_to(file)

    assert opened(snapshot).tensors == opened(src).tensors


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


def test_a_checkpoint_may_hold_a_tensor_that_no_family_knows(tmp_path: Path) -> None:
    src = make_checkpoint(tmp_path / "src", edit=adding("stranger"))

    assert "stranger" in opened(src).tensors
    assert opened(src).findings == ()


# --- the identity of a checkpoint


def test_a_copy_in_another_folder_is_the_same_checkpoint(src: Path, tmp_path: Path) -> None:
    shutil.copytree(src, tmp_path / "elsewhere")

    assert Folder(src).identity() == Folder(tmp_path / "elsewhere").identity()


def test_the_identity_names_no_path(src: Path) -> None:
    assert str(src) not in json.dumps(Folder(src).identity())


def test_one_changed_weight_byte_makes_another_checkpoint(src: Path) -> None:
    before = Folder(src).identity()
    shard = bytearray((src / FIRST).read_bytes())
    shard[-1] ^= 1
    (src / FIRST).write_bytes(shard)

    assert Folder(src).identity() != before


def test_a_changed_config_makes_another_checkpoint(src: Path) -> None:
    before = Folder(src).identity()
    config = (src / CONFIG_NAME).read_text()
    (src / CONFIG_NAME).write_text(config.replace('"rotary_dim": 8', '"rotary_dim": 4'))

    assert Folder(src).identity() != before


def test_another_size_makes_another_checkpoint_even_if_no_sample_differs(tmp_path: Path) -> None:
    # Sparse files: 64 samples of zeros each.
    for name, size in (("a", 6_400_000), ("b", 6_400_064)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "x.safetensors").open("wb") as file:
            file.truncate(size)

    assert Folder(tmp_path / "a").identity() != Folder(tmp_path / "b").identity()


def test_a_renamed_shard_makes_another_checkpoint(src: Path) -> None:
    before = Folder(src).identity()
    (src / FIRST).rename(src / "other.safetensors")

    assert Folder(src).identity() != before


def test_a_read_past_the_end_says_the_file_changed(src: Path) -> None:
    folder = Folder(src)
    size = folder.files[FIRST]
    os.truncate(src / FIRST, size - 1)

    with pytest.raises(SourceError) as caught:
        folder.read(FIRST)
    assert caught.value.message == (f"{FIRST} ends at byte {size - 1:,}; {size:,} were expected.")


def test_only_listed_files_can_be_read(src: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")

    with pytest.raises(SourceError, match=r"has no file '\.\./secret'"):
        Folder(src).read("../secret")
