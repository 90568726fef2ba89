"""Apache Kafka itself on this machine: one KRaft node on loopback, its jars from Maven Central, all under `.kafka/`.

    python deploy/kafka/local_kafka.py start [--port 9092]   # make kafka: prints the bootstrap, leaves it running
    python deploy/kafka/local_kafka.py stop                  # make kafka-stop: ends it; its records go with it
    python deploy/kafka/local_kafka.py fetch                 # only the jars

Needs Java 17 and Maven. `ApacheKafka` has the interface of `streams.broker.EmbeddedBroker`. For development: one node,
no security, 512 MB of heap, no delay before a group's first rebalance.

    .kafka/libs/          jars, fetched once (a change of pom.xml fetches them again)
    .kafka/run-<port>/    server.properties, data, server.log of one start

Knows nothing of our topics.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from models.errors import ConfigError  # noqa: E402
from streams.broker import ChildProcess, free_port, listening  # noqa: E402

POM = HERE / "pom.xml"
HOME = ROOT / ".kafka"
PID_FILE = HOME / "broker.pid"
JAVA_AT_LEAST = 17
_START_TIMEOUT_S = 60.0
_STOP_GRACE_S = 10.0

# No delay at the first join, short check intervals of the log, and offsets on the one node that there is.
PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
log.cleaner.dedupe.buffer.size=8388608
log.cleaner.backoff.ms=1000
num.network.threads=2
num.io.threads=2
"""


class ApacheKafka:
    """One Kafka node, killed with the process that started it (its records are removed by `stop`)."""

    name = "kafka"

    def __init__(self, port: int | None = None, home: Path = HOME) -> None:
        """`port` None: a free one. `home`: where jars, data and logs lie."""
        self._port = port or free_port()
        self._home = home
        self._folder = home / f"run-{self._port}"
        self.log_path = self._folder / "server.log"
        self._child = ChildProcess(self.log_path)

    @property
    def bootstrap(self) -> str:
        """`host:port` for clients; `ConfigError` before `start`."""
        if not self._child.running:
            raise ConfigError("Apache Kafka is not running: call start() first")
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        return self._child.pid

    def start(self) -> ApacheKafka:
        """Fetches the jars when they are not there, formats the storage, starts; returns once clients can connect.

        `ConfigError` when Java or Maven is missing, the jars cannot be fetched, or Kafka does not start.
        """
        self.launch()
        self.wait()
        return self

    def wait(self) -> None:
        """Returns once clients can connect; `ConfigError`, and it is ended, when that does not come."""
        if not self._child.wait_for_port(self._port, _START_TIMEOUT_S) or not self._serving():
            tail = self._child.log_tail()
            self._child.stop()
            raise ConfigError(f"Apache Kafka did not start on port {self._port}; {self.log_path} ends:\n{tail}")

    def launch(self, *, detached: bool = False) -> None:
        """Starts it without waiting for it. `detached`: it outlives us."""
        if listening(self._port):
            raise ConfigError(f"Apache Kafka did not start: somebody listens on port {self._port} already")
        java = _java()
        classpath = fetch_jars(self._home)
        properties = self._format(java, classpath)
        self._child.start([*_jvm(java, classpath, "512m"), "kafka.Kafka", str(properties)], detached=detached)

    def stop(self) -> None:
        """Ends it and removes its data; its log stays when it ended by itself, for a look."""
        crashed = not self._child.running
        self._child.stop(_STOP_GRACE_S)
        if not crashed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _format(self, java: str, classpath: str) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        properties = self._folder / "server.properties"
        text = PROPERTIES.format(port=self._port, controller_port=free_port(), data=self._folder / "data")
        properties.write_text(text, encoding="utf-8")
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        command = [*_jvm(java, classpath, "128m"), "kafka.tools.StorageTool", "format"]
        # One id in 64 begins with a hyphen: as an argument of its own it would be taken for another option.
        given = [f"--cluster-id={cluster_id}", "-c", str(properties)]
        done = subprocess.run([*command, *given], capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"kafka.tools.StorageTool could not format {self._folder}:\n{done.stdout}{done.stderr}")
        return properties

    def _serving(self) -> bool:
        """The port opens before the broker serves: wait for its own word."""
        until = time.monotonic() + _START_TIMEOUT_S
        while self._child.running and time.monotonic() < until:
            if b"Kafka Server started" in self.log_path.read_bytes():
                return True
            time.sleep(0.05)
        return False

    def __enter__(self) -> ApacheKafka:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _jvm(java: str, classpath: str, heap: str) -> list[str]:
    """JVM with a small heap; only warnings in the log, and the line that says it is up."""
    quick = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"]
    log = ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.log.kafka.server=info"]
    return [java, f"-Xmx{heap}", *quick, *log, "-cp", classpath]


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(str(Path(home) / "bin" / "java")) if home else shutil.which("java")
    if java is None:
        raise ConfigError(
            f"Apache Kafka needs Java {JAVA_AT_LEAST} or later and there is no java"
            + (f" in JAVA_HOME={home}" if home else " on the PATH")
            + ": install a JRE (Debian: apt install openjdk-17-jre-headless), or use the embedded broker"
        )
    return java


def fetch_jars(home: Path = HOME) -> str:
    """Class path of Kafka's jars, copied by Maven on the first call; two processes at once fetch once."""
    libs, stamp = home / "libs", home / "libs" / "pom.sha256"
    wanted = hashlib.sha256(POM.read_bytes()).hexdigest()
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(libs, ignore_errors=True)
            _copy_dependencies(libs)
            stamp.write_text(wanted)
    return str(libs / "*")


def _copy_dependencies(libs: Path) -> None:
    mvn = shutil.which("mvn")
    if mvn is None:
        raise ConfigError(
            "the jars of Apache Kafka are fetched with Maven and there is no mvn on the PATH: install it "
            "(Debian: apt install maven), or use the embedded broker"
        )
    command = [mvn, "--batch-mode", "--quiet", "-f", str(POM), "dependency:copy-dependencies"]
    done = subprocess.run([*command, f"-DoutputDirectory={libs}", "-DincludeScope=runtime"], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"Maven could not fetch Apache Kafka ({POM}):\n{(done.stdout + done.stderr)[-2000:]}")


def _start(port: int) -> None:
    if _running_pid() is not None:
        raise ConfigError(f"Apache Kafka runs already (process {_running_pid()}): make kafka-stop first")
    kafka = ApacheKafka(port)
    kafka.launch(detached=True)
    PID_FILE.write_text(f"{kafka.pid} {port}")
    kafka.wait()
    print(f"Apache Kafka listens on {kafka.bootstrap} (process {kafka.pid}, log {kafka.log_path})")


def _running_pid() -> int | None:
    """Process id of the broker that `start` left running; None when there is none (or the id is now another's)."""
    if not PID_FILE.exists():
        return None
    pid = int(PID_FILE.read_text().split()[0])
    command = Path(f"/proc/{pid}/cmdline")
    return pid if command.exists() and b"kafka.Kafka" in command.read_bytes() else None


def _stop() -> None:
    pid = _running_pid()
    if pid is None:
        print("Apache Kafka is not running")
        return
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + _STOP_GRACE_S
    while _running_pid() is not None and time.monotonic() < until:
        time.sleep(0.1)
    if _running_pid() is not None:
        os.kill(pid, signal.SIGKILL)
    port = PID_FILE.read_text().split()[1]
    PID_FILE.unlink()
    shutil.rmtree(HOME / f"run-{port}", ignore_errors=True)
    print("Apache Kafka stopped; its records are gone")


def main() -> int:
    parser = argparse.ArgumentParser(description="Apache Kafka on this machine, for development and tests")
    parser.add_argument("action", choices=["start", "stop", "fetch"])
    parser.add_argument("--port", type=int, default=9092)
    args = parser.parse_args()
    try:
        if args.action == "start":
            _start(args.port)
        elif args.action == "stop":
            _stop()
        else:
            print(fetch_jars())
    except ConfigError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
