"""The loader and version that a verdict stands for."""

from dataclasses import asdict, dataclass
from typing import Final, Literal

from mquant.loader_model.vllm.load import Outcome
from mquant.loader_model.vllm.predict import VERSION
from mquant.verify.loaders.ask_vllm import Verdict

VLLM: Final = f"vLLM {VERSION}"
NOT_MODELLED: Final = ("SGLang", "TensorRT-LLM")
"""Loaders that people use, and that no verdict stands for."""
_NAMES: Final = {"vllm": "vLLM"}


@dataclass(frozen=True)
class StandsFor:
    """A loader that a verdict stands for: its own code was `asked`, or mquant's `model` of it."""

    name: str
    version: str
    how: Literal["asked", "model"]

    def __str__(self) -> str:
        """The loader in words, such as `vLLM 0.32`."""
        return f"{_NAMES[self.name]} {self.version}"

    def to_json(self) -> dict[str, str]:
        """Return the value of the key `stands_for` of JSON documents."""
        return asdict(self)


def stands_for(outcome: Outcome, asked: Verdict | None = None) -> StandsFor | None:
    """Return the loader that a verdict stands for; None if it is not known what a loader does."""
    if asked is not None and asked.answered:
        return StandsFor("vllm", asked.version, "asked")
    return None if outcome.unknown else StandsFor("vllm", VERSION, "model")


def outcome_of(outcome: Outcome, asked: Verdict | None = None) -> Outcome:
    """Return what the loader does that the verdict stands for: `outcome` is the model's.

    If vLLM itself refuses the checkpoint or loads it wrong, its own findings say how.
    """
    if asked is None or not asked.answered:
        return outcome
    return Outcome(unknown="" if asked.verdict == "loads" else "what vLLM itself says")


def not_modelled() -> str:
    """Return one sentence that names the loaders that no verdict stands for."""
    return f"The loaders of {' and '.join(NOT_MODELLED)} are not modelled."
