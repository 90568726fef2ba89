"""A model as files: published once, whole or not at all; verified to the last byte and number before it serves.

    <store>/<name>/<version>/student.safetensors   every array: weights, calibration (and the one judged), categories
                             manifest.json         everything else, and the sha256 of the above

Publishing: on a local disk both files are written into a hidden folder, which is then renamed to its number (a rename
onto a taken number fails); elsewhere the tensors are created under the number, which claims it, and the manifest comes
last. A folder without a manifest is no version. So a reader never sees half a version and two publishers never share a
number. Nothing is ever pickled.

Loading checks, in this order: path, sums, manifest, ABI and fold, finite numbers, recurrence, golden batch. The golden
batch is a handful of made-up events that are folded and scored on the CPU by the very code that serves.

Knows fsspec; knows no Kafka, environment or clock. `python -m models.artifact prior` makes the prior that ships.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any, Literal, NoReturn

import fsspec
import msgspec
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from models.categories import CategoryTable
from models.config import FoldConfig
from models.errors import ArtifactError
from models.events import BINARY_HEADS, EVENT, ModelVersion, platform_code
from models.fold import DUPLICATE, FEATURE_VERSION, N_FEATURES
from models.scorer import Model, Scorer, Scores
from models.state import N_KINDS, STATE_ABI, empty_rows
from models.student import Student, StudentConfig

log = logging.getLogger(__name__)

TENSORS, MANIFEST = "student.safetensors", "manifest.json"
GOLDEN_TOLERANCE = 1e-4
PRIOR_RATES: dict[str, float] = {"click": 0.45, "purchase": 0.35, "return": 0.55}
"""What the prior says of everybody: the mean over the platforms that we have data of (click and purchase of known
buyers: a new deployment's own rates will be lower, which its first model says)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_VERSION = re.compile(r"[0-9]{6,9}")
_PRIOR_FOLDER = Path(__file__).parent / "prior"
_GOLDEN_USERS, _GOLDEN_EVENTS = 5, 30
_GOLDEN_START_MS = 1_700_000_000_000


class Golden(msgspec.Struct, kw_only=True):
    """Events and what the model says of them. None stands for NaN."""

    events: list[tuple[int, int, int, int, int, float, int, int, int]]
    """Fields of EVENT, in its order."""
    slots: list[int]
    p: list[list[float | None]]
    category: list[list[int]]
    category_p: list[list[float]]
    shift: list[float | None]


class Manifest(msgspec.Struct, kw_only=True):
    """manifest.json."""

    name: str
    version: str
    kind: Literal["major", "minor"]
    """minor: its recurrence tensors are bit-equal to its parent's, so that `h` in serving stays valid."""
    parent: str | None
    """The version that it follows."""
    created_at: int
    """ms since the epoch."""
    abi: int
    feature_version: int
    recurrence_id: int
    config: StudentConfig
    fold: dict[str, float]
    files: dict[str, str]
    """Name → sha256."""
    metrics: dict[str, Any]
    training_range: dict[str, int]
    """first_ts, last_ts (ms), events."""
    reference_histograms: dict[str, Any]
    golden: Golden | None
    """None only where there is no student."""


# ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def publish(
    store_uri: str,
    name: str,
    model: Model,
    *,
    metrics: dict[str, Any],
    training_range: dict[str, int],
    reference_histograms: dict[str, Any],
    fold: FoldConfig,
    now_ms: int,
    kind: Literal["major", "minor"] | None = None,
    parent: str | None = None,
) -> ModelVersion:
    """Publishes a model under the next free number and says where it lies.

    `parent`: the version that it follows (None: the newest). It is a minor version where its recurrence is the
    parent's, bit for bit; `kind` says what the caller means it to be. Raises `ArtifactError`: `manifest` where a
    claimed minor version is none, and whatever `load` would raise for it: what cannot be loaded is not published.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError("path", f"{name!r} is no name of a model")
    if model.fold != fold:
        raise ArtifactError("fold", "the model was trained under other fold rules than it is published for")
    fs, folder = _folder(store_uri, name)
    manifest, blob = _pack(name, model, metrics, training_range, reference_histograms, now_ms)
    numbers, listed = _numbers(fs, folder), list_versions(store_uri, name)
    manifest.parent = parent if parent is not None else (listed[-1].version if listed else None)
    manifest.kind = _kind(manifest, [m for m in listed if m.version == manifest.parent], kind)
    _unpack(manifest, blob, f"{name}/new")
    number = max(numbers, default=0) + 1
    write = _write_local if isinstance(fs, LocalFileSystem) else _write_object
    while True:
        manifest.version = f"{number:06d}"
        body = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        if write(fs, folder, manifest.version, {TENSORS: blob, MANIFEST: body}):
            return ModelVersion(
                version=manifest.version, uri=f"{name}/{manifest.version}", sha256=_sha256(body), abi=manifest.abi
            )
        number += 1  # another publisher was faster


def _pack(name, model, metrics, training_range, reference_histograms, now_ms) -> tuple[Manifest, bytes]:
    model.check()
    tensors = _tensors(model)
    _check_finite(tensors, name)
    blob = safetensors.save(tensors)
    manifest = Manifest(
        name=name,
        version="",
        kind="major",
        parent=None,
        created_at=now_ms,
        abi=STATE_ABI,
        feature_version=FEATURE_VERSION,
        recurrence_id=model.recurrence_id,
        config=model.config,
        fold=model.fold.model_dump(),
        files={TENSORS: _sha256(blob)},
        metrics=metrics,
        training_range=training_range,
        reference_histograms=reference_histograms,
        golden=None if model.student is None else _make_golden(model),
    )
    return manifest, blob


def _kind(manifest: Manifest, parents: list[Manifest], claimed: str | None) -> Literal["major", "minor"]:
    same = bool(parents) and parents[0].recurrence_id == manifest.recurrence_id != 0
    if claimed == "minor" and not same:
        raise ArtifactError("manifest", f"not a minor version: its recurrence is not that of {manifest.parent}")
    return claimed or ("minor" if same else "major")


def _tensors(model: Model) -> dict[str, np.ndarray]:
    tensors = {"calibration": model.calibration_P32}
    if model.judged_P32 is not None:
        tensors["calibration_judged"] = model.judged_P32
    if model.student is not None:
        for key, tensor in model.student.state_dict().items():
            tensors[f"student.{key}"] = tensor.detach().cpu().numpy()
    if model.categories is not None:
        table = model.categories
        for field in _TABLE_FIELDS:
            tensors[f"categories.{field}"] = getattr(table, field)
        tensors["categories.names"] = np.frombuffer(json.dumps(table.names).encode(), np.uint8)
    return {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}


_TABLE_FIELDS = ("hashes_C", "popular_PT", "popular_p_PT", "markov_CM", "markov_p_CM", "markov_back_C")


def _write_local(fs, folder: str, version: str, files: dict[str, bytes]) -> bool:
    """False where the number is taken."""
    hidden = Path(folder) / f".{uuid.uuid4().hex}"
    hidden.mkdir(parents=True)
    try:
        for file, body in files.items():
            with open(hidden / file, "wb") as out:
                out.write(body)
                out.flush()
                os.fsync(out.fileno())
        try:
            os.rename(hidden, Path(folder) / version)
        except OSError:
            if (Path(folder) / version).exists():
                return False
            raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    _sync_folder(folder)
    return True


def _sync_folder(folder: str) -> None:
    """So that the rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_object(fs, folder: str, version: str, files: dict[str, bytes]) -> bool:
    """False where the number is taken. `files` end with the manifest."""
    if not fs.exists(folder):
        fs.makedirs(folder, exist_ok=True)
    first, *others = files
    try:
        fs.pipe_file(f"{folder}/{version}/{first}", files[first], mode="create")
    except FileExistsError:
        return False
    for file in others:
        fs.pipe_file(f"{folder}/{version}/{file}", files[file])
    return True


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load(store_uri: str, name: str, version: ModelVersion, *, fold: FoldConfig, size: str) -> Model:
    """The model of a version, verified. Raises `ArtifactError`; see the module for what is checked, in which order."""
    fs, folder = _folder(store_uri, name)
    _check_uri(fs, folder, name, version)
    body = _read(fs, f"{folder}/{version.version}/{MANIFEST}")
    if _sha256(body) != version.sha256:
        raise ArtifactError("sum", f"{version.uri}/{MANIFEST} is not the one that was announced")
    manifest = _decode(body, version.uri)
    if (manifest.name, manifest.version) != (name, version.version):
        raise ArtifactError("manifest", f"{version.uri} says that it is {manifest.name}/{manifest.version}")
    _check_fits(manifest, version.abi, fold, size)
    blob = _read(fs, f"{folder}/{version.version}/{TENSORS}")
    return _unpack(manifest, blob, f"{name}/{manifest.version}")


def list_versions(store_uri: str, name: str) -> list[Manifest]:
    """Manifests of all whole versions, oldest first. One that cannot be read is logged and left out."""
    return [manifest for manifest, _ in _listed(store_uri, name)]


def versions(store_uri: str, name: str) -> list[ModelVersion]:
    """All whole versions as `load` takes them, newest first. One that cannot be read is logged and left out."""
    return [
        ModelVersion(version=m.version, uri=f"{name}/{m.version}", sha256=_sha256(body), abi=m.abi)
        for m, body in reversed(_listed(store_uri, name))
    ]


def load_prior(fold: FoldConfig | None = None) -> Model:
    """The model of constants that ships with the package and serves until another is published. `fold`: the rules that
    its scorer folds under (None: the defaults); it was trained under none."""
    body, blob = (_PRIOR_FOLDER / MANIFEST).read_bytes(), (_PRIOR_FOLDER / TENSORS).read_bytes()
    manifest = _decode(body, str(_PRIOR_FOLDER))
    manifest.fold = (fold or FoldConfig()).model_dump()
    return _unpack(manifest, blob, "prior", degraded=True)


def _listed(store_uri: str, name: str) -> list[tuple[Manifest, bytes]]:
    fs, folder = _folder(store_uri, name)
    found = []
    for number in _numbers(fs, folder):
        path = f"{folder}/{number:06d}/{MANIFEST}"
        try:
            body = fs.cat_file(path)
        except FileNotFoundError:  # being published, or its publisher died
            continue
        try:
            found.append((_decode(body, f"{name}/{number:06d}"), body))
        except ArtifactError as error:
            log.warning("%s is left out: %s", path, error)
    return found


def _folder(store_uri: str, name: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, root = fsspec.core.url_to_fs(store_uri)
    return fs, f"{root.rstrip('/')}/{name}"


def _numbers(fs, folder: str) -> list[int]:
    """All numbers that are taken, ascending."""
    fs.invalidate_cache(folder)
    try:
        paths = fs.ls(folder, detail=False)
    except FileNotFoundError:
        return []
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
    return sorted(int(version) for version in names if _VERSION.fullmatch(version))


def _check_uri(fs, folder: str, name: str, version: ModelVersion) -> None:
    """The path must be the one that `publish` gives, which leaves no way out of the store."""
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version.version) or version.uri != f"{name}/{version.version}":
        raise ArtifactError("path", f"{version.uri!r} is not the path of version {version.version!r} of {name!r}")
    if isinstance(fs, LocalFileSystem):
        root = os.path.realpath(os.path.dirname(folder))
        for file in (MANIFEST, TENSORS):
            path = os.path.realpath(f"{folder}/{version.version}/{file}")
            if os.path.commonpath([root, path]) != root:
                raise ArtifactError("path", f"{version.uri}/{file} lies outside the store")


def _read(fs, path: str) -> bytes:
    try:
        return fs.cat_file(path)
    except OSError as error:
        raise ArtifactError("missing", f"{path} cannot be read: {error}") from error


def _decode(body: bytes, where: str) -> Manifest:
    try:
        return msgspec.json.decode(body, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArtifactError("manifest", f"{where}/{MANIFEST}: {error}") from error


def _check_fits(manifest: Manifest, announced_abi: int, fold: FoldConfig, size: str) -> None:
    if manifest.abi != STATE_ABI or announced_abi != STATE_ABI:
        raise ArtifactError("abi", f"made for state ABI {manifest.abi}; rows here have {STATE_ABI}")
    if manifest.config.size != size:
        raise ArtifactError("abi", f"made for rows of size {manifest.config.size!r}; rows here have {size!r}")
    if manifest.feature_version != FEATURE_VERSION or manifest.config.n_features != N_FEATURES:
        raise ArtifactError("fold", f"made for feature version {manifest.feature_version}; here it is {FEATURE_VERSION}")
    if manifest.fold != fold.model_dump():
        raise ArtifactError("fold", f"trained under the fold rules {manifest.fold}; here they are {fold.model_dump()}")


def _unpack(manifest: Manifest, blob: bytes, version: str, degraded: bool = False) -> Model:
    """Sum, tensors, finite numbers, recurrence, golden batch → Model."""
    if manifest.files.keys() != {TENSORS} or _sha256(blob) != manifest.files[TENSORS]:
        raise ArtifactError("sum", f"{TENSORS} of {version} is not the one that its manifest names")
    try:
        tensors = safetensors.load(blob)
    except SafetensorError as error:
        raise ArtifactError("manifest", f"{TENSORS} of {version}: {error}") from error
    _check_finite(tensors, version)
    try:
        model = _build(manifest, tensors, version, degraded)
        model.check()
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ArtifactError("manifest", f"the tensors of {version} are not what its manifest says: {error}") from error
    if model.recurrence_id != manifest.recurrence_id:
        raise ArtifactError("manifest", f"the recurrence of {version} is not the one that its manifest names")
    if model.student is not None:
        _check_golden(model, manifest.golden)
    return model


def _check_finite(tensors: dict[str, np.ndarray], version: str) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise ArtifactError("nonfinite", f"{key} of {version} holds a number that is not finite")


def _build(manifest: Manifest, tensors: dict[str, np.ndarray], version: str, degraded: bool) -> Model:
    state = {key.removeprefix("student."): torch.from_numpy(t) for key, t in tensors.items() if key[:8] == "student."}
    student = categories = None
    if state:
        student = Student(manifest.config)
        student.load_state_dict(state)
        student.eval()
    if "categories.names" in tensors:
        names = json.loads(tensors["categories.names"].tobytes())
        categories = CategoryTable(names=names, **{field: tensors[f"categories.{field}"] for field in _TABLE_FIELDS})
    return Model(
        version=version,
        config=manifest.config,
        student=student,
        categories=categories,
        calibration_P32=tensors["calibration"],
        fold=FoldConfig(**manifest.fold),
        degraded=degraded,
        judged_P32=tensors.get("calibration_judged"),
    )


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# ── the golden batch ─────────────────────────────────────────────────────────────────────────────────────────────────


def _make_golden(model: Model) -> Golden:
    """Made-up events: every platform and an unknown one, categories of the table and others, a duplicate, a replayed
    and a late one. No shopper's data lies in an artifact."""
    rng = np.random.default_rng(0)
    n = _GOLDEN_EVENTS
    events = np.zeros(n, EVENT)
    events["offset"] = np.arange(n)
    events["ts"] = _GOLDEN_START_MS + np.cumsum(rng.choice([20_000, 900_000, 14_000_000, 200_000_000], n))
    events["ts"][n // 2] -= 1_000_000
    events["id"] = rng.integers(1, 2**62, n)
    events["item"] = rng.integers(1, 2**32, 8)[rng.integers(0, 8, n)]
    known = [] if model.categories is None else model.categories.hashes_C[:12].tolist()
    events["category"] = np.array([0, 1234567, *known])[rng.integers(0, len(known) + 2, n)]
    events["quantity"] = rng.integers(1, 4, n)
    codes = [platform_code(platform) for platform in model.config.platforms]
    unknown = next(code for code in range(1, 1 << 16) if code not in codes)
    events["platform"] = np.array([*codes, unknown])[np.arange(n) % (len(codes) + 1)]
    events["kind"] = rng.integers(0, N_KINDS, n)
    events["price"] = rng.integers(0, 200, n)
    slots = rng.integers(0, _GOLDEN_USERS, n)
    slots[-2:] = slots[1], slots[2]
    events["id"][-2], events["offset"][-1] = events["id"][1], events["offset"][2]
    scores = _run_golden(model, events, slots)
    return Golden(
        events=events.tolist(),
        slots=slots.tolist(),
        p=_without_nan(scores.p_N3),
        category=scores.category_N5.tolist(),
        category_p=scores.category_p_N5.tolist(),
        shift=_without_nan(scores.shift_N),
    )


def _without_nan(array: np.ndarray) -> list:
    return np.where(np.isnan(array), None, array.astype(object)).tolist()


def _run_golden(model: Model, events: np.ndarray, slots: np.ndarray) -> Scores:
    """Two micro-batches; between them every other user's `h` is rebuilt from the ring. Raises `ArtifactError` where a
    head that a platform can have gets no number."""
    scorer, rows, middle = Scorer(model, "cpu"), empty_rows(_GOLDEN_USERS, model.config.size), 2 * len(events) // 3
    first, status = scorer.run(rows, slots[:middle], events[:middle])
    rows["h_version"][::2] = 0
    second, status_2 = scorer.run(rows, slots[middle:], events[middle:])
    scores = Scores(*(np.concatenate(parts) for parts in zip(first, second, strict=True)))
    status = np.concatenate([status, status_2])
    known = {platform_code(platform): i for i, platform in enumerate(model.config.platforms, start=1)}
    can_N3 = model.config.can_have()[[known.get(code, 0) for code in events["platform"].tolist()], : len(BINARY_HEADS)]
    if (np.isnan(scores.p_N3) != ~(can_N3 & (status != DUPLICATE)[:, None])).any():
        raise ArtifactError("golden", "a probability is missing, or one too many is there")
    return scores


def _check_golden(model: Model, golden: Golden | None) -> None:
    if golden is None or not golden.events or len(golden.events) != len(golden.slots):
        raise ArtifactError("golden", "there is no golden batch")
    try:
        events, slots = np.array(golden.events, EVENT), np.array(golden.slots, np.int64)
        expected = Scores(
            np.array(golden.p, np.float32),
            np.array(golden.category, np.int32),
            np.array(golden.category_p, np.float32),
            np.array(golden.shift, np.float32),
        )
        scores = _run_golden(model, events, slots)
    except (ValueError, OverflowError, IndexError) as error:
        raise ArtifactError("golden", f"the golden batch cannot be run: {error}") from error
    for name, is_, should in zip(Scores._fields, scores, expected, strict=True):
        if is_.shape != should.shape:
            _golden_differs(model, name, f"has shape {should.shape}, not {is_.shape}")
        if name == "category_N5":
            far = (is_ != should) & _has_no_equal(expected.category_p_N5)
        else:
            far = ~(np.isclose(is_, should, rtol=0.0, atol=GOLDEN_TOLERANCE, equal_nan=True))
        if far.any():
            at = tuple(np.argwhere(far)[0].tolist())
            _golden_differs(model, name, f"at {at} is {is_[at]}, not {should[at]}")


def _has_no_equal(p_N5: np.ndarray) -> np.ndarray:
    """Where two probabilities are as good as equal, another machine may name them in another order; the last of the
    five may have an equal that is not seen."""
    apart = p_N5[:, :-1] - p_N5[:, 1:] > 4 * GOLDEN_TOLERANCE
    end = np.zeros((len(p_N5), 1), bool)
    return np.concatenate([~end, apart], axis=1) & np.concatenate([apart, end], axis=1)


def _golden_differs(model: Model, name: str, how: str) -> NoReturn:
    raise ArtifactError("golden", f"{model.version} does not say what it said when it was published: {name} {how}")


# ── the prior ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_prior(folder: Path = _PRIOR_FOLDER) -> None:
    """Makes the prior's files, always the same."""
    rates_3 = np.array([PRIOR_RATES[head] for head in BINARY_HEADS])
    calibration_P32 = np.stack([np.ones(3), np.log(rates_3 / (1.0 - rates_3))], axis=1)[None].astype(np.float32)
    config = StudentConfig.of("cpu", N_FEATURES, (), {})
    prior = Model("prior", config, None, None, calibration_P32, FoldConfig(), degraded=True)
    manifest, blob = _pack("prior", prior, {}, {}, {}, 0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(blob)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["prior"]:
        sys.exit("usage: python -m models.artifact prior")
    write_prior()
