"""Sends records from the spools to MLflow: those of this process, and those of orphaned spools."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags, Tracer

from service.recording.mlflow import GoneError, NoTracker, RefusedError, Run, Tracker, TrackerError
from service.recording.record import CallRecord, read_records
from service.recording.run import ProcessRun
from service.recording.spool import OrphanedSpool, Segment, Spool, orphaned_spools
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

INITIAL_DELAY_S = 0.5
MAX_DELAY_S = 10.0
"""The back-off after failures: the first delay and the longest."""

MAX_REFUSALS = 10
"""After so many refused records, and none that was ever accepted, the rest of a file is not tried."""

LOSS_LOG_INTERVAL_S = 60.0

logger = logging.getLogger(__name__)


class NotBookedError(Exception):
    """The ledger does not take records now."""


class CallLedger(Protocol):
    """Adds up what calls have cost, each of them once."""

    def take(self, record: CallRecord) -> None:
        """Count the record of a call that has ended; does not block."""

    def book(self, records: Sequence[CallRecord]) -> None:
        """Keep records for good, whether or not they were taken; blocks, and raises ``NotBookedError``."""


class RecordCounts:
    """Counts what becomes of records, and logs losses once a minute at most; thread-safe."""

    def __init__(self, instruments: Instruments, clock: Callable[[], float] = time.monotonic) -> None:
        self._instruments = instruments
        self._clock = clock
        self._lock = threading.Lock()
        self._recorded = self._settled = 0
        self._unlogged = 0
        self._reason = ""
        self._logged_at = float("-inf")

    @property
    def waiting(self) -> int:
        """Records of this process that are neither in MLflow nor lost."""
        return self._recorded - self._settled

    def recorded(self) -> None:
        """Count a record of this process."""
        with self._lock:
            self._recorded += 1

    def settled(self, count: int) -> None:
        """Count records of this process that wait no more, whether MLflow has them or they are lost."""
        with self._lock:
            self._settled += count

    def spooled(self, count: int) -> None:
        """Count records that wait because MLflow fails."""
        self._instruments.recorder_spooled.add(count)

    def replayed(self, count: int) -> None:
        """Count records that had to wait, or whose process had ended, and that MLflow now has."""
        self._instruments.recorder_replayed.add(count)

    def lost(self, count: int, reason: str) -> None:
        """Count records that are lost."""
        self._instruments.recorder_lost.add(count)
        with self._lock:
            self._unlogged += count
            self._reason = reason
        self.log_losses(at_once=False)

    def log_losses(self, *, at_once: bool = True) -> None:
        """Log the losses that were not logged yet: at once, or if the last line is a minute old."""
        with self._lock:
            due = at_once or self._clock() - self._logged_at >= LOSS_LOG_INTERVAL_S
            if not self._unlogged or not due:
                return
            count, self._unlogged = self._unlogged, 0
            self._logged_at = self._clock()
            reason = self._reason
        logger.error("Records of calls are lost", extra={"records": count, "reason": reason})


@dataclass
class Replayed:
    """The number of records that were sent from orphaned spools, and of files that stay for now.

    Args:
        records: Records that were sent.
        files_kept: Files that MLflow has refused.
        files_unbooked: Files that the ledger has not taken.
    """

    records: int = 0
    files_kept: int = 0
    files_unbooked: int = 0


class Delivery:
    """Sends records, and keeps track of whether MLflow accepts them at the moment.

    Args:
        tracker: The MLflow server.
        tracer: For the span of each export.
        counts: Where replayed, settled and lost records are counted.
        ledger: Must have the records of a file before that is removed.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        tracker: Tracker | NoTracker,
        tracer: Tracer,
        counts: RecordCounts,
        ledger: CallLedger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracker = tracker
        self._tracer = tracer
        self._counts = counts
        self._ledger = ledger
        self._clock = clock
        # The record that MLflow accepted last. Sending it again changes nothing, and shows whether MLflow
        # accepts any record at the moment.
        self._accepted: tuple[CallRecord, Run] | None = None
        self._replayed = 0
        self._delay_s = INITIAL_DELAY_S
        self._retry_at = 0.0
        self.failing = False

    @property
    def due(self) -> bool:
        """Whether the back-off is over."""
        return self._clock() >= self._retry_at

    def failed(self, error: TrackerError, spool: Spool | None) -> None:
        """Note that MLflow fails and count what waits; logged once until MLflow works again."""
        waiting = spool.count_spooled() if spool else 0
        self._counts.spooled(waiting)
        if not self.failing:
            emit(
                logger,
                names.EVENT_RECORDER_SPOOLED,
                f"MLflow does not take records ({error.reason}): they wait on disk",
                {"records": waiting, "reason": error.reason},
                level=logging.WARNING,
            )
        self.failing = True
        self._retry_at = self._clock() + self._delay_s
        self._delay_s = min(MAX_DELAY_S, 2 * self._delay_s)

    def succeeded(self) -> None:
        """Note that MLflow accepts records."""
        self.failing = False
        self._delay_s = INITIAL_DELAY_S

    def send_spool(self, spool: Spool, run: Run) -> None:
        """Send the files that are in this process's spool now; raises ``TrackerError``."""
        # Not until the spool is empty: under load it never is.
        for _file in range(spool.files):
            if (segment := spool.take()) is None:
                break
            try:
                self._send_segment(segment, spool, run)
            except Exception as error:
                # A file that fails on its own account goes behind the others.
                own_fault = isinstance(error, RefusedError) or not isinstance(error, TrackerError)
                spool.put_back(segment, last=own_fault)
                raise
        if self._replayed and not self.failing:
            _log_replayed(self._replayed)
            self._replayed = 0

    def _send_segment(self, segment: Segment, spool: Spool, run: Run) -> None:
        try:
            records, _invalid = read_records(segment.path)
        except FileNotFoundError:
            records = []
        except OSError:
            raise RefusedError("a file cannot be read") from None
        if not segment.sent:
            self._send_new(segment, records, run)
        if self._is_booked(records):
            spool.done(segment)
        else:
            spool.put_back(segment, last=True)

    def _is_booked(self, records: Sequence[CallRecord]) -> bool:
        try:
            self._ledger.book(records)
        except NotBookedError:
            return False
        return True

    def _send_new(self, segment: Segment, records: Sequence[CallRecord], run: Run) -> None:
        lost = self._send(records, run, replay=segment.spooled > 0)
        segment.sent = True
        # A file that something else removed or changed has fewer records than were written to it.
        lost += segment.records - len(records)
        self._counts.settled(segment.records)
        if lost:
            self._counts.lost(lost, "refused or unreadable")
        if segment.spooled:
            replayed = max(0, segment.spooled - lost)
            self._counts.replayed(replayed)
            self._replayed += replayed

    def send_memory(self, records: Sequence[CallRecord], run: Run) -> None:
        """Send records that could not be written to disk; raises ``TrackerError``."""
        lost = self._send(records, run, replay=False)
        self._counts.settled(len(records))
        if lost:
            self._counts.lost(lost, "refused")

    def _send(self, records: Sequence[CallRecord], run: Run, *, replay: bool) -> int:
        """Send the records of a file; returns how many of them MLflow refuses while it accepts others.

        Raises ``RefusedError`` where MLflow refuses every record, as it does when its database is in trouble.
        """
        if not records:
            return 0
        try:
            self._export(records, run, replay=replay)
        except RefusedError as error:
            return self._send_one_by_one(records, run, error, replay=replay)
        self._accept(records[-1], run)
        return 0

    def _send_one_by_one(
        self, records: Sequence[CallRecord], run: Run, error: RefusedError, *, replay: bool
    ) -> int:
        """Send each record by itself; returns the number refused, or raises the error if all are."""
        refused, undecided = 0, []
        for record in records:
            if self._is_accepted(record, run, replay=replay):
                self._accept(record, run)
            elif self._accepted is not None:
                refused += self._is_poison(record, run, error, replay=replay)
            else:
                undecided.append(record)
                if len(undecided) >= MAX_REFUSALS:
                    raise error
        return refused + sum(self._is_poison(record, run, error, replay=replay) for record in undecided)

    def _is_poison(self, record: CallRecord, run: Run, error: RefusedError, *, replay: bool) -> bool:
        """Whether MLflow refuses this record only; raises the error if it refuses every record."""
        if self._accepted is None or not self._is_accepted(*self._accepted, replay=replay):
            raise error
        # Tried again, as a failure of the server may have ended between the two exports.
        return not self._is_accepted(record, run, replay=replay)

    def _is_accepted(self, record: CallRecord, run: Run, *, replay: bool) -> bool:
        try:
            self._export([record], run, replay=replay)
        except RefusedError:
            return False
        return True

    def _accept(self, record: CallRecord, run: Run) -> None:
        self._accepted = record, run
        self.succeeded()

    def _export(self, records: Sequence[CallRecord], run: Run, *, replay: bool) -> None:
        # A root span with links: it runs after the calls it is about, and for many of them.
        with self._tracer.start_as_current_span(
            names.SPAN_SPOOL_REPLAY if replay else names.SPAN_MLFLOW_RECORD,
            context=Context(),
            attributes={names.ATTR_RECORDS: len(records)},
            links=[_link(record) for record in records],
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                self._tracker.send(records, run)
            except TrackerError as error:
                span.set_status(Status(StatusCode.ERROR, error.reason))
                raise

    def send_orphaned(self, folder: Path, max_age_s: float) -> Replayed:
        """Send the orphaned spools, oldest first, and end their runs.

        Raises:
            TrackerError: What was not sent until then stays where it is.
        """
        replayed = Replayed()
        try:
            with closing(orphaned_spools(folder)) as found:
                for orphan in found:
                    self._send_orphan(orphan, max_age_s, replayed)
        finally:
            if replayed.records:
                _log_replayed(replayed.records)
        return replayed

    def _send_orphan(self, orphan: OrphanedSpool, max_age_s: float, replayed: Replayed) -> None:
        last_written_ms = int(orphan.last_written_s * 1_000)
        run = ProcessRun.load(orphan.run_file, orphan.name, last_written_ms)
        # Saved with the run from now on: writing that file changes the time of the last write.
        run.ended_ms = run.ended_ms or last_written_ms
        self._expire(orphan, max_age_s)
        try:
            self._send_files(orphan, run, replayed)
        except GoneError:
            # The run was deleted on the server; its records go into a new one.
            run.forget()
            run.save(orphan.run_file)
            try:
                self._send_files(orphan, run, replayed)
            except GoneError as error:
                raise TrackerError(error.reason) from None

    def _send_files(self, orphan: OrphanedSpool, run: ProcessRun, replayed: Replayed) -> None:
        kept = unbooked = 0
        if isinstance(self._tracker, NoTracker) and run.params.get("mlflow_tracking_uri"):
            # The process had an MLflow server: its files wait until there is one again.
            replayed.files_kept += len(orphan.segments)
            return
        for path in orphan.segments:
            on_server = self._run_on_server(run, orphan)
            try:
                records, invalid = read_records(path)
                if not self._is_booked(records):
                    unbooked += 1
                    continue
                refused = self._send(records, on_server, replay=True)
            except (OSError, RefusedError):
                kept += 1
                continue
            path.unlink(missing_ok=True)
            self._counts.replayed(len(records) - refused)
            replayed.records += len(records) - refused
            if refused + invalid:
                self._counts.lost(refused + invalid, "refused or unreadable")
        replayed.files_kept += kept
        replayed.files_unbooked += unbooked
        if kept or unbooked:
            return
        run.end(self._tracker, run.started_ms)
        orphan.clear()

    def _run_on_server(self, run: ProcessRun, orphan: OrphanedSpool) -> Run:
        new = run.run_id is None
        found = run.on_server(self._tracker)
        if new:
            # Saved at once, so that whoever goes on after a crash does not create another one.
            run.save(orphan.run_file)
        return found

    def book_orphaned(self, folder: Path) -> None:
        """Let the ledger have the records of orphaned spools, whether or not MLflow works."""
        with closing(orphaned_spools(folder)) as found:
            for orphan in found:
                for path in orphan.segments:
                    # What cannot be read is reported when it is sent.
                    with suppress(OSError):
                        if not self._is_booked(read_records(path)[0]):
                            return

    def expire_orphaned(self, folder: Path, max_age_s: float) -> None:
        """Drop the files of orphaned spools that are too old, whether or not MLflow works."""
        with closing(orphaned_spools(folder)) as found:
            for orphan in found:
                self._expire(orphan, max_age_s)

    def _expire(self, orphan: OrphanedSpool, max_age_s: float) -> None:
        if lost := orphan.expire(max_age_s):
            self._counts.lost(lost, "too old")


def _log_replayed(count: int) -> None:
    emit(
        logger,
        names.EVENT_RECORDER_REPLAYED,
        f"MLflow has {count} record(s) that had to wait",
        {"records": count},
    )


def _link(record: CallRecord) -> Link:
    return Link(
        SpanContext(
            int(record.trace_id, 16),
            int(record.span_id, 16),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )
    )
