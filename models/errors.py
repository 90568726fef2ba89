"""Every exception that Crosscurrent raises on purpose, on one page.

CrosscurrentError
├── ConfigError            a setting, a platform file or a key is wrong: refused at start
│   └── PlatformFileError  … with the file, the line and the reason
├── EventRefused           one event cannot be accepted: it goes to `dead_letters` with `reason`
├── StateError             a row of user state cannot be used
│   ├── StateABIError      … its ABI is not one that we can migrate
│   └── CorruptRowError    … its length or its checksum is wrong
├── ArtifactError          a model artifact is refused; the incumbent goes on serving
├── HistoryError           the trainer's history cannot be read or written
└── WorkerFenced           this worker outslept its session: it must exit before it sends

Every message says what to do. This module knows nothing of Kafka, files or clocks.
"""


class CrosscurrentError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(CrosscurrentError):
    """A setting is missing or wrong."""


class PlatformFileError(ConfigError):
    """A platform file is wrong. `str()` reads `path:line: reason`."""

    def __init__(self, path: object, line: int | None, reason: str) -> None:
        self.path, self.line, self.reason = str(path), line, reason
        super().__init__(f"{path}:{line if line is not None else '?'}: {reason}")


class EventRefused(CrosscurrentError):
    """One event is refused.

    `reason` is a short, stable code of `models.events.REFUSAL_REASONS` (a metric label);
    `detail` is for a person and never holds a raw user id.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class StateError(CrosscurrentError):
    """A row of user state cannot be used."""


class StateABIError(StateError):
    """A row was written under an ABI that this version cannot migrate."""


class CorruptRowError(StateError):
    """A row has the wrong length or checksum."""


MODEL_REFUSAL_REASONS = ("path", "missing", "sum", "manifest", "abi", "golden", "nonfinite", "fold")


class ArtifactError(CrosscurrentError):
    """A model artifact is refused.

    `reason` is one of MODEL_REFUSAL_REASONS (a metric label).
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class HistoryError(CrosscurrentError):
    """The trainer's history cannot be read or written."""


class WorkerFenced(CrosscurrentError):
    """The worker overslept its session timeout: another may own its partitions."""
