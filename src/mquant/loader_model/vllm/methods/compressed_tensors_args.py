"""The classes of compressed-tensors 0.17 that vLLM reads a quantization config with.

The classes forbid unknown keys and coerce values as compressed-tensors' own do; both are pydantic.
Members of torch are names here: `uint8` for `torch.uint8`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mquant.loader_model.vllm.tensors import LoadRefused

_DTYPES: Final = frozenset(
    {
        *(f"int{bits}" for bits in (*range(1, 9), 16, 32, 64)),
        *(f"uint{bits}" for bits in (*range(1, 9), 16, 32, 64)),
        *("bool", "bfloat16", "float16", "float32", "float64"),
        *("complex32", "complex64", "complex128"),
        *("float4_e2m1fn_x2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
        *("float8_e5m2fnuz", "float8_e8m0fnu"),
        *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
        *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"),
    }
)
_ALIASES: Final = {
    "bit": "uint1",
    "cdouble": "complex128",
    "cfloat": "complex64",
    "chalf": "complex32",
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "int": "int32",
    "long": "int64",
    "short": "int16",
}
Model = TypeVar("Model", bound=BaseModel)
_GROUPED: Final = ("group", "tensor_group")
_DYNAMIC: Final = ("token", "tensor", "tensor_group", "group")


def _dtype(name: str) -> str:
    name = name.removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in _DTYPES:
        raise ValueError(f"torch has no dtype {name}")
    return name


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _group_size(value: Any) -> Any:
    if value is not None and value < -1:
        raise ValueError(f"group_size {value} is below -1")
    return value


def _block(value: object) -> object:
    if value is None:
        return value
    if isinstance(value, str):
        return [int(part) for part in value.split("x")]
    if isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value):
        return value
    raise ValueError(f"block_structure {value} is no list of two numbers")


def _actorder(value: object) -> object:
    if isinstance(value, bool):
        return "group" if value else None
    return _lower(value)


def _wrapped(value: object) -> object:
    return [value] if isinstance(value, str) else value


Dtype = Annotated[str, AfterValidator(_dtype)]
Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"]
Names = Annotated[list[str], BeforeValidator(_wrapped)]


class QuantizationArgs(BaseModel):
    """How weights or activations are quantized. Instances with the same values are equal."""

    model_config = ConfigDict(extra="forbid")

    num_bits: int = 8
    type: Annotated[Literal["int", "float"], BeforeValidator(_lower)] = "int"
    symmetric: bool = True
    group_size: Annotated[int | None, BeforeValidator(_group_size)] = None
    strategy: Annotated[Strategy | None, BeforeValidator(_lower)] = None
    block_structure: Annotated[list[int] | None, BeforeValidator(_block)] = None
    dynamic: Annotated[Literal["local"] | bool, BeforeValidator(_lower)] = False
    actorder: Annotated[
        Literal["group", "weight", "dynamic", "static"] | bool | None, BeforeValidator(_actorder)
    ] = None
    scale_dtype: Dtype | None = None
    zp_dtype: Dtype | None = None
    observer: str | None = None
    observer_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.strategy is None:
            self.strategy = self._inferred_strategy()
        size, strategy = self.group_size, self.strategy
        if strategy == "token" and not self.dynamic:
            raise ValueError("strategy token needs dynamic")
        if strategy in _GROUPED and (size is None or size <= 0):
            raise ValueError(f"strategy {strategy} needs a group_size above 0")
        if size is not None and size > 0 and strategy not in _GROUPED:
            raise ValueError(f"strategy {strategy} takes no group_size")
        if (strategy == "block") != (self.block_structure is not None):
            raise ValueError("strategy block and block_structure need one another")
        if self.actorder in ("group", "dynamic") and strategy not in _GROUPED:
            raise ValueError(f"strategy {strategy} takes no actorder {self.actorder}")
        self._check_dynamic()
        if self.zp_dtype is None:
            self.zp_dtype = self._stored_dtype()
        return self

    def _inferred_strategy(self) -> Strategy:
        if self.group_size is None:
            return "tensor"
        if self.group_size == 0:
            raise ValueError("group_size is 0")
        return "group" if self.group_size > 0 else "channel"

    def _check_dynamic(self) -> None:
        if not self.dynamic:
            if self.observer is None:
                self.observer = "memoryless_minmax"
            return
        if self.strategy not in _DYNAMIC:
            raise ValueError(f"strategy {self.strategy} cannot be dynamic")
        if self.dynamic == "local" and self.strategy != "tensor_group":
            raise ValueError("dynamic local needs strategy tensor_group")
        if self.dynamic is True:
            self.observer = None
        elif self.observer is None:
            self.observer = "minmax"

    def _stored_dtype(self) -> str:
        if self.type == "float":
            if self.num_bits not in (4, 8):
                raise ValueError(f"type float has no {self.num_bits} bits")
            return "float8_e4m3fn"
        return "int8" if self.num_bits <= 8 else "int16" if self.num_bits <= 16 else "int32"


class _TransformArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    targets: Names
    location: Literal["input", "weight_input", "weight_output", "output", "k_cache", "q_attn"]
    inverse: bool = False
    ignore: Names = Field(default_factory=list)


class _TransformScheme(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str
    apply: list[_TransformArgs] = Field(default_factory=list)
    randomize: bool = False
    requires_grad: bool = False
    head_dim: int | None = None
    precision: Dtype = "float32"


class TransformConfig(BaseModel):
    """The rotations of weights and activations."""

    model_config = ConfigDict(extra="forbid")

    config_groups: dict[str, _TransformScheme]

    @property
    def online(self) -> bool:
        """Whether vLLM changes the activations of some layers at run time."""
        schemes = self.config_groups.values()
        return any(
            args.location not in ("weight_input", "weight_output")
            for scheme in schemes
            for args in scheme.apply
        )


class SparsityConfig(BaseModel):
    """The sparsity of a checkpoint; vLLM takes no sparse layers. Unknown keys are allowed."""

    format: str
    targets: list[str] | None = None
    ignore: list[str] | None = None
    global_sparsity: float | None = 0.0
    sparsity_structure: str | None = "unstructured"


def validated(model: type[Model], value: object, key: str) -> Model:
    """Read a value of the quantization config. Raises LoadRefused where the class raises."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join([key, *map(str, first["loc"])])
        raise LoadRefused("config.json", f"has a bad {place} ({first['msg'][:200]})") from None
    except TypeError as error:
        raise LoadRefused("config.json", f"has a bad {key} ({str(error)[:200]})") from None


def table(value: object, key: str) -> Mapping[str, Any]:
    """Return a table of keys. Raises LoadRefused if the value is none."""
    if not isinstance(value, dict):
        raise LoadRefused("config.json", f"has a {key} that is no table")
    return value
