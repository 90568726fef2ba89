"""The student as a card serves it, against `Student` in torch: on the CPU without graphs, and with them where CUDA is."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, make_stream

from models import device
from models.device import BUCKETS, DeviceStudent
from models.events import EVENT
from models.fold import N_FEATURES
from models.scorer import Scorer
from models.state import empty_rows
from models.student import Columns

torch.set_num_threads(1)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
ATOL = {"cpu": 1e-5, "cuda": 1e-4}


def make_batch(n: int, seed: int):
    """Events (N,), features (N, F), dt_s (N,), platforms (N,) in 0 … 3: of any event in its turn."""
    rng = np.random.default_rng(seed)
    events = np.zeros(n, EVENT)
    events["item"], events["category"] = rng.integers(0, 2**32, (2, n))
    features_NF = rng.normal(0.0, 3.0, (n, N_FEATURES)).astype(np.float32)
    return events, features_NF, rng.exponential(1000.0, n).astype(np.float32), rng.integers(0, 4, n)


def make_served(where: str, size: str = "cpu") -> DeviceStudent:
    student = make_model(size).student
    return DeviceStudent(student.eval().requires_grad_(False).to(where), torch.device(where))


@torch.inference_mode()
def check(served: DeviceStudent, n: int, seed: int) -> None:
    batch = make_batch(n, seed)
    h_NH = np.random.default_rng(seed).normal(size=(n, served.student.config.hidden)).astype(np.float32)
    columns = Columns.of(*batch, served.device)
    x_NF, e_NE, a_NH, b_NH = served.student.encode(columns)
    logits_N3, gates_NG = served.student.heads(torch.from_numpy(h_NH).to(served.device), x_NF, e_NE, columns.platform_N)
    a, b, room = served.encode(*batch)
    for ours, theirs in ((a, a_NH), (b, b_NH)):
        np.testing.assert_allclose(ours, theirs.cpu().numpy(), rtol=0, atol=ATOL[served.device.type])
    room[:] = h_NH
    for ours, theirs in zip(served.heads(n), (logits_N3, gates_NG), strict=True):
        np.testing.assert_allclose(ours, theirs.cpu().numpy(), rtol=1e-4, atol=ATOL[served.device.type])


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("size", ["cpu", "gpu"])
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_batches_of_any_size_say_what_the_student_says(where, size, sizes, seed):
    """Whatever batches have been in the same buffers before."""
    served = made(where, size)
    for nth, n in enumerate(sizes):
        check(served, n, seed + nth)


@cache
def made(where: str, size: str) -> DeviceStudent:
    """One for all tests: making its buckets takes longer than using them."""
    return make_served(where, size)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("n", [1, 64, 65, 4096, 8192])
def test_a_batch_at_a_bucket_s_edge(where, n):
    check(made(where, "cpu"), n, seed=n)


def test_what_an_earlier_call_gave_stays_its_own():
    served = made("cpu", "cpu")
    served.encode(*make_batch(70, 1))[2][:] = 0.5
    logits_N3, gates_NG = served.heads(70)
    before = logits_N3.copy(), gates_NG.copy()
    served.encode(*make_batch(70, 2))[2][:] = -0.5
    assert not np.array_equal(served.heads(70)[0], before[0])
    np.testing.assert_array_equal(logits_N3, before[0])
    np.testing.assert_array_equal(gates_NG, before[1])


def test_more_than_the_largest_bucket_is_refused():
    with pytest.raises(ValueError, match="8193 events at once; at most 8192"):
        made("cpu", "cpu").encode(*make_batch(BUCKETS[-1] + 1, 3))


def test_buckets_are_made_ahead_and_given_back(monkeypatch):
    """After `make`, a batch within it asks for no memory: no step of a bucket is made again."""
    served = make_served("cpu")
    served.make(512)
    steps = []
    monkeypatch.setattr("models.device.captured", lambda step, device: steps.append(step) or step)
    check(served, 500, 4)
    assert not steps
    served.forget(above=256)
    check(served, 200, 5)
    assert not steps
    check(served, 500, 6)
    assert len(steps) == 2


def test_without_graphs_the_steps_run_one_by_one_and_the_log_says_why(monkeypatch, caplog):
    def refuse(step, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "_graph", refuse)
    ran = []
    step = device.captured(lambda: ran.append(1), torch.device("cuda"))
    step()
    assert len(ran) == 2
    assert "cuda takes no CUDA graph" in caplog.text and "not permitted" in caplog.text


def test_too_little_memory_for_a_graph_is_no_reason_to_go_without(monkeypatch):
    def full(step, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "_graph", full)
    with pytest.raises(torch.OutOfMemoryError):
        device.captured(lambda: None, torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_card_that_is_nearly_full_costs_no_event():
    """The share of memory is a worker's own, so that others on the card keep theirs."""
    model = make_model("cpu")
    events, slots = make_stream(600, 20, seed=31)
    expected, expected_rows = Scorer(model, "cpu"), empty_rows(20)
    expected_scores, _ = expected.run(expected_rows, slots, events)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        scorer, rows = Scorer(model, "cuda", memory_fraction=(torch.cuda.memory_reserved() + 2**20) / total), empty_rows(20)
        scores, _ = scorer.run(rows, slots, events)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scorer.out_of_memory > 0
    np.testing.assert_allclose(scores.p_N3, expected_scores.p_N3, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rows["h"], expected_rows["h"], rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_two_scorers_on_one_card_do_not_disturb_each_other():
    """As while a worker loads the next model in a thread: captures beside replays."""
    from threading import Thread

    model, next_model = make_model("cpu"), make_model("cpu")
    events, slots = make_stream(600, 20, seed=32)
    expected, _ = Scorer(model, "cuda").run(empty_rows(20), slots, events)
    scorer, loaded = Scorer(model, "cuda"), []
    loads = Thread(target=lambda: loaded.append(Scorer(next_model, "cuda")))
    loads.start()
    turns = 0
    while loads.is_alive() or turns < 3:
        scores, _ = scorer.run(empty_rows(20), slots, events)
        np.testing.assert_array_equal(scores.p_N3, expected.p_N3)
        turns += 1
    loads.join()
    np.testing.assert_allclose(loaded[0].run(empty_rows(20), slots, events)[0].p_N3, expected.p_N3, rtol=0, atol=1e-4)
