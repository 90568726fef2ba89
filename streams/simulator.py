"""Shoppers who never existed, on three platforms that do not agree about anything: the default data of `demo`.

A seeded, endless, lazily generated stream of the platforms' own records (`deploy/platforms/sim_*.toml`), in the order of
their arrival, late, out of order, twice or malformed at stated rates; and beside it a ledger of what no event says: the
true probability of every label, given everything that the simulator knows at that moment.

The model of behaviour
----------------------
A shopper is one person with accounts on one to three platforms, one session at a time. Behaviour runs on *operational*
time: ticks of two minutes, 720 a day, at most one moment in a tick: at a shop an act and the impressions beside it, at the
grocer an invoice and its lines, all at one instant. It is a Markov chain of ticks, with all that it depends on:

    classes      a  activity, b  buyer, k  the accounts and how the sessions spread over them (π_k): fixed for life
    engagement   e ∈ {lapsing, steady, keen}    need  m ∈ {browse, consider, ready}: the latent state, it evolves

    idle tick    a session starts with   h = SESSIONS_A_DAY[a] · ENGAGED[e] · NEEDED[m] / 720,   on platform p ~ π_k
                 otherwise               (e, m) → (e', m') ~ T_b      (a keen one cools, a need arises or passes)
    moment       m' ~ M_bp[m, ·]         it is a purchase with probability BUY_bp[m'],
                 and if it was           m'' ~ AFTER_p[m', ·],  e' = e + 1 (at most keen) with probability UPLIFT_p
                 what is shown reveals a part: the kind of act depends on m', the number of impressions or lines on e'
    afterwards   with probability        c = σ(α_p + β_m + γ_e + ζ_b)  another moment in the next tick,
                 otherwise the session ends: e' = e − 1 (at least lapsing) with probability δ_a, 28 silent ticks, idle.

Ticks become clock time by one periodic, increasing map of the day onto itself (busy evenings, empty nights), shifted by
up to four hours a shopper; a moment lies at a uniform place `j` in its tick. Because the map has the period of a day,
a window of 24 h or 7 d on the clock is exactly one of 720 or 5,040 ticks. Because its speed lies within
[MIN_SPEED, MAX_SPEED], two moments of a session are never over 30 min apart and two sessions never within.

Interests do not touch the labels. A shopper has six favourite categories of falling weight; each is replaced in time, one
by one (mean 30 d) or all at once (every 75 d on average). A session has a category in focus, its moments mostly stay there.

The truth
---------
For the event of a moment at tick t and place j, after which the state is (e, m) on platform p:

    click     P(another moment in the same session)                                            = c
    purchase  P(a purchase in (t, t + 24 h])  = 1 − [(1 − j) S_{N−1} + j S_N],  N = 720
    return    P(a session starts in (t, t + 7 d]), the same with N = 5,040

where S_n is the chance of n ticks without what is looked for, by recursion over n:

    S_n = c · E[S_{n−1} after a moment that does not count] + (1 − c) · E[U_{n−28}]           in a session
    U_n = h · E[S_{n−1} after a first moment that does not count] + (1 − h) · E_T[U_{n−1}]     idle;  U_n = S_n = 1 for n ≤ 0

(`j`: the window's last tick counts up to the same place, and places are uniform and independent.) Everything is summed,
nothing is sampled or approximated, but that the grocer's tills cut the time to whole seconds.

What the truth conditions on: the classes, the state just after the moment, the platform, `j`; not on the future, not on
interests. What it counts: the events of the user as ingest can see it, that is of the *person* on all platforms where
the person's accounts are linked, of the *account* alone where they are not (a purchase of the same person on an account
that nobody linked is not seen, and the truth takes into account that it is not). It takes links to be known beforehand,
and labels to be those of the accepted events by their true time. No observer can do better than this ranking, and none
who sees only events can quite reach it.

What this does not know: Kafka, a wall clock, canonical events, pseudonyms, models.
One hour of the year is told wrongly, as tills do: the one that autumn repeats, in the grocer's local time.

    python -m streams.simulator --bayes      base rates, mean truth and the best AUC that there can be
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import numpy as np

from models.errors import ConfigError

PLATFORMS = ("sim_bazaar", "sim_metro", "sim_grocer")
BAZAAR, METRO, GROCER = range(3)
ALL = 3
"""In place of a platform: the events of all of them count."""

TICK_MS = 120_000
TICKS_A_DAY = 720
DAY_MS = TICK_MS * TICKS_A_DAY
SILENT_TICKS = 28
SPACING_MS = 2_000
"""Operational; two moments are at least this far apart, so that they never share a second of the clock."""
PURCHASE_TICKS, RETURN_TICKS = TICKS_A_DAY, 7 * TICKS_A_DAY
WARM_UP_TICKS = 3 * TICKS_A_DAY

_HOURLY = np.array([3, 2, 2, 2, 2, 3, 5, 8, 10, 11, 12, 13, 14, 13, 12, 12, 13, 15, 17, 19, 20, 19, 14, 7], float)
SPEED = np.clip(_HOURLY / _HOURLY.mean(), 0.18, 1.7)
SPEED /= SPEED.mean()
MIN_SPEED, MAX_SPEED = SPEED.min(), SPEED.max()
"""Operational time that passes in a unit of clock time."""

# ----------------------------------------------------------------------------------------------- the numbers of the model
LAPSING, STEADY, KEEN = range(3)
BROWSE, CONSIDER, READY = range(3)

SESSIONS_A_DAY = np.array([0.25, 0.5, 0.9, 1.2])  # by a
ACTIVITY_SHARE = np.array([0.25, 0.3, 0.3, 0.15])
BUYER_SHARE = np.array([0.35, 0.4, 0.25])  # b: rarely, now and then, often
ENGAGED = np.array([0.04, 0.7, 1.7])  # by e
NEEDED = np.array([0.8, 1.3, 2.2])  # by m
ENGAGEMENT_A_DAY = np.array([[0, 1 / 40, 1 / 8], [1 / 3, 0, 1 / 30], [0, 1 / 3, 0]])  # the lapsed mostly come back keen
CLOYS = np.array([0.95, 0.85, 0.55, 0.12])  # δ by a: the chance that a session leaves a shopper one step less engaged
NEED_ARISES_A_DAY = np.array([0.08, 0.2, 0.4])  # by b
NEED_PASSES_A_DAY = (0.7, 1.5)  # consider → browse, ready → consider

NEED_STEPS = np.array(  # by b: from browse up, from consider up, down
    [[0.08, 0.10, 0.25], [0.14, 0.18, 0.18], [0.20, 0.26, 0.14]]
)
BUY = np.array([[0.0, 0.01, 0.17], [0.0, 0.02, 0.24], [0.01, 0.03, 0.31]])  # by b, m'; shops
BUY_AT_GROCER = 0.95  # the rest are cancellations
AFTER_PURCHASE = np.array([[1.0, 0.0, 0.0], [0.7, 0.25, 0.05], [0.55, 0.25, 0.20]])  # from m'; shops
UPLIFT = (0.25, 0.25, 0.03)  # by p

STAYS_PLATFORM = np.array([0.6, 0.5, -2.4])  # α by p
STAYS_NEED = np.array([-0.85, 0.55, 1.25])  # β by m
STAYS_BUYER = np.array([-0.4, 0.0, 0.4])  # ζ by b
STAYS_ENGAGED = np.array([-0.6, -0.1, 0.4])  # γ by e

PROFILES = (  # the accounts of a shopper: share of shoppers, share of the sessions by platform
    (0.20, (1.0, 0.0, 0.0)),
    (0.14, (0.0, 1.0, 0.0)),
    (0.12, (0.0, 0.0, 1.0)),
    (0.18, (0.55, 0.45, 0.0)),
    (0.14, (0.6, 0.0, 0.4)),
    (0.08, (0.0, 0.6, 0.4)),
    (0.14, (0.4, 0.3, 0.3)),
)
PROFILE_SHARE = np.array([share for share, _ in PROFILES])
SPREAD = np.array([spread for _, spread in PROFILES])  # (profile, platform): π

VIEW, CLICK, FAVORITE, CART, PURCHASE, CANCEL, IMPRESSION = range(7)
SHOWN = np.array([[0.90, 0.09, 0.01, 0.0], [0.25, 0.50, 0.20, 0.05], [0.15, 0.20, 0.10, 0.55]])  # by m', if no purchase
NEW_ITEM = np.array([0.75, 0.25, 0.1, 0.1, 0.05, 0.0])  # by kind: the item is another one than before
STAYS_IN_CATEGORY = np.array([0.65, 0.85, 0.95])  # by m'
FAVOURITES = np.array([0.38, 0.24, 0.16, 0.10, 0.07, 0.05])
FAVOURITE_LASTS_DAYS, TASTE_LASTS_DAYS = 30.0, 75.0
EXTRA_LINES = np.array([1.0, 4.0, 10.0])  # by e, of an invoice, beyond the first
MOST_LINES = 14
SHOWN_BESIDE = np.array([0.6, 2.1, 5.2])  # by e, impressions on the page of a view or a click, at the same instant
MOST_SHOWN = 8
RELAUNCHED_SHOWN, RELAUNCHED_SHOWN_BESIDE = SHOWN[::-1], SHOWN_BESIDE[::-1]  # once the shops' pages are new
SHOWN_ALIKE = 0.7  # of those: of the same category, the others of any favourite one

N_A, N_B, N_EM = len(SESSIONS_A_DAY), len(BUYER_SHARE), 9
ITEMS_A_CATEGORY = 40


@cache
def stays() -> np.ndarray:
    """c: (b, p, e·3+m), the chance of another moment in the session."""
    logit = STAYS_BUYER[:, None, None, None] + STAYS_PLATFORM[:, None, None] + STAYS_ENGAGED[:, None] + STAYS_NEED
    return (1.0 / (1.0 + np.exp(-logit))).reshape(N_B, 3, N_EM)


@cache
def starts() -> np.ndarray:
    """h: (a, e·3+m), the chance that an idle tick starts a session."""
    per_day = SESSIONS_A_DAY[:, None, None] * ENGAGED[:, None] * NEEDED
    return (per_day / TICKS_A_DAY).reshape(N_A, N_EM)


@cache
def drifts() -> np.ndarray:
    """T: (b, e·3+m, e·3+m), where an idle tick without a session leads."""
    need_B33 = np.zeros((N_B, 3, 3))
    need_B33[:, BROWSE, CONSIDER] = NEED_ARISES_A_DAY
    need_B33[:, CONSIDER, BROWSE], need_B33[:, READY, CONSIDER] = NEED_PASSES_A_DAY
    out = np.array([np.kron(ENGAGEMENT_A_DAY, np.eye(3)) + np.kron(np.eye(3), need_33) for need_33 in need_B33])
    out /= TICKS_A_DAY
    out[:, range(N_EM), range(N_EM)] = 1.0 - out.sum(2)
    return out


@cache
def need_moves() -> np.ndarray:
    """M: (b, p, m, m'), how a moment changes the need. At the grocer it does not."""
    out = np.zeros((N_B, 3, 3, 3))
    for b, (up, further, down) in enumerate(NEED_STEPS):
        out[b, :GROCER] = [[1 - up, up, 0], [down, 1 - down - further, further], [0, down, 1 - down]]
    out[:, GROCER] = np.eye(3)
    return out


@cache
def buys() -> np.ndarray:
    """(b, p, m'): the chance that a moment is a purchase."""
    out = np.repeat(BUY[:, None], 3, axis=1)
    out[:, GROCER] = BUY_AT_GROCER
    return out


@cache
def after_purchase() -> np.ndarray:
    """(p, m', m''): the need that a purchase leaves."""
    return np.stack([AFTER_PURCHASE, AFTER_PURCHASE, np.eye(3)])


# ------------------------------------------------------------------------------------------------------------- the truth
VIEWPOINTS = tuple(  # whose events count: (profile, a platform of it or ALL)
    (k, seen) for k, (_, spread) in enumerate(PROFILES) for seen in (*np.flatnonzero(spread).tolist(), ALL)
)
VIEWPOINT = np.full((len(PROFILES), 4), -1)
for _v, (_k, _seen) in enumerate(VIEWPOINTS):
    VIEWPOINT[_k, _seen] = _v


def _moment_operators() -> tuple[np.ndarray, np.ndarray]:
    """What a moment does to (e, m): two matrices (b, p, from, to), of moments that are no purchase and that are one."""
    plain, bought = np.zeros((2, N_B, 3, 3, 3, 3, 3))  # b p, e m, e' m'
    up_P33 = np.stack([np.array([[1 - u, u, 0], [0, 1 - u, u], [0, 0, 1]]) for u in UPLIFT])
    moved, buy = need_moves(), buys()
    for e in range(3):
        plain[:, :, e, :, e, :] = moved * (1.0 - buy[:, :, None])
        paid_BPmm = np.einsum("bpmn,bpn,pno->bpmo", moved, buy, after_purchase())
        bought[:, :, e] = np.einsum("bpmo,pf->bpmfo", paid_BPmm, up_P33[:, e])
    return plain.reshape(N_B, 3, N_EM, N_EM), bought.reshape(N_B, 3, N_EM, N_EM)


def _after_session(u: np.ndarray) -> np.ndarray:
    """U (…, e·3+m, a) → its mean over what a session's end does to e."""
    lower = np.concatenate([u[..., :3, :], u[..., :6, :]], axis=-2)
    return u + CLOYS * (lower - u)


@cache
def survival(what: Literal["purchase", "return"], ticks: int) -> np.ndarray:
    """S at n = ticks − 1 and n = ticks: (2, viewpoint, a, b, p, e·3+m), the chance of n ticks without `what`."""
    plain, bought = _moment_operators()
    V = len(VIEWPOINTS)
    spread_VP = SPREAD[[k for k, _ in VIEWPOINTS]]
    counts_VP = np.array([[seen in (ALL, p) for p in range(3)] for _, seen in VIEWPOINTS])
    if what == "purchase":  # a moment on a platform that counts must not be a purchase
        moment_VBP = plain + bought * ~counts_VP[:, None, :, None, None]
        spread_first_VP = spread_VP
    else:  # a session on a platform that counts must not start
        moment_VBP = np.broadcast_to(plain + bought, (V, *plain.shape))
        spread_first_VP = spread_VP * ~counts_VP
    moment_VBP = np.ascontiguousarray(moment_VBP)  # (V, B, P, from, to)
    c = stays()[:, :, :, None]  # (B, P, EM, 1)
    h = starts().T  # (EM, A)
    mixed = spread_first_VP[:, None, :, None, None]
    drift_B = drifts()
    s = np.ones((V, N_B, 3, N_EM, N_A))
    u = np.ones((V, N_B, N_EM, N_A))
    idle = [u] * (SILENT_TICKS + 1)  # U_{n−28} … U_n; 1 while n ≤ 0
    before = s
    for _ in range(ticks):
        after_moment = moment_VBP @ s
        first = (mixed * after_moment).sum(2)
        u = h * first + (1.0 - h) * (drift_B @ idle[-1])
        idle.append(u)
        del idle[0]
        before, s = s, c * after_moment + (1.0 - c) * _after_session(idle[0])[:, :, None]
    return np.stack([before, s]).transpose(0, 1, 5, 2, 3, 4)


def _cdf(chances: np.ndarray) -> np.ndarray:
    """Cumulated chances along the last axis, scaled to end at 1."""
    cumulated = np.cumsum(chances, axis=-1)
    return cumulated / cumulated[..., -1:]


# ------------------------------------------------------------------------------------------------------------- the wares
WARES = """
electronics > audio: headphones, speakers, microphones | dairy: milk, cheese, yoghurt
electronics > phones: smartphones, chargers, cases | bakery: bread, rolls, cakes
electronics > computers: laptops, keyboards, monitors | fruit: apples, bananas, berries
home > kitchen: kettles, knives, pans | vegetables: tomatoes, carrots, salad
home > bedroom: pillows, blankets, lamps | meat: beef, chicken, sausages
home > garden: planters, hoses, grills | fish: salmon, tuna, shrimps
fashion > shoes: sneakers, boots, sandals | frozen: pizza, peas, ice cream
fashion > outerwear: jackets, coats, scarves | drinks: water, juice, cola
fashion > accessories: watches, belts, bags | coffee: beans, capsules, filters
sports > cycling: helmets, lights, locks | tea: green tea, black tea, herbal tea
sports > running: shorts, bottles, socks | pasta: spaghetti, penne, lasagne
sports > camping: tents, stoves, backpacks | grains: rice, couscous, quinoa
beauty > skin: creams, serums, sunscreens | snacks: crisps, nuts, chocolate
beauty > hair: shampoos, brushes, dryers | breakfast: muesli, honey, jam
toys > games: puzzles, board games, cards | spices: salt, pepper, paprika
toys > outdoor: kites, balls, scooters | baking: flour, sugar, yeast
books > fiction: novels, comics, poetry | household: detergent, kitchen paper, bin bags
books > knowledge: cookbooks, atlases, biographies | care: soap, toothpaste, razors
pets > dogs: leashes, dog beds, treats | baby: nappies, wipes, porridge
pets > cats: scratchers, litter, cat toys | pet food: dog food, cat food, bird seed
"""
"""Sixty categories in twenty groups, as the shops know them | as the grocer does: a taste for the one is a taste for the
other, so that what is learnt of a linked person on one platform helps on the next."""
BRANDS = ("Sonata", "Arvo", "Nordhus", "Kestrel", "Pico", "Lumen", "Halden", "Orbis", "Tessel", "Vanta", "Brisa", "Quill")
QUALITIES = ("classic", "compact", "light", "organic", "premium", "basic", "soft", "large", "small", "new", "daily", "royal")


def _wares() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(path of groups, name) of every category: the shops', the grocer's."""
    both: tuple[list, list] = ([], [])
    for row in WARES.strip().splitlines():
        for names, half in zip(both, row.split(" | "), strict=True):
            group, _, leaves = half.partition(": ")
            names += [(group, leaf) for leaf in leaves.split(", ")]
    return both


N_CATEGORIES = len(_wares()[0])
N_ITEMS = N_CATEGORIES * ITEMS_A_CATEGORY
_POPULAR_CDF = _cdf(1.0 / (3.0 + np.arange(N_CATEGORIES) * 7 % N_CATEGORIES))[:-1]


@cache
def catalogue() -> tuple[list[str], list[str], list[str]]:
    """Every item as each platform writes it: a piece of JSON, by item. Some lack a brand, a name or a category."""
    rng = np.random.default_rng(20)
    shop, grocer = _wares()
    level = np.repeat(rng.lognormal(3.2, 0.8, N_CATEGORIES), ITEMS_A_CATEGORY)
    price = np.round(level * rng.lognormal(0.0, 0.5, N_ITEMS), 2)
    group = rng.permutation(9000)[:N_CATEGORIES] + 1000
    sku = rng.permutation(90_000)[:N_ITEMS] + 10_000
    lacks = rng.random((N_ITEMS, 2)) < (0.08, 0.03)
    pieces: tuple[list[str], list[str], list[str]] = ([], [], [])
    for item in range(N_ITEMS):
        category, which = divmod(item, ITEMS_A_CATEGORY)
        brand, quality = (category + which) % len(BRANDS), QUALITIES[which // 4 % len(QUALITIES)]
        (path, name), (department, food) = shop[category], grocer[category]
        no_brand, no_category = lacks[item].tolist()
        own = "" if no_brand else f',"brand":"{BRANDS[brand]}"'
        words = "null" if no_category else f'"{path} > {name}"'
        pieces[BAZAAR].append(
            f'"sku":"b{sku[item]}","title":"{BRANDS[brand]} {quality} {name}","category":{words}{own}'
            f',"unit_price":{price[item]},"currency":"USD"'
        )
        maker, code = ("null" if no_brand else f'"m{brand + 10}"'), ("null" if no_category else f'"c{group[category]}"')
        pieces[METRO].append(
            f'"object":{{"sku":"p{sku[item]}","group":{code},"maker":{maker},"name":"{quality.title()} {name}"'
            f',"price":{{"hundredths":{round(price[item] * 1050)},"currency":"SEK"}}}}'
        )
        where = "" if no_category else f',"Department":"{department} > {food}"'
        pieces[GROCER].append(
            f'"StockCode":"{sku[item]}","Description":"{food.upper()} {quality.upper()} {which + 1}"{where}'
            f',"UnitPrice":{max(0.19, price[item] / 10):.2f}'
        )
    return pieces


# ------------------------------------------------------------------------------------------------------------ the stream
MOST_SHOPPERS = 9_000_000
"""So that the numbers of the grocer's customers end before those of the bazaar's users begin."""


class SimulatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What can be set. Rates are shares of the accepted events; the behaviour does not depend on them."""

    n_shoppers: int = 3000
    """Persons. Most have accounts on several platforms. They make about 2.3 events a day each."""
    seed: int = 0
    start_ms: int = 1_704_067_200_000
    """ms since the epoch; no event is earlier."""
    linked_share: float = 0.6
    """Of the shoppers with several accounts: those whose accounts `identity_links` knows to be one person's."""
    late_rate: float = 0.01
    """Arrives LATE_MS after it happened."""
    out_of_order_rate: float = 0.03
    """Arrives OUT_OF_ORDER_MS after it happened; others overtake it."""
    duplicate_rate: float = 0.005
    """Sent twice, the same bytes, within DUPLICATE_MS."""
    malformed_rate: float = 0.002
    """Additional records that must be refused: damaged copies of events, never the only copy."""
    relaunch_day: float | None = None
    """Days (UTC) after the start at which both shops' pages are new, all at once: what a shopper does and is shown there
    hints at the opposite need and engagement. Behaviour, labels and truth stay what they were. None: never."""
    ledger: bool = True
    """Keep the truth. Without it the first event comes half a second sooner and each later one a little."""

    def __post_init__(self) -> None:
        """Raises `ConfigError`."""
        shares = (self.linked_share, self.late_rate, self.out_of_order_rate, self.duplicate_rate, self.malformed_rate)
        if not all(0.0 <= share <= 1.0 for share in shares) or self.late_rate + self.out_of_order_rate > 1.0:
            raise ConfigError("simulator: shares and rates lie in [0, 1], late_rate + out_of_order_rate too")
        if self.relaunch_day is not None and not 0.0 <= self.relaunch_day < float("inf"):
            raise ConfigError("simulator: relaunch_day is a finite number of days, at least 0")
        if not 1 <= self.n_shoppers <= MOST_SHOPPERS or self.seed < 0 or self.start_ms < 0:
            raise ConfigError(f"simulator: needs 1 … {MOST_SHOPPERS} shoppers, a seed and a start of at least 0")


PROMPT_MS = (5, 300)
OUT_OF_ORDER_MS = (1_000, 90_000)
LATE_MS = (150_000, 3_000_000)
"""Within the fold's default lateness of an hour."""
DUPLICATE_MS = (20, 600)
"""So soon that the original is still in the row's window of ids."""


class Truth(msgspec.Struct, frozen=True, gc=False):
    """P(label = 1 | everything the simulator knows just after the event). `click` is None where the platform cannot
    have it: a till sees no clicks."""

    click: float | None
    purchase: float
    return_: float


class Emitted(msgspec.Struct, frozen=True, gc=False):
    """One record as it reaches its topic, and what the ledger knows of it."""

    topic: str
    key: bytes
    value: bytes
    ts_ms: int
    """Event time, ms since the epoch (of the event before it was damaged, for a malformed one)."""
    arrives_ms: int
    """When it reaches the topic; the stream ascends in it."""
    platform: str
    event_ref: str | None
    """The event's id, at the grocer invoice/line; a duplicate has its original's. None for malformed ones."""
    expected: Literal["accept", "duplicate", "refuse"]
    truth: Truth | None = None
    """Of the accepted, with a ledger."""
    reason: str | None = None
    """Of the refused: the code of `models.events.REFUSAL_REASONS`."""


class Events(NamedTuple):
    """n events of a block as columns, ascending in `ts`, before anything happened to them on the way."""

    ts: np.ndarray  # int64 ms
    person: np.ndarray
    platform: np.ndarray  # index into PLATFORMS
    kind: np.ndarray  # VIEW … CANCEL
    item: np.ndarray  # category · ITEMS_A_CATEGORY + which
    quantity: np.ndarray
    session: np.ndarray  # number, counted over all sessions
    moment: np.ndarray  # number, counted over all moments: an invoice
    line: np.ndarray  # in the invoice, from 1
    e_m: np.ndarray  # e·3+m just after
    place: np.ndarray  # j


def clock_ms(ticks: np.ndarray) -> np.ndarray:
    """Operational time (fractional ticks since any midnight, UTC) → ms of the clock since the same midnight."""
    day, rest = np.divmod(ticks, TICKS_A_DAY)
    passed = np.concatenate([[0.0], np.cumsum(SPEED)]) / 24.0 * TICKS_A_DAY
    return day * DAY_MS + np.interp(rest, passed, np.arange(25) * 3_600_000.0)


def operational_ticks(ms: np.ndarray) -> np.ndarray:
    """ms of the clock since midnight, UTC, at most a day → operational ticks (fractional) since the same midnight."""
    passed = np.concatenate([[0.0], np.cumsum(SPEED)]) / 24.0 * TICKS_A_DAY
    return np.interp(ms, np.arange(25) * 3_600_000.0, passed)


class Shoppers:
    """The persons, their latent state and their behaviour: all random but what happens to records on their way."""

    def __init__(self, n: int, seed: int, relaunch_tick: float = float("inf")) -> None:
        """`relaunch_tick`: operational, of the clock's midnight; see `SimulatorConfig.relaunch_day`."""
        self._relaunch_tick = relaunch_tick
        rng = self._rng = np.random.default_rng([seed, 1])
        self.n = n
        self.activity = rng.choice(N_A, n, p=ACTIVITY_SHARE)
        self.buyer = rng.choice(N_B, n, p=BUYER_SHARE)
        self.profile = rng.choice(len(PROFILES), n, p=PROFILE_SHARE)
        self.phase_ticks = rng.uniform(0.0, 4.0 / 24.0 * TICKS_A_DAY, n)
        self._e_m = rng.choice(3, n, p=(0.69, 0.2, 0.11)) * 3 + rng.choice(3, n, p=(0.79, 0.2, 0.01))
        self._tick = np.full(n, -WARM_UP_TICKS)  # in a session: of its last moment; idle: the first undecided tick
        self._platform = np.full(n, -1)  # of the session; −1 idle
        self._session = np.zeros(n, np.int64)
        self._sessions = self._moments = 0
        self._favourites = np.stack([self._popular(n) for _ in FAVOURITES], axis=1)
        self._taste_tick = self._tick.copy()  # when the favourites were last looked at
        self._category = np.zeros(n, np.int64)
        self._item = np.zeros(n, np.int64)

    def advance(self, until_tick: int) -> list[np.ndarray]:
        """The columns of all events of the sessions that start before a tick and were not told yet, in no order."""
        told = []
        while True:
            idle = np.flatnonzero((self._platform < 0) & (self._tick < until_tick))
            acting = np.flatnonzero(self._platform >= 0)
            if not len(idle) and not len(acting):
                break
            staying = self._stay(acting)
            starting = self._wait(idle, until_tick)
            self._begin(starting)
            told.append(self._act(np.concatenate([staying, starting])))
        return [np.concatenate(column) for column in zip(*told, strict=True)]

    def _wait(self, who: np.ndarray, until_tick: int) -> np.ndarray:
        """Idle shoppers → those that start a session now; the others' latent state moved, or nothing happens in time.
        The ticks until something happens are geometric, as in the chain; at `until_tick` one may forget and draw anew."""
        start, leave = starts()[self.activity[who], self._e_m[who]], 1.0 - _STAY[self.buyer[who], self._e_m[who]]
        either = start + (1.0 - start) * leave
        at = self._tick[who] + self._rng.geometric(either) - 1
        in_time = at < until_tick
        starts_session = in_time & (self._rng.random(len(who)) * either < start)
        moves = in_time & ~starts_session
        self._tick[who] = np.where(moves, at + 1, np.minimum(at, until_tick))
        movers = who[moves]
        self._e_m[movers] = self._draw(_LEAVE_CDF[self.buyer[movers], self._e_m[movers]])
        return who[starts_session]

    def _stay(self, who: np.ndarray) -> np.ndarray:
        """Shoppers in a session → those that act again; the others fall silent."""
        stay = self._rng.random(len(who)) < stays()[self.buyer[who], self._platform[who], self._e_m[who]]
        self._tick[who] += np.where(stay, 1, 1 + SILENT_TICKS)
        ends = who[~stay]
        self._platform[ends] = -1
        self._e_m[ends] -= np.where(
            (self._e_m[ends] >= 3) & (self._rng.random(len(ends)) < CLOYS[self.activity[ends]]), 3, 0
        )
        return who[stay]

    def _begin(self, who: np.ndarray) -> None:
        """A session: its platform, the tastes as they now are, the category in focus."""
        self._platform[who] = self._draw(_SPREAD_CDF[self.profile[who]])
        self._session[who] = self._sessions + np.arange(len(who))
        self._sessions += len(who)
        self._drift_tastes(who)
        self._category[who] = self._favourite(who)
        self._item[who] = -1

    def _drift_tastes(self, who: np.ndarray) -> None:
        days = (self._tick[who] - self._taste_tick[who]) / TICKS_A_DAY
        self._taste_tick[who] = self._tick[who]
        shape = len(who), len(FAVOURITES)
        new = self._rng.random(shape) < -np.expm1(-days / FAVOURITE_LASTS_DAYS)[:, None]
        new |= self._rng.random((len(who), 1)) < -np.expm1(-days / TASTE_LASTS_DAYS)[:, None]
        self._favourites[who] = np.where(new, self._popular(shape), self._favourites[who])

    def _act(self, who: np.ndarray) -> tuple[np.ndarray, ...]:
        """One moment of each → columns of its events: person, tick, place, platform, kind, item, quantity, session,
        moment, line, e·3+m after it."""
        rng, n = self._rng, len(who)
        platform, buyer, (e, m) = self._platform[who], self.buyer[who], np.divmod(self._e_m[who], 3)
        m = self._draw(_NEED_CDF[buyer, platform, m])
        bought = rng.random(n) < buys()[buyer, platform, m]
        relaunched = (self._tick[who] + self.phase_ticks[who] >= self._relaunch_tick).astype(np.int64)
        kind = np.where(bought, PURCHASE, np.where(platform == GROCER, CANCEL, self._draw(_SHOWN_CDF[relaunched, m])))
        item = self._choose_items(who, kind, m)
        m = np.where(bought, self._draw(_AFTER_CDF[platform, m]), m)
        e = np.minimum(e + (bought & (rng.random(n) < _UPLIFT[platform])), KEEN)
        self._e_m[who] = e * 3 + m

        lines = np.where(kind == PURCHASE, np.minimum(rng.poisson(EXTRA_LINES[e], n), MOST_LINES - 1), 0)
        shown = np.where(kind <= CLICK, np.minimum(rng.poisson(_SHOWN_BESIDE[relaunched, e], n), MOST_SHOWN), 0)
        extra = np.where(platform == GROCER, lines, shown)
        first = np.concatenate([np.arange(n), np.repeat(np.arange(n), extra)])
        line = np.concatenate([np.ones(n, np.int64), _counts_up(extra) + 2])
        beside = first[n:]
        alike = (platform[beside] != GROCER) & (rng.random(len(beside)) < SHOWN_ALIKE)
        category = np.where(alike, item[beside] // ITEMS_A_CATEGORY, self._favourite(who[beside]))
        other_items = self._items_of(who[beside], category)
        moment = self._moments + np.arange(n)
        self._moments += n
        session, place = self._session[who], rng.random(n)
        columns = who, self._tick[who], place, platform, kind, session, moment, e * 3 + m
        who, tick, place, platform, kind, session, moment, e_m = (column[first] for column in columns)
        kind[n:][platform[n:] != GROCER] = IMPRESSION
        quantity = 1 + rng.poisson(0.3, len(first))
        item = np.concatenate([item, other_items])
        return who, tick, place, platform, kind, item, quantity, session, moment, line, e_m

    def _choose_items(self, who: np.ndarray, kind: np.ndarray, m: np.ndarray) -> np.ndarray:
        rng, n = self._rng, len(who)
        fresh = self._item[who] < 0
        new = fresh | (rng.random(n) < NEW_ITEM[kind])
        elsewhere = new & ~fresh & (rng.random(n) >= STAYS_IN_CATEGORY[m])
        beside = self._category[who] // 3 * 3 + rng.integers(0, 3, n)
        goes_to = np.where(rng.random(n) < 0.4, beside, self._favourite(who))
        category = self._category[who] = np.where(elsewhere, goes_to, self._category[who])
        item = self._item[who] = np.where(new, self._items_of(who, category), self._item[who])
        return item

    def _items_of(self, who: np.ndarray, category: np.ndarray) -> np.ndarray:
        """Items of categories: a few are popular, with everybody or with this shopper."""
        rank = (ITEMS_A_CATEGORY * self._rng.random(len(who)) ** 3).astype(np.int64)
        own = np.where(self._rng.random(len(who)) < 0.6, who * 13, 0)
        return category * ITEMS_A_CATEGORY + (rank + own) % ITEMS_A_CATEGORY

    def _favourite(self, who: np.ndarray) -> np.ndarray:
        return self._favourites[who, np.searchsorted(_FAVOURITES_CDF, self._rng.random(len(who)))]

    def _popular(self, shape: int | tuple[int, ...]) -> np.ndarray:
        return np.searchsorted(_POPULAR_CDF, self._rng.random(shape))

    def _draw(self, cdf_NK: np.ndarray) -> np.ndarray:
        """One draw from each row of cumulated chances."""
        return (self._rng.random(len(cdf_NK))[:, None] >= cdf_NK[:, :-1]).sum(1)


def _counts_up(lengths: np.ndarray) -> np.ndarray:
    """[2, 0, 3] → [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


_STAY = np.diagonal(drifts(), axis1=1, axis2=2)
_LEAVE_CDF = _cdf(drifts() * ~np.eye(N_EM, dtype=bool))
_SPREAD_CDF = _cdf(SPREAD)
_NEED_CDF = _cdf(need_moves())
_SHOWN_CDF = _cdf(np.stack([SHOWN, RELAUNCHED_SHOWN]))
_SHOWN_BESIDE = np.stack([SHOWN_BESIDE, RELAUNCHED_SHOWN_BESIDE])
_AFTER_CDF = _cdf(after_purchase())
_UPLIFT = np.array(UPLIFT)
_FAVOURITES_CDF = _cdf(FAVOURITES)[:-1]


# ------------------------------------------------------------------------------------------------------------ the records
KIND_NAMES = (
    ("page_view", "click", "add_to_favorites", "add_to_cart", "order", "order_cancelled", "impression"),
    ("PRODUCT_VIEW", "PRODUCT_CLICK", "WISHLIST_ADD", "BASKET_ADD", "ORDER_LINE", "ORDER_CANCEL", "PRODUCT_SHOWN"),
)  # the grocer has none
HAS_CLICK = (True, True, False)
_BERLIN = ZoneInfo("Europe/Berlin")
_STOCKHOLM_WINTER_MS = 3_600_000


def raw_user(platform: int, account: int) -> str:
    """An account's number → its id on its platform. No id occurs on two platforms."""
    if platform == METRO:
        return f"M-{account * 2_654_435_761 % 2**32:08X}"
    return str((10_000_000 if platform == BAZAAR else 40_000) + account)


def _bazaar_records(events: Events, users: list[str], refs: list[str]) -> list[str]:
    names, items, kinds = KIND_NAMES[BAZAAR], catalogue()[BAZAAR], events.kind.tolist()
    counts = [
        f',"quantity":{q}' if CART <= k <= PURCHASE else "" for q, k in zip(events.quantity.tolist(), kinds, strict=True)
    ]
    columns = (refs, kinds, events.ts.tolist(), users, events.session.tolist(), events.item.tolist(), counts)
    return [
        f'{{"event_id":"{ref}","event":"{names[kind]}","ts":{ts},"user_id":{user},"session_id":"s-{session:x}",'
        f"{items[item]}{count}}}"
        for ref, kind, ts, user, session, item, count in zip(*columns, strict=True)
    ]


def _metro_records(events: Events, users: list[str], refs: list[str]) -> list[str]:
    names, items, kinds = KIND_NAMES[METRO], catalogue()[METRO], events.kind.tolist()
    at = np.datetime_as_string((events.ts + _STOCKHOLM_WINTER_MS).astype("datetime64[ms]")).tolist()
    counts = [f',"count":{q}' if CART <= k <= PURCHASE else "" for q, k in zip(events.quantity.tolist(), kinds, strict=True)]
    columns = (refs, kinds, at, users, events.session.tolist(), events.item.tolist(), counts)
    return [
        f'{{"meta":{{"id":"{ref}","at":"{at}+01:00","schema":3}},"actor":{{"ref":"{user}","visit":"v-{session}"}},'
        f'"action":{{"type":"{names[kind]}"{count}}},{items[item]}}}'
        for ref, kind, at, user, session, item, count in zip(*columns, strict=True)
    ]


def _grocer_records(events: Events, users: list[str], refs: list[str]) -> list[str]:
    items = catalogue()[GROCER]
    hours, which = np.unique(events.ts // 3_600_000, return_inverse=True)
    offset_ms = np.array([_berlin_offset_ms(hour) for hour in hours.tolist()], np.int64)[which]
    local = np.datetime_as_string((events.ts + offset_ms).astype("datetime64[ms]"), unit="s").tolist()
    quantity = np.where(events.kind == CANCEL, -events.quantity, events.quantity).tolist()
    columns = refs, events.item.tolist(), quantity, users, local
    return [
        f'{{"InvoiceNo":"{(parts := ref.split("/"))[0]}","Line":{parts[1]},{items[item]},"Quantity":{count},'
        f'"CustomerID":{user},"InvoiceDate":"{at[8:10]}/{at[5:7]}/{at[:4]} {at[11:]}"}}'
        for ref, item, count, user, at in zip(*columns, strict=True)
    ]


def _berlin_offset_ms(hour: int) -> int:
    offset = datetime.fromtimestamp(hour * 3600, _BERLIN).utcoffset()
    return int(offset.total_seconds() * 1000)


_RECORDS = (_bazaar_records, _metro_records, _grocer_records)


def _refs(platform: int, events: Events, serial: np.ndarray) -> list[str]:
    if platform == BAZAAR:
        return [f"bz-{number:012x}" for number in serial.tolist()]
    if platform == METRO:
        return [f"mt-{number:010x}" for number in serial.tolist()]
    letters = np.where(events.kind == CANCEL, "C", "G").tolist()
    columns = letters, events.moment.tolist(), events.line.tolist()
    return [f"{letter}{100_000 + moment}/{line}" for letter, moment, line in zip(*columns, strict=True)]


# ------------------------------------------------------------------------------------------------- what must be refused
_PATHS = (  # where each platform keeps the user, the time, the quantity and the kind
    {"user": ("user_id",), "time": ("ts",), "count": ("quantity",), "kind": ("event",)},
    {"user": ("actor", "ref"), "time": ("meta", "at"), "count": ("action", "count"), "kind": ("action", "type")},
    {"user": ("CustomerID",), "time": ("InvoiceDate",), "count": ("Quantity",)},
)
_FUTURE = (95_617_584_000_000, "4999-12-31T23:59:59.000+01:00", "31/12/4999 23:59:59")
_NO_TIME = ("soon", "2024-02-30T12:00:00Z", "2024-03-01 09:15")


def _with(value: bytes, path: tuple[str, ...], put: object) -> bytes:
    """The record with another value at a path; `UNSET` takes the field away."""
    record = inner = msgspec.json.decode(value)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = put
    if put is msgspec.UNSET:
        del inner[path[-1]]
    return msgspec.json.encode(record)


_DAMAGES: tuple[tuple[str, Callable[[bytes, int], bytes]], ...] = (  # reason, (record, platform) → record
    ("not_utf8", lambda value, p: value.replace(b'":"', b'":"\xc3\x28', 1)),
    ("not_utf8", lambda value, p: value.decode().encode("utf-16")),
    ("not_json", lambda value, p: value[: len(value) * 2 // 3]),
    ("not_json", lambda value, p: value + b"}"),
    ("not_json", lambda value, p: b""),
    ("not_object", lambda value, p: b"[" + value + b"]"),
    ("not_object", lambda value, p: b'"' + PLATFORMS[p].encode() + b'"'),
    ("missing", lambda value, p: _with(value, _PATHS[p]["user"], msgspec.UNSET)),
    ("missing", lambda value, p: _with(value, _PATHS[p]["time"], None)),
    ("wrong_type", lambda value, p: _with(value, _PATHS[p]["user"], {"id": 7})),
    ("wrong_type", lambda value, p: _with(value, _PATHS[p]["time"], [2024, 3, 1])),
    ("wrong_type", lambda value, p: _with(value, _PATHS[p]["count"], "many")),
    ("out_of_range", lambda value, p: _with(value, _PATHS[p]["user"], 12.5)),
    ("out_of_range", lambda value, p: _with(value, _PATHS[p]["count"], 1e300)),
    ("bad_time", lambda value, p: _with(value, _PATHS[p]["time"], _NO_TIME[p])),
    ("future", lambda value, p: _with(value, _PATHS[p]["time"], _FUTURE[p])),
    ("unknown_kind", lambda value, p: _with(value, _PATHS[p]["kind"], "hover")),  # not at the grocer: a till has no kinds
)


class Simulator:
    """The stream of a configuration. The same configuration makes the same stream, byte for byte."""

    def __init__(self, config: SimulatorConfig = SimulatorConfig()) -> None:  # noqa: B008 (frozen)
        self.config = config
        n = config.n_shoppers
        self._midnight_ms = config.start_ms // DAY_MS * DAY_MS
        relaunch_tick = float("inf")
        if config.relaunch_day is not None:
            day, ms = divmod(config.start_ms - self._midnight_ms + config.relaunch_day * DAY_MS, DAY_MS)
            relaunch_tick = float(day * TICKS_A_DAY + operational_ticks(np.float64(ms)))
        self.shoppers = Shoppers(n, config.seed, relaunch_tick)
        self._rng = np.random.default_rng([config.seed, 2])
        accounts = (SPREAD > 0).sum(1)[self.shoppers.profile]
        self.linked = (accounts > 1) & (self._rng.random(n) < config.linked_share)
        """(shoppers,) whether `identity_links` names the accounts."""
        numbers = [self._rng.permutation(n) for _ in PLATFORMS]
        self._users = [[raw_user(p, number) for number in numbers[p].tolist()] for p in range(len(PLATFORMS))]
        self._keys = [[user.encode() for user in users] for users in self._users]
        self._block_ticks = int(np.clip(TICKS_A_DAY * 8000 // n, 15, 7 * TICKS_A_DAY))
        self._until_tick = -WARM_UP_TICKS
        self._serial = 0

    def identity_links(self) -> Iterator[tuple[str, str, str]]:
        """(platform, raw user, raw person) of every account that is known to be a certain person's."""
        for person in np.flatnonzero(self.linked).tolist():
            for p in np.flatnonzero(SPREAD[self.shoppers.profile[person]]).tolist():
                yield PLATFORMS[p], self._users[p][person], f"person-{person}"

    def account(self, platform: int, person: int) -> str:
        """A person's raw user on a platform."""
        return self._users[platform][person]

    def stream(self) -> Iterator[Emitted]:
        """Records in the order of their arrival, without end. One stream a simulator: it takes up where it was left."""
        waiting: list[Emitted] = []
        for events, complete_until_ms in self.blocks():
            waiting += self._records(events)
            arrives = np.array([record.arrives_ms for record in waiting], np.int64)
            order = np.argsort(arrives, kind="stable")
            ready = int(np.searchsorted(arrives[order], complete_until_ms))
            for i in order[:ready].tolist():
                yield waiting[i]
            waiting = [waiting[i] for i in order[ready:].tolist()]

    def blocks(self) -> Iterator[tuple[Events, int]]:
        """The events themselves, block by block, ascending within one, and the ms before which no later block has any."""
        while True:
            self._until_tick += self._block_ticks
            told = self.shoppers.advance(self._until_tick)
            until_ms = self._midnight_ms + int(clock_ms(np.float64(self._until_tick)))
            events = self._timed(*told) if told else None
            if events is not None and len(events.ts):
                yield events, until_ms

    def _timed(self, person, tick, place, platform, kind, item, quantity, session, moment, line, e_m) -> Events:
        ticks = tick + place * (1.0 - SPACING_MS / TICK_MS) + self.shoppers.phase_ticks[person]
        ts = self._midnight_ms + clock_ms(ticks).astype(np.int64)
        ts = np.where(platform == GROCER, ts // 1000 * 1000, ts)
        order = np.lexsort((line, moment, ts))
        order = order[ts[order] >= self.config.start_ms]
        columns = ts, person, platform, kind, item, quantity, session, moment, line, e_m, place
        return Events(*(column[order] for column in columns))

    def truth(self, events: Events) -> np.ndarray:
        """(n, 3) P(click), P(purchase), P(return) of each event, as the user that ingest can see: see the module."""
        who, platform = events.person, events.platform
        shoppers = self.shoppers
        seen = np.where(self.linked[who], ALL, platform)
        cell = VIEWPOINT[shoppers.profile[who], seen], shoppers.activity[who], shoppers.buyer[who], platform, events.e_m
        out = np.empty((len(who), 3))
        out[:, 0] = stays()[shoppers.buyer[who], platform, events.e_m]
        for column, what, ticks in ((1, "purchase", PURCHASE_TICKS), (2, "return", RETURN_TICKS)):
            shorter, longer = survival(what, ticks)
            out[:, column] = 1.0 - (1.0 - events.place) * shorter[cell] - events.place * longer[cell]
        return out

    def seen_users(self, events: Events) -> np.ndarray:
        """(n,) a number for the user that ingest can see: the person if linked, else the account."""
        account = self.shoppers.n + events.person * len(PLATFORMS) + events.platform
        return np.where(self.linked[events.person], events.person, account)

    def _records(self, events: Events) -> list[Emitted]:
        """A block's events as records, with what happens to them on the way; in no order."""
        n, config, rng = len(events.ts), self.config, self._rng
        keys, values, refs = self._serialise(events)
        chance, share = rng.random(n), rng.random(n)
        late = chance < config.late_rate
        unordered = ~late & (chance < config.late_rate + config.out_of_order_rate)
        least, most = np.select([late[:, None], unordered[:, None]], [LATE_MS, OUT_OF_ORDER_MS], PROMPT_MS).T
        moment = events.moment - events.moment.min()
        together = rng.random(moment.max() + 1)[moment]  # what is prompt of a moment comes in its order
        share = np.where(late | unordered, share, together)
        arrives = events.ts + (least + share * (most - least)).astype(np.int64) + events.line
        truths = self._truths(events) if config.ledger else [None] * n
        names = [PLATFORMS[p] for p in events.platform.tolist()]
        columns = names, keys, values, events.ts.tolist(), arrives.tolist(), refs, truths
        out = [
            Emitted(name, key, value, ts, at, name, ref, "accept", truth)
            for name, key, value, ts, at, ref, truth in zip(*columns, strict=True)
        ]
        twice = np.flatnonzero(~late & ~unordered & (rng.random(n) < config.duplicate_rate))
        for i, delay in zip(twice.tolist(), rng.integers(*DUPLICATE_MS, len(twice)).tolist(), strict=True):
            first = out[i]
            again = first.arrives_ms + delay
            out.append(Emitted(first.topic, first.key, first.value, first.ts_ms, again, first.topic, refs[i], "duplicate"))
        for i in np.flatnonzero(rng.random(n) < config.malformed_rate).tolist():
            out.append(self._damaged(out[i], int(events.platform[i])))
        return out

    def _serialise(self, events: Events) -> tuple[list[bytes], list[bytes], list[str]]:
        n = len(events.ts)
        serial = self._serial + np.arange(n)
        self._serial += n
        out = np.empty((3, n), object)
        for p, write in enumerate(_RECORDS):
            where = np.flatnonzero(events.platform == p)
            part = Events(*(column[where] for column in events))
            who, refs = part.person.tolist(), _refs(p, part, serial[where])
            records = write(part, [self._users[p][person] for person in who], refs)
            out[0, where] = [self._keys[p][person] for person in who]
            out[1, where] = [record.encode() for record in records]
            out[2, where] = refs
        return tuple(out.tolist())

    def _truths(self, events: Events) -> list[Truth]:
        click, purchase, returns = self.truth(events).T.tolist()
        click = [c if HAS_CLICK[p] else None for c, p in zip(click, events.platform.tolist(), strict=True)]
        return list(map(Truth, click, purchase, returns))

    def _damaged(self, record: Emitted, platform: int) -> Emitted:
        reason, damage = _DAMAGES[self._rng.integers(len(_DAMAGES) - (platform == GROCER))]
        at = record.arrives_ms + int(self._rng.integers(0, 2000))
        value = damage(record.value, platform)
        return Emitted(record.topic, record.key, value, record.ts_ms, at, record.platform, None, "refuse", None, reason)


# ------------------------------------------------------------------------------------------------ how well can one know
def realised_labels(user: np.ndarray, ts: np.ndarray, purchase: np.ndarray) -> np.ndarray:
    """What came: (n, 3) bool click, purchase, return of each event, from the events alone (users, ms, kind), any order.
    Means nothing for events less than 7 days before the last."""
    order = np.lexsort((ts, user))
    user, ts, purchase = user[order], ts[order], purchase[order]
    n = len(user)
    # The next instant: events at one instant are no future of each other.
    instant = np.r_[True, (user[1:] != user[:-1]) | (ts[1:] != ts[:-1])]
    begins = np.flatnonzero(instant)
    number = np.cumsum(instant) - 1
    instant_user, instant_ts = user[begins], ts[begins]
    buys_here = np.logical_or.reduceat(purchase, begins)
    gap = np.r_[np.diff(instant_ts), np.iinfo(np.int64).max]
    gap[np.flatnonzero(np.diff(instant_user))] = np.iinfo(np.int64).max  # to somebody else
    starts_session = np.r_[True, gap[:-1] > 1_800_000] & np.r_[False, instant_user[1:] == instant_user[:-1]]

    def comes_within(happens: np.ndarray, horizon_ms: int) -> np.ndarray:
        following = np.where(happens, np.arange(len(happens)), len(happens))
        following = np.r_[np.minimum.accumulate(following[::-1])[::-1][1:], len(happens)]
        known = following < len(happens)
        j = np.where(known, following, 0)
        return known & (instant_user[j] == instant_user) & (instant_ts[j] - instant_ts <= horizon_ms)

    labels = np.stack([gap <= 1_800_000, comes_within(buys_here, DAY_MS), comes_within(starts_session, 7 * DAY_MS)], 1)
    out = np.empty((n, 3), bool)
    out[order] = labels[number]
    return out


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; NaN with one class only."""
    _, rank, count = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count - 1) / 2.0
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        return float("nan")
    return float((middle[rank[label]].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))


class Known(NamedTuple):
    """How well one head of one platform can be known."""

    platform: str
    head: str
    events: int
    base_rate: float
    mean_truth: float
    best_auc: float


def matured_sample(config: SimulatorConfig, days: int) -> tuple[Events, np.ndarray, np.ndarray, np.ndarray]:
    """Events of the first days, their users, truths (n, 3) and labels (n, 3); 7 more days are simulated for the labels."""
    simulator = Simulator(config)
    until_ms = config.start_ms + days * DAY_MS
    blocks = []
    for events, complete_until_ms in simulator.blocks():
        blocks.append(events)
        if complete_until_ms > until_ms + 7 * DAY_MS:
            break
    events = Events(*(np.concatenate(column) for column in zip(*blocks, strict=True)))
    users = simulator.seen_users(events)
    labels = realised_labels(users, events.ts, events.kind == PURCHASE)
    kept = events.ts < until_ms
    events = Events(*(column[kept] for column in events))
    return events, users[kept], simulator.truth(events), labels[kept]


def bayes(config: SimulatorConfig, days: int) -> list[Known]:
    """Base rate and best AUC of every head of every platform, on the events of some days."""
    events, _, truth, labels = matured_sample(config, days)
    out = []
    for p, platform in enumerate(PLATFORMS):
        here = events.platform == p
        for column, head in enumerate(("click", "purchase", "return")):
            if head == "click" and not HAS_CLICK[p]:
                continue
            q, y = truth[here, column], labels[here, column]
            out.append(Known(platform, head, len(y), float(y.mean()), float(q.mean()), auc(q, y)))
    return out


def main(arguments: list[str] | None = None) -> None:
    """`python -m streams.simulator --bayes`."""
    parser = argparse.ArgumentParser(description="How well the simulator's shoppers can be known at best.")
    parser.add_argument("--bayes", action="store_true", required=True, help="base rates, mean truth and best AUC")
    parser.add_argument("--shoppers", type=int, default=SimulatorConfig().n_shoppers)
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = SimulatorConfig(n_shoppers=options.shoppers, seed=options.seed)
    print(f"{'platform':<12}{'head':<10}{'events':>9}{'base rate':>11}{'mean truth':>12}{'best AUC':>10}")
    for known in bayes(config, options.days):
        print(
            f"{known.platform:<12}{known.head:<10}{known.events:>9,}{known.base_rate:>11.4f}{known.mean_truth:>12.4f}"
            f"{known.best_auc:>10.4f}"
        )


if __name__ == "__main__":
    main()
