"""Records every call in MLflow: into the spool before the call is answered, to the server afterwards."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

import anyio.to_thread

from service.config.logging import configure_logging, detach_bridge, drain_lines
from service.config.settings import Settings
from service.recording.delivery import Delivery, RecordCounts
from service.recording.mlflow import MAX_TRACES, GoneError, Tracker, TrackerError, in_thread
from service.recording.record import CallRecord
from service.recording.run import ProcessRun, Totals, params_of
from service.recording.spool import Spool, run_file
from service.telemetry.providers import SCOPE, Telemetry, build_telemetry

INTERVAL_S = 1.0
TOTALS_INTERVAL_S = 10.0
ORPHANS_INTERVAL_S = 30.0
MEMORY_RECORDS = 10_000
MEMORY_BYTES = 16_777_216
"""Limits of what is kept in memory while the disk fails; beyond them records are lost."""

Ping = Callable[[], Awaitable[None]]

logger = logging.getLogger(__name__)


class CallRecorder(Protocol):
    """Keeps a record of each call."""

    @property
    def pings(self) -> Mapping[str, Ping]:
        """The health checks of what the recorder depends on, by the dependency's name."""

    def record(self, record: CallRecord) -> None:
        """Take the record of a call that is about to be answered; does not block and does not raise."""


class NoRecorder:
    """The recorder where no MLflow server is configured: it keeps nothing and depends on nothing."""

    pings: Final[Mapping[str, Ping]] = {}

    def record(self, record: CallRecord) -> None:
        """Drop the record."""


@asynccontextmanager
async def open_recorder(settings: Settings, telemetry: Telemetry) -> AsyncIterator[CallRecorder]:
    """A recorder that delivers in the background; on exit it delivers the rest and ends its MLflow run."""
    if not settings.mlflow_tracking_uri:
        logger.info("MLFLOW_TRACKING_URI is not set: calls are not recorded in MLflow")
        yield NoRecorder()
        return
    tracker = Tracker(settings, telemetry.identity)
    # In a thread, as it creates files.
    recorder = await anyio.to_thread.run_sync(Recorder, tracker, settings, telemetry)
    recorder.start()
    try:
        yield recorder
    finally:
        await recorder.finish()


def replay(settings: Settings) -> int:
    """The command ``python -m service replay``: send all orphaned spools to MLflow.

    Returns the exit status: 0 when MLflow has everything, 1 when something is left.
    """
    if not settings.mlflow_tracking_uri:
        logger.error("Error: MLFLOW_TRACKING_URI must be set: it says where the records go.")
        return 1
    telemetry = build_telemetry(settings)
    configure_logging(settings.log_level, telemetry.logger_provider)
    try:
        return _replay(settings, telemetry)
    finally:
        detach_bridge()
        telemetry.shutdown(settings.telemetry_flush_timeout_s)
        drain_lines()


def _replay(settings: Settings, telemetry: Telemetry) -> int:
    counts = RecordCounts(telemetry.instruments)
    tracker = Tracker(settings, telemetry.identity)
    delivery = Delivery(tracker, telemetry.tracer_provider.get_tracer(SCOPE), counts)
    try:
        replayed = delivery.send_orphaned(Path(settings.spool_path), settings.spool_max_age_s)
    except TrackerError as error:
        logger.error("Error: MLflow does not take the records: %s", error.reason)  # noqa: TRY400 - no bug
        return 1
    except OSError as error:
        logger.error("Error: the spool cannot be worked on: %s", error.strerror)  # noqa: TRY400 - no bug
        return 1
    finally:
        counts.log_losses()
    if replayed.files_kept:
        logger.error(
            "Error: MLflow refused %d file(s) of records, which stay in the spool", replayed.files_kept
        )
        return 1
    logger.info("Nothing is left to replay", extra={"records": replayed.records})
    return 0


class _Interval:
    """Says when an interval has passed; the first time at once."""

    def __init__(self, interval_s: float, clock: Callable[[], float]) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._next = 0.0

    def passed(self) -> bool:
        """Whether it has passed; if so, it starts again."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._interval_s
        return True


class Recorder:
    """Takes the record of each call, and sends it to MLflow in a thread of its own.

    A record is in the spool before its call is answered, so that no end of the process loses it: the append
    takes a few microseconds, and the operating system keeps what it has taken when the process is killed.

    Args:
        tracker: The MLflow server.
        settings: The spool's folder and its limits.
        telemetry: Counts the records, and has a span for each export.
        interval_s: Seconds between two deliveries, unless a file is full before.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        tracker: Tracker,
        settings: Settings,
        telemetry: Telemetry,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracker = tracker
        self._settings = settings
        self._interval_s = interval_s
        self._counts = RecordCounts(telemetry.instruments, clock)
        self._totals = Totals()
        self._memory: deque[tuple[CallRecord, int]] = deque()
        self._memory_bytes = 0
        # Guards the memory, which two threads change.
        self._lock = threading.Lock()
        self._run_lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = self._ended = False
        self._totals_interval = _Interval(TOTALS_INTERVAL_S, clock)
        self._replay_interval = _Interval(ORPHANS_INTERVAL_S, clock)
        self._expiry_interval = _Interval(ORPHANS_INTERVAL_S, clock)
        self._sync_interval = _Interval(settings.spool_fsync_interval_s, clock)
        self._sent_totals: dict[str, float] = {}
        self._spool = self._open_spool()
        name = self._spool.name if self._spool else f"process-{time.time_ns()}"
        params = dict(params_of(settings, version("llmops-api")))
        self._run = ProcessRun(name, time.time_ns() // 1_000_000, params)
        self._save_run()
        tracer = telemetry.tracer_provider.get_tracer(SCOPE)
        self._delivery = Delivery(tracker, tracer, self._counts, clock)
        telemetry.instruments.observe_recorder_queue(lambda: self._counts.waiting)
        # A daemon thread, so that a server that does not answer cannot delay the exit of the process.
        self._thread = threading.Thread(target=self._work, name="mlflow recorder", daemon=True)

    def _open_spool(self) -> Spool | None:
        try:
            return Spool(Path(self._settings.spool_path), self._settings.spool_max_bytes, self._lose)
        except OSError as error:
            logger.warning(
                "The spool cannot be used: records wait in memory", extra={"reason": type(error).__name__}
            )
            return None

    @property
    def pings(self) -> Mapping[str, Ping]:
        """MLflow's health check."""
        return {"mlflow": self._tracker.ping}

    def start(self) -> None:
        """Start the thread that delivers."""
        self._thread.start()

    def record(self, record: CallRecord) -> None:
        """Take the record of a call that is about to be answered; does not block and does not raise."""
        self._counts.recorded()
        try:
            self._totals.add(record)
            line = record.as_line()
            if self._spool is None or not self._to_spool(self._spool, line):
                self._keep_in_memory(record, len(line))
        except Exception:
            # A bug here must not fail the call.
            logger.exception("A record could not be taken")
            self._lose(1, "a bug")

    def _to_spool(self, spool: Spool, line: bytes) -> bool:
        failing = self._delivery.failing
        try:
            if spool.append(line, spooled=failing):
                self._wake.set()
        except OSError:
            return False
        if failing:
            self._counts.spooled(1)
        return True

    def _keep_in_memory(self, record: CallRecord, size_bytes: int) -> None:
        with self._lock:
            room = len(self._memory) < MEMORY_RECORDS and self._memory_bytes + size_bytes <= MEMORY_BYTES
            if room and not self._ended:
                self._memory.append((record, size_bytes))
                self._memory_bytes += size_bytes
                return
        self._lose(1, "the disk takes nothing, and memory is full")

    def _lose(self, count: int, reason: str) -> None:
        self._counts.settled(count)
        self._counts.lost(count, reason)

    async def finish(self) -> None:
        """Deliver what is left and end the run; if this is cancelled, the next process does it."""
        try:
            await in_thread(self._end, "mlflow end")
        except asyncio.CancelledError:
            # What is only in memory is lost with this process, whatever the thread still waits for.
            self._lose_memory()
            logger.warning(
                "MLflow was not done with in time; the next start goes on",
                extra={"records": self._counts.waiting},
            )
            raise

    def _end(self) -> None:
        # Saved first, and not by the thread, which may be waiting for the server: if that does not answer in
        # time, the next process ends the run with this status.
        self._run.status = "FINISHED"
        self._run.ended_ms = time.time_ns() // 1_000_000
        self._run.totals = self._totals.metrics
        self._save_run()
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            if not self._stopping:
                self._guarded(self._round)
        self._guarded(self._last_round)

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except TrackerError as error:
            if isinstance(error, GoneError):
                self._run.forget()
            self._delivery.failed(error, self._spool)
        except Exception:
            # A bug here must not end the thread; it is handled like a failure of MLflow.
            logger.exception("The recorder failed")
            self._delivery.failed(TrackerError("Bug"), self._spool)

    def _round(self) -> None:
        try:
            if self._delivery.due:
                self._exchange()
        finally:
            self._maintain_spool()

    def _exchange(self) -> None:
        self._deliver()
        if self._delivery.failing:
            # Nothing was sent, so only a request can tell whether MLflow works again.
            self._tracker.check()
            self._delivery.succeeded()
        if self._spool is not None and self._replay_interval.passed():
            self._delivery.send_orphaned(self._spool.folder, self._settings.spool_max_age_s)
        if self._totals_interval.passed():
            self._send_totals()

    def _deliver(self) -> None:
        new = self._run.run_id is None
        run = self._run.on_server(self._tracker)
        if new:
            self._save_run()
        if self._spool is not None:
            self._delivery.send_spool(self._spool, run)
        # Not until it is empty: while the disk fails and calls go on, it never is.
        for _batch in range(0, len(self._memory), MAX_TRACES):
            with self._lock:
                batch = [record for record, _size in islice(self._memory, MAX_TRACES)]
            self._delivery.send_memory(batch, run)
            for _record in batch:
                self._pop_memory()

    def _pop_memory(self) -> None:
        with self._lock:
            self._memory_bytes -= self._memory.popleft()[1]

    def _send_totals(self) -> None:
        totals = self._totals.metrics
        if totals != self._sent_totals:
            self._run.totals = totals
            self._save_run()
            self._tracker.log_totals(self._run.on_server(self._tracker), totals, time.time_ns() // 1_000_000)
            self._sent_totals = totals

    def _maintain_spool(self) -> None:
        self._counts.log_losses(at_once=False)
        if self._spool is None:
            return
        self._move_to_disk(self._spool)
        self._spool.expire(self._settings.spool_max_age_s)
        if self._sync_interval.passed():
            self._spool.sync()
        if self._expiry_interval.passed():
            self._delivery.expire_orphaned(self._spool.folder, self._settings.spool_max_age_s)

    def _move_to_disk(self, spool: Spool) -> None:
        """Move records from memory to the spool, as far as the disk accepts them."""
        while self._memory and self._to_spool(spool, self._memory[0][0].as_line()):
            self._pop_memory()

    def _last_round(self) -> None:
        try:
            self._deliver()
            self._run.end(self._tracker, self._run.ended_ms or self._run.started_ms)
            if self._spool is not None:
                run_file(self._spool.folder, self._spool.name).unlink(missing_ok=True)
        finally:
            if self._spool is not None:
                self._move_to_disk(self._spool)
                self._spool.sync()
                self._spool.close()
            self._lose_memory()

    def _lose_memory(self) -> None:
        with self._lock:
            left = 0 if self._ended else len(self._memory)
            self._ended = True
        if left:
            self._lose(left, "no disk took them, and MLflow neither")
        self._counts.log_losses()

    def _save_run(self) -> None:
        if self._spool is not None:
            with self._run_lock:
                self._run.save(run_file(self._spool.folder, self._spool.name))
