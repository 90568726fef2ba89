"""What a platform with few labels may learn from the others: a ladder of strategies, and a guarded choice among them.

    other platforms ─► pretrain ─► source ─┬─► a rung: changes what it says it changes, no more ─► network ─┐
    the target's labelled users ───────────┴─► scratch: the target's users alone ──────────────► network ───┴─► choose
    each other platform in the target's place, with as few users ─► rehearse: what each rung gained there ──┘

    rung            changes, of the source                                               learns from
    scratch         all, anew                                                            the target's users
    pooled          all, anew                                                            every platform together
    finetune_head   what renormalise does, and the target's rows of the binary heads     the target's users
    loose_head      the same, pulled less towards the shared head                        the target's users
    finetune        the body, the target's rows of heads and platform table              the target's users
    interpolate     the same; θ' = α θ_source + (1 − α) θ_finetuned, an α for each block  α: the validation
    adapter         the target's rows of the heads: W (f + U D f), U D of low rank, folded into W
    lora            W + U D of the body's three matrices, folded in; the target's biases of the heads
    adversarial     the body and the shared heads, against a critic that tells the target's events from others
    distil_source   all, anew                                                            labels and the source's word
    renormalise     the target's mean and scale of each feature                          unlabelled events

Low rank and adapters are folded into the weights afterwards, exactly: what comes out is a `Network` whose student the
artifact publishes as any other. A rung that changes the body changes what other platforms get: its student is for the
target. Rungs that change only the target's rows leave every other platform's scores as they were.

Shapes: M examples, T tasks, P platforms (row 0: shared), K width before the heads.
Knows nothing of Kafka, files or the gate.

Sources: interpolated weights, Wortsman et al. (CVPR 2022); residual adapters, Rebuffi et al. (NeurIPS 2017); low rank, Hu et
al. (ICLR 2022); reversed gradients, Ganin et al. (JMLR 2016); normalisation of the target, Li et al. (Pattern Recognition
2018); distillation, Hinton et al. (2015).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.config import FoldConfig
from models.events import KINDS
from models.fold import FEATURE_COLUMNS
from models.scorer import Model
from models.student import N_LOGITS, Columns, Student, StudentConfig, linear_scan
from trainer import metrics
from trainer.examples import Check, Examples, check_loss
from trainer.fit import Fitted, Network, Schedule, fit, logits, of_users_with, put
from trainer.train import Trained, calibrate, category_targets, start_at_base_rates

RANK = 4
"""Of a low-rank change."""
LEAST_STD = 1e-3
"""A feature that varies less is constant, as for `Student.fit_normalisation`: it stays on its own scale."""
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
BLOCKS: dict[str, tuple[str, ...]] = {
    "tables": ("student.item.weight", "student.category.weight", "student.platform.weight"),
    "embed": ("student.embed.weight", "student.embed.bias"),
    "recur": ("student.recur.weight", "student.recur.bias", "student.log_tau_H"),
    "trunk": ("student.trunk.weight", "student.trunk.bias"),
    "heads": ("student.head_weight_POK", "student.head_bias_PO", "more_weight_PXK", "more_bias_PX"),
}
"""What `interpolate` chooses an α for."""
LEAST_STEPS, MOST_EPOCHS = 80, 40
"""Few users make few batches: epochs are repeated until there are so many steps."""
RIDGE, LOOSE_RIDGE = 500.0, 150.0
"""Pulls of a new head towards the shared one, in units of labels: with tens to hundreds of users, and with thousands. Not
chosen anew for each target, but by the choice of a rung: a handful of users to choose by costs more than the best strength
gains."""
REHEARSALS = 4
"""Draws of users on each platform that stands in for the target."""
GROUPS = 20
"""Of users, at most, in the guard's jackknife."""
SOURCE_STRANGERS = 0.3
"""Share of users whom a source learns from as if of an unknown platform."""
FUNNEL = KINDS[: KINDS.index("purchase") + 1]
"""Kinds of events in the order of how much they mean."""
REVERSED = 0.1
"""How much of the critic's gradient, reversed, reaches the body."""


class Task(NamedTuple):
    """What a rung is given. Changes nothing of it."""

    row: int
    """The target's row in the model's tables."""
    source: Network
    """Of `pretrain`, then `adopt`."""
    own: Examples
    """The target's labelled users."""
    rest: Examples
    """Of the other platforms."""
    unlabelled_NF: np.ndarray
    """Raw features of the target's events, labelled or not."""
    q_own_MG: np.ndarray
    q_rest_MG: np.ndarray
    """As `fit` takes them."""
    schedule: Schedule
    check: Check = lambda: None


Rung = Callable[[Task], Network]


def subset(examples: Examples, at: np.ndarray) -> Examples:
    """The examples at (A,) ascending positions: whole users."""
    place = torch.from_numpy(at)
    arrays = {
        field.name: getattr(examples, field.name)[at]
        for field in dataclasses.fields(examples)
        if field.name not in ("columns", "tasks") and getattr(examples, field.name) is not None
    }
    return dataclasses.replace(examples, columns=Columns(*(column[place] for column in examples.columns)), **arrays)


def together(one: Examples, other: Examples) -> Examples:
    """Both, one after another; their users are different ones."""
    arrays = {
        field.name: np.concatenate([getattr(one, field.name), getattr(other, field.name)])
        for field in dataclasses.fields(one)
        if field.name not in ("columns", "tasks") and getattr(one, field.name) is not None
    }
    arrays["user_M"] = np.concatenate([one.user_M, other.user_M + one.user_M.max(initial=-1) + 1])
    columns = Columns(*(torch.cat(pair) for pair in zip(one.columns, other.columns, strict=True)))
    return dataclasses.replace(one, columns=columns, **arrays)


# ── the source ───────────────────────────────────────────────────────────────────────────────────────────────────────


def pretrain(
    rest: Examples,
    q_MG: np.ndarray,
    config: StudentConfig,
    schedule: Schedule,
    check: Check = lambda: None,
) -> Network:
    """A network that learns to serve platforms it has not seen: of `rest`, with one shared head (row 0) and no word on
    which platform an event is from, except its standardisation and its base rates. Of so many users as SOURCE_STRANGERS not
    even the standardisation is the platform's own: what is learned of them does not lean on it. It is silent on the
    calendar, since hours and days off are a place's own, and on what `_generalised` says."""
    timeless = _without_calendar(rest)
    varies_PF = _varies(timeless)
    torch.manual_seed(schedule.seed)
    student = Student(config, schedule.dropout)
    student.fit_normalisation(timeless.columns.features_NF.numpy(), rest.platform_M)
    network = Network(student, len(rest.tasks))
    start_at_base_rates(network, rest)
    with torch.no_grad():
        student.platform.weight.zero_()
        # No gradient reaches what varies nowhere: its weights would stay as they began, and speak by chance on a target.
        student.embed.weight[:, : config.n_features][:, ~varies_PF.any(axis=0)] = 0.0
    with _rows_only(network, 0, biases=False) as rows:
        fit(network, rows + _body(student), timeless, q_MG, schedule._replace(stranger=SOURCE_STRANGERS), check=check)
    _generalised(network, varies_PF)
    student.fit_normalisation(rest.columns.features_NF.numpy(), rest.platform_M)
    return network


def _without_calendar(examples: Examples) -> Examples:
    features_NF = examples.columns.features_NF.clone()
    features_NF[:, FEATURE_COLUMNS["calendar"]] = 0.0
    return dataclasses.replace(examples, columns=examples.columns._replace(features_NF=features_NF))


def _varies(examples: Examples) -> np.ndarray:
    """(platforms that occur, F) bool."""
    features_MF = examples.columns.features_NF.numpy()
    std_PF = [
        features_MF[examples.platform_M == row].std(axis=0, dtype=np.float64) for row in np.unique(examples.platform_M)
    ]
    return np.stack(std_PF) >= LEAST_STD


@torch.no_grad()
def _generalised(network: Network, varies_PF: np.ndarray) -> None:
    """Of what one platform alone varied (its carts) the source is silent: it had to be learned from, or its neighbours
    would have learned to speak for it, but it is that platform's own. The kind of the event itself stays, and a kind that
    no platform has is taken for the next one up the funnel that some platform has (a view for a favorite)."""
    kinds = FEATURE_COLUMNS["kind"]
    alone_F = (varies_PF.sum(axis=0) == 1) & (len(varies_PF) > 1)
    alone_F[kinds] = False
    known_K = varies_PF.any(axis=0)[kinds][: len(FUNNEL)]
    next_up = {i: i + int(known_K[i:].argmax()) for i in np.flatnonzero(~known_K) if known_K[i:].any()}
    student, width = network.student, network.student.config.head_width
    for weight in (student.embed.weight, student.head_weight_POK[..., width:], network.more_weight_PXK[..., width:]):
        weight[..., np.flatnonzero(alone_F)] = 0.0
        of_kind = weight[..., kinds]
        for i, j in next_up.items():
            of_kind[..., i] = of_kind[..., j]


def adopt(source: Network, row: int, own: Examples, least: int = 64) -> Network:
    """A copy whose row for the target is that of an unknown platform, but standardised by the events of the target's
    users (of up to the last label to learn) where there are `least`."""
    network = copy.deepcopy(source)
    student = network.student
    until = own.ts_M[own.learn_MT.any(axis=1)].max(initial=-1)
    with torch.no_grad():
        student.platform.weight[row] = student.platform.weight[0]
        for tensor in (student.head_weight_POK, student.head_bias_PO, network.more_weight_PXK, network.more_bias_PX):
            tensor[row] = 0.0
    _standardise(student, row, own.columns.features_NF.numpy()[own.ts_M <= until], least)
    return network


@torch.no_grad()
def _standardise(student: Student, row: int, features_NF: np.ndarray, least: int) -> None:
    if len(features_NF) >= least:
        std_F = features_NF.std(axis=0, dtype=np.float64)
        student.feature_mean_PF[row] = torch.from_numpy(features_NF.mean(axis=0, dtype=np.float64))
        student.feature_std_PF[row] = torch.from_numpy(np.where(std_F < LEAST_STD, 1.0, std_F))
    else:
        student.feature_mean_PF[row] = student.feature_mean_PF[0]
        student.feature_std_PF[row] = student.feature_std_PF[0]


# ── what is learned: rows, low rank ──────────────────────────────────────────────────────────────────────────────────


class _Row(nn.Module):
    """A tensor of which one row is learned; the others stay, byte for byte."""

    def __init__(self, tensor: Tensor, row: int) -> None:
        super().__init__()
        self.row = row
        self.value = nn.Parameter(tensor[row].detach().clone())

    def forward(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor[: self.row], self.value[None], tensor[self.row + 1 :]])


class _LowRank(nn.Module):
    """W + U D; U begins at zero."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        outs, ins = matrix.shape
        self.up = nn.Parameter(torch.zeros(outs, RANK))
        self.down = nn.Parameter(torch.randn(RANK, ins) / ins**0.5)

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self.up @ self.down


class _Residual(nn.Module):
    """The target's row of the heads when what comes before them is f + U D f: (W₀ + W_p)(1 + U D) − W₀. U begins at zero."""

    def __init__(self, row: int, up: nn.Parameter, down: nn.Parameter) -> None:
        super().__init__()
        self.row, self.up, self.down = row, up, down

    def forward(self, weight_POK: Tensor) -> Tensor:
        row = self.row
        own_OK = weight_POK[row] + (weight_POK[0] + weight_POK[row]) @ self.up @ self.down
        return torch.cat([weight_POK[:row], own_OK[None], weight_POK[row + 1 :]])


@contextmanager
def _folded_in(changes: list[tuple[nn.Module, str, nn.Module]]) -> Iterator[list[Tensor]]:
    """(module, tensor's name, change) in place while the block lasts, for its parameters to learn; then the weights are what
    the changes made of them."""
    parameters: dict[int, Tensor] = {}
    for module, name, change in changes:
        parametrize.register_parametrization(module, name, change)
        parameters |= {id(parameter): parameter for parameter in change.parameters()}
    yield list(parameters.values())
    for module, name, _ in changes:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _rows(network: Network, row: int, weights: bool = True, biases: bool = True) -> list[tuple[nn.Module, str, nn.Module]]:
    student = network.student
    of_heads = [(student, "head_weight_POK"), (network, "more_weight_PXK")] * weights
    of_heads += [(student, "head_bias_PO"), (network, "more_bias_PX")] * biases
    return [(module, name, _Row(getattr(module, name), row)) for module, name in of_heads if getattr(module, name).shape[1]]


def _rows_only(network: Network, row: int, weights: bool = True, biases: bool = True):
    """The rows of the heads, to learn."""
    return _folded_in(_rows(network, row, weights, biases))


def _body(student: Student) -> list[Tensor]:
    """What all platforms share, without heads and platform table."""
    apart = {"head_weight_POK", "head_bias_PO", "platform.weight"}
    return [p for name, p in student.named_parameters() if name not in apart and "parametrizations" not in name]


def _repeated(schedule: Schedule, events: int) -> Schedule:
    """Enough epochs for LEAST_STEPS batches of 512; it stops early, a quarter of them without progress."""
    epochs = int(np.clip(LEAST_STEPS * 512 // max(events, 1), schedule.epochs, MOST_EPOCHS))
    return schedule._replace(epochs=epochs, patience=max(2, epochs // 4))


def _fit(task: Task, network: Network, parameters: list[Tensor], rate: float = 1.0, **more) -> Fitted:
    """On the target's users; checked on theirs."""
    schedule = _repeated(task.schedule, len(task.own))
    if not task.own.check_MT.any():
        schedule = schedule._replace(patience=None)
    schedule = schedule._replace(rate=schedule.rate * rate)
    return fit(network, parameters, task.own, task.q_own_MG, schedule, check=task.check, **more)


# ── the rungs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _anew(task: Task, examples: Examples) -> Network:
    torch.manual_seed(task.schedule.seed)
    student = Student(task.source.student.config, task.schedule.dropout)
    student.fit_normalisation(examples.columns.features_NF.numpy(), examples.platform_M)
    with torch.no_grad():
        for name in ("feature_mean_PF", "feature_std_PF"):
            getattr(student, name)[task.row] = getattr(task.source.student, name)[task.row]
    network = Network(student, len(examples.tasks))
    start_at_base_rates(network, examples)
    return network


def scratch(task: Task) -> Network:
    network = _anew(task, task.own)
    _fit(task, network, list(network.parameters()))
    return network


def pooled(task: Task) -> Network:
    both = together(task.rest, task.own)
    network = _anew(task, both)
    q_MG = np.concatenate([task.q_rest_MG, task.q_own_MG])
    schedule = task.schedule._replace(patience=task.schedule.patience if task.own.check_MT.any() else None)
    fit(network, list(network.parameters()), _checked_on(both, task.row), q_MG, schedule, check=task.check)
    return network


def _checked_on(examples: Examples, row: int) -> Examples:
    """Checked on one platform only."""
    return dataclasses.replace(examples, check_MT=examples.check_MT & (examples.platform_M == row)[:, None])


def finetune_head(task: Task) -> Network:
    """The body frozen, a new head is a convex problem: solved to the end, ridge towards the shared head, on features
    standardised by the target's unlabelled events. The gates of the categories stay."""
    return _with_new_head(task, RIDGE)


def loose_head(task: Task) -> Network:
    """The same, pulled less towards the shared head: what a target with many labels gains by."""
    return _with_new_head(task, LOOSE_RIDGE)


def _with_new_head(task: Task, ridge: float) -> Network:
    network = renormalise(task).eval()
    weight_TK, bias_T = _solve(network, task, _before_heads(network, task.own), ridge)
    with torch.no_grad():
        network.student.head_weight_POK[task.row, :N_LOGITS] = weight_TK[:N_LOGITS]
        network.student.head_bias_PO[task.row, :N_LOGITS] = bias_T[:N_LOGITS]
        network.more_weight_PXK[task.row] = weight_TK[N_LOGITS:]
        network.more_bias_PX[task.row] = bias_T[N_LOGITS:]
    return network


@torch.no_grad()
def _before_heads(network: Network, examples: Examples) -> Tensor:
    """(M, K) what every head is linear in."""
    student = network.student
    x_NF, e_NE, a_NH, b_NH = student.encode(examples.columns)
    return student.before_heads(linear_scan(a_NH, b_NH, torch.from_numpy(examples.starts_M)), x_NF, e_NE)


def _shared(network: Network) -> tuple[Tensor, Tensor]:
    """The shared head's weight (T, K) and bias (T,)."""
    student = network.student
    weight = torch.cat([student.head_weight_POK[0, :N_LOGITS], network.more_weight_PXK[0]]).detach()
    return weight, torch.cat([student.head_bias_PO[0, :N_LOGITS], network.more_bias_PX[0]]).detach()


def _solve(network: Network, task: Task, z_MK: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """→ the target's rows (T, K) and (T,) that minimise the sum of the labels' log-losses + ½ ridge |rows|²."""
    learn_MT = torch.from_numpy(task.own.learn_MT)
    of = learn_MT.any(dim=1)
    z_NK, learn_NT, y_NT = z_MK[of], learn_MT[of].float(), torch.from_numpy(task.own.y_MT)[of]
    weight_TK, bias_T = _shared(network)
    start_NT = z_NK @ weight_TK.T + bias_T
    own_TK = torch.zeros_like(weight_TK, requires_grad=True)
    own_T = torch.zeros_like(bias_T, requires_grad=True)
    optimiser = torch.optim.LBFGS([own_TK, own_T], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits_NT = start_NT + z_NK @ own_TK.T + own_T
        losses_NT = nn.functional.binary_cross_entropy_with_logits(logits_NT, y_NT, reduction="none")
        total = (losses_NT * learn_NT).sum() + 0.5 * ridge * (own_TK**2).sum() + 0.5 * own_T.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    return own_TK.detach(), own_T.detach()


def finetune(task: Task) -> Network:
    network = copy.deepcopy(task.source)
    torch.manual_seed(task.schedule.seed)
    platform = network.student.platform
    with _folded_in([*_rows(network, task.row), (platform, "weight", _Row(platform.weight, task.row))]) as rows:
        _fit(task, network, rows + _body(network.student), rate=0.3)
    return network


def interpolate(task: Task, tuned: Network | None = None) -> Network:
    """The α of each block that is best on validation, block after block; ½ where there is nothing to check by. `tuned`:
    what `finetune` gave, where that is known already."""
    network = copy.deepcopy(tuned) if tuned is not None else finetune(task)
    tensors, source = dict(network.named_parameters()), task.source.state_dict()
    ours = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def mix(block: str, alpha: float) -> None:
        # Of equal values a mixture may differ in the last bit: what was not tuned is left alone.
        names = [name for name in BLOCKS[block] if not torch.equal(ours[name], source[name])]
        put([tensors[name] for name in names], [alpha * source[name] + (1.0 - alpha) * ours[name] for name in names])

    if not task.own.check_MT.any():
        for block in BLOCKS:
            mix(block, 0.5)
        return network
    for block in BLOCKS:
        losses = []
        for alpha in ALPHAS:
            mix(block, alpha)
            losses.append(_loss_on_check(network, task.own))
            task.check()
        mix(block, ALPHAS[int(np.argmin(losses))])
    return network


def _loss_on_check(network: Network, examples: Examples) -> float:
    at = of_users_with(examples, examples.check_MT)
    logits_MT = np.full(examples.y_MT.shape, np.nan, np.float32)
    logits_MT[at] = logits(network, examples, at)
    return check_loss(examples, logits_MT)


def adapter(task: Task) -> Network:
    network = copy.deepcopy(task.source)
    torch.manual_seed(task.schedule.seed)
    width = network.student.head_weight_POK.shape[2]
    up, down = nn.Parameter(torch.zeros(width, RANK)), nn.Parameter(torch.randn(RANK, width) / width**0.5)
    changes = [(module, name, _Residual(task.row, up, down)) for module, name, _ in _rows(network, task.row, biases=False)]
    with _folded_in(changes + _rows(network, task.row, weights=False)) as parameters:
        _fit(task, network, parameters)
    return network


def lora(task: Task) -> Network:
    network = copy.deepcopy(task.source)
    torch.manual_seed(task.schedule.seed)
    student = network.student
    changes = [(part, "weight", _LowRank(part.weight)) for part in (student.embed, student.recur, student.trunk)]
    with _folded_in(changes + _rows(network, task.row, weights=False)) as parameters:
        _fit(task, network, parameters)
    return network


def distil_source(task: Task) -> Network:
    network = _anew(task, task.own)
    everything = np.arange(len(task.own))
    _fit(task, network, list(network.parameters()), soft_MT=logits(task.source, task.own, everything))
    return network


def renormalise(task: Task) -> Network:
    network = copy.deepcopy(task.source)
    _standardise(network.student, task.row, task.unlabelled_NF, least=1)
    return network


def adversarial(task: Task) -> Network:
    """The shared heads and the body go on learning from all platforms; a critic on f learns which events are the target's,
    and its gradient reaches the body reversed."""
    network = copy.deepcopy(task.source)
    torch.manual_seed(task.schedule.seed)
    both = _with_domain(together(task.rest, task.own), task.row)
    criticised = _Criticised(network)
    with _rows_only(network, 0) as rows:
        parameters = rows + _body(network.student) + list(criticised.critic.parameters())
        schedule = task.schedule._replace(
            rate=task.schedule.rate * 0.3, patience=task.schedule.patience if task.own.check_MT.any() else None
        )
        q_MG = np.concatenate([task.q_rest_MG, task.q_own_MG])
        fit(criticised, parameters, _checked_on(both, task.row), q_MG, schedule, check=task.check)
    criticised.stop()
    return network


def _with_domain(examples: Examples, row: int) -> Examples:
    """A further task: is it an event of the target? Of events that lie before each platform's last label to learn."""
    learns_M = examples.learn_MT.any(axis=1)
    known_M = np.zeros(len(examples), bool)
    for platform in np.unique(examples.platform_M):
        of = examples.platform_M == platform
        known_M |= of & (examples.ts_M <= examples.ts_M[of & learns_M].max(initial=-1))
    column = (examples.platform_M == row).astype(np.float32)[:, None]
    return dataclasses.replace(
        examples,
        tasks=(*examples.tasks, "domain"),
        y_MT=np.concatenate([examples.y_MT, column], axis=1),
        learn_MT=np.concatenate([examples.learn_MT, known_M[:, None]], axis=1),
        check_MT=np.concatenate([examples.check_MT, np.zeros((len(examples), 1), bool)], axis=1),
    )


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f_NK: Tensor) -> Tensor:
        return f_NK.view_as(f_NK)

    @staticmethod
    def backward(ctx, grad_NK: Tensor):
        return -REVERSED * grad_NK


class _Criticised(nn.Module):
    """A network with one more task, whose logit a critic reads from what the trunk gives, gradient reversed."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.student, self.n_tasks = network, network.student, network.n_tasks + 1
        self.critic = nn.Sequential(nn.Linear(network.student.config.head_width, 32), nn.ReLU(), nn.Linear(32, 1))
        self._trunk_NK: Tensor | None = None
        self._hook = network.student.trunk.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._trunk_NK = output

    def forward(self, columns: Columns, starts_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_NT, gates_NG, _ = self.network(columns, starts_N)
        domain_N1 = self.critic(_Reversed.apply(nn.functional.silu(self._trunk_NK)))
        logits_NT = torch.cat([logits_NT, domain_N1], dim=1)
        return logits_NT, gates_NG, logits_NT

    def stop(self) -> None:
        self._hook.remove()


RUNGS: dict[str, Rung] = {
    rung.__name__: rung
    for rung in (
        scratch, pooled, finetune_head, loose_head, finetune, interpolate, adapter, lora, adversarial, distil_source,
        renormalise,
    )
}  # fmt: skip


def climb_all(task: Task, names: Iterable[str] = tuple(RUNGS)) -> dict[str, Network]:
    """Rung → its network."""
    networks: dict[str, Network] = {}
    for name in names:
        more = {"tuned": networks.get("finetune")} if name == "interpolate" else {}
        networks[name] = RUNGS[name](task, **more)
    return networks


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────


REHEARSED: tuple[str, ...] = ("finetune_head", "loose_head", "renormalise")
"""Rungs that cost little and change nothing that the platforms share; of the others the target's own labels must speak."""


class Gain(NamedTuple):
    """How much AUC a rung has over `scratch`, and how uncertain that is."""

    value: float
    variance: float
    freedom: float = np.inf
    """Degrees of freedom of the variance; below 1 nothing is known."""

    def high(self, alpha: float) -> float:
        """The upper end of its interval at level 1 − `alpha`, Student's t."""
        if self.freedom < 1:
            return np.inf
        return float(self.value + stats.t.ppf(1 - alpha / 2, self.freedom) * np.sqrt(self.variance))


class Rehearsal(NamedTuple):
    """What rungs gained on platforms that stood in for the target, and how far the few labels there could be believed. All
    of the mean AUC over the heads, more than that of `scratch`."""

    gains: dict[str, float]
    """Rung → mean over platforms and draws."""
    spread: float
    """Variance of a gain over platforms and draws of users."""
    bias: float
    """What the few users' own validation said, less what was gained: early stopping there flatters `scratch`."""
    error: float
    """Variance of the same."""

    def expects(self, rung: str, seen: Gain) -> float:
        """The mean of what was rehearsed and of what was seen on the target (without the bias), each by the other's
        variance. A rung that was not rehearsed is expected to gain nothing; of one user nothing can be seen."""
        before = self.gains.get(rung, 0.0)
        if seen.freedom < 1:
            return before
        error = max(self.error, seen.variance)
        total = error + self.spread
        return ((seen.value - self.bias) * self.spread + before * error) / total if total > 0 else before


def understudy(
    rest: Examples,
    q_MG: np.ndarray,
    row: int,
    config: StudentConfig,
    schedule: Schedule,
    *,
    source: Network | None = None,
    check: Check = lambda: None,
) -> Task:
    """The platform `row` of `rest` in the target's place, with all its users. `source`: what `pretrain` gave of the others
    of `rest`, where that is there already."""
    of, others = np.flatnonzero(rest.platform_M == row), np.flatnonzero(rest.platform_M != row)
    own, others_rest = subset(rest, of), subset(rest, others)
    if source is None:
        source = pretrain(others_rest, q_MG[others], config, schedule, check)
    own = dataclasses.replace(own, learn_next_M=np.zeros(len(own), bool))
    unlabelled_NF = own.columns.features_NF.numpy()[own.ts_M <= own.ts_M[own.learn_MT.any(axis=1)].max(initial=-1)]
    q_own_MG = np.zeros((len(own), q_MG.shape[1]), np.float32)
    return Task(row, source, own, others_rest, unlabelled_NF, q_own_MG, q_MG[others], schedule, check)


def labels_a_user(own: Examples) -> tuple[float, float]:
    """Examples to learn from, and to check by, for each user who has any."""
    users = len(np.unique(own.user_M[(own.learn_MT | own.check_MT).any(axis=1)]))
    return own.learn_MT.any(axis=1).sum() / max(users, 1), own.check_MT.any(axis=1).sum() / max(users, 1)


def _thinned(own: Examples, labels: tuple[float, float], rng: np.random.Generator) -> Examples:
    """With no more labels a user than that, left out at random."""
    shares = [min(1.0, wanted / max(has, 1e-9)) for wanted, has in zip(labels, labels_a_user(own), strict=True)]
    learn_M1, check_M1 = (rng.random((len(own), 1)) < share for share in shares)
    return dataclasses.replace(own, learn_MT=own.learn_MT & learn_M1, check_MT=own.check_MT & check_M1)


def rehearse(
    understudies: Iterable[Task],
    users: int,
    labels: tuple[float, float],
    names: Iterable[str],
    *,
    draws: int = REHEARSALS,
    most: int = 600,
) -> Rehearsal:
    """What the rungs `names` gain over `scratch` on each understudy by so many of its labelled users, drawn anew `draws`
    times (once where that is all of them), with no more `labels_a_user`; judged on the examples to check by of up to `most`
    users, drawn or not. A head that nobody is left to teach to an understudy says nothing."""
    gained: dict[str, list[float]] = {name: [] for name in names if name != "scratch"}
    mistakes: list[float] = []
    for whole in understudies:
        rng = np.random.default_rng([whole.row, users])
        own, judged_MT = whole.own, whole.own.check_MT
        labelled = np.unique(own.user_M[(own.learn_MT | judged_MT).any(axis=1)])
        judges = np.unique(own.user_M[judged_MT.any(axis=1)])
        if len(judges) > most:
            judges = rng.choice(judges, most, replace=False)
        judge_at = np.flatnonzero(np.isin(own.user_M, judges))
        judge = subset(own, judge_at)
        for draw in range(draws if users < len(labelled) else 1):
            drawn = rng.choice(labelled, min(users, len(labelled)), replace=False)
            few = _thinned(subset(own, np.flatnonzero(np.isin(own.user_M, drawn))), labels, rng)
            task = whole._replace(
                source=adopt(whole.source, whole.row, few),
                own=few,
                q_own_MG=whole.q_own_MG[: len(few)],
                schedule=whole.schedule._replace(seed=whole.schedule.seed + draw),
            )
            networks = climb_all(task, ["scratch", *gained])
            taught = [t for t in range(len(own.tasks)) if whole.rest.learn_MT[:, t].any()]
            said = {name: logits(network, judge, np.arange(len(judge))) for name, network in networks.items()}
            on_few = {name: logits(network, few, np.arange(len(few))) for name, network in networks.items()}
            for name in gained:
                gain = _more_macro(judge, taught, judged_MT[judge_at], said[name], said["scratch"])
                if gain.freedom < 1:
                    continue
                gained[name].append(gain.value)
                seen = _more_macro(few, taught, few.check_MT, on_few[name], on_few["scratch"])
                mistakes += [seen.value - gain.value] * (seen.freedom >= 1)
            whole.check()
    varied = [gain - np.mean(gains) for gains in gained.values() for gain in gains]
    return Rehearsal(
        {name: float(np.mean(gains)) if gains else 0.0 for name, gains in gained.items()},
        float(np.mean(np.square(varied))) if varied else 1.0,
        float(np.mean(mistakes)) if mistakes else 0.0,
        float(np.var(mistakes)) if mistakes else 0.0,
    )


class Choice(NamedTuple):
    """Which rung, and why."""

    rung: str
    reasons: dict[str, str]
    """Rung → what was found on validation, with the numbers."""
    unguarded: str
    """What would be taken without the guard and without scratch: the best in sum."""


def choose(own: Examples, logits_of: Mapping[str, np.ndarray], rehearsed: Rehearsal | None = None) -> Choice:
    """The rung with the greatest AUC in sum over the heads, on the examples to check by and, as far as those leave it open,
    by what was `rehearsed` (`Rehearsal.expects`). A rung is out that is significantly worse than `scratch` on a head of the
    target (paired, user-clustered, 5 % over all heads); where none is better in sum it is `scratch`. `logits_of`: rung →
    (M, T) of `own`, `scratch` among them. With nothing to check by and nothing rehearsed it is `scratch`.

    By AUC, since a calibration follows: of a hundred labels the log-loss says most about who is near the base rate. By what
    is later than all that was learned from: labels of the same days, of users left out, favour whoever learned the days."""
    heads = _heads(own, range(len(own.tasks)), own.check_MT)
    theirs = logits_of["scratch"]
    reasons, sums, allowed = {}, {}, {}
    for name in (name for name in logits_of if name != "scratch"):
        of_heads = {
            own.tasks[t]: _more_auc(own.y_MT[at, t], logits_of[name][at, t], theirs[at, t], own.user_M[at])
            for t, at in heads.items()
        }
        worse = [title for title, gain in of_heads.items() if gain.high(0.05 / len(heads)) < 0]
        if rehearsed:
            seen = _more_macro(own, range(len(own.tasks)), own.check_MT, logits_of[name], theirs)
            sums[name] = max(1, len(heads)) * rehearsed.expects(name, seen)
        else:
            sums[name] = float(sum(gain.value for gain in of_heads.values()))
        allowed[name] = sums[name] > 0 and not worse
        verdict = "allowed" if allowed[name] else f"worse on {', '.join(worse)}" if worse else "no better in sum"
        reasons[name] = f"{verdict}: AUC {sums[name]:+.4f} in sum over {len(heads)} heads"
    best = max((name for name in sums if allowed[name]), key=sums.__getitem__, default="scratch")
    return Choice(best, reasons, max(sums, key=sums.__getitem__, default="scratch"))


def _heads(examples: Examples, tasks: Iterable[int], at_MT: np.ndarray) -> dict[int, np.ndarray]:
    """Task → its examples in the mask, where both outcomes occur."""
    places = {t: np.flatnonzero(at_MT[:, t]) for t in tasks}
    return {t: at for t, at in places.items() if len(at) and np.ptp(examples.y_MT[at, t])}


def _more_macro(
    examples: Examples, tasks: Iterable[int], at_MT: np.ndarray, ours_MT: np.ndarray, theirs_MT: np.ndarray
) -> Gain:
    """Ours − theirs in the mean over heads; its variance as if the heads erred together, since their users are the same."""
    y_MT, user_M = examples.y_MT, examples.user_M
    gains = [
        _more_auc(y_MT[at, t], ours_MT[at, t], theirs_MT[at, t], user_M[at])
        for t, at in _heads(examples, tasks, at_MT).items()
    ]
    if not gains:
        return Gain(0.0, np.inf, 0)
    deviation = np.mean([np.sqrt(gain.variance) for gain in gains])
    return Gain(float(np.mean([gain.value for gain in gains])), float(deviation**2), min(gain.freedom for gain in gains))


def _more_auc(y_A: np.ndarray, ours_A: np.ndarray, theirs_A: np.ndarray, user_A: np.ndarray) -> Gain:
    """Ours − theirs, by a jackknife over groups of users: with a dozen users the percentiles of a bootstrap are much too
    narrow."""

    def difference(of_A: np.ndarray) -> float:
        y = y_A[of_A]
        return metrics.auc(y, ours_A[of_A]) - metrics.auc(y, theirs_A[of_A]) if len(y) and np.ptp(y) else 0.0

    value = difference(np.ones(len(y_A), bool))
    user_A = np.unique(user_A, return_inverse=True)[1]
    groups = min(int(user_A.max(initial=-1)) + 1, GROUPS)
    if groups < 2 or not np.ptp(y_A):
        return Gain(value, np.inf, 0)
    without = [difference(user_A % groups != left) for left in range(groups)]
    return Gain(value, float((groups - 1) * np.var(without)), groups - 1)


def _rehearsal(task: Task, config: StudentConfig) -> Rehearsal | None:
    """Each other platform in the target's place, with as many users and labels as the target has. None where there is but
    one other: it would have nobody to learn from."""
    rows = np.unique(task.rest.platform_M)
    if len(rows) < 2:
        return None
    users = len(np.unique(task.own.user_M[(task.own.learn_MT | task.own.check_MT).any(axis=1)]))
    stand_ins = (understudy(task.rest, task.q_rest_MG, int(row), config, task.schedule, check=task.check) for row in rows)
    return rehearse(stand_ins, users, labels_a_user(task.own), REHEARSED)


class Transferred(NamedTuple):
    """A model for the target, and which rung it is."""

    trained: Trained
    rung: str
    reasons: dict[str, str]


def transfer(
    examples: Examples,
    config: StudentConfig,
    category_names: Mapping[int, str],
    fold: FoldConfig,
    schedule: Schedule,
    *,
    target: str,
    prior_logits_3: np.ndarray,
    rung: str = "auto",
    check: Check = lambda: None,
) -> Transferred:
    """A major model for the platform `target`: the named rung's, or with `auto` the one that `choose` takes of all. It is
    a `Trained` as `train` gives: the same tables, calibration and shapes. ValueError for a rung or a target that there is
    none of, and where one of the two sides has no example. The same seed and examples give the same model."""
    if rung != "auto" and rung not in RUNGS:
        raise ValueError(f"rung {rung!r} is none of auto, {', '.join(RUNGS)}")
    if target not in config.platforms:
        raise ValueError(f"target {target!r} is none of {config.platforms}")
    row = 1 + config.platforms.index(target)
    of_target, others = np.flatnonzero(examples.platform_M == row), np.flatnonzero(examples.platform_M != row)
    if not len(of_target) or not len(others):
        raise ValueError(f"{target!r} has {len(of_target)} examples and the other platforms {len(others)}: both are needed")
    table, q_MG = category_targets(examples, category_names, len(config.platforms))
    own, rest = subset(examples, of_target), subset(examples, others)
    source = pretrain(rest, q_MG[others], config, schedule, check)
    task = Task(
        row,
        adopt(source, row, own),
        own,
        rest,
        own.columns.features_NF.numpy(),
        q_MG[of_target],
        q_MG[others],
        schedule,
        check,
    )
    if rung == "auto":
        networks = climb_all(task)
        everything = np.arange(len(own))
        said = {name: logits(network, own, everything) for name, network in networks.items()}
        choice = choose(own, said, _rehearsal(task, config))
        name, reasons, network = choice.rung, choice.reasons, networks[choice.rung]
    else:
        name, reasons, network = rung, {}, RUNGS[rung](task)
    network.eval().requires_grad_(False)
    model = Model(
        version="candidate",
        config=config,
        student=network.student,
        categories=table,
        calibration_P32=calibrate(network, examples, prior_logits_3),
        fold=fold,
    )
    learned = (examples.learn_MT.any(axis=1) | examples.learn_next_M).sum()
    fitted = Fitted(float("nan"), schedule.epochs, _loss_on_check(network, own))
    return Transferred(Trained(model, "major", int(learned), fitted, network), name, reasons)
