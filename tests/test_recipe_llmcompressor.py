"""mquant reads llmcompressor's recipes, and refuses a modifier that it would not follow."""

from pathlib import Path

import pytest

from mquant.errors import DataFileError
from mquant.family_rows import Role
from mquant.recipe import Recipe, load_recipe
from recipe_files import SCHEMES, complaint, foreign, loaded, written

MODIFIER = "QuantizationModifier: {scheme: NVFP4A16, targets: [Linear], ignore: [lm_head]}"
LINEAR = dict.fromkeys((role for role in Role if role.linear), "NVFP4A16")


@pytest.mark.parametrize(
    "text",
    [
        f"quant_stage:\n  quant_modifiers:\n    {MODIFIER}\n",
        f"default_stage:\n  default_modifiers:\n    {MODIFIER}\n",
        f"quant_modifiers:\n  {MODIFIER}\n",
        f"args: {{}}\nquant_stage:\n  run_type: oneshot\n  quant_modifiers:\n    {MODIFIER}\n",
    ],
    ids=["quant_stage", "default_stage", "no stage", "with other keys"],
)
def test_a_quantization_modifier_is_read_from_any_stage(tmp_path: Path, text: str) -> None:
    recipe = loaded(tmp_path, text)

    assert recipe == Recipe(
        name="mine",
        title="NVFP4A16, from mine.yaml",
        suffix="NVFP4A16",
        roles=LINEAR,
        ignore=("lm_head",),
        foreign=True,
    )


WEIGHTS = "num_bits: 4, type: float, strategy: tensor_group, group_size: 16"


@pytest.mark.parametrize(
    "modifier",
    [
        "{scheme: NVFP4A16}",
        "{scheme: NVFP4A16, targets: Linear}",
        "{scheme: NVFP4A16, targets: [Linear], ignore: null}",
        "{scheme: NVFP4A16, targets: [Linear, 're:.*attn.*']}",
        "{scheme: {NVFP4A16: [Linear]}}",
        "{scheme: {NVFP4A16: Linear}, targets: [Linear]}",
        f"{{config_groups: {{group_0: {{targets: [Linear], weights: {{{WEIGHTS}}}}}}}}}",
        f"{{config_groups: {{g: {{weights: {{{WEIGHTS}, observer: minmax}}}}}}, scheme: null}}",
        "{scheme: NVFP4A16, config_groups: null, kv_cache_scheme: null, weight_observer: null}",
        "{scheme: NVFP4A16, bypass_divisibility_checks: false, requires_calibration_data: false}",
    ],
)
def test_every_way_to_write_nvfp4a16_on_linear_is_one_recipe(tmp_path: Path, modifier: str) -> None:
    recipe = foreign(tmp_path, modifier)

    assert (recipe.roles, recipe.targets, recipe.ignore) == (LINEAR, (), ())


@pytest.mark.parametrize(
    ("modifier", "scheme"),
    [
        ("{scheme: FP8_DYNAMIC}", "FP8_DYNAMIC"),
        ("{scheme: NVFP4}", "NVFP4"),
        (
            "{config_groups: {g: {weights: {num_bits: 8, type: float, strategy: channel}, "
            "input_activations: {num_bits: 8, type: float, strategy: token, dynamic: true}}}}",
            "FP8_DYNAMIC",
        ),
    ],
)
def test_other_schemes_are_known_by_name_and_by_config_group(
    tmp_path: Path, modifier: str, scheme: str
) -> None:
    assert set(foreign(tmp_path, modifier).roles.values()) == {scheme}


def test_targets_other_than_linear_are_kept(tmp_path: Path) -> None:
    recipe = foreign(tmp_path, "{scheme: {NVFP4A16: ['re:.*experts.*']}}")

    assert recipe.targets == ("re:.*experts.*",)


ONE_GROUP = f"mine.yaml: its config group is none of mquant's schemes ({SCHEMES})."


@pytest.mark.parametrize(
    ("modifier", "sentence"),
    [
        (
            "{scheme: W8A16}",
            f"mine.yaml: roles.expert: unknown scheme 'W8A16'; the schemes are {SCHEMES}, and "
            "source.",
        ),
        (
            "{scheme: source}",
            "mine.yaml: llmcompressor has no scheme 'source'.",
        ),
        ("{targets: [Linear]}", "mine.yaml: mquant needs one scheme or one config group."),
        (
            "{scheme: {NVFP4A16: [Linear], FP8: ['re:.*x']}}",
            "mine.yaml: mquant needs one scheme or one config group.",
        ),
        (
            f"{{scheme: NVFP4A16, config_groups: {{g: {{weights: {{{WEIGHTS}}}}}}}}}",
            "mine.yaml: mquant needs one scheme or one config group.",
        ),
        (f"{{config_groups: {{g: {{weights: {{{WEIGHTS}, symmetric: false}}}}}}}}", ONE_GROUP),
        (f"{{config_groups: {{g: {{weights: {{{WEIGHTS}, observer: mse}}}}}}}}", ONE_GROUP),
        (
            f"{{config_groups: {{g: {{weights: {{{WEIGHTS}}}, input_activations: {{a: 4}}}}}}}}",
            ONE_GROUP,
        ),
        ("{config_groups: {g: {weights: {num_bits: 8}}}}", ONE_GROUP),
        ("{config_groups: {g: {}}}", ONE_GROUP),
        (
            "{scheme: NVFP4A16, weight_observer: mse}",
            "mine.yaml: mquant does not support weight_observer in a QuantizationModifier.",
        ),
        (
            "{scheme: NVFP4A16, kv_cache_scheme: {num_bits: 8}, actorder: static, 5: x}",
            "mine.yaml: mquant does not support 5, actorder, kv_cache_scheme in a "
            "QuantizationModifier.",
        ),
        (
            "{scheme: NVFP4A16, ignore: {a: b}}",
            "mine.yaml: ignore.0: Input should be a valid string.",
        ),
        (
            "{scheme: NVFP4A16, ignore: ['re:*']}",
            "mine.yaml: ignore.0: 're:*' is no regular expression: nothing to repeat at "
            "position 0.",
        ),
        ("[]", "mine.yaml: QuantizationModifier holds no keys."),
    ],
)
def test_a_modifier_that_mquant_would_not_follow_is_refused(
    tmp_path: Path, modifier: str, sentence: str
) -> None:
    with pytest.raises(DataFileError) as caught:
        foreign(tmp_path, modifier)
    assert caught.value.message == sentence
    assert caught.value.fix


@pytest.mark.parametrize(
    ("modifiers", "kinds"),
    [
        ("{SmoothQuantModifier: {}, QuantizationModifier: {scheme: NVFP4A16}}",
         "SmoothQuantModifier, QuantizationModifier"),
        ("{GPTQModifier: {scheme: NVFP4A16}}", "GPTQModifier"),
    ],
)  # fmt: skip
def test_unsupported_modifiers_are_named(tmp_path: Path, modifiers: str, kinds: str) -> None:
    assert complaint(tmp_path, f"s_stage: {{s_modifiers: {modifiers}}}") == (
        f"mine.yaml asks for {kinds}; mquant reads recipes with one QuantizationModifier.",
        "Leave only the QuantizationModifier, or run the recipe with llmcompressor.",
    )


def test_a_recipe_of_two_stages_is_refused(tmp_path: Path) -> None:
    text = f"a_stage: {{a_modifiers: {{{MODIFIER}}}}}\nb_stage: {{b_modifiers: {{{MODIFIER}}}}}\n"

    assert complaint(tmp_path, text)[0] == (
        "mine.yaml asks for QuantizationModifier, QuantizationModifier; mquant reads recipes with "
        "one QuantizationModifier."
    )


@pytest.mark.upstream
def test_a_recipe_that_llmcompressor_wrote_is_read(tmp_path: Path) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.recipe import Recipe as UpstreamRecipe

    group = preset_name_to_scheme("NVFP4A16", ["Linear"])
    ignore = ["lm_head", "re:.*mlp.gate$"]
    for number, modifier in enumerate(
        (
            QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=ignore),
            QuantizationModifier(scheme={"NVFP4A16": ["Linear"]}, ignore=ignore),
            QuantizationModifier(config_groups={"group_0": group}, ignore=ignore),
        )
    ):
        text = UpstreamRecipe.from_modifiers(modifier).yaml()

        recipe = load_recipe(written(tmp_path, text, f"recipe-{number}.yaml"))

        assert (recipe.roles, recipe.targets, recipe.ignore) == (LINEAR, (), tuple(ignore))
