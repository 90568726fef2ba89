"""deploy/: every query of the dashboard returns data from a real Prometheus that scraped our real exporters, and the
files of the deployment are well-formed and name only settings that exist."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from crosscurrent import load_settings
from models.config import MetricsConfig
from streams.broker import ChildProcess, free_port
from streams.metrics import STAGES, Health, Metrics, OpsServer
from trainer.run import _Metrics as TrainerMetrics

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/crosscurrent.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no Prometheus here (Debian: apt-get install prometheus)"
)


# ── the dashboard against Prometheus ─────────────────────────────────────────────────────────────────────────────────


def feed_worker(metrics: Metrics, rng: np.random.Generator) -> None:
    """What a working worker would count in a moment: something of everything."""
    for platform in ("sim_metro", "sim_grocer"):
        for stage in ("ingest", "score"):
            metrics.events.labels(platform, stage).inc(100)
            metrics.refused.labels(platform, "missing", stage).inc()
        metrics.duplicates.labels(platform).inc(2)
        metrics.late.labels(platform).inc(3)
        metrics.scores.labels(platform).inc(98)
    for stage in ("ingest", "score"):
        metrics.batch_events.labels(stage).observe(200)
    for stage in STAGES:
        metrics.stage[stage].observe(0.002)
    metrics.event_to_score_seconds.observe_many(rng.exponential(0.03, 200))
    metrics.lag_events.labels("events", 0).set(5)
    metrics.commits.inc()
    metrics.commit_seconds.observe(0.02)
    metrics.changelog_rows.inc(50)
    metrics.changelog_bytes.inc(50 * 1024)
    metrics.rebalances.inc()
    metrics.recovery_rows.inc(1000)
    metrics.recovery_seconds.set(1.5)
    metrics.recovery_in_progress.set(0)
    metrics.state_rows.set(1000)
    metrics.state_bytes.set(1_000_000)
    metrics.set_model("student/000001", int(time.time() * 1000) - 60_000, degraded=False)
    for outcome in ("loaded", "refused"):
        metrics.model_loads.labels(outcome).inc()
    metrics.model_refusals.labels("sum").inc()
    metrics.swap_pause_seconds.observe(0.0004)


def feed_trainer(metrics: TrainerMetrics) -> None:
    metrics.rounds.labels("published").inc()
    metrics.history_events.set(1e6)
    metrics.round_seconds.set(12)
    metrics.round_time.set(time.time())
    metrics.published.info({"version": "student/000001", "kind": "major", "uri": "student/000001"})
    for model in ("candidate", "incumbent"):
        metrics.log_loss.labels("sim_metro", "click", model).set(0.5)
        metrics.auc.labels("sim_metro", "click", model).set(0.7)
        metrics.hit_rate.labels("sim_metro", "category", model).set(0.6)


class Prometheus:
    """A real one, in a folder of its own, on loopback."""

    def __init__(self, folder: Path, worker_port: int, trainer_port: int) -> None:
        ports = {"worker": worker_port, "trainer": trainer_port}
        jobs = [{"job_name": j, "static_configs": [{"targets": [f"127.0.0.1:{p}"]}]} for j, p in ports.items()]
        (folder / "prometheus.yml").write_text(
            json.dumps({"global": {"scrape_interval": "500ms", "scrape_timeout": "400ms"}, "scrape_configs": jobs})
        )
        self._port = free_port()
        self.process = ChildProcess(folder / "prometheus.log")
        self.process.start(
            [
                shutil.which("prometheus"),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ]
        )
        if not self.process.wait_for_port(self._port, timeout_s=30) or not self._ready(timeout_s=30):
            self.process.stop()
            raise RuntimeError(f"Prometheus did not start:\n{self.process.log_tail()}")

    def _ready(self, timeout_s: float) -> bool:
        """It listens before it answers: 503 until its own database is read."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5).close()
                return True
            except urllib.error.HTTPError:
                time.sleep(0.1)
        return False

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """The numbers of an instant query, NaN left out."""
        found = [float(series["value"][1]) for series in self.ask("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory) -> Iterator[Prometheus]:
    """Prometheus after some seconds of scraping a fed worker and a fed trainer."""
    metrics, trainer = Metrics(), TrainerMetrics(MetricsConfig(trainer_port=0))
    server = OpsServer(metrics.registry, Health(), "127.0.0.1", 0)
    rng = np.random.default_rng(0)
    feed_worker(metrics, rng)
    feed_trainer(trainer)
    running = Prometheus(tmp_path_factory.mktemp("prometheus"), server.start(), trainer._server.server_port)
    try:
        until = time.monotonic() + 30
        while not running.values("count_over_time(crosscurrent_commits_total[1m]) >= 6") and time.monotonic() < until:
            feed_worker(metrics, rng)
            feed_trainer(trainer)
            time.sleep(0.2)
        yield running
    finally:
        running.process.stop()
        server.close()
        trainer.close()


def with_variables(text: str) -> str:
    """As Grafana sends it: `All` chosen everywhere, and a rate over 30 s."""
    for name in (v["name"] for v in DASHBOARD["templating"]["list"]):
        text = text.replace(f"${name}", ".*")
    return text.replace("$__rate_interval", "30s")


@needs_prometheus
@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{i}" for i, (title, _) in enumerate(QUERIES)])
def test_every_query_returns_data(prometheus, title, query):
    query = with_variables(query)
    assert "$" not in query
    assert prometheus.values(query), f"{title}: no data for {query}"


@needs_prometheus
def test_every_variable_finds_values(prometheus):
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            assert prometheus.ask(f"label/{label}/values", **{"match[]": metric}), variable["name"]


@needs_prometheus
def test_a_query_for_nothing_returns_nothing(prometheus):
    assert prometheus.values("crosscurrent_no_such_metric") == []


def test_every_metric_of_the_worker_is_on_the_dashboard():
    queries = " ".join(query for _, query in QUERIES)
    for family in Metrics().registry.collect():
        assert family.name in queries, family.name


def test_panels_neither_overlap_nor_share_an_id():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


# ── the other files ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("file", sorted(str(f.relative_to(DEPLOY)) for f in DEPLOY.rglob("*.y*ml")))
def test_yaml_is_well_formed(file):
    assert isinstance(yaml.safe_load((DEPLOY / file).read_text()), dict)


def test_compose_names_only_settings_that_exist_and_files_that_exist():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"kafka", "worker", "trainer", "prometheus", "grafana"}
    for name in ("worker", "trainer"):
        settings = load_settings(environ=services[name]["environment"])
        assert settings.kafka.bootstrap == "kafka:19092"
        assert settings.store.uri == "/var/lib/crosscurrent/store"
        for platform in settings.worker.platforms:
            assert (DEPLOY / "platforms" / f"{platform}.toml").is_file()
    for name in ("prometheus", "grafana"):
        for source in (volume.split(":")[0] for volume in services[name]["volumes"]):
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_prometheus_scrapes_the_ports_that_are_served():
    config = MetricsConfig()
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    scraped = {job["job_name"]: job["dns_sd_configs"][0]["port"] for job in jobs}
    assert scraped == {"worker": config.port, "trainer": config.trainer_port}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (Debian: apt-get install prometheus)")
def test_prometheus_accepts_its_configuration():
    done = subprocess.run(
        ["promtool", "check", "config", DEPLOY / "prometheus.yml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_holds_what_it_copies():
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    shown = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
    copied = {source for line in sources for source in line.split()}
    assert copied == shown
    assert all((DEPLOY.parent / source).exists() for source in copied)
