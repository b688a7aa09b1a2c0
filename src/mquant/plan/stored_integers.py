"""How a source stores a weight in packed integers: config.json says what the tensors leave open."""

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any, Final, NamedTuple

from mquant.checkpoint import TensorInfo
from mquant.findings import Finding
from mquant.loader_model.integer_parts import FLOATS, byte_scales
from mquant.loader_model.modules import quantized_suffixes
from mquant.loader_model.storage import StorageFormat, groups
from mquant.name_patterns import Style, match
from mquant.plan.stored_parts import PART_MISSING, Stored, broken, misfit

_CODES, _SCALE, _ZEROS = "weight_packed", "weight_scale", "weight_zero_point"
ORDER: Final = "weight_g_idx"
"""The suffix of the group of each column."""
_SIZE: Final = "weight_shape"
_PARTS: Final = {_CODES, _SCALE, _ZEROS, ORDER, _SIZE}
BITS: Final = (4, 8)
"""The bits of integers that can be decoded."""
_SIZES: Final = ("I64", "I32")


class _Args(NamedTuple):
    """What a config group says of integers: `wide` columns share a scale."""

    bits: int
    wide: int
    symmetric: bool


class IntegerGroups:
    """The config groups of integers that can be decoded, and the modules that they name."""

    def __init__(self, config: Mapping[str, Any], modules: Collection[str]) -> None:
        self.declared = tuple(_declared(config))
        self._modules = modules

    @cached_property
    def _named(self) -> tuple[frozenset[str], ...]:
        """The modules that each group's targets name or match, in the order of the groups."""
        return tuple(
            match(_entries(group), self._modules, Style.NAMES).names for group, _ in self.declared
        )

    def of(self, module: str, codes: TensorInfo, scale: TensorInfo) -> _Args | None:
        """Return what the group of a module says; None if no group, or several groups, fit.

        Of several groups that the shapes fit, the first one whose targets name the module counts.
        """
        rows, packed = codes.shape
        fits: dict[_Args, int] = {}
        for number, (group, bits) in enumerate(self.declared):
            weights, columns = group["weights"], packed * 32 // bits
            size = weights.get("group_size")
            wide = size if type(size) is int and size > 0 else columns
            if scale.shape == (rows, -(-columns // wide)):
                fits.setdefault(_Args(bits, wide, weights.get("symmetric") is not False), number)
        if len(fits) < 2:
            return next(iter(fits), None)
        return next((args for args, number in fits.items() if module in self._named[number]), None)

    def of_bytes(
        self, module: str, codes: TensorInfo, scale: TensorInfo
    ) -> Mapping[str, Any] | None:
        """Return what a group says of integers in I8, chosen as `of` chooses; None without one."""
        fits = [
            (number, group["weights"])
            for number, (group, _) in enumerate(self.declared)
            if scale.shape in byte_scales(codes.shape[0], codes.shape[1], group["weights"])
        ]
        if all(args == fits[0][1] for _, args in fits):
            return fits[0][1] if fits else None
        return next((args for number, args in fits if module in self._named[number]), None)


def stored_integers(
    module: str, tensors: Mapping[str, TensorInfo], declared: IntegerGroups
) -> Stored | Finding | None:
    """Return how packed integers are stored, or a finding if their parts do not fit each other.

    The bits and the group are those of the config group that the shapes fit. None if config.json
    declares no integers, or if other tensors may change what codes mean.
    """
    if not declared.declared or not {*quantized_suffixes(tensors)} <= _PARTS:
        return None
    for needed in (_CODES, _SCALE):
        if needed not in tensors:
            present = ", ".join(sorted(tensors))
            return broken(module, PART_MISSING, f"{module} has no {needed} beside {present}")
    codes, scale = tensors[_CODES], tensors[_SCALE]
    if codes.dtype != "I32" or len(codes.shape) != 2 or 0 in codes.shape:
        return misfit(codes, "I32 with two dimensions")
    args = declared.of(module, codes, scale)
    if args is None or scale.dtype not in FLOATS:
        dtypes = " or ".join(FLOATS)
        said = " and ".join(dict.fromkeys(_said(group, bits) for group, bits in declared.declared))
        return misfit(
            scale,
            f"{dtypes}, one for each group that config.json declares ({said}) of codes "
            f"{list(codes.shape)}",
        )
    zeros, order = tensors.get(_ZEROS), tensors.get(ORDER)
    if zeros is None and not args.symmetric:
        return broken(module, PART_MISSING, f"{module} has no {_ZEROS} beside its codes")
    if zeros is not None and args.symmetric:
        return misfit(zeros, "left out: config.json says that the integers are symmetric")
    rows, packed = codes.shape
    shapes = {"I32": (-(-rows * args.bits // 32), scale.shape[1]), "I8": scale.shape}
    if zeros is not None and zeros.shape != shapes.get(zeros.dtype):
        return misfit(zeros, f"I32 {list(shapes['I32'])} or I8 {list(scale.shape)}")
    columns = packed * 32 // args.bits
    if order is not None and (order.dtype, order.shape) != ("I32", (columns,)):
        return misfit(order, f"I32 [{columns}]")
    size = tensors.get(_SIZE)
    if size is not None and (size.dtype not in _SIZES or size.shape != (2,)):
        return misfit(size, f"{' or '.join(_SIZES)} [2]")
    return Stored(
        StorageFormat.INT,
        codes,
        scale,
        (1, args.wide),
        bits=args.bits,
        zeros=zeros,
        order=order,
        size=size,
    )


def _declared(config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield the config groups of integers that can be decoded, with their bits."""
    for group in groups(config):
        weights = group.get("weights")
        if isinstance(weights, dict) and weights.get("type") == "int":
            bits = weights.get("num_bits")
            if type(bits) is int and bits in BITS:
                yield group, bits


def _said(group: Mapping[str, Any], bits: int) -> str:
    size = group["weights"].get("group_size")
    return f"num_bits {bits}, group_size {size}" if type(size) is int else f"num_bits {bits}"


def _entries(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
