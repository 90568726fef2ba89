"""Thirty-two bytes at a time within compiled kernels: what Numba's own loops do not become.

A load and a store without regard to alignment, of a vector of LLVM, which every processor has in one form or another. No
bounds are looked at: whoever calls has made sure that 32 bytes lie there.
"""

from __future__ import annotations

import llvmlite.ir
import numba
from numba.extending import intrinsic

WIDTH = 32

_VECTOR = llvmlite.ir.VectorType(llvmlite.ir.IntType(8), WIDTH)


def _place(context, builder, signature, arguments, number):
    """The 32 bytes that begin at an index of an array; `number`: of the argument that is the array, the index follows it."""
    data = context.make_array(signature.args[number])(context, builder, arguments[number]).data
    return builder.bitcast(builder.gep(data, [arguments[number + 1]]), _VECTOR.as_pointer())


@intrinsic
def copy(typing_context, out, position, source, at):
    """out[position:position + 32] = source[at:at + 32]"""

    def generate(context, builder, signature, arguments):
        loaded = builder.load(_place(context, builder, signature, arguments, 2), align=1)
        builder.store(loaded, _place(context, builder, signature, arguments, 0), align=1)
        return context.get_dummy_value()

    return numba.types.void(out, numba.types.int64, source, numba.types.int64), generate
