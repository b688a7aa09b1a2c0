"""What every killed run needs. The server of these runs imports it once, and each run has it."""

from mquant.numerics.floats import FLOATS
from mquant.numerics.kernels import prepare
from mquant.repair import diagnose, repair  # noqa: F401
from mquant.runs import quantize, shares  # noqa: F401

prepare(FLOATS["BF16"])
