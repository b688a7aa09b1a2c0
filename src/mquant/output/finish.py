"""The files around the shards: side files, recipe.yaml, mquant.json, index, and config.json last.

No loader takes a folder without config.json for a checkpoint. So config.json is written when all
other files are on disk, and the index just before config.json.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml

from mquant.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    Folder,
    Overlay,
    Source,
    has_chat_template,
    is_weights,
)
from mquant.errors import OutputError
from mquant.events import Note
from mquant.loader_model.modules import MODELOPT_NAME
from mquant.output.disk import PARTIAL, out_of_space, write_whole
from mquant.output.folder import is_inside
from mquant.output.ledger import SHARES, is_ledger
from mquant.output.mquant_json import RECORD
from mquant.plan import Action, Plan, config_json
from mquant.schemes import SCHEMES
from mquant.text import names

LAST: Final = (INDEX_NAME, CONFIG_NAME)
"""The files written last, in this order: they complete the checkpoint."""
RECIPE_NAME: Final = "recipe.yaml"
_PICTURES: Final = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".mp4")
_PIECE: Final = 16_000_000
_OURS: Final = {RECORD, SHARES, RECIPE_NAME, MODELOPT_NAME}
# Files that people expect beside weights; one file of each group suffices.
_EXPECTED: Final = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model"),
    "generation config": ("generation_config.json",),
    "licence": ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-MODEL"),
}


def side_files(checkpoint: Checkpoint, *, cards: bool = False) -> tuple[str, ...]:
    """Return the paths of the files of the parent that are copied byte for byte.

    The model card and its pictures describe another checkpoint: they are left out unless `cards`.
    """
    source = checkpoint.source
    return tuple(
        path
        for path in checkpoint.side_files
        if path not in _OURS
        and not is_ledger(path)
        and not path.endswith(PARTIAL)
        and (cards or not _of_card(path))
        and not (isinstance(source, Folder) and source.leads_out(path))
    )


def _of_card(path: str) -> bool:
    return PurePosixPath(path).name.lower() == "readme.md" or path.lower().endswith(_PICTURES)


def source_notes(checkpoint: Checkpoint, source: Source) -> Iterator[Note]:
    """Yield notes on side files that are not copied or do not exist; `source` has the files."""
    for sentence in linked_files(source):
        yield Note("warning", sentence)
    for sentence in absent_files(checkpoint, source):
        yield Note("info", sentence)


def linked_files(source: Source) -> list[str]:
    """Return one sentence about the links that lead out of the source folder, if there are any.

    Links out of the folder are not copied: a hostile checkpoint could use a link to publish a file
    that only the user can read.
    """
    if not isinstance(source, Folder):
        return []
    links = [path for path in source.files if source.leads_out(path) and not is_weights(path)]
    sentence = "mquant does not copy links that lead out of the source folder"
    return [f"{sentence}: {names(links)}."] if links else []


def file_names(plan: Plan, sides: Iterable[str]) -> tuple[str, ...]:
    """Return the names of all files of the finished checkpoint."""
    shards = tuple(shard.name for shard in plan.shards)
    recipe = (RECIPE_NAME,) if plan.schemes else ()
    return (*shards, *sides, *recipe, RECORD, INDEX_NAME, CONFIG_NAME)


def finish(
    out: Path,
    plan: Plan,
    index: Mapping[str, Any],
    shards: Mapping[str, Mapping[str, Any]],
    sides: Mapping[str, Source],
    provenance: Mapping[str, Any],
    judge: Callable[[Source], None],
) -> None:
    """Write all files but the shards, which OUT must hold already; write config.json last.

    `plan` decides what config.json and recipe.yaml say; `index` is the content of the index.
    `shards` has `bytes` and `sha256` of every file of the checkpoint that `finish` does not write.
    `sides` maps each side file to the source that holds it. `provenance` goes into mquant.json:
    equal runs must have equal provenance. `judge` sees the checkpoint before index and config.json
    are on disk; if `judge` raises, `finish` does not write these two.
    """
    files = dict(shards)
    table, config = _json(index), _json(config_json(plan))
    for path, source in sides.items():
        files[path] = _copy(source, path, out)
    if plan.schemes:
        recipe = recipe_yaml(plan).encode()
        write_file(out, RECIPE_NAME, [recipe])
        files[RECIPE_NAME] = _described(recipe)
    for name, content in ((INDEX_NAME, table), (CONFIG_NAME, config)):
        files[name] = _described(content)
    record = {"schema": "mquant.output/1", **provenance, "files": dict(sorted(files.items()))}
    write_file(out, RECORD, [_json(record)])
    judge(Overlay(Folder(out), {INDEX_NAME: table, CONFIG_NAME: config}))
    write_file(out, INDEX_NAME, [table])
    write_file(out, CONFIG_NAME, [config])


def _described(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def index_json(plan: Plan) -> dict[str, Any]:
    """Return the index: the shard of each tensor, sorted by name, and the bytes of all tensors."""
    table = {o.name: s.name for s in plan.shards for unit in s.units for o in unit.outputs}
    return {
        "metadata": {"total_size": plan.output_bytes},
        "weight_map": {name: table[name] for name in sorted(table)},
    }


def recipe_yaml(plan: Plan) -> str:
    """Return a recipe with which llmcompressor makes the same decisions.

    The recipe's `ignore` has the hub's names and, if these differ, the names in memory. If the plan
    quantizes no module of a row of the family, patterns stand for all modules of the row.
    """
    ignore = [*_ignore_patterns(plan)]
    modifier: dict[str, Any]
    if len(plan.schemes) == 1 and plan.schemes[0].name in SCHEMES:
        modifier = {"targets": ["Linear"], "scheme": plan.schemes[0].name, "ignore": ignore}
    else:
        modifier = {"config_groups": plan.quantization_config["config_groups"], "ignore": ignore}
    kind = "QuantizationModifier"
    if plan.recipe.rounding == "gptq":
        kind = "GPTQModifier"
        modifier["actorder"] = "static" if plan.recipe.order == "descending" else None
    modifiers = {kind: modifier}
    if plan.recipe.smoothing == "awq":
        table = [
            {"smooth_layer": smooth, "balance_layers": fed}
            for smooth, fed in plan.family.smoothing_patterns
        ]
        modifiers = {"AWQModifier": {"mappings": table}, **modifiers}
    recipe = {"quant_stage": {"quant_modifiers": modifiers}}
    head = f"# What mquant did (recipe {plan.recipe.name}), as a recipe for llmcompressor.\n"
    if any(action.already for action in plan.actions):
        head += "# mquant kept quantized modules as the source stored them.\n"
    if plan.recipe.scales != "minmax":
        head += "# mquant searches the scales; llmcompressor computes others for these modules.\n"
    return head + yaml.safe_dump(recipe, sort_keys=False)


def absent_files(checkpoint: Checkpoint, source: Source) -> list[str]:
    """Return one sentence for each kind of expected side file that the source lacks."""
    present = set(checkpoint.side_files)
    absent = [
        f"The source has no {what} ({' or '.join(options[:2])}); none was written."
        for what, options in _EXPECTED.items()
        if not present & set(options)
    ]
    has_own = any("chat_template" in path for path in present)
    if not has_own and not has_chat_template(source):
        absent.append("The source has no chat template; none was written.")
    return absent


def _ignore_patterns(plan: Plan) -> Iterator[str]:
    rows: dict[str, list[Action]] = {}
    family = plan.family
    for action in plan.actions:
        meaning = family.classify(action.source.name)
        if meaning and len(action.source.shape) == 2 and action.source.name.endswith(".weight"):
            rows.setdefault(meaning.row.name, []).append(action)
    for row in family.tensors:
        actions = rows.get(row.name, [])
        kept = [action.module for action in actions if action.stored_in is None]
        if kept and len(kept) == len(actions):
            yield from row.patterns(str, family.in_memory_name)
        else:
            for module in kept:
                yield from dict.fromkeys((module, family.in_memory_name(module)))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _copy(source: Source, path: str, out: Path) -> dict[str, Any]:
    size = source.files[path]
    starts = range(0, size, _PIECE)
    digest = write_file(out, path, (source.read(path, at, min(at + _PIECE, size)) for at in starts))
    return {"bytes": size, "sha256": digest}


def write_file(out: Path, name: str, pieces: Iterable[bytes]) -> str:
    """Write a file of OUT, whole or not at all, and return its sha256. Raises OutputError."""
    path = out / name
    with out_of_space(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_inside(out, name):
            raise OutputError(
                f"{path.parent} is a link; mquant writes only into OUT.",
                "Remove the link, or give another folder with -o.",
            )
        return write_whole(path, pieces)
