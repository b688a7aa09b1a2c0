"""The modules that vLLM builds quantized, and the modules that vLLM builds plain.

vLLM decides from config.json, before vLLM reads a tensor, and under names of its own. The tensors
on disk must then fit the modules that vLLM has built.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Final

from mquant.family import Family, FusedSet, TensorRole
from mquant.family_rows import DRAFTS, NUMBER, Role
from mquant.loader_model.modules import Module, ModuleView
from mquant.loader_model.storage import groups
from mquant.name_patterns import Matches, Style, match
from mquant.usual_roles import ROUTERS, experts_of, usual_role

COVER_STYLES: Final = {
    "compressed-tensors": Style.NAMES,
    "modelopt": Style.GLOBS,
    "fp8": Style.PARTS,
}
"""The matching style of each method's ignore list. Lists of other methods are not judged."""

# The tensors that have a row for each row of the weight, whatever the method.
_WITH_ROWS: Final = ("weight", "weight_packed")


@dataclass(frozen=True, slots=True)
class Judged:
    """A linear module, or the embeddings.

    `misnamed`: the family knows the module by transformers' name only. `vllm` are the names under
    which vLLM looks the module up, if it looks anything up. vLLM builds the modules of one `group`
    as one layer.
    """

    module: Module
    role: Role
    misnamed: bool
    vllm: tuple[str, ...]
    group: FusedSet


@dataclass(frozen=True)
class Group:
    """Modules that vLLM builds as one layer.

    `ignored` is None if only some of the modules are ignored; `targeted` likewise.
    """

    members: tuple[Judged, ...]
    ignored: bool | None
    targeted: bool | None

    @property
    def quantized(self) -> bool | None:
        """Whether vLLM builds the group quantized; None if vLLM refuses the group."""
        if self.ignored is True or self.targeted is False:
            return False
        return None if None in (self.ignored, self.targeted) else True


@dataclass(frozen=True)
class VllmView:
    """The linear modules of a checkpoint, and what the quantization config says of modules."""

    view: ModuleView
    method: str
    judged: tuple[Judged, ...]

    @property
    def style(self) -> Style | None:
        """How the ignore list is matched; None if the method is not known."""
        return COVER_STYLES.get(self.method)

    @cached_property
    def in_memory(self) -> Mapping[str, str]:
        """Hub name -> transformers' name, of every module."""
        family = self.view.family
        return {name: family.in_memory_name(name) for name in self.hub} if family else {}

    @cached_property
    def hub(self) -> frozenset[str]:
        """Every hub name that an entry may mean: modules, tied heads, parameters but weights."""
        bare = (
            info.name
            for module in self.view.modules.values()
            if not module.quantized
            for suffix, info in module.tensors.items()
            if suffix != "weight"
        )
        judged = (judged.module.name for judged in self.judged)
        return frozenset((*self.view.modules, *bare, *judged))

    @cached_property
    def vllm(self) -> frozenset[str]:
        """Every name under which vLLM looks a module up."""
        return self._outside.union(name for judged in self.judged for name in judged.vllm)

    @cached_property
    def _outside(self) -> frozenset[str]:
        """The names, for vLLM, of modules of towers and of multi-token prediction."""
        family, modules = self.view.family, self.view.modules.values()
        rows = ((m.name, m.tensor_role.row) for m in modules if m.tensor_role)
        kept = frozenset(
            name for name, row in rows if row.role in (Role.VISION, Role.MTP) or row.block == DRAFTS
        )
        return frozenset(_in_vllm(self.view, family, name) for name in kept) if family else kept

    @cached_property
    def ignore(self) -> Matches:
        """The ignore list, matched against all names by the rules of its method."""
        entries = self.view.ignore
        if not entries:  # then the names are not needed: a checkpoint has a million
            return Matches({}, {})
        names = self.hub | self.vllm | frozenset(self.in_memory.values())
        return match(entries, names, self.style or Style.EXACT)

    @cached_property
    def ignored_by_vllm(self) -> frozenset[str]:
        """The names that vLLM ignores: for FP8, vLLM takes entries as exact names."""
        if self.style is not Style.PARTS:
            return self.ignore.names
        return match(self.view.ignore, self.vllm, Style.EXACT).names

    @cached_property
    def targets(self) -> Matches:
        """The targets of compressed-tensors, matched against vLLM's names."""
        return match(_targets(self.view.config), self.vllm, Style.NAMES)

    def covered(self, judged: Judged) -> bool:
        """Return whether the ignore list matches a module, by the hub's name or vLLM's."""
        return not {judged.module.name, *judged.vllm}.isdisjoint(self.ignore.names)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The layers that vLLM may build quantized, with what vLLM decides about each layer."""
        if self.style is None:
            return ()
        members: dict[FusedSet, list[Judged]] = defaultdict(list)
        for judged in self.judged:
            if self._asks(judged.role) and not judged.misnamed:
                members[judged.group].append(judged)
        return tuple(self._group(tuple(group)) for group in members.values())

    def _asks(self, role: Role) -> bool:
        """Return whether vLLM looks up modules of a role.

        Routers and embeddings get no quant_config from vLLM.
        """
        if role is Role.HEAD:
            return self.method == "modelopt"
        return role.linear and not role.refused_by_loaders

    def _group(self, members: tuple[Judged, ...]) -> Group:
        ignored = {not self.ignored_by_vllm.isdisjoint(judged.vllm) for judged in members}
        if members[0].role is Role.EXPERT and self.style is not Style.NAMES:
            # vLLM looks a layer's experts up together: an entry for any expert suffices.
            ignored = {any(ignored)}
        targeted = {self._targeted(judged) for judged in members}
        return Group(members, _one(ignored), _one(targeted))

    def _targeted(self, judged: Judged) -> bool:
        if self.style is not Style.NAMES or self._targets_linear:
            return True
        return not self.targets.names.isdisjoint(judged.vllm)

    @cached_property
    def _targets_linear(self) -> bool:
        # vLLM also looks for a target without `re:` in the class's name: ColumnParallelLinear.
        return any(target.lower() in "linear" for target in _targets(self.view.config) if target)


def vllm_view_of(view: ModuleView) -> VllmView:
    """Return how vLLM sees a checkpoint's modules."""
    method = "modelopt" if view.method.startswith("modelopt") else view.vllm_method
    family = view.family
    judged = _known(view, family, method) if family else _usual(view)
    return VllmView(view, method, tuple(judged))


def _known(view: ModuleView, family: Family, method: str) -> Iterator[Judged]:
    shared: dict[Any, Any] = {}  # one object for equal values: experts are many
    looked_up = method in COVER_STYLES or bool(view.ignore)
    # vLLM builds a head even if the head is tied to the embeddings.
    tied = family.tied_heads(view.checkpoint.config)
    absent = [n for n in tied if n not in view.modules]
    heads = (Module(name, {}, family.classify(f"{name}.weight")) for name in absent)
    for module in chain(heads, view.modules.values()):
        tensor_role = module.tensor_role or family.classify_in_memory(f"{module.name}.weight")
        if tensor_role is None:
            continue
        role = tensor_role.row.role
        if not (role.linear or role is Role.EMBEDDING):
            continue
        group = tensor_role.loaded_with
        names = _vllm_names(module, tensor_role, view, family, method) if looked_up else ()
        names, group = shared.setdefault(names, names), shared.setdefault(group, group)
        yield Judged(module, role, module.tensor_role is None, names, group)


def _in_vllm(view: ModuleView, family: Family, name: str) -> str:
    return family.in_vllm_name(family.draft_in_vllm(name, view.checkpoint.config))


def _vllm_names(
    module: Module, tensor_role: TensorRole, view: ModuleView, family: Family, method: str
) -> tuple[str, ...]:
    if tensor_role.expert is None:
        return (_in_vllm(view, family, module.name),)
    if COVER_STYLES.get(method) is Style.NAMES:
        # vLLM looks up the first expert, and applies the result to the whole layer.
        first = tensor_role.row.format(tensor_role.layer, 0).removesuffix(".weight")
        return (_in_vllm(view, family, first),)
    whole = tensor_role.row.name.partition(".{expert}")[0].replace(
        "{layer}", str(tensor_role.layer)
    )
    return (family.in_vllm_name(whole), family.in_vllm_name(module.name))


def _usual(view: ModuleView) -> Iterator[Judged]:
    """Yield the modules of an unknown family that names or shapes tell to be kept by loaders."""
    experts = experts_of(view.checkpoint.config)
    known: dict[tuple[str, Any], Role | None] = {}  # experts are many, and their names alike
    for name, module in view.modules.items():
        shape = next((t.shape for s, t in module.tensors.items() if s in _WITH_ROWS), ())
        key = (NUMBER.sub("0", f"{name}.weight"), shape)
        if key not in known:
            known[key] = usual_role(*key, experts)
        role = known[key]
        if role is Role.INDEXER and name.rpartition(".")[2] in ROUTERS:
            role = Role.ROUTER
        if role is not None and role.refused_by_loaders:
            yield Judged(module, role, False, (name,), (name, None, None))


def _targets(config: Mapping[str, Any]) -> list[str]:
    lists = [group.get("targets") for group in groups(config)]
    entries = [entry for targets in lists if isinstance(targets, list) for entry in targets]
    return [entry for entry in entries if isinstance(entry, str)]


def _one(answers: set[bool]) -> bool | None:
    return answers.pop() if len(answers) == 1 else None
