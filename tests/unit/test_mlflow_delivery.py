"""Delivery: what is sent, counted and logged, and when a failure is retried."""

from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, format_trace_id

from service.recording.delivery import MAX_REFUSALS, Delivery
from service.recording.mlflow import GoneError, TrackerError
from service.recording.spool import SEGMENT_RECORDS, Spool, spool_files
from tests.fakes.clock import FakeClock
from tests.fakes.ledger import FakeLedger
from tests.unit.recording import FakeTracker, KeptCounts, Lost, lines, make_record, number_of
from tests.unit.resilience import Readable


class Sender:
    """A delivery and its spool, and what can be observed of them."""

    def __init__(self, metrics: Readable, folder: Path) -> None:
        self.metrics = metrics
        self.clock = FakeClock()
        self.tracker = FakeTracker()
        self.lost = Lost()
        self.records = KeptCounts(metrics.instruments, self.lost)
        self.ledger = FakeLedger()
        self.spans_out = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.spans_out))
        self.spool = Spool(folder, 10_000_000, self.lost)
        self.delivery = Delivery(
            self.tracker,
            provider.get_tracer("test"),
            self.records,
            self.ledger,
            self.clock,
        )
        self.run = self.tracker.start_run("run", 0)

    @property
    def settled(self) -> int:
        return self.records.total_settled

    def write(self, *numbers: int) -> None:
        """Put these records into the spool, as the recorder does."""
        for number in numbers:
            failing = self.delivery.failing
            self.spool.append(lines(number), spooled=failing)
            self.metrics.instruments.recorder_spooled.add(int(failing))

    def send(self) -> str | None:
        """Send the spool; the reason when that fails, which is noted as the recorder does."""
        try:
            self.delivery.send_spool(self.spool, self.run)
        except TrackerError as error:
            self.delivery.failed(error, self.spool)
            return error.reason
        return None

    @property
    def counts(self) -> list[float]:
        """Spooled, replayed and lost; the last from what was told."""
        counters = [self.metrics.value(f"llmops.recorder.{name}") for name in ("spooled", "replayed")]
        return [*counters, self.lost.total]

    @property
    def left(self) -> int:
        """How many files lie in the spool."""
        return len(spool_files(self.spool.folder, self.spool.name))


@pytest.fixture
def sender(metrics: Readable, tmp_path: Path) -> Sender:
    return Sender(metrics, tmp_path)


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[Any, Any, str]]:
    return [
        (vars(record)["otel.event.name"], vars(record)["records"], record.levelname)
        for record in caplog.records
        if "otel.event.name" in vars(record)
    ]


def test_records_that_wait_are_counted_and_logged_once_each_way(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sender.write(*range(150))
    sender.tracker.error = TrackerError("Connection error")
    assert sender.send() == "Connection error"
    assert sender.counts == [150, 0, 0]
    sender.write(150, 151)
    for _again in range(3):
        sender.send()
    assert sender.counts == [152, 0, 0]
    sender.tracker.error = None
    assert sender.send() is None
    assert (sender.counts, sender.settled) == ([152, 152, 0], 152)
    # What comes afterwards has not waited.
    sender.write(152)
    sender.send()
    assert sender.counts == [152, 152, 0]
    assert events(caplog) == [
        ("llmops.recorder.spooled", 150, "WARNING"),
        ("llmops.recorder.replayed", 152, "INFO"),
    ]
    assert list(sender.tracker.kept) == list(range(153))


def test_a_failure_half_way_leaves_the_rest_and_the_replay_is_logged_once(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sender.write(*range(250))
    sender.tracker.error = TrackerError("Timeout")
    sender.send()
    sender.tracker.error = None
    left = [TrackerError("Timeout"), None]

    def fail_after_the_first() -> None:
        sender.tracker.error = left.pop() if left else None

    sender.tracker.on_send = fail_after_the_first
    assert sender.send() == "Timeout"
    assert (len(sender.tracker.kept), sender.left) == (100, 2)
    sender.send()
    assert sender.counts == [250, 250, 0]
    assert events(caplog)[-1] == ("llmops.recorder.replayed", 250, "INFO")


def test_back_off_doubles_up_to_ten_seconds_and_is_reset_by_success(sender: Sender) -> None:
    waits = []
    for _failure in range(7):
        sender.delivery.failed(TrackerError("Timeout"), sender.spool)
        waits.append(waited_s(sender))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    sender.delivery.succeeded()
    sender.delivery.failed(TrackerError("Timeout"), None)
    assert waited_s(sender) == 0.5


def waited_s(sender: Sender) -> float:
    """How long until the server may be asked."""
    began = sender.clock()
    while not sender.delivery.due:
        sender.clock.advance(0.25)
    return sender.clock() - began


def test_records_that_arrive_during_a_delivery_wait_for_the_next(sender: Sender) -> None:
    sender.write(0)
    coming = iter(range(1, 1_000))
    sender.tracker.on_send = lambda: sender.write(next(coming))
    sender.send()
    # Under load there is always more: the recorder has other things to do, too.
    assert sender.tracker.exports == [[0]]
    sender.send()
    assert sender.tracker.exports == [[0], [1]]


@pytest.mark.parametrize("poison", [{0}, {0, 1, 2}, {4}, {0, 2, 4}])
def test_refused_records_are_lost_and_no_others(sender: Sender, poison: set[int]) -> None:
    sender.write(*range(5))
    sender.tracker.refuses = lambda record: number_of(record) in poison
    assert sender.send() is None
    assert set(sender.tracker.kept) == set(range(5)) - poison
    assert sender.lost.said == [(len(poison), "refused or unreadable")]
    assert (sender.left, sender.settled) == (0, 5)


def test_nothing_is_lost_while_every_record_is_refused(sender: Sender) -> None:
    sender.write(*range(SEGMENT_RECORDS))
    sender.tracker.refuses = lambda _record: True
    for _again in range(3):
        assert sender.send() == "HTTP 422"
    assert (sender.lost.said, sender.left, sender.delivery.failing) == ([], 1, True)
    # And it does not ask for each of them again and again.
    assert len(sender.tracker.exports) == 3 * (1 + MAX_REFUSALS)
    sender.tracker.refuses = lambda _record: False
    assert sender.send() is None
    assert len(sender.tracker.kept) == SEGMENT_RECORDS
    assert sender.counts == [100, 100, 0]


def test_a_file_of_refused_records_is_kept_until_another_record_is_accepted(sender: Sender) -> None:
    sender.write(*range(SEGMENT_RECORDS))
    sender.tracker.refuses = lambda record: number_of(record) < SEGMENT_RECORDS
    assert sender.send() == "HTTP 422"
    sender.write(1_000)
    # It lets the other go first, and is known for what it is when that has passed.
    sender.send()
    sender.send()
    assert list(sender.tracker.kept) == [1_000]
    assert (sender.lost.total, sender.left, sender.settled) == (SEGMENT_RECORDS, 0, SEGMENT_RECORDS + 1)


def test_a_failure_that_begins_within_a_file_loses_nothing(sender: Sender) -> None:
    sender.write(*range(20))
    allowed = 5

    def refuses(_record: object) -> bool:
        # The whole file is refused, five pass by themselves, and then none does: not the records' fault.
        return len(sender.tracker.exports) == 1 or len(sender.tracker.kept) >= allowed

    sender.tracker.refuses = refuses
    assert sender.send() == "HTTP 422"
    assert (sender.lost.said, sender.left) == ([], 1)
    sender.tracker.refuses = lambda _record: False
    assert sender.send() is None
    assert len(sender.tracker.kept) == 20
    assert sender.lost.said == []


def test_a_refused_record_is_tried_again_before_it_is_lost(sender: Sender) -> None:
    sender.write(0, 1, 2)
    # The whole file is refused, then 1 by itself; 0 shows that MLflow accepts records, and 1 is sent again.
    sender.tracker.refuses = lambda _record: len(sender.tracker.exports) in {1, 3}
    assert sender.send() is None
    assert sender.tracker.exports == [[0, 1, 2], [0], [1], [0], [1], [2]]
    assert (sorted(sender.tracker.kept), sender.lost.said) == ([0, 1, 2], [])


def test_records_of_a_removed_or_changed_file_are_lost_and_counted(sender: Sender) -> None:
    sender.write(*range(2 * SEGMENT_RECORDS))
    first, second = spool_files(sender.spool.folder, sender.spool.name)
    first.unlink()
    second.write_bytes(lines(100, 101) + b"invalid\n")
    assert sender.send() is None
    assert sender.lost.total == 198
    assert sender.settled == 200


def test_an_unreadable_file_is_kept(sender: Sender) -> None:
    sender.write(*range(SEGMENT_RECORDS))
    (path,) = spool_files(sender.spool.folder, sender.spool.name)
    away = path.with_name("away")
    path.rename(away)
    # Root may read everything; a folder is what it cannot read, either.
    path.mkdir()
    assert sender.send() == "a file cannot be read"
    assert (sender.lost.said, sender.spool.files) == ([], 1)
    path.rmdir()
    away.rename(path)
    assert sender.send() is None
    assert len(sender.tracker.kept) == SEGMENT_RECORDS


@pytest.mark.parametrize("error", [ValueError("a bug"), TrackerError("Timeout"), GoneError("HTTP 404")])
def test_a_file_stays_whatever_is_raised(sender: Sender, error: Exception) -> None:
    sender.write(0)
    sender.tracker.error = error
    with pytest.raises(type(error)):
        sender.delivery.send_spool(sender.spool, sender.run)
    sender.tracker.error = None
    assert sender.send() is None
    assert list(sender.tracker.kept) == [0]


def test_records_from_memory_are_sent_and_refused_ones_are_lost(sender: Sender) -> None:
    records = [make_record(number) for number in range(5)]
    sender.tracker.refuses = lambda record: number_of(record) == 3
    sender.delivery.send_memory(records, sender.run)
    assert sorted(sender.tracker.kept) == [0, 1, 2, 4]
    assert (sender.lost.said, sender.settled) == ([(1, "refused")], 5)
    sender.tracker.error = TrackerError("Timeout")
    with pytest.raises(TrackerError, match="Timeout"):
        sender.delivery.send_memory(records, sender.run)
    assert sender.settled == 5


def spans_named(sender: Sender, name: str) -> list[ReadableSpan]:
    return [span for span in sender.spans_out.get_finished_spans() if span.name == name]


def test_each_export_is_a_root_span_linked_to_its_calls(sender: Sender) -> None:
    sender.write(1, 2)
    sender.tracker.error = TrackerError("HTTP 503")
    with trace.use_span(NonRecordingSpan(SpanContext(1, 1, is_remote=False)), end_on_exit=False):
        sender.send()
    (failed,) = spans_named(sender, "mlflow record")
    assert failed.parent is None
    assert dict(failed.attributes or {}) == {"llmops.recorder.records": 2}
    traces = [format_trace_id(link.context.trace_id) for link in failed.links]
    assert traces == [make_record(1).trace_id, make_record(2).trace_id]
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "HTTP 503")
    sender.tracker.error = None
    sender.send()
    (replayed,) = spans_named(sender, "spool replay")
    assert replayed.status.status_code == StatusCode.UNSET


def test_a_file_stays_until_the_ledger_has_it_and_is_sent_once(sender: Sender) -> None:
    sender.write(0)
    sender.ledger.fails = True
    for _again in range(2):
        assert sender.send() is None
        assert (sender.left, sender.tracker.exports, sender.settled) == (1, [[0]], 1)
    # What waits for the ledger does not wait for MLflow.
    sender.tracker.error = TrackerError("Timeout")
    sender.write(1)
    sender.send()
    assert sender.counts == [1, 0, 0]
    sender.tracker.error, sender.ledger.fails = None, False
    assert sender.send() is None
    assert (sender.left, sender.tracker.exports.count([0])) == (0, 1)
    assert sorted(map(number_of, sender.ledger.booked.values())) == [0, 1]


def test_a_file_that_mlflow_has_and_the_ledger_has_not_is_not_lost_without_a_word(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    sender.write(0)
    sender.ledger.fails = True
    sender.send()
    sender.spool.expire(-1)
    assert (sender.left, sender.counts) == (0, [0, 0, 0])
    assert "The ledger does not have the records of a file that was dropped: too old" in caplog.messages
