"""mquant writes safetensors headers as safetensors does, and refuses every malformed header."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from mquant.checkpoint import Folder, TensorInfo, build_header, header_length, parse_header
from mquant.checkpoint import read_header as read_header_of
from mquant.checkpoint.headers import MAX_HEADER_BYTES, PREFIX_BYTES
from mquant.dtypes import BITS, nbytes
from mquant.errors import HeaderError

Spec = tuple[str, str, tuple[int, ...]]

# A slow example is no failure: the machine is shared. Every run tries the same examples.
steady = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def parse(file: bytes) -> tuple[TensorInfo, ...]:
    """Return the tensors that mquant reads from a whole file."""
    length = header_length(file[:PREFIX_BYTES], len(file), "x.safetensors")
    return parse_header(file[PREFIX_BYTES : PREFIX_BYTES + length], len(file), "x.safetensors")


def with_header(header: object, data: bytes = b"") -> bytes:
    """Return a file with this header, given as the bytes of JSON or as the value to serialize."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    """Return a sound header entry of eight bytes, except for `changes`."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def refusal(file: bytes) -> str:
    """Return the message of the error that a file raises."""
    with pytest.raises(HeaderError) as caught:
        parse(file)
    assert caught.value.fix
    return caught.value.message


def safetensors_names(file: bytes) -> list[str] | None:
    """Return the sorted names that safetensors reads from a file; None if safetensors refuses."""
    try:
        return sorted(name for name, _ in deserialize(file))  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None


def safetensors_accepts(file: bytes) -> bool:
    return safetensors_names(file) is not None


def whole(dtype: str, shape: tuple[int, ...]) -> bool:
    return math.prod(shape) * BITS[dtype] % 8 == 0


PRINTABLE = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
NAMES = st.text(PRINTABLE, min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SPECS: st.SearchStrategy[list[Spec]] = st.lists(
    st.tuples(NAMES, st.sampled_from(sorted(BITS)), SHAPES).filter(lambda t: whole(t[1], t[2])),
    max_size=6,
    unique_by=lambda t: t[0],
)


def build(specs: list[Spec]) -> bytes:
    """Return a whole file of zeros under the header that mquant builds."""
    first, _ = build_header(specs)
    return first + bytes(sum(nbytes(dtype, shape) for _, dtype, shape in specs))


# --- headers that mquant writes


@steady
@given(SPECS)
def test_a_header_that_mquant_builds_has_the_given_tensors(specs: list[Spec]) -> None:
    first, starts = build_header(specs)

    tensors = parse(build(specs))

    assert sorted((t.name, t.dtype, t.shape) for t in tensors) == sorted(specs)
    assert {t.name: t.start for t in tensors} == starts
    assert all(t.end == t.start + nbytes(t.dtype, t.shape) for t in tensors)
    assert len(first) % 8 == 0


@steady
@given(SPECS)
def test_safetensors_reads_every_file_that_mquant_lays_out(specs: list[Spec]) -> None:
    assert safetensors_names(build(specs)) == sorted(name for name, _, _ in specs)


def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    kinds: dict[str, Any] = {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "U8": np.uint8,
        "I8": np.int8,
        "BOOL": np.bool_,
        "F16": np.float16,
        "I16": np.int16,
        "U16": np.uint16,
        "F32": np.float32,
        "I32": np.int32,
        "U32": np.uint32,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }
    names = ("b.10", "b.2", 'with "quotes" and \\', "größe.重み.🙂", "Z", "\u007e", "a/b")
    arrays = {
        f"{name}.{dtype}": random.integers(0, 2, (3, number)).astype(kind)
        for dtype, kind in kinds.items()
        for number, name in enumerate(names)
    }
    arrays["scalar"] = np.asarray(3, np.float32)
    save_file(arrays, tmp_path / "upstream.safetensors", metadata={"format": "pt"})

    specs = [
        (n, "F32" if n == "scalar" else n.rpartition(".")[2], a.shape) for n, a in arrays.items()
    ]
    first, starts = build_header(specs)
    content = bytearray(first + bytes(sum(array.nbytes for array in arrays.values())))
    for name, array in arrays.items():
        content[starts[name] : starts[name] + array.nbytes] = array.tobytes()

    assert bytes(content) == (tmp_path / "upstream.safetensors").read_bytes()


def test_an_empty_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    save_file({}, tmp_path / "upstream.safetensors", metadata={"format": "pt"})

    assert build([]) == (tmp_path / "upstream.safetensors").read_bytes()


# --- headers that other tools write


@steady
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_header_errors(file: bytes) -> None:
    with pytest.raises(HeaderError):
        parse(file)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(sorted(BITS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "X9"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@steady
@given(
    st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=3)
    | JSON,
    st.integers(0, 40),
)
def test_safetensors_accepts_every_file_that_mquant_accepts(header: object, data: int) -> None:
    file = with_header(header, bytes(data))
    try:
        parse(file)
    except HeaderError:
        return
    assert safetensors_accepts(file)


@steady
@given(SPECS, st.data())
def test_a_damaged_file_is_refused_or_still_sound(specs: list[Spec], data: st.DataObject) -> None:
    file = bytearray(build(specs))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(file) - 1))
        if data.draw(st.booleans()):
            file[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789{}[],:" -'))
        else:
            del file[place:]
            file += b"\0" * (not file)
    try:
        tensors = parse(bytes(file))
    except HeaderError:
        return
    assert sum(tensor.nbytes for tensor in tensors) <= len(file)
    assert safetensors_accepts(bytes(file))


def test_safetensors_and_mquant_accept_padding_and_null_metadata() -> None:
    file = with_header(
        b' {"__metadata__": null, "a": ' + json.dumps(entry()).encode() + b"}\n ", bytes(8)
    )

    assert safetensors_accepts(file)
    assert [tensor.name for tensor in parse(file)] == ["a"]


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (b'{"a": %b, "a": %b}', "'a' appears twice"),
        ({"a\x1b[2J": entry()}, r"'a\x1b[2J' is no tensor name"),
        ({"a\nb": entry()}, r"'a\nb' is no tensor name"),
        ({"a\u202eb": entry()}, r"'a\u202eb' is no tensor name"),
        ({"": entry()}, "'' is no tensor name"),
        ({"a" * 1025: entry()}, f"'{'a' * 60}' is no tensor name"),
        ({"a": entry(shape=[2, *[1] * 8])}, "a has an invalid shape"),
        ({"a": entry(note=1)}, "a has other keys than dtype, shape and data_offsets"),
        (b'{"a": ["F32", [2], [0, 8]]}', "a has other keys than dtype, shape and data_offsets"),
    ],
    ids=[
        "name twice",
        "escape sequence",
        "newline",
        "right-to-left override",
        "no name",
        "long name",
        "nine dimensions",
        "unknown key",
        "entry as a list",
    ],
)
def test_mquant_refuses_some_headers_that_safetensors_accepts(header: Any, sentence: str) -> None:
    # safetensors drops the second tensor of a name silently, and names are printed on terminals.
    # No real checkpoint has the other cases.
    raw = (
        header.replace(b"%b", json.dumps(entry()).encode()) if isinstance(header, bytes) else header
    )
    file = with_header(raw, bytes(8))

    assert safetensors_accepts(file)
    assert refusal(file) == f"The header of x.safetensors is invalid: {sentence}."


@pytest.mark.parametrize("size", range(PREFIX_BYTES))
def test_a_file_too_short_for_a_length_is_refused(size: int) -> None:
    assert refusal(bytes(size)) == (
        f"x.safetensors is {size} bytes long, too short for a safetensors file."
    )


def test_a_huge_header_length_is_refused() -> None:
    file = (MAX_HEADER_BYTES + 1).to_bytes(PREFIX_BYTES, "little") + b"{}"

    assert refusal(file) == (
        "x.safetensors claims a header of 100,000,001 bytes; the format allows 100,000,000."
    )


def test_a_git_lfs_pointer_is_refused_with_a_hint() -> None:
    with pytest.raises(HeaderError) as caught:
        parse(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")

    assert "Git LFS pointer?" in caught.value.fix


def test_a_file_that_ends_within_its_header_is_truncated() -> None:
    file = with_header({"a": entry()}, bytes(8))[:20]

    assert refusal(file) == (
        "x.safetensors is truncated: its header needs 69 bytes, the file has 20."
    )


def test_a_file_that_ends_within_its_data_is_truncated() -> None:
    assert refusal(with_header({"a": entry()}, bytes(7))) == (
        "x.safetensors is truncated: its tensors end at byte 77, the file at 76."
    )


def deep(levels: int) -> bytes:
    return b'{"a": ' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"", 0, "it is not valid UTF-8 JSON"),
        (b'{"a": ', 0, "it is not valid UTF-8 JSON"),
        (b'{"\xff": {}}', 0, "it is not valid UTF-8 JSON"),
        (b"{}\0", 0, "it is not valid UTF-8 JSON"),
        (b"\xef\xbb\xbf{}", 0, "it is not valid UTF-8 JSON"),
        (deep(200_000), 0, "it is not valid UTF-8 JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", 0, "it is not valid UTF-8 JSON"),
        ([], 0, "it is not a JSON object"),
        (None, 0, "it is not a JSON object"),
        ({"__metadata__": []}, 0, "__metadata__ is not a table of strings"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__ is not a table of strings"),
        (b'{"__metadata__": {"a": "\\ud800"}}', 0, "it is not valid UTF-8 JSON"),
        (b'{"__metadata__": {"\\udc00": "a"}}', 0, "it is not valid UTF-8 JSON"),
        ({"a": None}, 0, "a has other keys than dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, 0, "a has other keys than dtype, shape and data_offsets"),
        (b'{"a\\ud800": {}}', 0, "it is not valid UTF-8 JSON"),
        ({"a": entry(dtype="F33")}, 8, "a has the unknown dtype 'F33'"),
        ({"a": entry(dtype=["F32"])}, 8, "a has the unknown dtype \"['F32']\""),
        ({"a": entry(dtype="f32")}, 8, "a has the unknown dtype 'f32'"),
        ({"a": entry(shape=[-2])}, 8, "a has an invalid shape"),
        ({"a": entry(shape=[2.0])}, 8, "a has an invalid shape"),
        ({"a": entry(shape=[2, True])}, 8, "a has an invalid shape"),
        ({"a": entry(shape=2)}, 8, "a has an invalid shape"),
        ({"a": entry(shape=[2**53])}, 8, "a has an invalid shape"),
        ({"a": entry(shape=[2**52, 2**52, 0], data_offsets=[0, 0])}, 0, "a has an invalid shape"),
        ({"a": entry(data_offsets=[-8, 0])}, 8, "a has invalid data_offsets"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-0, 1]}}', 1,
         "a has invalid data_offsets"),
        ({"a": entry(data_offsets=[0.0, 8.0])}, 8, "a has invalid data_offsets"),
        ({"a": entry(data_offsets=[False, 8])}, 8, "a has invalid data_offsets"),
        ({"a": entry(data_offsets=[8, 0])}, 8, "a has invalid data_offsets"),
        ({"a": entry(data_offsets=[0])}, 8, "a has invalid data_offsets"),
        ({"a": entry(data_offsets=[0, 4, 8])}, 8, "a has invalid data_offsets"),
        ({"a": entry(data_offsets=[0, 2**64])}, 8, "a has invalid data_offsets"),
        ({"a": entry(data_offsets=[0, 4])}, 4, "a is F32 [2], 8 bytes, but has 4"),
        ({"a": entry(dtype="F4", shape=[3])}, 2, "a does not fill whole bytes"),
        ({"a": entry(data_offsets=[8, 16])}, 16, "there is a hole before a"),
        ({"a": entry(), "b": entry(data_offsets=[12, 20])}, 20, "there is a hole before b"),
        ({"a": entry(), "b": entry(data_offsets=[4, 12])}, 12, "other tensors overlap b"),
        ({"a": entry(), "b": entry()}, 8, "other tensors overlap b"),
        ({"a": entry(), "z": entry(shape=[0], data_offsets=[4, 4])}, 8, "other tensors overlap z"),
        ({"a": entry()}, 9, "its tensors end at byte 77, the file at 78"),
        ({}, 1, "its tensors end at byte 10, the file at 11"),
    ],
)  # fmt: skip
def test_a_malformed_header_is_refused_with_its_reason(header: Any, data: int, why: str) -> None:
    file = with_header(header, bytes(data))

    assert refusal(file) == f"The header of x.safetensors is invalid: {why}."
    assert not safetensors_accepts(file)


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    specs: list[Spec] = [(f"tensor.{number:05d}", "U8", (1,)) for number in range(2000)]
    (tmp_path / "x.safetensors").write_bytes(build(specs))

    assert len(read_header_of(Folder(tmp_path), "x.safetensors")) == 2000
