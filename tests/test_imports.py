"""Who may import whom, and the public names that others build on."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for package in ("models", "streams", "trainer") for path in (ROOT / package).glob("*.py"))

# `models` knows no Kafka, no Faust, no environment, no clock; `streams` never knows the trainer, nor the other way round.
FORBIDDEN = {
    "models": {"aiokafka", "faust", "streams", "trainer", "crosscurrent", "time", "datetime", "pydantic_settings"},
    "streams": {"trainer", "crosscurrent", "pydantic_settings"},
    "trainer": {"streams", "faust", "crosscurrent", "pydantic_settings"},
}
CLOCK_ALLOWED = {"models/warm.py"}
"""A command of its own, which says how long it took."""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    allowed = {"time"} if str(path.relative_to(ROOT)) in CLOCK_ALLOWED else set()
    assert not imported(path) & FORBIDDEN[path.parent.name] - allowed


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "models"], ids=lambda path: path.name)
def test_models_read_no_environment(path):
    tree = ast.parse(path.read_text())
    reads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")]
    assert not reads


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled_or_evaluated(path):
    assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    assert not called & {"eval", "exec", "compile"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text()))


PUBLIC = {
    "models.errors": [
        "ArtifactError", "ConfigError", "CorruptRowError", "CrosscurrentError", "EventRefused", "HistoryError",
        "PlatformFileError", "StateABIError", "StateError", "WorkerFenced",
    ],
    "models.events": [
        "Announcement", "CanonicalEvent", "DeadLetter", "EventEffect", "Explanation", "FeatureEffect", "IdentityLink",
        "ModelVersion", "Probabilities", "ScoreRecord",
        "event_hash", "event_hashes", "hash32", "hash64", "platform_code", "price_bucket", "to_columns",
    ],
    "models.state": ["decode_row", "decode_rows", "empty_rows", "encode_row", "encode_rows", "row_dtype"],
    "models.fold": ["FoldParams", "fold", "fold_params", "refold_rings", "starts_afresh", "warm"],
    "models.rebuild": ["Refolded", "refold", "rows_before"],
    "models.explain": ["Effects", "Explainer", "contributions", "without_features", "without_terms"],
    "models.artifact": ["Golden", "Manifest", "list_versions", "load", "load_prior", "publish", "versions", "write_prior"],
    "trainer.run": ["RoundResult", "run_trainer"],
    "trainer.gate": [
        "CellVerdict", "Compared", "Evidence", "Limits", "Rule", "SliceVerdict", "Verdict",
        "adversarial", "decide", "examine", "scoring_p99_ms",
    ],
    "trainer.teacher": ["Member", "Teaching", "choose", "mean_of", "recurrence", "teach"],
    "trainer.markov": [
        "Events", "Markov", "Size", "beliefs", "events_of", "hidden_markov", "learn", "log_likelihood", "rates",
    ],
    "trainer.lessons": ["Heard", "Lessons", "psi"],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_these(name):
    module = importlib.import_module(name)
    found = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == name and callable(value)
    ]
    assert sorted(found) == PUBLIC[name]


def test_every_error_has_one_root():
    errors = importlib.import_module("models.errors")
    for _, error in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(error, errors.CrosscurrentError) and error.__doc__
