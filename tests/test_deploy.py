"""A whole demo, the dashboard on what Prometheus scraped of it, and the files of the deployment."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from crosscurrent import load_settings
from models.config import MetricsConfig
from streams.broker import ChildProcess, free_port
from streams.metrics import Metrics

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/crosscurrent.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no Prometheus here (Debian: apt-get install prometheus)"
)


# ── a demo, and the dashboard on it ─────────────────────────────────────────────────────────────────────────────────


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

    def values(self, query: str, span_s: tuple[float, float]) -> list[float]:
        """The numbers that a panel shows for that time, NaN left out."""
        start, end = (f"{s:.3f}" for s in span_s)
        found = self.ask("query_range", query=query, start=start, end=end, step="2")["result"]
        numbers = [float(value) for series in found for _, value in series["values"]]
        return [number for number in numbers if not math.isnan(number)]


class Demo(NamedTuple):
    """What a demo left behind that was told to stop once it had swapped a model in."""

    result: dict[str, Any]
    exit_code: int
    prometheus: Prometheus | None
    """Scraped the worker and the trainer throughout; None where there is none."""
    span_s: tuple[float, float]
    """When it ran, seconds since the epoch."""


def scraped(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def scores(port: int) -> float:
    """Sent so far, of all platforms."""
    found = (line for line in scraped(port).splitlines() if line.startswith("crosscurrent_scores_total{"))
    return sum(float(line.rpartition(" ")[2]) for line in found)


SCORED_BY_A_MODEL = 20_000
"""Events, by which time days of the simulator's clock have passed: purchases have matured on its smallest platform."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    ports = {"PORT": free_port(), "TRAINER_PORT": free_port()}
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CROSSCURRENT_")}
    environ |= {f"CROSSCURRENT_METRICS__{name}": str(port) for name, port in ports.items()}
    prometheus = Prometheus(folder, *ports.values()) if shutil.which("prometheus") else None
    started_s = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "crosscurrent", "demo", "--json"],
        cwd=DEPLOY.parent,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=(folder / "demo.log").open("wb"),
        text=True,
    )
    try:
        until = time.monotonic() + 300
        while 'model_info{model="student/' not in scraped(ports["PORT"]):
            log = (folder / "demo.log").read_text(errors="replace")[-3000:]
            assert process.poll() is None, log
            assert time.monotonic() < until, f"no model was swapped in within 300 s\n{log}"
            time.sleep(0.5)
        enough = scores(ports["PORT"]) + SCORED_BY_A_MODEL
        while scores(ports["PORT"]) < enough:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.5)
        span_s = started_s, time.time()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
        yield Demo(json.loads(out.splitlines()[-1]), process.returncode, prometheus, span_s)
    finally:
        process.kill()
        process.communicate()
        if prometheus is not None:
            prometheus.process.stop()


@pytest.mark.demo
def test_a_demo_that_is_stopped_has_lost_nothing(demo):
    result = demo.result
    assert demo.exit_code == 0
    assert result["lost"] == 0
    assert result["models_published"] >= 1
    assert result["model"].startswith("student/")
    assert len(result["platforms"]) >= 3
    assert result["events_in"] == result["refused"] + result["accepted"]
    assert result["scored_distinct"] == result["accepted"] - result["duplicates"] > 10_000
    assert min(result["refused"], result["duplicates"], result["p50_ms"]) > 0
    assert {platform for platform, heads in result["auc"].items() if heads} == set(result["platforms"])


def with_variables(text: str) -> str:
    """As Grafana sends it: `All` chosen everywhere, and a rate over 30 s."""
    for name in (v["name"] for v in DASHBOARD["templating"]["list"]):
        text = text.replace(f"${name}", ".*")
    return text.replace("$__rate_interval", "30s")


@pytest.mark.demo
@needs_prometheus
@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{i}" for i, (title, _) in enumerate(QUERIES)])
def test_every_query_returns_data(demo, title, query):
    query = with_variables(query)
    assert "$" not in query
    assert demo.prometheus.values(query, demo.span_s), f"{title}: no data for {query}"


@pytest.mark.demo
@needs_prometheus
def test_every_variable_finds_values(demo):
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            assert demo.prometheus.ask(f"label/{label}/values", **{"match[]": metric}), variable["name"]


@pytest.mark.demo
@needs_prometheus
def test_a_query_for_nothing_returns_nothing(demo):
    assert demo.prometheus.values("crosscurrent_no_such_metric", demo.span_s) == []


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
