"""Replicas that share a Valkey server spend one budget together, and lose no call when it is killed."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from service.identity.database import prepare_database
from tests.e2e.recording import show, until
from tests.e2e.support import generate
from tests.fakes.behaviours import Answer as Reply
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, ServiceProcess, make_settings, new_secrets
from tests.postgresql import PostgreSql
from tests.valkey import Valkey

pytestmark = pytest.mark.e2e

REPLICAS = 3
TOKENS = 30
"""Of a call of the fake upstream."""

CALLS = 60
"""What a budget allows."""

IN_FLIGHT = 6


@dataclass
class Replicas:
    """Processes that share everything but their memory."""

    processes: list[ServiceProcess]
    upstream: FakeUpstream
    valkey: Valkey
    admin: str

    def change(self, method: str, path: str, body: dict[str, Any]) -> Any:
        """Change something as the administrator."""
        answer = self.processes[0].call(method, path, body=body, token=self.admin)
        assert answer.status in {200, 201}, answer.body
        return answer.json

    def key(self, scope: str, name: str, calls: int) -> str:
        """A key with a budget, or one of a user or in a team with one; all know it when this returns."""
        budget = {"amount": calls * TOKENS, "unit": "tokens", "period": "month"}
        own: dict[str, Any] = {}
        if scope == "key":
            own["budget"] = budget
        elif scope == "user":
            self.change("PUT", f"/users/{name}", {"budget": budget})
        else:
            self.change("PUT", f"/teams/{name}", {"budget": budget})
            own["team"] = name
        key = str(self.change("POST", "/keys", {"name": "client", "owner": name, **own})["key"])
        for number in range(REPLICAS):
            until(lambda at=number: self.budget(at, key) is not None, "the budget to be known")  # type: ignore[misc]
        return key

    def budget(self, number: int, key: str) -> dict[str, Any] | None:
        """What one process says of the nearest budget of a key."""
        found: dict[str, Any] | None = (
            self.processes[number].call("GET", "/auth/me", token=key).json.get("budget")
        )
        return found

    def ask(self, number: int, key: str) -> int:
        """Call, at the next process in turn; the status."""
        answer = generate(self.processes[number % REPLICAS], key)
        assert answer.status == 200 or is_refused(answer), answer.body
        return answer.status

    def all_count(self, key: str, calls: int) -> None:
        """Wait until all processes and the ledger have so many calls of a key."""
        for number in range(REPLICAS):
            until(
                lambda at=number: (  # type: ignore[misc]
                    (self.budget(at, key) or {}).get("spent") == calls * TOKENS
                ),
                f"{calls} calls to be counted",
            )

        def has_all() -> bool:
            usage = self.processes[0].call("GET", "/usage", token=key).json["total"]
            assert (usage["calls"] <= calls, usage["errors"]) == (True, 0)
            return bool(usage["calls"] == calls)

        until(has_all, f"the ledger to have {calls} calls")


def is_refused(answer: Answer) -> bool:
    return answer.status == 429 and answer.json["error"] == "BudgetExceededError"


@contextmanager
def running() -> Iterator[Replicas]:
    with FakeUpstream() as upstream, Valkey() as valkey, PostgreSql() as database, ExitStack() as stack:
        prepare_database(make_settings(database_url=database.url))
        variables = {
            **{name.upper(): value for name, value in new_secrets().items()},
            "LITELLM_URL": upstream.url,
            "DATABASE_URL": database.url,
            "VALKEY_URL": valkey.url,
            # A busy machine must not make a process count by itself.
            "VALKEY_TIMEOUT_S": "10",
        }
        # One after the other: a busy machine takes a while for each.
        processes = [stack.enter_context(ServiceProcess(variables)).wait_ready() for _ in range(REPLICAS)]
        yield Replicas(processes, upstream, valkey, processes[0].token("admin"))


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    with running() as found:
        yield found


@pytest.mark.parametrize("scope", ["key", "user", "team"])
def test_one_call_after_the_other_spends_no_more_than_the_budget(replicas: Replicas, scope: str) -> None:
    key = replicas.key(scope, f"one-{scope}", CALLS)
    passed = next(number for number in itertools.count() if replicas.ask(number, key) != 200)
    # A call is told when it has ended: the last may have been the last of each, on a machine that is busy.
    assert CALLS <= passed <= CALLS + REPLICAS
    assert [replicas.ask(number, key) for number in range(REPLICAS)] == [429] * REPLICAS
    show({"scope": scope, "allowed": CALLS, "passed": passed})
    replicas.all_count(key, passed)


def test_calls_at_the_same_time_go_beyond_it_by_what_is_in_flight(replicas: Replicas) -> None:
    key = replicas.key("key", "many", CALLS)
    replicas.upstream.default = Reply(delay_s=0.1)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        statuses = list(pool.map(lambda number: replicas.ask(number, key), range(5 * CALLS)))
    replicas.upstream.default = Reply()
    passed = statuses.count(200)
    # Those that were in flight when it was spent, and those that began before the ends of others were heard.
    assert CALLS <= passed <= CALLS + 2 * IN_FLIGHT
    show({"allowed": CALLS, "in flight": IN_FLIGHT, "passed": passed})
    replicas.all_count(key, passed)


def test_no_call_fails_and_none_is_lost_when_the_server_is_killed() -> None:
    with running() as replicas:
        key, passed, refused = replicas.key("team", "blue", 3 * CALLS), itertools.count(), threading.Event()
        killed = threading.Event()

        def call(number: int) -> int:
            status = replicas.ask(number, key)
            if status == 200 and next(passed) == CALLS:
                replicas.valkey.kill()
                killed.set()
            if status == 429:
                refused.set()
            return status

        statuses: list[int] = []
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            while not refused.is_set():
                first = len(statuses)
                statuses += pool.map(call, range(first, first + 10 * IN_FLIGHT))
        assert killed.is_set()
        count = statuses.count(200)
        assert count >= 3 * CALLS
        show({"allowed": 3 * CALLS, "passed": count, "failed": 0})
        replicas.all_count(key, count)
        assert [replicas.ask(number, key) for number in range(REPLICAS)] == [429] * REPLICAS
        # And when it is back they count together again.
        replicas.valkey.start()
        again = replicas.key("key", "again", CALLS)

        def is_shared(number: int) -> bool:
            replicas.ask(0, probe)
            return bool((replicas.budget(number, probe) or {})["spent"])

        probe = replicas.key("key", "probe", 1_000)
        for number in range(1, REPLICAS):
            until(lambda at=number: is_shared(at), "the stream to be heard")  # type: ignore[misc]
        made = next(number for number in itertools.count() if replicas.ask(number, again) != 200)
        assert CALLS <= made <= CALLS + REPLICAS
        replicas.all_count(again, made)
