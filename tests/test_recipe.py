"""mquant reads its own recipes and llmcompressor's, and refuses a key that it does not know."""

from pathlib import Path

import pytest

from make import make_checkpoint
from mquant.checkpoint import Folder, open_checkpoint
from mquant.errors import DataFileError, UsageError
from mquant.family import Role, load_families
from mquant.findings import Finding
from mquant.plan import Plan, make_plan
from mquant.recipe import Recipe, find_recipe, load_recipe, load_recipes
from mquant.schemes import NVFP4A16
from mquant.schemes import SCHEMES as KNOWN

SCHEMES = ", ".join(KNOWN)

ROLES = "{} or {}.".format(", ".join(f"'{role}'" for role in [*Role][:-1]), f"'{[*Role][-1]}'")
OURS = "name: mine\nsuffix: MINE\nroles: {expert: NVFP4A16}\n"
MODIFIER = "QuantizationModifier: {scheme: NVFP4A16, targets: [Linear], ignore: [lm_head]}"
LINEAR = dict.fromkeys((role for role in Role if role.linear), "NVFP4A16")


def written(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def loaded(tmp_path: Path, text: str) -> Recipe:
    return load_recipe(written(tmp_path, text))


def foreign(tmp_path: Path, modifier: str) -> Recipe:
    """Load a recipe of llmcompressor with the modifier `modifier`, a YAML flow mapping."""
    return loaded(
        tmp_path, f"quant_stage: {{quant_modifiers: {{QuantizationModifier: {modifier}}}}}"
    )


def complaint(tmp_path: Path, text: str) -> tuple[str, str]:
    with pytest.raises(DataFileError) as caught:
        loaded(tmp_path, text)
    return caught.value.message, caught.value.fix


def planned(tmp_path: Path, recipe: Recipe) -> Plan:
    checkpoint = open_checkpoint(Folder(make_checkpoint(tmp_path / "src")))
    return make_plan(checkpoint, recipe, load_families())


def findings(tmp_path: Path, recipe: Recipe, rule: str) -> list[Finding]:
    return [finding for finding in planned(tmp_path, recipe).findings if finding.rule == rule]


# --- where a recipe comes from


def test_nvfp4_opt_is_nvfp4_but_for_its_scales() -> None:
    minmax, searched = find_recipe("nvfp4"), find_recipe("nvfp4-opt")

    assert (minmax.scales, searched.scales) == ("minmax", "search")
    assert searched.roles == minmax.roles
    assert searched.suffix != minmax.suffix


def test_nvfp4_quantizes_experts_and_attention_and_nothing_else() -> None:
    recipe = find_recipe("nvfp4")

    assert {Role.EXPERT, Role.ATTENTION} <= recipe.roles.keys()
    assert all(role.linear and not role.refused_by_loaders for role in recipe.roles)
    assert (recipe.suffix, recipe.ignore, recipe.targets, recipe.foreign) == (
        "NVFP4",
        (),
        (),
        False,
    )


def test_every_shipped_recipe_is_named_as_its_file() -> None:
    recipes = load_recipes()

    assert "nvfp4" in recipes
    assert all(recipe.name == stem for stem, recipe in recipes.items())


def test_a_path_names_the_recipe_of_a_file(tmp_path: Path) -> None:
    assert find_recipe(str(written(tmp_path, OURS))).name == "mine"


def test_a_name_that_is_no_recipe_and_no_file_is_refused_with_the_list_of_recipes() -> None:
    with pytest.raises(UsageError) as caught:
        find_recipe("nvfp5")

    assert caught.value.message == "There is no recipe 'nvfp5', and no such file."
    assert caught.value.fix == f"Take one of: {', '.join(load_recipes())}; or give a YAML file."


@pytest.mark.parametrize("name", ["", ".", "..", "../recipes/nvfp4", "nvfp4.yaml", "/"])
def test_a_name_never_leads_out_of_the_recipes(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        find_recipe(name)


# --- ours


def test_a_role_that_is_not_named_keeps_the_parents_bytes(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, OURS).on(["a"])

    assert recipe.scheme(Role.EXPERT, ("a",)) is NVFP4A16
    assert recipe.scheme(Role.ATTENTION, ("a",)) is None


def test_ignore_is_exact_or_a_regular_expression_from_the_start(tmp_path: Path) -> None:
    kept = ["exact", "start.and.more", "the.end"]
    quantized = ["exact.not", "not.exact", "restart", "the.end.not"]
    recipe = loaded(tmp_path, OURS + "ignore: [exact, 're:start', 're:.*end$']\n").on(
        [*kept, *quantized]
    )

    assert [recipe.scheme(Role.EXPERT, (name,)) for name in kept] == [None] * 3
    assert [recipe.scheme(Role.EXPERT, (name,)) for name in quantized] == [NVFP4A16] * 4


def test_targets_narrow_a_recipe_and_ignore_wins(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, OURS + "targets: ['re:a']\nignore: [ab]\n").on(["aa", "ab", "b"])

    assert recipe.scheme(Role.EXPERT, ("aa",)) is NVFP4A16
    assert recipe.scheme(Role.EXPERT, ("ab",)) is None
    assert recipe.scheme(Role.EXPERT, ("b",)) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("speed: 9", "mine.yaml: speed: Extra inputs are not permitted."),
        ("1: 9", "mine.yaml: 1: Keys should be strings."),
        (
            "roles: {expert: NVFP3}",
            f"mine.yaml: roles.expert: unknown scheme 'NVFP3'; the schemes are {SCHEMES}.",
        ),
        (
            "ignore: ['re:[']",
            "mine.yaml: ignore.0: 're:[' is no regular expression: unterminated character set at "
            "position 0.",
        ),
        ("scales: best", "mine.yaml: scales: Input should be 'minmax' or 'search'."),
        ("ignore: [3]", "mine.yaml: ignore.0: Input should be a valid string."),
        (
            "suffix: ../../etc",
            "mine.yaml: suffix: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'.",
        ),
        (
            "suffix: 'a b'",
            "mine.yaml: suffix: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'.",
        ),
        (
            "roles: {experts: NVFP4A16}",
            "mine.yaml: roles.experts.[key]: Input should be " + ROLES,
        ),
    ],
)
def test_a_wrong_key_of_a_recipe_is_named(tmp_path: Path, change: str, sentence: str) -> None:
    key = change.split(":")[0]
    kept = "".join(f"{line}\n" for line in OURS.splitlines() if not line.startswith(key))

    assert complaint(tmp_path, f"{kept}{change}\n") == (sentence, "Correct the recipe.")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path, "name: mine\n")[0] == "mine.yaml: suffix: Field required."


def test_a_recipe_of_ours_cannot_claim_to_be_foreign(tmp_path: Path) -> None:
    # A foreign recipe would turn a typo in `ignore` from an error into a warning.
    assert not loaded(tmp_path, OURS + "foreign: true\n").foreign


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "{} is not valid YAML at line 1."),
        ("a: 1\nb: *nowhere\n", "{} is not valid YAML at line 2."),
        ("[" * 5000, "{} is not valid YAML."),
        ("!!python/object/apply:os.system [id]", "{} is not valid YAML at line 1."),
        ("- a\n", "{} does not hold a table of keys."),
        ("", "{} does not hold a table of keys."),
    ],
    ids=["cut off", "no anchor", "deep", "code", "list", "empty"],
)
def test_a_file_that_is_no_table_of_keys_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = str(tmp_path / "mine.yaml")

    assert complaint(tmp_path, text) == (sentence.format(path), "Correct the file.")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\x80\x81")

    with pytest.raises(DataFileError) as caught:
        load_recipe(path)
    assert caught.value.message == f"{path} is not a text file."


def test_a_model_given_as_a_recipe_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(10**12)

    with pytest.raises(DataFileError) as caught:
        load_recipe(path)
    assert caught.value.message == f"{path} is too large."


# --- llmcompressor's


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


def test_a_recipe_needs_data_for_activations_gptq_and_awq() -> None:
    needs = {name for name, recipe in load_recipes().items() if recipe.needs_data}
    assert needs == {"nvfp4-gptq", "nvfp4-w4a4", "w4a16-awq"}


def test_targets_other_than_linear_are_kept(tmp_path: Path) -> None:
    recipe = foreign(tmp_path, "{scheme: {NVFP4A16: ['re:.*experts.*']}}")

    assert recipe.targets == ("re:.*experts.*",)


ONE_GROUP = f"mine.yaml: its config group is none of mquant's schemes ({SCHEMES})."


@pytest.mark.parametrize(
    ("modifier", "sentence"),
    [
        (
            "{scheme: W8A16}",
            f"mine.yaml: roles.expert: unknown scheme 'W8A16'; the schemes are {SCHEMES}.",
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


# --- names


@pytest.mark.parametrize(
    "gates",
    ["re:.*block_sparse_moe\\.gate$", "re:.*mlp\\.gate$", "re:model.layers.\\d+.mlp.gate"],
)
def test_ignore_takes_names_of_the_hub_or_of_the_model_in_memory(
    tmp_path: Path, gates: str
) -> None:
    plan = planned(
        tmp_path, foreign(tmp_path, f"{{scheme: NVFP4A16, ignore: [lm_head, '{gates}']}}")
    )

    assert plan.findings == ()
    assert [a.role for a in plan.actions if a.scheme and a.role is Role.ROUTER] == []


UNMATCHED = (
    "'model.layers.0.typo' in ignore of recipe mine matches no module of src.",
    "Correct the entry, or remove it. Names are those of the hub or of transformers; `re:` "
    "entries match from the start of a name.",
)


def test_an_entry_that_matches_nothing_is_an_error_in_a_recipe_of_ours(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, OURS + "ignore: [model.layers.0.typo]\n")

    (finding,) = findings(tmp_path, recipe, "entry-unmatched")

    assert (finding.severity, finding.where) == ("error", "model.layers.0.typo")
    assert (finding.message, finding.fix) == UNMATCHED


def test_an_entry_that_matches_nothing_is_a_warning_in_a_recipe_of_llmcompressors(
    tmp_path: Path,
) -> None:
    recipe = foreign(tmp_path, "{scheme: NVFP4A16, ignore: [lm_head, model.layers.0.typo]}")

    (finding,) = findings(tmp_path, recipe, "entry-unmatched")

    assert finding.severity == "warning"
    assert (finding.message, finding.fix) == UNMATCHED


def test_a_target_that_matches_nothing_is_reported(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, OURS + "targets: ['re:.*experts.*', 're:experts']\n")

    (finding,) = findings(tmp_path, recipe, "entry-unmatched")

    assert finding.message == "'re:experts' in targets of recipe mine matches no module of src."


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
