"""An MLflow that fails in every way, and a disk that does: callers notice nothing, and losses are counted."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.e2e.recording import (
    Load,
    assert_each_once,
    ids_in_spool,
    in_spool,
    left_in,
    show,
    until,
    variables,
)
from tests.e2e.support import generate, stopped, to_collector
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

LIMITED = """
import os, resource, sys
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(writing)
    os.dup2(reading, 0)
    os.execvp("cat", ["cat"])
os.close(reading)
os.dup2(writing, 1)
os.dup2(writing, 2)
os.close(writing)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
without_coverage = {name: os.environ[name] for name in os.environ if not name.startswith("COVERAGE")}
os.execve(sys.executable, [sys.executable, "-B", "-m", "service"], without_coverage)
"""
"""The service with files of no bytes at all, but for its lines, which another process writes down."""

Break = Callable[[FakeMlflow], None]


def set_status(status: int) -> Break:
    return lambda fake: setattr(fake, "answer_status", status)


def mend(fake: FakeMlflow) -> None:
    fake.hang, fake.answer_status, fake.wrong_body, fake.delay_s = False, 200, False, 0.0
    fake.down()
    fake.up()


BREAKS: dict[str, Break] = {
    "dead": FakeMlflow.down,
    "frozen": lambda fake: setattr(fake, "hang", True),
    "too slow": lambda fake: setattr(fake, "delay_s", 3.0),
    "wrong": lambda fake: setattr(fake, "wrong_body", True),
    **{f"status {status}": set_status(status) for status in (403, 422, 500)},
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_mlflow_does_not_take_waits_on_disk_until_it_does(
    upstream: FakeUpstream, receiver: OtlpReceiver, mlflow: FakeMlflow, tmp_path: Path, name: str
) -> None:
    spool = tmp_path / "spool"
    given = {**variables(upstream.url, mlflow.url, spool), **to_collector(receiver)}
    with ServiceProcess(given) as process:
        process.wait_ready()
        load = Load(process, threads=2)
        with load.running():
            load.wait_for(100)
            mlflow.wait_for(lambda fake: bool(fake.kept))
            BREAKS[name](mlflow)
            until(lambda: "MLflow does not take records" in process.text(), "the failure to be seen")
            load.wait_for(150)
            mend(mlflow)
            load.wait_for(50)
        until(lambda: "record(s) that had to wait" in process.text(), "the wait to end")
        until(lambda: load.answered <= mlflow.request_ids, "MLflow to have all")
        lines = stopped(process)

    assert load.statuses == {200}
    assert not load.unanswered
    assert_each_once(mlflow, load)
    spooled = receiver.value("llmops.recorder.spooled")
    assert spooled is not None
    assert spooled >= 150
    assert receiver.value("llmops.recorder.replayed") == spooled
    assert receiver.value("llmops.recorder.lost") == 0
    assert receiver.value("llmops.recorder.queue") == 0
    events = [line for line in lines if str(line.get("event", "")).startswith("llmops.recorder.")]
    assert [line["event"] for line in events][:2] == ["llmops.recorder.spooled", "llmops.recorder.replayed"]
    assert sum(line["records"] for line in events if line["event"].endswith("replayed")) == spooled
    assert not [line for line in lines if line["level"] == "ERROR"]
    assert [run.status for run in mlflow.runs] == ["FINISHED"]
    assert left_in(spool) == []


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 64 KiB at this place; whether the machine lets us have one."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = subprocess.run(options, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def recording_on_a_full_disk(given: dict[str, str], tmp_path: Path) -> Iterator[ServiceProcess]:
    """A service whose spool takes a few records and then no more."""
    with small_disk(tmp_path / "disk") as mounted:
        arguments = ("-m", "service") if mounted else ("-c", LIMITED)
        with ServiceProcess({**given, "MLFLOW_TIMEOUT_S": "10"}, arguments=arguments) as process:
            yield process.wait_ready()


@contextmanager
def recording_on_no_disk(given: dict[str, str], tmp_path: Path) -> Iterator[ServiceProcess]:
    """A service that may make files, and write nothing into them."""
    tmp_path.joinpath("disk").mkdir()
    # It would not start with a database that cannot be written to.
    variables = {**given, "MLFLOW_TIMEOUT_S": "10", "DATABASE_URL": "sqlite://"}
    with ServiceProcess(variables, arguments=("-c", LIMITED)) as process:
        yield process.wait_ready()


FullDisk = Callable[[dict[str, str], Path], AbstractContextManager[ServiceProcess]]


def test_on_a_full_disk_records_wait_in_memory(
    upstream: FakeUpstream, receiver: OtlpReceiver, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    spool = tmp_path / "disk/spool"
    given = {**variables(upstream.url, mlflow.url, spool), **to_collector(receiver)}
    mlflow.down()
    with recording_on_a_full_disk(given, tmp_path) as process:
        load = Load(process, threads=4)
        with load.running():
            load.wait_for(400)
        on_disk = ids_in_spool(spool)
        assert on_disk < load.answered
        mlflow.up()
        until(lambda: load.answered <= mlflow.request_ids, "MLflow to have all")
        stopped(process)
    assert load.statuses == {200}
    assert_each_once(mlflow, load)
    assert mlflow.repeats == 0
    assert receiver.value("llmops.recorder.lost") == 0


@pytest.mark.parametrize("full", [recording_on_a_full_disk, recording_on_no_disk])
def test_a_full_disk_and_a_dead_mlflow_to_the_end_lose_an_exact_number(
    upstream: FakeUpstream, receiver: OtlpReceiver, mlflow: FakeMlflow, tmp_path: Path, full: FullDisk
) -> None:
    spool = tmp_path / "disk/spool"
    given = {**variables(upstream.url, mlflow.url, spool), **to_collector(receiver)}
    mlflow.down()
    with full(given, tmp_path) as process:
        load = Load(process, threads=4)
        with load.running():
            load.wait_for(300)
        assert process.stop() == 0
        until(lambda: "Graceful shutdown completed" in process.text(), "the last line")
        lines = process.lines()
        on_disk = ids_in_spool(spool)
    assert load.statuses == {200}
    assert on_disk < load.answered
    lost = len(load.answered) - len(on_disk)
    show({"answered": len(load.answered), "on disk": len(on_disk), "lost": lost})
    assert receiver.value("llmops.recorder.lost") == lost
    said = [line for line in lines if line["message"] == "Records of calls are lost"]
    assert [line["records"] for line in said] == [lost]


def test_full_memory_loses_an_exact_number(
    upstream: FakeUpstream, receiver: OtlpReceiver, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    given = {
        **variables(upstream.url, mlflow.url, tmp_path / "disk/spool"),
        **to_collector(receiver),
        "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY",
    }
    mlflow.down()
    with recording_on_no_disk(given, tmp_path) as process:
        load = Load(process, threads=4, prompt=64_000 * "p")
        with load.running():
            load.wait_for(400)
        receiver.wait_for(lambda it: (it.value("llmops.recorder.lost") or 0) > 0, timeout_s=30)
        assert not in_spool(tmp_path / "disk/spool")
        mlflow.up()
        receiver.wait_for(lambda it: it.value("llmops.recorder.queue") == 0, timeout_s=60)
        assert process.stop() == 0
        until(lambda: "Graceful shutdown completed" in process.text(), "the last line")
        lines = process.lines()
    assert load.statuses == {200}
    assert mlflow.request_ids < load.answered
    lost = len(load.answered) - len(mlflow.kept)
    show({"answered": len(load.answered), "in MLflow": len(mlflow.kept), "lost": lost})
    assert receiver.value("llmops.recorder.lost") == lost
    said = [line["records"] for line in lines if line["message"] == "Records of calls are lost"]
    assert sum(said) == lost
    assert len(said) <= 2, "one line a minute, and one at the end"


def nothing(_fake: FakeMlflow) -> None:
    """An MLflow that takes everything."""


@pytest.mark.parametrize(
    ("end", "lost"),
    [(nothing, 0), (BREAKS["dead"], 10), (BREAKS["frozen"], 10)],
    ids=["up", "dead", "frozen"],
)
def test_a_folder_that_cannot_be_written(  # noqa: PLR0913, PLR0917 - fixtures
    upstream: FakeUpstream, receiver: OtlpReceiver, mlflow: FakeMlflow, tmp_path: Path, end: Break, lost: int
) -> None:
    tmp_path.joinpath("file").write_text("no folder")
    given = {
        **variables(upstream.url, mlflow.url, tmp_path / "file/spool"),
        **to_collector(receiver),
        "MLFLOW_TIMEOUT_S": "5",
    }
    if lost:
        # Too little time to find out that a frozen server does not answer.
        given["SHUTDOWN_TIMEOUT_S"] = "0.5"
    end(mlflow)
    with ServiceProcess(given) as process:
        process.wait_ready()
        token = process.token()
        answers = [generate(process, token) for _ in range(10)]
        lines = stopped(process)
    assert {answer.status for answer in answers} == {200}
    assert mlflow.request_ids == (set() if lost else {answer.request_id for answer in answers})
    assert receiver.value("llmops.recorder.lost") == lost
    said = [line["records"] for line in lines if line["message"] == "Records of calls are lost"]
    assert said == ([lost] if lost else [])
    assert "The spool cannot be used: records wait in memory" in {line["message"] for line in lines}
    assert [run.status for run in mlflow.runs] == ([] if lost else ["FINISHED"])
