"""The spool: files, bounds, order, counts, and who may write."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from service.recording.record import read_records
from service.recording.spool import SEGMENT_BYTES, SEGMENT_RECORDS, Spool, lock_path, spool_files, try_lock
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


def test_folder_and_files_are_this_users_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        opened = Opened(tmp_path / "spool")
        opened.write(1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700
    found = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "spool").iterdir()}
    assert found == {".lock": 0o600, ".jsonl": 0o600}


def test_a_record_is_in_its_file_when_append_is_back(opened: Opened) -> None:
    opened.write(1)
    (path,) = spool_files(opened.spool.folder, opened.spool.name)
    assert json.loads(path.read_bytes()) == json.loads(lines(1))
    opened.write(2)
    assert opened.on_disk == [1, 2]


def test_a_file_is_closed_at_so_many_records(opened: Opened) -> None:
    told = [opened.spool.append(lines(number), spooled=False) for number in range(SEGMENT_RECORDS + 1)]
    assert told == [False] * (SEGMENT_RECORDS - 1) + [True, False]
    assert [len(numbers) for numbers in opened.take_all()] == [SEGMENT_RECORDS, 1]


def test_a_file_is_closed_at_so_many_bytes(opened: Opened) -> None:
    half = make_record(1, answer="x" * (SEGMENT_BYTES // 2)).as_line()
    assert [opened.spool.append(half, spooled=False) for _ in range(3)] == [False, True, False]
    assert opened.spool.files == 2


def test_records_come_out_in_their_order_and_their_files_go(opened: Opened) -> None:
    opened.write(*range(250))
    assert [number for numbers in opened.take_all() for number in numbers] == list(range(250))
    assert spool_files(opened.spool.folder, opened.spool.name) == []
    assert opened.spool.take() is None
    opened.write(250)
    assert opened.take_all() == [[250]]


def test_beyond_the_bound_the_oldest_go_and_are_counted(tmp_path: Path) -> None:
    opened = Opened(tmp_path, max_bytes=LINE_BYTES * SEGMENT_RECORDS * 2)
    opened.write(*range(110, 310))
    assert opened.lost.said == []
    opened.write(310)
    assert opened.lost.said == [(SEGMENT_RECORDS, "the spool is full")]
    assert opened.on_disk == list(range(210, 311))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) <= LINE_BYTES * 200


def test_a_file_that_is_taken_is_not_given_up_but_counts(tmp_path: Path) -> None:
    opened = Opened(tmp_path, max_bytes=LINE_BYTES * 2)
    opened.write(10, 11)
    taken = opened.spool.take()
    assert taken is not None
    opened.write(12)
    assert opened.lost.total == 0
    opened.write(13)
    assert opened.lost.total == 1
    opened.spool.put_back(taken)
    assert opened.on_disk == [10, 11, 13]


def test_what_was_sent_makes_room(tmp_path: Path) -> None:
    opened = Opened(tmp_path, max_bytes=LINE_BYTES * 20)
    for first in range(100, 500, 20):
        opened.write(*range(first, first + 20))
        assert opened.take_all() == [list(range(first, first + 20))]
    assert opened.lost.said == []


def test_a_line_larger_than_the_bound_costs_no_other(tmp_path: Path) -> None:
    opened = Opened(tmp_path, max_bytes=LINE_BYTES * 2)
    opened.write(10)
    with pytest.raises(OSError, match="larger than the limit"):
        opened.spool.append(b"x" * (LINE_BYTES * 2 + 1), spooled=False)
    assert (opened.on_disk, opened.lost.said) == ([10], [])


def test_what_is_too_old_goes_and_is_counted(opened: Opened) -> None:
    opened.write(*range(SEGMENT_RECORDS))
    opened.clock.advance(50)
    opened.write(*range(SEGMENT_RECORDS, 2 * SEGMENT_RECORDS))
    opened.clock.advance(50)
    opened.spool.expire(100)
    assert opened.lost.said == []
    opened.clock.advance(1)
    opened.spool.expire(100)
    assert opened.lost.said == [(SEGMENT_RECORDS, "too old")]
    assert opened.on_disk == list(range(SEGMENT_RECORDS, 2 * SEGMENT_RECORDS))


def test_a_file_that_is_put_back_comes_first_or_last(opened: Opened) -> None:
    opened.write(*range(2 * SEGMENT_RECORDS))
    first = opened.spool.take()
    assert first is not None
    opened.spool.put_back(first)
    again = opened.spool.take()
    assert again is first
    opened.spool.put_back(first, last=True)
    assert [numbers[0] for numbers in opened.take_all()] == [SEGMENT_RECORDS, 0]


def test_what_waits_is_counted_once(opened: Opened) -> None:
    opened.write(1, 2)
    opened.write(3, spooled=True)
    assert opened.spool.count_spooled() == 2
    assert opened.spool.count_spooled() == 0
    opened.write(4)
    opened.write(5, spooled=True)
    assert opened.spool.count_spooled() == 1
    segment = opened.spool.take()
    assert segment is not None
    assert (segment.records, segment.spooled) == (5, 5)


def test_after_the_end_nothing_is_written(opened: Opened) -> None:
    opened.write(1)
    opened.spool.close()
    with pytest.raises(OSError, match="closed"):
        opened.write(2)
    assert opened.on_disk == [1]


def test_an_empty_spool_leaves_nothing_behind(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    opened.write(1)
    opened.take_all()
    opened.spool.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_keeps_its_lock(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    opened.write(1)
    opened.spool.close()
    assert lock_path(tmp_path, opened.spool.name).exists()


def test_a_folder_that_cannot_be_had_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            Opened(folder)


def test_a_folder_that_is_gone_is_an_os_error_and_one_that_comes_back_is_used(tmp_path: Path) -> None:
    opened = Opened(tmp_path / "spool")
    (tmp_path / "spool").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        opened.write(1)
    (tmp_path / "away").rename(tmp_path / "spool")
    opened.write(2)
    assert opened.on_disk == [2]


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


def test_spools_in_one_folder_are_apart(tmp_path: Path) -> None:
    one, other = Opened(tmp_path), Opened(tmp_path)
    assert one.spool.name != other.spool.name
    one.write(1)
    other.write(2)
    assert (one.take_all(), other.take_all()) == ([[1]], [[2]])


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
