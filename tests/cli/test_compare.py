"""`mquant compare` prints a table, writes a JSON document, and sets its exit code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import mx_sources
from make import Row, without
from mquant.cli.app import app
from mquant.runs.quantize import quantize
from mutate import Bytes, changed, mutated
from run import TRAINED, plan_of

SCALE = "model.layers.1.self_attn.o_proj.weight_global_scale"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_person_sees_roles_and_the_worst_ten(trained: Path) -> None:
    result = run(trained, "--against", TRAINED)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "21 tensors identical to tiny-minimax-m2, 102 changed by 9.51% (20.4 dB)."
    (expert,) = (line.split() for line in lines if line.startswith("expert "))
    assert expert == ["expert", "0", "90", "9.51%", "20.4", "dB", "0.995478"]
    (router,) = (line.split() for line in lines if line.startswith("router "))
    assert router == ["router", "3", "0"]
    worst = [line for line in lines if "dB" in line and ".weight" in line]
    assert len(worst) == 10
    errors = [float(line.split("%")[0]) for line in worst]
    assert errors == sorted(errors, reverse=True)


def test_the_document_has_a_row_for_each_tensor(trained: Path) -> None:
    document: dict[str, Any] = json.loads(
        run(trained, "--against", TRAINED, "--format", "json").stdout
    )
    assert (document["schema"], document["ok"]) == ("mquant.compare/1", True)
    assert len(document["tensors"]) == 123
    assert all(len(row) == len(document["columns"]) for row in document["tensors"])
    assert [row[:2] for row in document["experts"]] == [[i, j] for i in range(3) for j in range(10)]
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2]
    table = {row[0]: row for row in document["tensors"]}
    worst = table[document["worst"][0]]
    assert worst[document["columns"].index("relative_error")] == max(
        row[8] for row in table.values()
    )


def test_a_lost_tensor_exits_with_3(trained: Path, tmp_path: Path) -> None:
    bad = mutated(trained, tmp_path, edit=without("layers.1.self_attn.o_proj"))
    result = run(bad, "--against", TRAINED)
    assert result.exit_code == 3
    assert "model.layers.1.self_attn.o_proj.weight of the parent is missing." in result.stdout


def test_infinite_weights_are_named_in_a_warning(trained: Path, tmp_path: Path) -> None:
    def edit(rows: list[Row]) -> list[Row]:
        infinity = np.float32(0).tobytes()  # the divisor of all weights
        return [(n, d, s, infinity if n == SCALE else raw) for n, d, s, raw in rows]

    result = run(mutated(trained, tmp_path, edit=edit), "--against", TRAINED)
    assert result.exit_code == 0
    verdict = "102 changed, some of them to or from NaN or infinity."
    assert verdict in " ".join(result.stdout.split())
    assert "inf%" not in result.stdout
    name = SCALE.removesuffix("_global_scale")
    warning = f"{name} holds NaN or infinity, here or in the parent"
    assert warning in " ".join(result.stderr.split())


def test_the_parent_must_be_given(trained: Path) -> None:
    result = run(trained)
    assert result.exit_code == 2
    assert "--against is missing." in result.stderr


def test_weights_that_are_the_parents_in_another_format_are_equal_and_not_changed(
    tmp_path: Path,
) -> None:
    src = mx_sources.source(tmp_path / "src")
    recipe = tmp_path / "experts.yaml"
    recipe.write_text("{name: experts, suffix: X, roles: {expert: NVFP4A16}}")
    out = quantize(plan_of(src, str(recipe)), tmp_path / "out").out
    lines = run(out, "--against", src).stdout.splitlines()
    assert lines[0] == (
        f"33 tensors identical to {src.name}, 90 equal in every number, and none changed."
    )
    assert lines[2].split()[:4] == ["role", "identical", "equal", "changed"]
    (expert,) = (line.split() for line in lines if line.startswith("expert "))
    assert expert == ["expert", "0", "90", "0"]
    document = json.loads(run(out, "--against", src, "--format", "json").stdout)
    assert (document["identical"], document["equal"], document["worst"]) == (33, 90, [])


def test_a_block_that_is_zero_in_the_parent_is_named_in_words(
    trained: Path, tmp_path: Path
) -> None:
    name = SCALE.removesuffix("_global_scale")

    def zeros(values: Bytes) -> None:
        values[:] = 0

    parent = mutated(TRAINED, tmp_path, edit=changed(name, data=zeros))
    result = run(trained, "--against", parent)
    (line,) = (line for line in result.stdout.splitlines() if name in line)
    assert line.split("parent is 0")[1].strip().startswith("the parent's is 0 at [")
    assert "inf" not in result.stdout
