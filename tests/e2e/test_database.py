"""The SQL database of a real process: one that cannot be used stops the start, and others may share it."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from deploy.ports import unused_port
from service.identity.database import VERSION_TABLE
from tests.e2e.support import decoded, listens, run
from tests.harness import new_secrets

pytestmark = pytest.mark.e2e


def _newer(path: Path) -> str:
    with closing(sqlite3.connect(path)) as made, made:
        made.execute(f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL)")
        made.execute(f"INSERT INTO {VERSION_TABLE} VALUES ('9999')")  # noqa: S608 - a constant
    return "has the schema 9999, which is newer than this version of the service knows"


def _damaged(path: Path) -> str:
    path.write_bytes(b"no database " * 100)
    return "cannot be used: file is not a database"


def _folder(path: Path) -> str:
    path.mkdir(0o700)
    return "cannot be used: unable to open database file"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("make", [_newer, _damaged, _folder])
def test_a_database_that_cannot_be_used_stops_the_start(tmp_path: Path, make: object, workers: int) -> None:
    assert callable(make)
    path, port = tmp_path / "own.db", unused_port()
    said = make(path)
    path.chmod(0o700 if path.is_dir() else 0o600)
    environment = {
        "PATH": os.environ["PATH"],
        **{name.upper(): value for name, value in new_secrets().items()},
        "DATABASE_URL": f"sqlite:///{path}",
        "PORT": str(port),
        "WORKERS": str(workers),
        **({"QDRANT_URL": "http://127.0.0.1:9"} if workers > 1 else {}),
    }
    ended = run(tmp_path, environment, "-m", "service")
    assert ended.returncode == 1
    (line,) = [one for one in decoded(ended.stdout) if one["level"] == "ERROR"]
    assert line["message"].startswith("Error: The database at DATABASE_URL ")
    assert said in line["message"]
    assert not ended.stderr
    assert not listens(port)
