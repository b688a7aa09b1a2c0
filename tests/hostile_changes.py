"""Random changes of a checkpoint, of its OUT and of JSON that no good tool makes.

One `random.Random` decides every change, so that a seed makes the same change again.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

from mquant.checkpoint import CONFIG_NAME, INDEX_NAME
from mquant.checkpoint.headers import PREFIX_BYTES

DEEP: Final = "@deep@"
"""A string in place of deeply nested lists, which `json.dumps` could not write."""
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2, 7, 0.5, 4.0, 2**31, 2**53, 2**62, 2**64, 10**18, 10**4200,
    float("nan"), float("inf"), "", "a" * 5000, "\ud800", "\x1b[31mred", "[red]x[/red]", "a\nb",
    "../x", "/etc/passwd", "model.safetensors", "re:(a+)+$", "re:(", "re:" + "(" * 3000,
    "re:a{99999999999}", "NVFP4", "fp8", "modelopt", "compressed-tensors", "F4", "F6_E2M3", "I32",
    "U8", "F8_E4M3", [], {}, [[]], {"": {}}, [0, 0], [10**9, 10**9], [2**62, 4, 0], [0] * 3000,
    ["re:.*"], DEEP,
)  # fmt: skip
YAMLS: Final = (
    "license: !!bool maybe", "a: !!timestamp x", "a: !!int ''", "a: 2001-99-99", "[" * 9999,
    "? [a]\n: 1", "&a [*a]", "a: .inf", "a: .nan", "a: !!python/object:os.system x", "\x00",
    "a: &a {<<: *a}", "- a", "5", "a: !!binary x", "{? {a: 1} : 2}", "a: 1\na: 2", "!!set {a, b}",
    "1: 2", "a: !!float x", "a: !!null {}", "!!omap [a: 1]", "~: ~",
)  # fmt: skip
LENGTHS: Final = (0, 1, 2, 7, 8, 9, 100, 2**20, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
QUANTIZATIONS: Final[tuple[dict[str, Any], ...]] = (
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "fp8", "weight_block_size": [10**9, 10**9]},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "g": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            }
        },
    },
)

_MOST_BYTES = 2**36
"""The most bytes of a shard of holes: 100 times any memory limit, and read in some minutes."""

Change = Callable[[Path, Random], None]


# --- changes of a folder


def _file(folder: Path, random: Random, suffix: str) -> Path:
    files = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
    return random.choice(files) if files else folder / f"new{suffix}"


def _header(folder: Path, random: Random) -> None:
    """Change a shard's header as JSON."""
    path = _file(folder, random, ".safetensors")
    raw, data = _split(path)
    table = _loaded(raw)
    for _ in range(random.choice((1, 1, 2, 5))):
        table = twisted(table, random)
    fresh = dumped(table, random)
    _put(path, len(fresh).to_bytes(PREFIX_BYTES, "little") + fresh + data)


def _layout(folder: Path, random: Random) -> None:
    """Write a shard with other dtypes and shapes, and offsets that fit them."""
    path = _file(folder, random, ".safetensors")
    try:
        table = _loaded(_split(path)[0])
        position = 0
        for entry in [entry for name, entry in table.items() if name != "__metadata__"]:
            if random.random() < 0.2:
                entry["dtype"] = random.choice(("U8", "F32", "BF16", "F8_E4M3", "I32", "I64"))
            if random.random() < 0.2:
                entry["shape"] = [random.choice((0, 1, 2, 16, 32, 2**36))] * random.randint(0, 3)
            bits = {"U8": 8, "F8_E4M3": 8, "BF16": 16, "I64": 64}.get(entry["dtype"], 32)
            for size in entry["shape"]:
                bits *= size
            entry["data_offsets"] = [position, position + bits // 8]
            position += bits // 8
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    if type(position) is not int or position > _MOST_BYTES:
        return
    raw = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(PREFIX_BYTES, "little") + raw)
        file.write(random.randbytes(min(position, 4096)))
        file.truncate(PREFIX_BYTES + len(raw) + position)


def _length(folder: Path, random: Random) -> None:
    path = _file(folder, random, ".safetensors")
    length = random.choice(LENGTHS)
    _put(path, length.to_bytes(PREFIX_BYTES, "little") + _bytes(path)[PREFIX_BYTES:])


def _resized(folder: Path, random: Random) -> None:
    path = _file(folder, random, random.choice((".safetensors", ".json")))
    path.touch()
    size = path.stat().st_size
    os.truncate(path, random.choice((0, 1, 8, size // 2, size + 1, size + 4096, 2**40)))


def _scribbled(folder: Path, random: Random) -> None:
    """Change, insert or remove bytes of a file."""
    path = _file(folder, random, random.choice((".safetensors", ".json", INDEX_NAME)))
    data = bytearray(_bytes(path))
    for _ in range(random.randint(1, 8)):
        position = random.randint(0, min(len(data), random.choice((16, 2000, 10**9))))
        token = random.choice((b"\xff", b"\0", b'"', b"{", b"]", b",", b"-", b"9" * 30, b"1e400"))
        data[position : position + random.choice((0, 0, 1, 9))] = token
    _put(path, bytes(data))


def _json(name: str) -> Change:
    def change(folder: Path, random: Random) -> None:
        path = folder / name
        table = _loaded(_bytes(path))
        for _ in range(random.choice((1, 1, 2, 6))):
            inner = table.get("quantization_config") if isinstance(table, dict) else None
            if inner and random.random() < 0.6:
                table["quantization_config"] = twisted(inner, random)
            else:
                table = twisted(table, random)
        _put(path, dumped(table, random))

    return change


def _quantization(folder: Path, random: Random) -> None:
    table = _loaded(_bytes(folder / CONFIG_NAME))
    table = table if isinstance(table, dict) else {}
    table["quantization_config"] = twisted(random.choice(QUANTIZATIONS), random)
    _put(folder / CONFIG_NAME, dumped(table, random))


def _index_paths(folder: Path, random: Random) -> None:
    shard = random.choice(("../x.safetensors", "/etc/passwd", "a/../../b", "", "\x1b]0;x\x07"))
    _put(folder / INDEX_NAME, json.dumps({"weight_map": {"lm_head.weight": shard}}).encode())


def _links(folder: Path, random: Random) -> None:
    """Replace a file with a link, a pipe or a folder, or add a file with an unprintable name."""
    name = random.choice(
        ("tokenizer.json", CONFIG_NAME, INDEX_NAME, "LICENSE", "sub/x.json", "x.safetensors")
    )
    name = random.choice((name, name, _file(folder, random, ".safetensors").name))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        return
    path.unlink(missing_ok=True)
    elsewhere = folder.parent / "elsewhere"
    match random.randrange(7):
        case 0:
            path.symlink_to(elsewhere / "secret.json")
        case 1:
            path.symlink_to(name)  # a link to itself
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(elsewhere)
        case 4:
            os.mkfifo(path)
        case 5:
            path.mkdir()
        case _:
            stem = os.fsdecode(random.choice((b"\xff\xfe", b"\x1b[2Jx", "\u202ex".encode())))
            (folder / f"{stem}.json").write_bytes(b"{}")


def _card(folder: Path, random: Random) -> None:
    """Write a model card with hostile metadata."""
    good = {"license": "mit", "language": ["en"], "base_model": "a/b"}
    front = random.choice((*YAMLS, dumped(twisted(good, random), random).decode()))
    _put(folder / "README.md", f"---\n{front}\n---\nREAP \x1b[2J".encode())


CHANGES: Final[tuple[Change, ...]] = (
    _header,
    _header,
    _layout,
    _length,
    _resized,
    _scribbled,
    _json(INDEX_NAME),
    _json(CONFIG_NAME),
    _json(CONFIG_NAME),
    _quantization,
    _index_paths,
    _links,
    _json("tokenizer.json"),
    _json("generation_config.json"),
    _json("mquant.json"),
    _json("mquant.json"),
    _card,
)


# --- a hostile OUT


def spoil_out(out: Path, random: Random) -> None:
    """Write an OUT whose records and links lead to files outside of OUT."""
    elsewhere = out.parent / "elsewhere"
    out.mkdir()
    names = ["../elsewhere/secret.json", str(elsewhere / "secret.json"), "sub/secret.json", "a\0b"]
    names += ["x" * 300, "\ud800", "config.json", "model-00001-of-00001.safetensors"]
    files: Any = random.choice((names, {name: {"bytes": 13} for name in names}, {}, DEEP, None))
    record = dumped({"schema": "mquant.output/1", "fingerprint": {}, "files": files}, random)
    head: Any = {"schema": "mquant.run/2", "fingerprint": random.choice(({}, [])), "files": names}
    lines = [head, {"jobs": [[0, 10**7 - 1]]}, {"jobs": [[0, 5]]}, DEEP]
    match random.randrange(6):
        case 0:
            (out / "mquant-run.jsonl").symlink_to(elsewhere / "secret.json")
        case 1:
            os.mkfifo(out / "mquant-run.jsonl")
        case 2:
            (out / "mquant.json").write_bytes(record)
        case _:
            ledger = b"".join(dumped(line, random) + b"\n" for line in lines)
            (out / "mquant-run.jsonl").write_bytes(ledger)
    if random.random() < 0.7:
        (out / "sub").symlink_to(elsewhere)
        for name in ("config.json.partial", "recipe.yaml.partial", "tokenizer.json"):
            (out / name).symlink_to(elsewhere / "secret.json")
        (out / "model-00001-of-00001.safetensors.partial").symlink_to(elsewhere / "secret.json")


# --- JSON


def twisted(value: Any, random: Random) -> Any:
    """Return a JSON value with one random change."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.15:
        return random.choice(VALUES)
    if isinstance(value, list):
        position = random.randrange(len(value))
        match random.randrange(4):
            case 0:
                return value[:position] + value[position + 1 :]
            case 1:
                return [*value, random.choice(VALUES)]
            case _:
                return [*value[:position], twisted(value[position], random), *value[position + 1 :]]
    key = random.choice(list(value))
    match random.randrange(6):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            name = random.choice([str(v) for v in VALUES if isinstance(v, str)])
            return {**value, name: value[key]}
        case 2:
            return {**value, key: value[random.choice(list(value))]}
        case _:
            return {**value, key: twisted(value[key], random)}


def dumped(value: Any, random: Random) -> bytes:
    """Return JSON bytes, sometimes with a duplicate key and a number beyond all floats."""
    text = json.dumps(value)
    levels = random.choice((50, 300, 900, 990, 100_000))
    text = text.replace(f'"{DEEP}"', "[" * levels + "]" * levels)
    if random.random() < 0.1:
        text = text.replace("{", '{"a": 1e400, "a": 2, ', 1)
    return text.encode()


def _loaded(raw: bytes) -> Any:
    """Return the value of JSON bytes, or an empty table if loading or dumping the value fails."""
    try:
        value = json.loads(raw)
        json.dumps(value)
    except (ValueError, RecursionError):
        return {}
    return value


def _put(path: Path, data: bytes) -> None:
    """Write a file, unless the path is no file: writing to a pipe would wait for a reader."""
    if path.is_file() or not (path.exists() or path.is_symlink()):
        path.write_bytes(data)


def _split(path: Path) -> tuple[bytes, bytes]:
    raw = _bytes(path)
    end = PREFIX_BYTES + min(int.from_bytes(raw[:PREFIX_BYTES], "little"), len(raw))
    return raw[PREFIX_BYTES:end], raw[end:]


def _bytes(path: Path) -> bytes:
    """Return a file's bytes; no bytes if the path is no file or the file is over 10 MB."""
    if not path.is_file() or path.stat().st_size > 10_000_000:
        return b""
    with path.open("rb") as file:
        return file.read(10_000_000)
