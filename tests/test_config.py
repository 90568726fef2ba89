"""Settings: which source wins, and what is said of a key or a value that cannot be."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import crosscurrent
from crosscurrent import ENV_NOT_SETTINGS, load_settings, setting_fields, settings_as_toml
from models.config import Settings
from models.errors import ConfigError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*overrides: str, config: Path | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_settings(list(overrides), config, environ)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_without_sources_the_defaults():
    assert load_settings(environ={}) == Settings()


def test_command_line_over_environment_over_file_over_defaults(empty_folder):
    file = empty_folder / "my.toml"
    file.write_text('[worker]\nmax_batch = 1\ncommit_interval_s = 2\napp_id = "file"\n[topics]\npartitions = 7\n')
    environ = {"CROSSCURRENT_WORKER__MAX_BATCH": "2", "CROSSCURRENT_WORKER__APP_ID": "environment"}
    settings = load_settings(["worker.max_batch=3"], file, environ)
    assert settings.worker.max_batch == 3
    assert settings.worker.app_id == "environment"
    assert settings.worker.commit_interval_s == 2.0
    assert settings.topics.partitions == 7
    assert settings.kafka == Settings().kafka


def test_file_in_the_working_folder_is_read(empty_folder):
    (empty_folder / "crosscurrent.toml").write_text('kafka.bootstrap = "broker:9092"\n')
    assert load_settings(environ={}).kafka.bootstrap == "broker:9092"


def test_named_file_replaces_the_one_in_the_folder(empty_folder):
    (empty_folder / "crosscurrent.toml").write_text("worker.threads = 5\n")
    (empty_folder / "other.toml").write_text("worker.max_batch = 5\n")
    settings = load_settings(config=empty_folder / "other.toml", environ={})
    assert (settings.worker.threads, settings.worker.max_batch) == (1, 5)


@pytest.mark.parametrize("text", ["ingest", '["ingest"]', " ingest ,"])
def test_lists_are_comma_separated_or_json(text):
    assert load_settings([f"worker.stages={text}"], environ={}).worker.stages == ("ingest",)
    assert load_settings(environ={"CROSSCURRENT_WORKER__STAGES": text}).worker.stages == ("ingest",)


def test_an_object_is_json():
    text = 'trainer.teacher_task_weights={"purchase": 2}'
    assert load_settings([text], environ={}).trainer.teacher_task_weights == {"purchase": 2.0}
    with pytest.raises(ConfigError, match="is no JSON object"):
        load_settings(["trainer.teacher_task_weights=purchase:2"], environ={})


def test_values_with_equals_signs_and_empty_values():
    assert load_settings(["pseudonym.key=a=b=="], environ={}).pseudonym.key.get_secret_value() == "a=b=="
    assert load_settings(["pseudonym.key_file="], environ={}).pseudonym.key_file is None


def test_every_setting_can_be_read_back_from_what_is_shown(empty_folder):
    weights = 'trainer.teacher_task_weights={"purchase": 2, "return": 0.5}'
    shown = settings_as_toml(load_settings(["worker.platforms=a,b", "store.uri=s3://ü/x", weights], environ={}), {})
    (empty_folder / "again.toml").write_text(shown)
    again = load_settings(config=empty_folder / "again.toml", environ={})
    assert again.worker.platforms == ("a", "b") and again.store.uri == "s3://ü/x"
    assert again.trainer.teacher_task_weights == {"purchase": 2.0, "return": 0.5}
    unset = [name for name, field in setting_fields().items() if field.default is None]
    keys = [f"{section}.{key}" for section, values in tomllib.loads(shown).items() for key in values]
    assert sorted([*keys, *unset]) == sorted(setting_fields())


def test_shown_settings_name_their_source_and_hide_secrets():
    trees = crosscurrent._trees(["pseudonym.key=geheim"], None, {"CROSSCURRENT_KAFKA__SASL_PASSWORD": "heimlich"})
    shown = settings_as_toml(crosscurrent._settings(trees), trees)
    assert 'key = "**********"  # command line' in shown
    assert 'sasl_password = "**********"  # environment' in shown
    assert "geheim" not in shown and "heimlich" not in shown


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("worker.max_bach", "worker.max_batch"),
        ("max_batch", "worker.max_batch"),
        ("trainer.max_batch", "worker.max_batch"),
        ("kafka.bootstrp", "kafka.bootstrap"),
    ],
)
def test_unknown_key_is_named_with_its_nearest_everywhere(empty_folder, wrong, right):
    assert refusal(f"{wrong}=1") == f"--set {wrong} is no setting; the nearest is {right}"
    variable = "CROSSCURRENT_" + wrong.upper().replace(".", "__")
    nearest = "CROSSCURRENT_" + right.upper().replace(".", "__")
    text = refusal(**{variable: "1"})
    assert variable in text and text.endswith(f"the nearest is {nearest}")
    (empty_folder / "bad.toml").write_text(f"{wrong} = 1\n")
    text = refusal(config=empty_folder / "bad.toml")
    assert "bad.toml" in text and wrong in text and text.endswith(f"the nearest is {right}")


def test_a_whole_section_is_no_setting():
    assert "CROSSCURRENT_KAFKA is no setting" in refusal(CROSSCURRENT_KAFKA="{}")
    assert "--set kafka is no setting" in refusal("kafka=1")


def test_variables_of_the_tests_and_of_others_are_let_be():
    environ = {name: "x" for name in ENV_NOT_SETTINGS} | {"PATH": "/bin", "CROSS": "1"}
    assert load_settings(environ=environ) == Settings()


def test_wrong_values_name_key_source_and_value(empty_folder):
    text = refusal("worker.max_batch=0", CROSSCURRENT_LOG__LEVEL="loud")
    assert "worker.max_batch (command line): input should be greater than or equal to 1, not '0'" in text
    assert "log.level (environment)" in text and "'loud'" in text
    (empty_folder / "bad.toml").write_text("[topics]\npartitions = 1.5\n")
    assert "topics.partitions" in (text := refusal(config=empty_folder / "bad.toml")) and "bad.toml" in text


def test_keys_that_do_not_fit_each_other_are_said_of_their_section():
    assert refusal("trainer.transfer=auto").startswith("trainer: transfer and transfer_to go together")


def test_a_wrong_secret_is_not_repeated(empty_folder):
    (empty_folder / "bad.toml").write_text("[pseudonym]\nkey = 123456789\n")
    text = refusal(config=empty_folder / "bad.toml")
    assert "pseudonym.key" in text and "123456789" not in text


def test_lists_that_are_no_json_and_overrides_without_value():
    assert "worker.stages" in refusal('worker.stages=["ingest"')
    assert "write --set section.key=value" in refusal("worker.max_batch")


def test_files_that_cannot_be_read(empty_folder):
    assert "No such file" in refusal(config=empty_folder / "none.toml")
    (empty_folder / "broken.toml").write_text("[worker\n")
    assert "is no TOML" in refusal(config=empty_folder / "broken.toml")
    (empty_folder / "latin.toml").write_bytes(b'[worker]\napp_id = "\xff"\n')
    assert "is no TOML" in refusal(config=empty_folder / "latin.toml")


def test_an_empty_file_is_no_error(empty_folder):
    (empty_folder / "crosscurrent.toml").write_text("")
    assert load_settings(environ={}) == Settings()
