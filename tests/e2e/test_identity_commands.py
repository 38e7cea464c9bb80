"""The commands ``keys``, ``usage`` and ``migrate``, and a service that runs beside them or beside another."""

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from service.__main__ import main
from service.identity.database import VERSION_TABLE
from tests.e2e.recording import QUICK, until
from tests.e2e.support import decoded, run
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, Client, ServiceProcess, coverage_variables, new_secrets

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
FOLLOWS_S = 5.0
"""Within which a process follows what another one has changed."""


def chat(client: Client, key: str) -> Answer:
    return client.call("POST", "/v1/chat/completions", body=CHAT, token=key)


class Commands:
    """Runs ``python -m service`` with one database and one signing key."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self.environment = environment

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return run(self._folder, self.environment, "-m", "service", *arguments)

    def output(self, *arguments: str) -> str:
        """What a command that succeeds prints; its log lines are on stderr."""
        ended = self.run(*arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        decoded(ended.stderr)
        return ended.stdout

    def json(self, *arguments: str) -> list[dict[str, Any]]:
        """The decoded lines that a command prints for programs."""
        return [json.loads(line) for line in self.output(*arguments, "--json").splitlines()]

    def refused(self, status: int, *arguments: str) -> str:
        """The one line with what is wrong, of a command that fails."""
        ended = self.run(*arguments)
        assert ended.returncode == status, ended.stdout + ended.stderr
        (line,) = [line for line in decoded(ended.stdout + ended.stderr) if line["level"] != "INFO"]
        assert line["level"] == "ERROR"
        assert line["message"].startswith("Error: ")
        return str(line["message"])


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "own.db"


@pytest.fixture
def commands(tmp_path: Path, database: Path) -> Commands:
    environment = {
        "PATH": os.environ["PATH"],
        **coverage_variables(),
        **{name.upper(): value for name, value in new_secrets().items()},
        "DATABASE_URL": f"sqlite:///{database}",
    }
    return Commands(tmp_path, environment)


def test_keys_are_made_listed_rotated_and_revoked(commands: Commands) -> None:
    made = commands.output("keys", "create", "my app", "--owner", "alice", "--team", "blue")
    secret = next(line for line in made.splitlines() if line.startswith("llmops_"))
    key_id = secret.split("_")[1]
    head, row = made.splitlines()[:2]
    assert head.split() == ["id", "name", "owner", "team", "created", "expires", "last_used", "revoked"]
    assert row.startswith(f"{key_id}  my app  alice  blue  ")
    assert "shown nowhere else" in made
    options = ("--model", "demo", "--rate", "60/minute", "--budget", "2.5usd/month", "--days", "30")
    (second,) = commands.json("keys", "create", "other", "--owner", "bob", "--role", "admin", *options)
    assert second["key"].startswith(f"llmops_{second['id']}_")
    assert second["expires_at"] == second["created_at"] + 30 * 86_400
    listed = commands.output("keys", "list")
    assert secret not in listed
    assert [line.split()[0] for line in listed.splitlines()] == ["id", *sorted([key_id, second["id"]])]
    (found,) = commands.json("keys", "list", "--owner", "bob")
    assert found == {name: value for name, value in second.items() if name != "key"}
    assert (found["limits"]["rate"], found["limits"]["models"]) == ("60/minute", ["demo"])
    (turned,) = commands.json("keys", "rotate", key_id, "--overlap-s", "60")
    assert turned["id"] == key_id
    assert turned["key"] not in {secret, second["key"]}
    (revoked,) = commands.json("keys", "revoke", key_id)
    assert revoked["revoked_at"] is not None
    assert "no such key" in commands.refused(1, "keys", "rotate", key_id)


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys",),
        ("keys", "make"),
        ("keys", "create"),
        ("keys", "create", "x"),
        ("keys", "create", "", "--owner", "a"),
        ("keys", "create", "a\nb", "--owner", "a"),
        ("keys", "create", "x" * 257, "--owner", "a"),
        ("keys", "create", "x", "--owner", "a", "--rate", "many"),
        ("keys", "create", "x", "--owner", "a", "--rate", "0/minute"),
        ("keys", "create", "x", "--owner", "a", "--rate", "60/fortnight"),
        ("keys", "create", "x", "--owner", "a", "--budget", "nanusd/day"),
        ("keys", "create", "x", "--owner", "a", "--budget", "1e400usd/day"),
        ("keys", "create", "x", "--owner", "a", "--budget=-1usd/day"),
        ("keys", "create", "x", "--owner", "a", "--days", "0"),
        ("keys", "create", "x", "--owner", "a", "--days", "9" * 20),
        ("keys", "create", "x", "--owner", "a", "--role", "root"),
        ("keys", "list", "more"),
        ("keys", "revoke"),
        ("keys", "rotate", "x", "--overlap-s", "-1"),
        ("usage", "--from", "yesterday"),
        ("usage", "--by"),
        ("migrate", "now"),
        ("unknown",),
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_wrong_arguments_are_status_2(
    database: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    # In this process: a new one for each would take most of the time of this file.
    umask = os.umask(0)
    try:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
    finally:
        os.umask(umask)
    assert ended.value.code == 2
    (line,) = decoded("".join(capsys.readouterr()))
    assert (line["level"], line["message"][:7]) == ("ERROR", "Error: ")
    assert not database.exists()


def test_a_wrong_argument_is_status_2_of_the_process(commands: Commands, database: Path) -> None:
    said = commands.refused(2, "keys", "create", "x", "--owner", "a", "--budget", "nanusd/day")
    assert "must be an amount and a period" in said
    assert not database.exists()


EVERY = (("migrate",), ("keys", "list"), ("usage",))


@pytest.mark.parametrize("arguments", EVERY, ids=" ".join)
def test_a_database_that_cannot_be_used_is_one_clear_line(
    commands: Commands, database: Path, arguments: tuple[str, ...]
) -> None:
    database.write_bytes(b"no database " * 100)
    database.chmod(0o600)
    said = commands.refused(1, *arguments)
    assert said == "Error: The database at DATABASE_URL cannot be used: file is not a database"
    commands.environment["DATABASE_URL"] = "postgresql://postgres:hidden-word@127.0.0.1:9/postgres"
    said = commands.refused(1, *arguments)
    assert "The database at DATABASE_URL cannot be used" in said
    assert "hidden-word" not in said


@pytest.mark.parametrize("arguments", [*EVERY, ("serve",)], ids=" ".join)
def test_an_older_program_refuses_a_newer_schema(
    commands: Commands, database: Path, arguments: tuple[str, ...]
) -> None:
    commands.output("migrate")
    with closing(sqlite3.connect(database)) as newer, newer:
        newer.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")  # noqa: S608 - a constant
    before = database.read_bytes()
    said = commands.refused(1, *arguments)
    assert "has the schema 9999, which is newer than this version of the service knows" in said
    assert database.read_bytes() == before


def test_migrate_may_be_run_again(commands: Commands, database: Path) -> None:
    for number in range(2):
        lines = decoded(commands.run("migrate").stdout)
        migrated = [line for line in lines if line["message"] == "The database was migrated"]
        assert len(migrated) == 1 - number
        assert lines[-1]["message"] == "The database is up to date"
    assert database.stat().st_mode & 0o077 == 0


@pytest.fixture
def processes(upstream: FakeUpstream, commands: Commands) -> Iterator[list[ServiceProcess]]:
    """Two services with one database, and the commands' signing key and passwords."""
    with ExitStack() as stack:
        # The commands take the processor for seconds: a quick check would find LiteLLM slow.
        patient = {"HEALTH_INTERVAL_S": "10", "HEALTH_TIMEOUT_S": "5"}
        given = {**QUICK, **patient, **commands.environment, "LITELLM_URL": upstream.url}
        started = [stack.enter_context(ServiceProcess(given)) for _ in range(2)]
        for process in started:
            process.wait_ready()
        yield started
        for process in started:
            assert process.stop() == 0
            assert not [line for line in process.lines() if line["level"] in {"WARNING", "ERROR"}]


def test_a_running_service_follows_the_commands(commands: Commands, processes: list[ServiceProcess]) -> None:
    process = processes[0]
    (made,) = commands.json("keys", "create", "app", "--owner", "alice", "--team", "blue")
    assert chat(process, made["key"]).status == 200
    (turned,) = commands.json("keys", "rotate", made["id"])
    assert chat(process, turned["key"]).status == 200
    until(lambda: chat(process, made["key"]).status == 401, "the old secret to end", FOLLOWS_S)
    assert chat(process, turned["key"]).status == 200
    commands.json("keys", "revoke", made["id"])
    until(lambda: chat(process, turned["key"]).status == 401, "the key to end", FOLLOWS_S)
    (row,) = process.call("GET", "/usage?by=user,key", token=process.token("admin")).json["rows"]
    (shown,) = commands.json("usage", "--by", "user,team,key")
    assert shown["total"]["calls"] == row["calls"] >= 3
    assert [(one["user"], one["team"], one["key"]) for one in shown["rows"]] == [
        ("alice", "blue", made["id"])
    ]
    assert shown["rows"][0]["cost"] == pytest.approx(0.00042 * row["calls"])
    table = commands.output("usage", "--by", "user", "--user", "alice").splitlines()
    assert table[0].split()[:2] == ["user", "calls"]
    assert [line.split()[:2] for line in table[1:]] == [
        ["alice", str(row["calls"])],
        ["total", str(row["calls"])],
    ]
    assert "--by must be some of" in commands.refused(1, "usage", "--by", "week")


def test_a_process_follows_another(processes: list[ServiceProcess]) -> None:
    one, other = processes
    admin = one.token("admin")

    def make(owner: str, **fields: Any) -> dict[str, Any]:
        body = {"name": "app", "owner": owner, **fields}
        made: dict[str, Any] = one.call("POST", "/keys", body=body, token=admin).json
        # At once in the other one, which looks it up.
        assert chat(other, made["key"]).status == 200
        return made

    revoked, disabled, limited = make("alice"), make("bob"), make("carol", team="blue")
    assert one.call("DELETE", f"/keys/{revoked['id']}", token=admin).status == 204
    until(lambda: chat(other, revoked["key"]).status == 401, "the revocation", FOLLOWS_S)
    assert one.call("PUT", "/users/bob", body={"disabled": True}, token=admin).status == 200
    until(lambda: chat(other, disabled["key"]).status == 401, "the user to be disabled", FOLLOWS_S)
    assert one.call("PUT", "/teams/blue", body={"models": ["another"]}, token=admin).status == 200
    until(lambda: chat(other, limited["key"]).status == 403, "the team's models", FOLLOWS_S)
    budget = {"amount": 1, "unit": "tokens", "period": "day"}
    assert one.call("PUT", "/teams/blue", body={"budget": budget}, token=admin).status == 200
    until(lambda: chat(other, limited["key"]).status == 429, "the team's budget", FOLLOWS_S)
    assert one.call("PUT", "/teams/blue", body={}, token=admin).status == 200
    assert one.call("PUT", "/users/bob", body={}, token=admin).status == 200
    for key in (limited, disabled):
        until(lambda key=key: chat(other, key["key"]).status == 200, "the end of limits", FOLLOWS_S)  # type: ignore[misc]
