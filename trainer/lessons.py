"""What the teacher says of every event, asked once and written down, so that every round may distil it.

    due ─► teach (trainer/teacher.py) ─► its logits of every event up to G ─► <history>/teacher/<fitted>-000000.parquet
    not ─► logits written down, by event; events that no teacher was asked of yet: the members kept in memory ─► …-000001

A teacher is due where there is none, once a day (`trainer.teacher_every_s`), once there are twice as many examples as it
had, where the platforms are others, and on drift, but then at most once an hour: what it says of the events since has
another distribution than what it said of those that it was fitted with (PSI, as of credit scoring: Siddiqi, Credit Risk
Scorecards, Wiley 2006). A new teacher says anew what it thinks of every event, and what the one before said is deleted.

The members live in memory. After a restart what was written down still answers for the events of then; later events are
not asked until a teacher is due. Nothing here holds a user id: an event is its hash.

Shapes: M examples, T tasks. Knows nothing of students, gates or Kafka.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from models.config import Settings
from models.events import BINARY_HEADS
from models.fold import FEATURE_NAMES
from models.student import StudentConfig
from trainer.examples import Check, Examples
from trainer.fit import Progress
from trainer.history import HistoryStore

log = structlog.get_logger("crosscurrent.trainer")

FOLDER = "teacher"
DRIFT_PSI, DRIFT_EVENTS, _BINS = 0.25, 10_000, 10
"""Above this on a platform × task, of at least so many later events, a teacher has drifted. A few thousand events of a
hundred users may differ by as much without any drift."""
LEAST_AGE_MS = 3_600_000

_FILE = re.compile(r"(\d{13})-(\d{6})\.parquet$")


Words = Mapping[int, str]
"""Category hash → its name."""


class Heard(NamedTuple):
    """What a round is told."""

    soft_MT: np.ndarray | None
    """float32, NaN where nobody was asked or nothing is taught; None where that is everywhere."""
    asked: int
    """Events asked now."""
    members: dict[str, bool] | None
    """Member → kept on some platform; None where no teacher was fitted now."""


class Lessons:
    """The teacher of one trainer process, and the file of what teachers have said."""

    def __init__(self, store: HistoryStore, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._key = _key(settings)
        self._fitted_ms, self._files, self._examples = 0, 0, 0
        self._drifted = ""
        self._answer: Callable[[Examples, np.ndarray], np.ndarray] | None = None
        self._platforms: tuple[str, ...] = ()
        self._id, self._logits_T = np.empty(0, np.uint64), np.empty((0, 0), np.float32)
        self._at_fit = np.empty(0, bool)
        """Of each event written down: it was there when the teacher was fitted."""
        self._words: dict[int, str] = {}
        self._load()

    def __len__(self) -> int:
        """Events that have been asked of the present teacher."""
        return len(self._id)

    def due(self, examples: int, now_ms: int, platforms: tuple[str, ...]) -> str | None:
        """Why a teacher is to be fitted now, on so many examples; None where it is not."""
        if not self._fitted_ms:
            return "there is none"
        if now_ms - self._fitted_ms >= 1000 * self._settings.trainer.teacher_every_s:
            return f"it is {(now_ms - self._fitted_ms) / 3_600_000:.1f} h old"
        if examples >= 2 * self._examples:
            return f"{examples} examples, it had {self._examples}"
        if self._answer is not None and platforms != self._platforms:
            return "there is another platform"
        return (self._drifted or None) if now_ms - self._fitted_ms >= LEAST_AGE_MS else None

    def fit(
        self,
        examples: Examples,
        id_M: np.ndarray,
        platforms: tuple[str, ...],
        now_ms: int,
        check: Check = lambda: None,
        words: Words | None = None,
        progress: Progress = lambda share: None,
    ) -> Heard:
        """Fits a teacher, asks it of every example and writes that down. `id_M`: hashes of the events (uint64); `words`: of
        every category so far, for `trainer.teacher_texts`; `progress`: of the transformer."""
        # Here, not above: a trainer starts sooner without LightGBM and scikit-learn.
        from trainer.markov import Size, hidden_markov
        from trainer.teacher import RECURRENCE, recurrence, teach

        options = self._settings.trainer
        self._words.update(words or {})
        more = {}
        if options.teacher_transformer is not None:
            more["transformer"] = _transformer(self._settings, platforms, self._words, check, progress)
        if options.teacher_recurrence:
            n_features = examples.columns.features_NF.shape[1]
            heads = dict.fromkeys(platforms, BINARY_HEADS)
            config = StudentConfig.of("cpu", n_features, platforms, heads)
            more["recurrence"] = recurrence(config, RECURRENCE._replace(seed=options.seed), check)
        if options.teacher_hidden_markov:
            more["hidden_markov"] = hidden_markov(Size(seed=options.seed), check)
        teaching = teach(examples, threads=options.threads, more=more, margin=options.teacher_margin, check=check)
        for (row, name), reason in teaching.reasons.items():
            platform = platforms[row - 1] if row else None
            log.info("teacher's member", platform=platform, member=name, kept=name in teaching.kept[row], reason=reason)
        earlier = self._paths()
        # Later than all that lies there, also what could not be read.
        self._fitted_ms = max([now_ms, *(int(_FILE.search(path)[1]) + 1 for path in earlier)])
        self._answer, self._platforms, self._drifted = teaching.answer, platforms, ""
        self._examples, self._files = len(examples), 0
        self._id, self._logits_T = np.empty(0, np.uint64), np.empty((0, len(examples.tasks)), np.float32)
        self._at_fit = np.empty(0, bool)
        self._keep(id_M, teaching.logits_MT, examples.tasks)
        for path in earlier:
            self._store.fs.rm_file(path)
        members = {name: any(name in names for names in teaching.kept.values()) for name in teaching.members_MT}
        return Heard(_or_none(teaching.logits_MT), len(examples), members)

    def hear(self, examples: Examples, id_M: np.ndarray, platforms: tuple[str, ...], words: Words | None = None) -> Heard:
        """What was said of the examples; those that nobody was asked of yet are asked now, where the members are at hand."""
        self._words.update(words or {})
        soft_MT, found_M = self._look_up(id_M, len(examples.tasks))
        new_M, answer = ~found_M, self._answer
        if answer is None or platforms != self._platforms or not new_M.any():
            return Heard(_or_none(soft_MT), 0, None)
        soft_MT[new_M] = answer(examples, new_M)
        self._keep(id_M[new_M], soft_MT[new_M], examples.tasks)
        self._drifted = self._drift(soft_MT, id_M, examples, platforms)
        return Heard(_or_none(soft_MT), int(new_M.sum()), None)

    def _look_up(self, id_M: np.ndarray, n_tasks: int) -> tuple[np.ndarray, np.ndarray]:
        """→ (logits (M, T), NaN where not found; (M,) bool found)."""
        soft_MT = np.full((len(id_M), n_tasks), np.nan, np.float32)
        if not len(self._id):
            return soft_MT, np.zeros(len(id_M), bool)
        at_M = np.minimum(np.searchsorted(self._id, id_M), len(self._id) - 1)
        found_M = self._id[at_M] == id_M
        soft_MT[found_M] = self._logits_T[at_M[found_M]]
        return soft_MT, found_M

    def _drift(self, soft_MT: np.ndarray, id_M: np.ndarray, examples: Examples, platforms: tuple[str, ...]) -> str:
        """Where the teacher speaks otherwise than it did; empty: nowhere."""
        at_fit_M = self._at_fit[np.searchsorted(self._id, id_M)]
        for row, platform in enumerate(platforms, start=1):
            for task, name in enumerate(examples.tasks):
                own_M = (examples.platform_M == row) & ~np.isnan(soft_MT[:, task])
                before, now = soft_MT[own_M & at_fit_M, task], soft_MT[own_M & ~at_fit_M, task]
                if min(len(before), len(now)) >= DRIFT_EVENTS and (shift := psi(before, now)) > DRIFT_PSI:
                    return f"drift on {platform} x {name}: PSI {shift:.2f} over {len(now)} events"
        return ""

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _paths(self) -> list[str]:
        folder = f"{self._store.root}/{FOLDER}"
        self._store.fs.invalidate_cache()
        if not self._store.fs.exists(folder):
            return []
        return sorted(path for path in self._store.fs.ls(folder, detail=False) if _FILE.search(path))

    def _keep(self, id_X: np.ndarray, logits_XT: np.ndarray, tasks: tuple[str, ...]) -> None:
        """Into memory, and into one file more, written whole or not at all."""
        columns = {"id": id_X} | {name: logits_XT[:, t].astype(np.float32) for t, name in enumerate(tasks)}
        about = {"key": self._key, "examples": str(self._examples)}
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata(about), buffer, compression="zstd")
        self._store.put(f"{FOLDER}/{self._fitted_ms:013d}-{self._files:06d}.parquet", buffer.getvalue())
        self._add(id_X, logits_XT, self._files == 0)
        self._files += 1

    def _add(self, id_X: np.ndarray, logits_XT: np.ndarray, at_fit: bool) -> None:
        ids = np.concatenate([self._id, id_X.astype(np.uint64)])
        logits_T = np.concatenate([self._logits_T.reshape(-1, logits_XT.shape[1]), logits_XT.astype(np.float32)])
        at_fits = np.concatenate([self._at_fit, np.full(len(id_X), at_fit)])
        self._id, first = np.unique(ids, return_index=True)
        self._logits_T, self._at_fit = logits_T[first], at_fits[first]

    def _load(self) -> None:
        """What the last teacher said, where it can be read and was said under the same settings."""
        paths = self._paths()
        latest = [path for path in paths if _FILE.search(path)[1] == _FILE.search(paths[-1])[1]]
        for path in latest:
            try:
                table = pq.read_table(io.BytesIO(self._store.fs.cat_file(path)))
                about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
                if about.get("key") != self._key or table.column_names[:1] != ["id"]:
                    log.info("what a teacher said under other settings is not used", path=path)
                    return
                logits = [table[name].to_numpy() for name in table.column_names[1:]]
                self._add(table["id"].to_numpy(), np.stack(logits, axis=1), path == latest[0])
            except (pa.ArrowInvalid, OSError) as error:
                log.warning("what a teacher said cannot be read; its events are asked again", path=path, error=str(error))
                continue
            self._fitted_ms, self._files = int(_FILE.search(path)[1]), 1 + int(_FILE.search(path)[2])
            self._examples = max(self._examples, int(about["examples"]))


def psi(before: np.ndarray, now: np.ndarray) -> float:
    """Population stability index of two samples (n,), (m,) over the deciles of the first; 0: alike."""
    edges = np.unique(np.quantile(before, np.arange(1, _BINS) / _BINS))
    shares = [
        (np.bincount(np.searchsorted(edges, part), minlength=len(edges) + 1) + 0.5) / (len(part) + 0.5 * (len(edges) + 1))
        for part in (before, now)
    ]
    return float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())


def _or_none(soft_MT: np.ndarray) -> np.ndarray | None:
    return None if np.isnan(soft_MT).all() else soft_MT


def _key(settings: Settings) -> str:
    """Of what decides the features and the labels, and so what a logit means."""
    parts = (settings.fold.model_dump_json(), settings.horizons.model_dump_json(), ",".join(FEATURE_NAMES))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _transformer(settings: Settings, platforms: tuple[str, ...], words: Words, check: Check, progress: Progress):
    """A further member for `teach`: the causal transformer as a residual."""
    from trainer.pretrain import fit_kept, text_of
    from trainer.teacher import Member

    def text(examples: Examples):
        return text_of(settings, words, examples) if settings.trainer.teacher_texts else None

    def fit(examples: Examples, offset_MT: np.ndarray) -> Member:
        own = text(examples)
        fitted = fit_kept(settings, examples, offset_MT, platforms, text=own, check=check, progress=progress)

        def answer(later: Examples, wanted_M: np.ndarray, offset_LT: np.ndarray) -> np.ndarray:
            return fitted.logits(later, np.nan_to_num(offset_LT), text=text(later), check=check)[wanted_M]

        return Member(fitted.logits(examples, np.nan_to_num(offset_MT), text=own, check=check), answer, True)

    return fit
