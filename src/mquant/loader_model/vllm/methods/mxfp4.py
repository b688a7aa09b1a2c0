"""vLLM 0.32's method `mxfp4`, and the like: only experts are quantized, linear layers stay plain.

The sources are vLLM's `quantization/mxfp4.py` and `experts_int8.py`. The parameters of experts are
not modelled: what is known is that vLLM refuses quantized tensors of other layers.
"""

from collections.abc import Iterable, Mapping

from mquant.loader_model.vllm.experts import Experts
from mquant.loader_model.vllm.layers import Attention, Embedding, Linear
from mquant.loader_model.vllm.tensors import Parameter
from mquant.loader_rows import Renames


class ExpertsOnly:
    """A method that quantizes experts only, by its name. `fused` and `renames` are never read."""

    kind = "mxfp4"
    asked: frozenset[str] = frozenset()
    suffixes: tuple[tuple[str, str], ...] = ()

    def __init__(self, name: str) -> None:
        self.fused: Mapping[str, tuple[str, ...]] = {}
        self.renames: Renames | None = None
        self._name = name

    def linear(self, layer: Linear) -> Iterable[Parameter] | None:
        """Return None: linear layers stay plain."""
        return None

    def embedding(self, layer: Embedding, *, head: bool) -> Iterable[Parameter] | None:
        """Return None: embeddings and heads stay plain."""
        return None

    def experts(self, layer: Experts) -> Iterable[Parameter] | None:
        """Return no parameters, and mark the experts as not known."""
        layer.unknown = f"experts of the quantization method {self._name}"
        return ()

    def attention(self, layer: Attention, kv_heads: int) -> Iterable[Parameter]:
        """Return nothing: the method has no scales of the KV cache."""
        return ()
