"""The seam between running a model and what wants to see or change its linear modules."""

from typing import Final, Protocol

from mquant.weights.decode import Floats

DOWN: Final = ".down_proj.weight"
"""What the name of an expert's last weight ends with."""


def block_of(name: str) -> str:
    """Return what the names of all routed experts of a layer begin with, from an expert's weight.

    `Linears.hear_block` gets the same.
    """
    return name.rsplit(".", 3)[0]


class Linears(Protocol):
    """The giver of the weights of a layer's linear modules, which sees the modules' inputs.

    An evaluation gives the weights as they are on disk. A calibration looks at the inputs, and may
    give quantized weights, so that what follows in the layer, and all later layers, gets the
    outputs of the quantized model. Names are transformers' names in memory, as the forward pass
    has them: experts are modules of their own, `model.layers.3.mlp.experts.7.gate_proj.weight`.

    The calls for a layer come in the order of the computation. Those for routed experts come from
    several threads at once, each with all calls of an expert; all other calls come from one thread,
    while the workers are free.
    """

    def weights(self, names: tuple[str, ...], inputs: Floats) -> tuple[Floats, ...]:
        """Return float32 weights [out, in] of modules with the same inputs, float32 [n, in].

        The modules are a fused set, or a part of one: q, k and v; gate and up. For a routed expert,
        `inputs` are those of the tokens that are routed to the expert; an expert without tokens is
        not asked for. The result is valid until the same thread's next call for the same modules'
        last names. Raises SourceError if a weight is missing or not decodable.
        """

    def hear_block(self, experts: str, inputs: Floats) -> None:
        """Hear the inputs, float32 [n, hidden], that all routed experts of a layer choose from.

        `experts` is what the names of the experts' modules begin with, without the dot. The call
        comes before those for the experts.
        """
