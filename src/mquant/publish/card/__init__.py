"""The model card: the hub's README.md, written from known facts only."""

from mquant.publish.card.about import read_about
from mquant.publish.card.facts import Card, gather
from mquant.publish.card.measured import Measured, read_compare, read_eval
from mquant.publish.card.page import MARK, render

__all__ = [
    "MARK",
    "Card",
    "Measured",
    "gather",
    "read_about",
    "read_compare",
    "read_eval",
    "render",
]
