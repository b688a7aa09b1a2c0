"""Recipes: the precision of each role. A recipe says *what* is wanted, never paths or speed.

A recipe is an mquant file (`recipes/*.yaml`: role -> scheme) or an llmcompressor recipe with a
QuantizationModifier (targets, scheme, ignore). mquant converts the second kind to the first, so all
other modules know one kind only.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mquant.data_files import folder, read_yaml
from mquant.errors import DataFileError, UsageError
from mquant.family_rows import Role
from mquant.name_patterns import MAX_LENGTH, Matches, Style, match
from mquant.schemes import SCHEMES, Scheme
from mquant.text import names
from mquant.untrusted import is_file

AS_STORED: Final = "source"
"""The wish of a role whose weights stay as the source stores them, quantized or not."""


def _known_scheme(name: str) -> str:
    if name not in SCHEMES and name != AS_STORED:
        raise ValueError(
            f"unknown scheme {name!r}; the schemes are {', '.join(SCHEMES)}, and {AS_STORED}"
        )
    return name


def _compiles(entry: str) -> str:
    if len(entry) > MAX_LENGTH:
        raise ValueError(f"the entry has more than {MAX_LENGTH:,} characters")
    if entry.startswith("re:"):
        try:
            re.compile(entry[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{entry!r} is no regular expression: {error}") from None
    return entry


SchemeName = Annotated[str, AfterValidator(_known_scheme)]
Pattern = Annotated[str, AfterValidator(_compiles)]


class KeptLayers(BaseModel):
    """The numbers of layers at each end that keep the parent's bytes, whatever their role."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)


class Calibration(BaseModel):
    """The calibration text: the number of samples, the most tokens of a sample, and the seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(default=256, ge=1)
    length: int = Field(default=2048, ge=2)
    seed: int = 0


class Recipe(BaseModel):
    """A table of role -> scheme. A role that is not named keeps the parent's numbers.

    The value `source` stands for a scheme: what the source stores quantized stays as it is stored,
    and what it stores plain stays plain. A weight that a role without a value stores quantized is
    dequantized to BF16.

    `targets` and `ignore` narrow the recipe by module name: an exact name, or `re:` and a regular
    expression that is matched from the start of the name, as in compressed-tensors and vLLM. Either
    the hub's name of a module or its name in memory may match.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str = ""
    description: str = ""
    suffix: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    roles: Mapping[Role, SchemeName]
    revision: int = Field(default=1, ge=1)
    """The number of times that a release has changed what a shipped recipe of this name makes."""
    scales: Literal["minmax", "search", "hessian"] = "minmax"
    """`minmax`: llmcompressor's scales, bit for bit. `search`: the scales of the smallest error.
    `hessian`: the scales of the smallest error of the outputs on the calibration data, block by
    block."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """`gptq`: later columns compensate each column's error, weighted by the calibration data."""
    order: Literal["stored", "descending"] = "stored"
    """The order in which GPTQ rounds columns: as stored, or columns with the largest inputs first.
    Columns keep their places and groups, so the format stays the same."""
    sweeps: int = Field(default=0, ge=0, le=100)
    """How many times, after GPTQ, each code is chosen anew, given all other codes of its row."""
    smoothing: Literal["none", "awq"] = "none"
    """`awq`: factors multiply the columns of weights, so that the columns that matter most to the
    calibration data lose least, and divide the norms and weights that feed these columns."""
    calibration: Calibration = Calibration()
    keep_layers: KeptLayers = KeptLayers()
    targets: tuple[Pattern, ...] = ()
    ignore: tuple[Pattern, ...] = ()
    foreign: bool = Field(default=False, exclude=True)
    """Whether the file is llmcompressor's, in which an entry that matches nothing is common."""

    @model_validator(mode="after")
    def _of_gptq(self) -> Self:
        asked = {"scales": self.scales == "hessian", "order": self.order != "stored"}
        asked["sweeps"] = self.sweeps > 0
        for key, given in asked.items():
            if given and self.rounding != "gptq":
                raise ValueError(f"{key}: {getattr(self, key)} needs rounding: gptq")
        return self

    def on(self, names: Iterable[str]) -> "Choice":
        """Return the recipe applied to a model whose modules have these names.

        Raises SourceError if the entries cannot be matched in reasonable time.
        """
        known = frozenset(names) if self.targets or self.ignore else frozenset()
        return Choice(
            self, match(self.targets, known, Style.NAMES), match(self.ignore, known, Style.NAMES)
        )

    def sampled(self, samples: int | None, length: int | None) -> "Recipe":
        """Return the recipe with another number or length of calibration samples; None: as it is.

        The same as if the recipe's file said so.
        """
        stated = {"samples": samples, "length": length}
        update = {key: value for key, value in stated.items() if value is not None}
        return self.model_copy(update={"calibration": self.calibration.model_copy(update=update)})

    @property
    def needs_data(self) -> bool:
        """Whether text must go through the model."""
        measured = any(scheme.needs_data for scheme in self.schemes)
        return measured or self.rounding == "gptq" or self.smoothing == "awq"

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes of the roles, in the order of the roles."""
        return tuple(SCHEMES[name] for name in self.roles.values() if name != AS_STORED)

    def keeps_layer(self, layer: int | None, layers: int) -> bool:
        """Return whether the layer, one of `layers`, keeps the parent's bytes."""
        first, last = self.keep_layers.first, self.keep_layers.last
        if layer is None:
            return False
        return layer < first or layers - last <= layer < layers


@dataclass(frozen=True)
class Choice:
    """A recipe, and the names of a model that its entries match."""

    recipe: Recipe
    targets: Matches
    ignore: Matches

    def scheme(self, role: Role, module_names: tuple[str, ...]) -> Scheme | None:
        """Return the scheme for a module of this role and these names; None to keep its bytes."""
        wish = self._wish(role, module_names)
        return None if wish is None or wish == AS_STORED else SCHEMES[wish]

    def as_stored(self, role: Role, module_names: tuple[str, ...]) -> bool:
        """Return whether a module of this role and these names stays as the source stores it."""
        return self._wish(role, module_names) == AS_STORED

    def _wish(self, role: Role, module_names: tuple[str, ...]) -> str | None:
        wish = self.recipe.roles.get(role)
        if wish is None or not self.ignore.names.isdisjoint(module_names):
            return None
        if self.recipe.targets and self.targets.names.isdisjoint(module_names):
            return None
        return wish


def load_recipes() -> dict[str, Recipe]:
    """Return the shipped recipes by name, sorted."""
    paths = sorted(folder("recipes").glob("*.yaml"), key=lambda path: path.stem)
    return {path.stem: load_recipe(path) for path in paths}


def find_recipe(name: str) -> Recipe:
    """Return a shipped recipe by its name, or the recipe in a file.

    Raises UsageError if there is no such recipe or file, DataFileError if the file is wrong.
    """
    shipped = folder("recipes") / f"{name}.yaml"
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) and is_file(shipped):
        return load_recipe(shipped)
    if not os.path.lexists(name):
        raise UsageError(
            f"There is no recipe {name!r}, and no such file.",
            f"Take one of: {', '.join(load_recipes())}; or give a YAML file.",
        )
    return load_recipe(Path(name))


def data_file(data: str) -> Path | None:
    """Return the calibration file that `data` names; None if `data` is the id of a dataset.

    The hub is never asked for the name of a file: raises DataFileError for a file of another kind.
    """
    path = Path(data)
    if path.name.endswith((".jsonl", ".jsonl.gz", ".txt", ".parquet")):
        return path
    if os.path.lexists(path):
        what = "no .jsonl, .txt or .parquet file" if is_file(path) else "not a regular file"
        raise DataFileError(f"{data} is {what}.", "Correct the path after --data.")
    return None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file, mquant's or llmcompressor's. Raises DataFileError for a wrong file."""
    data = read_yaml(path)
    modifier = _quantization_modifier(data, path.name)
    if modifier is not None:
        data = _from_llmcompressor(modifier, path)
    try:
        recipe = Recipe.model_validate(data)
        return recipe.model_copy(update={"foreign": modifier is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        parts = ": ".join(filter(None, (path.name, where, message)))
        raise DataFileError(f"{parts}.", "Correct the recipe.") from None


def _quantization_modifier(data: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the QuantizationModifier of an llmcompressor recipe; None for an mquant recipe."""
    stages = [value for key, value in data.items() if str(key).endswith("_stage")]
    groups = [
        value
        for stage in (stages or [data])
        if isinstance(stage, Mapping)
        for key, value in stage.items()
        if str(key).endswith("_modifiers") and isinstance(value, Mapping)
    ]
    modifiers = [(kind, body) for group in groups for kind, body in group.items()]
    if not modifiers:
        return None
    if len(modifiers) > 1 or modifiers[0][0] != "QuantizationModifier":
        raise DataFileError(
            f"{name} asks for {', '.join(str(kind) for kind, _ in modifiers)}; "
            "mquant reads recipes with one QuantizationModifier.",
            "Leave only the QuantizationModifier, or run the recipe with llmcompressor.",
        )
    body = modifiers[0][1]
    if not isinstance(body, Mapping):
        raise DataFileError(f"{name}: QuantizationModifier holds no keys.", "Correct the recipe.")
    return body


def _from_llmcompressor(body: Mapping[str, Any], path: Path) -> dict[str, Any]:
    known = {"targets", "scheme", "ignore", "config_groups"}
    # llmcompressor writes every default: a key that is null or false asks for nothing.
    unknown = sorted(str(key) for key, value in body.items() if value and key not in known)
    if unknown:
        raise DataFileError(
            f"{path.name}: mquant does not support {names(unknown)} in a QuantizationModifier.",
            "Remove the key, or run the recipe with llmcompressor.",
        )
    scheme, targets = _scheme_and_targets(body, path.name)
    if scheme == AS_STORED:
        raise DataFileError(
            f"{path.name}: llmcompressor has no scheme {scheme!r}.", "Correct the recipe."
        )
    # "Linear" means every linear layer: also the router, which is linear in the hub's model code
    # and to every tool that goes by tensor names.
    return {
        "name": path.stem,
        "title": f"{scheme}, from {path.name}",
        "suffix": scheme,
        "roles": {role.value: scheme for role in Role if role.linear},
        "targets": [] if "Linear" in targets else targets,
        "ignore": _list(body.get("ignore")),
    }


def _scheme_and_targets(body: Mapping[str, Any], name: str) -> tuple[str, list[Any]]:
    groups = body.get("config_groups")
    if isinstance(groups, Mapping) and len(groups) == 1 and not body.get("scheme"):
        group = next(iter(groups.values()))
        if isinstance(group, Mapping):
            return _scheme_of_group(group, name), _list(group.get("targets", "Linear"))
    scheme = body.get("scheme")
    if isinstance(scheme, str) and not groups:
        return scheme, _list(body.get("targets", "Linear"))
    if isinstance(scheme, Mapping) and len(scheme) == 1 and not groups:
        preset, targets = next(iter(scheme.items()))
        return str(preset), _list(targets)
    raise DataFileError(
        f"{name}: mquant needs one scheme or one config group.",
        f"Write `scheme: {next(iter(SCHEMES))}` and `targets: [Linear]`.",
    )


def _scheme_of_group(group: Mapping[str, Any], name: str) -> str:
    weights = group.get("weights")
    for scheme in SCHEMES.values():
        expected = scheme.config_group["weights"]
        if (
            isinstance(weights, Mapping)
            and _alike(weights, expected)
            and _alike(group.get("input_activations"), scheme.config_group["input_activations"])
            and not group.get("output_activations")
            and weights.get("observer") in (None, "minmax", "memoryless_minmax")
        ):
            return scheme.name
    raise DataFileError(
        f"{name}: its config group is none of mquant's schemes ({', '.join(SCHEMES)}).",
        "Use one of these schemes, or run the recipe with llmcompressor.",
    )


def _alike(args: object, expected: Mapping[str, Any] | None) -> bool:
    """Return whether quantization arguments mean the same as a scheme's, observers aside."""
    if not isinstance(args, Mapping) or expected is None:
        return not args and expected is None
    keys = ("num_bits", "type", "strategy", "group_size", "block_structure", "dynamic", "actorder")
    same = all((args.get(key) or None) == (expected[key] or None) for key in keys)
    return same and args.get("symmetric", True) is True


def _list(value: object) -> list[Any]:
    """Return one entry or a list as a list: llmcompressor accepts both. Recipe validates it."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
