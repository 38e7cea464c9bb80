"""Orphaned spools: which they are, who owns them, and how their records reach MLflow."""

import json
from pathlib import Path
from typing import cast

import pytest

from service.recording.delivery import Delivery, Replayed
from service.recording.mlflow import NoTracker, TrackerError
from service.recording.record import read_records
from service.recording.run import ProcessRun
from service.recording.spool import OrphanedSpool, lock_path, orphaned_spools, run_file
from tests.fakes.ledger import FakeLedger
from tests.unit.recording import (
    OWNER_OF_ONE,
    FakeTracker,
    KeptCounts,
    KeptRun,
    Lost,
    lines,
    make_record,
    no_spans,
    number_of,
    python,
)
from tests.unit.resilience import Readable

NAMES = [f"20260101T00000{number}-{number}-00000{number}" for number in range(5)]
MAX_AGE_S = 3_600.0


def leave(folder: Path, name: str, *files: bytes, run: ProcessRun | None = None) -> None:
    """Write what a process of this name leaves when it is killed."""
    lock_path(folder, name).touch()
    for number, content in enumerate(files):
        (folder / f"{name}.{number:06d}.jsonl").write_bytes(content)
    if run is not None:
        run.save(run_file(folder, name))


def numbers_of(spool: OrphanedSpool) -> list[int]:
    return [number_of(record) for path in spool.segments for record in read_records(path)[0]]


def test_a_killed_process_leaves_an_orphaned_spool_and_a_living_one_does_not(tmp_path: Path) -> None:
    line = make_record(1).as_line().decode().strip()
    with python(OWNER_OF_ONE, str(tmp_path), line) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert list(orphaned_spools(tmp_path)) == []
        assert lock_path(tmp_path, name).exists()
        owner.kill()
        owner.wait()
        found = [(spool.name, numbers_of(spool)) for spool in orphaned_spools(tmp_path)]
    assert found == [(name, [1])]


def test_orphaned_spools_come_oldest_first_and_their_files_in_order(tmp_path: Path) -> None:
    for name in (NAMES[2], NAMES[0], NAMES[1]):
        leave(tmp_path, name, lines(1))
    (tmp_path / f"{NAMES[0]}.000001.jsonl").write_bytes(lines(2))
    assert [(spool.name, numbers_of(spool)) for spool in orphaned_spools(tmp_path)] == [
        (NAMES[0], [1, 2]),
        (NAMES[1], [1]),
        (NAMES[2], [1]),
    ]


def test_foreign_files_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "20260101.jsonl").write_bytes(lines(1))
    (tmp_path / f"x{NAMES[0]}.000000.jsonl").write_bytes(lines(1))
    assert list(orphaned_spools(tmp_path)) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_a_process_that_comes_late_finds_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    leave(tmp_path, NAMES[0], lines(1))
    leave(tmp_path, NAMES[1], lines(2))
    slow = orphaned_spools(tmp_path)
    assert next(slow).name == NAMES[0]
    for spool in orphaned_spools(tmp_path):
        assert spool.name == NAMES[1]
        spool.clear()
    # It has the name from before, and nothing is there under it any more.
    assert list(slow) == []
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {NAMES[0]}


TAKER = """
    import json, sys
    from pathlib import Path
    from service.recording.record import read_records
    from service.recording.spool import orphaned_spools

    print("ready", flush=True)
    sys.stdin.readline()
    found = []
    for _round in range(20):
        for spool in orphaned_spools(Path(sys.argv[1])):
            for path in spool.segments:
                found += [int(record.trace_id, 16) for record in read_records(path)[0]]
            spool.clear()
    print(json.dumps(found))
"""


def test_two_processes_at_once_take_each_record_once(tmp_path: Path) -> None:
    for number in range(200):
        leave(tmp_path, f"20260101T000000-{number}-{number:06x}", lines(number))
    expected = sorted(int(make_record(number).trace_id, 16) for number in range(200))
    with python(TAKER, str(tmp_path)) as one, python(TAKER, str(tmp_path)) as other:
        for sender in (one, other):
            assert sender.stdout is not None
            assert sender.stdout.readline() == "ready\n"
        found = []
        for sender in (one, other):
            assert sender.stdin is not None
            sender.stdin.write("go\n")
            sender.stdin.flush()
        for sender in (one, other):
            assert sender.stdout is not None
            found.append(json.loads(sender.stdout.read()))
    assert sorted(found[0] + found[1]) == expected
    assert list(tmp_path.iterdir()) == []


class Sender:
    """A delivery, and the folder with the orphaned spools."""

    def __init__(self, metrics: Readable, folder: Path, tracker: FakeTracker | None = None) -> None:
        self.metrics = metrics
        self.folder = folder
        self.tracker = tracker or FakeTracker()
        self.ledger = FakeLedger()
        self.lost = Lost()
        self.records = KeptCounts(metrics.instruments, self.lost)
        self.delivery = Delivery(self.tracker, no_spans(), self.records, self.ledger)

    def send(self) -> Replayed:
        return self.delivery.send_orphaned(self.folder, MAX_AGE_S)

    def run_of(self, name: str) -> KeptRun:
        (found,) = [run for run in self.tracker.runs.values() if run.name == name]
        return found

    @property
    def replayed(self) -> float:
        return self.metrics.value("llmops.recorder.replayed")

    @property
    def left(self) -> set[str]:
        """The names of the spools that are left."""
        return {path.name.split(".")[0] for path in self.folder.iterdir()}


@pytest.fixture
def sender(metrics: Readable, tmp_path: Path) -> Sender:
    return Sender(metrics, tmp_path)


def test_a_run_without_records_is_ended(sender: Sender) -> None:
    leave(sender.folder, NAMES[0], run=ProcessRun(NAMES[0], 1_000))
    assert sender.send() == Replayed()
    assert sender.run_of(NAMES[0]).status == "FAILED"
    assert sender.left == set()


def test_a_failed_replay_saves_the_run_and_keeps_the_time_at_which_the_process_ended(sender: Sender) -> None:
    leave(sender.folder, NAMES[0], lines(1), run=ProcessRun(NAMES[0], 1_000))
    last_ms = max(int(path.stat().st_mtime * 1_000) for path in sender.folder.glob("*.jso*"))

    def fail() -> None:
        sender.tracker.error = TrackerError("Timeout")

    sender.tracker.on_send = fail
    with pytest.raises(TrackerError):
        sender.send()
    # Another process that goes on from here must not create a second run.
    saved = ProcessRun.load(run_file(sender.folder, NAMES[0]), NAMES[0], 0)
    assert saved.run_id == next(iter(sender.tracker.runs))
    sender.tracker.error, sender.tracker.on_send = None, lambda: None
    sender.send()
    assert sender.run_of(NAMES[0]).ended_ms == last_ms


def test_a_deleted_run_is_replaced_by_a_new_one(sender: Sender) -> None:
    run = ProcessRun(NAMES[0], 1_000, {"version": "1"}, "deleted", "1", described=True)
    leave(sender.folder, NAMES[0], lines(1), run=run)
    leave(sender.folder, NAMES[1], lines(2))
    assert sender.send() == Replayed(records=2)
    assert sender.left == set()
    assert sender.run_of(NAMES[0]).params == {"version": "1"}
    assert {run.name: run.status for run in sender.tracker.runs.values()} == {
        NAMES[0]: "FAILED",
        NAMES[1]: "FAILED",
    }


def test_files_that_were_sent_are_removed_when_the_next_one_fails(
    sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    leave(sender.folder, NAMES[0], lines(1), lines(2), lines(3))

    def fail_at_the_second() -> None:
        if len(sender.tracker.exports) == 2:
            sender.tracker.error = TrackerError("Timeout")

    sender.tracker.on_send = fail_at_the_second
    with pytest.raises(TrackerError):
        sender.send()
    files = [path.name.split(".")[1] for path in sorted(sender.folder.glob("*.jsonl"))]
    assert files == ["000001", "000002"]
    assert caplog.messages == ["MLflow has 1 record(s) that had to wait"]
    sender.tracker.error = None
    assert sender.send() == Replayed(records=2)
    assert sender.tracker.exports == [[1], [2], [2], [3]]
    assert sender.replayed == 3


def test_invalid_lines_are_lost_and_an_incomplete_last_line_is_not_counted(sender: Sender) -> None:
    leave(sender.folder, NAMES[0], lines(1) + b"invalid\n" + lines(2) + lines(3)[:-9])
    assert sender.send() == Replayed(records=2)
    assert sender.lost.said == [(1, "refused or unreadable")]
    # The queue of this process has nothing to do with it.
    assert sender.records.total_settled == 0


def test_files_stay_while_every_record_is_refused_or_a_file_cannot_be_read(sender: Sender) -> None:
    leave(sender.folder, NAMES[0], lines(1), lines(2))
    sender.tracker.refuses = lambda _record: True
    assert sender.send() == Replayed(files_kept=2)
    assert (sender.lost.said, sender.left) == ([], {NAMES[0]})
    sender.tracker.refuses = lambda _record: False
    (sender.folder / f"{NAMES[0]}.000002.jsonl").mkdir()
    assert sender.send() == Replayed(records=2, files_kept=1)
    assert (sender.lost.said, sender.run_of(NAMES[0]).status) == ([], "RUNNING")
    (sender.folder / f"{NAMES[0]}.000002.jsonl").rmdir()
    assert sender.send() == Replayed()
    assert (sender.run_of(NAMES[0]).status, sender.left) == ("FAILED", set())


def test_files_that_are_too_old_are_lost_whether_mlflow_works_or_not(sender: Sender) -> None:
    leave(sender.folder, NAMES[0], lines(1, 2), lines(3) + b"invalid\n")
    sender.tracker.error = TrackerError("Timeout")
    sender.delivery.expire_orphaned(sender.folder, MAX_AGE_S)
    assert sender.lost.said == []
    sender.delivery.expire_orphaned(sender.folder, -1)
    assert sender.lost.said == [(4, "too old")]
    sender.tracker.error = None
    assert sender.delivery.send_orphaned(sender.folder, -1) == Replayed()
    assert (sender.tracker.kept, sender.left) == ({}, set())


def test_a_file_stays_until_the_ledger_has_it(sender: Sender) -> None:
    leave(sender.folder, NAMES[0], lines(1), lines(2))
    sender.ledger.fails = True
    assert sender.send() == Replayed(files_unbooked=2)
    assert (sender.left, sender.tracker.exports) == ({NAMES[0]}, [])
    sender.ledger.fails = False
    assert sender.send() == Replayed(records=2)
    assert sender.left == set()
    assert sorted(map(number_of, sender.ledger.booked.values())) == [1, 2]


def test_the_ledger_does_not_wait_for_mlflow(sender: Sender) -> None:
    leave(sender.folder, NAMES[0], lines(1))
    leave(sender.folder, NAMES[1], lines(2), b"no record\n")
    sender.tracker.error = TrackerError("Timeout")
    sender.delivery.book_orphaned(sender.folder)
    assert sorted(map(number_of, sender.ledger.booked.values())) == [1, 2]
    assert sender.left == {NAMES[0], NAMES[1]}


def test_without_a_server_the_files_of_a_process_that_had_one_stay(metrics: Readable, tmp_path: Path) -> None:
    sender = Sender(metrics, tmp_path, cast("FakeTracker", NoTracker()))
    with_server = ProcessRun(NAMES[0], 1_000, {"mlflow_tracking_uri": "http://mlflow"})
    leave(tmp_path, NAMES[0], lines(1), run=with_server)
    leave(tmp_path, NAMES[1], lines(2), run=ProcessRun(NAMES[1], 1_000))
    assert sender.send() == Replayed(records=1, files_kept=1)
    assert sender.left == {NAMES[0]}
    assert [number_of(record) for record in sender.ledger.booked.values()] == [2]
    # The run is not named, so that a process with a server makes it there.
    assert ProcessRun.load(run_file(tmp_path, NAMES[0]), NAMES[0], 0).run_id is None
