"""The plan of a repair: which tensors stay, which come from the parent, in which shard. Pure.

`right` is the plan of the parent. A tensor of `right` is copied from the broken checkpoint if the
checkpoint holds the tensor as planned, under its hub name or its name in a loaded model, and if the
tensor is not known to be wrong. Otherwise the tensor's whole work unit is made again from the
parent. Tensors that `right` does not have are left out.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from mquant.checkpoint import Checkpoint, TensorInfo, is_shard
from mquant.errors import Refused
from mquant.family import Family
from mquant.family_rows import Role
from mquant.loader_model.modules import ModuleView
from mquant.plan.action import Action, OutputTensor, WorkUnit
from mquant.plan.declare import KV_CACHE, KV_SCALES
from mquant.plan.loadable import not_judged
from mquant.plan.model import Plan, ShardPlan
from mquant.plan.stored import READABLE
from mquant.plan.survey import survey
from mquant.recipe import Recipe

BAD: Final = "bad/"
PARENT: Final = "parent/"
"""The folder names of the two checkpoints in an assembly."""


@dataclass(frozen=True)
class RepairPlan:
    """The plan of a repair, and what the repair does to the broken checkpoint.

    `right` is the plan of the parent. `plan` makes the same tensors in the broken checkpoint's
    shards, from files under `bad/` and `parent/`. `kept` are the shards of the broken checkpoint
    that stay as they are. `sound` maps right names to the broken checkpoint's good tensors, which
    are copied, or made again with their fused set. `renamed` maps wrong names of good tensors to
    the right names. `dropped` are the broken checkpoint's tensors that `right` does not have.
    """

    right: Plan
    plan: Plan
    kept: frozenset[str]
    sound: Mapping[str, TensorInfo]
    renamed: Mapping[str, str]
    dropped: tuple[str, ...]

    @cached_property
    def rewritten(self) -> Plan:
        """`plan` with only the shards that must be written."""
        shards = tuple(shard for shard in self.plan.shards if shard.name not in self.kept)
        return replace(self.plan, shards=shards)

    @cached_property
    def replaced(self) -> tuple[Action, ...]:
        """The actions whose tensors come from the parent."""
        actions = self.plan.actions
        return tuple(action for action in actions if action.source.shard.startswith(PARENT))

    @property
    def replaced_by_role(self) -> dict[str, int]:
        """The number of source tensors that come from the parent, by role."""
        return dict(Counter(action.role.value for action in self.replaced))

    @property
    def parent_bytes(self) -> int:
        """The bytes of the parent's tensors that are read."""
        return sum(action.source_bytes for action in self.replaced)


def make_repair_plan(
    right: Plan, bad: Checkpoint, wrong: Collection[str], extras: Collection[str] = ()
) -> RepairPlan:
    """Decide for every tensor of `right` where the tensor comes from.

    `wrong` are tensors of `bad` that must not be trusted, whatever their headers say. `extras` are
    tensors of `bad` that `right` does not have, and that stay. If scales of a KV cache are among
    them, the quantization config declares the cache.
    """
    broken = _Broken(right.family, bad, wrong)
    shards: dict[str, list[WorkUnit]] = defaultdict(list)
    renamed: dict[str, str] = {}
    sound: dict[str, TensorInfo] = {}
    outputs: set[str] = set()
    home = min(filter(is_shard, bad.shards), default="model-00001-of-00001.safetensors")
    for unit in right.units:
        outputs.update(output.name for output in unit.outputs)
        good = {o.name: info for o in unit.outputs if (info := broken.sound(o)) is not None}
        sound.update(good)
        if all(output.name in good for output in unit.outputs):
            for shard, kept in broken.copies(unit):
                shards[shard].append(kept)
                home = shard
            renamed.update(broken.renamed(unit))
        else:
            home = broken.home(unit) or home
            shards[home].append(from_parent(unit))
    outputs |= {*extras}
    for name in extras:
        info = bad.tensors[name]
        shards[info.shard].append(WorkUnit((_as_it_is(right.family, _under(BAD, info)),)))
    if any(name.rpartition(".")[2] in KV_SCALES for name in extras):
        right = replace(right, declared={**right.quantization_config, "kv_cache_scheme": KV_CACHE})
    plan = replace(right, shards=tuple(ShardPlan(n, tuple(shards[n])) for n in sorted(shards)))
    return RepairPlan(
        right=right,
        plan=plan,
        kept=frozenset(shard.name for shard in plan.shards if broken.holds_just(shard)),
        sound=sound,
        renamed=renamed,
        dropped=tuple(n for n in bad.tensors if {n, broken.hub_name[n]}.isdisjoint(outputs)),
    )


def make_copy_plan(parent: ModuleView, recipe: Recipe, families: Mapping[str, Family]) -> Plan:
    """Return the plan of a checkpoint that has the parent's own tensors and config.json.

    A finding of the plan says if it is not known whether vLLM loads the parent. Raises Refused if
    the family is unknown.
    """
    checkpoint = parent.checkpoint
    plan = _copies(checkpoint, checkpoint.tensors.values(), recipe, families)
    unknown = [not_judged(plan, parent.outcome)] if parent.outcome.unknown else []
    return replace(plan, findings=(*plan.findings, *unknown))


def make_config_plan(
    mended: Checkpoint, bad: Checkpoint, recipe: Recipe, families: Mapping[str, Family]
) -> RepairPlan:
    """Return the plan that keeps all tensors of `bad` and replaces config.json.

    `mended` is the parent with the config.json of the result. Raises Refused if the family is
    unknown.
    """
    sound = {name: _under(BAD, info) for name, info in bad.tensors.items()}
    plan = _copies(mended, sound.values(), recipe, families)
    shards = tuple(replace(shard, name=shard.name.removeprefix(BAD)) for shard in plan.shards)
    plan = replace(plan, shards=shards)
    return RepairPlan(
        right=plan,
        plan=plan,
        kept=frozenset(shard.name for shard in shards),
        sound=sound,
        renamed={},
        dropped=(),
    )


def _copies(
    described: Checkpoint,
    tensors: Iterable[TensorInfo],
    recipe: Recipe,
    families: Mapping[str, Family],
) -> Plan:
    """Return the plan that copies tensors in their shards, with the config.json of `described`."""
    surveyed = survey(described, families, READABLE)
    family = surveyed.family
    if family is None:
        raise Refused(surveyed.findings)
    shards: dict[str, list[WorkUnit]] = {}
    for info in tensors:
        shards.setdefault(info.shard, []).append(WorkUnit((_as_it_is(family, info),)))
    declared = described.config.get("quantization_config")
    return Plan(
        survey=surveyed,
        family=family,
        recipe=recipe,
        shards=tuple(ShardPlan(name, tuple(units)) for name, units in shards.items()),
        ignore=(),
        findings=(),
        declared=declared if isinstance(declared, dict) else {},  # anything may stand there
    )


def _as_it_is(family: Family, info: TensorInfo) -> Action:
    """Return the action that copies a tensor."""
    module = _module(info.name)
    tensor_role = family.classify(info.name) or family.classify(f"{module}.weight")
    return Action(
        source=info,
        role=tensor_role.row.role if tensor_role else Role.OTHER,
        module=module,
        layer=tensor_role.layer if tensor_role else None,
        expert=tensor_role.expert if tensor_role else None,
        scheme=None,
        reason="as it should be",
        made=(OutputTensor(info.name, info.dtype, info.shape),),
    )


class _Broken:
    """The tensors of a broken checkpoint, by the hub names that they should have."""

    def __init__(self, family: Family, bad: Checkpoint, wrong: Collection[str]) -> None:
        self.hub_name = {name: _hub_name(family, name) for name in bad.tensors}
        known: dict[str, list[TensorInfo]] = defaultdict(list)
        self._modules: dict[str, str] = {}
        for info in (*bad.tensors.values(), *bad.again):
            name = self.hub_name[info.name]
            known[name].append(info)
            self._modules.setdefault(_module(name), info.shard)
        # If two tensors claim one name, neither is trusted: no evidence tells the right one.
        self._tensors = {name: infos[0] for name, infos in known.items() if len(infos) == 1}
        self._places = {name: infos[0].shard for name, infos in known.items()}
        for name, shard in bad.index.items():
            if is_shard(shard):
                self._places.setdefault(_hub_name(family, name), shard)
                self._modules.setdefault(_module(_hub_name(family, name)), shard)
        self._wrong = wrong
        self._headers: dict[str, list[tuple[str, str, tuple[int, ...]]]] = defaultdict(list)
        for info in (*bad.tensors.values(), *bad.again):
            self._headers[info.shard].append((info.name, info.dtype, info.shape))

    def sound(self, output: OutputTensor) -> TensorInfo | None:
        """Return the tensor that is stored as planned and not known to be wrong, or None."""
        info = self._tensors.get(output.name)
        if info is None or info.name in self._wrong:
            return None
        alike = (info.dtype, info.shape) == (output.dtype, output.shape)
        return _under(BAD, info) if alike else None

    def copies(self, unit: WorkUnit) -> Iterator[tuple[str, WorkUnit]]:
        """Yield work units that copy the tensors of a sound work unit, each with its shard."""
        shards: dict[str, list[Action]] = defaultdict(list)
        for action in unit.actions:
            for output in action.outputs:
                info = self._tensors[output.name]
                shards[info.shard].append(
                    replace(
                        action,
                        source=_under(BAD, info),
                        stored=None,
                        scheme=None,
                        reason="as it should be",
                        made=(output,),
                    )
                )
        return ((shard, WorkUnit(tuple(actions))) for shard, actions in shards.items())

    def renamed(self, unit: WorkUnit) -> dict[str, str]:
        """Return the wrong names of a sound work unit's tensors, with the right names."""
        pairs = ((self._tensors[output.name].name, output.name) for output in unit.outputs)
        return {old: new for old, new in pairs if old != new}

    def home(self, unit: WorkUnit) -> str | None:
        """Return the shard that holds, or should hold, tensors of a work unit or of its modules."""
        places = [self._places.get(output.name) for output in unit.outputs]
        places += [self._modules.get(action.module) for action in unit.actions]
        return next((place for place in places if place), None)

    def holds_just(self, shard: ShardPlan) -> bool:
        """Return whether the file of a planned shard's name holds exactly the planned tensors."""
        actions = [action for unit in shard.units for action in unit.actions]
        if any(action.source.shard != BAD + shard.name for action in actions):
            return False
        planned = [(o.name, o.dtype, o.shape) for action in actions for o in action.outputs]
        return sorted(planned) == sorted(self._headers[shard.name])


def _hub_name(family: Family, name: str) -> str:
    """Return the hub name of a tensor named as on the hub, as in memory, or as a mix of the two."""
    module, _, suffix = name.rpartition(".")
    if family.classify(name) or family.classify(f"{module}.weight"):
        return name
    if tensor_role := family.classify_in_memory(name):
        return tensor_role.row.format(tensor_role.layer, tensor_role.expert)
    if tensor_role := family.classify_in_memory(f"{module}.weight"):
        return f"{_module(tensor_role.row.format(tensor_role.layer, tensor_role.expert))}.{suffix}"
    return name


def from_parent(unit: WorkUnit) -> WorkUnit:
    """Return the work unit of the right plan with its sources under `parent/`."""
    return WorkUnit(
        tuple(
            replace(
                a,
                source=_under(PARENT, a.source),
                stored=a.stored.under(PARENT) if a.stored else None,
            )
            for a in unit.actions
        )
    )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _under(prefix: str, info: TensorInfo) -> TensorInfo:
    return replace(info, shard=prefix + info.shard)
