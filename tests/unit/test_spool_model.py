"""The spool against a model of lists: in any order of operations, no record is duplicated or uncounted."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.recording.record import read_records
from service.recording.spool import SEGMENT_RECORDS, Segment, Spool, spool_files
from tests.fakes.clock import FakeClock
from tests.unit.recording import lines, number_of

MAX_RECORDS = 350
LINE_BYTES = len(lines(1_000))
MAX_AGE_S = 100.0


@dataclass
class File:
    """The expected content of a file."""

    began_s: float
    numbers: list[int] = field(default_factory=list)
    spooled: set[int] = field(default_factory=set)


class SpoolMachine(RuleBasedStateMachine):
    """Every operation of the spool, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        self.lost = self.should_be_lost = 0
        folder = Path(self._folder.name, "spool")
        self.spool = Spool(folder, MAX_RECORDS * LINE_BYTES, self._lose, self.clock)
        self.next = 1_000
        self.sealed: list[File] = []
        self.open: list[File] = []
        self.taken: list[tuple[Segment, File]] = []

    def _lose(self, count: int, _reason: str) -> None:
        self.lost += count

    @property
    def files(self) -> list[File]:
        """The files expected on disk."""
        return [*self.sealed, *self.open, *(known for _segment, known in self.taken)]

    def seal(self) -> None:
        self.sealed += self.open
        self.open = []

    def give_up_oldest(self) -> None:
        self.should_be_lost += len(self.sealed.pop(0).numbers)

    @rule(count=st.integers(1, SEGMENT_RECORDS + 20), spooled=st.booleans())
    def append(self, count: int, *, spooled: bool) -> None:
        for number in range(self.next, self.next + count):
            there = sum(len(file.numbers) for file in self.files)
            while there + 1 > MAX_RECORDS and (self.sealed or self.open):
                if not self.sealed:
                    self.seal()
                there -= len(self.sealed[0].numbers)
                self.give_up_oldest()
            self.open = self.open or [File(self.clock())]
            self.open[0].numbers.append(number)
            self.open[0].spooled |= {number} if spooled else set()
            full = len(self.open[0].numbers) == SEGMENT_RECORDS
            if full:
                self.seal()
            assert self.spool.append(lines(number), spooled=spooled) == full
        self.next += count

    @rule()
    def take(self) -> None:
        if not self.sealed:
            self.seal()
        segment = self.spool.take()
        assert (segment is None) == (not self.sealed)
        if segment is not None:
            known = self.sealed.pop(0)
            assert [number_of(record) for record in read_records(segment.path)[0]] == known.numbers
            assert (segment.records, segment.spooled) == (len(known.numbers), len(known.spooled))
            self.taken.append((segment, known))

    @precondition(lambda self: self.taken)
    @rule()
    def done(self) -> None:
        segment, _known = self.taken.pop()
        self.spool.done(segment)

    @precondition(lambda self: self.taken)
    @rule(last=st.booleans())
    def put_back(self, *, last: bool) -> None:
        segment, known = self.taken.pop()
        self.spool.put_back(segment, last=last)
        if last:
            self.seal()
        self.sealed.insert(len(self.sealed) if last else 0, known)

    @rule(seconds=st.integers(1, 80))
    def expire(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.spool.expire(MAX_AGE_S)
        while self.sealed and self.clock() - self.sealed[0].began_s > MAX_AGE_S:
            self.give_up_oldest()

    @rule()
    def count(self) -> None:
        counted = [*self.sealed, *self.open]
        new = sum(len(file.numbers) - len(file.spooled) for file in counted)
        assert self.spool.count_spooled() == new
        for file in counted:
            file.spooled = set(file.numbers)

    @rule()
    def sync(self) -> None:
        self.spool.sync()

    @invariant()
    def disk_and_counts_are_as_they_should_be(self) -> None:
        paths = spool_files(self.spool.folder, self.spool.name)
        on_disk = [number_of(record) for path in paths for record in read_records(path)[0]]
        assert sorted(on_disk) == sorted(number for file in self.files for number in file.numbers)
        assert self.lost == self.should_be_lost
        assert self.spool.files == len(self.sealed) + len(self.open)
        kept = sum(len(known.numbers) for _segment, known in self.taken)
        assert len(on_disk) <= MAX_RECORDS or kept >= MAX_RECORDS

    def teardown(self) -> None:
        self.spool.close()
        self._folder.cleanup()


TestSpool = SpoolMachine.TestCase
TestSpool.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
