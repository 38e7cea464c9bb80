"""Brings records from the spool to MLflow: this process's own, and those of processes that are dead."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags, Tracer

from service.recording.mlflow import GoneError, RefusedError, Run, Tracker, TrackerError
from service.recording.record import CallRecord, read
from service.recording.run import ProcessRun
from service.recording.spool import Estate, Segment, Spool, estates
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 10.0
"""After a failure the server is left alone for so long, at most."""

FRUITLESS = 10
"""So many refusals, and nothing that was ever taken: the other records of the file are not tried now."""

Lost = Callable[[int, str], None]


@dataclass
class Replayed:
    """How many records of dead processes went to MLflow, and how many files it refused for now."""

    records: int = 0
    files_kept: int = 0


logger = logging.getLogger(__name__)


class Delivery:
    """Sends records, and knows whether MLflow takes them at the moment.

    Args:
        tracker: The MLflow server.
        instruments: Where waiting and replayed records are counted.
        tracer: For the one span of each delivery.
        on_lost: Called with a number of records that nobody will get, and why.
        on_settled: Called with the number of this process's records that wait no more, whatever became of
            them.
        clock: Monotonic, in seconds.
    """

    def __init__(  # noqa: PLR0913 - ends and seams
        self,
        tracker: Tracker,
        instruments: Instruments,
        tracer: Tracer,
        *,
        on_lost: Lost,
        on_settled: Callable[[int], None] = lambda _count: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracker = tracker
        self._instruments = instruments
        self._tracer = tracer
        self._on_lost = on_lost
        self._on_settled = on_settled
        self._clock = clock
        # What MLflow took last, and takes again without any change; unless it refuses everybody.
        self._good: tuple[CallRecord, Run] | None = None
        self._replayed = 0
        self._delay_s = FIRST_DELAY_S
        self._again_at = 0.0
        self.failing = False

    @property
    def due(self) -> bool:
        """Whether the server may be asked again."""
        return self._clock() >= self._again_at

    def failed(self, error: TrackerError, spool: Spool | None) -> None:
        """Note that MLflow takes nothing now, and count what waits; said once for each time that it fails."""
        waiting = spool.count_spooled() if spool else 0
        self._instruments.recorder_spooled.add(waiting)
        if not self.failing:
            emit(
                logger,
                names.EVENT_RECORDER_SPOOLED,
                f"MLflow does not take records ({error.reason}): they wait on disk",
                {"records": waiting, "reason": error.reason},
                level=logging.WARNING,
            )
        self.failing = True
        self._again_at = self._clock() + self._delay_s
        self._delay_s = min(MAX_DELAY_S, 2 * self._delay_s)

    def passed(self) -> None:
        """Note that MLflow takes records."""
        self.failing = False
        self._delay_s = FIRST_DELAY_S

    def send_spool(self, spool: Spool, run: Run) -> None:
        """Send what lies in this process's spool by now; raises as the tracker does."""
        # Not until it is empty: under load it never is.
        for _file in range(spool.files):
            if (segment := spool.take()) is None:
                break
            try:
                self._send_segment(segment, spool, run)
            except Exception as error:
                # One that fails by itself lets the others go first.
                by_itself = isinstance(error, RefusedError) or not isinstance(error, TrackerError)
                spool.put_back(segment, last=by_itself)
                raise
        if self._replayed and not self.failing:
            self._say_replayed(self._replayed)
            self._replayed = 0

    def _send_segment(self, segment: Segment, spool: Spool, run: Run) -> None:
        try:
            records, _garbled = read(segment.path)
        except FileNotFoundError:
            records = []
        except OSError:
            raise RefusedError("a file cannot be read") from None
        lost = self._send(records, run, waited=segment.spooled > 0)
        # A file that was removed or changed by somebody has fewer records than went into it.
        lost += segment.records - len(records)
        spool.done(segment)
        self._on_settled(segment.records)
        if lost:
            self._on_lost(lost, "refused or unreadable")
        if segment.spooled:
            replayed = max(0, segment.spooled - lost)
            self._instruments.recorder_replayed.add(replayed)
            self._replayed += replayed

    def send_memory(self, records: Sequence[CallRecord], run: Run) -> None:
        """Send records that no disk would take; raises as the tracker does."""
        lost = self._send(records, run, waited=False)
        self._on_settled(len(records))
        if lost:
            self._on_lost(lost, "refused")

    def _send(self, records: Sequence[CallRecord], run: Run, *, waited: bool) -> int:
        """Send the records of a file; how many of them MLflow refuses while it takes others.

        Raises ``RefusedError`` where it refuses everybody now: a database in trouble looks the same.
        """
        if not records:
            return 0
        try:
            self._send_once(records, run, waited=waited)
        except RefusedError as error:
            return self._one_by_one(records, run, error, waited=waited)
        self._took(records[-1], run)
        return 0

    def _one_by_one(
        self, records: Sequence[CallRecord], run: Run, error: RefusedError, *, waited: bool
    ) -> int:
        """Send each by itself; how many are refused; raises the error where MLflow refuses everybody now."""
        refused, later = 0, []
        for record in records:
            if self._is_taken(record, run, waited=waited):
                self._took(record, run)
            elif self._good is not None:
                refused += self._is_poison(record, run, error, waited=waited)
            else:
                later.append(record)
                if len(later) >= FRUITLESS:
                    raise error
        return refused + sum(self._is_poison(record, run, error, waited=waited) for record in later)

    def _is_poison(self, record: CallRecord, run: Run, error: RefusedError, *, waited: bool) -> bool:
        """Whether MLflow refuses a record, and this one only; raises the error where it refuses all."""
        if self._good is None or not self._is_taken(*self._good, waited=waited):
            raise error
        # Asked once more: what ailed the server may have passed between the two questions.
        return not self._is_taken(record, run, waited=waited)

    def _is_taken(self, record: CallRecord, run: Run, *, waited: bool) -> bool:
        try:
            self._send_once([record], run, waited=waited)
        except RefusedError:
            return False
        return True

    def _took(self, record: CallRecord, run: Run) -> None:
        self._good = record, run
        self.passed()

    def _send_once(self, records: Sequence[CallRecord], run: Run, *, waited: bool) -> None:
        # A root of its own, linked to what it is about: it runs after the answers, for many of them.
        with self._tracer.start_as_current_span(
            names.SPAN_SPOOL_REPLAY if waited else names.SPAN_MLFLOW_RECORD,
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

    def send_estates(self, folder: Path, max_age_s: float) -> Replayed:
        """Send what dead processes left, in their order, and end their runs.

        Raises as the tracker does, but for ``GoneError``; what was not sent by then stays where it is.
        """
        replayed = Replayed()
        try:
            with closing(estates(folder)) as found:
                for estate in found:
                    self._send_estate(estate, max_age_s, replayed)
        finally:
            if replayed.records:
                self._say_replayed(replayed.records)
        return replayed

    def _send_estate(self, estate: Estate, max_age_s: float, replayed: Replayed) -> None:
        last_seen_ms = int(estate.last_seen_s * 1_000)
        run = ProcessRun.load(estate.run_file, estate.name, last_seen_ms)
        # Kept in the run's file from now on, whose own change would be the latest.
        run.ended_ms = run.ended_ms or last_seen_ms
        self._give_up_old(estate, max_age_s)
        try:
            self._bring(estate, run, replayed)
        except GoneError:
            # Somebody deleted its run; what it recorded goes into another one.
            run.forget()
            run.save(estate.run_file)
            try:
                self._bring(estate, run, replayed)
            except GoneError as error:
                raise TrackerError(error.reason) from None

    def _bring(self, estate: Estate, run: ProcessRun, replayed: Replayed) -> None:
        kept = 0
        for path in estate.segments:
            on_server = self._on_server(run, estate)
            try:
                records, garbled = read(path)
                refused = self._send(records, on_server, waited=True)
            except (OSError, RefusedError):
                kept += 1
                continue
            path.unlink(missing_ok=True)
            self._instruments.recorder_replayed.add(len(records) - refused)
            replayed.records += len(records) - refused
            if refused + garbled:
                self._on_lost(refused + garbled, "refused or unreadable")
        if kept:
            replayed.files_kept += kept
            return
        run.end(self._tracker, run.started_ms)
        estate.clear()

    def expire_estates(self, folder: Path, max_age_s: float) -> None:
        """Give up what dead processes left too long ago, whether MLflow is there or not."""
        with closing(estates(folder)) as found:
            for estate in found:
                self._give_up_old(estate, max_age_s)

    def _give_up_old(self, estate: Estate, max_age_s: float) -> None:
        if lost := estate.expire(max_age_s):
            self._on_lost(lost, "too old")

    def _on_server(self, run: ProcessRun, estate: Estate) -> Run:
        new = run.run_id is None
        found = run.on_server(self._tracker)
        if new:
            # Written down at once: whoever goes on after us must not make another one.
            run.save(estate.run_file)
        return found

    def _say_replayed(self, count: int) -> None:
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
