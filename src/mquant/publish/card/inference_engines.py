"""Inference engines that load mquant's schemes, and their hardware (`inference_engines.yaml`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mquant.data_files import read_yaml


@dataclass(frozen=True, slots=True)
class Engine:
    """A row of `inference_engines.yaml`, which says what each key means."""

    name: str
    version: str
    loads: Literal["yes", "no", "wrongly"]
    what: str
    seen: str
    only_experts: bool = False


_DATA: Final = read_yaml(Path(__file__).with_suffix(".yaml"))
ENGINES: Final[dict[str, tuple[Engine, ...]]] = {
    scheme: tuple(Engine(**row) for row in rows) for scheme, rows in _DATA["engines"].items()
}
HARDWARE: Final[dict[str, str]] = _DATA["hardware"]
