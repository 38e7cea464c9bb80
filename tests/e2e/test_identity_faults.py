"""A database that fails: known callers go on, nothing is opened up, and no call is missing in the ledger."""

import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.identity.keys import new_id, new_key
from tests.e2e.recording import QUICK, show, until, variables
from tests.e2e.support import decoded
from tests.fakes.behaviours import Answer as Reply
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, ServiceProcess
from tests.postgresql import PostgreSql

pytestmark = pytest.mark.e2e

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
TOKENS = 30
"""What a call of the fake upstream has."""

SCRIPT = Path(__file__).with_name("read_only_disk.py")
THROUGH_A_PIPE = """
import os, runpy
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(writing)
    os.dup2(reading, 0)
    os.execvp("cat", ["cat"])
os.close(reading)
os.dup2(writing, 1)
os.dup2(writing, 2)
os.close(writing)
runpy.run_module("service", run_name="__main__", alter_sys=True)
"""
"""The service with its lines written by another process, so that a limit on its own files is none on them."""

Fault = Callable[[ServiceProcess, Path], Any]


@contextmanager
def locked(_process: ServiceProcess, path: Path) -> Iterator[None]:
    """Hold the lock for writing in another process, which this one is."""
    with closing(sqlite3.connect(path, isolation_level=None)) as locker:
        locker.execute("BEGIN IMMEDIATE")
        yield
        locker.execute("ROLLBACK")


@contextmanager
def read_only(process: ServiceProcess, _path: Path) -> Iterator[None]:
    """Let the disk refuse to be written to."""
    switch = Path(process.environment["READ_ONLY_SWITCH"])
    switch.touch()
    yield
    switch.unlink()


@contextmanager
def full(process: ServiceProcess, _path: Path) -> Iterator[None]:
    """Let the process's files take no further byte; the error of a limit is not the one of a full disk."""
    assert process.process is not None
    pid = process.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


FAULTS: Mapping[str, tuple[Fault, tuple[str, ...]]] = {
    "locked": (locked, ("-m", "service")),
    "read-only": (read_only, (str(SCRIPT),)),
    "full": (full, ("-c", THROUGH_A_PIPE)),
}


def chat(process: ServiceProcess, key: str, **fields: Any) -> Answer:
    return process.call("POST", "/v1/chat/completions", body={**CHAT, **fields}, token=key)


def make(process: ServiceProcess, admin: str, owner: str, **fields: Any) -> dict[str, Any]:
    answer = process.call("POST", "/keys", body={"name": "app", "owner": owner, **fields}, token=admin)
    assert answer.status == 201, answer.body
    made: dict[str, Any] = answer.json
    return made


def tokens_a_day(amount: int) -> dict[str, Any]:
    return {"amount": amount, "unit": "tokens", "period": "day"}


def refusal(answer: Answer) -> tuple[int, str]:
    """The status and the name of the error, of either form of body."""
    error = answer.json["error"]
    return answer.status, error if isinstance(error, str) else error["type"]


def calls_by_key(process: ServiceProcess, admin: str) -> dict[str | None, int]:
    """How many calls the ledger has of each key; empty while it cannot be read."""
    answer = process.call("GET", "/usage?by=key", token=admin)
    return {row["key"]: row["calls"] for row in answer.json["rows"]} if answer.status == 200 else {}


def is_unavailable(process: ServiceProcess, secret: str) -> bool:
    answer = chat(process, secret)
    return answer.status == 503 and refusal(answer) == UNAVAILABLE


UNAVAILABLE = (503, "DependencyUnavailableError")
REFUSED = (401, "AuthenticationError")


class Callers:
    """Who calls while the database fails; all of them are known before."""

    def __init__(self, process: ServiceProcess) -> None:
        self.process = process
        self.admin, self.token = process.token("admin"), process.token("user")
        self.known = make(process, self.admin, "app", budget=tokens_a_day(1_000_000), team="blue")
        self.small = make(process, self.admin, "small", budget=tokens_a_day(3 * TOKENS))
        self.revoked = make(process, self.admin, "app")
        self.disabled = make(process, self.admin, "gone")
        self.calls = 0
        for key in (self.known, self.small, self.revoked, self.disabled):
            assert self.ask(key["key"]).status == 200
        assert process.call("DELETE", f"/keys/{self.revoked['id']}", token=self.admin).status == 204
        assert process.call("PUT", "/users/gone", body={"disabled": True}, token=self.admin).status == 200
        self.before = self.calls

    def ask(self, secret: str) -> Answer:
        """Call, and count the call if it was made."""
        answer = chat(self.process, secret)
        self.calls += answer.status == 200
        return answer

    def go_on(self) -> None:
        """Known callers are served, and whoever may not call is refused."""
        for secret in (self.known["key"], self.token, self.known["key"], self.admin):
            assert self.ask(secret).status == 200
        assert refusal(self.ask(self.disabled["key"])) == REFUSED
        # A key that was changed is looked up again.
        assert refusal(self.ask(self.revoked["key"])) in {REFUSED, UNAVAILABLE}
        assert refusal(self.ask(self.known["key"][:-1])) == REFUSED

    def spend_the_small_budget(self) -> None:
        """What is spent meanwhile counts at once."""
        assert [self.ask(self.small["key"]).status for _ in range(2)] == [200, 200]
        assert refusal(self.ask(self.small["key"])) == (429, "BudgetExceededError")

    def cannot_change_anything(self) -> None:
        """Every change is refused, and not half made."""
        for method, path, body in (
            ("POST", "/keys", {"name": "new"}),
            ("POST", f"/keys/{self.known['id']}/rotate", {}),
            ("DELETE", f"/keys/{self.known['id']}", None),
            ("PUT", "/users/app", {"disabled": True}),
            ("PUT", "/teams/blue", {"models": ["other"]}),
        ):
            answer = self.process.call(method, path, body=body, token=self.admin)
            assert refusal(answer) == UNAVAILABLE, (method, path, answer.body)

    def are_in_the_ledger(self) -> None:
        """It has each call, once."""
        until(
            lambda: sum(calls_by_key(self.process, self.admin).values()) == self.calls,
            f"the ledger to have {self.calls} calls",
        )
        assert calls_by_key(self.process, self.admin)[self.small["id"]] == 3
        assert chat(self.process, make(self.process, self.admin, "later")["key"]).status == 200


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_cannot_be_written_to_stops_no_known_caller(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path, name: str
) -> None:
    fault, arguments = FAULTS[name]
    path = tmp_path / "own.db"
    given = {
        **variables(upstream.url, mlflow.url, tmp_path / "spool"),
        "DATABASE_URL": f"sqlite:///{path}",
        "READ_ONLY_SWITCH": str(tmp_path / "read-only"),
    }
    with ServiceProcess(given, arguments) as process:
        callers = Callers(process.wait_ready())
        late = make(process, callers.admin, "late")
        with fault(process, path):
            callers.go_on()
            callers.cannot_change_anything()
            callers.spend_the_small_budget()
            # Reading needs no lock and no space: a key that was not known yet is found, and a guess is none.
            assert callers.ask(late["key"]).status == 200
            assert refusal(callers.ask(new_key(new_id()))) == REFUSED
            callers.go_on()
        callers.are_in_the_ledger()
        assert process.stop() == 0
        lines = decoded(process.text())
    failed, recovered = (
        [line for line in lines if line.get("event") == f"llmops.identity.store.{what}"]
        for what in ("failed", "recovered")
    )
    assert failed
    assert {line["reason"] for line in failed} <= {"busy", "readonly", "ioerr_write", "full", "slow"}
    assert len(failed) == len(recovered)
    assert not [line for line in lines if line["level"] in {"ERROR", "CRITICAL"}]


@pytest.fixture
def postgresql() -> Iterator[PostgreSql]:
    with PostgreSql() as server:
        yield server


@contextmanager
def opening(*events: threading.Event) -> Iterator[None]:
    """Set the events at the end of the block, so that no thread waits for one when the block has failed."""
    try:
        yield
    finally:
        for event in events:
            event.set()


def test_postgresql_is_killed_and_comes_back_under_load(
    upstream: FakeUpstream, mlflow: FakeMlflow, postgresql: PostgreSql, tmp_path: Path
) -> None:
    calls, threads = 200, 4
    upstream.default = Reply(delay_s=0.02)
    given = {
        **variables(upstream.url, mlflow.url, tmp_path / "spool"),
        "DATABASE_URL": postgresql.url,
    }
    with ServiceProcess(given) as process:
        callers = Callers(process.wait_ready())
        unknown = make(process, callers.admin, "unknown")
        keys = [make(process, callers.admin, f"app-{number}", team="red") for number in range(4)]
        for key in keys:
            assert callers.ask(key["key"]).status == 200
        down, back, done = threading.Event(), threading.Event(), threading.Lock()
        answered: list[tuple[str, int]] = []

        def call(number: int) -> None:
            # The first third before, the second while the database is down, the last when it is back.
            if number >= calls // 3:
                down.wait()
            if number >= 2 * calls // 3:
                back.wait()
            key = keys[number % len(keys)]
            status = chat(process, key["key"], seed=number).status
            with done:
                answered.append((key["id"], status))

        with ThreadPoolExecutor(threads) as pool, opening(down, back):
            for number in range(calls):
                pool.submit(call, number)
            until(lambda: len(answered) >= calls // 4, "some calls")
            postgresql.crash()
            down.set()
            callers.go_on()
            callers.cannot_change_anything()
            callers.spend_the_small_budget()
            for secret in (unknown["key"], new_key(new_id())):
                assert refusal(callers.ask(secret)) == UNAVAILABLE
            for path in ("/keys", "/usage"):
                assert refusal(process.call("GET", path, token=callers.admin)) == UNAVAILABLE
            until(lambda: len(answered) >= 2 * calls // 3, "the calls without the database")
            postgresql.start()
            back.set()
        assert [status for _, status in answered] == [200] * calls
        callers.calls += calls
        until(lambda: chat(process, unknown["key"]).status == 200, "the unknown key to be found")
        callers.calls += 1
        callers.are_in_the_ledger()
        counted = calls_by_key(process, callers.admin)
        assert [counted[key["id"]] for key in keys] == [1 + calls // len(keys)] * len(keys)
        ids = [kept.request_id for kept in mlflow.kept]
        assert len(ids) == len(set(ids))
        assert process.stop() == 0
        lines = decoded(process.text())
    assert [line["message"] for line in lines if line.get("event") == "llmops.identity.store.recovered"]
    assert not [line for line in lines if line["level"] in {"ERROR", "CRITICAL"}]
    show(
        {
            "calls": calls,
            "without the database": calls // 3,
            "failed": 0,
            "in the ledger": sum(counted.values()),
        }
    )


def test_what_is_known_is_used_for_a_limited_time(upstream: FakeUpstream, postgresql: PostgreSql) -> None:
    given = {
        **QUICK,
        "LITELLM_URL": upstream.url,
        "DATABASE_URL": postgresql.url,
        # Longer than two polls that take their whole time limit.
        "IDENTITY_STALE_S": "9",
    }
    with ServiceProcess(given) as process:
        callers = Callers(process.wait_ready())
        postgresql.crash()
        callers.go_on()
        everyone = (callers.known["key"], callers.token, callers.admin, callers.revoked["key"])
        for secret in everyone:
            until(partial(is_unavailable, process, secret), "503")
        for secret in (*everyone, callers.small["key"], callers.disabled["key"]):
            assert refusal(process.call("GET", "/auth/me", token=secret)) == UNAVAILABLE
            assert refusal(chat(process, secret)) == UNAVAILABLE
        assert process.call("GET", "/health").status == 200
        postgresql.start()
        until(lambda: chat(process, callers.known["key"]).status == 200, "the known key")
        assert chat(process, callers.token).status == 200
        for key in (callers.revoked, callers.disabled):
            assert refusal(chat(process, key["key"])) == REFUSED
        assert process.stop() == 0
