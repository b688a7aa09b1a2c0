"""A hint to the processor that memory will be read soon, for numba's compiled code.

Weights come from memory: a fused set is larger than any cache. A kernel that waits and computes by
turns takes the sum of the two times; with the hint, the data arrives while the kernel computes.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_READ, _SECOND_LEVEL, _DATA = 0, 2, 1  # arguments of LLVM's llvm.prefetch


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """Load the cache line of `array[index]` into the second-level cache, for any index."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        numbers = [ir.Constant(ir.IntType(32), flag) for flag in (_READ, _SECOND_LEVEL, _DATA)]
        shape = ir.FunctionType(ir.VoidType(), [address.type, *(number.type for number in numbers)])
        hint = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0i8")
        builder.call(hint, [address, *numbers])
        return context.get_dummy_value()

    return types.void(array, index), generate
