"""`mquant card` refuses wrong sources, shows strings from files as text, and keeps other files."""

import json
import os
import re
import shutil
from pathlib import Path

from markdown_it import MarkdownIt

from cards import (
    FRONT,
    PARENT,
    card_of,
    edit_json,
    from_hub,
    quantized,
    run_card,
    src,
)
from corpus import OF_NVFP4A16
from fakehub import FakeHub, hub
from run import TRAINED
from uploads import metadata_errors

__all__ = ["hub", "quantized", "src"]


def test_another_parent_than_mquant_json_says_is_refused(src: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(TRAINED, tmp_path / "other"))
    edit_json(other / "config.json", rms_norm_eps=1e-5)
    result = run_card(src, "--from", other, code=1)
    assert "other is not the parent that mquant.json names" in result.stderr
    assert not (src / "README.md").exists()


TAGS = {"<details>", "</details>", "<summary>", "</summary>", "<code>", "</code>"}
HEADINGS = (
    "Tiny-NVFP4",
    "What it is",
    "Verified",
    "Accuracy",
    "How to serve the checkpoint",
    "What is quantized, and what stays",
    "How it was made",
    "Checksums",
    "Licence",
)
HOSTILE = "x|y\n---\n# Owned ![i](http://evil.example/i.png) <img src=//evil> `a` @all"


def test_strings_from_files_are_shown_and_never_obeyed(src: Path, hub: FakeHub) -> None:
    front = FRONT.replace("org/Original\n---", "'../x'\nlicense_name: '<b>'\n---")
    from_hub(src, hub, front.replace("Made of", "![i](http://evil.example/i.png) <img> Made of"))
    edit_json(src / "mquant.json", mquant=HOSTILE, engine={"name": HOSTILE, "versions": {}})
    card = card_of(src)
    assert metadata_errors(card) == []
    assert "<b>" not in card
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    spans = [span for token in tokens for span in token.children or []]
    assert "image" not in {span.type for span in spans}
    links = [str(span.attrs["href"]) for span in spans if span.type == "link_open"]
    assert links == [f"https://huggingface.co/{PARENT}"]
    html = {t.content.strip() for t in (*tokens, *spans) if t.type.startswith("html_")}
    tags = {tag for text in html for tag in re.findall(r"<[^>]*>", text)}
    assert {tag for tag in tags if not tag.startswith("<!-- Made by mquant")} == TAGS
    headings = [
        t.content
        for t, before in zip(tokens[1:], tokens, strict=False)
        if before.type == "heading_open"
    ]
    assert headings == list(HEADINGS)


def test_a_readme_that_mquant_did_not_write_stays(src: Path, tmp_path: Path) -> None:
    (src / "README.md").write_text("mine", encoding="utf-8")
    assert "README.md exists, and mquant did not write it." in run_card(src, code=1).stderr
    run_card(src, "-o", tmp_path / "CARD.md")
    assert (src / "README.md").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "CARD.md").is_file()


def test_a_readme_that_is_a_pipe_is_refused_at_once(src: Path) -> None:
    os.mkfifo(src / "README.md")
    assert "README.md is not a regular file." in run_card(src, code=1).stderr


def test_a_broken_checkpoint_gets_no_card(src: Path, tmp_path: Path) -> None:
    bad = next(c for c in OF_NVFP4A16 if c.name == "one router quantized").make(src, tmp_path / "b")
    result = run_card(bad, "--format", "json", code=3)
    report = json.loads(result.stdout)
    assert report["schema"] == "mquant.card/1"
    assert not report["ok"]
    assert "router-quantized" in {finding["rule"] for finding in report["findings"]}
    assert not (bad / "README.md").exists()


def test_an_unquantized_checkpoint_gets_no_card(tmp_path: Path) -> None:
    result = run_card(TRAINED, "-o", tmp_path / "x", code=1)
    assert "tiny-minimax-m2 is not quantized: a card describes a quantization." in result.stderr


def test_a_link_under_the_cards_name_is_replaced_not_written_through(
    src: Path, tmp_path: Path
) -> None:
    (tmp_path / "blob").write_text(card_of(src))
    (src / "README.md").unlink(missing_ok=True)
    (src / "README.md").symlink_to(tmp_path / "blob")
    (tmp_path / "blob").write_text(f"{(tmp_path / 'blob').read_text()}\nmine")
    run_card(src)
    assert not (src / "README.md").is_symlink()
    assert (tmp_path / "blob").read_text().endswith("mine")
