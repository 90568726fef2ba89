"""Publishing and loading: whole versions only, and everything that could be wrong is refused with its reason."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors
from tiny import make_model, make_stream, make_student

from models import artifact
from models.artifact import MANIFEST, TENSORS, Manifest, list_versions, load, load_prior, publish, versions, write_prior
from models.config import FoldConfig
from models.errors import ArtifactError
from models.events import ModelVersion
from models.scorer import Model, Scorer
from models.state import STATE_ABI, empty_rows

torch.set_num_threads(1)
NAME = "student"
RANGE = {"first_ts": 1, "last_ts": 2, "events": 3}


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> str:
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def put(store: str, model: Model, **options) -> ModelVersion:
    defaults = {"metrics": {"alpha": {"click": {"log_loss": 0.5}}}, "training_range": RANGE}
    defaults |= {"reference_histograms": {"x": [1, 2]}, "fold": FoldConfig(), "now_ms": 1234}
    return publish(store, NAME, model, **defaults | options)


def get(store: str, version: ModelVersion, fold: FoldConfig | None = None, size: str = "cpu") -> Model:
    return load(store, NAME, version, fold=fold or FoldConfig(), size=size)


def refused(store: str, version: ModelVersion, **options) -> str:
    with pytest.raises(ArtifactError) as raised:
        get(store, version, **options)
    return raised.value.reason


def path_of(store: str, version: ModelVersion, file: str) -> str:
    return f"{store}/{version.uri}/{file}"


def read(path: str) -> bytes:
    with fsspec.open(path, "rb") as source:
        return source.read()


def write(path: str, body: bytes) -> None:
    with fsspec.open(path, "wb") as target:
        target.write(body)


def forge(store: str, published: ModelVersion, tensors=None, blob: bytes | None = None, **changes) -> ModelVersion:
    """Writes changed tensors and a changed manifest over a version, with sums that are right again."""
    manifest = json.loads(read(path_of(store, published, MANIFEST)))
    if tensors is not None:
        blob = safetensors.save(tensors(safetensors.load(read(path_of(store, published, TENSORS)))))
    if blob is not None:
        write(path_of(store, published, TENSORS), blob)
        manifest["files"][TENSORS] = hashlib.sha256(blob).hexdigest()
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = manifest
        for parent in parents:
            place = place[parent]
        place[last] = value
    body = json.dumps(manifest).encode()
    write(path_of(store, published, MANIFEST), body)
    return msgspec.structs.replace(published, sha256=hashlib.sha256(body).hexdigest())


# ── what goes in comes out ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_a_loaded_model_says_the_same(store, size):
    model = make_model(size)
    version = put(store, model)
    assert version.version == "000001"
    assert version.uri == "student/000001"
    assert version.abi == STATE_ABI
    loaded = get(store, version, size=size)
    assert loaded.version == "student/000001"
    assert loaded.config == model.config
    assert loaded.recurrence_id == model.recurrence_id
    assert loaded.categories.names == model.categories.names
    assert not loaded.degraded
    events, slots = make_stream(100, 9)
    ours, _ = Scorer(model, "cpu").run(empty_rows(9, size), slots, events)
    theirs, _ = Scorer(loaded, "cpu").run(empty_rows(9, size), slots, events)
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_the_manifest_holds_what_was_told(store, model):
    put(store, model)
    (manifest,) = list_versions(store, NAME)
    assert isinstance(manifest, Manifest)
    assert manifest.metrics == {"alpha": {"click": {"log_loss": 0.5}}}
    assert manifest.training_range == RANGE
    assert manifest.reference_histograms == {"x": [1, 2]}
    assert manifest.created_at == 1234
    assert manifest.fold == FoldConfig().model_dump()
    assert manifest.config == model.config
    assert 8 <= len(manifest.golden.events) <= 32
    said = np.array(manifest.golden.p, float)
    assert np.nanstd(said) > 0.01
    assert np.isnan(said).any()
    assert any(top[0] >= 0 for top in manifest.golden.category)
    assert any(shift is not None for shift in manifest.golden.shift)


def test_a_model_without_categories_goes_through(store, model):
    loaded = get(store, put(store, replace(model, categories=None)))
    assert loaded.categories is None


def test_versions_count_up_and_name_their_parent(store, model):
    other = make_model(seed=1)
    assert list_versions(store, NAME) == []
    assert versions(store, NAME) == []
    published = [put(store, m) for m in (model, model, other)]
    put(store, model, parent="000001")
    found = list_versions(store, NAME)
    assert [m.version for m in found] == ["000001", "000002", "000003", "000004"]
    assert [m.parent for m in found] == [None, "000001", "000002", "000001"]
    assert [m.kind for m in found] == ["major", "minor", "major", "minor"]
    assert versions(store, NAME)[1:] == published[::-1]
    assert [m.version for m in list_versions(store, "another")] == []


def test_a_minor_version_keeps_the_recurrence_bit_for_bit(store, model):
    student = make_student()
    with torch.no_grad():
        student.head_bias_PO += 0.3
    put(store, model)
    minor = put(store, replace(model, student=student), kind="minor")
    manifests = list_versions(store, NAME)
    assert manifests[1].kind == "minor"
    assert manifests[1].recurrence_id == manifests[0].recurrence_id
    theirs, ours = get(store, minor).student.state_dict(), model.student.state_dict()
    for name in student.RECURRENCE:
        assert torch.equal(theirs[name], ours[name])
    assert not torch.equal(theirs["head_bias_PO"], ours["head_bias_PO"])
    with torch.no_grad():
        student.recur.bias[0] += 1e-6
    with pytest.raises(ArtifactError, match="minor") as raised:
        put(store, replace(model, student=student), kind="minor")
    assert raised.value.reason == "manifest"
    assert len(list_versions(store, NAME)) == 2
    put(store, replace(model, student=student))
    assert list_versions(store, NAME)[-1].kind == "major"


# ── atomic ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_sees_whole_versions_only(store, model):
    """One publishes, another lists and loads whatever is there, all the time."""
    stop, seen, failures = threading.Event(), set(), []

    def look():
        while not stop.is_set():
            for version in versions(store, NAME):
                try:
                    get(store, version)
                except ArtifactError as error:
                    failures.append(error)
                seen.add(version.version)

    reader = threading.Thread(target=look)
    reader.start()
    published = [put(store, model).version for _ in range(6)]
    while not seen >= set(published) and reader.is_alive():
        stop.wait(0.01)
    stop.set()
    reader.join()
    assert failures == []
    assert seen == set(published)


def test_two_publishers_never_take_the_same_number(tmp_path, model):
    store, taken, ready = str(tmp_path), [], threading.Barrier(4)

    def publisher():
        ready.wait()
        taken.extend(put(store, model) for _ in range(3))

    threads = [threading.Thread(target=publisher) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version.version for version in taken) == [f"{n:06d}" for n in range(1, 13)]
    assert sorted(path.name for path in (tmp_path / NAME).iterdir()) == [f"{n:06d}" for n in range(1, 13)]
    for version in taken:
        assert get(store, version).version == f"{NAME}/{version.version}"


def test_a_taken_number_is_left_alone(store, model, monkeypatch):
    """Another publisher takes the number between the look and the write."""
    first = put(store, model)
    before = read(path_of(store, first, MANIFEST)), read(path_of(store, first, TENSORS))
    monkeypatch.setattr(artifact, "_numbers", lambda fs, folder: [])
    second = put(store, make_model(seed=1))
    assert second.version == "000002"
    assert before == (read(path_of(store, first, MANIFEST)), read(path_of(store, first, TENSORS)))


def test_what_a_dead_publisher_left_is_no_version(store, model):
    put(store, model)
    write(f"{store}/{NAME}/000002/{TENSORS}", b"half")
    write(f"{store}/{NAME}/.abandoned/{MANIFEST}", b"{}")
    assert [m.version for m in list_versions(store, NAME)] == ["000001"]
    assert put(store, model).version == "000003"


def test_a_failed_publication_leaves_nothing(tmp_path, model, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(artifact.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        put(str(tmp_path), model)
    assert list((tmp_path / NAME).iterdir()) == []


def test_a_manifest_that_cannot_be_read_is_left_out_of_the_list(store, model, caplog):
    put(store, model)
    broken = put(store, model)
    write(path_of(store, broken, MANIFEST), b'{"name": ')
    assert [m.version for m in list_versions(store, NAME)] == ["000001"]
    assert "000002" in caplog.text


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "uri",
    [
        "../student/000001",
        "student/../student/000001",
        "student/000001/..",
        "/student/000001",
        "/etc",
        "file:///etc/000001",
        "s3://elsewhere/student/000001",
        "memory://elsewhere/student/000001",
        "student\\000001",
        "student//000001",
        "student/000001/",
        "other/000001",
        "student/000002",
        "",
    ],
)
def test_no_path_but_the_published_one_is_followed(store, model, uri):
    version = put(store, model)
    assert refused(store, msgspec.structs.replace(version, uri=uri)) == "path"


def test_an_absolute_path_to_a_good_version_is_refused(tmp_path, model):
    version = put(str(tmp_path), model)
    absolute = msgspec.structs.replace(version, uri=str(tmp_path / version.uri))
    assert refused(str(tmp_path), absolute) == "path"


@pytest.mark.parametrize("number", ["..", "1", "000001/../000001", "0000000000000001", "", "00000a"])
def test_no_version_but_a_number_is_followed(store, model, number):
    version = msgspec.structs.replace(put(store, model), version=number, uri=f"{NAME}/{number}")
    assert refused(store, version) == "path"


def test_a_link_out_of_the_store_is_refused(tmp_path, model):
    elsewhere, inside = str(tmp_path / "elsewhere"), tmp_path / "store"
    version = put(elsewhere, model)
    (inside / NAME).mkdir(parents=True)
    (inside / version.uri).symlink_to(Path(elsewhere) / version.uri)
    assert refused(str(inside), version) == "path"


def test_a_name_that_is_a_path_is_refused(store, model):
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(ArtifactError) as raised:
            publish(store, name, model, metrics={}, training_range={}, reference_histograms={}, fold=FoldConfig(), now_ms=0)
        assert raised.value.reason == "path"


@pytest.mark.parametrize("file", [MANIFEST, TENSORS])
def test_a_missing_file_is_refused(store, model, file):
    version = put(store, model)
    fs, path = fsspec.core.url_to_fs(path_of(store, version, file))
    fs.rm(path)
    assert refused(store, version) == "missing"


@pytest.mark.parametrize("file", [MANIFEST, TENSORS])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]],
    ids=["last byte", "half", "all", "one bit"],
)
def test_truncated_or_corrupted_files_are_refused(store, model, file, damage):
    version = put(store, model)
    path = path_of(store, version, file)
    write(path, damage(read(path)))
    assert refused(store, version) == "sum"


def test_a_wrong_sum_in_the_announcement_is_refused(store, model):
    version = put(store, model)
    assert refused(store, msgspec.structs.replace(version, sha256="0" * 64)) == "sum"


def test_tensors_that_are_no_safetensors_are_refused_whatever_their_sum(store, model):
    version = put(store, model)
    blob = read(path_of(store, version, TENSORS))
    assert refused(store, forge(store, version, blob=blob[: len(blob) // 2])) == "manifest"
    assert refused(store, forge(store, version, blob=b"\x80\x04pickle")) == "manifest"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["student.embed.weight", "student.head_bias_PO", "calibration", "categories.popular_p_PT"])
def test_numbers_that_are_not_finite_are_refused(store, model, name, value):
    def poison(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[-1] = value
        return tensors

    assert refused(store, forge(store, put(store, model), poison)) == "nonfinite"


def test_a_model_with_nan_is_not_published(store, model):
    student = make_student()
    with torch.no_grad():
        student.trunk.weight[0, 0] = torch.nan
    with pytest.raises(ArtifactError) as raised:
        put(store, replace(model, student=student))
    assert raised.value.reason == "nonfinite"
    assert versions(store, NAME) == []


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(name, change):
    return lambda tensors: {**tensors, name: np.ascontiguousarray(change(tensors[name]))}


@pytest.mark.parametrize(
    "tensors",
    [
        without("student.recur.weight"),
        without("calibration"),
        without("categories.markov_CM"),
        changed("student.trunk.weight", lambda t: t[:, :-1]),
        changed("calibration", lambda t: t[:-1]),
        changed("calibration", lambda t: t.astype(np.float64)),
        changed("categories.popular_PT", lambda t: t + 10_000),
        changed("categories.names", lambda t: t[:-3]),
        changed("student.embed.bias", lambda t: t + 1.0),  # the recurrence is no longer the one named
        lambda tensors: {**tensors, "student.surplus": np.zeros(3, np.float32)},
    ],
)
def test_tensors_that_are_not_what_the_manifest_says_are_refused(store, model, tensors):
    assert refused(store, forge(store, put(store, model), tensors)) == "manifest"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"abi": STATE_ABI + 1}, "abi"),
        ({"config__size": "gpu"}, "abi"),
        ({"feature_version": 999}, "fold"),
        ({"config__n_features": 3}, "fold"),
        ({"fold__session_gap_s": 1801.0}, "fold"),
        ({"fold": {}}, "fold"),
        ({"recurrence_id": 7}, "manifest"),
        ({"name": "other"}, "manifest"),
        ({"version": "000009"}, "manifest"),
        ({"kind": "huge"}, "manifest"),
        ({"config__hidden": 65}, "manifest"),
        ({"config__platforms": ["alpha"]}, "manifest"),
        ({"files": {}}, "sum"),
        ({"files": {"../../student.safetensors": "0"}}, "sum"),
        ({"golden": None}, "golden"),
        ({"golden__events": []}, "golden"),
        ({"golden__slots": [10**6] * 30}, "golden"),
        ({"golden__p": [[0.5, 0.5, 0.5]] * 30}, "golden"),
        ({"golden__p": [[0.5]]}, "golden"),
        ({"golden__category": [[3, 4, 5, 6, 7]] * 30}, "golden"),
        ({"golden__shift": [0.123] * 30}, "golden"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(store, model, changes, reason):
    assert refused(store, forge(store, put(store, model), **changes)) == reason


def test_an_announced_abi_that_is_not_ours_is_refused(store, model):
    assert refused(store, msgspec.structs.replace(put(store, model), abi=STATE_ABI + 1)) == "abi"


def test_other_fold_rules_or_another_size_here_are_refused(store, model):
    version = put(store, model)
    assert refused(store, version, fold=FoldConfig(lateness_s=60.0)) == "fold"
    assert refused(store, version, size="gpu") == "abi"
    with pytest.raises(ArtifactError) as raised:
        put(store, model, fold=FoldConfig(lateness_s=60.0))
    assert raised.value.reason == "fold"


def test_heads_that_say_something_else_fail_the_golden_batch(store, model):
    """The recurrence and every shape are right; only the numbers that come out are not."""
    nudged = changed("student.head_bias_PO", lambda t: t + 0.01)
    assert refused(store, forge(store, put(store, model), nudged)) == "golden"
    table = changed("categories.popular_p_PT", lambda t: t * 0.9)
    assert refused(store, forge(store, put(store, model), table)) == "golden"


def test_weights_that_make_nan_are_refused(store, model):
    """Finite weights, but a standard deviation of 0 divides 0 by 0."""
    student = make_student()
    student.feature_std_PF.zero_()
    student.feature_mean_PF.zero_()
    with pytest.raises(ArtifactError) as raised:
        put(store, replace(model, student=student))
    assert raised.value.reason == "golden"


# ── the prior ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_prior_says_its_rates():
    prior = load_prior()
    assert prior.version == "prior"
    assert prior.degraded
    assert prior.recurrence_id == 0
    for size in ("cpu", "gpu"):
        events, slots = make_stream(50, 5)
        scores, _ = Scorer(prior, "cpu").run(empty_rows(5, size), slots, events)
        said = scores.p_N3[~np.isnan(scores.p_N3).any(axis=1)]
        assert len(said) > 30
        np.testing.assert_allclose(said, np.tile(list(artifact.PRIOR_RATES.values()), (len(said), 1)), atol=1e-6)


def test_the_prior_folds_under_the_rules_it_is_given():
    assert load_prior().fold == FoldConfig()
    assert load_prior(FoldConfig(session_gap_s=60.0)).fold.session_gap_s == 60.0


def test_the_prior_that_ships_is_what_the_function_makes(tmp_path):
    write_prior(tmp_path)
    shipped = Path(artifact.__file__).parent / "prior"
    assert sorted(path.name for path in shipped.iterdir()) == [MANIFEST, TENSORS]
    for file in (MANIFEST, TENSORS):
        assert (tmp_path / file).read_bytes() == (shipped / file).read_bytes()
