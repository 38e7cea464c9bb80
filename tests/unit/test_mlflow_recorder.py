"""The recorder accepts every record, whatever the disk and MLflow do, and counts what becomes of it."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.recording.mlflow import TrackerError
from service.recording.record import read_records
from service.recording.recorder import Pace, Recorder
from service.recording.run import ProcessRun
from service.recording.spool import lock_path
from service.recording.writer import MEMORY_BYTES, MEMORY_RECORDS
from tests.fakes.clock import FakeClock
from tests.fakes.ledger import FakeLedger
from tests.harness import make_settings
from tests.unit.recording import FakeTracker, killed_owner, lines, make_record, number_of, silent_telemetry
from tests.unit.resilience import Readable, readable

LIMIT_S = 10.0


def until(condition: Callable[[], object], what: str, clock: FakeClock | None = None) -> None:
    """Wait until it holds, while a clock goes on."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.002)
        if clock is not None:
            clock.advance(0.1)


class Recording:
    """A recorder with a fast thread, and what can be observed of it."""

    def __init__(self, metrics: Readable, folder: Path, interval_s: float = 0.005, **settings: Any) -> None:
        self.metrics = metrics
        self.folder = folder
        self.tracker, self.ledger = FakeTracker(), FakeLedger()
        self.clock = FakeClock(1_000.0)
        self._started = self._finished = False
        self.recorder = Recorder(
            self.tracker,
            make_settings(spool_path=str(folder), **settings),
            silent_telemetry(metrics.instruments),
            self.ledger,
            Pace(interval_s, self.clock),
        )

    def start(self) -> None:
        self._started = True
        self.recorder.start()

    def record(self, *numbers: int, **changes: Any) -> None:
        for number in numbers:
            self.recorder.record(make_record(number, **changes))

    def finish(self, limit_s: float = LIMIT_S) -> None:
        async def finish() -> None:
            async with asyncio.timeout(limit_s):
                await self.recorder.finish()

        self._finished = True
        asyncio.run(finish())

    def close(self) -> None:
        """End the thread, whatever the test did."""
        self.tracker.hangs = False
        self.tracker.let_go.set()
        if self._started and not self._finished:
            self.finish()

    @property
    def on_disk(self) -> list[int]:
        paths = sorted(self.folder.glob("*.jsonl"))
        return [number_of(record) for path in paths for record in read_records(path)[0]]

    @property
    def kept(self) -> list[int]:
        return sorted(self.tracker.kept)

    def value(self, name: str) -> float:
        return self.metrics.value(f"llmops.recorder.{name}")

    @property
    def saved_run(self) -> ProcessRun:
        """The run as saved on disk."""
        (path,) = self.folder.glob("*.run.json")
        return ProcessRun(**json.loads(path.read_bytes()))


Make = Callable[..., Recording]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Recording] = []
    with readable() as metrics:

        def recording(folder: Path = tmp_path / "spool", **settings: Any) -> Recording:
            made.append(Recording(metrics, folder, **settings))
            return made[-1]

        yield recording
        for each in made:
            each.close()


def test_records_reach_mlflow_and_are_removed_from_the_disk(make: Make) -> None:
    recording = make()
    recording.start()
    recording.record(*range(250))
    until(lambda: recording.value("queue") == 0, "the queue to be empty")
    assert recording.kept == list(range(250))
    # A file is removed when the ledger has its records too.
    until(lambda: not list(recording.folder.glob("*.jsonl")), "the spool to be empty")
    assert {name: recording.value(name) for name in ("spooled", "replayed", "lost")} == {
        "spooled": 0,
        "replayed": 0,
        "lost": 0,
    }


def test_a_full_file_does_not_wait_for_the_interval(make: Make) -> None:
    recording = make(interval_s=3_600)
    recording.start()
    recording.record(*range(100))
    until(lambda: len(recording.kept) == 100, "the file to be sent")


def test_without_a_disk_records_wait_in_memory_and_are_sent_in_batches(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    recording = make(tmp_path / "file")
    assert caplog.messages == ["The spool cannot be used: records wait in memory"]
    recording.record(*range(250))
    assert recording.value("queue") == 250
    recording.start()
    until(lambda: recording.value("queue") == 0, "the queue to be empty")
    assert recording.kept == list(range(250))
    assert max(len(export) for export in recording.tracker.exports) == 100
    recording.finish()
    assert recording.value("lost") == 0
    assert [run.status for run in recording.tracker.runs.values()] == ["FINISHED"]


def test_records_in_memory_move_to_the_disk_when_it_works_again(make: Make) -> None:
    recording = make()
    recording.tracker.error = TrackerError("Timeout")
    away = recording.folder.with_name("away")
    recording.folder.rename(away)
    recording.record(1, 2)
    away.rename(recording.folder)
    recording.start()
    until(lambda: recording.on_disk == [1, 2], "the records to be on disk")
    assert recording.value("queue") == 2
    recording.tracker.error = None
    until(lambda: recording.kept == [1, 2], "the records to be sent", recording.clock)
    assert recording.value("lost") == 0


def test_memory_is_limited_in_records(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    recording = make(tmp_path / "file")
    recording.record(*range(MEMORY_RECORDS + 7))
    assert (recording.value("queue"), recording.value("lost")) == (MEMORY_RECORDS, 7)
    assert caplog.messages.count("Records of calls are lost") == 1


def test_memory_is_limited_in_bytes(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recording = make(tmp_path / "file")
    frame = len(make_record(answer="").as_line())
    large = {"answer": "x" * (MEMORY_BYTES // 4 - frame)}
    recording.record(0, 1, 2, 3, 4, **large)
    recording.record(5)
    assert (recording.value("queue"), recording.value("lost")) == (4, 2)
    recording.start()
    until(lambda: recording.value("queue") == 0, "memory to be empty")
    recording.record(6, **large)
    until(lambda: recording.kept == [0, 1, 2, 3, 6], "memory to have room again")


@pytest.mark.parametrize("invalid", [{"user": {1, 2}}, {"prompt_tokens": "many"}, {"cost": 10**5_000}])
def test_a_record_that_cannot_be_encoded_is_lost_and_raises_nothing(
    make: Make, caplog: pytest.LogCaptureFixture, invalid: dict[str, Any]
) -> None:
    recording = make()
    recording.tracker.error = TrackerError("Timeout")
    recording.start()
    recording.record(1, **invalid)
    recording.record(2)
    until(lambda: recording.on_disk == [2], "the other record to be on disk")
    assert (recording.value("queue"), recording.value("lost")) == (1, 1)
    assert "A record could not be taken" in caplog.messages


def test_records_after_the_end_are_lost(make: Make) -> None:
    recording = make()
    recording.start()
    recording.finish()
    recording.record(1, 2)
    assert (recording.value("lost"), recording.value("queue"), recording.on_disk) == (2, 0, [])


def test_the_end_leaves_a_finished_run_and_an_empty_folder(make: Make) -> None:
    recording = make()
    recording.start()
    recording.record(*range(3), cost=0.5)
    recording.finish()
    assert list(recording.folder.iterdir()) == []
    (run,) = recording.tracker.runs.values()
    assert (run.status, run.totals["calls"], run.totals["cost_usd"]) == ("FINISHED", 3, 1.5)
    assert run.ended_ms is not None
    assert run.params["version"]
    assert recording.kept == [0, 1, 2]


def test_records_in_memory_are_lost_once_when_mlflow_hangs_at_the_end(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recording = make(tmp_path / "file")
    recording.tracker.hangs = True
    recording.start()
    recording.record(1, 2, 3)
    recording.tracker.asked.wait(LIMIT_S)
    with pytest.raises(TimeoutError):
        recording.finish(limit_s=0.3)
    assert (recording.value("lost"), recording.value("queue")) == (3, 0)
    # Records that come later are lost, too, and the thread counts nothing again when it ends.
    recording.record(4)
    recording.tracker.error = TrackerError("Timeout")
    recording.tracker.let_go.set()
    until(lambda: "mlflow recorder" not in {thread.name for thread in threading.enumerate()}, "its end")
    assert recording.value("lost") == 4


def test_an_end_while_mlflow_hangs_is_saved_for_the_next_process(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    recording = make()
    recording.tracker.hangs = True
    recording.start()
    recording.record(1, 2)
    recording.tracker.asked.wait(LIMIT_S)
    with pytest.raises(TimeoutError):
        recording.finish(limit_s=0.3)
    assert (recording.saved_run.status, recording.saved_run.totals["calls"]) == ("FINISHED", 2)
    assert recording.on_disk == [1, 2]
    assert "MLflow was not done with in time; the next start goes on" in caplog.messages


def test_a_bug_does_not_end_the_thread(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    recording = make()
    recording.tracker.error = ValueError("a bug")
    recording.start()
    recording.record(1)
    until(lambda: "The recorder failed" in caplog.messages, "the failure")
    recording.tracker.error = None
    until(lambda: recording.kept == [1], "the record to be sent", recording.clock)


def test_a_deleted_run_is_replaced_by_a_new_one(make: Make) -> None:
    recording = make()
    recording.start()
    recording.record(1)
    until(lambda: recording.value("queue") == 0, "the record to be sent")
    recording.tracker.runs["run-0"] = recording.tracker.runs.pop("run-1")
    recording.tracker.runs["run-0"].name = "deleted"
    recording.record(2)
    until(lambda: "run-2" in recording.tracker.runs, "a new run", recording.clock)
    recording.record(3)
    until(lambda: recording.tracker.kept.get(3) == "run-2", "the next record to be there", recording.clock)


def test_mlflow_is_checked_after_a_failure_when_nothing_waits(make: Make) -> None:
    recording = make()
    recording.tracker.error = TrackerError("Timeout")
    recording.start()
    until(recording.tracker.asked.is_set, "the first question")
    recording.tracker.error = None
    until(lambda: recording.tracker.checks, "the question", recording.clock)
    recording.record(1)
    until(lambda: recording.kept == [1], "the record to be sent")
    assert recording.value("spooled") == 0


def test_totals_are_sent_every_ten_seconds(make: Make) -> None:
    recording = make()
    recording.record(1)
    recording.start()
    until(lambda: recording.tracker.runs and recording.tracker.runs["run-1"].totals, "the first totals")
    recording.record(2)
    until(lambda: recording.value("queue") == 0, "the record to be sent")
    assert recording.tracker.runs["run-1"].totals["calls"] == 1
    recording.clock.advance(10)
    until(lambda: recording.tracker.runs["run-1"].totals["calls"] == 2, "the next totals")
    # If the process is killed now, whoever replays its spool knows them, too.
    assert recording.saved_run.totals["calls"] == 2


def test_totals_are_sent_while_records_keep_arriving_in_memory(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recording = make(tmp_path / "file")
    coming = iter(range(1, 100_000))
    recording.tracker.on_send = lambda: recording.record(next(coming))
    recording.record(0)
    recording.start()
    until(lambda: recording.tracker.runs and recording.tracker.runs["run-1"].totals, "the totals")
    recording.tracker.on_send = lambda: None


def test_orphaned_spools_are_sent_at_the_start_and_every_thirty_seconds(make: Make) -> None:
    recording = make()
    killed_owner(recording.folder, 1, 2)
    recording.start()
    until(lambda: recording.kept == [1, 2], "the orphaned spool to be sent")
    killed_owner(recording.folder, 3)
    recording.clock.advance(30)
    until(lambda: recording.kept == [1, 2, 3], "the next one to be sent")
    # They are counted a moment after MLflow has them.
    until(lambda: (recording.value("replayed"), recording.value("queue")) == (3, 0), "the count")


def test_orphaned_spools_expire_while_mlflow_fails(make: Make) -> None:
    recording = make(spool_max_age_s=1)
    recording.tracker.error = TrackerError("Timeout")
    name = "20260101T000000-1-000001"
    (recording.folder / f"{name}.000000.jsonl").write_bytes(lines(1, 2))
    os.utime(recording.folder / f"{name}.000000.jsonl", (0, 0))
    recording.start()
    until(lambda: recording.value("lost") == 2, "the loss")


def test_the_run_is_saved_as_soon_as_the_server_has_it(make: Make) -> None:
    recording = make()
    name = recording.saved_run.name
    assert recording.saved_run.run_id is None
    recording.start()
    until(lambda: recording.saved_run.run_id == "run-1", "the run to be saved")
    assert recording.tracker.runs["run-1"].name == name


def test_the_ledger_has_what_a_killed_process_left_before_the_first_call(make: Make, tmp_path: Path) -> None:
    """Also while MLflow does not answer: budgets would be behind."""
    name = "20260101T000000-1-00000a"
    lock_path(tmp_path, name).touch()
    (tmp_path / f"{name}.000000.jsonl").write_bytes(make_record(7).as_line())
    made = make(tmp_path)
    made.tracker.hangs = True
    made.start()
    made.recorder.wait_caught_up()
    assert [number_of(record) for record in made.ledger.booked.values()] == [7]
    made.record(1)
    assert [number_of(record) for record in made.ledger.taken] == [1]
