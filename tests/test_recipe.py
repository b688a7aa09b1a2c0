"""mquant finds its recipes by name or path, and refuses a wrong key or file."""

import os
from pathlib import Path

import pytest

from mquant.errors import DataFileError, UsageError
from mquant.family_rows import Role
from mquant.recipe import data_file, find_recipe, load_recipe, load_recipes
from mquant.schemes import NVFP4A16
from recipe_files import OURS, SCHEMES, complaint, loaded, written

ROLES = "{} or {}.".format(", ".join(f"'{role}'" for role in [*Role][:-1]), f"'{[*Role][-1]}'")


# --- the names of recipes


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
    with pytest.raises((UsageError, DataFileError)):
        find_recipe(name)


def test_a_device_a_pipe_or_a_folder_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(DataFileError, match=f"{name} is not a regular file"):
            find_recipe(name)
    with pytest.raises(DataFileError, match="cannot be read: Is a directory"):
        find_recipe(str(tmp_path))


@pytest.mark.parametrize("name", ["notes.md", "pipe", "folder", "/dev/zero"])
def test_a_path_that_is_no_calibration_file_is_no_datasets_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("text")
    os.mkfifo("pipe")
    Path("folder").mkdir()
    what = "no .jsonl, .txt or .parquet file" if name == "notes.md" else "not a regular file"
    with pytest.raises(DataFileError, match=f"{name} is {what}"):
        data_file(name)


def test_a_name_without_a_file_is_a_datasets_name_and_may_have_dots() -> None:
    assert data_file("someone/texts-v1.5") is None
    assert data_file("rows.jsonl") == Path("rows.jsonl")


# --- the keys of a recipe


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
            f"mine.yaml: roles.expert: unknown scheme 'NVFP3'; the schemes are {SCHEMES}, and "
            "source.",
        ),
        (
            "ignore: ['re:[']",
            "mine.yaml: ignore.0: 're:[' is no regular expression: unterminated character set at "
            "position 0.",
        ),
        ("scales: best", "mine.yaml: scales: Input should be 'minmax', 'search' or 'hessian'."),
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
    assert caught.value.message == f"{path} is too large: mquant reads 200,000 bytes."


def test_a_recipe_needs_data_for_activations_gptq_and_awq() -> None:
    needs = {name for name, recipe in load_recipes().items() if recipe.needs_data}
    assert needs == {"nvfp4-best", "nvfp4-gptq", "nvfp4-w4a4", "w4a16-awq"}
