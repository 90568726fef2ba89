"""The simulator keeps its word: the records are what the platform files read, and the ledger's probabilities are true.

Tolerances of the calibration are of binomial errors: from every person at most one event of each of some days that lie
nine apart, so that no label is counted twice.
"""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from models.config import FoldConfig
from models.errors import ConfigError, EventRefused
from models.events import REFUSAL_REASONS, to_columns
from models.fold import DUPLICATE, FOLDED, N_FEATURES, fold, fold_params
from models.state import empty_rows
from streams import simulator as sim
from streams.platforms import load_platforms
from streams.simulator import DAY_MS, GROCER, PLATFORMS, PURCHASE, Simulator, SimulatorConfig

GAP_MS = 1_800_000
FAULTY = SimulatorConfig(
    n_shoppers=400, seed=7, late_rate=0.03, out_of_order_rate=0.05, duplicate_rate=0.03, malformed_rate=0.03
)
N_RECORDS = 40_000
N_SHOPPERS, DAYS = 9000, 46


@pytest.fixture(scope="module")
def records():
    return list(itertools.islice(Simulator(FAULTY).stream(), N_RECORDS))


@pytest.fixture(scope="module")
def sample():
    """Events, users, truth (n, 3) and labels (n, 3) of N_SHOPPERS' DAYS."""
    return sim.matured_sample(SimulatorConfig(n_shoppers=N_SHOPPERS, seed=3), DAYS)


@pytest.fixture(scope="module")
def platforms():
    return {platform.name: platform for platform in load_platforms(None, PLATFORMS)}


def canonical(platforms, record, offset=0):
    return platforms[record.platform].canonicalise(
        record.value,
        topic=record.topic,
        partition=0,
        offset=offset,
        now_ms=record.arrives_ms,
        future_tolerance_ms=300_000,
    )


# --- the records ---


def test_the_same_configuration_makes_the_same_stream(records):
    again = list(itertools.islice(Simulator(FAULTY).stream(), N_RECORDS))
    assert again == records
    assert list(Simulator(FAULTY).identity_links()) == list(Simulator(FAULTY).identity_links())
    other = itertools.islice(Simulator(SimulatorConfig(n_shoppers=400, seed=8)).stream(), 1000)
    assert {r.value for r in other if r.expected == "accept"}.isdisjoint({r.value for r in records})


def test_what_happens_on_the_way_does_not_change_the_behaviour():
    plain = SimulatorConfig(
        n_shoppers=300, seed=5, late_rate=0.0, out_of_order_rate=0.0, duplicate_rate=0.0, malformed_rate=0.0, ledger=False
    )
    faulty = SimulatorConfig(n_shoppers=300, seed=5, late_rate=0.2, duplicate_rate=0.2, malformed_rate=0.2)
    until_ms = plain.start_ms + 5 * DAY_MS

    def happened(config):
        arrived = itertools.takewhile(lambda r: r.arrives_ms < until_ms + 3_600_000, Simulator(config).stream())
        return {(r.event_ref, r.value) for r in arrived if r.ts_ms < until_ms and r.expected == "accept"}

    assert len(happened(plain)) > 1000
    assert happened(plain) == happened(faulty)
    assert all(r.expected == "accept" and r.truth is None for r in itertools.islice(Simulator(plain).stream(), 1000))


def test_records_come_in_the_order_of_arrival_after_they_happened(records):
    arrives = np.array([r.arrives_ms for r in records])
    assert (np.diff(arrives) >= 0).all()
    assert all(FAULTY.start_ms <= r.ts_ms < r.arrives_ms for r in records)
    delay = np.array([r.arrives_ms - r.ts_ms for r in records if r.expected == "accept"])
    assert delay.max() < FoldConfig().lateness_s * 1000
    late, prompt = (delay >= sim.LATE_MS[0]).mean(), (delay <= sim.PROMPT_MS[1] + sim.MOST_LINES).mean()
    assert late == pytest.approx(FAULTY.late_rate, abs=0.005)
    assert 1 - late - prompt == pytest.approx(FAULTY.out_of_order_rate, abs=0.007)


def test_a_duplicate_is_a_second_copy_of_an_accepted_event(records):
    first = {r.event_ref: r for r in records if r.expected == "accept"}
    count = Counter(r.expected for r in records)
    assert len(first) == count["accept"]  # no id twice
    for r in records:
        if r.expected == "duplicate":
            original = first[r.event_ref]
            assert (r.value, r.key, r.topic) == (original.value, original.key, original.topic)
            assert r.arrives_ms > original.arrives_ms
    prompt = 1 - FAULTY.late_rate - FAULTY.out_of_order_rate
    assert count["duplicate"] / count["accept"] == pytest.approx(FAULTY.duplicate_rate * prompt, abs=0.005)
    assert count["refuse"] / count["accept"] == pytest.approx(FAULTY.malformed_rate, abs=0.005)


def test_the_platform_files_read_every_record_as_the_ledger_says(records, platforms):
    kinds, reasons, ids = set(), set(), set()
    for offset, record in enumerate(records):
        if record.expected == "refuse":
            with pytest.raises(EventRefused) as refused:
                canonical(platforms, record, offset)
            assert refused.value.reason == record.reason, record.value
            assert record.event_ref is None and record.truth is None
            reasons.add((record.platform, record.reason))
            continue
        event = canonical(platforms, record, offset)
        assert event.ts == record.ts_ms
        assert event.user.encode() == record.key
        if record.expected == "accept":
            assert event.event_id not in ids
            ids.add(event.event_id)
        if record.platform != "sim_grocer":
            assert event.event_id == record.event_ref
        kinds.add((record.platform, event.kind))
    funnel = {"impression", "view", "click", "favorite", "cart", "purchase"}
    assert kinds == {(p, k) for p in PLATFORMS[:GROCER] for k in funnel} | {
        ("sim_grocer", k) for k in ("purchase", "cancel")
    }
    assert {reason for _, reason in reasons} == set(REFUSAL_REASONS) - {"too_large", "not_canonical"}


def test_the_fold_drops_exactly_the_duplicates_of_the_ledger(records, platforms):
    person = {(platform, user): person for platform, user, person in Simulator(FAULTY).identity_links()}
    slots, users, events, expected = {}, [], [], []
    for record in records:
        if record.expected == "refuse":
            continue
        event = canonical(platforms, record)
        user = person.get((event.platform, event.user), event.user)
        users.append(slots.setdefault(user, len(slots)))
        events.append(event)
        expected.append(record.expected)
    n = len(events)
    features, dt_s, status = np.zeros((n, N_FEATURES), np.float32), np.zeros(n, np.float32), np.zeros(n, np.uint8)
    columns = to_columns(events, np.arange(n))
    fold(empty_rows(len(slots)), np.array(users), columns, fold_params(FoldConfig()), features, dt_s, status)
    assert (status == np.where(np.array(expected) == "duplicate", DUPLICATE, FOLDED)).all()


def test_some_persons_are_linked_and_no_id_is_on_two_platforms(records):
    simulator = Simulator(SimulatorConfig(n_shoppers=4000, seed=1, linked_share=0.6))
    accounts: dict[str, list] = {}
    for platform, _, person in simulator.identity_links():
        accounts.setdefault(person, []).append(platform)
    assert all(1 < len(platforms) == len(set(platforms)) for platforms in accounts.values())
    several = (sim.SPREAD[simulator.shoppers.profile] > 0).sum(1) > 1
    assert len(accounts) / several.sum() == pytest.approx(0.6, abs=0.04)
    keys = {platform: {r.key for r in records if r.platform == platform} for platform in PLATFORMS}
    assert all(keys[a].isdisjoint(keys[b]) for a, b in itertools.combinations(PLATFORMS, 2))
    assert not list(Simulator(SimulatorConfig(n_shoppers=100, linked_share=0.0)).identity_links())


@pytest.mark.parametrize(
    "wrong", [{"late_rate": 1.1}, {"malformed_rate": -0.1}, {"late_rate": 0.6, "out_of_order_rate": 0.6}, {"n_shoppers": 0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="simulator"):
        SimulatorConfig(**wrong)


# --- the behaviour ---


def test_sessions_are_those_that_a_gap_of_thirty_minutes_makes(sample):
    events, *_ = sample
    order = np.lexsort((events.ts, events.person))
    person, ts, session = events.person[order], events.ts[order], events.session[order]
    same_person, same_session = np.diff(person) == 0, np.diff(session) == 0
    gap = np.diff(ts)
    assert gap[same_person & same_session].max() <= GAP_MS
    assert gap[same_person & ~same_session].min() > GAP_MS
    new_moment = same_person & (np.diff(events.moment[order]) != 0)
    assert gap[new_moment].min() >= 1000  # two moments never share a second
    assert (gap[same_person & ~new_moment] == 0).all()


def test_density_is_as_stated(sample):
    events, *_ = sample
    assert 2.0 < len(events.ts) / N_SHOPPERS / DAYS < 3.0


def test_interests_drift(sample):
    """The categories of two days of a shopper agree less the further the days lie apart, and always more than those of
    two shoppers."""
    events, *_ = sample
    here = np.flatnonzero(events.platform != GROCER)
    day = (events.ts[here] - events.ts.min()) // DAY_MS
    category = events.item[here] // sim.ITEMS_A_CATEGORY
    mix = np.zeros((N_SHOPPERS, DAYS, sim.N_CATEGORIES), np.float32)
    np.add.at(mix, (events.person[here], day, category), 1.0)
    mix /= np.maximum(np.linalg.norm(mix, axis=2, keepdims=True), 1e-9)
    seen = mix.any(2)

    def agreement(a, b, both):
        return (a * b).sum(-1)[both].mean()

    near = np.mean([agreement(mix[:, d], mix[:, d + 1], seen[:, d] & seen[:, d + 1]) for d in range(DAYS - 1)])
    far = np.mean([agreement(mix[:, d], mix[:, d + 40], seen[:, d] & seen[:, d + 40]) for d in range(5)])
    strangers = np.mean([agreement(mix[:-1, d], mix[1:, d], seen[:-1, d] & seen[1:, d]) for d in range(DAYS)])
    assert near > far + 0.1
    assert far > strangers + 0.03


# --- the truth ---


def test_labels_from_the_definition(sample):
    events, users, _, _ = sample
    some = np.isin(users, np.unique(users)[:40])
    user, ts, purchase = users[some], events.ts[some], (events.kind == PURCHASE)[some]
    labels = sim.realised_labels(user, ts, purchase)
    for i in range(len(ts)):
        after = (user == user[i]) & (ts > ts[i])
        later = np.unique(ts[after])
        path = np.r_[ts[i], later]
        starts = later[np.diff(path) > GAP_MS]
        want = (
            len(later) > 0 and later[0] - ts[i] <= GAP_MS,
            bool((after & purchase & (ts <= ts[i] + DAY_MS)).any()),
            bool((starts <= ts[i] + 7 * DAY_MS).any()),
        )
        assert tuple(labels[i]) == want


def test_auc_counts_ties_half():
    score, label = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert sim.auc(score, label) == pytest.approx(3.5 / 4)
    assert np.isnan(sim.auc(score, np.ones(4, bool)))


def independent_events(events) -> np.ndarray:
    """Index of each person's first event of a day, of days nine apart: picked without a look at the future, and every
    label is out before the next is picked."""
    day = (events.ts - events.ts.min()) // DAY_MS
    picked = []
    for d in range(0, int(day.max()) + 1, 9):
        of_day = np.flatnonzero(day == d)
        picked.append(of_day[np.unique(events.person[of_day], return_index=True)[1]])
    return np.concatenate(picked)


@pytest.mark.parametrize("head", [0, 1, 2], ids=["click", "purchase", "return"])
def test_realised_labels_have_the_frequencies_of_the_truth(sample, head):
    events, _, truth, labels = sample
    picked = independent_events(events)
    q, y, platform = truth[picked, head], labels[picked, head], events.platform[picked]
    assert len(q) > 8000
    edges = np.quantile(q, np.linspace(0, 1, 7)[1:-1])
    cells = [(f"platform {p}", platform == p) for p in range(3)]
    cells += [(f"bin {b}", np.digitize(q, edges) == b) for b in range(6)]
    for name, here in cells:
        error = np.sqrt((q[here] * (1 - q[here])).sum())
        assert abs((y[here] - q[here]).sum()) < 4 * error + 1, (name, y[here].mean(), q[here].mean())


def chain(what, k, seen, a, b):
    """The model as the module's docstring states it, as one matrix over all states and "found", row to column; slow and
    plain: one tick a step, silence counted tick by tick."""
    in_session = [("in", p, e, m) for p in range(3) for e in range(3) for m in range(3)]
    silent = [("silent", left, e, m) for left in range(1, sim.SILENT_TICKS + 1) for e in range(3) for m in range(3)]
    idle = [("idle", 0, e, m) for e in range(3) for m in range(3)]
    number = {state: i for i, state in enumerate([*in_session, *silent, *idle, "found"])}
    matrix = np.zeros((len(number), len(number)))
    matrix[number["found"], number["found"]] = 1.0

    def add(start, end, chance):
        matrix[number[start], number[end]] += chance

    def add_moment(start, chance, p, e, m):
        """A moment on platform p from (e, m)."""
        shop = p != GROCER
        up, further, down = sim.NEED_STEPS[b]
        moves = {0: (1 - up, up, 0), 1: (down, 1 - down - further, further), 2: (0, down, 1 - down)}[m]
        for m_now, moved in enumerate(moves if shop else np.eye(3)[m]):
            buys = sim.BUY[b][m_now] if shop else sim.BUY_AT_GROCER
            add(start, ("in", p, e, m_now), chance * moved * (1 - buys))
            if what == "purchase" and seen in (p, sim.ALL):
                add(start, "found", chance * moved * buys)
                continue
            for m_after, left in enumerate(sim.AFTER_PURCHASE[m_now] if shop else np.eye(3)[m_now]):
                bought = chance * moved * buys * left
                add(start, ("in", p, min(e + 1, 2), m_after), bought * sim.UPLIFT[p])
                add(start, ("in", p, e, m_after), bought * (1 - sim.UPLIFT[p]))

    for state in in_session:
        _, p, e, m = state
        logit = sim.STAYS_PLATFORM[p] + sim.STAYS_NEED[m] + sim.STAYS_ENGAGED[e] + sim.STAYS_BUYER[b]
        stays = 1 / (1 + np.exp(-logit))
        add_moment(state, stays, p, e, m)
        add(state, ("silent", sim.SILENT_TICKS - 1, max(e - 1, 0), m), (1 - stays) * sim.CLOYS[a])
        add(state, ("silent", sim.SILENT_TICKS - 1, e, m), (1 - stays) * (1 - sim.CLOYS[a]))
    for state in silent:
        _, left, e, m = state
        add(state, ("silent", left - 1, e, m) if left > 1 else ("idle", 0, e, m), 1.0)
    for state in idle:
        _, _, e, m = state
        starts = sim.SESSIONS_A_DAY[a] * sim.ENGAGED[e] * sim.NEEDED[m] / 720
        for p, share in enumerate(sim.PROFILES[k][1]):
            if what == "return" and seen in (p, sim.ALL):
                add(state, "found", starts * share)
            else:
                add_moment(state, starts * share, p, e, m)
        moves = {(to, m): sim.ENGAGEMENT_A_DAY[e][to] / 720 for to in range(3) if to != e}
        falls = (0.0, *sim.NEED_PASSES_A_DAY)
        moves |= {(e, 1): sim.NEED_ARISES_A_DAY[b] / 720} if m == 0 else {(e, m - 1): falls[m] / 720}
        for (e_now, m_now), chance in moves.items():
            add(state, ("idle", 0, e_now, m_now), (1 - starts) * chance)
        add(state, state, (1 - starts) * (1 - sum(moves.values())))
    assert np.allclose(matrix.sum(1), 1.0)
    return matrix


@pytest.mark.parametrize("what", ["purchase", "return"])
@pytest.mark.parametrize(
    ("k", "seen", "a", "b"), [(0, sim.BAZAAR, 0, 1), (3, sim.METRO, 1, 2), (5, GROCER, 2, 0), (6, sim.ALL, 3, 1)]
)
def test_the_recursion_equals_the_whole_chain(what, k, seen, a, b):
    """A step of the chain leaves the state after tick t in that after t + 1, so its n-th power is S_n."""
    ticks = {"purchase": 24 * 30, "return": 7 * 24 * 30}[what]
    assert (ticks, DAY_MS) == ({"purchase": sim.PURCHASE_TICKS, "return": sim.RETURN_TICKS}[what], 86_400_000)
    step = chain(what, k, seen, a, b)
    shorter = np.linalg.matrix_power(step, ticks - 1)
    survival = sim.survival(what, ticks)[:, sim.VIEWPOINT[k, seen], a, b].reshape(2, 27)
    assert np.allclose(survival, 1.0 - np.stack([shorter, shorter @ step])[:, :27, -1], atol=1e-9)
    assert 0.01 < survival.min() < survival.max() < 0.999


def test_linked_and_unlinked_users_are_each_calibrated(sample):
    events, users, truth, labels = sample
    picked = independent_events(events)
    linked = users[picked] < N_SHOPPERS
    several = (sim.SPREAD > 0).sum(1)[Simulator(SimulatorConfig(n_shoppers=N_SHOPPERS, seed=3)).shoppers.profile] > 1
    for here in (linked, ~linked & several[events.person[picked]]):
        for head in (1, 2):
            q, y = truth[picked[here], head], labels[picked[here], head]
            assert abs((y - q).sum()) < 4 * np.sqrt((q * (1 - q)).sum())


def test_a_person_is_seen_to_do_no_less_than_an_account():
    for what, ticks in (("purchase", sim.PURCHASE_TICKS), ("return", sim.RETURN_TICKS)):
        _, survival = sim.survival(what, ticks)
        for k, accounts in enumerate(sim.VIEWPOINT):
            for p in range(3):
                if accounts[p] >= 0:
                    assert (survival[accounts[sim.ALL]] <= survival[accounts[p]] + 1e-12).all(), (what, k, p)


def test_base_rates_and_the_best_auc_are_in_the_stated_bounds(sample):
    events, _, truth, labels = sample
    bounds = {0: (0.25, 0.65), 1: (0.14, 0.42), 2: (0.14, 0.80)}
    for p in range(3):
        here = events.platform == p
        for head, (least, most) in bounds.items():
            if head == 0 and not sim.HAS_CLICK[p]:
                continue
            q, y = truth[here, head], labels[here, head]
            assert least < y.mean() < most, (p, head)
            assert 0.68 < sim.auc(q, y) <= 0.85, (p, head)


def test_the_stream_carries_the_truth_of_its_events(records):
    simulator = Simulator(FAULTY)
    events, _ = next(simulator.blocks())
    truth = simulator.truth(events)
    moment = {r.event_ref: r.truth for r in records if r.expected == "accept" and r.platform == "sim_grocer"}
    compared = 0
    for i in np.flatnonzero(events.platform == GROCER).tolist():
        letter = "C" if events.kind[i] == sim.CANCEL else "G"
        told = moment[f"{letter}{100_000 + events.moment[i]}/{events.line[i]}"]
        assert (told.click, told.purchase, told.return_) == (None, truth[i, 1], truth[i, 2])
        compared += 1
    assert compared > 100
    shops = [r.truth for r in records if r.expected == "accept" and r.platform != "sim_grocer"]
    assert all(0 < t.click < 1 and 0 < t.purchase < 1 and 0 < t.return_ < 1 for t in shops)


def test_bayes_prints_every_head(capsys):
    sim.main(["--bayes", "--shoppers", "300", "--days", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split()[:2]) for line in lines[1:]] == [
        (p, h) for p in PLATFORMS for h in ("click", "purchase", "return") if (p, h) != ("sim_grocer", "click")
    ]


# --- the cost ---


def test_memory_stays_bounded():
    stream = Simulator(SimulatorConfig(n_shoppers=400, seed=2)).stream()
    seen = []
    next(stream)
    tracemalloc.start()
    try:
        for _ in range(3):
            last = next(itertools.islice(stream, 20_000, None))
            gc.collect()
            seen.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert last.ts_ms > SimulatorConfig().start_ms + 50 * DAY_MS
    assert seen[2] < seen[0] + 1_000_000


def test_a_relaunch_turns_the_hints_round_from_its_moment_on_and_the_truth_still_holds():
    day = 9.25
    events, _, truth, labels = sim.matured_sample(SimulatorConfig(n_shoppers=1500, seed=5, relaunch_day=day), 18)
    after = events.ts >= SimulatorConfig().start_ms + day * DAY_MS
    shop, (engaged, need) = events.platform != GROCER, np.divmod(events.e_m, 3)
    carts, shown = shop & (events.kind == sim.CART), shop & (events.kind == sim.IMPRESSION)
    acts = shop & np.isin(events.kind, (sim.VIEW, sim.CLICK))
    ready = [(need[carts & when] == sim.READY).mean() for when in (~after, after)]
    assert ready[0] > 0.5 > ready[1] + 0.3  # those who browse fill baskets now
    beside = [
        [(shown & w & (engaged == e)).sum() / (acts & w & (engaged == e)).sum() for e in (0, 2)] for w in (~after, after)
    ]
    assert beside[0][1] > 3 * beside[0][0] and beside[1][0] > 3 * beside[1][1]
    for head in (0, 1):
        for when in (~after, after):
            of = shop & when
            assert truth[of, head].mean() == pytest.approx(labels[of, head].mean(), abs=0.025)
            assert sim.auc(truth[of, head], labels[of, head]) > 0.68


@pytest.mark.parametrize("day", [-1.0, float("nan"), float("inf")])
def test_a_relaunch_at_no_day_is_refused(day):
    with pytest.raises(ConfigError):
        SimulatorConfig(relaunch_day=day)
