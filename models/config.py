"""Every setting, its type, unit and default. Reads no environment and no file: `crosscurrent.py` does that
(command line over environment over TOML over these defaults) and hands the result down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

Positive = Annotated[float, Field(gt=0)]


GATE_RULES = (
    "finite", "cells", "log_loss", "better", "hit_rate", "auc", "pr_auc", "ece", "predicted_over_actual", "slices", "p99",
)  # fmt: skip
"""Of trainer/gate.py, which says what each is."""

TRANSFER_RUNGS = (
    "scratch", "pooled", "finetune_head", "loose_head", "finetune", "interpolate", "adapter", "lora", "adversarial",
    "distil_source", "renormalise",
)  # fmt: skip
"""Of trainer/transfer.py, which says what each is."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class KafkaConfig(_Section):
    """How to reach the brokers."""

    bootstrap: str = "127.0.0.1:9092"
    """Comma-separated host:port."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_cafile: Path | None = None
    replication_factor: Annotated[int, Field(ge=1)] = 1
    session_timeout_s: Positive = 10.0
    heartbeat_interval_s: Positive = 2.0
    fetch_max_wait_ms: Annotated[int, Field(ge=0)] = 20
    """How long the broker may hold a fetch for which there is nothing. The embedded one holds it for about half of that even
    where something comes."""
    request_timeout_s: Positive = 40.0
    idempotence: bool = True
    """Idempotent producer, so that a retry sends nothing twice. False for a broker that cannot (the embedded one)."""


class TopicsConfig(_Section):
    """Names and sizes of our own topics. The platforms' topics are in the platform files."""

    events: str = "events"
    scores: str = "scores"
    dead_letters: str = "dead_letters"
    models: str = "models"
    identities: str = "identities"
    partitions: Annotated[int, Field(ge=1, le=1024)] = 4
    """Of `events`, `scores` and the state's changelog. Cannot change while state lives."""
    events_retention_h: Positive = 24.0 * 30
    scores_retention_h: Positive = 24.0 * 7
    dead_letters_retention_h: Positive = 24.0 * 3


class FoldConfig(_Section):
    """Rules of the fold. The trainer and the worker must agree on them: an artifact made under others is refused."""

    lateness_s: Positive = 3600.0
    """How much later than the user's latest event one may come and still be folded."""
    session_gap_s: Positive = 1800.0
    return_horizon_s: Positive = 7 * 86400.0
    idle_ttl_s: Positive = 180 * 86400.0
    """A user idle for longer starts afresh."""


class HorizonsConfig(_Section):
    """Label horizons."""

    click_s: Positive = 1800.0
    purchase_s: Positive = 86400.0
    return_s: Positive = 7 * 86400.0


class PseudonymConfig(_Section):
    """The key of the pseudonyms: HMAC-SHA-256. Exactly one of `key` and `key_file` for the stage ingest."""

    key_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{2}$")] = "k1"
    key: SecretStr | None = None
    key_file: Path | None = None


class WorkerConfig(_Section):
    """One worker process."""

    app_id: str = "crosscurrent"
    """Consumer group and prefix of the changelog. Never changes while state lives."""
    stages: tuple[Literal["ingest", "score"], ...] = ("ingest", "score")
    platforms_dir: Path | None = None
    """Folder of platform files; None: those that ship with the package."""
    platforms: tuple[str, ...] = ()
    """Names of the platform files to load; empty: all in the folder."""
    data_dir: Path = Path(".crosscurrent")
    hot_users: Annotated[int, Field(ge=0)] = 0
    """Most users whose rows are in memory (about 1 KiB each): rows idle for longest move to `data_dir`, and come back with
    the user's next event. Rows not yet committed stay, also where that makes more. 0: no limit. Needs the extra `cold`."""
    commit_interval_s: Positive = 1.0
    max_batch: Annotated[int, Field(ge=1, le=65536)] = 1024
    """Most events in one micro-batch. More cost little less each, and everything else in the process waits for longer."""
    linger_ms: Annotated[int, Field(ge=0, le=5000)] = 0
    """From latency to throughput: how long events may wait in the broker until there are enough for a whole micro-batch.
    0: every fetch is answered with what there is, so that batches grow with the load by themselves."""
    future_tolerance_s: Positive = 300.0
    on_corrupt_row: Literal["crash", "skip"] = "crash"
    """What recovery does with a changelog row of wrong length or checksum. `skip` loses that user's state and counts it."""
    snapshot_interval_s: Annotated[float, Field(ge=0)] = 0.0
    """How often the rows are saved to `data_dir`, and once more when the worker drains, so that a start on this machine
    reads only what the changelog got since. 0: never."""
    standbys: Annotated[int, Field(ge=0, le=4)] = 0
    """Workers that follow each partition's changelog beside its owner, to take over without reading it all. Each holds the
    rows in memory; the same on every worker."""
    size: Literal["cpu", "gpu"] = "cpu"
    device: str = "auto"
    """`auto`, `cpu` or `cuda[:n]`."""
    device_memory: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Most of the card's memory that this worker may take: less than 1 where several workers share a card."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Torch threads."""
    explain: Annotated[int, Field(ge=0, le=16)] = 0
    """Events and features that each score's `explain` names, for each head; 0: no explanations, which are many times the
    work of a score (`benchmarks/QUALITY.md` says how many)."""

    @model_validator(mode="after")
    def _a_batch_is_in_memory(self):
        if 0 < self.hot_users < self.max_batch:
            raise ValueError(
                f"hot_users is {self.hot_users}, and a micro-batch may have {self.max_batch} users (max_batch), all of them "
                "in memory at once: raise the one, lower the other, or set hot_users to 0 for no limit"
            )
        return self


class StoreConfig(_Section):
    """Where model artifacts lie (fsspec)."""

    uri: str = ".crosscurrent/store"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "student"


class TrainerConfig(_Section):
    """The trainer."""

    history_uri: str = ".crosscurrent/history"
    """Parquet history of `events` (fsspec)."""
    interval_s: Positive = 300.0
    min_events: Annotated[int, Field(ge=1)] = 5000
    """Matured events that a round needs."""
    epochs: Annotated[int, Field(ge=1)] = 3
    max_events: Annotated[int, Field(ge=1)] = 2_000_000
    """Events that a round trains on: the most recent ones, but for `older_share`."""
    older_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of `max_events`, where there are more: older events, of always the same users, against forgetting."""
    batch_events: Annotated[int, Field(ge=64)] = 8192
    learning_rate: Positive = 3e-3
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of the matured time span, the latest, that gates."""
    major_every: Annotated[int, Field(ge=1)] = 12
    """Every n-th publication trains the recurrence anew (a major version); the others only heads and tables."""
    teacher: bool = True
    """Whether later models distil a teacher (the first never does). A new teacher makes a major version."""
    teacher_every_s: Positive = 86400.0
    """Age at which another teacher is fitted; drift and twice as many examples do the same."""
    teacher_recurrence: bool = True
    """Whether the student's own network, undistilled, is among the teacher's members. Five of them are trained for it."""
    teacher_hidden_markov: bool = False
    """Whether a hidden Markov model of shoppers is among them: for long histories with short sessions."""
    teacher_margin: Annotated[float, Field(ge=0)] = 0.0
    """Standard errors by which the teacher must do better without a member, on a platform's validation events, for the
    member to be dropped there. 0: whatever is not worse without it is dropped."""
    teacher_transformer: Literal["cpu", "gpu-small", "gpu", "large"] | None = None
    """Size of a causal transformer beside boosting and regression; None: none. It takes far longer than they do."""
    teacher_dir: Path = Path(".crosscurrent/teacher")
    """Where that transformer is kept, for the next one to begin with, and its checkpoint while it is trained."""
    teacher_device: str = "auto"
    """Where it is trained and asked: `auto` (a card where torch sees one), `cpu` or `cuda[:n]`."""
    teacher_task_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Of heads whose loss is not to count 1 in it, such as {"purchase": 2.0}."""
    teacher_tensorboard: bool = False
    """Whether its losses are written to `teacher_dir`/tensorboard (extra `teacher`)."""
    teacher_texts: bool = False
    """Whether that transformer reads the words of each item's category, by a small language model (extra `teacher`)."""
    distil_epochs: Annotated[int, Field(ge=1)] = 4
    """Of a major version that distils; a minor one takes `epochs`."""
    distil_batch_events: Annotated[int, Field(ge=64)] = 512
    distil_rate: Positive = 3e-3
    distil_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    distil_cut: Annotated[float, Field(ge=0, le=1)] = 1 / 64
    """Chance, at each event, that the student's state starts from zero there: it may have to be rebuilt from the ring."""
    distil_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of what the teacher says in the loss; the rest are labels."""
    transfer: Literal[("auto", *TRANSFER_RUNGS)] = "pooled"
    """How a major version is trained: one model of all platforms together, or one for the platform `transfer_to`, by a rung
    of the ladder or, with `auto`, by the one that its validation labels choose."""
    transfer_to: str | None = None
    """The platform that learns from the others; needed unless `transfer` is `pooled`. Give such models a store.name of
    their own: they are not meant for the other platforms."""
    group_weights: Literal["off", "frequency"] = "off"
    """`frequency`: examples of small groups (platform, activity, price band) count for more."""
    enforce: tuple[Literal[GATE_RULES], ...] = GATE_RULES
    """Rules of the gate that refuse a candidate. What the others find is logged and lies in the manifest."""
    bootstrap_draws: Annotated[int, Field(ge=40)] = 200
    """Resamples of users behind each interval of the gate."""
    p99_budget_ms: Positive = 50.0
    """A candidate whose p99 for 1,024 events, measured here, is longer is not published."""
    seed: int = 0
    threads: Annotated[int, Field(ge=1)] = 1
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    """Niceness of the rounds once a model is published: on a machine that it shares, the worker goes first. 0: as it was
    started."""

    @model_validator(mode="after")
    def _texts_have_a_reader(self):
        if self.teacher_texts and self.teacher_transformer is None:
            raise ValueError("teacher_texts needs a teacher_transformer: nothing else of the teacher reads words")
        return self

    @model_validator(mode="after")
    def _transfer_has_a_target(self):
        if (self.transfer == "pooled") != (self.transfer_to is None):
            raise ValueError("transfer and transfer_to go together: name the platform that learns, or leave both out")
        return self


class MetricsConfig(_Section):
    """Prometheus metrics, /healthz and /readyz."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9464
    """0: any free port."""
    trainer_port: Annotated[int, Field(ge=0, le=65535)] = 9465
    enabled: bool = True


class LogConfig(_Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["auto", "json", "console"] = "auto"
    """`auto`: console on a terminal, JSON lines otherwise."""


class Settings(_Section):
    """All of it."""

    kafka: KafkaConfig = KafkaConfig()
    topics: TopicsConfig = TopicsConfig()
    fold: FoldConfig = FoldConfig()
    horizons: HorizonsConfig = HorizonsConfig()
    pseudonym: PseudonymConfig = PseudonymConfig()
    worker: WorkerConfig = WorkerConfig()
    store: StoreConfig = StoreConfig()
    trainer: TrainerConfig = TrainerConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()
