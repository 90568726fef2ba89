"""The gate: evidence that trips each rule and only it, intervals, Holm, what refusals say; and a real model's evidence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model

from models import artifact
from trainer import gate, metrics
from trainer.evaluate import CategoryCell, Comparison, Judged, Paired, Report
from trainer.gate import Evidence, Limits, adversarial, decide, examine, scoring_p99_ms

RULES = ["finite", "cells", "log_loss", "better", "hit_rate", "auc", "pr_auc", "ece", "predicted_over_actual", "slices"]
RULES += ["p99"]
LIMITS = Limits(draws=60, forgive_better=False)
FEW_POSITIVES = LIMITS._replace(positives=10**6)
"""Neither slices nor predicted/actual are judged."""
UNRANKED = FEW_POSITIVES._replace(ranked_events=10**6)
"""Nor AUC and PR-AUC."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1.0 - p))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-z))


def truth(n: int = 12_000, users: int = 400, seed: int = 0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """→ (user (n,), p (n,)): users differ from each other; symmetric about 0.5 without an offset."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, n)
    return user, sigmoid(rng.normal(0, 0.7, users)[user] + rng.normal(0, 0.7, n) + offset)


def noisy(p: np.ndarray, deviation: float = 0.4, seed: int = 1) -> np.ndarray:
    return sigmoid(logit(p) + np.random.default_rng(seed).normal(0, deviation, len(p)))


def outcomes(p: np.ndarray, seed: int = 2) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(p)) < p).astype(np.uint8)


def evidence(user, y, ours, theirs, **more) -> Evidence:
    """One platform, one head, and the best of everything else."""
    n = len(user)
    rng = np.random.default_rng(3)

    def first(values, dtype, rest) -> np.ndarray:
        return np.stack([values, *2 * [np.full(n, rest)]], axis=1).astype(dtype)

    paired = Paired(
        platforms=("shop",),
        platform_N=np.zeros(n, np.int16),
        user_N=user,
        known_N3=first(np.ones(n), bool, False),
        y_N3=first(y, np.uint8, 0),
        candidate_N3=first(ours, np.float32, np.nan),
        incumbent_N3=first(theirs, np.float32, np.nan),
        activity_N=rng.integers(1, 30, n),
        price_N=rng.integers(0, 80, n).astype(np.uint8),
        category_N=rng.integers(0, 4, n).astype(np.uint32),
        category_names={1: "lamps", 2: "rugs"},
    )
    paired = paired._replace(**{key: more.pop(key) for key in [*more] if key in Paired._fields})
    return Evidence(**{"paired": paired, "hit_rates": {"shop": (0.5, 0.5)}, "problems": (), "p99_ms": 5.0, **more})


def good(**more) -> Evidence:
    """A candidate that knows the truth, against one that sees it through noise."""
    user, p = truth()
    return evidence(user, outcomes(p), p, noisy(p), **more)


def refusing(verdict: gate.Verdict) -> set[str]:
    return {rule.name for rule in verdict.rules if rule.refusals}


def test_a_better_model_passes_every_rule():
    verdict = decide(good(), LIMITS)
    assert verdict.outcome == "published" and refusing(verdict) == set(), verdict.reason
    assert verdict.reason.startswith("mean log-loss 0.") and "over 1 cells" in verdict.reason
    assert [rule.name for rule in verdict.rules] == RULES
    assert verdict.as_dict() == decide(good(), LIMITS).as_dict()


# ── each rule alone ──────────────────────────────────────────────────────────────────────────────────────────────────


def worse_by_noise(deviation: float) -> Evidence:
    user, p = truth()
    return evidence(user, outcomes(p), noisy(p, deviation), p)


def half_ranked(knows_the_top: bool) -> tuple[Evidence, Limits]:
    """Of rare outcomes candidate and incumbent each rank the top or the rest; the incumbent is far too sure of all. The
    area under ROC is mostly of the rest, that under precision and recall mostly of the top."""
    user, p = truth(offset=-2.0)
    border = np.quantile(p, 0.8)
    of_top = np.where(p > border, p, np.minimum(noisy(p, 0.6), border))
    of_rest = np.where(p > border, p[p > border].mean(), p)
    ours, theirs = (of_top, of_rest) if knows_the_top else (of_rest, of_top)
    return evidence(user, outcomes(p), ours, sigmoid(2.5 * logit(theirs))), FEW_POSITIVES._replace(ece=1.0)


def sharp(scale: float) -> Evidence:
    """Too sure by a factor, symmetric, so that the sum is right; the incumbent sees little."""
    user, p = truth()
    return evidence(user, outcomes(p), sigmoid(scale * logit(p)), noisy(p, 1.2))


def too_high(factor: float) -> Evidence:
    user, p = truth(60_000, 4000, offset=-2.7)
    return evidence(user, outcomes(p), p * factor, noisy(p, 0.8))


def blind_to_newcomers(deviation: float) -> Evidence:
    user, p = truth(20_000, 800)
    activity = 1 + np.arange(len(p)) % 16
    blind = noisy(p, deviation, seed=5)
    return evidence(
        user, outcomes(p), np.where(activity <= 3, blind, p), np.where(activity <= 3, p, noisy(p, 0.8)), activity_N=activity
    )


@pytest.mark.parametrize(
    ("rules", "outcome", "tripped", "spared"),
    [
        ({"finite"}, "not_finite", lambda: good(problems=("extremes: p.click",)), good),
        ({"cells"}, "too_few", lambda: (good(), LIMITS._replace(least_events=12_001)), lambda: (good(), LIMITS)),
        ({"log_loss", "better"}, "not_better", lambda: (worse_by_noise(0.2), UNRANKED), good),
        ({"better"}, "not_better", lambda: worse_by_noise(0.0), good),
        ({"hit_rate"}, "not_better", lambda: good(hit_rates={"a": (0.4, 0.45), "b": (0.5, 0.5)}), None),
        ({"hit_rate"}, "not_better", lambda: good(hit_rates={"a": (0.4, 0.45)}), lambda: good(hit_rates={"a": (0.4, 0.41)})),
        ({"auc"}, "refused", lambda: half_ranked(True), good),
        ({"pr_auc"}, "refused", lambda: half_ranked(False), good),
        ({"ece"}, "refused", lambda: sharp(1.5), lambda: sharp(1.05)),
        ({"predicted_over_actual"}, "refused", lambda: too_high(1.09), lambda: too_high(1.03)),
        ({"slices"}, "refused", lambda: blind_to_newcomers(0.6), lambda: blind_to_newcomers(0.0)),
        ({"p99"}, "refused", lambda: good(p99_ms=50.01), lambda: good(p99_ms=49.99)),
        ({"p99"}, "refused", lambda: good(p99_ms=float("nan")), good),
    ],
)  # fmt: skip
def test_each_rule_refuses_alone(rules, outcome, tripped, spared):
    def judge(case) -> gate.Verdict:
        case = case()
        return decide(*case) if type(case) is tuple else decide(case, LIMITS)

    verdict = judge(tripped)
    assert refusing(verdict) == rules, verdict.reason
    assert verdict.outcome == outcome
    for rule in verdict.rules:
        assert all(text.startswith(f"{rule.name}: ") and text in verdict.reason for text in rule.refusals)
    if spared is not None:
        assert refusing(judge(spared)) == set(), judge(spared).reason


def test_every_rule_is_judged_and_the_first_that_refuses_names_the_outcome():
    verdict = decide(good(p99_ms=60.0, hit_rates={"a": (0.1, 0.5)}, problems=("window: x", "extremes: y")), LIMITS)
    assert refusing(verdict) == {"finite", "hit_rate", "p99"} and verdict.outcome == "not_finite"
    assert verdict.reason == (
        "finite: window: x; finite: extremes: y; hit_rate: mean HR@5 over 1 platforms 0.1000, was 0.5000 (-0.4000), "
        "limit -0.02; p99: 60.00 ms for 1,024 events, budget 50.00 ms"
    )
    assert all(rule.found for rule in verdict.rules)


def test_a_probability_that_is_no_number_is_not_finite_and_the_rest_is_judged():
    case = good()
    two = np.arange(len(case.paired.user_N)) % 2
    paired = case.paired._replace(platforms=("shop", "till"), platform_N=two, candidate_N3=case.paired.candidate_N3.copy())
    paired.candidate_N3[two.argmax(), 0] = np.nan
    verdict = decide(case._replace(paired=paired), LIMITS)
    assert verdict.outcome == "not_finite" and refusing(verdict) == {"finite"}
    assert "window: 1 probabilities of 12000 are no numbers" in verdict.reason
    shop, till = verdict.cells
    assert shop.auc.difference.low > 0 and np.isnan(till.auc.candidate)
    assert "over 1 cells" in verdict.rules[2].found


# ── log-loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_difference_within_noise_is_no_evidence_against_but_no_improvement_either():
    user, p = truth(2000)
    y = outcomes(p)
    seeds = [seed for seed in range(20) if _worse_within_noise(y, noisy(p, 0.3, seed), noisy(p, 0.3, seed + 50))]
    verdict = decide(evidence(user, y, noisy(p, 0.3, seeds[0]), noisy(p, 0.3, seeds[0] + 50)), UNRANKED)
    assert verdict.log_loss.difference.low < 0.0 < verdict.log_loss.difference.value < verdict.log_loss.difference.high
    assert "log_loss" not in refusing(verdict) and "better" in refusing(verdict) and verdict.outcome == "not_better"


def _worse_within_noise(y, ours, theirs) -> bool:
    return 0.0 < metrics.log_loss(y, ours) - metrics.log_loss(y, theirs) < 0.002


@pytest.mark.parametrize(("better", "rules"), [(True, set()), (False, {"log_loss", "better"})])
def test_with_too_few_users_the_point_decides(better, rules):
    _, p = truth(2000)
    models = (p, noisy(p, 0.5)) if better else (noisy(p, 0.5), p)
    verdict = decide(evidence(np.arange(len(p)) % 9, outcomes(p), *models), UNRANKED)
    assert refusing(verdict) == rules, verdict.reason
    assert "no interval: too few users" in verdict.rules[2].found
    assert np.isnan(verdict.cells[0].ece.low) and verdict.cells[0].ece.value >= 0.0


def test_the_mean_counts_every_cell_once_and_its_interval_takes_users_whole():
    user, p = truth(6000, 150)
    case = evidence(user, outcomes(p), p, noisy(p))
    small = np.arange(len(p)) % 10 == 0
    case = case._replace(paired=case.paired._replace(platforms=("shop", "till"), platform_N=small.astype(np.int16)))
    verdict = decide(case, Limits(draws=400, positives=10**6))
    cells = [cell.log_loss.difference for cell in verdict.cells]
    assert [cell.n for cell in verdict.cells] == [5400, 600]
    assert verdict.log_loss.difference.value == pytest.approx(np.mean([cell.value for cell in cells]))
    y = case.paired.y_N3[:, 0]
    worse_N = metrics.log_losses(y, p.astype(np.float32)) - metrics.log_losses(y, noisy(p).astype(np.float32))
    resamples = metrics.Resamples(user, 400, seed=9)
    draws = [resamples.mean(worse_N * of) / resamples.mean(of) for of in (small, ~small)]
    expected = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    width = expected[1] - expected[0]
    np.testing.assert_allclose(verdict.log_loss.difference[1:], expected, atol=0.15 * width)


# ── AUC and PR-AUC ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_refusal_names_rule_cell_and_numbers():
    user, p = truth()
    verdict = decide(evidence(user, outcomes(p), noisy(p, 0.8), p), LIMITS)
    auc = verdict.cells[0].auc
    low, high = auc.difference.low, auc.difference.high
    change = f"{auc.incumbent:.4f} -> {auc.candidate:.4f} ({auc.difference.value:+.4f} [{low:+.4f}, {high:+.4f}])"
    assert verdict.rules[RULES.index("auc")].refusals == (f"auc: shop x click {change}",)
    assert auc.difference.value == auc.candidate - auc.incumbent and low < auc.difference.value < high < 0.0
    y = outcomes(p)
    assert auc.candidate == metrics.auc(y, noisy(p, 0.8).astype(np.float32))
    assert verdict.cells[0].pr_auc.incumbent == metrics.average_precision(y, p.astype(np.float32))


@pytest.mark.parametrize("rule", ["auc", "pr_auc"])
def test_a_drop_of_the_point_refuses_without_significance_and_only_with_enough_events(rule):
    user, p = truth(1400, 200)
    y = outcomes(p)

    def of(seed: int) -> Evidence:
        return evidence(user, y, noisy(p, 0.5, seed), noisy(p, 0.5, seed + 100))

    verdicts = [decide(of(seed), FEW_POSITIVES) for seed in range(12)]
    changes = [getattr(verdict.cells[0], rule).difference for verdict in verdicts]
    found = [v for v, change in zip(verdicts, changes, strict=True) if change.value < -0.005 and change.high > 0.0]
    assert found and all(rule in refusing(verdict) for verdict in found)
    assert not any(rule in refusing(v) for v, change in zip(verdicts, changes, strict=True) if change.value > -0.005)
    spared = [decide(of(seed), FEW_POSITIVES._replace(ranked_events=1401)) for seed in range(12)]
    assert not any({"auc", "pr_auc"} & refusing(verdict) for verdict in spared)


def test_a_constant_incumbent_has_no_ranking_to_lose_but_must_be_beaten():
    user, p = truth()
    y = outcomes(p)
    verdict = decide(evidence(user, y, p, np.full(len(p), 0.45)), LIMITS)
    assert verdict.outcome == "published"
    assert verdict.rules[5].found == verdict.rules[6].found == "no cell to compare"
    assert verdict.cells[0].auc.incumbent == 0.5 and np.isnan(verdict.cells[0].auc.difference.value)
    backwards = decide(evidence(user, y, 1.0 - p, np.full(len(p), 0.5)), LIMITS)
    assert backwards.outcome == "not_better" and {"log_loss", "better"} <= refusing(backwards)
    assert "auc" in refusing(decide(evidence(user, y, np.full(len(p), 0.5), p), LIMITS))


def test_a_head_that_the_incumbent_does_not_answer_is_judged_by_itself():
    case = good()
    two = (np.arange(len(case.paired.user_N)) % 2).astype(np.int16)
    theirs = case.paired.incumbent_N3.copy()
    theirs[two == 1] = np.nan
    paired = case.paired._replace(platforms=("shop", "new"), platform_N=two, incumbent_N3=theirs)
    verdict = decide(case._replace(paired=paired), LIMITS)
    new = verdict.cells[1]
    assert verdict.outcome == "published" and "over 1 cells" in verdict.reason
    assert np.isnan(new.log_loss.incumbent) and np.isnan(new.auc.difference.value) and new.auc.candidate > 0.6
    assert new.ece.high > new.ece.low >= 0.0 and new.predicted_over_actual.low < 1.0 < new.predicted_over_actual.high


# ── calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_calibrated_model_is_hardly_ever_refused_on_its_calibration():
    """Also on few events, where the plain percentiles of resampled errors often lie wholly above the limit."""
    refused = naive = 0
    for seed in range(30):
        user, p = truth(600, 75, seed)
        y = outcomes(p, 100 + seed)
        refused += "ece" in refusing(decide(evidence(user, y, p, noisy(p)), UNRANKED._replace(draws=40)))
        if seed < 12:
            naive += np.percentile(metrics.Resamples(user, 40).of(lambda w, y=y, p=p: metrics.ece(y, p, w)), 2.5) > 0.010
    assert refused <= 3
    assert naive >= 4


def test_bad_calibration_refuses_even_a_better_model_unless_it_is_to_be_forgiven():
    user, p = truth(60_000, 4000, offset=-2.7)
    case = evidence(user, outcomes(p), 1.15 * p, 1.5 * p)
    verdict = decide(case, LIMITS)
    assert verdict.outcome == "refused" and refusing(verdict) == {"ece", "predicted_over_actual"}, verdict.reason
    cell = verdict.cells[0]
    assert cell.incumbent_ece > cell.ece.value and cell.incumbent_predicted_over_actual == pytest.approx(1.5, abs=0.05)
    assert Limits().forgive_better
    assert decide(case, LIMITS._replace(forgive_better=True)).outcome == "published"
    turned = evidence(user, outcomes(p), 1.5 * p, 1.15 * p)
    assert {"ece", "predicted_over_actual"} <= refusing(decide(turned, LIMITS._replace(forgive_better=True)))


def test_a_rule_that_is_not_enforced_is_reported_and_refuses_nothing():
    user, p = truth(60_000, 4000, offset=-2.7)
    case = evidence(user, outcomes(p), 1.15 * p, 1.5 * p)
    verdict = decide(case, LIMITS._replace(enforced=("finite", "cells", "log_loss", "better")))
    assert verdict.outcome == "published" and refusing(verdict) == {"ece", "predicted_over_actual"}
    assert {line.split(":")[0] for line in verdict.noticed} == {"ece", "predicted_over_actual"}
    assert decide(case, LIMITS).noticed == ()


def test_the_calibration_error_is_the_one_of_the_metrics_where_events_are_independent():
    _, p = truth(20_000)
    y = outcomes(sigmoid(0.6 * logit(p)))
    ece = decide(evidence(np.arange(len(p)), y, p, noisy(p)), UNRANKED).cells[0].ece
    assert ece.value == pytest.approx(metrics.ece(y, p), abs=0.002)
    assert ece.low < ece.value < ece.high and 0.005 < ece.high - ece.low < 0.03
    off = sigmoid(0.6 * logit(p)) - p
    assert ece.low < np.sqrt(np.mean(off**2)) < ece.high


# ── slices ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_dimension_parts_the_events():
    case = good()
    rng = np.random.default_rng(0)
    n = len(case.paired.user_N)
    categories = np.minimum(rng.zipf(1.3, n), 10**6).astype(np.uint32) - 1
    paired = case.paired._replace(category_N=categories, price_N=np.where(rng.random(n) < 0.2, 0, case.paired.price_N))
    slices = decide(case._replace(paired=paired), LIMITS).slices
    for dimension in ("platform", "activity", "price", "category"):
        assert sum(part.n for part in slices if part.dimension == dimension) == n
    names = {dimension: [p.name for p in slices if p.dimension == dimension] for dimension in ("activity", "price")}
    assert names == {"activity": ["1-3", "4-15", "16+"], "price": ["none", "q1", "q2", "q3", "q4"]}
    category = [part for part in slices if part.dimension == "category"]
    assert len(category) == 11 and category[0].name == "lamps" and category[-1].name == "(the rest)"
    quartiles = [part.n for part in slices if part.name.startswith("q")]
    assert max(quartiles) < 1.3 * min(quartiles)


def test_only_slices_with_enough_positives_are_judged():
    case = blind_to_newcomers(0.6)
    verdict = decide(case, LIMITS)
    (worse,) = [part for part in verdict.slices if part.worse]
    assert (worse.dimension, worse.name) == ("activity", "1-3") and worse.p_value < 0.001
    assert verdict.reason.startswith("slices: click where activity = 1-3 0.") and "p = " in verdict.reason
    more = decide(case, LIMITS._replace(positives=worse.positives + 1))
    assert more.outcome == "published"
    assert np.isnan(next(part.p_value for part in more.slices if part.name == "1-3"))


def test_holm_keeps_chance_from_refusing_among_many_slices():
    """Models that differ by noise alone: among 13 slices something is often worse at 5 %, and seldom after Holm."""
    by_chance = refused = 0
    for seed in range(25):
        user, p = truth(6000, 600, seed)
        case = evidence(user, outcomes(p, seed), noisy(p, 0.2, 2 * seed), noisy(p, 0.2, 2 * seed + 1))
        slices = decide(case, UNRANKED._replace(draws=40, positives=100)).slices
        judged = [(part.p_value, part.log_loss.difference.value > 0.0) for part in slices]
        rejected = metrics.holm([p_value for p_value, _ in judged])
        assert [part.worse for part in slices] == [r and above for r, (_, above) in zip(rejected, judged, strict=True)]
        by_chance += any(p_value < 0.05 and above for p_value, above in judged)
        refused += any(part.worse for part in slices)
    assert by_chance >= 5 and refused <= 3


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

cases = st.tuples(st.integers(0, 10**6), st.integers(130, 400), st.integers(2, 60), st.floats(-2.0, 2.0))


def drawn_case(seed: int, n: int, users: int, offset: float, ours=None) -> Evidence:
    """Two platforms and three heads with gaps in what is known."""
    rng = np.random.default_rng(seed)
    user, p = truth(n, users, seed, offset)
    case = evidence(user, outcomes(p), p, p)
    theirs = sigmoid(logit(p)[:, None] + rng.normal(0, 0.5, (n, 3))).astype(np.float32)
    paired = case.paired._replace(
        platforms=("shop", "till"),
        platform_N=rng.integers(0, 2, n).astype(np.int16),
        known_N3=rng.random((n, 3)) < 0.9,
        y_N3=(rng.random((n, 3)) < p[:, None]).astype(np.uint8),
        candidate_N3=theirs if ours is None else ours(theirs),
        incumbent_N3=theirs,
    )
    return case._replace(paired=paired)


EAGER = Limits(draws=40, least_events=40, ranked_events=40, ranked_of_an_outcome=1, positives=5, least_users=2)
"""Judges even the smallest."""


@given(cases)
@settings(max_examples=25, deadline=None)
def test_the_incumbent_itself_is_never_worse_than_itself(drawn):
    verdict = decide(drawn_case(*drawn), EAGER)
    assert not {"log_loss", "auc", "pr_auc", "slices", "finite"} & refusing(verdict), verdict.reason
    assert verdict.outcome in ("not_better", "too_few")
    json.dumps(verdict.as_dict(), allow_nan=False)


@given(cases)
@settings(max_examples=25, deadline=None)
def test_a_model_that_says_the_opposite_is_always_refused(drawn):
    """Every cell turned round and sure of it: no evidence, however small, may publish it over what it was made from."""
    verdict = decide(drawn_case(*drawn, ours=lambda p_N3: np.float32(1.0) - p_N3**8), EAGER)
    if verdict.outcome != "too_few":
        assert verdict.outcome == "not_better" and verdict.log_loss.difference.value > 0.0
    assert decide(drawn_case(*drawn, ours=lambda p_N3: np.where(p_N3 > 0, np.nan, p_N3)), EAGER).outcome == "not_finite"


@given(cases)
@settings(max_examples=15, deadline=None)
def test_the_order_of_events_does_not_matter(drawn):
    case = drawn_case(*drawn, ours=lambda p_N3: p_N3**1.1)
    order = np.random.default_rng(drawn[0]).permutation(len(case.paired.user_N))
    shuffled = case.paired._replace(
        **{name: part[order] for name, part in case.paired._asdict().items() if name.endswith(("_N", "_N3"))}
    )
    one, two = decide(case, EAGER), decide(case._replace(paired=shuffled), EAGER)
    assert one.outcome == two.outcome and refusing(one) == refusing(two)
    assert one.log_loss.difference == pytest.approx(two.log_loss.difference, nan_ok=True)


def test_without_a_single_event_it_is_too_few():
    case = good()
    none = case.paired._replace(
        **{name: part[:0] for name, part in case.paired._asdict().items() if name.endswith(("_N", "_N3"))}
    )
    verdict = decide(case._replace(paired=none), LIMITS)
    assert verdict.outcome == "too_few" and refusing(verdict) == {"cells"}
    assert "no platform x head has enough later events" in verdict.reason
    json.dumps(verdict.as_dict(), allow_nan=False)


def test_the_verdict_is_json_with_every_number():
    written = json.loads(json.dumps(decide(good(), LIMITS).as_dict(), allow_nan=False))
    assert written["outcome"] == "published" and written["limits"]["ece"] == 0.01 and written["events"] == 12_000
    (cell,) = written["cells"]
    assert cell["auc"].keys() == {"candidate", "incumbent", "difference"}
    assert cell["auc"]["difference"]["low"] < cell["auc"]["difference"]["value"] < cell["auc"]["difference"]["high"]
    assert cell["ece"].keys() == cell["predicted_over_actual"].keys() == {"value", "low", "high"}
    assert {rule["name"]: rule["refusals"] for rule in written["rules"]}["auc"] == []


def test_a_check_stops_it():
    class Stop(Exception):
        pass

    def check() -> None:
        raise Stop

    with pytest.raises(Stop):
        decide(good(), LIMITS, check=check)


# ── evidence of a model ──────────────────────────────────────────────────────────────────────────────────────────────


def test_sound_models_stand_the_extremes():
    assert adversarial(artifact.load_prior()) == ()
    assert adversarial(make_model()) == ()


@pytest.mark.parametrize(
    ("parameter", "value", "said"),
    [
        ("head_bias_PO", np.nan, "p.click"),
        ("head_weight_POK", np.nan, "p.return"),
        ("feature_mean_PF", np.nan, "h is not finite"),
    ],
)
def test_a_model_that_breaks_at_the_extremes_says_where(parameter, value, said):
    model = make_model()
    getattr(model.student, parameter).data.fill_(value)
    problems = adversarial(model)
    assert all(problem.startswith("extremes: ") for problem in problems)
    assert any(said in problem for problem in problems), problems


def test_a_scorer_that_fails_is_a_problem_and_no_crash(monkeypatch):
    def fail(*_):
        raise ValueError("no such slot")

    monkeypatch.setattr(gate.Scorer, "run", fail)
    assert adversarial(make_model()) == ("extremes: the scorer fails: ValueError: no such slot",)


def test_extremes_are_extreme():
    rows, slots, events = gate._extremes(make_model())
    assert {0, gate._MAX_TS} <= set(events["ts"].tolist()) and {0, 1, 2**32 - 1} <= set(events["category"].tolist())
    assert len(np.unique(events["platform"])) == 4 and len(np.unique(events["kind"])) == 7
    assert events["quantity"].max() == np.finfo(np.float32).max and events["price"].max() == 255
    assert (slots == 0).sum() >= 512 and len(np.unique(slots)) > 200
    assert (rows["n_events"] == 0).sum() == 128 and rows["n_events"].max() == rows["visits"].max() == 2**32 - 1


def test_the_time_is_the_99th_percentile_of_the_best_attempt(monkeypatch):
    now = [0.0]
    durations = iter([9.0] * 10 + [0.001] * 38 + [0.080] * 2 + [0.002] * 40)

    class Clock:
        """The processor works for half of the time at most that goes by on the wall."""

        @staticmethod
        def perf_counter() -> float:
            return 2.0 * now[0]

        @staticmethod
        def process_time() -> float:
            return now[0]

    def run(*_):
        now[0] += next(durations)

    monkeypatch.setattr(gate, "time", Clock)
    monkeypatch.setattr(gate.Scorer, "run", run)
    model = artifact.load_prior()
    assert scoring_p99_ms(model, batches=40, attempts=2, enough_ms=50.0) == pytest.approx(2.0)
    durations = iter([9.0] * 10 + [0.003] * 40)
    assert scoring_p99_ms(model, batches=40, attempts=2, enough_ms=50.0) == pytest.approx(3.0)


def test_evidence_of_a_model():
    nobody = Judged(*np.empty((6, 0)))

    def report(hit_rate: float, finite: bool) -> Report:
        return Report({}, {"shop": CategoryCell(500, 2.0, hit_rate)}, finite, {})

    compared = Comparison(report(0.4, False), report(0.5, True)._replace(), good().paired, nobody, np.empty((0, 3), bool))
    found = examine(make_model(), compared, Limits(p99_ms=10**6))
    assert found.hit_rates == {"shop": (0.4, 0.5)} and found.paired is compared.paired and 0.0 < found.p99_ms < 10**6
    assert found.problems == ("window: something that the candidate says there is no number",)
    assert refusing(decide(found, LIMITS)) >= {"finite", "hit_rate"}
