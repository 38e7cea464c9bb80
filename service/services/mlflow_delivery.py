"""Brings records from the spool to MLflow: this process's own, and those of processes that are dead."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags, Tracer

from service.clients.call_record import CallRecord
from service.clients.mlflow import GoneError, RefusedError, Run, Tracker, TrackerError
from service.services.estates import Estate, estates
from service.services.mlflow_run import ProcessRun
from service.services.spool import Segment, Spool
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 10.0
"""After a failure the server is left alone for so long, at most."""

Lost = Callable[[int, str], None]


class Replayed(NamedTuple):
    """How many records of dead processes went to MLflow, and how many files it refused for now."""

    records: int
    files_kept: int


logger = logging.getLogger(__name__)


class Delivery:
    """Sends records, and knows whether MLflow takes them at the moment.

    Args:
        tracker: The MLflow server.
        instruments: Where waiting and replayed records are counted.
        tracer: For the one span of each delivery.
        on_lost: Called with a number of records that nobody will get, and why.
        on_delivered: Called with the number of this process's records that MLflow has now.
        clock: Monotonic, in seconds.
    """

    def __init__(  # noqa: PLR0913 - ends and seams
        self,
        tracker: Tracker,
        instruments: Instruments,
        tracer: Tracer,
        *,
        on_lost: Lost,
        on_delivered: Callable[[int], None] = lambda _count: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracker = tracker
        self._instruments = instruments
        self._tracer = tracer
        self._on_lost = on_lost
        self._on_delivered = on_delivered
        self._clock = clock
        self._taken = 0
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
        self._taken += 1
        self.failing = False
        self._delay_s = FIRST_DELAY_S

    def send_spool(self, spool: Spool, run: Run) -> None:
        """Send all that lies in this process's spool; raises as the tracker does."""
        waiting = [spool.take()]
        while (segment := waiting.pop()) is not None:
            try:
                self._send_segment(segment, spool, run)
            except TrackerError as error:
                spool.put_back(segment, last=isinstance(error, RefusedError))
                raise
            waiting.append(spool.take())
        if self._replayed and not self.failing:
            self._say_replayed(self._replayed)
            self._replayed = 0

    def _send_segment(self, segment: Segment, spool: Spool, run: Run) -> None:
        records = read(segment.path)
        lost = self._send(records, run, waited=segment.spooled > 0, segment=segment)
        # A file that cannot be read, or was changed by somebody, has fewer records than went into it.
        lost += segment.records - len(records)
        spool.done(segment)
        self._on_delivered(segment.records - lost)
        if lost:
            self._on_lost(lost, "refused or unreadable")
        if segment.spooled:
            replayed = max(0, segment.spooled - lost)
            self._instruments.recorder_replayed.add(replayed)
            self._replayed += replayed

    def send_memory(self, records: Sequence[CallRecord], run: Run) -> None:
        """Send records that no disk would take; raises as the tracker does."""
        self._send_once(records, run, waited=False)
        self.passed()
        self._on_delivered(len(records))

    def _send(
        self, records: Sequence[CallRecord], run: Run, *, waited: bool, segment: Segment | None = None
    ) -> int:
        """Send the records of a file; how many of them MLflow refuses while it takes others."""
        if not records:
            return 0
        try:
            self._send_once(records, run, waited=waited)
        except RefusedError:
            refused = self._one_by_one(records, run, waited=waited)
            if refused == len(records) and not self._others_passed(segment):
                # Perhaps it refuses everybody now: a database in trouble looks the same.
                raise
            return refused
        self.passed()
        return 0

    def _others_passed(self, segment: Segment | None) -> bool:
        """Whether other files were taken since this one was refused; notes the refusal."""
        if segment is None:
            return False
        before, segment.refused_at = segment.refused_at, self._taken
        return 0 <= before < self._taken

    def _one_by_one(self, records: Sequence[CallRecord], run: Run, *, waited: bool) -> int:
        refused = 0
        for record in records if len(records) > 1 else ():
            try:
                self._send_once([record], run, waited=waited)
            except RefusedError:
                refused += 1
            else:
                self.passed()
        return refused if len(records) > 1 else len(records)

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

        Raises as the tracker does; what was not sent by then stays where it is.
        """
        sent = kept = 0
        try:
            for estate in estates(folder):
                one = self._send_estate(estate, max_age_s)
                sent, kept = sent + one.records, kept + one.files_kept
        finally:
            if sent:
                self._say_replayed(sent)
        return Replayed(sent, kept)

    def _send_estate(self, estate: Estate, max_age_s: float) -> Replayed:
        at_s = _latest_change(estate)
        run = ProcessRun.load(estate.run_file, estate.name, int(at_s * 1_000))
        kept = sent = 0
        for path in estate.segments:
            if time.time() - path.stat().st_mtime > max_age_s:
                self._on_lost(len(read(path)), "too old")
                path.unlink(missing_ok=True)
                continue
            on_server = self._on_server(run, estate)
            records = read(path)
            try:
                refused = self._send(records, on_server, waited=True)
            except RefusedError:
                kept += 1
                continue
            path.unlink(missing_ok=True)
            self._instruments.recorder_replayed.add(len(records) - refused)
            sent += len(records) - refused
            if refused:
                self._on_lost(refused, "refused")
        if not kept:
            run.end(self._tracker, int(at_s * 1_000))
            estate.clear()
        return Replayed(sent, kept)

    def _on_server(self, run: ProcessRun, estate: Estate) -> Run:
        new = run.run_id is None
        try:
            found = run.on_server(self._tracker)
        except GoneError:
            run.forget()
            raise
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


def read(path: Path) -> list[CallRecord]:
    """The records in a file; a line that is none, like one cut off by a crash, is passed over."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    found = []
    for line in data.split(b"\n"):
        with suppress(ValueError):
            found.append(CallRecord.from_line(line))
    return found


def _latest_change(estate: Estate) -> float:
    """When the process was last seen alive, in Unix time."""
    paths = [*estate.segments, estate.run_file]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=time.time())


def _link(record: CallRecord) -> Link:
    return Link(
        SpanContext(
            int(record.trace_id, 16),
            int(record.span_id, 16),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )
    )
