"""A disk under the spool that does not answer: calls and health checks go on, and losses are counted."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.recording import Load, left_in, until, variables
from tests.e2e.support import decoded, generate
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

SCRIPT = Path(__file__).with_name("hung_disk.py")
HANGS = "The disk of the spool does not answer: records wait in memory"
WORKS = "The disk of the spool answers again"
LOST = "Records of calls are lost"
PATIENCE_S = 5.0


class Disk:
    """The disk of a process that ``hung_disk.py`` runs."""

    def __init__(self, folder: Path) -> None:
        self.spool = folder / "spool"
        self._pipe = folder / "hangs"

    @property
    def variables(self) -> dict[str, str]:
        """What the process must know."""
        return {"SPOOL_PATH": str(self.spool), "HANG_PIPE": str(self._pipe)}

    def hang(self) -> None:
        """Answer nothing from now on."""
        os.mkfifo(self._pipe)

    def work(self) -> None:
        """Answer what is asked, and what waits."""
        # Opened for both, as opening for writing fails where nobody waits.
        released = os.open(self._pipe, os.O_RDWR)
        self._pipe.unlink()
        os.close(released)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Hang while the block runs."""
        self.hang()
        try:
            yield
        finally:
            self.work()


def given_for(upstream: FakeUpstream, mlflow: FakeMlflow, disk: Disk) -> dict[str, str]:
    return {**variables(upstream.url, mlflow.url, disk.spool), **disk.variables}


def count(process: ServiceProcess, message: str) -> int:
    return [line["message"] for line in process.lines()].count(message)


def test_calls_and_health_checks_go_on_and_every_record_arrives(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    disk = Disk(tmp_path)
    with ServiceProcess(given_for(upstream, mlflow, disk), (str(SCRIPT),)) as process:
        token = process.wait_ready().token()
        first = generate(process, token)
        mlflow.wait_for(lambda fake: first.request_id in fake.request_ids)
        load = Load(process)
        with disk.hanging():
            with load.running(), ThreadPoolExecutor(2) as pool:
                for _round in range(5):
                    load.wait_for(40)
                    health = [pool.submit(process.call, "GET", "/health", timeout_s=PATIENCE_S) for _ in "12"]
                    assert [each.result().status for each in health] == [200, 200]
            on_disk = [path for path in disk.spool.glob("*.jsonl") if path.stat().st_size]
            assert len(load.answered) >= 200
            assert not on_disk
            assert (count(process, HANGS), count(process, WORKS), count(process, LOST)) == (1, 0, 0)
        until(lambda: load.answered <= mlflow.request_ids, "MLflow to have all")
        until(lambda: count(process, WORKS) == 1, "the line")
        assert process.stop() == 0
        assert count(process, LOST) == 0
    assert load.statuses == {200}
    assert not load.unanswered
    assert len(mlflow.kept) == len(load.answered) + 1
    assert mlflow.runs[0].metrics["calls"] == len(mlflow.kept)
    assert left_in(disk.spool) == []


def test_a_stop_is_not_held_and_what_is_lost_is_counted(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    disk = Disk(tmp_path)
    limits = {"SHUTDOWN_TIMEOUT_S": "1"}
    with ServiceProcess({**given_for(upstream, mlflow, disk), **limits}, (str(SCRIPT),)) as process:
        token = process.wait_ready().token()
        first = generate(process, token)
        mlflow.wait_for(lambda fake: first.request_id in fake.request_ids)
        disk.hang()
        assert [generate(process, token, timeout_s=PATIENCE_S).status for _call in range(3)] == [200] * 3
        # The drain of 1 s, 1.5 s for all steps, 2.5 s for the telemetry, 0.5 s for the rest; and then some.
        assert process.stop(limit_s=3 * PATIENCE_S) == 0
        lines = decoded(process.text())
    (lost,) = [line for line in lines if line["message"] == LOST]
    assert (lost["level"], lost["records"]) == ("ERROR", 3)
    assert len([line for line in lines if line["message"].startswith("MLflow was not done")]) == 1
    assert [line for line in lines if line["message"].startswith("Graceful shutdown completed")]


def test_an_answer_ends_after_its_record_is_written(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    disk = Disk(tmp_path)
    mlflow.down()
    with ServiceProcess(given_for(upstream, mlflow, disk), (str(SCRIPT),)) as process:
        token = process.wait_ready().token()
        for number in range(1, 20):
            generate(process, token)
            written = b"".join(path.read_bytes() for path in disk.spool.glob("*.jsonl"))
            assert len([json.loads(line) for line in written.splitlines()]) == number
