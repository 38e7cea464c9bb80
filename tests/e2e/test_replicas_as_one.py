"""A small `make replicas`: three real processes behind a balancer, which act as one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.identity.database import prepare_database
from tests.bench.balancer import BUILT_IN
from tests.bench.replicas import PROOFS, RECORDED, Records, Size, prove
from tests.fakes.mlflow import FakeMlflow
from tests.harness import make_settings

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(480)]

SMALL = Size(
    allowed=60,
    attempts=300,
    pace_s=0.2,
    equal=30,
    bursts=1,
    clearings=6,
    # Half of the time for which a process may answer from its memory, when nobody tells it.
    clear_limit_s=5.0,
    circuits=3,
    callers=6,
)


class FakeRecords:
    """The fake MLflow, for the proofs."""

    def __init__(self, server: FakeMlflow) -> None:
        self._server = server

    def end(self) -> None:
        """End its connections, and refuse others."""
        self._server.down()

    def begin(self) -> None:
        """Serve again."""
        self._server.up()

    def ids(self) -> list[str]:
        """The request ids of all records."""
        return [kept.request_id for kept in self._server.kept]


@contextmanager
def fake_mlflow(_folder: Path) -> Iterator[tuple[str, Records]]:
    with FakeMlflow() as server:
        yield server.url, FakeRecords(server)


def database(folder: Path) -> str:
    url = f"sqlite:///{folder}/llmops.db"
    prepare_database(make_settings(database_url=url))
    return url


def test_rates_sign_ins_clearings_and_circuits_are_one(tmp_path: Path) -> None:
    names = [name for name in PROOFS if name != "killed"]  # compares times over many rounds
    shown = list(prove(BUILT_IN, SMALL, names, tmp_path, database(tmp_path)))
    assert len(shown) == len(names)
    assert [str(one) for one in shown if not one.holds] == []


def test_a_rolling_restart_loses_no_request_and_no_record(tmp_path: Path) -> None:
    shown = list(prove(BUILT_IN, SMALL, list(RECORDED), tmp_path, database(tmp_path), fake_mlflow))
    assert len(shown) == len(RECORDED)
    assert [str(one) for one in shown if not one.holds] == []
