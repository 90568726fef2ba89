"""What the student costs on a card: `python -m benchmarks.gpu_student`. Without CUDA it says so and measures nothing.

For each batch size, of random events: µs a batch and events/s of `encode` and `heads` with their inputs on the card
already, the same with the transfers that serving makes (columns there; a, b back; h there; logits back), and the share of
the card's memory bandwidth that the tensors read and written without transfers would need at the least.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from models.fold import N_FEATURES
from models.student import N_GATES, N_LOGITS, Columns, Student, StudentConfig

SIZES = ("cpu", "gpu")
BATCHES = (1, 8, 64, 512, 1024, 4096, 8192, 32768)
PLATFORMS = ("a", "b", "c")
REPEATS = 50
_FLOAT_BYTES = 4


def make_columns(n: int) -> Columns:
    rng = np.random.default_rng(0)
    return Columns(
        torch.from_numpy(rng.normal(size=(n, N_FEATURES)).astype(np.float32)),
        torch.from_numpy(rng.integers(0, 2**32, n)),
        torch.from_numpy(rng.integers(0, 2**32, n)),
        torch.from_numpy(rng.integers(0, len(PLATFORMS) + 1, n)),
        torch.from_numpy(rng.exponential(1000.0, n).astype(np.float32)),
    )


def bytes_per_event(config: StudentConfig) -> int:
    """Of the columns, embeddings, e, a, b, h and outputs: each read or written once."""
    floats = 2 * config.n_inputs + 2 * config.width + 4 * config.hidden + 2 * config.head_width + N_LOGITS + N_GATES
    return _FLOAT_BYTES * floats


def seconds(step: Callable[[], object]) -> float:
    """The median of REPEATS runs, waited for, after five that do not count."""
    took_s = []
    for _ in range(5 + REPEATS):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        step()
        torch.cuda.synchronize()
        took_s.append(time.perf_counter() - began_s)
    return float(np.median(took_s[5:]))


def bandwidth_bytes_s() -> float:
    """Of a copy on the card, read and written: what can be had, not what the data sheet says."""
    source = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


@torch.inference_mode()
def measure(size: str, n: int, bandwidth: float) -> str:
    config = StudentConfig.of(size, N_FEATURES, PLATFORMS, {})
    student, host = Student(config).eval().to("cuda"), make_columns(n)
    there, h_host = host.to("cuda"), torch.zeros(n, config.hidden)
    h_NH = h_host.to("cuda")

    def on_card() -> None:
        encoded = student.encode(there)
        student.heads(h_NH, encoded.x_NF, encoded.e_NE, there.platform_N)

    def with_transfers() -> None:
        columns = host.to("cuda")
        encoded = student.encode(columns)
        encoded.a_NH.cpu(), encoded.b_NH.cpu()
        for out in student.heads(h_host.to("cuda"), encoded.x_NF, encoded.e_NE, columns.platform_N):
            out.cpu()

    alone_s, moved_s = seconds(on_card), seconds(with_transfers)
    share = n * bytes_per_event(config) / bandwidth / alone_s
    return (
        f"{size:>4} {n:6d} {1e6 * alone_s:10.1f} {n / alone_s:12.0f} {1e6 * moved_s:10.1f} {n / moved_s:12.0f} {share:8.1%}"
    )


def main() -> int:
    if not torch.cuda.is_available():
        print("not measured: no CUDA device")
        return 0
    bandwidth = bandwidth_bytes_s()
    print(f"{torch.cuda.get_device_name()}, {bandwidth / 1e9:.0f} GB/s by a copy")
    print("size  batch   µs/batch     events/s  µs, moved    events/s  bandwidth")
    for size in SIZES:
        for n in BATCHES:
            print(measure(size, n, bandwidth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
