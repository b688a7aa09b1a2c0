"""A hint to the processor that memory will be read soon, for numba's compiled code.

Weights come from memory, not from a cache: a fused set is larger than any. Kernels that wait for
it and compute by turns take the sum of both times; asked for ahead, it comes while they compute.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_READ, _SECOND_LEVEL, _DATA = 0, 2, 1  # arguments of LLVM's llvm.prefetch


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """Bring the cache line of `array[index]` into the second-level cache; any index is fine."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        numbers = [ir.Constant(ir.IntType(32), each) for each in (_READ, _SECOND_LEVEL, _DATA)]
        shape = ir.FunctionType(ir.VoidType(), [address.type, *(each.type for each in numbers)])
        hint = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0i8")
        builder.call(hint, [address, *numbers])
        return context.get_dummy_value()

    return types.void(array, index), generate
