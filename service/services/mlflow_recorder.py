"""Records every call in MLflow: into the spool before the answer goes out, to the server after it."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from opentelemetry.trace import Tracer

from service.clients.call_record import CallRecord
from service.clients.mlflow import MAX_TRACES, GoneError, Tracker, TrackerError, in_thread
from service.config.settings import Settings
from service.services.mlflow_delivery import Delivery
from service.services.mlflow_run import ProcessRun, Totals, params_of
from service.services.spool import Spool, run_file
from service.telemetry.instruments import Instruments

INTERVAL_S = 1.0
TOTALS_INTERVAL_S = 10.0
ESTATES_INTERVAL_S = 30.0
LOSS_LINE_INTERVAL_S = 60.0
MEMORY_RECORDS = 10_000
MEMORY_BYTES = 16_777_216
"""What is kept where the disk takes nothing; beyond that a record is lost, and counted."""

logger = logging.getLogger(__name__)


class Losses:
    """Counts what is lost, and says so once a minute at most; from any thread."""

    def __init__(self, instruments: Instruments, clock: Callable[[], float] = time.monotonic) -> None:
        self._lost = instruments.recorder_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._unsaid = 0
        self._said_at = float("-inf")
        self.total = 0

    def add(self, count: int, reason: str) -> None:
        """Count so many records."""
        self._lost.add(count)
        with self._lock:
            self.total += count
            self._unsaid += count
            if self._clock() - self._said_at < LOSS_LINE_INTERVAL_S:
                return
            self._said_at = self._clock()
        self.say(reason)

    def say(self, reason: str) -> None:
        """Say what has not been said yet."""
        with self._lock:
            count, self._unsaid = self._unsaid, 0
        if count:
            logger.error("Records of calls are lost", extra={"records": count, "reason": reason})


class Recorder:
    """Takes the record of each call, and brings it to MLflow from a thread of its own.

    A record is in the spool before its call is answered, so that the end of this process, however it comes,
    loses none: the append takes a few microseconds, and what the operating system has taken it keeps.

    Args:
        tracker: The MLflow server.
        settings: Where the spool is, and its bounds.
        instruments: Where queue, waiting, replayed and lost records are counted.
        tracer: For the spans of deliveries.
        interval_s: Seconds between two deliveries, where no file is full before.
        clock: Monotonic, in seconds.
    """

    def __init__(  # noqa: PLR0913 - ends and seams
        self,
        tracker: Tracker,
        settings: Settings,
        instruments: Instruments,
        tracer: Tracer,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tracker = tracker
        self._settings = settings
        self._spooled = instruments.recorder_spooled
        self._clock = clock
        self._interval_s = interval_s
        self._losses = Losses(instruments, clock)
        self._totals = Totals()
        self._recorded = self._delivered = 0
        self._memory: deque[tuple[CallRecord, int]] = deque()
        self._memory_bytes = 0
        self._memory_lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._next_totals = self._next_estates = self._next_sync = 0.0
        self._shown: dict[str, float] = {}
        self._spool = self._open_spool(settings)
        name = self._spool.name if self._spool else f"process-{time.time_ns()}"
        params = dict(params_of(settings, version("llmops-api")))
        self._run = ProcessRun(name, time.time_ns() // 1_000_000, params)
        self._save_run()
        self._delivery = Delivery(
            tracker,
            instruments,
            tracer,
            on_lost=self._losses.add,
            on_delivered=self._count_delivered,
            clock=clock,
        )
        instruments.show_recorder_queue(lambda: self.waiting)
        # A daemon: a server that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow recorder", daemon=True)

    def _open_spool(self, settings: Settings) -> Spool | None:
        try:
            return Spool(
                Path(settings.spool_path),
                settings.spool_max_bytes,
                lambda count: self._losses.add(count, "the spool is full"),
            )
        except OSError as error:
            logger.warning(
                "The spool cannot be used: records wait in memory", extra={"reason": type(error).__name__}
            )
            return None

    @property
    def waiting(self) -> int:
        """Records of this process that MLflow does not have yet."""
        return max(0, self._recorded - self._delivered - self._losses.total)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def record(self, record: CallRecord) -> None:
        """Take the record of a call that is about to be answered; raises nothing, and waits for nobody."""
        self._recorded += 1
        self._totals.add(record)
        line = record.as_line()
        failing = self._delivery.failing
        if self._spool is not None:
            try:
                if self._spool.append(line, spooled=failing):
                    self._wake.set()
            except OSError:
                self._keep_in_memory(record, len(line))
                return
            if failing:
                self._spooled.add(1)
            return
        self._keep_in_memory(record, len(line))

    def _keep_in_memory(self, record: CallRecord, size_bytes: int) -> None:
        if len(self._memory) >= MEMORY_RECORDS or self._memory_bytes + size_bytes > MEMORY_BYTES:
            self._losses.add(1, "the disk takes nothing, and memory is full")
            return
        with self._memory_lock:
            self._memory.append((record, size_bytes))
            self._memory_bytes += size_bytes

    async def finish(self) -> None:
        """Deliver what is left and end the run; cancelled, the next start goes on from there."""
        self._stopping = True
        self._wake.set()
        try:
            await in_thread(self._thread.join, "mlflow end")
        except asyncio.CancelledError:
            logger.warning(
                "MLflow was not done with in time; the next start goes on", extra={"records": self.waiting}
            )
            raise

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
            # A bug here must not end the recording; it is tried again like any failure.
            logger.exception("The recorder failed")
            self._delivery.failed(TrackerError("Bug"), self._spool)

    def _round(self) -> None:
        if self._delivery.due:
            self._deliver()
            if self._delivery.failing:
                # Nothing was there to send: whether MLflow is back must be asked.
                self.tracker.look()
                self._delivery.passed()
            if self._is_due("_next_estates", ESTATES_INTERVAL_S) and self._spool is not None:
                self._delivery.send_estates(self._spool.folder, self._settings.spool_max_age_s)
            if self._is_due("_next_totals", TOTALS_INTERVAL_S):
                self._show_totals()
        self._tend_spool()

    def _deliver(self) -> None:
        new = self._run.run_id is None
        run = self._run.on_server(self.tracker)
        if new:
            self._save_run()
        if self._spool is not None:
            self._delivery.send_spool(self._spool, run)
        while self._memory:
            batch = [record for record, _size in list(self._memory)[:MAX_TRACES]]
            self._delivery.send_memory(batch, run)
            with self._memory_lock:
                self._memory_bytes -= sum(self._memory.popleft()[1] for _record in batch)

    def _show_totals(self) -> None:
        totals = self._totals.metrics
        if totals != self._shown:
            self._run.totals = totals
            self._save_run()
            self.tracker.log_totals(self._run.on_server(self.tracker), totals, time.time_ns() // 1_000_000)
            self._shown = totals

    def _tend_spool(self) -> None:
        if self._spool is None:
            return
        self._spool.expire(self._settings.spool_max_age_s)
        if self._is_due("_next_sync", self._settings.spool_fsync_interval_s):
            self._spool.sync()

    def _last_round(self) -> None:
        # Written down first: should the server not answer now, the next start ends the run as it ended.
        self._run.status = "FINISHED"
        self._run.ended_ms = time.time_ns() // 1_000_000
        self._run.totals = self._totals.metrics
        self._save_run()
        try:
            self._deliver()
            self._run.end(self.tracker, self._run.ended_ms)
        except TrackerError:
            if self._spool is not None:
                self._spool.sync()
            raise
        else:
            if self._spool is not None:
                run_file(self._spool.folder, self._spool.name).unlink(missing_ok=True)
        finally:
            if self._memory:
                self._losses.add(len(self._memory), "no disk took them, and MLflow neither")
            self._losses.say("see before")
            if self._spool is not None:
                self._spool.close()

    def _save_run(self) -> None:
        if self._spool is not None:
            self._run.save(run_file(self._spool.folder, self._spool.name))

    def _count_delivered(self, count: int) -> None:
        self._delivered += count

    def _is_due(self, name: str, interval_s: float) -> bool:
        now = self._clock()
        if now < getattr(self, name):
            return False
        setattr(self, name, now + interval_s)
        return True
