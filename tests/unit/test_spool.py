"""The spool: files, bounds, order, counts, and who may write."""

import os
import threading
from pathlib import Path

import pytest

from service.recording.record import read_records
from service.recording.spool import SEGMENT_BYTES, SEGMENT_RECORDS, Spool, spool_files, try_lock
from tests.fakes.clock import FakeClock
from tests.unit.recording import Lost, lines, make_record, number_of

LINE_BYTES = len(lines(100))


class Opened:
    """A spool, and what it lost."""

    def __init__(self, folder: Path, max_bytes: int = 1_000_000) -> None:
        self.lost = Lost()
        self.clock = FakeClock()
        self.spool = Spool(folder, max_bytes, self.lost, self.clock)

    def write(self, *numbers: int, spooled: bool = False) -> None:
        """Append these records."""
        for number in numbers:
            self.spool.append(lines(number), spooled=spooled)

    @property
    def on_disk(self) -> list[int]:
        """The records in the files, in the order of the files."""
        paths = spool_files(self.spool.folder, self.spool.name)
        return [number_of(record) for path in paths for record in read_records(path)[0]]

    def take_all(self) -> list[list[int]]:
        """The records of each file, as they are taken."""
        taken = []
        while (segment := self.spool.take()) is not None:
            taken.append([number_of(record) for record in read_records(segment.path)[0]])
            self.spool.done(segment)
        return taken


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return Opened(tmp_path / "data" / "spool")


def test_a_file_is_closed_at_so_many_bytes(opened: Opened) -> None:
    half = make_record(1, answer="x" * (SEGMENT_BYTES // 2)).as_line()
    assert [opened.spool.append(half, spooled=False) for _ in range(3)] == [False, True, False]
    assert opened.spool.files == 2


def test_a_line_larger_than_the_bound_costs_no_other(tmp_path: Path) -> None:
    opened = Opened(tmp_path, max_bytes=LINE_BYTES * 2)
    opened.write(10)
    with pytest.raises(OSError, match="larger than the limit"):
        opened.spool.append(b"x" * (LINE_BYTES * 2 + 1), spooled=False)
    assert (opened.on_disk, opened.lost.said) == ([10], [])


def test_files_that_are_gone_disturb_nobody(opened: Opened) -> None:
    opened.write(*range(2 * SEGMENT_RECORDS + 1))
    for path in spool_files(opened.spool.folder, opened.spool.name):
        path.unlink()
    opened.spool.sync()
    segment = opened.spool.take()
    assert segment is not None
    opened.spool.done(segment)
    opened.clock.advance(1)
    opened.spool.expire(0)
    assert opened.lost.said == [(SEGMENT_RECORDS, "too old")]
    opened.spool.close()


def test_no_descriptor_stays_open(opened: Opened) -> None:
    before = open_descriptors()
    opened.write(*range(5 * SEGMENT_RECORDS))
    opened.spool.sync()
    opened.take_all()
    assert open_descriptors() == before
    opened.spool.close()
    assert open_descriptors() == before - 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path, *, replaced: bool) -> None:
    path = tmp_path / "name.lock"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    assert try_lock(descriptor, path)
    path.unlink()
    if replaced:
        path.touch()
    assert not try_lock(descriptor, path)
    os.close(descriptor)


def test_one_thread_writes_while_another_takes(opened: Opened) -> None:
    written = threading.Event()
    taken: list[int] = []

    def take() -> None:
        while not written.is_set() or opened.spool.files:
            for numbers in opened.take_all():
                taken.extend(numbers)
            opened.spool.count_spooled()
            opened.spool.sync()

    taker = threading.Thread(target=take)
    taker.start()
    opened.write(*range(2_000))
    written.set()
    taker.join()
    assert taken == list(range(2_000))
    assert opened.lost.said == []
