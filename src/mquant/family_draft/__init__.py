"""A draft of a family file, from the headers and the config.json of a checkpoint.

The draft names every tensor of the checkpoint. What names, shapes and config.json do not settle is
a comment that begins with `# unsure`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from mquant.checkpoint import Checkpoint
from mquant.errors import SourceError
from mquant.family import Family
from mquant.family_draft.blocks import condition_of, without_keys
from mquant.family_draft.rows import Row, rows_of
from mquant.family_draft.sizes import Sizes, size_keys
from mquant.family_draft.tiny import fits, tiny_of
from mquant.family_rows import Role
from mquant.formulas import size_keys as keys_in
from mquant.plan.stored import READABLE, find_stored
from mquant.schemes import QUANTIZED_SUFFIXES
from mquant.usual_roles import EXPERT_KEYS

_MEANINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    "experts": EXPERT_KEYS,
    "top_k": (
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
        "experts_per_token", "top_k_experts", "top_k",
    ),
    "context": ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "num_attention_groups"),
    "intermediate": (
        "intermediate_size", "ffn_hidden_size", "moe_intermediate_size", "n_inner", "hidden_dim",
    ),
    "mtp": ("num_nextn_predict_layers", "num_mtp_layers"),
}  # fmt: skip
"""Meaning -> the keys of config.json that usually have it, the likeliest first."""
_OPTIONAL: Final = ("experts", "top_k", "kv_heads", "mtp")
_BIASES: Final = ("attention_bias", "use_qkv_bias", "qkv_bias", "add_qkv_bias", "use_bias")
_QK_NORMS: Final = ("use_qk_norm", "qk_norm", "qk_layernorm")


class Draft:
    """The draft of a family: `text` is the YAML file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read a checkpoint's headers and config.json. Raises SourceError if they do not do."""
        self.config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        self.unsure: list[str] = []
        self.nested = _nested(self.config)
        table = self.config[self.nested] if self.nested else {}
        self.settings: dict[str, Any] = {**self.config, **table}
        self.keys = self._meanings()
        self.defaults = self._defaults()
        hidden = self._size(self.keys["hidden"])
        self.rows = rows_of(_plain(checkpoint), self._size(self.keys.get("experts", "")), hidden)
        self.layers = self._size(self.keys["layers"])
        if not any(row.layers for row in self.rows.rows.values()) or not self.layers:
            raise SourceError(
                f"{checkpoint.source.name} has no numbered layers, or config.json has no number of "
                "layers.",
                "Give a checkpoint of a language model.",
            )
        implied = {key: value for key, (_, value) in self.defaults.items()}
        self.sizes = Sizes(size_keys(self.settings, implied), self.keys["hidden"])
        self.blocks: dict[str, str] = {}
        self.of_layers: dict[frozenset[int], str] = {}
        self.content = self._content()

    @property
    def text(self) -> str:
        """The family file."""
        return "".join(f"{line}\n" for line in self._lines())

    def _size(self, key: str) -> int:
        value = self.settings.get(key)
        return value if type(value) is int else 0

    def _meanings(self) -> dict[str, str]:
        keys = {}
        for meaning, names in _MEANINGS.items():
            found = [name for name in names if type(self.settings.get(name)) is int]
            if found:
                keys[meaning] = found[0]
                if len(found) > 1 and meaning not in ("intermediate",):
                    self.unsure.append(f"config.{meaning}: {' or '.join(found)}")
            elif meaning not in _OPTIONAL:
                keys[meaning] = names[0]
                self.unsure.append(f"config.{meaning}: config.json has none of {', '.join(names)}")
        if keys.get("mtp") and not self._size(keys["mtp"]):
            del keys["mtp"]
        return keys

    def _defaults(self) -> dict[str, tuple[str, int]]:
        """Return the usual defaults for keys that config.json leaves out, with their numbers."""
        heads, hidden = (self._size(self.keys[key]) for key in ("heads", "hidden"))
        defaults = {}
        if "kv_heads" not in self.keys and heads:
            self.unsure.append("config.kv_heads: no key; leave it out if attention is latent")
        own = any("head_dim" in key for key in self.settings if "linear" not in key)
        if not own and heads and hidden % heads == 0:
            defaults["head_dim"] = (
                f"{self.keys['hidden']} / {self.keys['heads']}",
                hidden // heads,
            )
        return defaults

    def _content(self) -> dict[str, Any]:
        kind = str(self.config.get("model_type"))
        rows = [self._row(row) for row in self.rows.rows.values()]
        rows += self._tied_head(rows)
        used = {key for row in rows for size in row.get("shape", ()) for key in keys_in(size)}
        used |= {
            key
            for row in rows
            for shape in row.get("shapes", {}).values()
            for size in shape
            for key in keys_in(size)
        }
        content: dict[str, Any] = {
            "name": kind.replace("-", "_"),
            "title": kind,
            "model_types": [kind],
            **({"nested": self.nested} if self.nested else {}),
            "config": self.keys,
            "defaults": {k: text for k, (text, _) in self.defaults.items() if k in used},
            "blocks": self.blocks,
            "tensors": rows,
            "stacks": [self._stack(stack.name) for stack in self.rows.stacks.values()],
            "synth": {"config": self.config, "tiny": {}},
        }
        content = {key: value for key, value in content.items() if value or key == "defaults"}
        tiny = tiny_of(self.settings, self.keys, used, self.of_layers)
        small = {**content, "synth": {"config": self.config, "tiny": tiny}}
        if fits(Family.model_validate(small)):
            return small
        self.unsure.append("synth.tiny: no small sizes fit all rows; the tiny model is the whole")
        return content

    def _row(self, row: Row) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": row.name, "role": row.role.value}
        if row.name.endswith(".*"):
            return entry
        if row.fused:
            entry["fused"] = row.fused
        if block := self._block(row):
            entry["block"] = block
        if row.dtype == "F32":
            entry["dtype"] = "F32"
        if row.role is Role.HEAD:
            entry["unless"] = "tie_word_embeddings"
        entry["shape"] = self._shape(row, row.usual_shape)
        others = set(row.shapes.values()) - {row.usual_shape}
        for shape in sorted(others):
            layers = frozenset(n for n in row.layers if row.shapes[n] == shape)
            block = self._block_of(layers, row.name, "shape")
            if block in self.blocks:
                entry.setdefault("shapes", {})[block] = self._shape(row, shape)
            else:
                entry.pop("shapes", None)
                entry.pop("shape", None)  # any shape is taken
                row.unsure.append("the shape, which differs from layer to layer")
                break
        if not entry.get("shape") and "shape" in entry:
            del entry["shape"]
        return entry

    def _shape(self, row: Row, shape: tuple[int, ...]) -> list[str]:
        texts = []
        for place, value in enumerate(shape):
            text, others = self.sizes.of(value, row.role, row.name, place)
            if others:
                row.unsure.append(f"{text}, or {' or '.join(others)}")
            elif text.isdigit() and value > 1:
                row.unsure.append(f"{text}: no key of config.json gives it")
            texts.append(text)
        return texts

    def _block(self, row: Row) -> str:
        """Return the block of a row; empty for a row of every layer."""
        inside = frozenset(layer for layer in row.layers if layer < self.layers)
        if not row.layers:
            return ""
        if not inside:
            self.blocks.setdefault("mtp", f"layer >= {self.keys['layers']}")
            return "mtp"
        if any(layer >= self.layers for layer in row.layers):
            self.blocks.setdefault("mtp", f"layer >= {self.keys['layers']}")
        if len(inside) < self.layers:
            return self._block_of(inside, row.name, row.role.value)
        for suffix, keys in ((".bias", _BIASES), ("_norm.weight", _QK_NORMS)):
            module = row.name.removesuffix(suffix)
            if row.name.endswith(suffix) and module.endswith(
                ("q_proj", "k_proj", "v_proj", ".q", ".k")
            ):
                switch = next((key for key in keys if self.settings.get(key) is True), "")
                if switch:
                    self.blocks.setdefault(switch, switch)
                return switch
        return ""

    def _block_of(self, layers: frozenset[int], name: str, title: str) -> str:
        """Return the block of some layers, named after the first row that has it."""
        if layers in self.of_layers:
            return self.of_layers[layers]
        title = self._title(layers, title)
        block, number = title, 2
        while block in self.of_layers.values() or block in ("layer", "mtp"):
            block, number = f"{title}_{number}", number + 1
        self.of_layers[layers] = block
        if condition := condition_of(layers, self.layers, self.settings):
            self.blocks[block] = condition
        elif condition := without_keys(layers, self.layers):
            self.blocks[block] = condition
            self.unsure.append(f"blocks.{block}: no key of config.json says which layers have it")
        else:
            numbers = ", ".join(map(str, sorted(layers)))[:200]
            self.unsure.append(f"blocks.{block}: no condition found for layers {numbers} ({name})")
        return block

    def _title(self, layers: frozenset[int], title: str) -> str:
        """Return the role, of all rows that exactly these layers have, that says most."""
        roles = [row.role for row in self.rows.rows.values() if row.layers == layers]
        telling = [role.value for role in roles if role not in (Role.NORM, Role.OTHER)]
        return telling[0] if telling else title

    def _tied_head(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the row of a head that shares the embeddings' weight, if there is no other."""
        if self.settings.get("tie_word_embeddings") is not True:
            return []
        if any(row["role"] == Role.HEAD.value for row in rows):
            return []
        shape = [row["shape"] for row in rows if row["role"] == Role.EMBEDDING.value]
        head = {"name": "lm_head.weight", "role": "head", "unless": "tie_word_embeddings"}
        return [{**head, "shape": shape[0]}] if shape else []

    def _stack(self, name: str) -> dict[str, Any]:
        stack = self.rows.stacks[name]
        self.unsure.extend(f"{name}: {text}" for text in stack.unsure)
        entry: dict[str, Any] = {"name": name, "holds": stack.holds}
        return {**entry, "transposed": True} if stack.transposed else entry

    def _lines(self) -> Iterator[str]:
        yield "# A draft, made from headers and config.json. docs/adding-a-family.md says what each"
        yield "# key means. Check each line below that begins with `# unsure`, then remove it."
        yield from (f"# unsure: {text}" for text in self.unsure)
        notes = {row.name: row.unsure for row in self.rows.rows.values()}
        for key, value in self.content.items():
            if key in ("tensors", "stacks"):
                yield f"{key}:"
                for row in value:
                    for note in dict.fromkeys(notes.get(row["name"], ())):
                        yield f"  # unsure: {note}"
                    yield f"  - {_flow(row)}"
            elif key in ("synth", "blocks"):
                yield f"{key}:"
                yield from (f"  {_flow(name)}: {_flow(part)}" for name, part in value.items())
            else:
                yield f"{key}: {_flow(value)}"


def draft_family(checkpoint: Checkpoint) -> Draft:
    """Return the draft of a family file for a checkpoint that is not quantized, or in FP8."""
    return Draft(checkpoint)


def _flow(value: Any) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _nested(config: Mapping[str, Any]) -> str:
    """Return the key of the table that has the text model's keys; empty if none has."""
    layers = _MEANINGS["layers"]
    if any(config.get(key) is not None for key in layers):
        return ""
    tables = [key for key, value in config.items() if isinstance(value, dict)]
    named = [key for key in tables if any(config[key].get(layer) for layer in layers)]
    return next((key for key in sorted(named, key=lambda key: "text" not in key)), "")


def _plain(checkpoint: Checkpoint) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, dtype and shape of every tensor, with the weights that are stored as codes."""
    stored = find_stored(checkpoint, checkpoint.tensors, READABLE)
    weights = stored.weights if stored else {}
    others = stored.others if stored else frozenset()
    infos = [
        weights[info.name][0] if info.name in weights else info
        for info in checkpoint.tensors.values()
        if info.name not in others
    ]
    packed = next((info.name for info in infos if info.name.endswith(QUANTIZED_SUFFIXES)), None)
    if packed:
        raise SourceError(
            f"{checkpoint.source.name} is quantized (it holds {packed}).",
            "Draft from the release in BF16 or FP8 that it was made from.",
        )
    return [(info.name, info.dtype, info.shape) for info in infos]
