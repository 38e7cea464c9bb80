"""``python -m service replay``: what it does, and its exit status."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.recording.recorder import replay
from tests.fakes.ledger import FakeLedger
from tests.fakes.mlflow import FakeMlflow
from tests.harness import make_settings
from tests.unit.recording import killed_owner, make_record


@pytest.fixture
def mlflow() -> Iterator[FakeMlflow]:
    with FakeMlflow() as fake:
        yield fake


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The lines; ``configure_logging`` takes the root's handlers away, so one sits below it."""
    logger = logging.getLogger("service")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def run(url: str, folder: Path, ledger: FakeLedger | None = None) -> int:
    settings = make_settings(mlflow_tracking_uri=url, mlflow_timeout_s=1, spool_path=str(folder))
    return replay(settings, ledger or FakeLedger())


def test_an_empty_spool_is_success(mlflow: FakeMlflow, tmp_path: Path) -> None:
    assert run(mlflow.url, tmp_path / "nowhere") == 0


def test_refused_files_stay(mlflow: FakeMlflow, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    killed_owner(tmp_path, 1)
    mlflow.refuses = lambda _span: True
    assert run(mlflow.url, tmp_path) == 1
    assert said.messages[-1] == "Error: MLflow refused 1 file(s) of records, which stay in the spool"
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_files_that_the_ledger_does_not_take_stay(
    mlflow: FakeMlflow, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    killed_owner(tmp_path, 1)
    ledger = FakeLedger()
    ledger.fails = True
    assert run(mlflow.url, tmp_path, ledger) == 1
    assert said.messages[-1] == "Error: the database refused 1 file(s) of records, which stay in the spool"
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    ledger.fails = False
    assert run(mlflow.url, tmp_path, ledger) == 0
    assert len(ledger.booked) == 1


def test_a_refused_record_is_lost_and_the_others_are_sent(
    mlflow: FakeMlflow, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    killed_owner(tmp_path, 1, 2, 3)
    mlflow.refuses = lambda span: span.trace_id == make_record(1).trace_id
    assert run(mlflow.url, tmp_path) == 0
    assert mlflow.request_ids == {make_record(number).trace_id for number in (2, 3)}
    (loss,) = [vars(record) for record in said.records if record.msg == "Records of calls are lost"]
    assert (loss["records"], loss["reason"]) == (1, "refused or unreadable")


def test_the_address_is_required(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    assert run("", tmp_path) == 1
    assert set(said.messages) == {"Error: MLFLOW_TRACKING_URI must be set: it says where the records go."}


def test_a_spool_path_that_is_a_file_is_an_error(
    mlflow: FakeMlflow, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert run(mlflow.url, tmp_path / "file") == 1
    assert said.messages == ["Error: the spool cannot be worked on: Not a directory"]
