"""SHA-256 within compiled kernels: by the processor's own instructions where it has them, else by the textbook's rounds.

    begun state + message ─► finish ─► state; its eight words, big-endian, are the digest

Knows no key and nothing of what is hashed. hashlib is the reference of the tests; it needs an object and a call a message,
which a kernel over a batch must not.
"""

from __future__ import annotations

import platform

import llvmlite.binding
import llvmlite.ir
import numba
import numpy as np
from numba.extending import intrinsic

BLOCK = 64

# Without reference counts: no array is made here, and counting each at each call costs a quarter of the time.
_kernel = numba.njit(cache=True, nogil=True, _nrt=False)
_part = numba.njit(cache=True, nogil=True, _nrt=False, forceinline=True)


def _constants() -> tuple[np.ndarray, np.ndarray]:
    """The 64 round constants and the first state: fractions of the cube and square roots of the first primes, exactly."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
    rounds = [_root(prime << 96, 3) & 0xFFFFFFFF for prime in primes]
    start = [_root(prime << 64, 2) & 0xFFFFFFFF for prime in primes[:8]]
    return np.array(rounds, np.uint32), np.array(start, np.uint32)


def _root(number: int, power: int) -> int:
    """The whole part of the root, by bisection."""
    low, high = 0, 1 << (number.bit_length() // power + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**power <= number else (low, middle)
    return low


_ROUNDS, START = _constants()
"""START, uint32 (8,): the state before the first block."""


# -- by the processor


def _has(feature: str) -> bool:
    """Whether this processor, and what Numba compiles for, have instructions of this name in LLVM."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    told = numba.config.CPU_FEATURES
    if told is not None or numba.config.CPU_NAME is not None:
        return f"+{feature}," in (told or "") + ","
    return bool(llvmlite.binding.get_host_cpu_features().get(feature))


_I8, _I32 = llvmlite.ir.IntType(8), llvmlite.ir.IntType(32)
_WORDS, _BYTES = llvmlite.ir.VectorType(_I32, 4), llvmlite.ir.VectorType(_I8, 16)


def _shuffle(builder, left, right, *order):
    return builder.shuffle_vector(left, right, llvmlite.ir.Constant(llvmlite.ir.VectorType(_I32, len(order)), list(order)))


def _step(builder, name, *arguments):
    kind = llvmlite.ir.FunctionType(_WORDS, [_WORDS] * len(arguments))
    return builder.call(builder.module.declare_intrinsic(f"llvm.x86.sha256{name}", (), kind), arguments)


def _schedule(builder, words):
    """The next four words of the message schedule; `words`: the four vectors before."""
    shifted = _shuffle(builder, words[2], words[3], 1, 2, 3, 4)
    return _step(builder, "msg2", builder.add(_step(builder, "msg1", words[0], words[1]), shifted), words[3])


def _forget_upper_halves(builder):
    """These instructions have no form that leaves the upper halves of the wide registers alone. Where code before them has
    left something there, some processors take 100 ns for each; without it 2."""
    if not _has("avx"):
        return
    kind = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), ())
    builder.call(builder.module.declare_intrinsic("llvm.x86.avx.vzeroupper", (), kind), ())


@intrinsic
def _block_by_processor(typing_context, state, message, at):
    """Takes message[at:at + 64] into `state`. The instructions keep the state as (f, e, b, a) and (h, g, d, c)."""

    def generate(context, builder, signature, arguments):
        _forget_upper_halves(builder)

        def vector(number, first, kind):
            data = context.make_array(signature.args[number])(context, builder, arguments[number]).data
            return builder.bitcast(builder.gep(data, [first]), kind.as_pointer())

        i64 = llvmlite.ir.IntType(64)
        places = [vector(0, llvmlite.ir.Constant(i64, first), _WORDS) for first in (0, 4)]
        abcd, efgh = (builder.load(place, align=4) for place in places)
        feba, hgdc = _shuffle(builder, abcd, efgh, 5, 4, 1, 0), _shuffle(builder, abcd, efgh, 7, 6, 3, 2)
        before, words = (feba, hgdc), []
        for four in range(16):
            if four < 4:
                place = vector(1, builder.add(arguments[2], llvmlite.ir.Constant(i64, 16 * four)), _BYTES)
                raw = builder.load(place, align=1)
                order = [4 * word + byte for word in range(4) for byte in (3, 2, 1, 0)]
                words.append(builder.bitcast(_shuffle(builder, raw, raw, *order), _WORDS))
            else:
                words.append(_schedule(builder, words[-4:]))
            rounds = [int(constant) for constant in _ROUNDS[4 * four : 4 * four + 4]]
            two = builder.add(words[-1], llvmlite.ir.Constant(_WORDS, rounds))
            hgdc = _step(builder, "rnds2", hgdc, feba, two)
            feba = _step(builder, "rnds2", feba, hgdc, _shuffle(builder, two, two, 2, 3, 0, 1))
        feba, hgdc = builder.add(feba, before[0]), builder.add(hgdc, before[1])
        builder.store(_shuffle(builder, feba, hgdc, 3, 2, 7, 6), places[0], align=4)
        builder.store(_shuffle(builder, feba, hgdc, 1, 0, 5, 4), places[1], align=4)
        return context.get_dummy_value()

    return numba.types.void(state, message, numba.types.int64), generate


@_part
def _compress_by_processor(state, message, at, w):
    _block_by_processor(state, message, at)


# -- by the textbook


@_part
def _turned(x, n):
    return np.uint32((x >> np.uint32(n)) | (x << np.uint32(32 - n)))


@_kernel
def _compress_by_rounds(state, message, at, w):
    """SHA-256 of one block of 64 bytes: `message[at:at + 64]` into `state` (8,); w (64,) is room."""
    for t in range(16):
        p = at + 4 * t
        w[t] = np.uint32(
            (np.uint32(message[p]) << np.uint32(24))
            | (np.uint32(message[p + 1]) << np.uint32(16))
            | (np.uint32(message[p + 2]) << np.uint32(8))
            | np.uint32(message[p + 3])
        )
    for t in range(16, 64):
        x, y = w[t - 15], w[t - 2]
        low = _turned(x, 7) ^ _turned(x, 18) ^ (x >> np.uint32(3))
        high = _turned(y, 17) ^ _turned(y, 19) ^ (y >> np.uint32(10))
        w[t] = np.uint32(w[t - 16] + low + w[t - 7] + high)
    a, b, c, d, e, f, g, h = state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7]
    for t in range(64):
        mix = _turned(e, 6) ^ _turned(e, 11) ^ _turned(e, 25)
        one = np.uint32(h + mix + ((e & f) ^ (~e & g)) + _ROUNDS[t] + w[t])
        two = np.uint32((_turned(a, 2) ^ _turned(a, 13) ^ _turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c)))
        h, g, f, e = g, f, e, np.uint32(d + one)
        d, c, b, a = c, b, a, np.uint32(one + two)
    state[0] = np.uint32(state[0] + a)
    state[1] = np.uint32(state[1] + b)
    state[2] = np.uint32(state[2] + c)
    state[3] = np.uint32(state[3] + d)
    state[4] = np.uint32(state[4] + e)
    state[5] = np.uint32(state[5] + f)
    state[6] = np.uint32(state[6] + g)
    state[7] = np.uint32(state[7] + h)


# Which of the two is decided once: kernels that call it are compiled with it.
compress = _compress_by_processor if _has("sha") else _compress_by_rounds


@_part
def finish(state, message, length, before, w):
    """`state`, which has taken `before` bytes in whole blocks, takes the last `length` bytes, `message[:length]`, and the
    padding behind them. Writes over `message` up to BLOCK + 8 bytes behind them; `w` is uint32 (64,), room."""
    total = (length + 9 + BLOCK - 1) // BLOCK * BLOCK
    message[length] = 0x80
    for j in range(length + 1, total - 8):
        message[j] = 0
    bits = 8 * (length + before)
    for j in range(8):
        message[total - 1 - j] = (bits >> (8 * j)) & 0xFF
    for at in range(0, total, BLOCK):
        compress(state, message, at, w)


@_part
def digest(state, out, at):
    """The 32 bytes of the digest into `out[at:]`."""
    for j in range(8):
        word = state[j]
        for k in range(4):
            out[at + 4 * j + k] = (word >> np.uint32(24 - 8 * k)) & np.uint32(0xFF)
