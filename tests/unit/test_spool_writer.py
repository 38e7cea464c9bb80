"""The writer of the spool: bounds, order, and whom a disk that hangs or refuses keeps waiting."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from service.recording.record import CallRecord
from service.recording.writer import MEMORY_BYTES, MEMORY_RECORDS, Entry, SpoolWriter
from tests.fakes.clock import FakeClock
from tests.unit.recording import Lost, make_record, number_of

LIMIT_S = 10.0
HANGS = "The disk of the spool does not answer: records wait in memory"
WORKS = "The disk of the spool answers again"


def entry(number: int, **changes: object) -> Entry:
    record = make_record(number, **changes)
    return Entry(record, record.as_line())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Disk:
    """A disk that works, refuses or hangs."""

    def __init__(self) -> None:
        self.works = threading.Event()
        self.works.set()
        self.error: Exception | None = None
        self.asked = threading.Event()
        self.records: list[int] = []
        self.tried = 0

    def append(self, line: bytes) -> None:
        self.asked.set()
        self.works.wait(LIMIT_S)
        self.tried += 1
        if self.error is not None:
            raise self.error
        self.records.append(number_of(CallRecord.from_line(line)))


class Bench:
    """A writer with its thread, on a disk; callers wait ``timeout_s`` for it."""

    def __init__(self, timeout_s: float) -> None:
        self.disk, self.lost, self.clock = Disk(), Lost(), FakeClock(1_000.0)
        self.writer = SpoolWriter(self.disk.append, self.lost, timeout_s=timeout_s, clock=self.clock)
        self.writer.start()

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.writer.put(entry(number))

    def hang(self) -> None:
        """Let a first record hang in the disk, and a caller see it."""
        self.disk.works.clear()
        self.put(0)
        assert self.disk.asked.wait(LIMIT_S)
        asyncio.run(self.writer.written())


@pytest.fixture
def bench() -> Iterator[Bench]:
    """With callers who soon take the disk for one that hangs."""
    yield from opened(Bench(0.05))


@pytest.fixture
def patient() -> Iterator[Bench]:
    """With callers who wait as long as a busy machine may take."""
    yield from opened(Bench(LIMIT_S))


def opened(bench: Bench) -> Iterator[Bench]:
    yield bench
    bench.disk.works.set()
    bench.writer.stop()


def test_records_are_written_in_order_before_whoever_waits_goes_on(patient: Bench) -> None:
    async def call(number: int) -> None:
        patient.put(number)
        await patient.writer.written()
        assert number in patient.disk.records

    async def calls() -> None:
        await asyncio.gather(*(call(number) for number in range(500)))

    asyncio.run(calls())
    assert patient.disk.records == list(range(500))
    assert patient.writer.records == 0


def test_nobody_waits_where_nothing_does(bench: Bench) -> None:
    bench.disk.works.clear()
    asyncio.run(bench.writer.written())
    assert not bench.disk.asked.is_set()


def test_while_a_disk_hangs_one_caller_waits_and_the_others_do_not(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bench.hang()

    async def not_waiting() -> None:
        bench.put(1)
        # Done in one step, without giving the loop a turn.
        waiting = bench.writer.written()
        with pytest.raises(StopIteration):
            waiting.send(None)

    for _call in range(3):
        asyncio.run(not_waiting())
    assert caplog.messages.count(HANGS) == 1
    bench.disk.works.set()
    until(lambda: WORKS in caplog.messages)
    assert bench.disk.records == [0, 1, 1, 1]
    # The promise holds again.
    bench.disk.works.clear()
    bench.put(2)
    asyncio.run(bench.writer.written())
    bench.disk.works.set()
    until(lambda: bench.disk.records[-1] == 2)
    # Once a minute is enough.
    assert caplog.messages.count(HANGS) == 1
    bench.clock.advance(60)
    bench.hang()
    assert caplog.messages.count(HANGS) == 2


def test_memory_is_bounded_while_a_disk_hangs(bench: Bench) -> None:
    bench.hang()
    bench.put(*range(1, MEMORY_RECORDS + 7))
    assert bench.writer.records == MEMORY_RECORDS
    assert bench.lost.said == [(1, "the disk takes nothing, and memory is full")] * 7
    bench.disk.works.set()
    until(lambda: bench.writer.records == 0)
    assert bench.disk.records == list(range(MEMORY_RECORDS))


def test_memory_is_bounded_in_bytes_while_a_disk_hangs(bench: Bench) -> None:
    bench.hang()
    for number in range(1, 6):
        bench.writer.put(entry(number, answer="x" * (MEMORY_BYTES // 4)))
    assert bench.lost.total == 2
    bench.disk.works.set()
    until(lambda: bench.writer.records == 0)
    bench.put(9)
    until(lambda: bench.disk.records == [0, 1, 2, 3, 9])


def test_what_a_disk_refuses_does_not_hold_up_the_next_and_is_tried_again(patient: Bench) -> None:
    patient.disk.error = OSError("full")
    patient.put(1, 2)
    asyncio.run(patient.writer.written())
    assert (patient.writer.records, patient.lost.total) == (2, 0)
    patient.disk.error = None
    patient.put(3)
    asyncio.run(patient.writer.written())
    assert patient.disk.records == [3]
    patient.writer.retry()
    until(lambda: patient.disk.records == [3, 1, 2])


def test_a_full_disk_is_not_asked_for_all_records_again_and_again(patient: Bench) -> None:
    patient.disk.error = OSError("full")
    patient.put(*range(100))
    asyncio.run(patient.writer.written())
    until(lambda: patient.disk.tried == 100)
    patient.writer.retry()
    until(lambda: patient.disk.tried == 101)
    patient.writer.retry()
    until(lambda: patient.disk.tried == 102)
    assert [number_of(each.record) for each in patient.writer.take(3)] == [0, 1, 2]


def test_what_is_taken_is_not_written_and_counts_until_it_is_done(patient: Bench) -> None:
    patient.disk.error = OSError("full")
    patient.put(1, 2, 3)
    asyncio.run(patient.writer.written())
    until(lambda: patient.disk.tried == 3)
    taken = patient.writer.take(2)
    patient.disk.error = None
    patient.writer.retry()
    until(lambda: patient.disk.records == [3])
    assert patient.writer.records == 2
    patient.writer.put_back(taken[1:])
    patient.writer.done(taken[:1])
    patient.writer.retry()
    until(lambda: patient.disk.records == [3, 2])
    until(lambda: patient.writer.records == 0)


def test_a_bug_loses_a_record_and_does_not_end_the_thread(
    patient: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    patient.disk.error = ValueError("a bug")
    patient.put(1)
    asyncio.run(patient.writer.written())
    patient.disk.error = None
    patient.put(2)
    asyncio.run(patient.writer.written())
    assert (patient.disk.records, patient.lost.said) == ([2], [(1, "a bug")])
    assert "A record could not be written" in caplog.messages


def test_the_end_gives_up_what_a_disk_holds(bench: Bench) -> None:
    bench.hang()
    bench.put(1, 2)
    assert bench.writer.end() == 3
    bench.put(3)
    assert (bench.writer.end(), bench.lost.total, bench.writer.records) == (0, 1, 0)
    bench.disk.works.set()
    bench.writer.stop()
    # The operating system had the first one already.
    assert bench.disk.records == [0]
    assert bench.writer.records == 0
