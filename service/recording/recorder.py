"""Records every call in MLflow: into the spool before the answer goes out, to the server after it."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from opentelemetry.trace import Tracer

from service.config.settings import Settings
from service.recording.delivery import Delivery
from service.recording.mlflow import MAX_TRACES, GoneError, Tracker, TrackerError, in_thread
from service.recording.record import CallRecord
from service.recording.run import Losses, ProcessRun, Totals, params_of
from service.recording.spool import Spool, run_file
from service.telemetry.instruments import Instruments

INTERVAL_S = 1.0
TOTALS_INTERVAL_S = 10.0
ESTATES_INTERVAL_S = 30.0
MEMORY_RECORDS = 10_000
MEMORY_BYTES = 16_777_216
"""What is kept where the disk takes nothing; beyond that a record is lost, and counted."""

logger = logging.getLogger(__name__)


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
        self._recorded = self._settled = 0
        self._memory: deque[tuple[CallRecord, int]] = deque()
        self._memory_bytes = 0
        # For the counts and the memory, which two threads change.
        self._lock = threading.Lock()
        self._run_lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = self._ended = False
        self._next_totals = self._next_estates = self._next_sync = self._next_expiry = 0.0
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
            on_settled=self._settle,
            clock=clock,
        )
        instruments.observe_recorder_queue(lambda: self.waiting)
        # A daemon: a server that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow recorder", daemon=True)

    def _open_spool(self, settings: Settings) -> Spool | None:
        try:
            return Spool(
                Path(settings.spool_path),
                settings.spool_max_bytes,
                self._lose,
            )
        except OSError as error:
            logger.warning(
                "The spool cannot be used: records wait in memory", extra={"reason": type(error).__name__}
            )
            return None

    @property
    def waiting(self) -> int:
        """Records of this process that MLflow does not have yet."""
        return self._recorded - self._settled

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def record(self, record: CallRecord) -> None:
        """Take the record of a call that is about to be answered; raises nothing, and waits for nobody."""
        self._recorded += 1
        try:
            self._totals.add(record)
            line = record.as_line()
            if self._spool is None or not self._to_spool(self._spool, line):
                self._keep_in_memory(record, len(line))
        except Exception:
            # A bug here must not cost the caller the answer.
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
            self._spooled.add(1)
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
        self._settle(count)
        self._losses.add(count, reason)

    def _settle(self, count: int) -> None:
        with self._lock:
            self._settled += count

    async def finish(self) -> None:
        """Deliver what is left and end the run; cancelled, the next start goes on from there."""
        try:
            await in_thread(self._end, "mlflow end")
        except asyncio.CancelledError:
            # What no disk took ends with this process, whatever the thread still waits for.
            self._lose_memory()
            logger.warning(
                "MLflow was not done with in time; the next start goes on", extra={"records": self.waiting}
            )
            raise

    def _end(self) -> None:
        # Written down first, and not by the thread, which may wait for the server at this moment: should it
        # not answer in time, the next start ends the run as it ended.
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
            # A bug here must not end the recording; it is tried again like any failure.
            logger.exception("The recorder failed")
            self._delivery.failed(TrackerError("Bug"), self._spool)

    def _round(self) -> None:
        try:
            if self._delivery.due:
                self._exchange()
        finally:
            self._tend()

    def _exchange(self) -> None:
        self._deliver()
        if self._delivery.failing:
            # Nothing was there to send: whether MLflow is back must be asked.
            self.tracker.look()
            self._delivery.passed()
        if self._spool is not None and self._is_due("_next_estates", ESTATES_INTERVAL_S):
            self._delivery.send_estates(self._spool.folder, self._settings.spool_max_age_s)
        if self._is_due("_next_totals", TOTALS_INTERVAL_S):
            self._show_totals()

    def _deliver(self) -> None:
        new = self._run.run_id is None
        run = self._run.on_server(self.tracker)
        if new:
            self._save_run()
        if self._spool is not None:
            self._delivery.send_spool(self._spool, run)
        # Not until it is empty: where no disk takes anything it never is.
        for _batch in range(0, len(self._memory), MAX_TRACES):
            with self._lock:
                batch = [record for record, _size in islice(self._memory, MAX_TRACES)]
            self._delivery.send_memory(batch, run)
            for _record in batch:
                self._pop_memory()

    def _pop_memory(self) -> None:
        with self._lock:
            self._memory_bytes -= self._memory.popleft()[1]

    def _show_totals(self) -> None:
        totals = self._totals.metrics
        if totals != self._shown:
            self._run.totals = totals
            self._save_run()
            self.tracker.log_totals(self._run.on_server(self.tracker), totals, time.time_ns() // 1_000_000)
            self._shown = totals

    def _tend(self) -> None:
        self._losses.say(at_once=False)
        if self._spool is None:
            return
        self._move_to_disk(self._spool)
        self._spool.expire(self._settings.spool_max_age_s)
        if self._is_due("_next_sync", self._settings.spool_fsync_interval_s):
            self._spool.sync()
        if self._is_due("_next_expiry", ESTATES_INTERVAL_S):
            self._delivery.expire_estates(self._spool.folder, self._settings.spool_max_age_s)

    def _move_to_disk(self, spool: Spool) -> None:
        """Put what is in memory where it outlives this process, as soon as the disk takes it again."""
        while self._memory and self._to_spool(spool, self._memory[0][0].as_line()):
            self._pop_memory()

    def _last_round(self) -> None:
        try:
            self._deliver()
            self._run.end(self.tracker, self._run.ended_ms or self._run.started_ms)
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
        self._losses.say()

    def _save_run(self) -> None:
        if self._spool is not None:
            with self._run_lock:
                self._run.save(run_file(self._spool.folder, self._spool.name))

    def _is_due(self, name: str, interval_s: float) -> bool:
        now = self._clock()
        if now < getattr(self, name):
            return False
        setattr(self, name, now + interval_s)
        return True
