"""The SQL database of a real process: one that cannot be used stops the start, and others may share it."""

import os
import secrets
import signal
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from deploy.ports import unused_port
from service.identity.database import VERSION_TABLE
from tests.e2e.support import decoded, listens, run
from tests.fakes.operations import RESPONSE, named
from tests.fakes.streams import RawStream
from tests.fakes.upstream import FakeUpstream, Status
from tests.harness import ServiceProcess, new_secrets
from tests.http.streaming import calling
from tests.postgresql import PostgreSql

pytestmark = [pytest.mark.e2e, pytest.mark.covered]


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


def test_stored_responses_belong_to_their_owner_after_a_kill(upstream: FakeUpstream, tmp_path: Path) -> None:
    variables = {"LITELLM_URL": upstream.url, "DATABASE_URL": f"sqlite:///{tmp_path}/own.db"}
    queued = {**RESPONSE, "status": "queued", "output": [], "usage": None}
    whole, streamed = f"resp_{secrets.token_hex(20)}", f"resp_{secrets.token_hex(20)}"
    with ServiceProcess(variables) as process:
        process.wait_ready()
        token = process.token("user")
        body = {"model": "demo", "input": "What is a trace?"}
        upstream.script(Status(200, {**queued, "id": whole}))
        answer = process.call("POST", "/v1/responses", body={**body, "background": True}, token=token)
        assert (answer.status, answer.json["status"]) == (200, "queued")
        created = named("response.created", response={**queued, "id": streamed}, sequence_number=0)
        upstream.script(RawStream((created,), then="silence"))
        with calling(process, token, {**body, "stream": True}, "/v1/responses") as caller:
            assert caller.event() == created
            assert process.stop(signal.SIGKILL) == -signal.SIGKILL
    with ServiceProcess(variables) as process:
        process.wait_ready()
        owner, other = process.token("user"), process.token("admin")
        for made in (whole, streamed):
            assert process.call("GET", f"/v1/responses/{made}", token=other).status == 404
            upstream.script(Status(200, {**RESPONSE, "id": made}))
            polled = process.call("GET", f"/v1/responses/{made}", token=owner)
            assert (polled.status, polled.json["status"]) == (200, "completed")
            assert process.call("DELETE", f"/v1/responses/{made}", token=owner).status == 200
            assert process.call("GET", f"/v1/responses/{made}", token=owner).status == 404
        assert process.stop() == 0


def test_two_processes_share_a_database(upstream: FakeUpstream) -> None:
    """Two replicas that start at once on an empty PostgreSQL."""
    with PostgreSql() as server, ExitStack() as stack:
        variables = {"LITELLM_URL": upstream.url, "DATABASE_URL": server.url}
        first, second = (stack.enter_context(ServiceProcess(variables)) for _ in range(2))
        for process in (first, second):
            process.wait_ready()
        body = {"model": "demo", "input": "What is a trace?"}
        made = first.call("POST", "/v1/responses", body=body, token=first.token("user")).json["id"]
        assert second.call("GET", f"/v1/responses/{made}", token=second.token("user")).status == 200
        assert second.call("GET", f"/v1/responses/{made}", token=second.token("admin")).status == 404
        migrated = [
            line
            for process in (first, second)
            for line in process.lines()
            if line["message"] == "The database was migrated"
        ]
        assert len(migrated) == 1
        assert [process.stop() for process in (first, second)] == [0, 0]
        for process in (first, second):
            assert [line for line in process.lines() if line["level"] in {"WARNING", "ERROR"}] == []
