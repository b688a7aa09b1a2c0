"""Compare a broken checkpoint with its parent: tensors stored alike, and weights that differ."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

from mquant.checkpoint.hub import HubRepo
from mquant.events import Emit, Note
from mquant.family_rows import Role
from mquant.loader_model.modules import Module, ModuleView
from mquant.verify.against_parent import (
    KEPT_TENSOR_DIFFERS,
    WEIGHT_BEYOND_BOUND,
    compare_tensors,
)
from mquant.verify.judge import Depth, Report
from mquant.verify.kept_as_stored import stored_alike

_FOUND = (WEIGHT_BEYOND_BOUND, KEPT_TENSOR_DIFFERS)


def with_differences(
    report: Report, view: ModuleView, parent: ModuleView, depth: Depth | None, emit: Emit
) -> Report:
    """Return a report of `verify` with what `verify --against` finds in the tensors.

    Only tensors that the parent can mend count: those that differ from the parent's. If a sample
    has such a tensor, all tensors of a local parent are compared. If most quantized weights differ,
    another tool changed them on purpose: the comparison tells nothing, and a note says so.
    """
    whole = depth is Depth.FULL
    tally = compare_tensors(view, parent, everything=whole, emit=emit)
    if not whole and any(map(tally.of, _FOUND)):
        whole = not isinstance(parent.checkpoint.source, HubRepo)
        tally = compare_tensors(view, parent, everything=True, emit=emit) if whole else tally
    rules = {rule.id for rule in _FOUND}
    found = [finding for finding in tally.findings() if finding.rule in rules]
    names = {name for rule in _FOUND for name in tally.of(rule)}
    if len(names & {module.name for module in view.quantized}) * 2 > len(view.quantized):
        few = (
            f"Most weights differ more from {parent.checkpoint.source.name} than rounding explains"
        )
        emit(Note("warning", f"{few}: they are taken for changed on purpose, and not repaired."))
        return report
    wrong = {
        info.name
        for name in names & view.modules.keys()
        for info in view.modules[name].tensors.values()
        if info.name.rpartition(".")[2] in view.modules[name].quantized
    }
    wrong |= names & view.checkpoint.tensors.keys()
    on_disk = {
        info.name: info.held.by.name
        for module in view.modules.values()
        for info in module.tensors.values()
        if info.held
    }
    wrong = {on_disk.get(name, name) for name in wrong | report.wrong}
    return replace(
        report,
        parent=parent.checkpoint.source.name,
        checked=(*report.checked, "against"),
        sampled=not whole,
        findings=(*report.findings, *found),
        wrong=frozenset(wrong),
    )


def roles_as_in_parent(view: ModuleView, parent: ModuleView) -> frozenset[Role]:
    """Return the roles whose quantized weights mostly have the layout and shape of the parent's."""
    return _roles(
        view, parent, lambda module, origin: stored_alike(view, module, parent, origin) is not None
    )


def is_copy(view: ModuleView, parent: ModuleView) -> bool:
    """Return whether a quantized parent has the tensors of most modules, of every role."""
    roles = {module.role for module in view.modules.values() if module.role}
    return bool(parent.quantized) and roles == _roles(view, parent, _same_headers, plain=True)


def _same_headers(module: Module, origin: Module) -> bool:
    own, theirs = (
        {(i.name, i.dtype, i.shape) for i in each.tensors.values()} for each in (module, origin)
    )
    return own == theirs


def _roles(
    view: ModuleView,
    parent: ModuleView,
    alike: Callable[[Module, Module], bool],
    *,
    plain: bool = False,
) -> frozenset[Role]:
    votes: dict[Role, Counter[bool]] = defaultdict(Counter)
    for name, module in view.modules.items():
        origin = parent.modules.get(name)
        if module.role and (plain or module.quantized):
            votes[module.role][origin is not None and alike(module, origin)] += 1
    return frozenset(role for role, counts in votes.items() if counts[True] > counts[False])
