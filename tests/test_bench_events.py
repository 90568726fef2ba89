"""The events of the speed benchmark are what an encoder of canonical events would write."""

import msgspec
import numpy as np
import pytest

from benchmarks.events import START_MS, STEP_MS, blocks
from models.events import CanonicalEvent


@pytest.mark.parametrize("uniform", [False, True])
def test_every_byte_is_that_of_the_encoder(uniform):
    encode, seen = msgspec.json.Encoder().encode, 0
    for block in blocks(2500, 7, 1000, uniform=uniform, size=1000):
        for key, value in zip(block.keys, block.values(), strict=True):
            event = msgspec.json.decode(value, type=CanonicalEvent)
            assert encode(event) == value and event.user.encode() == key.tobytes()
            assert event.event_id == f"e7-{seen:010d}" and event.ts == START_MS + STEP_MS * seen
            seen += 1
    assert seen == 2500


def test_zipf_has_a_head_and_uniform_has_none():
    shares = []
    for uniform in (False, True):
        (block,) = blocks(50_000, 1, 1000, uniform=uniform)
        counts = np.unique(block.keys, axis=0, return_counts=True)[1]
        assert len(counts) == 1000
        shares.append(counts.max() / 50_000)
    assert shares[0] > 0.04 and shares[1] < 0.002
