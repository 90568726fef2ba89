"""The teacher's transformer by the trainer's settings: by one process or several, stopped, gone on with, and begun again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from synthetic_history import examples_until, make_canonical, make_config, store_events
from test_transformer import Stopped, stopping_after

from models.config import Settings
from models.errors import ConfigError
from trainer import pretrain
from trainer.history import HistoryStore
from trainer.transformer_fit import load_network

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("one_thread", "one_copy")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> HistoryStore:
    store = HistoryStore(str(tmp_path_factory.mktemp("history")))
    store_events(store, make_canonical(80))
    return store


@pytest.fixture(scope="module")
def task(store):
    """→ (examples, offsets, platforms)"""
    history = store.read()
    examples = examples_until(history, make_config(history))
    rates = np.full(examples.y_MT.shape, -1.0, np.float32)
    rates[::7, 0] = np.nan  # a platform × task that nobody is taught
    return examples, rates, history.platforms


def settings_of(folder: Path, **trainer) -> Settings:
    options = {"teacher_transformer": "cpu", "teacher_dir": folder, "teacher_device": "cpu", **trainer}
    return Settings(trainer=options, worker={"data_dir": folder})


@pytest.fixture(scope="module")
def first(task, tmp_path_factory):
    """→ a run that was never stopped, how often it looked whether it should, its share of progress, its folder."""
    folder, calls, shares = tmp_path_factory.mktemp("first"), [], []
    fitted = pretrain.fit_kept(settings_of(folder), *task, check=lambda: calls.append(1), progress=shares.append)
    return fitted, len(calls), shares, folder


def same(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_trained_is_kept_and_no_checkpoint_is_left(first):
    fitted, _, shares, folder = first
    assert fitted.adds and same(load_network(folder / "transformer.safetensors"), fitted.network)
    assert [path.name for path in folder.iterdir()] == ["transformer.safetensors"]
    assert shares == sorted(shares) and 0.0 < shares[0] < shares[-1] <= 1.0


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same(task, first, tmp_path):
    fitted, calls, *_ = first
    with pytest.raises(Stopped):
        pretrain.fit_kept(settings_of(tmp_path), *task, check=stopping_after(calls // 2))
    assert (tmp_path / "checkpoint" / "checkpoint.json").exists() and not (tmp_path / "transformer.safetensors").exists()
    counted: list[int] = []
    again = pretrain.fit_kept(settings_of(tmp_path), *task, check=lambda: counted.append(1))
    assert same(again.network, fitted.network) and len(counted) < calls


def test_a_checkpoint_of_another_run_is_deleted_with_a_word(task, first, tmp_path, capsys):
    fitted, calls, *_ = first
    with pytest.raises(Stopped):
        pretrain.fit_kept(settings_of(tmp_path, seed=5), *task, check=stopping_after(calls // 2))
    assert (tmp_path / "checkpoint" / "checkpoint.json").exists()
    assert same(pretrain.fit_kept(settings_of(tmp_path), *task).network, fitted.network)
    assert "belongs to a run with other data, settings or ranks" in capsys.readouterr().out


def test_the_next_one_begins_with_the_last_and_a_damaged_one_is_not_used(task, first, tmp_path, capsys):
    fitted, _, _, folder = first
    (tmp_path / "transformer.safetensors").write_bytes((folder / "transformer.safetensors").read_bytes())
    refreshed = pretrain.fit_kept(settings_of(tmp_path), *task)
    # It is judged before it learns anything, so it is no worse.
    assert refreshed.check_loss <= fitted.check_loss and not same(refreshed.network, fitted.network)
    (tmp_path / "transformer.safetensors").write_bytes(b"nothing of the kind")
    capsys.readouterr()
    assert same(pretrain.fit_kept(settings_of(tmp_path), *task).network, fitted.network)
    assert "the last transformer is not used" in capsys.readouterr().out


def test_tensorboard_has_the_losses(task, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain.fit_kept(settings_of(tmp_path, teacher_tensorboard=True), *task)
    (run,) = (tmp_path / "tensorboard").iterdir()
    found = reader.EventAccumulator(str(run)).Reload()
    assert {"train/loss", "check/log_loss_over_offsets"} <= set(found.Tags()["scalars"])


def test_weights_of_tasks_and_devices_come_from_the_settings(task, tmp_path):
    with pytest.raises(ConfigError, match="task weights"):
        pretrain.fit_kept(settings_of(tmp_path, teacher_task_weights={"churn": 2.0}), *task)
    weighted = pretrain.fit_kept(settings_of(tmp_path, teacher_task_weights={"purchase": 3.0}), *task)
    assert weighted.network.config.task_weights == {"purchase": 3.0}
    assert pretrain.device_of("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert pretrain.device_of("auto").type == "cpu"
        with pytest.raises(ConfigError, match="no card"):
            pretrain.device_of("cuda:1")


def run_with_torchrun(ranks: int, folder: Path, store: HistoryStore) -> subprocess.CompletedProcess:
    config = folder / "crosscurrent.toml"
    config.write_text(
        f'[trainer]\nhistory_uri = "{store.uri}"\nteacher_transformer = "cpu"\nteacher_dir = "{folder}/teacher"\n'
        'teacher_device = "cpu"\n'
    )
    launch = ["--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "--no-python"]
    command += [str(Path(sys.executable).with_name("crosscurrent")), "teacher", "--config", str(config)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("CROSSCURRENT_")}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_torchrun_with_two_ranks_trains_one_transformer(store, tmp_path):
    done = run_with_torchrun(2, tmp_path, store)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)  # of rank 0 alone
    said = json.loads(line)
    assert said["ranks"] == 2 and said["examples"] > 1000
    assert said["log_loss"] <= said["log_loss_of_the_offsets"] < 0.7
    assert load_network(Path(said["kept"])).config.platforms == ("shop", "till")


def test_without_a_size_or_labels_it_says_what_to_do(tmp_path, store):
    with pytest.raises(ConfigError, match=r"set trainer\.teacher_transformer"):
        pretrain.pretrain(settings_of(tmp_path, teacher_transformer=None))
    empty = settings_of(tmp_path, history_uri=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="no label of"):
        pretrain.pretrain(empty)


def test_the_kept_file_says_its_configuration(first):
    config = load_network(first[3] / "transformer.safetensors").config
    assert msgspec.json.decode(msgspec.json.encode(config))["width"] == config.width == 64
