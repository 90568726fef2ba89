"""The worker's metrics and its HTTP server, scraped over a real socket."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from models.errors import ConfigError
from streams.metrics import STAGES, Health, Metrics, OpsServer


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def served():
    metrics, health = Metrics(CollectorRegistry()), Health(beat_timeout_s=0.5)
    server = OpsServer(metrics.registry, health, "127.0.0.1", 0)
    port = server.start()
    yield metrics, health, port
    server.close()


def samples(text: str) -> dict[tuple[str, tuple], float]:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_what_is_counted_is_scraped(served):
    metrics, _, port = served
    metrics.events.labels("shop", "ingest").inc(3)
    metrics.refused.labels("shop", "not_json", "ingest").inc()
    metrics.set_model("student/000007", 1_700_000_000_000, degraded=False)
    with metrics.stage["fold"].time():
        pass
    status, text = get(port, "/metrics")
    assert status == 200
    found = samples(text)
    assert found["crosscurrent_events_total", (("platform", "shop"), ("stage", "ingest"))] == 3
    refused = (("platform", "shop"), ("reason", "not_json"), ("stage", "ingest"))
    assert found["crosscurrent_refused_total", refused] == 1
    assert found["crosscurrent_model_info", (("model", "student/000007"),)] == 1
    assert found["crosscurrent_model_published_timestamp_seconds", ()] == 1_700_000_000
    assert found["crosscurrent_stage_seconds_count", (("stage", "fold"),)] == 1
    assert all(("crosscurrent_stage_seconds_count", (("stage", s),)) in found for s in STAGES)


def test_only_one_model_is_shown():
    metrics = Metrics()
    metrics.set_model("prior", 0, degraded=True)
    metrics.set_model("student/000001", 5000, degraded=False)
    shown = [s.labels["model"] for m in metrics.registry.collect() if m.name == "crosscurrent_model_info" for s in m.samples]
    assert shown == ["student/000001"]
    assert metrics.registry.get_sample_value("crosscurrent_degraded") == 0


def test_names_have_prefix_and_base_units_and_no_user():
    metrics = Metrics()
    families = list(metrics.registry.collect())
    assert len(families) == 32
    for family in families:
        assert family.name.startswith("crosscurrent_")
        assert not family.name.endswith(("_ms", "_kb", "_milliseconds"))
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert not set(sample.labels) & {"user", "event_id", "person", "key"}
            assert not sample.name.endswith("_created")


def test_two_registries_are_independent():
    one, two = Metrics(), Metrics()
    one.commits.inc()
    assert one.registry.get_sample_value("crosscurrent_commits_total") == 1
    assert two.registry.get_sample_value("crosscurrent_commits_total") == 0


def test_latency_histogram_equals_one_observation_at_a_time():
    metrics = Metrics()
    values = np.concatenate([np.random.default_rng(0).exponential(0.05, 5000), [0.005, 0.01, 700.0, 0.0]])
    metrics.event_to_score_seconds.observe_many(values[:3000])
    metrics.event_to_score_seconds.observe_many(values[3000:])
    metrics.event_to_score_seconds.observe_many(values[:0])
    name = "crosscurrent_event_to_score_seconds"
    value = metrics.registry.get_sample_value
    for bound in (0.005, 0.01, 0.1, 600.0):
        assert value(f"{name}_bucket", {"le": str(bound)}) == np.sum(values <= bound)
    assert value(f"{name}_bucket", {"le": "+Inf"}) == value(f"{name}_count") == len(values)
    assert value(f"{name}_sum") == pytest.approx(values.sum())


def test_lag_of_revoked_partitions_disappears():
    metrics = Metrics()
    metrics.lag_events.labels("events", 0).set(9)
    assert metrics.registry.get_sample_value("crosscurrent_lag_events", {"topic": "events", "partition": "0"}) == 9
    metrics.forget_lag()
    assert metrics.registry.get_sample_value("crosscurrent_lag_events", {"topic": "events", "partition": "0"}) is None


def test_ready_only_when_every_condition_holds(served):
    _, health, port = served
    for condition in ("assigned", "recovered", "model"):
        health.beat()
        status, body = get(port, "/readyz")
        assert status == 503 and json.loads(body)["conditions"][condition] is False
        health.set(condition, True)
    health.beat()
    status, body = get(port, "/readyz")
    assert status == 200
    assert json.loads(body)["conditions"] == {"assigned": True, "recovered": True, "model": True}
    health.set("assigned", False)
    assert get(port, "/readyz")[0] == 503


def test_unknown_condition_is_refused():
    with pytest.raises(KeyError, match="assigned, recovered, model"):
        Health().set("asigned", True)


def test_health_follows_the_beat(served):
    _, health, port = served
    health.beat()
    assert get(port, "/healthz")[0] == 200
    time.sleep(0.6)
    status, body = get(port, "/healthz")
    assert status == 503 and json.loads(body)["alive"] is False
    health.beat()
    assert get(port, "/healthz")[0] == 200


def test_unknown_path_is_404(served):
    assert get(served[2], "/debug")[0] == 404


def test_port_in_use_is_a_clear_config_error(served):
    threads = threading.active_count()
    with pytest.raises(ConfigError, match=r"cannot serve metrics on 127\.0\.0\.1:\d+.*metrics\.port"):
        OpsServer(CollectorRegistry(), Health(), "127.0.0.1", served[2]).start()
    assert threading.active_count() == threads


def test_close_frees_the_port_and_may_be_repeated():
    server = OpsServer(CollectorRegistry(), Health(), "127.0.0.1", 0)
    port = server.start()
    server.close()
    server.close()
    again = OpsServer(CollectorRegistry(), Health(), "127.0.0.1", port)
    assert again.start() == port
    again.close()
