"""Prove every shipped family by transformers' model and by vLLM's loader; write docs/families.md.

    python scripts/prove_families.py [--check] [NAME ...]

needs `mquant loader install vllm` and `mquant loader install transformers`. For every family the
tiny checkpoint of `mquant synth` is held to transformers' own model on the meta device, with its
conversion undone: equal names and shapes. vLLM loads the headers of that checkpoint, and of what
every recipe that needs no data plans for it. `--check` writes nothing, and fails if a row differs
from the page's; with names, only these families are proven.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

from differential_ask import Answer, vllm
from mquant.checkpoint import CONFIG_NAME, Folder, open_checkpoint
from mquant.errors import MquantError
from mquant.family import Family
from mquant.family_files import load_families
from mquant.family_rows import EVERY_LAYER, Role
from mquant.findings import Finding
from mquant.plan import Plan, config_json, make_plan
from mquant.recipe import Recipe, load_recipes
from mquant.synth import Precision, Sizes, make_config, make_tensors, synth
from mquant.verify.loaders.install import find_python
from released_sizes import section
from transformers_names import ask

PAGE: Final = Path(__file__).parent.parent / "docs/families.md"
HEAD: Final = """# The families, and what proves them

Written by `scripts/prove_families.py`; do not edit. `scripts/test-loaders.sh` checks some rows.

- **Release**: the parameters of the release whose config.json the family's file holds, and the
  releases with whose config.json `mquant plan --recipe nvfp4` was tried, at their real shapes, in
  BF16 or in FP8 blocks: it works with all of them.
- **transformers**: the names and shapes of the tiny checkpoint of `mquant synth` are those of
  transformers {version}'s own model on the meta device, with its conversion undone. Where
  transformers writes other names than the hub has, and loads both, the hub's are right.
- **vLLM**: what vLLM 0.32 does with the headers of the tiny checkpoint (BF16), and of what each
  recipe that needs no data plans for it. *Not asked*: vLLM's CPU build cannot build the model.
  *Unproven*: vLLM has no such model, or the family's file does not say what vLLM builds;
  `mquant verify` of such a checkpoint says "not judged". The tiny checkpoint has a tower
  where the file tells the tower's layers.
- **Kept**: the roles that the recipe nvfp4 keeps as they are, besides norms and biases. Loaders
  refuse quantized routers and embeddings, or gain nothing by them; small projections of linear
  attention, Mamba and indexers decide much and weigh little; towers and multi-token prediction are
  not in the text model that recipes are made for.

| family | model_type | release | transformers | vLLM | kept by nvfp4 |
| --- | --- | --- | --- | --- | --- |
"""
NOT_ASKED: Final = {"deepseek_v4": "vLLM has another model of it for CPUs"}
"""Families that vLLM's CPU build tells nothing about, and why."""
_HUB: Final = "the release's names are right, and vLLM takes them"
BELIEVED: Final = {
    "deepseek_v4": f"it saves names of its own; {_HUB}",
    "kimi_k25": f"it undoes its conversion for the tower's blocks, and so renames layers; {_HUB}",
    "longcat_flash": "it saves weights of experts that have none; the release has no such tensors",
    "step3p7": "it reads `text_config`, and the release's config.json has no such table",
}
"""Families whose names or shapes transformers writes otherwise: how, and who is right."""
SHORTER: Final = {
    "contains custom code": "config.json names code of its own",
    "--mamba-block-size": "vLLM's CPU build takes no blocks of states",
    "trying to load has model type": "no such model",
}
"""Words of vLLM's messages -> what the page says instead."""
SMALL: Final = (Role.NORM, Role.OTHER, Role.ROUTING_BIAS)


@dataclass
class Proof:
    """What is known of a family: the cells of its row, and the folders that vLLM is asked about."""

    family: Family
    release: str = ""
    names: str = ""
    kept: str = ""
    folders: dict[str, Path] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def row(self, answers: Mapping[Path, Answer]) -> str:
        """Return the family's row of the page."""
        types = ", ".join(f"`{kind}`" for kind in self.family.model_types)
        believed = BELIEVED.get(self.family.name, "")
        names = f"{self.names}: {believed}" if believed else self.names
        cells = (self.family.title, types, self.release, names, self._vllm(answers), self.kept)
        return f"| {' | '.join(cells)} |\n"

    def _vllm(self, answers: Mapping[Path, Answer]) -> str:
        said: dict[str, list[str]] = {}
        why = NOT_ASKED.get(self.family.name)
        for form, path in self.folders.items():
            answer = Answer("not asked", "", why) if why else answers[path]
            shorter = (text for part, text in SHORTER.items() if part in answer.words)
            words = f"{answer.verdict}: {next(shorter, answer.words)}"
            words = "loads" if answer.verdict == "loads" else words
            said.setdefault(_short(words), []).append(form)
        for form, why in self.refused.items():
            said.setdefault(_short(why), []).append(form)
        cells = [f"{', '.join(forms)}: {words}" for words, forms in said.items()]
        unproven = [] if self.family.vllm else ["unproven: the file does not say what vLLM builds"]
        return "; ".join([*cells, *unproven])


def _short(text: str) -> str:
    """Return the beginning of a text, without the folders of this machine."""
    text = re.sub(r"/\S+/", "", text.replace("|", "/"))
    return " ".join(text.split())[:120]


def prepare(family: Family, folder: Path) -> Proof:
    """Write the tiny checkpoint, and the headers of what recipes plan for it."""
    proof = Proof(family)
    config = make_config(family, Sizes(), Precision.BF16, tiny=False)
    sizes = (prod(tensor.shape) for tensor in make_tensors(family, config, Precision.BF16))
    proof.release = "; ".join([f"{sum(sizes) / 1e9:,.1f} B", *family.synth.releases])
    tiny = {**family.synth.tiny, **family.synth.tiny_in_blocks}
    small = family.model_copy(update={"synth": family.synth.model_copy(update={"tiny": tiny})})
    src = synth(folder / family.name / "BF16", small).path
    proof.folders["BF16"] = src
    for name, recipe in load_recipes().items():
        if recipe.needs_data:
            continue
        try:
            plan = make_plan(open_checkpoint(Folder(src)), recipe, load_families())
        except MquantError as error:
            proof.refused[name] = error.message
            continue
        if name == "nvfp4":
            proof.kept = _kept(family, recipe)
        if plan.refusals:
            proof.refused[name] = _why(plan.refusals[0])
        else:
            proof.folders[name] = write_headers(plan, folder / family.name / name)
    return proof


def _why(refusal: Finding) -> str:
    """Return why there is no output, shortly."""
    cut = "do not divide into blocks" in refusal.message
    return "shapes too small" if cut else f"plan refuses ({refusal.rule})"


def _kept(family: Family, recipe: Recipe) -> str:
    roles = {row.role for row in family.tensors} - recipe.roles.keys()
    named = {role: role.value for role in roles if role not in SMALL}
    drafts = [row for row in family.tensors if row.role is Role.MTP]
    blocks = {row.block for row in drafts} - {EVERY_LAYER}
    if any(row.block in blocks and row.role in recipe.roles for row in family.tensors):
        # The other layers of multi-token prediction change with those of the model.
        own = (row.name.removesuffix(".weight").rpartition(".")[2] for row in drafts)
        named[Role.MTP] = f"mtp ({', '.join(name for name in own if name != '*')})"
    return ", ".join(sorted(named.values()))


def write_headers(plan: Plan, folder: Path) -> Path:
    """Write the result of a plan with holes for data: vLLM's probe reads headers only."""
    folder.mkdir(parents=True)
    for shard in plan.shards:
        with (folder / shard.name).open("xb") as file:
            file.write(shard.header)
            file.truncate(shard.file_bytes)
    (folder / CONFIG_NAME).write_text(json.dumps(config_json(plan)))
    return folder


def compare_names(proof: Proof, answer: Mapping[str, Any]) -> str:
    """Return how the names and shapes of the tiny checkpoint compare with transformers' model."""
    if answer["verdict"] == "no model":
        return "no such model"
    if answer["verdict"] != "ok":
        return f"not asked: {_short(answer['why'])}"
    checkpoint = open_checkpoint(Folder(proof.folders["BF16"]))
    own = {info.name: list(info.shape) for info in checkpoint.tensors.values()}
    theirs = {name: shape for name, (shape, _) in answer["tensors"].items()}
    also = {name: shape for name, (shape, _) in answer.get("accepts", {}).items()}
    differing = {name for name, shape in own.items() if theirs.get(name) != shape}
    unlike = sorted(name for name in differing if also.get(name) != own[name])
    if not unlike and not differing:
        lacking = [name for name in theirs if name not in own and not _tower(proof.family, name)]
        return "equal" if not lacking else f"lacks {lacking[0]}"
    if not unlike:
        return "equal, by what it also loads"
    return (
        f"differs: {unlike[0]}, and {len(unlike) - 1} more"
        if unlike[1:]
        else f"differs: {unlike[0]}"
    )


def _tower(family: Family, name: str) -> bool:
    """Return whether a tensor is of a part that synthetic checkpoints leave out."""
    role = family.classify(name)
    return role is not None and (role.row.prefix is not None or role.row.optional)


def main() -> int:
    """Prove families and write the page, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    python = find_python()
    families = load_families()
    chosen = [families[name] for name in options.names or families]
    with tempfile.TemporaryDirectory() as where:
        proofs = [prepare(family, Path(where)) for family in chosen]
        configs = {
            p.family.name: json.loads((p.folders["BF16"] / CONFIG_NAME).read_text()) for p in proofs
        }
        answers = ask(configs)
        for proof in proofs:
            proof.names = compare_names(proof, answers[proof.family.name])
        folders = [path for proof in proofs for path in proof.folders.values()]
        said = dict(zip(folders, vllm(python)(folders), strict=True))
    rows = {proof.family.name: proof.row(said) for proof in proofs}
    print("".join(rows.values()), end="")
    if not options.check:
        if not options.names:
            version = next(iter(answers.values()))["transformers"]
            table = HEAD.format(version=version) + "".join(rows.values())
            PAGE.write_text(table + section(), "utf-8")
        return 0
    return behind(rows.values())


def behind(rows: Iterable[str]) -> int:
    """Print the rows that the page lacks; return 1 if there are any."""
    page = PAGE.read_text("utf-8")
    missing = [row for row in rows if row not in page]
    print("".join(f"docs/families.md lacks this row: {row}" for row in missing), end="")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
