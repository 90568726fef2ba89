"""The student on a card, as serving runs it: a batch is two CUDA graphs, with what it brings there and back in them.

    encode    columns → the card; a, b → the host            (one CUDA graph)
    advance   h ← a ⊙ h + b in the rows, on the host, where the rows lie
    heads     h → the card; logits and gates → the host      (one CUDA graph)

A graph has fixed shapes and addresses, so each size of BUCKETS has its own pair, between pinned buffers on the host and
fixed ones on the card; a batch goes into the smallest that holds it, and what lies behind its events is not looked at.
All memory of a bucket is asked for when it is made, the graphs' too: a batch that has begun cannot run out of it.
On another device than CUDA the same steps run without graphs, which is how the tests reach them.

Shapes: N events of a batch, B of its bucket, F features, H hidden units, O outputs of the heads, P platforms (axis of
length P + 1; index 0: unknown). Knows no fold, no category, no calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.student import N_LOGITS, Columns, Student, heads_of_platforms

log = logging.getLogger(__name__)
BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Powers of two: who halves what a card holds comes to the next one."""
_ALIGN = 256
_WARM_UPS = 3
"""Runs before a capture, in which libraries choose their kernels and take their workspaces."""


class DeviceStudent:
    """A student whose weights lie on `device`, in evaluation. Not for several threads at once; another thread may make
    another one meanwhile, as a worker does that loads the next model."""

    def __init__(self, student: Student, device: torch.device) -> None:
        self.student, self.device = student, device
        weight_POK, bias_PO = heads_of_platforms(student)
        # One product for all platforms, of which each event keeps its own: no shape depends on who is in the batch.
        self._weight_QK, self._bias_Q = weight_POK.flatten(0, 1), bias_PO.flatten()
        self._buckets: dict[int, _Bucket] = {}

    def make(self, most: int) -> None:
        """Makes every bucket of at most `most` events. Raises `torch.OutOfMemoryError`; those made before stay."""
        for size in BUCKETS:
            if size <= most:
                self._bucket(size)

    def forget(self, above: int) -> None:
        """Gives back what buckets of more than `above` events hold."""
        self._buckets = {size: bucket for size, bucket in self._buckets.items() if size <= above}

    @torch.inference_mode()
    def encode(
        self, events: np.ndarray, features_NF: np.ndarray, dt_s_N: np.ndarray, platform_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At most BUCKETS[-1] events of EVENT and what the fold and the platforms say of them → a, b (N, H) and room for
        h (N, H), float32, which `heads` reads. All three are good until the next call.

        Raises `torch.OutOfMemoryError` where there is no room for a bucket of that size.
        """
        n = len(events)
        bucket = self._bucket(n)
        into = bucket.columns
        into.features_NF[:n], into.dt_s_N[:n], into.platform_N[:n] = features_NF, dt_s_N, platform_N
        into.item_N[:n], into.category_N[:n] = events["item"], events["category"]
        bucket.run_encode()
        self._wait()
        return bucket.a_BH[:n], bucket.b_BH[:n], bucket.h_BH[:n]

    @torch.inference_mode()
    def heads(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """After `encode` of n events and with their `h` in its room → logits (N, 3), gate logits (N, 7), float32."""
        bucket = self._bucket(n)
        bucket.run_heads()
        self._wait()
        out_NO = bucket.out_BO[:n].copy()
        return out_NO[:, :N_LOGITS], out_NO[:, N_LOGITS:]

    def outputs(self, z_BK: Tensor, platform_B: Tensor, nth_B: Tensor) -> Tensor:
        """`models.student.by_platform` in fixed shapes. → (B, O)"""
        of_all_BQ = functional.linear(z_BK, self._weight_QK, self._bias_Q)
        return of_all_BQ.view(len(z_BK), len(self.student.head_bias_PO), -1)[nth_B, platform_B]

    def _bucket(self, n: int) -> _Bucket:
        size = next((size for size in BUCKETS if size >= n), None)
        if size is None:
            raise ValueError(f"{n} events at once; at most {BUCKETS[-1]}")
        if size not in self._buckets:
            self._buckets[size] = _Bucket(self, size)
        return self._buckets[size]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class _Bucket:
    """Buffers for B events, and the two steps between them."""

    @torch.inference_mode()
    def __init__(self, of: DeviceStudent, size: int) -> None:
        config = of.student.config
        on_card, outputs = of.device.type == "cuda", of.student.head_bias_PO.shape[1]
        shapes = [((size, config.n_features), torch.float32), *[((size,), torch.int64)] * 3, ((size,), torch.float32)]
        self._of = of
        self._host, host_columns = _packed(shapes, torch.device("cpu"), pinned=on_card)
        self._there, columns = _packed(shapes, of.device)
        self._columns = Columns(*columns)
        widths = (config.hidden, config.hidden, config.hidden, outputs)
        self._a, self._b, self._h, self._out = (torch.zeros(size, width, pin_memory=on_card) for width in widths)
        self._nth_B = torch.arange(size, device=of.device)
        self.columns = Columns(*(column.numpy() for column in host_columns))  # to be written, hence arrays
        self.a_BH, self.b_BH, self.h_BH, self.out_BO = (tensor.numpy() for tensor in (self._a, self._b, self._h, self._out))
        self.run_encode = captured(self._encode, of.device)
        self.run_heads = captured(self._heads, of.device)

    def _encode(self) -> None:
        self._there.copy_(self._host, non_blocking=True)
        # Kept, so that no other graph is given this memory: `heads` reads it.
        self._encoded = self._of.student.encode(self._columns)
        self._a.copy_(self._encoded.a_NH, non_blocking=True)
        self._b.copy_(self._encoded.b_NH, non_blocking=True)

    def _heads(self) -> None:
        h_BH = self._h.to(self._of.device, non_blocking=True)
        z_BK = self._of.student.before_heads(h_BH, self._encoded.x_NF, self._encoded.e_NE)
        out_BO = self._of.outputs(z_BK, self._columns.platform_N, self._nth_B)
        self._out.copy_(out_BO, non_blocking=True)


def _packed(
    shapes: list[tuple[tuple[int, ...], torch.dtype]], device: torch.device, pinned: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """One buffer of zeros, so that it moves in one copy, and tensors of these shapes in it, one after another."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
    starts = np.cumsum([0, *(size + -size % _ALIGN for size in sizes)]).tolist()
    buffer = torch.zeros(starts[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
    parts = zip(shapes, starts, sizes, strict=False)
    return buffer, [buffer[at : at + size].view(dtype).view(shape) for (shape, dtype), at, size in parts]


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step`, run at least once; on CUDA what replays it as one graph. Where that cannot be had (a driver that refuses it,
    say) it is `step` itself, launch by launch, and the log says why. Raises `torch.OutOfMemoryError`."""
    if device.type == "cuda":
        try:
            return _graph(step, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("%s takes no CUDA graph of the student; it is slower launch by launch: %s", device, error)
    step()
    return step


def _graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What replays `step`, which is run for it, as one graph."""
    # Not `torch.cuda.graph`: it collects garbage first, in a worker that scores meanwhile.
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            step()
        aside.synchronize()
        # What other threads do on the card is none of this capture's business.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(aside)
    return graph.replay
