"""Describe a checkpoint, and what is unusual about it, from headers and config.json alone."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from math import prod
from typing import Any, Final, NamedTuple

from mquant.checkpoint import Checkpoint, TensorInfo
from mquant.family import Family, FusedSet, TensorRole
from mquant.family_rows import Role
from mquant.findings import Finding, in_context, rule
from mquant.loader_model.modules import Module, ModuleView, read_modules
from mquant.loader_model.parameters import count_parameters
from mquant.loader_model.stacks import stack_beside
from mquant.loader_model.storage import format_of, weight_shape
from mquant.loader_model.vllm.words import in_words
from mquant.plan import survey
from mquant.schemes import QUANTIZED_SUFFIXES
from mquant.text import names
from mquant.verify.config_json import CONFIG_KEY_MISSING
from mquant.verify.mtp import check_mtp

_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")

EXPERT_PRUNED: Final = rule(
    "expert-pruned",
    "The checkpoint has as many experts as the family's releases.",
    "Pruned checkpoints have fewer; config.json must say so.",
    "",
    severity="info",
    needs="inspect",
)
DTYPE_DIFFERS: Final = rule(
    "dtype-differs",
    "All tensors of a plain checkpoint have one dtype.",
    "A router in F32 beside BF16 weights must stay in F32.",
    "Nothing to do: unquantized tensors keep their dtype.",
    severity="info",
    needs="inspect",
)
FUSED_SET_CUT: Final = rule(
    "fused-set-cut",
    "Each fused set is stored in one shard.",
    "Tools that read a shard at a time give the members different scales.",
    "Nothing to do: mquant reads each set whole, and writes it into one shard.",
    severity="info",
    needs="inspect",
)
TOKENIZER_MISSING: Final = rule(
    "tokenizer-missing",
    "The checkpoint has the tokenizer's files.",
    "Loaders need them beside the weights.",
    "Copy the tokenizer's files from the model's repo.",
    severity="warning",
    needs="inspect",
)


Known = tuple[TensorInfo, TensorRole]


@dataclass(frozen=True, slots=True)
class Portion:
    """The tensors of a checkpoint with one dtype, or of one role."""

    name: str
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Precision:
    """How the weights of a role are stored: the formats, most modules first, and bits a weight.

    `bits` counts scales too; None if the number of weights is not known.
    """

    role: str
    formats: tuple[str, ...]
    bits: float | None


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint. None means that config.json or the family does not say.

    `precisions` are those of the roles with matrices. `routers_quantized` is None without a router.
    `vllm` is what vLLM does with the checkpoint: "loads it", "refuses it: ...", "not judged: ...".
    `unpruned_experts` is the number in the family's releases. `bytes` counts tensors, `file_bytes`
    whole shards. `parameters` is None if config.json does not say how wide packed codes are.
    `excluded` are the entries that keep modules from being quantized.
    """

    name: str
    family: str | None
    model_type: str | None
    quantization: str | None
    kv_cache: str | None
    excluded: tuple[str, ...]
    layers: int | None
    experts: int | None
    unpruned_experts: int | None
    experts_per_token: int | None
    context: int | None
    vocabulary: int | None
    parameters: int | None
    tensors: int
    bytes: int
    file_bytes: int
    shards: int
    dtypes: tuple[Portion, ...]
    roles: tuple[Portion, ...]
    precisions: tuple[Precision, ...]
    routers_quantized: bool | None
    vllm: str
    findings: tuple[Finding, ...]

    @property
    def pruned(self) -> bool:
        """Whether the checkpoint has fewer experts than the family's releases."""
        return None not in (self.experts, self.unpruned_experts) and (
            (self.experts or 0) < (self.unpruned_experts or 0)
        )

    def to_json(self) -> dict[str, Any]:
        """Return `mquant.inspect/1` without the envelope's keys and `findings`."""
        keys = asdict(self)
        del keys["findings"]
        return {**keys, "pruned": self.pruned}


def inspect(checkpoint: Checkpoint, families: Mapping[str, Family]) -> Inspection:
    """Inspect a checkpoint: complete or not, quantized or not, of a known family or not."""
    # What is held of every tensor is let go before the next step: a million takes 300 MB each time.
    family, facts = _surveyed(checkpoint, families)
    stored = _stored(checkpoint, families)
    known, unknown = _classify(checkpoint, family)
    config = checkpoint.config

    def config_number(key: str) -> int | None:
        value = family.value(key, config) if family and key else None
        return value if value is not None and 0 <= value < 2**53 else None

    inspection = Inspection(
        name=checkpoint.source.name,
        family=family.name if family else None,
        model_type=kind if isinstance(kind := config.get("model_type"), str) else None,
        layers=config_number(family.config.layers) if family else None,
        experts=config_number(family.config.experts) if family else None,
        unpruned_experts=family.unpruned_experts if family else None,
        experts_per_token=config_number(family.config.top_k) if family else None,
        context=config_number(family.config.context) if family else None,
        vocabulary=config_number(family.config.vocabulary) if family else None,
        tensors=len(checkpoint.tensors),
        bytes=checkpoint.nbytes,
        file_bytes=sum(checkpoint.source.files[shard] for shard in checkpoint.shards),
        shards=len(checkpoint.shards),
        dtypes=_shares((info, info.dtype) for info in checkpoint.tensors.values()),
        roles=_role_shares(known, unknown),
        findings=(),
        **stored._asdict(),
    )
    return replace(
        inspection,
        findings=(
            *facts,
            *(_unusual(inspection, checkpoint, family, known, unknown) if family else ()),
            *_tokenizer(checkpoint),
        ),
    )


def _surveyed(
    checkpoint: Checkpoint, families: Mapping[str, Family]
) -> tuple[Family | None, list[Finding]]:
    result = survey(checkpoint, families)
    return result.family, [in_context(finding, "fact") for finding in result.findings]


class _Stored(NamedTuple):
    """The fields of an Inspection that say how weights are stored."""

    quantization: str | None
    kv_cache: str | None
    excluded: tuple[str, ...]
    parameters: int | None
    precisions: tuple[Precision, ...]
    routers_quantized: bool | None
    vllm: str


def _stored(checkpoint: Checkpoint, families: Mapping[str, Family]) -> _Stored:
    view = read_modules(checkpoint, families)
    routers = view.of(Role.ROUTER)
    return _Stored(
        quantization=_quantization(view),
        kv_cache=_kv_cache(view.config),
        excluded=view.ignore,
        parameters=count_parameters(view),
        precisions=_precisions(view),
        routers_quantized=any(m.quantized for m in routers) if routers else None,
        vllm=in_words(view.outcome)[1] or f"not judged: {view.outcome.unknown}",
    )


def _classify(
    checkpoint: Checkpoint, family: Family | None
) -> tuple[list[Known], list[TensorInfo]]:
    """Return tensors that the family knows, also as parts of a quantized weight; and the others."""
    known: list[Known] = []
    unknown: list[TensorInfo] = []
    for info in checkpoint.tensors.values():
        tensor_role = family.classify(info.name) if family else None
        if family and (found := family.stack_of(info.name) or stack_beside(info.name, family)):
            tensor_role = family.held_by(*found)
        if tensor_role is None and family and info.name.endswith(QUANTIZED_SUFFIXES):
            tensor_role = family.classify(info.name.rpartition(".")[0] + ".weight")
        if tensor_role is None:
            unknown.append(info)
        else:
            known.append((info, tensor_role))
    return known, unknown


def _precisions(view: ModuleView) -> tuple[Precision, ...]:
    roles = (role for role in Role if role.linear or role is Role.EMBEDDING)
    return tuple(_precision(view, role, group) for role in roles if (group := view.of(role)))


def _precision(view: ModuleView, role: Role, group: Iterable[Module]) -> Precision:
    formats, bits, weights = Counter[str](), 0, 0
    for module in group:
        if storage := format_of(view, module):
            formats[storage.short] += 1
            if shape := weight_shape(storage, module, view):
                weights += prod(shape)
                bits += 8 * sum(info.nbytes for info in module.tensors.values())
        elif plain := module.tensors.get("weight"):
            formats[plain.dtype] += 1
            weights, bits = weights + plain.elements, bits + 8 * plain.nbytes
    stored = tuple(name for name, _ in formats.most_common())
    return Precision(role.value, stored, round(bits / weights, 2) if weights else None)


def _shares(items: Iterable[tuple[TensorInfo, str]]) -> tuple[Portion, ...]:
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for info, key in items:
        groups[key].append(info)
    shares = (Portion(key, len(g), sum(i.nbytes for i in g)) for key, g in groups.items())
    return tuple(sorted(shares, key=lambda share: (-share.bytes, share.name)))


def _role_shares(known: list[Known], unknown: list[TensorInfo]) -> tuple[Portion, ...]:
    shares = _shares((info, tensor_role.row.role.value) for info, tensor_role in known)
    order = [role.value for role in Role]
    return (
        *sorted(shares, key=lambda share: order.index(share.name)),
        *_shares((info, "unknown") for info in unknown),
    )


def _quantization(view: ModuleView) -> str | None:
    if view.method not in ("", "unknown"):
        return view.method
    traces = any(name.endswith(QUANTIZED_SUFFIXES) for name in view.checkpoint.tensors)
    return "undeclared" if view.config or traces else None


def _kv_cache(config: Mapping[str, Any]) -> str | None:
    """Return the format of the KV cache, in ModelOpt's words; None if it is not quantized."""
    algorithm, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if isinstance(algorithm, str):
        return algorithm[:40]
    if not isinstance(scheme, dict) or type(bits := scheme.get("num_bits")) is not int:
        return None
    return f"{'INT' if scheme.get('type') == 'int' else 'FP'}{bits:d}"[:40]


def _unusual(
    inspection: Inspection,
    checkpoint: Checkpoint,
    family: Family,
    known: list[Known],
    unknown: list[TensorInfo],
) -> Iterable[Finding]:
    if inspection.pruned:
        yield EXPERT_PRUNED.finding(
            family.config.experts,
            f"The checkpoint has {inspection.experts} of the family's "
            f"{inspection.unpruned_experts} experts: it looks expert-pruned.",
        )
    tensors = chain(((info.name, m) for info, m in known), ((info.name, None) for info in unknown))
    yield from check_mtp(family, checkpoint.config, tensors)
    yield from _dtypes(inspection, known)
    missing = [key for key in family.required_config if key not in checkpoint.config]
    if missing:
        yield CONFIG_KEY_MISSING.finding(
            "config.json",
            f"config.json lacks {names(missing)}, which vLLM and SGLang need to load the model.",
            "Take the keys from the config.json of the model's first release.",
            "fact",
        )
    yield from _cut_sets(known)


def _dtypes(inspection: Inspection, known: list[Known]) -> Iterable[Finding]:
    """Yield findings about tensors of another dtype than most bytes, such as a router in F32."""
    if inspection.quantization is not None or len(inspection.dtypes) < 2:
        return
    main = inspection.dtypes[0].name
    others: dict[str, list[Known]] = defaultdict(list)
    for info, tensor_role in known:
        if info.dtype != main:
            others[info.dtype].append((info, tensor_role))
    for dtype, group in others.items():
        roles = sorted({tensor_role.row.role.value for _, tensor_role in group})
        yield DTYPE_DIFFERS.finding(
            group[0][0].name,
            f"{len(group):,} tensor{'s' if len(group) > 1 else ''} of {' and '.join(roles)} "
            f"in {dtype} beside {main} weights.",
            "Nothing to do: unquantized tensors keep their dtype.",
        )


def _cut_sets(known: list[Known]) -> Iterable[Finding]:
    shards: dict[FusedSet, str] = {}
    cut: set[FusedSet] = set()
    for info, tensor_role in known:
        fused_set = tensor_role.fused_set
        if fused_set and shards.setdefault(fused_set, info.shard) != info.shard:
            cut.add(fused_set)
    if cut:
        fused, layer, expert = next(each for each in shards if each in cut)
        place = f"{fused} of layer {layer}" + ("" if expert is None else f", expert {expert}")
        yield FUSED_SET_CUT.finding(
            place,
            f"{len(cut):,} fused set{'s are' if len(cut) > 1 else ' is'} cut by shard borders "
            f"(first: {place}).",
            "Nothing to do: mquant reads each set whole, and writes it into one shard.",
        )


def _tokenizer(checkpoint: Checkpoint) -> Iterable[Finding]:
    if not any(path.rpartition("/")[2] in _TOKENIZERS for path in checkpoint.source.files):
        yield TOKENIZER_MISSING.finding(
            "tokenizer.json",
            "There are no tokenizer files.",
            "Copy the tokenizer's files from the model's repo.",
        )
