"""The MLflow run of one process: its parameters, its totals, and its description on disk.

The description lies beside the records, so that another process can end the run after this one was killed.
"""

import json
import os
import threading
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from service.config.settings import Settings
from service.recording.mlflow import NoTracker, Run, Tracker
from service.recording.record import CallRecord
from service.recording.spool import sync_file

LATENCIES = 10_000
"""The number of latest calls whose durations are kept for the quantiles."""

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


@dataclass
class ProcessRun:
    """The run of a process, as this process or its file knows it.

    Args:
        name: The name of the process's spool, and of the run.
        started_ms: Unix time in milliseconds.
        params: The run's parameters.
        run_id: None until the run exists on the server.
        experiment_id: None until then, too.
        described: Whether the server has the parameters.
        totals: The run's metrics when this was saved.
        status: How the process ended; None while it lives, and if it was killed.
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

    def on_server(self, tracker: Tracker | NoTracker) -> Run:
        """The run on the server, created now if it does not exist; raises ``TrackerError``."""
        if not self.run_id or not self.experiment_id:
            created = tracker.start_run(self.name, self.started_ms)
            self.run_id, self.experiment_id = created.run_id, created.experiment_id
        run = Run(self.run_id, self.experiment_id)
        if not self.described:
            tracker.log_params(run, self.params)
            self.described = True
        return run

    def forget(self) -> None:
        """Make ``on_server`` create a new run: this one was deleted."""
        self.run_id = self.experiment_id = None
        self.described = False

    def end(self, tracker: Tracker | NoTracker, at_ms: int) -> None:
        """End the run on the server, as FAILED unless the process had ended well; raises ``TrackerError``."""
        run = self.on_server(tracker)
        if self.totals:
            tracker.log_totals(run, self.totals, self.ended_ms or at_ms)
        tracker.end_run(run, self.status or "FAILED", self.ended_ms or at_ms)

    def save(self, path: Path) -> None:
        """Write the run to disk, completely or not at all; a failure to write is ignored."""
        draft = path.with_suffix(".tmp")
        try:
            descriptor = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(self), file)
            sync_file(draft)
            draft.replace(path)
        except OSError:
            # A draft that stays would be the orphaned spool of a process that ended well.
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, name: str, started_ms: int) -> "ProcessRun":
        """Read a run from disk; one of this name and start when the file is missing or invalid.

        Unknown fields are ignored: a later version may have written the file.
        """
        known = {field.name for field in fields(cls)}
        try:
            read = json.loads(path.read_bytes())
            return cls(**{key: value for key, value in read.items() if key in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls(name, started_ms)


class Totals:
    """The sums over the calls of this process; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES)

    def add(self, record: CallRecord) -> None:
        """Add one call."""
        with self._lock:
            self._sums["calls"] += 1
            self._sums[f"calls_{record.outcome}"] += 1
            for name, value in (
                ("prompt_tokens", record.prompt_tokens),
                ("completion_tokens", record.completion_tokens),
                ("cost_usd", record.cost),
                ("saved_usd", record.saved_cost),
            ):
                self._sums[name] += value or 0  # type: ignore[assignment]  # costs are not integers
            self._sums["cache_hits"] += record.cache == "hit"
            self._latencies.append(record.duration_s)

    @property
    def metrics(self) -> dict[str, float]:
        """The totals by the name of the run's metric; latencies in seconds."""
        with self._lock:
            sums, latencies = dict(self._sums), list(self._latencies)
        latencies.sort()
        found = {name: float(value) for name, value in sums.items()}
        for name, share in QUANTILES.items():
            if latencies:
                found[f"latency_{name}_s"] = latencies[min(len(latencies) - 1, int(share * len(latencies)))]
        return found


def params_of(settings: Settings, version: str) -> Mapping[str, str]:
    """The parameters of a run: the version, and every setting that has a value and is not a secret."""
    shown = {
        name: str(value)
        for name, value in settings.model_dump().items()
        if not isinstance(value, SecretStr) and str(value)
    }
    return {"version": version, **shown}
