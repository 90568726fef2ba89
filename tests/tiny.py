"""Small models and streams that the tests of student, scorer and artifact share. Everything from seeds."""

from __future__ import annotations

import numpy as np
import torch

from models.categories import CategoryTable
from models.config import FoldConfig
from models.events import EVENT, hash32, platform_code
from models.fold import N_FEATURES
from models.scorer import Model, identity_calibration
from models.student import Student, StudentConfig

PLATFORMS = ("alpha", "beta", "gamma")
HEADS_OF = {"alpha": ("click", "purchase", "return", "category"), "beta": ("purchase", "return", "category")}
HEADS_OF["gamma"] = ("click",)
CATEGORIES = {hash32(f"category {i}"): f"category {i}" for i in range(120)}
HASHES = np.array(sorted(CATEGORIES), np.uint32)
START_MS = 1_700_000_000_000


def make_config(size: str = "cpu") -> StudentConfig:
    return StudentConfig.of(size, N_FEATURES, PLATFORMS, HEADS_OF)


def make_student(size: str = "cpu", seed: int = 0) -> Student:
    """Weights large enough that every input matters."""
    torch.manual_seed(seed)
    student = Student(make_config(size)).eval()
    with torch.no_grad():
        for parameter in (student.head_weight_POK, student.head_bias_PO):
            parameter.normal_(std=0.15)
        for table in (student.item, student.category, student.platform):
            table.weight.normal_(std=0.5)
        student.feature_mean_PF.normal_(mean=1.0, std=0.2)
        student.feature_std_PF.uniform_(1.0, 3.0)
    return student


def make_table(seed: int = 0, max_categories: int = 90, n_platforms: int = len(PLATFORMS)) -> CategoryTable:
    rng = np.random.default_rng(seed)
    n = 5000
    came, following = some_categories(rng, n), some_categories(rng, n)
    following[came == 0] = HASHES[0]
    platform = rng.integers(0, n_platforms + 1, n)
    return CategoryTable.from_counts(came, following, platform, CATEGORIES, n_platforms, max_categories=max_categories)


def some_categories(rng: np.random.Generator, n: int) -> np.ndarray:
    """Hashes of which a few are frequent; a tenth is 0."""
    picked = HASHES[np.minimum(rng.zipf(1.3, n) - 1, len(HASHES) - 1)]
    picked[rng.random(n) < 0.1] = 0
    return picked


def make_model(size: str = "cpu", seed: int = 0, version: str = "tiny/000001") -> Model:
    rng = np.random.default_rng(seed)
    calibration = identity_calibration(len(PLATFORMS))
    calibration += rng.normal(0, 0.1, calibration.shape).astype(np.float32)
    return Model(version, make_config(size), make_student(size, seed), make_table(seed), calibration, FoldConfig())


def make_stream(n: int, users: int, seed: int = 0, first_offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(events of EVENT (n,), slots (n,)): in offset order, with late events, repeats and replayed offsets."""
    rng = np.random.default_rng(seed)
    events = np.zeros(n, EVENT)
    events["offset"] = first_offset + np.arange(n)
    events["ts"] = START_MS + 60_000 * first_offset + np.cumsum(rng.exponential(60_000, n)).astype(np.int64)
    events["id"] = rng.integers(1, 2**62, n)
    events["item"] = rng.integers(0, 300, n)
    events["category"] = some_categories(rng, n)
    events["quantity"] = rng.integers(1, 5, n)
    events["platform"] = np.array([platform_code(p) for p in (*PLATFORMS, "unheard of")])[rng.integers(0, 4, n)]
    events["kind"] = rng.integers(0, 7, n)
    events["price"] = rng.integers(0, 256, n)
    slots = rng.integers(0, users, n)
    for i in range(20, n, 17):
        earlier = int(rng.integers(0, i))
        slots[i] = slots[earlier]
        match i % 3:
            case 0:
                events["id"][i] = events["id"][earlier]
            case 1:
                events["offset"][i] = events["offset"][earlier]
            case _:
                events["ts"][i] -= int(rng.integers(0, 40_000_000))
    return events, slots
