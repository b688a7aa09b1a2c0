"""The good checkpoints of the differential test: every family, in every format that loaders know.

Recipes and exports are planned by mquant; other tools' formats are written here from their
descriptions.
"""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

from differential_draft import Draft, Header, Layout, Unfit
from differential_layouts import (
    GROUP,
    ct_fp8_static,
    fp8_blocks,
    fp8_static,
    fp8_tensor,
    modelopt_nvfp4,
    modelopt_w4a4,
    packed,
)
from differential_sizes import COMMON, SIZES, VARIANTS
from mquant.checkpoint import Checkpoint, Folder, open_checkpoint
from mquant.family import Family
from mquant.family_files import load_families
from mquant.family_rows import Role
from mquant.plan import (
    Plan,
    Target,
    hf_quant_config,
    make_export_plan,
    make_plan,
    scalars,
    survey_for,
)
from mquant.plan.loadable import OUTPUT_NOT_LOADABLE
from mquant.recipe import Recipe, load_recipes
from mquant.schemes import FP8_DYNAMIC, NVFP4, W4A16
from mquant.synth import Precision, Sizes, make_config, make_tensors

LINEAR: Final = (Role.EXPERT, Role.SHARED_EXPERT, Role.MLP, Role.ATTENTION)
_KEPT: Final = (Role.ROUTER, Role.LINEAR_ATTENTION, Role.MAMBA, Role.LATENT, Role.VISION)
PLAIN, ORIGINAL = "BF16", "FP8 original"
_FORMATS: Final[dict[str, Callable[[Draft, Random], Draft]]] = {}


def families() -> dict[str, Family]:
    """Return the families that ship and that have sizes here."""
    return {name: family for name, family in load_families().items() if name in SIZES}


def parent(family: Family, random: Random, precision: Precision = Precision.BF16) -> Draft:
    """Return an unquantized checkpoint of a family, or with FP8_BLOCK one as first released."""
    experts = random.choice((4, 8)) if family.config.experts else None
    if family.nested in family.synth.config and family.vllm and family.vllm.architectures:
        family = _alone(family) if random.random() < 0.25 else family
    config = make_config(
        family, Sizes(layers=random.choice((2, 3)), experts=experts), precision, tiny=True
    )
    config = family.with_settings(config, {**COMMON, **SIZES[family.name]})
    if VARIANTS[family.name] and random.random() < 0.4:
        config = family.with_settings(config, random.choice(VARIANTS[family.name]))
    plain = _headers(family, config, Precision.BF16)
    tensors = _headers(family, config, precision)
    draft = Draft(family.named_for(config), PLAIN, config, tensors, plain)
    if precision is Precision.FP8_BLOCK:
        draft.form = ORIGINAL
        draft.layouts = {
            name.removesuffix(".weight_scale_inv"): fp8_blocks
            for name in tensors
            if name.endswith(".weight_scale_inv")
        }
    return draft


def _alone(family: Family) -> Family:
    """Return the family with the text model's own config.json for that of the larger model."""
    given, rows = family.synth, family.vllm
    table = {
        **given.config[family.nested],
        "architectures": list(rows.architectures if rows else ()),
    }
    tiny = {key: value for key, value in given.tiny.items() if key != "vision_config"}
    synth = given.model_copy(update={"config": table, "tiny": tiny})
    return family.model_copy(update={"synth": synth})


def _headers(family: Family, config: dict[str, Any], precision: Precision) -> dict[str, Header]:
    # The formats quantize the tensors of each expert, which some of vLLM's models do not take.
    stacks = family.stacks if _has_whole_experts(family) else ()
    family = family.named_for(config).model_copy(update={"stacks": stacks, "wrapped": ()})
    return {t.name: (t.dtype, t.shape) for t in make_tensors(family, config, precision)}


def _has_whole_experts(family: Family) -> bool:
    return family.vllm is not None and family.vllm.walks == "whole experts"


def form(name: str) -> Callable[[Callable[[Draft, Random], Draft]], Any]:
    """Register a function that makes a quantized draft of a plain draft."""

    def register(make: Callable[[Draft, Random], Draft]) -> Callable[[Draft, Random], Draft]:
        _FORMATS[name] = make
        return make

    return register


def base(family: Family, name: str, random: Random) -> Draft:
    """Return a good checkpoint of a family in a format. Raises Unfit if a family has none."""
    precision = Precision.FP8_BLOCK if name == ORIGINAL else Precision.BF16
    made = parent(family, random, precision)
    if name in _FORMATS:
        made = _FORMATS[name](made, random)
        made.form = name
    made.config = json.loads(json.dumps(made.config))  # shares no table with mquant's schemes
    return made


@cache
def forms() -> tuple[str, ...]:
    """Return the names of all formats."""
    return (PLAIN, ORIGINAL, *_FORMATS)


# ------------------------------------------------------------------ what mquant itself plans


def _opened(draft: Draft, folder: str) -> Checkpoint:
    return open_checkpoint(Folder(draft.write(Path(folder, "checkpoint"))))


def _planned(draft: Draft, plan: Plan) -> Draft:
    """Return the draft of a plan's output."""
    if any(refusal.rule != OUTPUT_NOT_LOADABLE.id for refusal in plan.refusals):
        raise Unfit(", ".join(sorted(each.rule for each in plan.refusals)))
    made = draft.copy()
    made.tensors = {o.name: (o.dtype, o.shape) for unit in plan.units for o in unit.outputs}
    made.config["quantization_config"] = plan.quantization_config
    return made


def _by_recipe(recipe: Recipe) -> Callable[[Draft, Random], Draft]:
    def make(draft: Draft, _: Random) -> Draft:
        with tempfile.TemporaryDirectory() as folder:
            plan = make_plan(_opened(draft, folder), recipe, families(), allow_unsafe=True)
        made = _planned(draft, plan)
        for action in plan.actions:
            if action.scheme:
                made.layouts[action.module] = _of_scheme(action.scheme.outputs)
        return made

    return make


def _of_scheme(outputs: Callable[..., tuple[tuple[str, str, tuple[int, ...]], ...]]) -> Layout:
    return lambda module, shape: {
        name: (dtype, size) for name, dtype, size in outputs(module, shape, "BF16")
    }


def _register_recipes() -> None:
    """Register the formats of all recipes; recipes with the same schemes have one format."""
    seen: list[dict[Any, Any]] = []
    for name, recipe in sorted(load_recipes().items()):
        if recipe.roles not in seen:
            seen.append(dict(recipe.roles))
            form(f"recipe {name}")(_by_recipe(recipe))


_register_recipes()


def _exported(draft: Draft, recipe: str, random: Random) -> Draft:
    """Return ModelOpt's layout of a recipe's output, as `mquant export` writes it."""
    quantized = _FORMATS[f"recipe {recipe}"](draft, random)
    with tempfile.TemporaryDirectory() as folder:
        surveyed = survey_for(_opened(quantized, folder), families(), Target.MODELOPT)
        ones = {info.name: bytes(4) for info in scalars(surveyed)}
        plan = make_export_plan(surveyed, Target.MODELOPT, ones)
    made = _planned(draft, plan)
    with_input = recipe.endswith("w4a4")
    made.layouts = dict.fromkeys(quantized.layouts, modelopt_w4a4 if with_input else modelopt_nvfp4)
    made.files["hf_quant_config.json"] = hf_quant_config(plan)
    return made


@form("ModelOpt NVFP4A16")
def _modelopt_a16(draft: Draft, random: Random) -> Draft:
    return _exported(draft, "nvfp4", random)


@form("ModelOpt NVFP4")
def _modelopt_w4a4(draft: Draft, random: Random) -> Draft:
    return _exported(draft, "nvfp4-w4a4", random)


# ----------------------------------------------------------------- formats of other tools


def _kept(draft: Draft) -> list[str]:
    """Return an ignore list of all plain linear modules, embeddings left out as tools do."""
    kept = [*draft.modules(*_KEPT), "lm_head", *_mtp_kept(draft)]
    # A module also under the name that vLLM looks up, if the names differ.
    names = dict.fromkeys((*kept, *map(draft.family.in_vllm_name, kept)))
    return [*names, *_whole_kept(draft)]


def _mtp_kept(draft: Draft) -> list[str]:
    return [name for name in draft.modules(Role.OTHER) if name.endswith((".eh_proj", ".head"))]


def _whole_kept(draft: Draft) -> list[str]:
    """Return entries for experts in one tensor, as every tool reads them."""
    if not _has_whole_experts(draft.family):
        return []
    stacks = sorted({name.rpartition(".")[0] for name in draft.plain if ".experts." in name})
    return [*stacks, r"re:.*\.experts\..*"]


def _all(draft: Draft, layout: Layout, roles: tuple[Role, ...] = LINEAR) -> None:
    for module in draft.modules(*roles):
        draft.store(module, layout)


def args(**keys: Any) -> dict[str, Any]:
    """Return quantization arguments as compressed-tensors writes them."""
    usual = dict(W4A16.config_group["weights"], num_bits=8, strategy="tensor", type="float")
    return {**usual, "group_size": None, **keys}


def declared(draft: Draft, groups: list[dict[str, Any]], storage: str) -> None:
    """Declare config groups of compressed-tensors."""
    draft.config["quantization_config"] = {
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "format": storage,
        "ignore": _kept(draft),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": "0.13.0",
    }


def group(storage: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """Return a config group for all linear layers."""
    return {
        "format": storage,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }


@form("INT4")
def _int4(draft: Draft, random: Random) -> Draft:
    size = random.choice((32, 64, 128, None))
    symmetric, order = random.random() < 0.6, size is not None and random.random() < 0.2
    _all(draft, packed(4, size, symmetric=symmetric, order=order))
    weights = args(
        num_bits=4,
        type="int",
        strategy="channel" if size is None else "group",
        group_size=size,
        symmetric=symmetric,
        actorder="group" if order else None,
    )
    declared(draft, [group("pack-quantized", weights, None)], "pack-quantized")
    return draft


@form("FP8 static, compressed-tensors")
def _ct_static(draft: Draft, _: Random) -> Draft:
    _all(draft, ct_fp8_static)
    declared(draft, [group("float-quantized", args(), args())], "float-quantized")
    return draft


@form("FP8 attention, NVFP4 W4A4 experts")
def _mixed(draft: Draft, _: Random) -> Draft:
    attention = draft.modules(Role.ATTENTION)
    _all(draft, _of_scheme(FP8_DYNAMIC.outputs), (Role.ATTENTION,))
    _all(draft, _of_scheme(NVFP4.outputs), (Role.EXPERT, Role.MLP, Role.SHARED_EXPERT))
    fp8 = {**FP8_DYNAMIC.config_group, "targets": attention}
    rest = {**NVFP4.config_group, "targets": [r"re:.*mlp\..*(gate|up|down)_proj$"]}
    if not all(".mlp." in module for module in draft.quantized(Role.EXPERT)):
        rest["targets"] = [r"re:.*\.(mlp|experts|feed_forward)\..*(gate|up|down)_proj$"]
    if any(".w1" in module for module in draft.layouts):
        rest["targets"] = [r"re:.*experts\.\d+\.w[123]$"]
    declared(draft, [fp8, rest], "mixed-precision")
    return draft


@form("FP8 per tensor")
def _fp8_tensor(draft: Draft, random: Random) -> Draft:
    static = random.random() < 0.5
    _all(draft, fp8_static if static else fp8_tensor)
    draft.config["quantization_config"] = {
        "activation_scheme": "static" if static else "dynamic",
        "ignored_layers": _kept(draft),
        "quant_method": "fp8",
    }
    return draft


def _modelopt(draft: Draft, algorithm: str, **more: Any) -> None:
    draft.config["quantization_config"] = {
        "ignore": _kept(draft),
        "kv_cache_scheme": None,
        "producer": {"name": "modelopt", "version": "0.41.0"},
        "quant_algo": algorithm,
        "quant_method": "modelopt",
        **more,
    }


@form("ModelOpt FP8")
def _modelopt_fp8(draft: Draft, _: Random) -> Draft:
    _all(draft, fp8_static)
    _modelopt(draft, "FP8")
    return draft


@form("ModelOpt MIXED_PRECISION")
def _modelopt_mixed(draft: Draft, _: Random) -> Draft:
    _all(draft, fp8_static, (Role.ATTENTION,))
    _all(draft, modelopt_w4a4, (Role.EXPERT, Role.MLP, Role.SHARED_EXPERT))
    layers = {}
    for module, layout in draft.layouts.items():
        nvfp4 = {"quant_algo": "NVFP4", "group_size": GROUP}
        layers[draft.family.in_vllm_name(module)] = (
            nvfp4 if layout is modelopt_w4a4 else {"quant_algo": "FP8"}
        )
    _modelopt(draft, "MIXED_PRECISION", quantized_layers=layers)
    return draft
