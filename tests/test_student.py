"""The student alone: its arithmetic, its gradient, its budget and what a minor version may change."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
import pytest
import torch
from tiny import HEADS_OF, PLATFORMS, make_config, make_stream, make_student
from torch.utils.flop_counter import FlopCounterMode

from models.fold import N_FEATURES
from models.student import N_GATES, Columns, Student, StudentConfig, _scan_by_doubling, linear_scan

torch.set_num_threads(1)


def make_columns(n: int, seed: int = 0) -> Columns:
    rng = np.random.default_rng(seed)
    events, _ = make_stream(n, 10, seed)
    features_NF = rng.normal(1.0, 2.0, (n, N_FEATURES)).astype(np.float32)
    dt_s_N = rng.exponential(5000.0, n).astype(np.float32)
    return Columns.of(events, features_NF, dt_s_N, rng.integers(0, len(PLATFORMS) + 1, n))


def take(columns: Columns, at) -> Columns:
    return Columns(*(column[at] for column in columns))


def make_starts(n: int, seed: int = 0) -> torch.Tensor:
    starts_N = torch.from_numpy(np.random.default_rng(seed).random(n) < 0.15)
    starts_N[0] = True
    return starts_N


def loop(a_NH, b_NH, starts_N):
    """The recurrence as it is written down."""
    h, out = torch.zeros_like(b_NH[0]), []
    for a, b, start in zip(a_NH, b_NH, starts_N, strict=True):
        h = (torch.zeros_like(h) if start else a * h) + b
        out.append(h)
    return torch.stack(out)


def assert_close(ours, theirs, rtol=1e-7, atol=1e-7):
    """As `torch.testing.assert_close`, whose first call loads for three seconds."""
    np.testing.assert_allclose(ours.detach().cpu().numpy(), theirs.detach().cpu().numpy(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 257])
def test_the_scan_is_the_recurrence_and_so_is_its_gradient(n):
    torch.manual_seed(n)
    starts_N = make_starts(n, n)
    weight_NH = torch.randn(n, 5, dtype=torch.float64)
    grads, values = [], []
    for scan in (linear_scan, loop):
        torch.manual_seed(1)
        a_NH = torch.rand(n, 5, dtype=torch.float64, requires_grad=True)
        b_NH = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
        h_NH = scan(a_NH, b_NH, starts_N) + 0.0 * a_NH
        (h_NH * weight_NH).sum().backward()
        values.append(h_NH.detach())
        grads.append((a_NH.grad, b_NH.grad))
    assert_close(values[0], values[1])
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 300])
def test_the_scan_by_doubling_is_the_scan(n):
    torch.manual_seed(n)
    a_NH, b_NH, starts_N = torch.rand(n, 4), torch.randn(n, 4), make_starts(n, n)
    doubled_NH = _scan_by_doubling(a_NH.masked_fill(starts_N[:, None], 0.0), b_NH)
    assert_close(doubled_NH, linear_scan(a_NH, b_NH, starts_N), rtol=1e-5, atol=1e-6)


def test_a_sequence_says_the_same_alone_and_in_a_batch():
    student, columns, starts_N = make_student(), make_columns(200), make_starts(200)
    with torch.inference_mode():
        logits_N3, gates_NG = student.forward_sequences(columns, starts_N)
        bounds = [*torch.nonzero(starts_N).ravel().tolist(), 200]
        for start, stop in pairwise(bounds):
            alone_N3, alone_NG = student(take(columns, slice(start, stop)), starts_N[start:stop])
            assert_close(alone_N3, logits_N3[start:stop], rtol=0, atol=1e-5)
            assert_close(alone_NG, gates_NG[start:stop], rtol=0, atol=1e-5)
    assert logits_N3.std() > 0.1
    assert gates_NG.shape == (200, N_GATES)


def test_training_moves_every_parameter():
    student, columns = make_student().train(), make_columns(400)
    logits_N3, gates_NG = student(columns, make_starts(400))
    (logits_N3.square().sum() + gates_NG.square().sum()).backward()
    still = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    # Units without decay have no time constant to learn.
    assert (student.log_tau_H.grad[::2] == 0).all()


def test_half_the_units_forget_with_time():
    student, columns = make_student(), make_columns(50)
    soon = student.encode(columns._replace(dt_s_N=torch.zeros(50))).a_NH
    late = student.encode(columns._replace(dt_s_N=torch.full((50,), 3600.0))).a_NH
    assert torch.equal(soon[:, ::2], late[:, ::2])
    assert (late[:, 1::2] < soon[:, 1::2]).all()
    tau_s = student.log_tau_H.detach().exp()
    assert tau_s.min() == pytest.approx(300, rel=1e-3)
    assert tau_s.max() == pytest.approx(60 * 86400, rel=1e-3)


def test_cpu_keeps_the_budget_and_torch_counts_the_same():
    student, n = make_student(), 32
    flops = student.config.flops_per_event()
    assert 40_000 <= flops <= 64_000
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        student(make_columns(n), make_starts(n))
    assert counter.get_total_flops() == n * flops


def test_a_platform_has_its_own_heads_on_top_of_the_shared_ones():
    student, columns, starts_N = make_student(), make_columns(120), make_starts(120)
    with torch.no_grad():
        before_N3 = student(columns, starts_N)[0].clone()
        student.head_bias_PO[2, 0] += 1.0
        moved_N = student(columns, starts_N)[0][:, 0] - before_N3[:, 0]
        assert_close(moved_N, (columns.platform_N == 2).float(), rtol=0, atol=1e-5)
        student.head_bias_PO[0, 0] += 1.0
        assert_close(student(columns, starts_N)[0][:, 0] - before_N3[:, 0], moved_N + 1, rtol=0, atol=1e-5)


def test_the_recurrence_id_names_what_decides_h():
    student = make_student()
    first = student.recurrence_id()
    assert 0 < first < 2**32
    assert make_student().recurrence_id() == first
    assert make_student(seed=1).recurrence_id() != first
    columns, starts_N = make_columns(60), make_starts(60)
    with torch.no_grad():
        for parameter in student.head_parameters():
            parameter.add_(1.0)
    assert student.recurrence_id() == first
    a_NH, b_NH = make_student().encode(columns)[2:]
    assert torch.equal(student.encode(columns).a_NH, a_NH)
    assert torch.equal(student.encode(columns).b_NH, b_NH)
    state = student.state_dict()
    for name in student.RECURRENCE:
        changed = make_student()
        with torch.no_grad():
            changed.state_dict()[name].view(-1)[-1].add_(0.5)
        assert changed.recurrence_id() != first, name
    heads = {id(parameter) for parameter in student.head_parameters()}
    named = {name for name, parameter in student.named_parameters() if id(parameter) in heads}
    assert named | set(student.RECURRENCE) | {"trunk.weight", "trunk.bias"} == set(state)
    assert not torch.equal(student(columns, starts_N)[0], make_student()(columns, starts_N)[0])


def test_normalisation_is_by_platform_and_pooled_for_the_small_and_the_unknown():
    rng = np.random.default_rng(0)
    platform_N = np.repeat([1, 2, 3], [1000, 1000, 10])
    features_NF = rng.normal(5.0, 2.0, (2010, N_FEATURES)).astype(np.float32)
    features_NF[platform_N == 2] += 10.0
    features_NF[:, 3] = 7.0
    student = Student(make_config())
    student.fit_normalisation(features_NF, platform_N)
    mean, std = student.feature_mean_PF, student.feature_std_PF
    assert mean[2, 0] - mean[1, 0] == pytest.approx(10.0, abs=0.3)
    assert std[1, 0] == pytest.approx(2.0, abs=0.1)
    assert mean[0, 0] == pytest.approx(features_NF[:, 0].mean(), abs=1e-3)
    assert torch.equal(mean[3], mean[0])
    assert (std[:, 3] == 1.0).all()
    events, _ = make_stream(2010, 5)
    x_NF = student.encode(Columns.of(events, features_NF, np.zeros(2010, np.float32), platform_N)).x_NF
    assert x_NF[platform_N == 2].mean().abs() < 0.05
    assert x_NF.abs().max() <= 5.0


def test_which_heads_a_platform_can_have():
    can = make_config().can_have()
    assert can[0].all()
    assert can[1 + PLATFORMS.index("beta")].tolist() == [False, True, True, True]
    assert can[1 + PLATFORMS.index("gamma")].tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": "tiny"},
        {"hidden": 63},
        {"platforms": ("alpha", "alpha")},
        {"heads": {**HEADS_OF, "nowhere": ("click",)}},
        {"heads": {"alpha": ("revenue",)}},
        {"n_features": 0},
        {"item_buckets": 1},
    ],
)
def test_a_config_that_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError):
        Student(msgspec.structs.replace(make_config(), **wrong))


def test_config_survives_json():
    config = make_config("gpu")
    assert msgspec.json.decode(msgspec.json.encode(config), type=StudentConfig) == config


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_says_and_learns_the_same():
    columns, starts_N = make_columns(500), make_starts(500)
    grads, outs = [], []
    for device in ("cpu", "cuda"):
        student = make_student().to(device)
        logits_N3, gates_NG = student(columns.to(device), starts_N.to(device))
        (logits_N3.square().mean() + gates_NG.square().mean()).backward()
        outs.append((logits_N3.detach().cpu(), gates_NG.detach().cpu()))
        grads.append([parameter.grad.cpu() for parameter in student.parameters()])
    for ours, theirs in zip([*outs[0], *grads[0]], [*outs[1], *grads[1]], strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
