"""Load a checkpoint's headers as vLLM does, and say what happened."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mquant.errors import HeaderError
from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.model import Model
from mquant.loader_model.vllm.names import place, rename
from mquant.loader_model.vllm.table import Table
from mquant.loader_model.vllm.tensors import Copies, Loaded, LoadRefused, Shape, Unknown
from mquant.loader_model.vllm.whole_experts import WholeExperts

_UNREAD: Final = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""The dtypes that safetensors' Python table lacks, so that the real loader was not asked."""

_TABLES: Final[Mapping[str, type[Table]]] = {"parameters": Table, "whole experts": WholeExperts}


@dataclass(frozen=True)
class Outcome:
    """What vLLM does with a checkpoint.

    `refused` is where and why vLLM stops. Without it: tensors that are not, or not wholly, copied;
    parameters with the number of elements that nothing fills; tensors that are spread over a larger
    place; tensors whose bytes lose their meaning. `unknown` is a clause if it is not known what
    vLLM does.
    """

    refused: tuple[str, str] | None = None
    dropped: tuple[str, ...] = ()
    unset: tuple[tuple[str, int], ...] = ()
    reshaped: tuple[tuple[str, Shape, Shape], ...] = ()
    converted: tuple[tuple[str, str, str], ...] = ()
    unknown: str = ""

    @property
    def loads(self) -> bool:
        """Whether vLLM loads the checkpoint, every tensor into its place."""
        return self == Outcome()


def load(build: Callable[[], Model], tensors: Iterable[Loaded]) -> Outcome:
    """Build the model, and copy every tensor, in the order of the files."""
    copies = Copies()
    apart: dict[str, bool] = {}  # name -> whether it was not wholly copied: few of many tensors
    try:
        model = build()
        later = _later(model)
        table = _TABLES[model.rows.walks](model) if model.rows.walks in _TABLES else None
        for loaded in tensors:
            _check_known(loaded, model.rows.untold)
            copies.used = 0
            if loaded.name in model.aliases:
                copies.used = loaded.numel  # vLLM fills the place from the other name
            elif table:
                table.place(copies, loaded)
            else:
                place(model.modules, model.renaming, copies, loaded)
            whole = copies.used >= loaded.numel
            if not whole or (later and _outer_name(model, loaded.name).startswith(later)):
                apart[loaded.name] = not whole
        _check_experts(model)
    except LoadRefused as stop:
        return Outcome(refused=(stop.where, stop.why))
    except HeaderError as error:
        return Outcome(refused=("the shards", error.message))
    except Unknown as gap:
        return Outcome(unknown=str(gap))
    return Outcome(
        dropped=_dropped(model, apart),
        unset=_unset(model),
        reshaped=tuple(copies.reshaped.values()),
        converted=tuple(copies.converted.values()),
    )


def _later(model: Model) -> tuple[str, ...]:
    """Return the beginnings of the names, in vLLM's model, that vLLM leaves out on purpose."""
    text = f"{model.inside}model"
    return (*(f"{text}.{each}" for each in model.renaming[text].drops), *model.renaming[""].drops)


def _outer_name(model: Model, name: str) -> str:
    """Return a tensor's name in vLLM's model; empty if the model has no place for the tensor."""
    return rename(name, model.renaming[""].renames) or ""


def _dropped(model: Model, apart: Mapping[str, bool]) -> tuple[str, ...]:
    """Return the tensors that were not, or not wholly, copied.

    Left out is what vLLM passes over on purpose. A layer after the last belongs to multi-token
    prediction only if it has `eh_proj`; else the model has lost the layer. A model without a head
    has lost the head.
    """
    there = {_outer_name(model, name) for name in apart}
    lost = tuple(each for each in _later(model) if f"{each}eh_proj.weight" not in there)
    return tuple(
        name
        for name, wanting in apart.items()
        if wanting or _outer_name(model, name).startswith(lost)
    )


def _unset(model: Model) -> tuple[tuple[str, int], ...]:
    parameters = {id(each): each for each in model.parameters()}.values()
    rows = ((each.name, each.missing) for each in parameters if not each.optional)
    return tuple((name, missing) for name, missing in rows if missing)


def _check_known(loaded: Loaded, untold: Iterable[str]) -> None:
    if loaded.dtype in _UNREAD:
        raise Unknown(f"tensors of the dtype {loaded.dtype}")
    if any(part in loaded.name for part in untold):
        raise Unknown(f"the tensor {loaded.name}")


def _check_experts(model: Model) -> None:
    for layer in model.layers:
        if isinstance(layer, Experts) and layer.unknown:
            raise Unknown(layer.unknown)
