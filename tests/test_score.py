"""What the score stage adds to the scorer's answers. The stage itself runs in the tests with a broker."""

import numpy as np
import pytest
from test_fold import events_of, run

from models.state import empty_rows
from streams.score import COLD_EVENTS, is_cold


@pytest.mark.parametrize("cuts", [[6], [1, 5], [1, 1, 1, 1, 1, 1], [4, 2]])
def test_cold_is_a_matter_of_the_event_and_not_of_its_batch(cuts):
    rows, events = empty_rows(1), events_of(*({"ts": 1_700_000_000_000 + i} for i in range(6)))
    features = np.concatenate([run(rows, part)[0] for part in np.split(events, np.cumsum(cuts)[:-1])])
    assert is_cold(features).tolist() == [n <= COLD_EVENTS for n in range(1, 7)]
