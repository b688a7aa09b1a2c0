"""`mquant card` writes facts only, shows strings from files as text, and repeats its bytes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from markdown_it import MarkdownIt
from typer.testing import CliRunner, Result

from corpus import OF_NVFP4A16
from fakehub import FakeHub, hub
from judges import hashes, read_json
from mquant.cli.app import app
from mquant.runs.quantize import quantize
from run import TRAINED, plan_of, quantize_nvfp4
from uploads import metadata_errors

__all__ = ["hub"]

PARENT = "org/Parent"
FRONT = """---
license: other
license_name: modified-mit
license_link: https://example.org/licence
language: [en, zh]
pipeline_tag: text-generation
base_model: org/Original
---
# Parent REAP

![badge](https://example.org/REAP.png)
Made of org/Original with REAP (Router-weighted Expert Activation Pruning), 40 % of the experts.
"""

EVALUATED = {
    "schema": "mquant.eval/1",
    "ok": True,
    "source": "org/Tiny-NVFP4",
    "text": {"name": "heldout.txt"},
    "tokens": 8192,
    "context": 512,
    "perplexity": 12.5,
    "parent_perplexity": 12.34567,
    "kl_nats": 0.0043,
    "top1_agreement": 0.975,
}
COMPARED = {
    "schema": "mquant.compare/1",
    "ok": True,
    "source": "Tiny-NVFP4",
    "roles": [
        {"role": "expert", "identical": 0, "relative_error": 0.0948},
        {"role": "router", "identical": 3, "relative_error": None},
    ],
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_nvfp4(TRAINED, tmp_path_factory.mktemp("card") / "Tiny-NVFP4")


@pytest.fixture
def src(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / quantized.name))


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["card", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def card_of(src: Path, *arguments: object) -> str:
    run(src, *arguments)
    return (src / "README.md").read_text(encoding="utf-8")


def metadata(card: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return data


def from_hub(src: Path, hub: FakeHub, front: str = FRONT) -> str:
    """Serve a parent with the card `front`, name it in mquant.json, and return its commit."""
    parent = Path(shutil.copytree(TRAINED, src.parent / "parent"))
    (parent / "README.md").write_text(front, encoding="utf-8")
    commit = hub.add(PARENT, parent)
    record = read_json(src / "mquant.json")
    record["source"] = {"kind": "hub", "repo": PARENT, "commit": commit}
    (src / "mquant.json").write_text(json.dumps(record), encoding="utf-8")
    return commit


def edit_json(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**read_json(path), **keys}), encoding="utf-8")


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_the_card_says_what_the_checkpoint_is(src: Path) -> None:
    card = card_of(src)
    for fact in (
        "| Architecture | `MiniMaxM2ForCausalLM` (minimax_m2) |",
        "| Quantization | NVFP4A16, `compressed-tensors`, `nvfp4-pack-quantized` |",
        "| Layers | 3 |",
        "| Experts | 10, pruned from 256 |",
        "| Experts per token | 4 |",
        "| Parameters | 3.03 million (3,025,118) |",
        # 3,025,118 without the 6 of 10 experts (1,474,560 all together) that are not chosen
        "| Active per token | 2.14 million (2,140,382), embeddings and lm\\_head included |",
        "| Context | 2,048 tokens |",
        "| Size | 3.28 MB (3.13 MiB) in 1 shard |",
        "| expert | 90 | 0 | 1,474,560 |",
        "| router | 0 | 3 | 7,680 |",
    ):
        assert fact in card


def test_the_command_on_the_card_names_the_calibration_data(src: Path) -> None:
    fingerprint = read_json(src / "mquant.json")["fingerprint"]
    made_with = {**fingerprint, "data": "a" * 64, "importance": "none"}
    edit_json(src / "mquant.json", fingerprint=made_with)
    card = card_of(src)
    assert "--recipe nvfp4 --data DATA -o" in card
    assert f"`DATA` has the sha256 `{'a' * 64}`." in card
    edit_json(src / "mquant.json", fingerprint={**fingerprint, "data": "org/text"})
    assert "`DATA` is the dataset `org/text`." in card_of(src)


def test_the_ignore_list_on_the_card_is_exact_and_counted(src: Path) -> None:
    card = card_of(src)
    assert "`ignore` in config.json has 5 entries, exact names." in card
    assert "| `model.layers.{0..2}.block_sparse_moe.gate` | 3 |" in card
    assert "| `lm_head` | 1 |" in card


def test_the_card_has_the_verdict_and_the_rules_that_were_checked(src: Path) -> None:
    card = card_of(src, "--from", TRAINED)
    assert "Clean: 327 tensors, 102 quantized modules, checked structure and numbers, compared" in (
        card
    )
    assert "`router-quantized`" in card
    assert "`scale-not-finite`" in card
    assert "`kept-tensor-differs`" in card
    assert "| `tensor-parallel` | info |" in card


def test_the_card_names_the_engines_and_the_command_that_serves(src: Path) -> None:
    card = card_of(src)
    assert "```sh\nvllm serve ./Tiny-NVFP4\n```" in card
    engines = {"vLLM 0.32.0": "yes", "SGLang 0.5.23 or newer": "yes", "TensorRT-LLM": "no"}
    engines |= {"transformers 5.17": "wrongly", "llama.cpp": "no"}
    for engine, loads in engines.items():
        assert f"| {engine} | {loads} |" in card
    assert "| `top_k` | `40` |" in card
    # K and V, 3 layers, 2 heads of 32, 2 bytes
    assert "The KV cache takes 768 bytes a token in 16 bits, 1.50 MiB for the whole context" in card


@pytest.mark.parametrize(("recipe", "number_format"), [("fp8-dynamic", "8-bit floating point")])
def test_the_card_of_another_scheme_claims_only_what_was_checked(
    tmp_path: Path, recipe: str, number_format: str
) -> None:
    out = tmp_path / "Tiny"
    quantize(plan_of(TRAINED, recipe), out)
    assert run(out).exit_code == 0
    card = (out / "README.md").read_text("utf-8")
    assert re.search(rf"\| vLLM 0.32.0 \| yes \| .*{number_format}.*not run on a GPU", card)
    assert "SGLang" not in card


def test_the_card_has_the_command_and_every_checksum(src: Path) -> None:
    card = card_of(src, "--from", TRAINED)
    assert "```sh\nmquant quantize ./tiny-minimax-m2 --recipe nvfp4 -o Tiny-NVFP4\n```" in card
    recorded = {name: digest for name, digest in hashes(src).items() if name != "mquant.json"}
    del recorded["README.md"]
    for name, digest in recorded.items():
        assert f"\n{digest}  {name}\n" in card


def test_the_licence_of_a_parent_without_metadata_is_its_file_and_nothing_is_guessed(
    src: Path,
) -> None:
    card = card_of(src, "--from", TRAINED)
    front = metadata(card)
    assert (front["license"], front["license_link"]) == ("other", "LICENSE")
    assert not {"license_name", "base_model", "base_model_relation", "language"} & front.keys()
    (src / "LICENSE").unlink()
    assert "license" not in metadata(card_of(src))


def test_the_card_has_facts_of_the_parent_that_mquant_json_names(src: Path, hub: FakeHub) -> None:
    commit = from_hub(src, hub)
    card = card_of(src)
    assert metadata(card) == {
        "base_model": PARENT,
        "base_model_relation": "quantized",
        "language": ["en", "zh"],
        "library_name": "vllm",
        "license": "other",
        "license_link": "https://example.org/licence",
        "license_name": "modified-mit",
        "pipeline_tag": "text-generation",
        "tags": ["nvfp4", "compressed-tensors", "minimax_m2", "reap", "mquant"],
    }
    assert "| Pruning | The parent's card: “Made of org/Original with REAP (Router-weighted" in card
    assert "| Pruned from | org/Original |" in card
    assert f"mquant quantize {PARENT} --revision {commit} --recipe nvfp4 -o Tiny-NVFP4" in card
    read = {request.path.rpartition("/")[2] for request in hub.requests}
    assert read <= {"README.md", f"{commit}?blobs=true"}, "no more of it is read"


def test_a_parent_that_cannot_be_read_leaves_its_facts_out(src: Path, hub: FakeHub) -> None:
    from_hub(src, hub)
    hub.repos.clear()
    result = run(src)
    assert f"There is no repo {PARENT}" in result.stderr
    front = metadata((src / "README.md").read_text(encoding="utf-8"))
    assert front["base_model"] == PARENT
    assert "license_name" not in front


def test_another_parent_than_mquant_json_says_is_refused(src: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(TRAINED, tmp_path / "other"))
    edit_json(other / "config.json", rms_norm_eps=1e-5)
    result = run(src, "--from", other, code=1)
    assert "other is not the parent that mquant.json names" in result.stderr
    assert not (src / "README.md").exists()


def test_the_hub_accepts_the_metadata_of_the_card(src: Path, hub: FakeHub) -> None:
    from_hub(src, hub)
    card = card_of(src)
    assert metadata_errors(card) == []
    HfApi(endpoint=hub.url)._validate_yaml(card)
    assert ModelCard(card).data.get("base_model_relation") == "quantized"


def test_accuracy_is_not_measured_or_measured(src: Path, tmp_path: Path) -> None:
    assert "## Accuracy\n\nNot measured.\n" in card_of(src)
    evaluated, compared = written(tmp_path / "e", EVALUATED), written(tmp_path / "c", COMPARED)
    card = card_of(src, "--eval", evaluated, "--compare", compared)
    assert (
        "| Perplexity of the checkpoint | 12.5000 |\n| Perplexity of the parent | 12.3457 |" in card
    )
    assert "| KL divergence from the parent | 0.00430 nats per token |" in card
    assert "| The parent's most likely token | 97.50% of positions |" in card
    assert "By `mquant eval` on `heldout.txt`, 8,192 tokens, windows of 512." in card
    assert "| Relative L2 error of the weights, expert | 0.0948 |" in card
    assert "weights, router" not in card
    assert "Not measured." not in card


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": "mquant.plan/1"}, "is no result of mquant eval (mquant.eval/1)."),
        ({"ok": False}, "describes a run of mquant eval that failed."),
        ({"source": "Other"}, "is about Other, not about Tiny-NVFP4."),
    ],
)
def test_figures_of_something_else_are_refused(
    src: Path, tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    wrong = written(tmp_path / "w", {**EVALUATED, **change})
    assert f"{wrong} {sentence}" in run(src, "--eval", wrong, code=1).stderr
    assert not (src / "README.md").exists()


def test_the_card_lists_repairs_as_changes(src: Path, tmp_path: Path) -> None:
    bad = next(c for c in OF_NVFP4A16 if c.name == "one router quantized").make(src, tmp_path / "b")
    good = tmp_path / "good"
    command = ["repair", str(bad), "--from", str(TRAINED), "-o", str(good)]
    assert CliRunner().invoke(app, command).exit_code == 0
    card = card_of(good)
    assert "### Changes since" in card
    assert "1 tensor of router made again from the parent" in card
    assert "`router-quantized`" in card.partition("### Changes since")[2]


def test_the_facts_of_the_publisher_come_from_a_file(src: Path, tmp_path: Path) -> None:
    about = tmp_path / "about.yaml"
    about.write_text(
        "repo: org/Tiny-NVFP4\nbase_model: org/Base\n"
        "companions: [{repo: org/Other, what: 'in FP8'}]\n"
        "citation: |\n  @misc{x,\n    title = {```}\n  }\n",
        encoding="utf-8",
    )
    card = card_of(src, "--about", about)
    assert metadata(card)["base_model"] == "org/Base"
    assert "# org/Tiny-NVFP4\n" in card
    assert "vllm serve org/Tiny-NVFP4\n" in card
    assert "| [org/Other](https://huggingface.co/org/Other) | in FP8 |" in card
    assert "````\n@misc{x,\n  title = {```}\n}\n````\n" in card
    about.write_text("home: x\n", encoding="utf-8")
    assert (
        "about.yaml: home: Extra inputs are not permitted."
        in run(src, "--about", about, code=1).stderr
    )


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


def test_the_card_is_the_same_each_time_and_no_other_file_changes(src: Path) -> None:
    before = hashes(src)
    first = card_of(src, "--from", TRAINED)
    assert card_of(src, "--from", TRAINED) == first
    after = hashes(src)
    del after["README.md"]
    assert after == before


def test_a_readme_that_mquant_did_not_write_stays(src: Path, tmp_path: Path) -> None:
    (src / "README.md").write_text("mine", encoding="utf-8")
    assert "README.md exists, and mquant did not write it." in run(src, code=1).stderr
    run(src, "-o", tmp_path / "CARD.md")
    assert (src / "README.md").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "CARD.md").is_file()


def test_a_broken_checkpoint_gets_no_card(src: Path, tmp_path: Path) -> None:
    bad = next(c for c in OF_NVFP4A16 if c.name == "one router quantized").make(src, tmp_path / "b")
    result = run(bad, "--format", "json", code=3)
    report = json.loads(result.stdout)
    assert report["schema"] == "mquant.card/1"
    assert not report["ok"]
    assert "router-quantized" in {finding["rule"] for finding in report["findings"]}
    assert not (bad / "README.md").exists()


def test_an_unquantized_checkpoint_gets_no_card(tmp_path: Path) -> None:
    result = run(TRAINED, "-o", tmp_path / "x", code=1)
    assert "tiny-minimax-m2 is not quantized: a card describes a quantization." in result.stderr


def test_a_hub_repo_gets_a_card_too(src: Path, tmp_path: Path, hub: FakeHub) -> None:
    hub.add("org/Tiny-NVFP4", src)
    assert "say where its card goes, with -o." in run("org/Tiny-NVFP4", code=2).stderr
    facts = json.loads(run("org/Tiny-NVFP4", "-o", tmp_path / "CARD.md", "--format", "json").stdout)
    assert facts["card"] == str(tmp_path / "CARD.md")
    assert facts["repo"] == "org/Tiny-NVFP4"
    card = (tmp_path / "CARD.md").read_text(encoding="utf-8")
    assert "vllm serve org/Tiny-NVFP4\n" in card
    assert "checked structure." in card


def test_a_link_under_the_cards_name_is_replaced_not_written_through(
    src: Path, tmp_path: Path
) -> None:
    (tmp_path / "blob").write_text(card_of(src))
    (src / "README.md").unlink(missing_ok=True)
    (src / "README.md").symlink_to(tmp_path / "blob")
    (tmp_path / "blob").write_text(f"{(tmp_path / 'blob').read_text()}\nmine")
    run(src)
    assert not (src / "README.md").is_symlink()
    assert (tmp_path / "blob").read_text().endswith("mine")
