"""The compiled SHA-256, by the processor and by the textbook, is hashlib's."""

from __future__ import annotations

import hashlib

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams import sha256

WAYS = [pytest.param(sha256._compress_by_rounds, id="rounds")]
if sha256._has("sha"):
    WAYS.append(pytest.param(sha256._compress_by_processor, id="processor"))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(0, 4), rest=st.integers(0, 63), at=st.integers(0, 9), data=st.data())
def test_each_way_takes_blocks_as_hashlib_does(way, blocks: int, rest: int, at: int, data: st.DataObject):
    content = data.draw(st.binary(min_size=64 * blocks + rest, max_size=64 * blocks + rest))
    message = content + b"\x80" + bytes((-len(content) - 9) % 64) + (8 * len(content)).to_bytes(8, "big")
    buffer = np.frombuffer(bytes(at) + message, np.uint8)
    state = sha256.START.copy()
    for block in range(at, len(buffer), 64):
        way(state, buffer, block, np.empty(64, np.uint32))
    assert state.astype(">u4").tobytes() == hashlib.sha256(content).digest()


@settings(max_examples=200, deadline=None)
@given(before=st.integers(0, 2), content=st.binary(max_size=300))
def test_finish_and_digest_are_those_of_hashlib(before: int, content: bytes):
    state, begun = sha256.START.copy(), bytes(range(64)) * before
    for block in range(before):
        sha256.compress(state, np.frombuffer(begun, np.uint8), 64 * block, np.empty(64, np.uint32))
    message = np.full(len(content) + sha256.BLOCK + 8 + 3, 0xAA, np.uint8)
    message[: len(content)] = np.frombuffer(content, np.uint8)
    sha256.finish(state, message, len(content), len(begun), np.empty(64, np.uint32))
    out = np.zeros(34, np.uint8)
    sha256.digest(state, out, 1)
    assert out[1:33].tobytes() == hashlib.sha256(begun + content).digest() and not out[0] and not out[33]
    assert (message[-3:] == 0xAA).all()  # no further than it says


@pytest.mark.skipif(not (sha256._has("sha") and sha256._has("avx")), reason="needs a processor with SHA and AVX")
def test_the_upper_halves_of_wide_registers_are_forgotten_before_each_block():
    """Otherwise some processors take fifty times as long, and nothing but the clock tells."""

    @numba.njit
    def hashed(state, message):
        sha256.compress(state, message, 0, state)

    hashed(sha256.START.copy(), np.zeros(64, np.uint8))
    (assembly,) = hashed.inspect_asm().values()
    assert 0 < assembly.index("vzeroupper") < assembly.index("sha256rnds2")
