"""Judge the scales of FP8 experts' inputs, which vLLM compares while loading them."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final

from mquant.findings import rule
from mquant.loader_model.modules import ModuleView
from mquant.verify.tally import Tally

_ALIKE: Final = 1e-5
EXPERT_INPUT_SCALES_DIFFER: Final = rule(
    "expert-input-scales-differ",
    "Gate and up of an FP8 expert of compressed-tensors have the same input_scale, to 0.00001.",
    "vLLM stops while loading the weights, because both read the same input.",
    "Give both the larger of the two scales.",
    needs="numbers",
    knowing=("family", "layout"),
)


def check_input_scales(
    view: ModuleView, experts: Iterable[Mapping[str, float]], tally: Tally
) -> None:
    """Compare the scales of gate's and up's input as vLLM does, in the order of the files.

    The parameter is 1 at first, so vLLM does not compare a first scale of 1.
    """
    number = {shard: place for place, shard in enumerate(view.checkpoint.shards)}
    tensors = view.checkpoint.tensors
    for values in experts:
        names = sorted(values, key=lambda name: number.get(tensors[name].shard, 0))
        for first, other in pairwise(names):
            if values[first] != 1 and abs(values[first] - values[other]) > _ALIKE:
                tally.add(
                    EXPERT_INPUT_SCALES_DIFFER,
                    other,
                    f"{first} is {values[first]:g} and {other} is {values[other]:g}",
                )
