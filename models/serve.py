"""The student on the CPU, as serving runs it: the numbers of `models.student.Student` in fewer passes.

    for each tile of at most TILE events, in order:
      gather    x = clipped (features − mean) / std, rows of the embedding tables   → one input matrix
      product   embed                  then e = silu(· + bias of the platform)
      product   recur                  then h ← a ⊙ h + b in the rows, a and b never written down
      product   trunk of [h, e]        then f = silu(· + bias)
      finish    the platform's heads of [f, x], calibration, masks

A tile's matrices stay in the processor's cache, and no memory is asked for. The three products are torch's; all else is
Numba. It agrees with `Student` up to rounding: another order of sums, and an exponential of its own (`_exp`).

Shapes: N events, T events of a tile, F features, H hidden units, E width of the embedding, I inputs, K what the heads are
linear in (padded with zeros), O outputs of the heads, P platforms (axis of length P + 1; index 0: unknown).
Knows no fold, no category, no training, no device but the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from models.fold import DUPLICATE, FOLDED
from models.student import CLIP, N_GATES, N_LOGITS, Student, heads_of_platforms

TILE = 512
"""Events at once. Measured: fewer pay for the calls, more leave the cache."""
_ALIGN = 16
_DOTS = 5
_LEAST_DECAY = -60.0
_MOST_LOGIT = 30.0
_CATEGORY_HEAD = N_LOGITS

_f = np.float32
_jit = njit(cache=True, nogil=True, error_model="numpy")


class CpuStudent:
    """A student's weights as the kernels read them, and the matrices of one tile. Not for several threads at once."""

    def __init__(self, student: Student, calibration_P32: np.ndarray, can_have_P4: np.ndarray) -> None:
        config, state = student.config, {name: t.detach().float().numpy() for name, t in student.state_dict().items()}
        features, hidden, width, head = config.n_features, config.hidden, config.width, config.head_width
        self.hidden = hidden
        # Columns of the input matrix: f | x | zeros | item | category. The heads read the first K, `embed` all after f.
        pad = -(head + features) % _ALIGN
        self._at_x, self._at_item = head, head + features + pad
        self._at_category = self._at_item + config.item_dim
        n_columns = self._at_category + config.category_dim
        embed_EI, embed_E = state["embed.weight"], state["embed.bias"]
        own = n_columns - head - pad
        weight_IE = np.zeros((n_columns - head, width), _f)
        weight_IE[:features], weight_IE[features + pad :] = embed_EI[:, :features].T, embed_EI[:, features:own].T
        # What a platform's embedding adds is the same for all its events: it joins the bias.
        self._embed_bias_PE = (state["platform.weight"] @ embed_EI[:, own:].T + embed_E).astype(_f)
        self._mean_PF, self._std_PF = (np.ascontiguousarray(state[f"feature_{k}_PF"]) for k in ("mean", "std"))
        self._item_BD, self._category_BD = (np.ascontiguousarray(state[f"{k}.weight"]) for k in ("item", "category"))
        self._recur_bias = state["recur.bias"].copy()
        self._rate_H = np.exp(-state["log_tau_H"]) * student.decays_H.numpy()
        self._trunk_bias = state["trunk.bias"].copy()
        weight_POK, bias_PO = (tensor.float().numpy() for tensor in heads_of_platforms(student))
        n_outputs = weight_POK.shape[1]
        self._head_POK = np.zeros((len(weight_POK), n_outputs + -n_outputs % _DOTS, self._at_item), _f)
        self._head_POK[:, :n_outputs, : head + features] = weight_POK
        self._head_bias_PO = bias_PO
        self._calibration_P32 = np.ascontiguousarray(calibration_P32, _f)
        self._can_have_P4 = np.ascontiguousarray(can_have_P4, bool)

        self._z_TC, self._he_TC = np.zeros((TILE, n_columns), _f), np.zeros((TILE, hidden + width), _f)
        self._embedded_TE, self._gates_T2H = np.zeros((TILE, width), _f), np.zeros((TILE, 2 * hidden), _f)
        self._trunk_TK = np.zeros((TILE, head), _f)
        # Ordinary tensors, also where this is made under `inference_mode`: they are written outside of it.
        with torch.inference_mode(False):
            z, he = torch.from_numpy(self._z_TC), torch.from_numpy(self._he_TC)
            weights = weight_IE, state["recur.weight"].T, state["trunk.weight"].T
            recur_in = he[:, hidden:]
            inputs, outs = (z[:, head:], recur_in, he), (self._embedded_TE, self._gates_T2H, self._trunk_TK)
            self._products = [
                (into, torch.from_numpy(np.ascontiguousarray(weight)), torch.from_numpy(out))
                for into, weight, out in zip(inputs, weights, outs, strict=True)
            ]

    def score(
        self,
        rows: np.ndarray,
        slots: np.ndarray,
        events: np.ndarray,
        features_NF: np.ndarray,
        dt_s_N: np.ndarray,
        status_N: np.ndarray,
        fresh_N: np.ndarray,
        platform_N: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Advances `h` of FOLDED events in rows[slots], from zero where `fresh_N`, in order, and scores every event.

        → p (N, 3) float32, NaN where the platform cannot have the head and for DUPLICATE; gate logits (N, 7) float32;
        wanted (N,) bool: where the category head is to speak. Arrays as the fold leaves them, contiguous; `platform_N`
        int64 in 0 … P. Raises ValueError, before any row has changed, where a length does not fit or a slot lies outside.
        """
        n = len(events)
        if features_NF.shape != (n, self._mean_PF.shape[1]) or rows.dtype["h"].shape != (self.hidden,):
            raise ValueError(f"features {features_NF.shape} and rows do not fit {n} events and {self.hidden} units")
        if not n == len(slots) == len(dt_s_N) == len(status_N) == len(fresh_N) == len(platform_N):
            raise ValueError("slots, dt_s, status, fresh and platform are not as many as the events")
        _check(rows, slots, platform_N, len(self._mean_PF))
        p_N3, gates_NG, wanted_N = np.empty((n, N_LOGITS), _f), np.empty((n, N_GATES), _f), np.empty(n, bool)
        for start in range(0, n, TILE):
            part = slice(start, min(start + TILE, n))
            self._tile(
                rows,
                slots[part],
                events[part],
                features_NF[part],
                dt_s_N[part],
                status_N[part],
                fresh_N[part],
                platform_N[part],
                p_N3[part],
                gates_NG[part],
                wanted_N[part],
            )
        return p_N3, gates_NG, wanted_N

    def _tile(self, rows, slots, events, features, dt_s, status, fresh, platform, p, gates, wanted) -> None:
        n, places = len(events), (self._at_x, self._at_item, self._at_category)
        tables = self._mean_PF, self._std_PF, self._item_BD, self._category_BD
        _gather(events["item"], events["category"], features, platform, tables, places, self._z_TC)
        self._product(0, n)
        _silu(self._embedded_TE, self._embed_bias_PE, platform, self._he_TC, self.hidden)
        self._product(1, n)
        _advance(rows, slots, status, fresh, dt_s, self._rate_H, self._recur_bias, self._gates_T2H, self._he_TC)
        self._product(2, n)
        heads = self._head_POK, self._head_bias_PO, self._calibration_P32, self._can_have_P4
        _finish(self._trunk_TK, self._trunk_bias, self._z_TC, heads, platform, status, p, gates, wanted)

    def _product(self, which: int, n: int) -> None:
        into, weight, out = self._products[which]
        torch.mm(into[:n], weight, out=out[:n])


@_jit
def _exp(x):
    """e^x of a float32, x held within ±87: its relative error is below 1.2e-7. NaN stays NaN.

    x = k ln 2 + r with |r| ≤ ½ ln 2; e^r by its minimax polynomial of degree 7; 2^k by the exponent's bits. Numba's own
    exponential is a call an element; this compiles to vector instructions.
    """
    x = _f(-87.0) if x < _f(-87.0) else x
    x = _f(87.0) if x > _f(87.0) else x
    biased = np.int32(x * _f(1.4426950408889634) + _f(127.5))
    k = _f(np.int32(biased - np.int32(127)))
    r = x - k * _f(0.693359375)
    r = r - k * _f(-2.12194440e-4)
    y = _f(1.9875691500e-4)
    y = y * r + _f(1.3981999507e-3)
    y = y * r + _f(8.3334519073e-3)
    y = y * r + _f(4.1665795894e-2)
    y = y * r + _f(1.6666665459e-1)
    y = y * r + _f(5.0000001201e-1)
    y = y * r * r + r + _f(1.0)
    return y * np.int32(biased << np.int32(23)).view(np.float32)


@_jit
def _check(rows, slots, platform_N, n_platforms):
    for i in range(len(slots)):
        if not 0 <= slots[i] < len(rows):
            raise ValueError("a slot lies outside the rows")
        if not 0 <= platform_N[i] < n_platforms:
            raise ValueError("a platform that the model has no row of")


@_jit
def _gather(item_N, category_N, features_NF, platform_N, tables, places, z_TC):
    mean_PF, std_PF, item_BD, category_BD = tables
    at_x, at_item, at_category = places
    for i in range(len(platform_N)):
        features, mean, std = features_NF[i], mean_PF[platform_N[i]], std_PF[platform_N[i]]
        x = z_TC[i, at_x : at_x + len(features)]
        for j in range(len(x)):
            value = (features[j] - mean[j]) / std[j]
            value = _f(-CLIP) if value < _f(-CLIP) else value
            x[j] = _f(CLIP) if value > _f(CLIP) else value
        _row_of(item_BD, item_N[i], z_TC[i, at_item:])
        _row_of(category_BD, category_N[i], z_TC[i, at_category:])


@_jit
def _row_of(table_BD, hashed, out):
    """The table's row of a hash; row 0 is kept for none."""
    bucket = np.int64(0)
    if hashed != 0:
        bucket = np.int64(1) + np.int64(np.uint32(hashed) % np.uint32(len(table_BD) - 1))
    row = table_BD[bucket]
    for j in range(len(row)):
        out[j] = row[j]


@_jit
def _silu(in_TE, bias_PE, platform_N, out_TC, at):
    for i in range(len(platform_N)):
        row, bias, out = in_TE[i], bias_PE[platform_N[i]], out_TC[i, at:]
        for j in range(len(row)):
            value = row[j] + bias[j]
            out[j] = value / (_f(1.0) + _exp(-value))


@_jit
def _advance(rows, slots, status, fresh, dt_s, rate_H, bias_2H, gates_T2H, he_TC):
    """h ← a ⊙ h + b of each folded event, event by event; h as it then is into the first columns of he."""
    hidden = len(rate_H)
    bias, candidate_bias = bias_2H[:hidden], bias_2H[hidden:]
    for i in range(len(slots)):
        h, out = rows[slots[i]]["h"], he_TC[i, :hidden]
        if fresh[i]:
            h[:] = _f(0.0)
        if status[i] == FOLDED:
            gate, candidate, dt = gates_T2H[i, :hidden], gates_T2H[i, hidden:], dt_s[i]
            for j in range(hidden):
                shut = _exp(-(gate[j] + bias[j]))
                open_ = _f(1.0) / (_f(1.0) + shut)
                faded = -dt * rate_H[j]
                faded = _f(_LEAST_DECAY) if faded < _f(_LEAST_DECAY) else faded
                # 1 − gate as shut · open: no cancellation where the gate is all but 1.
                out[j] = open_ * _exp(faded) * h[j] + (shut * open_) * (candidate[j] + candidate_bias[j])
            h[:] = out
        else:
            out[:] = h


# Sums in any order: these are outputs, no state. Without it the dot products would not be vector instructions.
@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _five_dots(a_K, w_OK, o, out_O):
    """out[o … o + 4] = w[o … o + 4] · a. Five at once: `a` is read once for all, and their sums fit the registers."""
    w_0, w_1, w_2, w_3, w_4 = w_OK[o], w_OK[o + 1], w_OK[o + 2], w_OK[o + 3], w_OK[o + 4]
    s_0 = s_1 = s_2 = s_3 = s_4 = _f(0.0)
    for k in range(len(w_0)):
        a = a_K[k]
        s_0 += a * w_0[k]
        s_1 += a * w_1[k]
        s_2 += a * w_2[k]
        s_3 += a * w_3[k]
        s_4 += a * w_4[k]
    out_O[o], out_O[o + 1], out_O[o + 2], out_O[o + 3], out_O[o + 4] = s_0, s_1, s_2, s_3, s_4


@_jit
def _finish(trunk_TK, trunk_bias, z_TC, heads, platform_N, status_N, p_N3, gates_NG, wanted_N):
    weight_POK, bias_PO, calibration_P32, can_have_P4 = heads
    out_O = np.empty(weight_POK.shape[1], np.float32)
    for i in range(len(platform_N)):
        trunk, z, platform = trunk_TK[i], z_TC[i], platform_N[i]
        for j in range(len(trunk_bias)):
            value = trunk[j] + trunk_bias[j]
            z[j] = value / (_f(1.0) + _exp(-value))
        for o in range(0, len(out_O), _DOTS):
            _five_dots(z, weight_POK[platform], o, out_O)
        there = status_N[i] != DUPLICATE
        wanted_N[i] = there and can_have_P4[platform, _CATEGORY_HEAD]
        for o in range(N_LOGITS):
            logit = (out_O[o] + bias_PO[platform, o]) * calibration_P32[platform, o, 0] + calibration_P32[platform, o, 1]
            logit = _f(-_MOST_LOGIT) if logit < _f(-_MOST_LOGIT) else logit
            logit = _f(_MOST_LOGIT) if logit > _f(_MOST_LOGIT) else logit
            p = _f(1.0) / (_f(1.0) + _exp(-logit))
            p_N3[i, o] = p if there and can_have_P4[platform, o] else _f(np.nan)
        for o in range(N_GATES):
            gates_NG[i, o] = out_O[N_LOGITS + o] + bias_PO[platform, N_LOGITS + o]
