"""Calibration data become samples of tokens, drawn by the seed, and a record of what was used."""

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mquant.checkpoint import Folder
from mquant.errors import DataFileError, MissingExtra, SourceError
from mquant.recipe import Calibration
from mquant.tokens import rows as rows_module
from mquant.tokens.rows import open_rows
from mquant.tokens.samples import Samples, load_samples
from run import FIXTURES, TRAINED

TEXT = FIXTURES / "heldout.txt"
FEW = Calibration(samples=3, length=48, seed=1)
ALL = Calibration(samples=99, length=999)


def load(path: Path, spec: Calibration = ALL, src: Path = TRAINED) -> Samples:
    return load_samples(str(path), Folder(src), spec)


def ids(path: Path, spec: Calibration = ALL, src: Path = TRAINED) -> list[list[int]]:
    return [each.tolist() for each in load(path, spec, src).ids]


def tokens(text: str) -> list[int]:
    """Return a text's tokens, by the `tokenizers` package alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TRAINED / "tokenizer.json"))
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_are_cut_from_a_text_and_drawn_by_seed() -> None:
    first = ids(TEXT, FEW)
    whole = tokens(TEXT.read_text("utf-8"))
    assert [len(each) for each in first] == [48, 48, 48]
    assert all(each in [whole[at : at + 48] for at in range(0, len(whole), 48)] for each in first)
    assert first == ids(TEXT, FEW)
    assert first != ids(TEXT, Calibration(samples=3, length=48, seed=2))


def test_a_text_in_parts_has_the_tokens_of_the_whole_text(tmp_path: Path) -> None:
    # 1.2 million characters, with characters of several tokens: three parts.
    text = ("🙂 " + TEXT.read_text("utf-8") + " 日本語 ") * 17
    (tmp_path / "long.txt").write_text(text, "utf-8")
    spec = Calibration(samples=10**6, length=2048)

    pieces = ids(tmp_path / "long.txt", spec)

    whole = tokens(text)
    expected = [whole[at : at + 2048] for at in range(0, len(whole), 2048)]
    assert sorted(pieces) == sorted(expected)


def test_rows_are_drawn_by_seed_until_there_are_enough_with_text(tmp_path: Path) -> None:
    texts = [f"{number} far" for number in range(30)]
    rows = [{"text": ""}, {"messages": []}, *({"text": text} for text in texts)]
    path = jsonl(tmp_path / "a.jsonl", *rows)

    drawn = ids(path, Calibration(samples=20, length=9, seed=1))

    assert len(drawn) == 20
    assert all(each in [tokens(text) for text in texts] for each in drawn)
    assert drawn[:5] == ids(path, Calibration(samples=5, length=9, seed=1))
    assert drawn != ids(path, Calibration(samples=20, length=9, seed=2))


def test_a_row_has_text_or_messages_for_the_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Is it far?"}]
    path = jsonl(tmp_path / "a.jsonl", {"text": "Not far."}, {"text": "", "messages": messages})
    chat = "]~!b[]~b]user\nIs it far?[e~[\n"

    assert sorted(ids(path)) == sorted([tokens("Not far."), tokens(chat)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_the_same_rows_in_another_kind_of_file_are_the_same_samples(
    tmp_path: Path, name: str
) -> None:
    rows: list[Any] = [{"text": None, "messages": [{"role": "user", "content": "Is it far?"}]}]
    rows += [{"text": f"{number} miles", "messages": None} for number in range(9)]
    expected = ids(jsonl(tmp_path / "expected.jsonl", *rows))
    path = tmp_path / name
    if name == "a.parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    else:
        content = (tmp_path / "expected.jsonl").read_bytes()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    assert ids(path) == expected
    assert load(path).record["data"] == {
        "name": name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_keys_that_only_other_rows_of_parquet_have_are_absent(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    calls = [{"role": "assistant", "content": None, "calls": [{"name": "x"}]}]
    plain = [{"role": "user", "content": "a", "calls": None}]
    table = pa.Table.from_pylist([{"messages": calls}, {"messages": plain}])
    pq.write_table(table, tmp_path / "a.parquet")

    with open_rows([tmp_path / "a.parquet"], "DATA") as rows:
        assert rows.read([1, 0]) == [
            {"messages": [{"role": "user", "content": "a"}]},
            {"messages": calls},
        ]


def test_parquet_without_pyarrow_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtra) as caught:
        load(tmp_path / "a.parquet")
    assert caught.value.message == ("Reading .parquet files needs packages that are not installed.")
    assert caught.value.fix == "Run: pip install 'mquant[parquet]'"


def test_tools_of_rows_may_be_json(tmp_path: Path) -> None:
    src = Path(shutil.copytree(TRAINED, tmp_path / "src"))
    (src / "chat_template.jinja").write_text("{{ tools | tojson if tools else 'no tools' }}")
    messages = [{"role": "user", "content": "a"}]
    tools = [{"name": "far"}]
    as_table = jsonl(tmp_path / "a.jsonl", {"messages": messages, "tools": tools})
    as_json = jsonl(tmp_path / "b.jsonl", {"messages": messages, "tools": json.dumps(tools)})
    none = jsonl(tmp_path / "c.jsonl", {"messages": messages, "tools": ""})

    assert ids(as_table, src=src) == ids(as_json, src=src) == [tokens('[{"name": "far"}]')]
    assert ids(none, src=src) == [tokens("no tools")]


def test_the_record_says_what_was_used_by_hash(tmp_path: Path) -> None:
    private = tmp_path / "private" / "name.txt"
    private.parent.mkdir()
    shutil.copy(TEXT, private)

    samples = load(private, FEW)

    record = dict(samples.record)
    sketch = record.pop("sketch")
    digest = hashlib.sha256()
    for each in samples.ids:
        digest.update(len(each).to_bytes(8, "little") + each.astype("<i8").tobytes())
    assert record == {
        "data": {
            "name": "name.txt",
            "bytes": TEXT.stat().st_size,
            "sha256": hashlib.sha256(TEXT.read_bytes()).hexdigest(),
        },
        "samples": 3,
        "length": 48,
        "seed": 1,
        "tokens": 144,
        "tokens_sha256": digest.hexdigest(),
        "tokenizer_sha256": record["tokenizer_sha256"],
    }
    assert str(tmp_path) not in json.dumps(samples.record)
    assert isinstance(sketch, str)


def test_another_tokenizer_or_template_is_another_record(tmp_path: Path) -> None:
    src = Path(shutil.copytree(TRAINED, tmp_path / "src"))
    path = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Far?"}]})
    before = load(path, src=src).record
    (src / "chat_template.jinja").write_text("{{ messages[0].content }}")
    other_template = load(path, src=src).record
    config = json.loads((src / "tokenizer_config.json").read_text())
    (src / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
    other_tokenizer = load(path, src=src).record

    assert before["chat_template_sha256"] != other_template["chat_template_sha256"]
    assert before["tokenizer_sha256"] == other_template["tokenizer_sha256"]
    assert before["tokenizer_sha256"] != other_tokenizer["tokenizer_sha256"]


def test_only_the_beginning_of_a_long_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT.read_text("utf-8")
    path = jsonl(tmp_path / "a.jsonl", {"text": text * 40})  # 3 MB

    assert ids(path, Calibration(samples=1, length=100)) == [tokens(text)[:100]]
    sizes: list[int] = []
    from mquant.tokens.tokenizer import Tokenizer

    encode = Tokenizer.encode

    def noted(self: Any, rows: Any, *rest: Any) -> Any:
        sizes.extend(len(row["text"]) for row in rows)
        return encode(self, rows, *rest)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    load(path, Calibration(samples=1, length=100))
    assert sizes == [32 * 100 + 50_000 + 1]


def test_tokens_before_a_cut_are_those_of_the_whole_row(tmp_path: Path) -> None:
    # One word: no token before the cut is certain, so none is taken.
    path = jsonl(tmp_path / "a.jsonl", {"text": "x" * 60_000}, {"text": "Not far."})
    few = Calibration(samples=2, length=4)

    found = ids(path, few)

    assert tokens("Not far.")[:4] in found
    assert all(each == tokens("x" * 60_000)[:4] for each in found if each != found[-1])


@given(st.lists(st.text(max_size=40), max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_each_line_is_a_row_whatever_the_line_holds(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes((end * 2).join(lines).encode())
    with open_rows([path], "DATA") as rows:
        assert [row["text"] for row in rows.read(range(len(rows)))] == texts


MESSAGE = {"role": "user", "content": "a"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "a"}\n{"text"', "Line 2 of DATA is no JSON."),
        ('{"prompt": "a"}', "A row of DATA has neither `text` nor `messages`."),
        ("[1]\n", "A row of DATA has neither `text` nor `messages`."),
        ('{"text": 5, "messages": null}', "A row of DATA has neither `text` nor `messages`."),
        (
            '{"messages": [null]}',
            "A row of DATA has neither `text` nor `messages` that are a list of tables with a "
            "`role`.",
        ),
        (
            '{"messages": [{"content": "a"}]}',
            "A row of DATA has neither `text` nor `messages` that are a list of tables with a "
            "`role`.",
        ),
        (
            json.dumps({"messages": [IMAGE]}),
            "A message of DATA has a part of type 'image_url'; calibration reads text only.",
        ),
        (
            json.dumps({"messages": [MESSAGE], "tools": "{"}),
            "A row of DATA has `tools` that are no list of tables.",
        ),
        ("", "DATA holds no text."),
        ('{"text": ""}', "DATA holds no text."),
        (None, "DATA cannot be read: No such file or directory."),
    ],
)
def test_unusable_data_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataFileError) as caught:
        load(path)
    assert caught.value.message == sentence.replace("DATA", str(path))


def test_the_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    src = Path(shutil.copytree(TRAINED, tmp_path / "src"))
    (src / "chat_template.jinja").write_text("{{ messages[0].content + '!' }}")
    bad = {"messages": [{"role": "user", "content": None}]}
    path = jsonl(tmp_path / "a.jsonl", {"messages": [MESSAGE]}, {"text": "a"}, bad)
    with pytest.raises(DataFileError) as caught:
        load(path, src=src)
    assert caught.value.message.startswith(
        f"The chat template cannot format the messages of {path}, row 3: "
    )


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b\x08", b"no gzip", gzip.compress(b"{}", mtime=0)[:-4]],
    ids=["cut", "none", "end"],
)
def test_a_damaged_gzip_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataFileError, match=r"a\.jsonl\.gz is damaged: "):
        load(tmp_path / "a.jsonl.gz")


def test_a_gzip_file_that_becomes_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_MOST_ROWS", 2_000_000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 9_000_000))
    with pytest.raises(DataFileError, match="is too large: mquant reads 2,000,000 bytes of rows"):
        load(tmp_path / "a.jsonl.gz")


def test_a_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    src = Path(shutil.copytree(TRAINED, tmp_path / "src"))
    config = json.loads((src / "config.json").read_text())
    largest = int(max(map(np.max, load(TEXT, FEW).ids)))
    (src / "config.json").write_text(json.dumps({**config, "vocab_size": largest + 1}))
    assert load(TEXT, FEW, src).tokens == 144
    (src / "config.json").write_text(json.dumps({**config, "vocab_size": largest}))
    with pytest.raises(SourceError) as caught:
        load(TEXT, FEW, src)
    assert caught.value.message == (
        f"The tokenizer produces token {largest:,}; the model has {largest:,} tokens."
    )


def test_data_that_change_after_they_were_found_are_refused(tmp_path: Path) -> None:
    from mquant.tokens.calibration_data import find_data

    path = jsonl(tmp_path / "a.jsonl", {"text": "Not far."})
    found = find_data(str(path))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataFileError, match="changed while it was read"):
        load_samples(found, Folder(TRAINED), ALL)


def test_samples_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = jsonl(tmp_path / "a.jsonl", {"messages": [MESSAGE]})
    program = (
        "import sys; from pathlib import Path\n"
        "from mquant.checkpoint import Folder\n"
        "from mquant.recipe import Calibration\n"
        "from mquant.tokens.samples import load_samples\n"
        "load_samples(sys.argv[1], Folder(Path(sys.argv[2])), Calibration())\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'jinja2'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, path, TRAINED], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "set()\n"
