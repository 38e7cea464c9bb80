"""Shared by the tests of the recorder: records, a scripted tracker, and counts that can be read."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer as SpanTracer

from service.recording.delivery import RecordCounts
from service.recording.mlflow import GoneError, RefusedError, Run, Tracker, TrackerError
from service.recording.record import CallRecord
from service.telemetry.instruments import Instruments
from service.telemetry.providers import Exporters, Telemetry
from tests.harness import ROOT

FIRST_TRACE = 0x4BF92F3577B34DA6A3CE929D0E0E0000


def make_record(number: int = 0, **changes: Any) -> CallRecord:
    """The record of a successful call; each number makes another one."""
    given: dict[str, Any] = {
        "trace_id": f"{FIRST_TRACE + number:032x}",
        "span_id": f"{number + 1:016x}",
        "operation": "chat",
        "started_ns": 1_760_000_000_000_000_000 + number,
        "duration_s": 0.25,
        "user": "user",
        "model": "demo",
        "outcome": "success",
    }
    return CallRecord(**{**given, **changes})


def number_of(record: CallRecord) -> int:
    """Which one it is."""
    return int(record.trace_id, 16) - FIRST_TRACE


def lines(*numbers: int) -> bytes:
    """The lines of these records."""
    return b"".join(make_record(number).as_line() for number in numbers)


def no_spans() -> SpanTracer:
    """A tracer whose spans go nowhere."""
    return TracerProvider(shutdown_on_exit=False).get_tracer("test")


def silent_telemetry(instruments: Instruments) -> Telemetry:
    """Telemetry with these instruments that exports nothing."""
    tracers, meters = TracerProvider(shutdown_on_exit=False), MeterProvider(shutdown_on_exit=False)
    return Telemetry(tracers, meters, None, instruments, Exporters())


class Lost:
    """Keeps the losses that it is called with."""

    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []

    def __call__(self, count: int, reason: str) -> None:
        self.said.append((count, reason))

    @property
    def total(self) -> int:
        """How many records."""
        return sum(count for count, _reason in self.said)


class KeptCounts(RecordCounts):
    """Counts that can be read."""

    def __init__(self, instruments: Instruments, on_lost: Lost) -> None:
        super().__init__(instruments)
        self.on_lost = on_lost
        self.total_settled = 0

    def settled(self, count: int) -> None:
        super().settled(count)
        self.total_settled += count

    def lost(self, count: int, reason: str) -> None:
        super().lost(count, reason)
        self.on_lost(count, reason)


@dataclass
class KeptRun:
    """A run as the server has it."""

    name: str
    started_ms: int
    params: dict[str, str] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    status: str = "RUNNING"
    ended_ms: int | None = None


class FakeTracker(Tracker):
    """A tracker in memory that does as its fields say.

    Attributes:
        error: Raised by everything, before anything is done.
        refuses: Of which records it refuses an export.
        answers_lost: So many of the next runs are made, and the answer is lost.
        hangs: Whether everything waits until ``let_go`` is set.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.refuses: Callable[[CallRecord], bool] = lambda _record: False
        self.answers_lost = 0
        self.hangs = False
        self.asked = threading.Event()
        self.let_go = threading.Event()
        self.kept: dict[int, str] = {}
        self.exports: list[list[int]] = []
        self.runs: dict[str, KeptRun] = {}
        self.checks = 0
        self.on_send: Callable[[], None] = lambda: None

    def _obey(self) -> None:
        self.asked.set()
        if self.hangs:
            self.let_go.wait(30)
        if self.error is not None:
            raise self.error

    def _run(self, run: Run) -> KeptRun:
        if run.run_id not in self.runs:
            raise GoneError("RESOURCE_DOES_NOT_EXIST")
        return self.runs[run.run_id]

    def start_run(self, name: str, started_ms: int) -> Run:
        self._obey()
        found = [run_id for run_id, run in self.runs.items() if run.name == name]
        run_id = found[0] if found else f"run-{len(self.runs) + 1}"
        self.runs.setdefault(run_id, KeptRun(name, started_ms))
        if self.answers_lost:
            self.answers_lost -= 1
            raise TrackerError("Timeout")
        return Run(run_id, "1")

    def log_params(self, run: Run, params: Mapping[str, str]) -> None:
        self._obey()
        self._run(run).params.update(params)

    def log_totals(self, run: Run, totals: Mapping[str, float], at_ms: int) -> None:
        del at_ms
        self._obey()
        self._run(run).totals.update(totals)

    def end_run(self, run: Run, status: str, at_ms: int) -> None:
        self._obey()
        kept = self._run(run)
        kept.status, kept.ended_ms = status, at_ms

    def send(self, records: Iterable[CallRecord], run: Run) -> None:
        sent = list(records)
        self.exports.append([number_of(record) for record in sent])
        self.on_send()
        self._obey()
        if any(self.refuses(record) for record in sent):
            raise RefusedError("HTTP 422")
        for record in sent:
            self.kept.setdefault(number_of(record), run.run_id)

    def check(self) -> None:
        self.checks += 1
        self._obey()


def python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    """Another process that runs this script; what it prints can be read."""
    coverage = {name: os.environ[name] for name in os.environ if name.startswith("COVERAGE")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **coverage},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


OWNER_OF_ONE = """
    import sys
    from pathlib import Path
    from service.recording.spool import Spool
    spool = Spool(Path(sys.argv[1]), 1_000_000, print)
    for line in sys.argv[2:]:
        spool.append(line.encode() + b"\\n", spooled=False)
    print(spool.name, flush=True)
    sys.stdin.read()
"""


def killed_owner(folder: Path, *numbers: int) -> str:
    """Let a process write these records, and kill it; its name."""
    written = [make_record(number).as_line().decode().strip() for number in numbers]
    with python(OWNER_OF_ONE, str(folder), *written) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        owner.kill()
    return name
