"""Compare config.json and side files with the parent's."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, Final

from mquant.checkpoint import Source, has_chat_template
from mquant.errors import SourceError
from mquant.findings import Finding, rule
from mquant.loader_model.declared import undeclared
from mquant.loader_model.modules import ModuleView
from mquant.text import names
from mquant.verify.numbers import PIECE

MOST_BYTES: Final = 1_000_000_000
"""The largest side file that is compared: the largest tokenizers have 40 MB."""
# Keys that writers stamp or rename, and on which no loader depends.
_STAMPS: Final = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_ROPE: Final = "rope_parameters"
_NEEDED: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "tiktoken.model",
    "chat_template*",
    "generation_config.json",
    "*.py",
)
_LICENCE: Final = ("LICENSE*", "LICENCE*", "NOTICE*")
CONFIG_KEY_LOST: Final = rule(
    "config-key-lost",
    "config.json has every key of the parent's.",
    "Loaders use a default, and compute another model, without rope_theta or rotary_dim.",
    "Copy the keys from the parent's config.json.",
    needs="against",
)
CONFIG_KEY_DIFFERS: Final = rule(
    "config-key-differs",
    "config.json agrees with the parent's.",
    "Loaders compute a model other than the trained one.",
    "Copy the keys from the parent's config.json.",
    needs="against",
)
SIDE_FILE_MISSING: Final = rule(
    "side-file-missing",
    "The checkpoint has the parent's tokenizer, chat template, generation config and model code.",
    "Without these files engines do not serve the model, or use other prompts and sampling.",
    "Copy the files from the parent.",
    needs="against",
)
SIDE_FILE_DIFFERS: Final = rule(
    "side-file-differs",
    "Tokenizer, chat template, generation config and model code are the parent's.",
    "With another template or tokenizer the model behaves differently.",
    "Copy the files from the parent.",
    severity="warning",
    needs="against",
)
LICENCE_MISSING: Final = rule(
    "licence-missing",
    "The checkpoint has the parent's licence.",
    "Most licences must be in every copy.",
    "Copy the file from the parent.",
    severity="warning",
    needs="against",
)


def check_config(config: Mapping[str, Any], parent: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield findings about keys that config.json lost, and keys whose values differ."""
    if _ROPE in config or _ROPE in parent:
        config, parent = _with_rope(config), _with_rope(parent)
    config, parent = undeclared(config), undeclared(parent)
    keys = [key for key in parent if key not in _STAMPS]
    lost = [key for key in keys if key not in config]
    changed = [key for key in keys if key in config and config[key] != parent[key]]
    if lost:
        yield CONFIG_KEY_LOST.finding("config.json", f"config.json lost {names(lost)}.")
    if changed:
        yield CONFIG_KEY_DIFFERS.finding(
            "config.json", f"config.json differs from the parent's in {names(changed)}."
        )


def _with_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return config.json as transformers 5 writes it: all that says RoPE in one table.

    transformers 5 moves rope_theta and rope_scaling into rope_parameters.
    """
    scaling, table = config.get("rope_scaling"), config.get(_ROPE)
    rope = {**(scaling if isinstance(scaling, dict) else {})}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope |= {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    rope |= table if isinstance(table, dict) else {}
    rest = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", _ROPE)}
    return {**rest, _ROPE: rope}


def check_side_files(view: ModuleView, parent: ModuleView) -> Iterator[Finding]:
    """Yield findings about side files of the parent that are missing or differ."""
    source, origin = view.checkpoint.source, parent.checkpoint.source
    needed = [path for path in origin.files if _like(path, _NEEDED)]
    missing = [path for path in needed if path not in source.files]
    if has_chat_template(source):  # new tools write the template to a file, old tools do not
        missing = [path for path in missing if not path.startswith("chat_template")]
    if missing:
        yield SIDE_FILE_MISSING.finding(
            missing[0], f"The checkpoint lacks the parent's {names(missing)}."
        )
    changed = [path for path in needed if path in source.files and not _same(source, origin, path)]
    if changed:
        yield SIDE_FILE_DIFFERS.finding(
            changed[0], f"Files differ from the parent's: {names(changed)}."
        )
    licence = [path for path in origin.files if _like(path, _LICENCE)]
    if licence and not any(_like(path, _LICENCE) for path in source.files):
        yield LICENCE_MISSING.finding(
            licence[0], f"The checkpoint lacks the parent's {names(licence)}."
        )


def _like(path: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in path and any(fnmatch(path, pattern) for pattern in patterns)


def _same(source: Source, origin: Source, path: str) -> bool:
    size = source.files[path]
    if size == origin.files[path] and size > MOST_BYTES:
        raise SourceError(
            f"{path} of {source.name} has {size:,} bytes; mquant compares files of up to "
            f"{MOST_BYTES:,}.",
            "Get the file again, from the original release.",
        )
    spans = ((start, min(start + PIECE, size)) for start in range(0, size, PIECE))
    return size == origin.files[path] and all(
        source.read(path, *span) == origin.read(path, *span) for span in spans
    )
