"""The command line: the one place that knows both streams and trainer.

Settings come from, in this order: the command line (`--set`, `--bootstrap`), the environment (CROSSCURRENT_…), a TOML
file (`--config`, or ./crosscurrent.toml where it exists), the defaults of `models/config.py`. A key that does not exist
is an error, wherever it stands. Everything heavy is imported inside its command, so that `--help` is quick.

Exit codes: 0 done; 1 it failed while it ran; 2 refused before it began (a setting, an option, no Kafka); 130 Ctrl-C.
"""

from __future__ import annotations

import asyncio
import difflib
import errno
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.errors import ConfigError, CrosscurrentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.config import Settings

ENV_PREFIX = "CROSSCURRENT_"
ENV_DELIMITER = "__"
ENV_NOT_SETTINGS = {"CROSSCURRENT_DATA", "CROSSCURRENT_KILL_AT", "CROSSCURRENT_TEST_BROKER"}
"""Variables of ours that are no settings: they belong to the tests and the benchmarks."""
DEFAULT_CONFIG = Path("crosscurrent.toml")
MASK = "**********"
_BEGAN_S = time.monotonic()

# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Tree = dict[str, Any]
"""Settings as nested dicts: section → key → value, only what a source gives."""


def setting_fields() -> dict[str, Any]:
    """Every setting: `section.key` → its pydantic field, in the order of models/config.py."""
    from models.config import Settings

    return {
        f"{section}.{key}": field
        for section, of_section in Settings.model_fields.items()
        for key, field in of_section.annotation.model_fields.items()
    }


def load_settings(
    overrides: list[str] | None = None, config: Path | None = None, environ: dict[str, str] | None = None
) -> Settings:
    """The settings of all sources. `overrides` are texts `section.key=value`. Raises `ConfigError`, in one line."""
    return _settings(_trees(overrides or [], config, os.environ if environ is None else environ))


def _trees(overrides: list[str], config: Path | None, environ: Any) -> dict[str, Tree]:
    """What each source gives, checked for unknown keys: its name → its tree, strongest first."""
    toml_name, toml = _from_toml(config)
    return {"command line": _from_overrides(overrides), "environment": _from_environ(environ), toml_name: toml}


def _from_overrides(overrides: list[str]) -> Tree:
    tree: Tree = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} has no value: write --set section.key=value")
        key = key.strip()
        _require_known(key, f"--set {key}")
        _put(tree, key, _parse(key, value))
    return tree


def _from_environ(environ: Any) -> Tree:
    tree: Tree = {}
    for name in sorted(environ):
        if not name.upper().startswith(ENV_PREFIX) or name in ENV_NOT_SETTINGS:
            continue
        key = name[len(ENV_PREFIX) :].lower().replace(ENV_DELIMITER, ".")
        if key not in setting_fields():
            near = ENV_PREFIX + _nearest(key).upper().replace(".", ENV_DELIMITER)
            raise ConfigError(f"the environment variable {name} is no setting; the nearest is {near}")
        _put(tree, key, _parse(key, environ[name]))
    return tree


def _from_toml(path: Path | None) -> tuple[str, Tree]:
    if path is None and not DEFAULT_CONFIG.exists():
        return str(DEFAULT_CONFIG), {}
    path = path or DEFAULT_CONFIG
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {path} is no TOML: {error}") from error
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: unknown setting {section}; the nearest is {_nearest(section)}")
        for key in values:
            _require_known(f"{section}.{key}", f"{path}: {section}.{key}")
    return str(path), tree


def _require_known(key: str, where: str) -> None:
    if key not in setting_fields():
        raise ConfigError(f"{where} is no setting; the nearest is {_nearest(key)}")


def _nearest(key: str) -> str:
    """The setting whose name is most like `key`; a key right but for its section is the nearest."""
    fields = list(setting_fields())
    same_key = [name for name in fields if name.split(".")[1] == key.rsplit(".", 1)[-1]]
    return difflib.get_close_matches(key, same_key or fields, n=1, cutoff=0.0)[0]


def _parse(key: str, text: str) -> Any:
    """A text for `key` as pydantic takes it: a list is comma-separated or JSON, an object JSON, an empty text is none where
    allowed."""
    annotation = str(setting_fields()[key].annotation)
    is_list = "tuple[" in annotation.lower()
    if annotation.startswith("dict[") or (is_list and text.lstrip().startswith("[")):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key}: {text!r} is no JSON {'list' if is_list else 'object'}: {error}") from error
    if is_list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if text == "" and "None" in annotation:
        return None
    return text


def _put(tree: Tree, key: str, value: Any) -> None:
    section, name = key.split(".")
    tree.setdefault(section, {})[name] = value


def _settings(trees: dict[str, Tree]) -> Settings:
    from pydantic import ValidationError
    from pydantic_settings import BaseSettings, InitSettingsSource

    from models.config import Settings

    class Layered(BaseSettings, Settings):
        @classmethod
        def settings_customise_sources(cls, settings_cls, **_):
            return tuple(InitSettingsSource(settings_cls, tree) for tree in trees.values())

    try:
        return Settings.model_validate(Layered().model_dump())
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, trees) for e in error.errors())) from error


def _explain(error: Any, trees: dict[str, Tree]) -> str:
    """One pydantic error: the key, what is wrong, the value unless secret, and the source it came from. What is wrong with
    keys that do not fit each other is said of their section."""
    if len(error["loc"]) == 1:
        return f"{error['loc'][0]}: {error['msg'].removeprefix('Value error, ')}"
    section, key = str(error["loc"][0]), str(error["loc"][1])
    source = next((name for name, tree in trees.items() if key in tree.get(section, {})), "defaults")
    secret = "SecretStr" in str(setting_fields()[f"{section}.{key}"].annotation)
    got = "" if secret else f", not {error['input']!r}"
    return f"{section}.{key} ({source}): {error['msg'][:1].lower()}{error['msg'][1:]}{got}"


def settings_as_toml(settings: Settings, sources: dict[str, Tree]) -> str:
    """All settings as TOML that can be read back (but for masked secrets), each with the source that it came from."""
    lines = []
    for section, values in settings.model_dump().items():
        lines += ["", f"[{section}]"]
        for key, value in values.items():
            source = next((name for name, tree in sources.items() if key in tree.get(section, {})), None)
            text = f"# {key} is not set" if value is None else f"{key} = {_toml_value(value)}"
            lines.append(f"{text}  # {source}" if source else text)
    return "\n".join(lines[1:])


def _toml_value(value: Any) -> str:
    from pydantic import SecretStr

    if isinstance(value, SecretStr):
        return f'"{MASK}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key, ensure_ascii=False)} = {_toml_value(own)}" for key, own in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────

app = typer.Typer(
    name="crosscurrent",
    help="Scores every shopper event within milliseconds of its arrival in Kafka.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: loading rich would take longer than all the rest of it
)
history_app = typer.Typer(help="The trainer's history of events.")
models_app = typer.Typer(help="Published models.")
dead_letters_app = typer.Typer(help="Refused events.")
config_app = typer.Typer(help="Settings.")
app.add_typer(history_app, name="history")
app.add_typer(models_app, name="models")
app.add_typer(dead_letters_app, name="dead-letters")
app.add_typer(config_app, name="config")

Bootstrap = Annotated[str | None, typer.Option("--bootstrap", metavar="HOST:PORT", help="Kafka brokers.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings file, TOML.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. worker.max_batch=1024.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output, one JSON object a line.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Only those refused for this reason.")]


def _overrides(bootstrap: str | None, assignments: list[str] | None, *more: str) -> list[str]:
    own = [f"kafka.bootstrap={bootstrap}"] if bootstrap is not None else []
    return [*own, *more, *(assignments or [])]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("crosscurrent"))
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    seconds: Annotated[float | None, typer.Option(min=1, help="How long it runs; default: until Ctrl-C.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of real data sets; default: the simulator.")] = None,
    json_output: Json = False,
    config: Config = None,
    assignments: Set = None,
) -> int:
    """Broker, simulator, worker and trainer in one terminal, with nothing to set up."""
    settings = load_settings(_overrides(None, assignments), config)
    _configure_logging(settings)
    from streams.demo import run_demo

    return run_demo(settings, seconds, json_output, data, _labeller(settings))


def _labeller(settings: Settings) -> Callable[[Any], tuple[Any, Any]]:
    """The trainer's labels for what the demo observes: (labels (n, 3), matured (n, 4))."""
    from trainer.history import History
    from trainer.labels import make_labels, matured

    def label(seen: Any) -> tuple[Any, Any]:
        offsets = seen.events["offset"]
        history = History(seen.events, seen.user, seen.platform, seen.partition, offsets, seen.users, seen.platforms)
        labels = make_labels(history, settings.fold, settings.horizons)
        return labels.y_N3, matured(labels, seen.events["ts"], settings.horizons)

    return label


@app.command()
def worker(
    stages: Annotated[str | None, typer.Option(help="`ingest`, `score`, or both with a comma.")] = None,
    bootstrap: Bootstrap = None,
    config: Config = None,
    assignments: Set = None,
) -> int:
    """Take events in and score them, until SIGTERM or Ctrl-C."""
    gc.disable()  # until all is loaded: modules are many objects, which stay; looking at them takes a quarter of the time
    try:
        more = [f"worker.stages={stages}"] if stages is not None else []
        settings = load_settings(_overrides(bootstrap, assignments, *more), config)
        _require_kafka(settings)
        _configure_logging(settings)
        from streams.app import run_worker

        return run_worker(settings, _BEGAN_S)
    finally:
        gc.enable()


@app.command()
def trainer(
    once: Annotated[bool, typer.Option("--once", help="One round, then exit.")] = False,
    bootstrap: Bootstrap = None,
    config: Config = None,
    assignments: Set = None,
) -> int:
    """Keep a history of events, train on it, publish what is better; until SIGTERM or Ctrl-C."""
    settings = load_settings(_overrides(bootstrap, assignments), config)
    _require_kafka(settings)
    _configure_logging(settings)
    from streams.platforms import load_platforms
    from trainer.run import run_trainer

    heads = {p.name: p.heads for p in load_platforms(settings.worker.platforms_dir, settings.worker.platforms)}
    try:
        results = asyncio.run(run_trainer(settings, once, heads=heads))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        port = settings.metrics.trainer_port
        raise ConfigError(f"port {port} is in use: set metrics.trainer_port to a free one (0 takes any)") from error
    return 1 if once and results[-1].outcome == "failed" else 0


@app.command()
def teacher(config: Config = None, assignments: Set = None) -> int:
    """Train the teacher's transformer on the stored history; under torchrun, on several devices together.

    What it leaves in trainer.teacher_dir is where the next teacher of the trainer begins. For example, on four cards:
    torchrun --no-python --nproc-per-node 4 crosscurrent teacher --config crosscurrent.toml
    """
    settings = load_settings(_overrides(None, assignments), config)
    _configure_logging(settings)
    from trainer.pretrain import pretrain

    done = pretrain(settings)
    if done["rank"] == 0:
        typer.echo(json.dumps(done))
    return 0


@app.command()
def broker(
    port: Annotated[int, typer.Option(min=1, max=65535, help="On loopback.")] = 9092,
) -> int:
    """Run the embedded broker: in memory, gone when it stops. For development."""
    from streams.broker import EmbeddedBroker

    stop = _stop_on_signal()
    with EmbeddedBroker(port) as running:
        typer.echo(f"broker at {running.bootstrap}, in memory; Ctrl-C stops it and forgets its records")
        while not stop.wait(0.5):
            if not running.running:
                typer.echo(f"error: the broker has exited; its log is {running.log_path}", err=True)
                return 1
    return 0


@app.command()
def replay(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the data set.")],
    platform: Annotated[Path, typer.Option(metavar="FILE", help="Platform file with a [replay] table.")],
    rate: Annotated[float | None, typer.Option(min=0.001, help="Events a second of the live share.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N events.")] = None,
    live_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The latest share of the time span: sent at --rate.")
    ] = 0.1,
    bootstrap: Bootstrap = None,
    config: Config = None,
    assignments: Set = None,
) -> int:
    """Send a recorded data set as its platform would have, shifted in time so that its last event is now."""
    settings = load_settings(_overrides(bootstrap, assignments), config)
    _require_kafka(settings)
    from streams.produce import produce

    with _console(stderr=True).status("reading the data set") as status:

        def show(sent: int, live: bool) -> None:
            status.update(f"{sent} events sent, {'live' if live else 'backfilling'}")

        done = asyncio.run(produce(settings, directory, platform, rate, limit, live_share, show))
    typer.echo(f"{done.backfilled} events backfilled, {done.live} sent live, in {done.seconds:.1f} s")
    return 0


@history_app.command("import")
def history_import(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="JSONL or Parquet of canonical events.")],
    config: Config = None,
    assignments: Set = None,
) -> int:
    """Add canonical events from elsewhere to the trainer's history, before those from Kafka."""
    settings = load_settings(_overrides(None, assignments), config)
    from trainer.history import HistoryStore, import_events

    for done in import_events(HistoryStore(settings.trainer.history_uri), sources):
        outcome = f"{done.events} events, {done.refused} refused" if done.k else "imported before, skipped"
        typer.echo(f"{done.source}: {outcome}")
    return 0


@models_app.command("list")
def models_list(json_output: Json = False, config: Config = None, assignments: Set = None) -> int:
    """Versions in the artifact store, newest first."""
    settings = load_settings(_overrides(None, assignments), config)
    import msgspec

    from models.artifact import list_versions

    manifests = sorted(list_versions(settings.store.uri, settings.store.name), key=lambda m: m.version, reverse=True)
    if json_output:
        for manifest in manifests:
            typer.echo(msgspec.json.encode(_model_row(manifest)))
    elif not manifests:
        typer.echo(f"no version of {settings.store.name!r} in {settings.store.uri}")
    else:
        _print_table([{**_model_row(m), "created_at": _utc(m.created_at)} for m in manifests])
    return 0


def _model_row(manifest: Any) -> dict[str, Any]:
    return {
        "version": f"{manifest.name}/{manifest.version}",
        "kind": manifest.kind,
        "created_at": manifest.created_at,
        "recurrence_id": manifest.recurrence_id,
        "parent": manifest.parent,
    }


@models_app.command("show")
def models_show(
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="As `models list` names it; default: newest.")
    ] = None,
    json_output: Json = False,
    config: Config = None,
    assignments: Set = None,
) -> int:
    """What the gate said of a version when it was published: every rule, cell and slice, with its numbers; and how it was
    calibrated after that."""
    settings = load_settings(_overrides(None, assignments), config)
    manifest = _manifest(settings, version)
    verdict = manifest.metrics.get("gate")
    row = {**_model_row(manifest), "training_range": manifest.training_range}
    if json_output:
        recalibrated = manifest.metrics.get("recalibrated")
        typer.echo(json.dumps({**row, "gate": verdict, "recalibrated": recalibrated}, ensure_ascii=False))
        return 0
    published = f"published {_utc(manifest.created_at)}, follows {manifest.parent or 'none'}"
    typer.echo(f"{row['version']}: {manifest.kind}, {published}")
    if not verdict:
        typer.echo("its manifest holds no verdict of the gate")
        return 0
    typer.echo(f"{verdict['outcome']}: {verdict['reason']}")
    typer.echo(
        f"{verdict['events']} events of {verdict['users']} users; candidate against incumbent, 95 % intervals by user"
    )
    for rows in (_rule_rows(verdict), _cell_rows(verdict), _slice_rows(verdict)):
        if rows:
            typer.echo()
            _print_table(rows)
    if rows := _line_rows(manifest.metrics.get("recalibrated", {})):
        typer.echo("\ncalibrated once more by those events, on each logit:")
        _print_table(rows)
    return 0


def _manifest(settings: Settings, version: str | None) -> Any:
    """The manifest of a version (`student/000002`, `000002` or `2`), None: the newest. Raises `ConfigError` for none."""
    from models.artifact import list_versions

    name, where = settings.store.name, settings.store.uri
    manifests = list_versions(where, name)
    if not manifests:
        raise ConfigError(f"no version of {name!r} in {where}")
    if version is None:
        return manifests[-1]
    number = version.removeprefix(f"{name}/")
    found = [m for m in manifests if number.isdecimal() and int(m.version) == int(number)]
    if not found:
        raise ConfigError(f"no version {version!r} of {name!r} in {where}; the newest is {name}/{manifests[-1].version}")
    return found[0]


def _rule_rows(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"rule": rule["name"], "outcome": "refused" if rule["refusals"] else "passed", "found": rule["found"]}
        for rule in verdict["rules"]
    ]


def _cell_rows(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: cell[key] for key in ("platform", "head", "n", "users", "positives")}
        | {key: _compared(cell[key]) for key in ("log_loss", "auc", "pr_auc")}
        | {key: _interval(cell[key]) for key in ("ece", "predicted_over_actual")}
        for cell in verdict["cells"]
    ]


def _slice_rows(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that had enough positives to be judged."""
    return [
        {"slice": f"{part['dimension']} {part['name']}"}
        | {key: part[key] for key in ("head", "n", "users", "positives")}
        | {"log_loss": _compared(part["log_loss"]), "p_value": part["p_value"], "worse": part["worse"]}
        for part in verdict["slices"]
        if part["p_value"] is not None
    ]


def _line_rows(recalibrated: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"platform": platform, "head": head} | {key: line[key] for key in ("slope", "offset", "events", "users", "young")}
        for platform, heads in recalibrated.items()
        for head, line in heads.items()
    ]


def _compared(figure: dict[str, Any]) -> str:
    """`incumbent -> candidate (difference [low, high])`; what there is none of is left out."""
    if figure["candidate"] is None:
        return ""
    incumbent = "" if figure["incumbent"] is None else f"{figure['incumbent']:.4f} "
    difference = _interval(figure["difference"], "+.4f")
    return f"{incumbent}-> {figure['candidate']:.4f}" + (f" ({difference})" if difference else "")


def _interval(figure: dict[str, Any], form: str = ".4f") -> str:
    if figure["value"] is None:
        return ""
    bounds = "" if figure["low"] is None else f" [{figure['low']:{form}}, {figure['high']:{form}}]"
    return f"{figure['value']:{form}}{bounds}"


@dead_letters_app.command("list")
def dead_letters_list(
    limit: Annotated[int, typer.Option(min=1, help="The N refused last.")] = 50,
    reason: Reason = None,
    json_output: Json = False,
    bootstrap: Bootstrap = None,
    config: Config = None,
    assignments: Set = None,
) -> int:
    """Show what was refused, and why. Never shows the records themselves: they hold raw user ids."""
    settings = load_settings(_overrides(bootstrap, assignments), config)
    _check_reason(reason)
    _require_kafka(settings)
    from streams import dead_letters

    letters = asyncio.run(dead_letters.newest(settings.kafka, settings.topics.dead_letters, limit, reason))
    if json_output:
        for letter in letters:
            typer.echo(json.dumps(_letter_row(letter), ensure_ascii=False))
    elif not letters:
        typer.echo("no dead letters")
    else:
        _print_table([{**row, "time": _utc(row["time"])} for row in map(_letter_row, letters)])
    return 0


def _letter_row(letter: Any) -> dict[str, Any]:
    meta = letter.meta
    if meta is None:
        source, text = (
            f"{letter.topic}/{letter.partition}/{letter.offset}",
            "no dead letter of ours: its headers are missing",
        )
        return {"time": None, "source": source, "stage": None, "reason": "unreadable", "detail": text}
    return {
        "time": meta.refused_at,
        "source": f"{meta.source_topic}/{meta.source_partition}/{meta.source_offset}",
        "stage": meta.stage,
        "reason": meta.reason,
        "detail": meta.detail,
    }


@dead_letters_app.command("replay")
def dead_letters_replay(
    limit: Annotated[int | None, typer.Option(min=1, help="At most N.")] = None,
    reason: Reason = None,
    bootstrap: Bootstrap = None,
    config: Config = None,
    assignments: Set = None,
) -> int:
    """Send refused records to the topics that they came from, once what refused them is mended."""
    settings = load_settings(_overrides(bootstrap, assignments), config)
    _check_reason(reason)
    _require_kafka(settings)
    from streams import dead_letters

    done = asyncio.run(dead_letters.replay(settings.kafka, settings.topics.dead_letters, limit, reason))
    typer.echo(f"{done.sent} sent again")
    for letter in done.too_large:
        source = f"{letter.meta.source_topic}/{letter.meta.source_partition}/{letter.meta.source_offset}"
        typer.echo(f"not sent: {source} is too large to be kept ({letter.meta.size} bytes); it is still at its source")
    if done.unreadable:
        typer.echo(f"not sent: {len(done.unreadable)} without the headers of a dead letter")
    return 0


@config_app.command("show")
def config_show(bootstrap: Bootstrap = None, config: Config = None, assignments: Set = None) -> int:
    """Print every setting and where it came from, as TOML. Secrets are masked."""
    trees = _trees(_overrides(bootstrap, assignments), config, os.environ)
    typer.echo(settings_as_toml(_settings(trees), trees))
    return 0


# ── parts of commands ────────────────────────────────────────────────────────────────────────────────────────────────


def _require_kafka(settings: Settings) -> None:
    """Refuses in a second, before anything heavy is loaded, where no broker answers."""
    from streams.kafka import connected

    async def knock() -> None:
        async with connected(settings.kafka):
            pass

    try:
        asyncio.run(knock())
    except ConfigError as error:
        hint = "start one (`crosscurrent broker` runs one in memory) or name yours with --bootstrap HOST:PORT"
        raise ConfigError(f"{error}; {hint}") from error


def _check_reason(reason: str | None) -> None:
    from models.events import REFUSAL_REASONS

    if reason is not None and reason not in REFUSAL_REASONS:
        raise ConfigError(f"--reason {reason} is none of {', '.join(REFUSAL_REASONS)}")


def _stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set, so that work ends where it is safe."""
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    return stop


def _utc(ms: int | None) -> str:
    return "" if ms is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ms / 1000))


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _print_table(rows: list[dict[str, Any]]) -> None:
    """A table on a terminal, tab-separated lines in a pipe, where a table would be cut to 80 columns."""
    if not sys.stdout.isatty():
        for cells in ([*rows[0]], *(row.values() for row in rows)):
            typer.echo("\t".join("" if cell is None else str(cell) for cell in cells))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0], box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row.values()))
    _console().print(table)


def _configure_logging(settings: Settings) -> None:
    """Our log lines and those of the libraries, in one format, on stderr."""
    import structlog

    as_json = settings.log.format == "json" or (settings.log.format == "auto" and not sys.stderr.isatty())
    common = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    final = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, last]
    if as_json:
        final.insert(1, structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=final, foreign_pre_chain=common))
    logging.basicConfig(handlers=[handler], level=settings.log.level, force=True)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. What is refused is said in one line, without a traceback."""
    # The clients log each failed connection beside the error that we report; without a handler they would reach stderr.
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
    try:
        code = app(args=(sys.argv[1:] if argv is None else argv) or ["--help"], standalone_mode=False)
        return code if isinstance(code, int) else 0
    except CrosscurrentError as error:
        typer.echo(f"error: {error}", err=True)
        return 2 if isinstance(error, ConfigError) else 1
    except typer.Abort:
        return 130
    except Exception as error:
        # A usage error of the command line, whose class typer does not export.
        if not hasattr(error, "format_message"):
            raise
        typer.echo(f"error: {error.format_message()} (crosscurrent --help shows the commands)", err=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
