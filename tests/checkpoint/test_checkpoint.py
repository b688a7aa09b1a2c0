"""`open_checkpoint` lists a folder's tensors and side files, and a `Folder` has an identity."""

import json
import os
import shutil
from pathlib import Path

import pytest

from checkpoint.two_shards import FIRST, SECOND, weight_map
from judges import opened
from make import adding, make_checkpoint, make_row
from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, Folder
from mquant.errors import SourceError

# --- the content of a checkpoint


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
