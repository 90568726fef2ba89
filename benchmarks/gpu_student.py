"""What the student costs on a card.

    python -m benchmarks.gpu_student [--json benchmarks/gpu_student.json]      without CUDA: says so and measures nothing

For each size of student and batch, of random events: µs a batch and events/s of `encode` and `heads` as one CUDA graph
with their inputs on the card already; the same as the worker has it (`models.device.DeviceStudent`: arrays into pinned
memory, there, a, b back, h there, logits back); and the share of the card's memory bandwidth that the tensors read and
written without transfers would need at the least. Medians of REPEATS batches, and the 5th and 95th percentile.
`make bench ARGS="--report"` puts the JSON into SPEED.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.device import BUCKETS, DeviceStudent, captured
from models.events import EVENT
from models.fold import N_FEATURES
from models.student import N_GATES, N_LOGITS, Columns, Student, StudentConfig

SIZES = ("cpu", "gpu")
BATCHES = (1, *BUCKETS)
PLATFORMS = ("a", "b", "c")
REPEATS = 200
_FLOAT_BYTES = 4


def make_batch(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Events (N,) of EVENT, features (N, F), dt_s (N,) and platforms (N,) at random."""
    rng = np.random.default_rng(0)
    events = np.zeros(n, EVENT)
    events["item"], events["category"] = rng.integers(0, 2**32, (2, n))
    features_NF = rng.normal(size=(n, N_FEATURES)).astype(np.float32)
    return events, features_NF, rng.exponential(1000.0, n).astype(np.float32), rng.integers(0, len(PLATFORMS) + 1, n)


def bytes_per_event(config: StudentConfig) -> int:
    """Of the columns, embeddings, e, a, b, h and outputs: each read or written once."""
    floats = 2 * config.n_inputs + 2 * config.width + 4 * config.hidden + 2 * config.head_width + N_LOGITS + N_GATES
    return _FLOAT_BYTES * floats


def microseconds(step: Callable[[], object]) -> dict[str, float]:
    """Of REPEATS runs, each waited for, after some that do not count."""
    took_us = []
    for _ in range(10 + REPEATS):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        step()
        torch.cuda.synchronize()
        took_us.append(1e6 * (time.perf_counter() - began_s))
    low, median, high = np.percentile(took_us[10:], [5, 50, 95])
    return {"median": round(median, 1), "p5": round(low, 1), "p95": round(high, 1)}


def bandwidth_bytes_s() -> float:
    """Of a copy on the card, read and written: what can be had, not what the data sheet says."""
    source = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * microseconds(lambda: target.copy_(source))["median"])


@torch.inference_mode()
def measure(size: str, n: int, bandwidth: float) -> dict[str, Any]:
    config = StudentConfig.of(size, N_FEATURES, PLATFORMS, {})
    device = torch.device("cuda")
    student = Student(config).eval().requires_grad_(False).to(device)
    served, batch = DeviceStudent(student, device), make_batch(n)
    there, h_NH = Columns.of(*batch, device), torch.zeros(n, config.hidden, device=device)
    nth_N = torch.arange(n, device=device)

    def on_card() -> None:
        encoded = student.encode(there)
        served.outputs(student.before_heads(h_NH, encoded.x_NF, encoded.e_NE), there.platform_N, nth_N)

    def as_served() -> None:
        _, _, h_NH = served.encode(*batch)
        h_NH[:] = 0.0
        served.heads(n)

    alone_us, moved_us = microseconds(captured(on_card, device)), microseconds(as_served)
    return {
        "size": size,
        "batch": n,
        "on_card_us": alone_us,
        "on_card_events_per_s": round(1e6 * n / alone_us["median"]),
        "with_transfers_us": moved_us,
        "events_per_s": round(1e6 * n / moved_us["median"]),
        "bandwidth_share": round(n * bytes_per_event(config) / bandwidth / (1e-6 * alone_us["median"]), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    path = parser.parse_args().json
    if not torch.cuda.is_available():
        print("not measured: no CUDA device")
        return 0
    bandwidth = bandwidth_bytes_s()
    batches = []
    print(f"{torch.cuda.get_device_name()}, {bandwidth / 1e9:.0f} GB/s by a copy")
    print("size  batch   µs/batch     events/s  µs, moved    events/s  bandwidth")
    for size in SIZES:
        for n in BATCHES:
            one = measure(size, n, bandwidth)
            batches.append(one)
            alone, moved = one["on_card_us"]["median"], one["with_transfers_us"]["median"]
            rates = one["on_card_events_per_s"], one["events_per_s"]
            print(
                f"{size:>4} {n:6d} {alone:10.1f} {rates[0]:12d} {moved:10.1f} {rates[1]:12d} {one['bandwidth_share']:8.1%}"
            )
    if path:
        found = {
            "card": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "bandwidth_gb_s": round(bandwidth / 1e9),
            "repeats": REPEATS,
            "batches": batches,
        }
        path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
