"""The MLflow run of one process, on disk too, so that somebody else can end it; what it sums up, and lost."""

import json
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from service.config.settings import Settings
from service.recording.mlflow import Run, Tracker
from service.recording.record import CallRecord
from service.recording.spool import sync_file
from service.telemetry.instruments import Instruments

LATENCIES = 10_000
"""So many of the latest calls' durations are kept, for the quantiles."""

LOSS_LINE_INTERVAL_S = 60.0

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}

logger = logging.getLogger(__name__)


@dataclass
class ProcessRun:
    """What is known of a process's run.

    Args:
        name: The process's name in the spool; the run's name too.
        started_ms: Unix time in milliseconds.
        params: What the run's page shows of the configuration.
        run_id: None until the server has the run.
        experiment_id: None until then, too.
        described: Whether the server has the parameters.
        totals: The run's metrics, as they were when this was written.
        status: How the process ended; None while it lives, and of one that was killed.
        ended_ms: When it ended.
    """

    name: str
    started_ms: int
    params: dict[str, str] = field(default_factory=dict)
    run_id: str | None = None
    experiment_id: str | None = None
    described: bool = False
    totals: dict[str, float] = field(default_factory=dict)
    status: Literal["FINISHED"] | None = None
    ended_ms: int | None = None

    def on_server(self, tracker: Tracker) -> Run:
        """The run on the server, made now if it is not there yet; raises as the tracker does."""
        if self.run_id is None or self.experiment_id is None:
            made = tracker.start_run(self.name, self.started_ms)
            self.run_id, self.experiment_id = made.run_id, made.experiment_id
        run = Run(self.run_id, self.experiment_id)
        if not self.described:
            tracker.log_params(run, self.params)
            self.described = True
        return run

    def forget(self) -> None:
        """Let the next question make a new run: somebody has deleted this one."""
        self.run_id = self.experiment_id = None
        self.described = False

    def end(self, tracker: Tracker, at_ms: int) -> None:
        """End the run on the server: as FAILED, when nobody had said that the process ended well."""
        run = self.on_server(tracker)
        if self.totals:
            tracker.log_totals(run, self.totals, self.ended_ms or at_ms)
        tracker.end_run(run, self.status or "FAILED", self.ended_ms or at_ms)

    def save(self, path: Path) -> None:
        """Write it to disk, whole or not at all; a disk that takes nothing is passed over."""
        draft = path.with_suffix(".tmp")
        try:
            descriptor = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(self), file)
            sync_file(draft)
            draft.replace(path)
        except OSError:
            # Left behind it would make an estate of a process that ended well.
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, name: str, started_ms: int) -> "ProcessRun":
        """Read it from disk; where nothing readable is there, a run that is known by its name only.

        Fields that this version does not know are passed over: a later one may have written the file.
        """
        known = {field.name for field in fields(cls)}
        try:
            read = json.loads(path.read_bytes())
            return cls(**{key: value for key, value in read.items() if key in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls(name, started_ms)


class Totals:
    """What the calls of this process came to; may be asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES)

    def add(self, record: CallRecord) -> None:
        """Count one call."""
        with self._lock:
            self._sums["calls"] += 1
            self._sums[f"calls_{record.outcome}"] += 1
            for name, value in (
                ("prompt_tokens", record.prompt_tokens),
                ("completion_tokens", record.completion_tokens),
                ("cost_usd", record.cost),
                ("saved_usd", record.saved_cost),
            ):
                self._sums[name] += value or 0  # type: ignore[assignment]  # costs are no whole numbers
            self._sums["cache_hits"] += record.cache == "hit"
            self._latencies.append(record.duration_s)

    @property
    def metrics(self) -> dict[str, float]:
        """The totals by the names of the run's metrics; latencies in seconds."""
        with self._lock:
            sums, latencies = dict(self._sums), list(self._latencies)
        latencies.sort()
        found = {name: float(value) for name, value in sums.items()}
        for name, share in QUANTILES.items():
            if latencies:
                found[f"latency_{name}_s"] = latencies[min(len(latencies) - 1, int(share * len(latencies)))]
        return found


class Losses:
    """Counts what is lost, and says so once a minute at most; from any thread."""

    def __init__(self, instruments: Instruments, clock: Callable[[], float] = time.monotonic) -> None:
        self._lost = instruments.recorder_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._unsaid = 0
        self._reason = ""
        self._said_at = float("-inf")

    def add(self, count: int, reason: str) -> None:
        """Count so many records."""
        self._lost.add(count)
        with self._lock:
            self._unsaid += count
            self._reason = reason
        self.say(at_once=False)

    def say(self, *, at_once: bool = True) -> None:
        """Say what has not been said yet: now, or when the last time is long enough ago."""
        with self._lock:
            due = at_once or self._clock() - self._said_at >= LOSS_LINE_INTERVAL_S
            if not self._unsaid or not due:
                return
            count, self._unsaid = self._unsaid, 0
            self._said_at = self._clock()
            reason = self._reason
        logger.error("Records of calls are lost", extra={"records": count, "reason": reason})


def params_of(settings: Settings, version: str) -> Mapping[str, str]:
    """What a run's page shows of the configuration: everything that is set and is no secret."""
    shown = {
        name: str(value)
        for name, value in settings.model_dump().items()
        if not isinstance(value, SecretStr) and str(value)
    }
    return {"version": version, **shown}
