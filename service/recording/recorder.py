"""Records every call: in the spool before its answer ends, in MLflow and in the ledger afterwards."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import anyio.to_thread
from opentelemetry.trace import NoOpTracer

from service.config.logging import configure_logging, detach_bridge, drain_lines
from service.config.settings import Settings
from service.recording.delivery import CallLedger, Delivery, RecordCounts
from service.recording.mlflow import MAX_TRACES, GoneError, NoTracker, Run, Tracker, TrackerError, in_thread
from service.recording.recent import RecentRequests
from service.recording.record import CallRecord
from service.recording.run import ProcessRun, Totals, params_of
from service.recording.spool import Spool, run_file
from service.recording.writer import Entry, SpoolWriter
from service.telemetry.providers import SCOPE, Telemetry, build_telemetry

INTERVAL_S = 1.0
TOTALS_INTERVAL_S = 10.0
ORPHANS_INTERVAL_S = 30.0
CATCH_UP_LIMIT_S = 5.0
"""How long the start waits until the ledger has the records of ended processes. Without that, a process that
was killed would leave budgets with more than there is, for the first calls of the next one."""

Ping = Callable[[], Awaitable[None]]

logger = logging.getLogger(__name__)


class CallRecorder(Protocol):
    """Keeps a record of each call."""

    @property
    def pings(self) -> Mapping[str, Ping]:
        """The health checks of what the recorder depends on, by the dependency's name."""

    def record(self, record: CallRecord) -> None:
        """Take the record of a call that is about to be answered; does not block and does not raise."""

    async def written(self) -> None:
        """Wait until the records so far are on disk; a disk that fails is not waited for. Does not raise."""


@asynccontextmanager
async def open_recorder(
    settings: Settings, telemetry: Telemetry, ledger: CallLedger, recent: RecentRequests
) -> AsyncIterator[CallRecorder]:
    """A recorder that delivers in the background; on exit it delivers the rest and ends its MLflow run."""
    tracker: Tracker | NoTracker = NoTracker()
    if settings.mlflow_tracking_uri:
        tracker = Tracker(settings, telemetry.identity)
    else:
        logger.info("MLFLOW_TRACKING_URI is not set: calls are not recorded in MLflow")
    # In a thread, as it creates files.
    recorder = await anyio.to_thread.run_sync(
        partial(Recorder, tracker, settings, telemetry, ledger, recent=recent)
    )
    recorder.start()
    await anyio.to_thread.run_sync(recorder.wait_caught_up, abandon_on_cancel=True)
    try:
        yield recorder
    finally:
        await recorder.finish()


def replay(settings: Settings, ledger: CallLedger) -> int:
    """The command ``python -m service replay``: send all orphaned spools to MLflow, and book them.

    Returns the exit status: 0 when MLflow and the ledger have everything, 1 when something is left.
    """
    if not settings.mlflow_tracking_uri:
        logger.error("Error: MLFLOW_TRACKING_URI must be set: it says where the records go.")
        return 1
    telemetry = build_telemetry(settings)
    configure_logging(settings.log_level, telemetry.logger_provider)
    try:
        return _replay(settings, telemetry, ledger)
    finally:
        detach_bridge()
        telemetry.shutdown(settings.telemetry_flush_timeout_s)
        drain_lines()


def _replay(settings: Settings, telemetry: Telemetry, ledger: CallLedger) -> int:
    counts = RecordCounts(telemetry.instruments)
    tracker = Tracker(settings, telemetry.identity)
    delivery = Delivery(tracker, telemetry.tracer_provider.get_tracer(SCOPE), counts, ledger)
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
    if replayed.files_unbooked:
        logger.error(
            "Error: the database refused %d file(s) of records, which stay in the spool",
            replayed.files_unbooked,
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


@dataclass(frozen=True)
class Pace:
    """When records are delivered.

    Args:
        interval_s: Seconds between two deliveries, unless a file is full before.
        clock: Monotonic, in seconds.
    """

    interval_s: float = INTERVAL_S
    clock: Callable[[], float] = time.monotonic


class Recorder:
    """Takes the record of each call, and sends it to MLflow and the ledger in a thread of its own.

    Another thread writes each record to the spool, and the answer ends when that is done, so that no end of
    the process loses the record of an answered call: the operating system keeps what it has taken when the
    process is killed. A disk that does not answer is waited for once and briefly. Until it works again,
    records are in memory only.

    Args:
        tracker: The MLflow server, if there is one.
        settings: The spool's folder and its limits.
        telemetry: Counts the records, and has a span for each export.
        ledger: Counts each call at once, and keeps it.
        pace: When records are delivered.
        recent: Remembers the latest calls.
    """

    def __init__(  # noqa: PLR0913 - what it works with
        self,
        tracker: Tracker | NoTracker,
        settings: Settings,
        telemetry: Telemetry,
        ledger: CallLedger,
        pace: Pace | None = None,
        *,
        recent: RecentRequests | None = None,
    ) -> None:
        pace = pace or Pace()
        clock = pace.clock
        self._tracker = tracker
        self._settings = settings
        self._ledger = ledger
        self._recent = RecentRequests() if recent is None else recent
        self._interval_s = pace.interval_s
        self._counts = RecordCounts(telemetry.instruments, clock)
        self._totals = Totals()
        self._run_lock = threading.Lock()
        self._wake = threading.Event()
        self._caught_up = threading.Event()
        self._stopping = False
        self._totals_interval = _Interval(TOTALS_INTERVAL_S, clock)
        self._replay_interval = _Interval(ORPHANS_INTERVAL_S, clock)
        self._booking_interval = _Interval(ORPHANS_INTERVAL_S, clock)
        self._expiry_interval = _Interval(ORPHANS_INTERVAL_S, clock)
        self._sync_interval = _Interval(settings.spool_fsync_interval_s, clock)
        self._sent_totals: dict[str, float] = {}
        self._spool = self._open_spool()
        self._writer = SpoolWriter(self._append if self._spool else None, self._lose, clock=clock)
        name = self._spool.name if self._spool else f"process-{time.time_ns()}"
        params = dict(params_of(settings, version("llmops-api")))
        self._run = ProcessRun(name, time.time_ns() // 1_000_000, params)
        self._save_run()
        tracer = telemetry.tracer_provider.get_tracer(SCOPE)
        if isinstance(tracker, NoTracker):
            # There are no exports.
            tracer = NoOpTracer()
        self._delivery = Delivery(tracker, tracer, self._counts, ledger, clock)
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
        """MLflow's health check, where there is a server."""
        return {} if isinstance(self._tracker, NoTracker) else {"mlflow": self._tracker.ping}

    def start(self) -> None:
        """Start the thread that writes, and the one that delivers."""
        self._writer.start()
        self._thread.start()

    def wait_caught_up(self, limit_s: float = CATCH_UP_LIMIT_S) -> None:
        """Wait until the ledger has what processes before this one have left; blocks."""
        if not self._caught_up.wait(limit_s):
            logger.warning("Budgets may be behind: the records of ended processes are still being booked")

    def record(self, record: CallRecord) -> None:
        """Take the record of a call that is about to be answered; does not block and does not raise."""
        self._counts.recorded()
        try:
            # First, as a record that cannot be encoded must not be in the totals, either.
            entry = Entry(record, record.as_line())
            self._totals.add(record)
            self._writer.put(entry)
            self._ledger.take(record)
            self._recent.keep_call(record, entry.line)
        except Exception:
            # A bug here must not fail the call.
            logger.exception("A record could not be taken")
            self._lose(1, "a bug")

    async def written(self) -> None:
        """Wait until the records so far are on disk; a disk that fails is not waited for. Does not raise."""
        await self._writer.written()

    def _append(self, line: bytes) -> None:
        """Write a line to the spool; runs in the writer's thread."""
        if self._spool is None:
            raise OSError("there is no spool")
        failing = self._delivery.failing
        if self._spool.append(line, spooled=failing):
            self._wake.set()
        if failing:
            self._counts.spooled(1)

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
        self._guarded(self._book_orphaned)
        self._caught_up.set()
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
            self._book_orphaned()
            if self._delivery.due:
                self._exchange()
        finally:
            self._maintain_spool()

    def _book_orphaned(self) -> None:
        if self._spool is not None and self._booking_interval.passed():
            self._delivery.book_orphaned(self._spool.folder)

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
        for _batch in range(0, self._writer.records, MAX_TRACES):
            self._send_from_memory(run)

    def _send_from_memory(self, run: Run) -> None:
        entries = self._writer.take(MAX_TRACES)
        if not entries:
            return
        try:
            self._delivery.send_memory([entry.record for entry in entries], run)
        except BaseException:
            self._writer.put_back(entries)
            raise
        self._writer.done(entries)

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
        self._writer.retry()
        self._spool.expire(self._settings.spool_max_age_s)
        if self._sync_interval.passed():
            self._spool.sync()
        if self._expiry_interval.passed():
            self._delivery.expire_orphaned(self._spool.folder, self._settings.spool_max_age_s)

    def _last_round(self) -> None:
        try:
            self._writer.stop()
            self._deliver()
            self._run.end(self._tracker, self._run.ended_ms or self._run.started_ms)
            if self._spool is not None:
                run_file(self._spool.folder, self._spool.name).unlink(missing_ok=True)
        finally:
            if self._spool is not None:
                self._writer.write()
                self._spool.sync()
                self._spool.close()
            self._lose_memory()

    def _lose_memory(self) -> None:
        if left := self._writer.end():
            self._lose(left, "no disk took them, and MLflow neither")
        self._counts.log_losses()

    def _save_run(self) -> None:
        if self._spool is not None:
            with self._run_lock:
                self._run.save(run_file(self._spool.folder, self._spool.name))
