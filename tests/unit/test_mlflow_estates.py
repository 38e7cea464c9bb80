"""What dead processes left, on its way to MLflow: records, runs, counts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.recording.delivery import Delivery, Replayed
from service.recording.mlflow import TrackerError
from service.recording.run import ProcessRun
from service.recording.spool import lock_path, run_file
from tests.unit.recording import (
    FakeTracker,
    KeptCounts,
    KeptRun,
    Lost,
    killed_owner,
    lines,
    no_spans,
    number_of,
)
from tests.unit.resilience import Readable, readable

NAMES = [f"20260101T00000{number}-{number}-00000{number}" for number in range(5)]
MAX_AGE_S = 3_600.0


@pytest.fixture
def metrics() -> Iterator[Readable]:
    with readable() as found:
        yield found


class Heir:
    """A delivery, and the folder in which the dead have left something."""

    def __init__(self, metrics: Readable, folder: Path, tracker: FakeTracker | None = None) -> None:
        self.metrics = metrics
        self.folder = folder
        self.tracker = tracker or FakeTracker()
        self.lost = Lost()
        self.records = KeptCounts(metrics.instruments, self.lost)
        self.delivery = Delivery(self.tracker, no_spans(), self.records)

    def leave(self, name: str, *files: bytes, run: ProcessRun | None = None) -> None:
        """What a process of this name left when it was killed."""
        lock_path(self.folder, name).touch()
        for number, content in enumerate(files):
            (self.folder / f"{name}.{number:06d}.jsonl").write_bytes(content)
        if run is not None:
            run.save(run_file(self.folder, name))

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
        """Whose files are there still."""
        return {path.name.split(".")[0] for path in self.folder.iterdir()}


@pytest.fixture
def heir(metrics: Readable, tmp_path: Path) -> Heir:
    return Heir(metrics, tmp_path)


def test_a_killed_processs_records_go_to_its_run_which_has_failed(heir: Heir) -> None:
    name = killed_owner(heir.folder, 1, 2, 3)
    assert heir.send() == Replayed(records=3)
    assert sorted(heir.tracker.kept) == [1, 2, 3]
    assert heir.run_of(name).status == "FAILED"
    assert (heir.left, heir.replayed, heir.lost.said) == (set(), 3, [])
    # They are none of the heir's own.
    assert heir.records.total_settled == 0


def test_a_process_that_said_its_end_has_finished(heir: Heir) -> None:
    run = ProcessRun(NAMES[0], 1_000, {"version": "1"}, totals={"calls": 2.0})
    run.status, run.ended_ms = "FINISHED", 2_000
    heir.leave(NAMES[0], lines(1), run=run)
    heir.send()
    assert heir.run_of(NAMES[0]) == KeptRun(
        NAMES[0], 1_000, {"version": "1"}, {"calls": 2.0}, "FINISHED", 2_000
    )


def test_a_run_without_records_is_ended_too(heir: Heir) -> None:
    heir.leave(NAMES[0], run=ProcessRun(NAMES[0], 1_000))
    assert heir.send() == Replayed()
    assert heir.run_of(NAMES[0]).status == "FAILED"
    assert heir.left == set()


def test_a_run_that_the_server_has_is_gone_on_with(heir: Heir) -> None:
    made = heir.tracker.start_run(NAMES[0], 1_000)
    run = ProcessRun(NAMES[0], 1_000, run_id=made.run_id, experiment_id=made.experiment_id, described=True)
    heir.leave(NAMES[0], lines(1), run=run)
    heir.send()
    assert heir.tracker.kept == {1: made.run_id}
    assert [run.name for run in heir.tracker.runs.values()] == [NAMES[0]]


def test_a_run_is_made_once_though_the_answer_was_lost_and_the_heir_too(
    heir: Heir, metrics: Readable
) -> None:
    heir.leave(NAMES[0], lines(1), run=ProcessRun(NAMES[0], 1_000))
    heir.tracker.answers_lost = 1
    with pytest.raises(TrackerError, match="Timeout"):
        heir.send()
    other = Heir(metrics, heir.folder, heir.tracker)
    assert other.send() == Replayed(records=1)
    assert len(heir.tracker.runs) == 1


def test_a_run_that_was_made_is_written_down_before_its_records_are_sent(heir: Heir) -> None:
    heir.leave(NAMES[0], lines(1), run=ProcessRun(NAMES[0], 1_000))

    def fail() -> None:
        heir.tracker.error = TrackerError("Timeout")

    heir.tracker.on_send = fail
    with pytest.raises(TrackerError):
        heir.send()
    written = ProcessRun.load(run_file(heir.folder, NAMES[0]), NAMES[0], 0)
    assert written.run_id == next(iter(heir.tracker.runs))


def test_a_run_that_somebody_deleted_is_made_anew(heir: Heir) -> None:
    run = ProcessRun(NAMES[0], 1_000, run_id="deleted", experiment_id="1", described=True)
    heir.leave(NAMES[0], lines(1), run=run)
    heir.leave(NAMES[1], lines(2))
    assert heir.send() == Replayed(records=2)
    assert heir.left == set()
    assert {run.name: run.status for run in heir.tracker.runs.values()} == {
        NAMES[0]: "FAILED",
        NAMES[1]: "FAILED",
    }


def test_when_it_ended_is_when_it_last_wrote_however_often_an_heir_tries(heir: Heir) -> None:
    heir.leave(NAMES[0], lines(1), run=ProcessRun(NAMES[0], 1_000))
    last_ms = max(int(path.stat().st_mtime * 1_000) for path in heir.folder.glob("*.jso*"))

    def fail() -> None:
        heir.tracker.error = TrackerError("Timeout")

    heir.tracker.on_send = fail
    with pytest.raises(TrackerError):
        heir.send()
    heir.tracker.error, heir.tracker.on_send = None, lambda: None
    heir.send()
    assert heir.run_of(NAMES[0]).ended_ms == last_ms


def test_what_was_sent_is_gone_when_the_next_fails(heir: Heir, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    heir.leave(NAMES[0], lines(1), lines(2), lines(3))

    def fail_at_the_second() -> None:
        if len(heir.tracker.exports) == 2:
            heir.tracker.error = TrackerError("Timeout")

    heir.tracker.on_send = fail_at_the_second
    with pytest.raises(TrackerError):
        heir.send()
    files = [path.name.split(".")[1] for path in sorted(heir.folder.glob("*.jsonl"))]
    assert files == ["000001", "000002"]
    assert caplog.messages == ["MLflow has 1 record(s) that had to wait"]
    heir.tracker.error = None
    assert heir.send() == Replayed(records=2)
    assert heir.tracker.exports == [[1], [2], [2], [3]]
    assert heir.replayed == 3


def test_garbled_lines_are_lost_and_torn_ones_were_never_answered(heir: Heir) -> None:
    heir.leave(NAMES[0], lines(1) + b"garbled\n" + lines(2) + lines(3)[:-9])
    assert heir.send() == Replayed(records=2)
    assert heir.lost.said == [(1, "refused or unreadable")]


def test_poison_is_lost_and_the_rest_is_sent(heir: Heir) -> None:
    heir.leave(NAMES[0], lines(1, 2, 3))
    heir.tracker.refuses = lambda record: number_of(record) == 2
    assert heir.send() == Replayed(records=2)
    assert (sorted(heir.tracker.kept), heir.lost.total, heir.left) == ([1, 3], 1, set())


def test_what_is_refused_for_everybody_stays_and_its_run_goes_on(heir: Heir) -> None:
    heir.leave(NAMES[0], lines(1), lines(2))
    heir.tracker.refuses = lambda _record: True
    assert heir.send() == Replayed(files_kept=2)
    assert (heir.lost.said, heir.left) == ([], {NAMES[0]})
    assert heir.run_of(NAMES[0]).status == "RUNNING"
    heir.tracker.refuses = lambda _record: False
    assert heir.send() == Replayed(records=2)
    assert (heir.run_of(NAMES[0]).status, heir.left) == ("FAILED", set())


def test_what_cannot_be_read_now_stays(heir: Heir) -> None:
    heir.leave(NAMES[0], lines(1))
    (heir.folder / f"{NAMES[0]}.000001.jsonl").mkdir()
    assert heir.send() == Replayed(records=1, files_kept=1)
    assert heir.lost.said == []


def test_what_is_too_old_is_lost_whether_mlflow_is_there_or_not(heir: Heir) -> None:
    heir.leave(NAMES[0], lines(1, 2), lines(3))
    heir.tracker.error = TrackerError("Timeout")
    heir.delivery.expire_orphaned(heir.folder, MAX_AGE_S)
    assert heir.lost.said == []
    heir.delivery.expire_orphaned(heir.folder, -1)
    assert heir.lost.said == [(3, "too old")]
    heir.tracker.error = None
    assert heir.delivery.send_orphaned(heir.folder, -1) == Replayed()
    assert (heir.tracker.kept, heir.left) == ({}, set())


def test_no_folder_is_nothing_to_do(heir: Heir) -> None:
    assert heir.delivery.send_orphaned(heir.folder / "nowhere", MAX_AGE_S) == Replayed()
