"""`mquant report` writes one HTML file that fetches nothing and shows hostile names as text."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from make import without
from mquant.cli.app import app
from mquant.findings import Finding
from mquant.publish.html_report import Evidence, render
from mquant.publish.html_report.sections import Size
from mutate import mutated
from page import laid_out, needs_chromium
from run import FIXTURES, TRAINED, quantize_nvfp4

TEXT = ("--text", FIXTURES / "heldout.txt", "--tokens", 300, "--context", 100)
HOSTILE = '</title><script>alert("x")</script><img src=x onerror=alert(1)>\x1b[2J\u202e'


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("trained") / "Tiny-NVFP4")


@pytest.fixture(scope="module")
def html(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    result = run("report", trained, "--against", TRAINED, *TEXT, "-o", out)
    assert result.exit_code == 0, result.output
    assert "Clean for vLLM 0.32: 327 tensors" in " ".join(result.stdout.split())
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


class Page(HTMLParser):
    """The open elements at the end of a page, and its links, tags and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_measurement(html: Path) -> None:
    page = Page(html.read_text("utf-8"))
    assert page.open == []
    for part in ("Sizes", "Weight error", "Routing", "Evaluation", "Findings", "Recipe"):
        assert part in page.text
    assert "53.4% of 6.07 MB" in page.text
    assert "model.layers.1.block_sparse_moe.experts.8.w2.weight" in page.text
    assert "300 of 22,065 tokens" in page.text
    assert "QuantizationModifier" in page.text
    assert "mquant compare " in page.text
    assert "tensor-parallel" in page.text, "a finding"


def test_nothing_is_fetched_and_no_script_runs(html: Path) -> None:
    text = html.read_text("utf-8")
    page = Page(text)
    assert page.links, "the heatmaps"
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags
    assert "default-src &#x27;none&#x27;" in text
    assert "http://" not in text
    assert "https://" not in text
    assert len(text) < 40_000


def test_hostile_names_are_text() -> None:
    evidence = Evidence(
        name=HOSTILE,
        parent=HOSTILE,
        verdict=HOSTILE,
        severity="error",
        facts=[(HOSTILE, HOSTILE)],
        sizes=[Size(HOSTILE, 1, 2, 3)],
        findings=[Finding("tensor-unknown", "error", HOSTILE, HOSTILE, HOSTILE)],
        not_judged=HOSTILE,
        recipe=HOSTILE,
        commands=[HOSTILE],
        made_by="mquant",
    )
    text = render(evidence)
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"alert(1)>\x1b[2J\u202e" in page.text


def test_results_of_earlier_runs_are_taken(trained: Path, tmp_path: Path) -> None:
    compared, evaluated = tmp_path / "compare.json", tmp_path / "eval.json"
    compared.write_text(run("compare", trained, "--against", TRAINED, "--format", "json").stdout)
    evaluated.write_text(run("eval", trained, *TEXT, "--format", "json").stdout)
    out = tmp_path / "r.html"
    results = ("--compare", compared, "--eval", evaluated)
    result = run("report", trained, *results, "-o", out, "--format", "json")
    document: dict[str, Any] = json.loads(result.stdout)
    assert (document["schema"], document["ok"]) == ("mquant.report/1", True)
    assert (document["compared"], document["evaluated"]) == (True, True)
    assert document["bytes"] == out.stat().st_size
    page = Page(out.read_text("utf-8"))
    assert "Quantized from tiny-minimax-m2" in page.text
    assert "9.51%" in page.text


def test_results_of_something_else_are_refused(trained: Path, tmp_path: Path) -> None:
    results, out = tmp_path / "given.json", tmp_path / "r.html"

    def error_on(content: str) -> str:
        results.write_text(content)
        result = run("report", trained, "--compare", results, "-o", out)
        assert result.exit_code == 1
        assert not out.exists()
        return " ".join(result.stderr.split())

    assert "is not the JSON of mquant compare." in error_on("[]")
    assert "is not the JSON of mquant compare." in error_on('{"schema": "mquant.eval/1"}')
    assert "describes other, not Tiny-NVFP4" in error_on(
        '{"schema": "mquant.compare/1", "source": "other"}'
    )
    assert "is not a result of this version of mquant" in error_on(
        '{"schema": "mquant.compare/1", "source": "Tiny-NVFP4"}'
    )
    comparison = json.loads(
        run("compare", trained, "--against", TRAINED, "--format", "json").stdout
    )
    comparison["changed"]["sqnr_db"] = 10**400  # no float is so large
    assert "is not a result of this version of mquant" in error_on(json.dumps(comparison))


def test_the_page_without_a_parent_says_what_is_missing(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    assert run("report", trained, "-o", out).exit_code == 0
    page = Page(out.read_text("utf-8"))
    assert "give the parent with --against" in page.text
    assert "give a text with --text" in page.text


def test_a_broken_checkpoint_has_a_report_and_exits_with_3(trained: Path, tmp_path: Path) -> None:
    bad = mutated(trained, tmp_path, edit=without("layers.1.self_attn.o_proj"))
    out = tmp_path / "r.html"
    result = run("report", bad, "--against", TRAINED, "-o", out)
    assert result.exit_code == 3
    assert "parent-tensor-missing" in Page(out.read_text("utf-8")).text


def test_an_output_that_cannot_be_written_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("report", trained, "-o", tmp_path / "file/r.html")
    assert result.exit_code == 1
    assert "r.html cannot be written: " in " ".join(result.stderr.split())


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_lays_the_page_out(html: Path, tmp_path: Path, width: int, dark: bool) -> None:
    layout = laid_out(html, tmp_path, width, dark=dark)
    assert int(layout["width"]) <= width, "nothing sticks out; what is too wide scrolls by itself"
    assert layout["back"] == ("rgb(14, 19, 25)" if dark else "rgb(246, 247, 249)")
    assert layout["ink"] == ("rgb(230, 235, 241)" if dark else "rgb(22, 32, 44)")
    assert (layout["broken"], layout["scripts"], layout["title"]) == ("0", "0", "Tiny-NVFP4")


@needs_chromium
def test_a_browser_runs_nothing_of_a_hostile_name(tmp_path: Path) -> None:
    name = f"{'long' * 60} <script>document.title=1</script>"
    page = tmp_path / "r.html"
    rows = [(name, name)]
    page.write_text(
        render(Evidence(name, None, name, "error", rows, [], [], name, name, [name], "mquant")),
        "utf-8",
    )
    layout = laid_out(page, tmp_path, 390, dark=False)
    assert layout["scripts"] == "0"
    assert int(layout["width"]) <= 390
