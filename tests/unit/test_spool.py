"""The spool: files, bounds, order, counts, and who may write."""

import json
import os
import threading
from pathlib import Path

import pytest

from service.recording.record import read_records
from service.recording.spool import SEGMENT_BYTES, SEGMENT_RECORDS, Spool, spool_files, try_lock
from tests.fakes.clock import FakeClock
from tests.unit.recording import Lost, lines, make_record, number_of, python

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


def test_a_file_is_limited_in_bytes(opened: Opened) -> None:
    half = make_record(1, answer="x" * (SEGMENT_BYTES // 2)).as_line()
    assert [opened.spool.append(half, spooled=False) for _ in range(3)] == [False, True, False]
    assert opened.spool.files == 2


def test_files_that_were_sent_make_room(tmp_path: Path) -> None:
    opened = Opened(tmp_path, max_bytes=LINE_BYTES * 20)
    for first in range(100, 500, 20):
        opened.write(*range(first, first + 20))
        assert opened.take_all() == [list(range(first, first + 20))]
    assert opened.lost.said == []


def test_a_line_larger_than_the_limit_drops_no_other(tmp_path: Path) -> None:
    opened = Opened(tmp_path, max_bytes=LINE_BYTES * 2)
    opened.write(10)
    with pytest.raises(OSError, match="larger than the limit"):
        opened.spool.append(b"x" * (LINE_BYTES * 2 + 1), spooled=False)
    assert (opened.on_disk, opened.lost.said) == ([10], [])


def test_files_that_something_else_removed_raise_no_error(opened: Opened) -> None:
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


def test_no_file_descriptor_leaks(opened: Opened) -> None:
    before = open_descriptors()
    opened.write(*range(5 * SEGMENT_RECORDS))
    opened.spool.sync()
    opened.take_all()
    assert open_descriptors() == before
    opened.spool.close()
    assert open_descriptors() == before - 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_whose_file_was_removed_is_not_held(tmp_path: Path, *, replaced: bool) -> None:
    path = tmp_path / "name.lock"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    assert try_lock(descriptor, path)
    path.unlink()
    if replaced:
        path.touch()
    assert not try_lock(descriptor, path)
    os.close(descriptor)


def test_one_thread_may_write_while_another_takes(opened: Opened) -> None:
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


WRITER = """
    import json, resource, sys
    from pathlib import Path
    from service.recording.record import CallRecord, read_records
    from service.recording.spool import Spool, spool_files
    from tests.unit.recording import lines, number_of

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    spool = Spool(Path(sys.argv[1]), 10_000_000, print)
    accepted = []
    for number in range(400):
        try:
            spool.append(lines(number), spooled=False)
        except OSError:
            continue
        accepted.append(number)
    paths = spool_files(spool.folder, spool.name)
    found = [read_records(path) for path in paths]
    complete = all(path.read_bytes().endswith(b"\\n") for path in paths)
    # Whatever writes at the end of the process, like the measurement of coverage, is not limited.
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    on_disk = [number_of(record) for records, _invalid in found for record in records]
    invalid = sum(invalid for _records, invalid in found)
    print(json.dumps([accepted, on_disk, invalid, complete]))
"""
"""A file may have 10,000 bytes, which are about 40 records and not a whole number of them."""


def test_no_partial_line_is_left_and_each_full_file_costs_one_record(tmp_path: Path) -> None:
    with python(WRITER, str(tmp_path)) as writer:
        assert writer.stdout is not None
        accepted, on_disk, invalid, complete = json.loads(writer.stdout.read())
    # Those refused were reported, and the others are on disk, each once and in complete lines.
    assert (on_disk, invalid, complete) == (accepted, 0, True)
    assert 0 < 400 - len(accepted) <= 400 // 30
