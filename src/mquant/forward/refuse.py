"""Refuse a model that the decoder does not know how to compute."""

from typing import NoReturn

from mquant.errors import SourceError


def refuse(reason: str) -> NoReturn:
    """Raise SourceError. `reason` says what config.json asks for: a sentence without its period."""
    raise SourceError(f"{reason}.", "Evaluate the model with its own code, e.g. lm-eval on vLLM.")
