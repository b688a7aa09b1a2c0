"""A hostile checkpoint or recipe is refused with a sentence and does no harm.

checkpoint/test_headers.py has the tests of hostile headers. The tests here and in
test_hostile_out.py are cases that `scripts/fuzz.py` found, or that an attacker would try. The last
test runs random cases, as the fuzzer does, for a few seconds.
"""

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hostile
from make import Row, make_checkpoint, write_json
from mquant import name_patterns
from mquant.checkpoint import CONFIG_NAME, INDEX_NAME, Folder, checkpoint, open_checkpoint
from mquant.data_files import read_yaml
from mquant.errors import DataFileError, MquantError
from mquant.events import Event, Note
from mquant.name_patterns import Style, match
from mquant.recipe import find_recipe
from mquant.untrusted import TooMuch, parse_json
from mquant.verify.judge import Depth
from mutate import judged, mutated
from run import plan_of, quantize_nvfp4

KEY = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> hostile.Bases:
    return hostile.Bases.make(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src")


def sentence(run: Any, *arguments: Any) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(MquantError) as caught:
        run(*arguments)
    assert caught.value.fix
    return caught.value.message


def opened(folder: Path) -> Any:
    return open_checkpoint(Folder(folder))


# --- JSON


def test_json_is_measured_before_it_is_parsed() -> None:
    for raw in (b"[" + b"[]," * 300_000 + b"0]", b'{"a":' + b"0," * 900_000 + b"}"):
        with pytest.raises(TooMuch):
            parse_json(raw)


def test_one_emoji_does_not_make_text_four_times_as_large() -> None:
    with pytest.raises(TooMuch):
        parse_json('"🙂"'.encode() + b" " * 30_000_000)


@pytest.mark.parametrize(
    "raw",
    [b"[" * 51 + b"]" * 51, b"[" * 10**5, b'"\\ud800"', b'{"\\uDC00": 1}', b"\xff", b"9" * 5000],
    ids=["deep", "very deep", "surrogate", "surrogate key", "no UTF-8", "long number"],
)
def test_json_that_could_not_be_written_again_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(raw)


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME])
def test_a_huge_json_file_is_not_even_read(src: Path, name: str) -> None:
    os.truncate(src / name, 2**40)

    assert sentence(opened, src).startswith(f"{name} is too large")


def test_headers_are_limited_together(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_HEADER_BYTES_IN_ALL", 5_000)

    assert sentence(opened, src).startswith("The headers of src hold more than any checkpoint's")


def test_tensors_are_limited_together(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 30)

    assert "hold more than any checkpoint's: more than 30 tensors" in sentence(opened, src)


def test_tensors_are_counted_before_a_header_is_parsed(
    src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: Any) -> None:
        raise AssertionError("a header was parsed")

    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 30)
    monkeypatch.setattr(checkpoint, "parse_header", parse)

    assert "more than 30 tensors" in sentence(opened, src)


def test_an_index_of_too_many_tensors_is_refused_with_the_number(src: Path) -> None:
    names = ",".join(f'"{number}":"a.safetensors"' for number in range(1_010_001))
    (src / INDEX_NAME).write_text(f'{{"weight_map":{{{names}}}}}')

    message = sentence(opened, src)
    assert message == f"{INDEX_NAME} is too large: mquant reads 1,000,000 tensors at most."


def test_shards_are_limited(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARDS", 1)

    assert sentence(opened, src) == "src has 2 shards; mquant reads 1 at most."


@pytest.mark.parametrize("value", [10**18, -1, 2.0, True, "2", None, [2], 1001])
def test_an_impossible_number_of_layers_is_refused_without_a_loop(src: Path, value: Any) -> None:
    table = json.loads((src / CONFIG_NAME).read_text())
    write_json(src / CONFIG_NAME, {**table, "num_hidden_layers": value})

    (refusal,) = plan_of(src).refusals
    assert refusal.rule == "config-key-unusable"


# --- folders


def test_pipes_folders_and_unprintable_names_are_no_files(src: Path) -> None:
    before = dict(Folder(src).files)
    os.mkfifo(src / "pipe.safetensors")
    (src / "folder.safetensors").mkdir()
    (src / "zero.safetensors").symlink_to("/dev/zero")
    (src / "loop.json").symlink_to("loop.json")
    (src / os.fsdecode(b"\xff.json")).write_text("{}")
    (src / "\x1b[2J.json").write_text("{}")

    assert Folder(src).files == before


def test_a_link_out_of_the_source_is_not_copied(src: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("whatever only this user can read")
    (src / "tokenizer.json").symlink_to(tmp_path / "secret")
    (src / "inside.json").symlink_to(src / CONFIG_NAME)
    events: list[Event] = []

    out = quantize_nvfp4(src, tmp_path / "out", events.append)

    assert not (out / "tokenizer.json").exists()
    assert (out / "inside.json").read_bytes() == (src / CONFIG_NAME).read_bytes()
    assert not (out / "inside.json").is_symlink()
    message = "mquant does not copy links that lead out of the source folder: tokenizer.json."
    assert Note("warning", message) in events


def test_links_of_the_hub_cache_do_not_lead_out(src: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/c0ffee", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in src.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)

    folder = Folder(snapshot)

    assert len(folder.files) == 4
    assert not any(map(folder.leads_out, folder.files))


def test_a_terabyte_of_side_file_is_counted_before_it_is_copied(src: Path, tmp_path: Path) -> None:
    (src / "tokenizer.json").touch()
    os.truncate(src / "tokenizer.json", 2**43)

    assert "needs 8.80 TB" in sentence(quantize_nvfp4, src, tmp_path / "out")


def test_side_files_are_compared_piece_by_piece(src: Path, tmp_path: Path) -> None:
    out = quantize_nvfp4(src, tmp_path / "out")
    for folder in (src, out):
        (folder / "tokenizer.json").touch()
        os.truncate(folder / "tokenizer.json", 40_000_000)
    with (out / "tokenizer.json").open("r+b") as file:
        file.seek(39_999_999)
        file.write(b"x")

    assert "side-file-differs" in judged(out, src)


# --- quantization_config


def configured(good: Path, tmp_path: Path, **weights: Any) -> Path:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}}
    table = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    return mutated(good, tmp_path, config={"quantization_config": table})


def test_a_format_that_is_no_string_is_reported(bases: hostile.Bases, tmp_path: Path) -> None:
    group = {"targets": ["Linear"], "format": ["dense"]}
    table = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    bad = mutated(bases.folder / "nvfp4", tmp_path, config={"quantization_config": table})

    assert "has the unknown format" in judged(bad)["quantization-config-invalid"]


@pytest.mark.parametrize("bits", [4.0, True, 0, -4, 10**9, "4"])
def test_a_weight_of_impossible_bits_is_not_compared(src: Path, tmp_path: Path, bits: Any) -> None:
    def edit(rows: list[Row]) -> list[Row]:
        rows = [row for row in rows if row[0] != f"{KEY}.weight"]
        scales = np.ones((32, 2), "<f4").tobytes()
        return [
            *rows,
            (f"{KEY}.weight_packed", "I32", (32, 8), bytes(1024)),
            (f"{KEY}.weight_scale", "F32", (32, 2), scales),
            (f"{KEY}.weight_shape", "I64", (2,), np.array([32, 64], "<i8").tobytes()),
        ]

    packed = mutated(src, tmp_path / "a", edit=edit)
    bad = configured(packed, tmp_path / "b", num_bits=bits)

    assert "weight-not-compared" in judged(bad, src, Depth.NUMBERS)


@pytest.mark.parametrize("block", [[10**9, 10**9], [10**18, 1]])
def test_blocks_larger_than_the_weight_take_no_memory(
    src: Path, tmp_path: Path, block: list[int]
) -> None:
    columns = -(-64 // block[1])

    def edit(rows: list[Row]) -> list[Row]:
        rows = [row for row in rows if row[0] != f"{KEY}.weight"]
        scales = np.ones((1, columns), "<f4").tobytes()
        return [
            *rows,
            (f"{KEY}.weight", "F8_E4M3", (32, 64), bytes(2048)),
            (f"{KEY}.weight_scale_inv", "F32", (1, columns), scales),
        ]

    table = {"quant_method": "fp8", "weight_block_size": block}
    bad = mutated(src, tmp_path / "a", edit=edit, config={"quantization_config": table})

    assert "is further from the parent" in judged(bad, src, Depth.NUMBERS)["weight-beyond-bound"]


def test_a_row_that_memory_could_not_hold_is_not_compared(
    bases: hostile.Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mquant.verify.against_parent.PIECE", 31)
    findings = judged(bases.folder / "nvfp4", bases.folder / "bf16")

    assert "its rows have 32 elements" in findings["weight-not-compared"]


# --- expressions, recipes


def test_many_bad_entries_are_one_finding(bases: hostile.Bases, tmp_path: Path) -> None:
    table = {"quant_method": "compressed-tensors", "ignore": [f"re:({n}" for n in range(5_000)]}
    bad = mutated(bases.folder / "nvfp4", tmp_path, config={"quantization_config": table})

    message = judged(bad)["ignore-bad-entry"]
    assert "'re:(0' in ignore is no regular expression" in message
    assert "(and 4,999 more like it)" in message


def test_the_matches_of_all_entries_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "MAX_MATCHES", 10)

    message = sentence(match, ["re:.*", "re:.*x?"], [str(n) for n in range(6)], Style.NAMES)
    assert message == "The ignore list cannot be judged: its entries match more than 10 names."


def test_a_recipe_that_matches_forever_is_stopped(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_patterns, "TIME_LIMIT", 0.5)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "{name: a, suffix: A, roles: {expert: NVFP4A16}, ignore: ['re:([a-z]+|_|[a-z0-9_.]+)*!']}"
    )

    assert "reached 're:" in sentence(plan_of, src, str(recipe))


@pytest.mark.parametrize("entry", ["re:(", "re:a{99999999999}", "re:" + "(" * 900, "x" * 1001])
def test_an_entry_that_is_no_expression_is_refused(tmp_path: Path, entry: str) -> None:
    recipe = {"name": "a", "suffix": "A", "roles": {"expert": "NVFP4A16"}, "ignore": [entry]}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(recipe))

    assert sentence(find_recipe, str(path)).startswith("mine.yaml: ignore.0: ")


LAUGHS = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 20)}]}}\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [LAUGHS, "a: !!bool maybe", "a: !!timestamp x", "a: !!int ''", "a: 2001-99-99", "[" * 9999],
    ids=["laughs", "bool", "timestamp", "int", "date", "deep"],
)
def test_hostile_yaml_is_not_valid(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)

    with pytest.raises(DataFileError, match="is not valid YAML"):
        read_yaml(tmp_path / "x.yaml")


# --- random cases


@settings(deadline=None, derandomize=True, database=None, max_examples=12)
@given(st.integers(0, 2**32))
def test_no_command_fails_or_changes_a_file_outside_out(
    bases: hostile.Bases, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    where, random = tmp_path_factory.mktemp("cases") / "case", Random(seed)  # noqa: S311
    src = hostile.make_case(bases, where, random)
    before = hostile.snapshot(where)

    for command in hostile.commands(str(src), where, random):
        _, faults = hostile.run_command(command)
        assert not faults, command

    assert hostile.snapshot(where) == before
