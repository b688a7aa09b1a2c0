"""Every finding has a rule that a module declares, and every rule can make a finding."""

import ast
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import mquant
from mquant.findings import RULES, Finding, in_context, rule

ROOT = Path(mquant.__file__).parent
HOME = ROOT / "findings.py"
TREES = {path: ast.parse(path.read_text("utf-8")) for path in ROOT.rglob("*.py") if path != HOME}
HEAVY = (
    "engines.oneshot",
    "ray_cluster",
    "inside_vllm",
    "vllm_stubs",
    "__main__",
    "offloaded_model",
)


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def declared() -> dict[str, str]:
    """Return constant -> id of every rule that a module declares at its top."""
    return {
        node.target.id: str(node.value.args[0].value)
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "rule"
        and isinstance(node.value.args[0], ast.Constant)
    }


def emitted() -> set[str]:
    """Return the constants of the rules that make findings, among other names.

    Code calls such a constant (`X.finding`), passes it to a function, or has it in a tuple or a
    conditional expression.
    """
    names: set[str] = set()
    for tree in TREES.values():
        compared = {  # X.id only compares the rule of a finding
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr != "finding"
        }
        names |= {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Load)
            and id(node) not in compared
        }
    return names


@pytest.fixture(scope="module", autouse=True)
def _all_checks() -> None:
    for module in pkgutil.walk_packages(mquant.__path__, "mquant."):
        if not module.name.endswith(HEAVY):
            import_module(module.name)


def test_every_rule_is_a_constant_of_its_own_name() -> None:
    assert {name: id_.upper().replace("-", "_") for name, id_ in declared().items()} == {
        name: name for name in declared()
    }


def test_every_declared_rule_is_registered_and_the_other_way_round() -> None:
    assert set(declared().values()) == set(RULES)


def test_every_registered_rule_can_be_emitted() -> None:
    assert set(declared()) - emitted() == set()


def test_findings_are_made_by_rules_alone() -> None:
    for path, tree in TREES.items():
        called = {ast.unparse(call.func).rpartition(".")[2] for call in calls(tree)}
        assert not called & {"Finding", "Rule"}, path
        assert not any(
            ast.unparse(call.func) == "replace" and "severity" in {k.arg for k in call.keywords}
            for call in calls(tree)
        ), path


def test_no_finding_is_made_without_a_registered_rule() -> None:
    with pytest.raises(ValueError, match="no rule declares"):
        Finding("nobody-declared-this", "error", "x", "X is odd.")


def test_no_finding_has_a_severity_that_its_rule_does_not_declare() -> None:
    with pytest.raises(ValueError, match="no rule declares"):
        Finding("shard-missing", "info", "x", "X is odd.")


def test_an_id_is_declared_once() -> None:
    with pytest.raises(ValueError, match="declared twice"):
        rule("shard-missing", "", "", "")


def test_a_rule_declares_how_bad_it_is_in_each_context() -> None:
    unknown = RULES["family-unknown"].finding("config.json", "It is unknown.")

    assert unknown.severity == "warning"
    assert in_context(unknown, "source").severity == "error"
    assert in_context(unknown, "fact").severity == "info"


def test_a_rule_says_what_must_hold_and_why() -> None:
    for each in RULES.values():
        assert each.what.endswith("."), each.id
        assert each.why.rstrip(")").endswith("."), each.id
