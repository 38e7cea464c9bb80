"""Replicas that share a Valkey server tell each other what each of them sees."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException

import pytest

from tests.e2e.recording import until
from tests.e2e.support import generate
from tests.fakes.qdrant import FakeQdrant
from tests.fakes.upstream import Answer as UpstreamAnswer
from tests.fakes.upstream import FakeUpstream, Status
from tests.harness import Answer, ServiceProcess, new_secrets
from tests.valkey import Valkey

pytestmark = pytest.mark.e2e

REPLICAS = 3
FAILURES = 2
OPEN_S = 2
CLEARINGS = 20
FRESH_S = 10.0
"""How long a process may answer from its memory without asking the store, when nobody tells it."""


@dataclass
class Replicas:
    """Processes that share everything but their memory."""

    variables: dict[str, str]
    valkey: Valkey
    upstream: FakeUpstream
    processes: list[ServiceProcess] = field(default_factory=list)

    def token(self, user: str = "user") -> str:
        """A token, which all processes accept."""
        return self.processes[0].token(user)

    def result(self, number: int, token: str, prompt: str) -> str:
        """What the cache of one process says to a question."""
        answer = generate(self.processes[number], token, body={"prompt": prompt})
        assert answer.status == 200, answer.body
        return answer.headers["x-cache"]

    def transitions(self, number: int) -> list[str]:
        """What the circuits of models of one process have done; Valkey has a breaker of its own."""
        events = [line for line in self.processes[number].lines() if line.get("breaker") == "model"]
        return [line["to"] for line in events if line["event"] == "llmops.circuit_breaker.state_changed"]


@contextmanager
def running(number: int, **more: str) -> Iterator[Replicas]:
    with (
        FakeUpstream() as upstream,
        FakeQdrant().serving() as qdrant,
        Valkey() as valkey,
        ExitStack() as stack,
    ):
        variables = {
            **{name.upper(): value for name, value in new_secrets().items()},
            "LITELLM_URL": upstream.url,
            "QDRANT_URL": qdrant.url,
            "VALKEY_URL": valkey.url,
            # A busy machine must not make a process count by itself.
            "VALKEY_TIMEOUT_S": "10",
            "CACHE_ENABLED": "true",
            "RETRY_MAX": "0",
            "BREAKER_FAILURE_THRESHOLD": f"{FAILURES}",
            "BREAKER_TIMEOUT_S": f"{OPEN_S}",
            **more,
        }
        processes = [stack.enter_context(ServiceProcess(variables)) for _ in range(number)]
        for process in processes:
            process.wait_ready()
        yield Replicas(variables, valkey, upstream, processes)


@dataclass
class Asked:
    """Calls that are made at the same time, each in a thread."""

    answers: list[Future[Answer]]

    def results(self) -> Counter[str]:
        """What the callers saw of the cache; each must have an answer, and the same one."""
        answers = [answer.result() for answer in self.answers]
        assert {answer.status for answer in answers} == {200}, [answer.body for answer in answers][:3]
        assert len({answer.json["response"] for answer in answers}) == 1
        # Who made the call pays for it, and nobody else.
        costs = [answer.json["cost"] for answer in answers]
        assert [bool(cost) for cost in costs] == [
            answer.headers["x-cache"] == "MISS" for answer in answers
        ], costs
        return Counter(answer.headers["x-cache"] for answer in answers)


@contextmanager
def asking(replicas: Replicas, threads: int = 60) -> Iterator[Callable[[int, int], Asked]]:
    """Lets equal calls be made at one replica at the same time."""
    with ThreadPoolExecutor(threads) as pool:
        token = replicas.token()

        def ask(number: int, times: int) -> Asked:
            body = {"prompt": "the same"}
            calls = [
                pool.submit(generate, replicas.processes[number], token, body=body) for _ in range(times)
            ]
            return Asked(calls)

        yield ask


def is_refused(process: ServiceProcess, token: str) -> bool:
    return process.call("GET", "/auth/me", token=token).status == 401


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    with running(REPLICAS, RATE_LIMIT="1000/minute") as found:
        yield found


def test_a_token_that_is_signed_out_is_refused_by_all_and_by_those_that_start_later(
    replicas: Replicas,
) -> None:
    token, other = replicas.token(), replicas.token()
    assert [is_refused(process, token) for process in replicas.processes] == [False] * REPLICAS
    assert replicas.processes[1].call("POST", "/auth/logout", token=token).status == 204
    for process in replicas.processes:
        until(lambda process=process: is_refused(process, token), "the token to be refused")  # type: ignore[misc]
    with ServiceProcess(replicas.variables) as late:
        late.wait_ready()
        assert (is_refused(late, token), is_refused(late, other)) == (True, False)
    assert not any(is_refused(process, other) for process in replicas.processes)


def test_what_is_cleared_through_one_is_forgotten_by_all(replicas: Replicas) -> None:
    user, admin = replicas.token(), replicas.token("admin")

    def has(number: int, clearing: int) -> bool:
        # A question of this process alone: the others do not store its answer again.
        return replicas.result(number, user, f"question {clearing} of {number}") == "HIT"

    for clearing in range(CLEARINGS):
        for number in range(REPLICAS):
            until(lambda at=(number, clearing): has(*at), "the answer to be stored")  # type: ignore[misc]
        through = replicas.processes[clearing % REPLICAS]
        assert through.call("DELETE", "/llm/cache", token=admin).status == 200
        for number in range(REPLICAS):
            until(
                lambda at=(number, clearing): not has(*at),  # type: ignore[misc]
                "the answer to be forgotten",
                FRESH_S / 2,
            )


def test_a_circuit_that_opens_in_one_is_open_in_all_and_one_of_them_probes(replicas: Replicas) -> None:
    token, before = replicas.token(), len(replicas.upstream.chat_requests)
    replicas.upstream.script(*[Status(500)] * FAILURES)
    for number in range(FAILURES):
        assert generate(replicas.processes[0], token, body={"prompt": f"{number}"}).status == 502
    for number in range(REPLICAS):
        until(lambda at=number: replicas.transitions(at) == ["open"], "the circuit to open")  # type: ignore[misc]
    for process in replicas.processes[1:]:
        answer = generate(process, token, body={"prompt": "another"})
        assert (answer.status, answer.json["error"]) == (503, "CircuitOpenError")
    assert len(replicas.upstream.chat_requests) == before + FAILURES
    until(
        lambda: generate(replicas.processes[0], token, body={"prompt": "another"}).status == 200,
        "the probe of the process that has seen the failures",
    )
    for number in range(1, REPLICAS):
        until(lambda at=number: replicas.transitions(at)[-1] == "closed", "the circuit to close")  # type: ignore[misc]
        assert replicas.transitions(number) == ["open", "closed"]
    assert len(replicas.upstream.chat_requests) == before + FAILURES + 1


def test_without_the_server_each_goes_on_by_itself_and_tells_the_others_when_it_is_back() -> None:
    with running(2) as replicas:
        first, second = replicas.processes
        token, other = replicas.token(), replicas.token()
        replicas.valkey.kill()
        assert first.call("POST", "/auth/logout", token=token).status == 204
        assert (is_refused(first, token), is_refused(second, token)) == (True, False)
        replicas.upstream.script(*[Status(500)] * FAILURES)
        for number in range(FAILURES):
            assert generate(first, other, body={"prompt": f"{number}"}).status == 502
        until(lambda: replicas.transitions(0) == ["open"], "the line about it")
        assert generate(second, other, body={"prompt": "another"}).status == 200
        assert replicas.transitions(1) == []
        replicas.valkey.start()
        until(lambda: is_refused(second, token), "the token to be refused")


def test_equal_calls_over_all_replicas_are_one_call_to_the_model(replicas: Replicas) -> None:
    with asking(replicas) as ask:
        before = len(replicas.upstream.chat_requests)
        asked = [ask(number % REPLICAS, 1) for number in range(300)]
        assert sum((one.results() for one in asked), Counter()) == {"MISS": 1, "HIT": 299}
        assert len(replicas.upstream.chat_requests) == before + 1


def test_another_replica_takes_over_from_one_that_was_killed() -> None:
    with running(REPLICAS, RATE_LIMIT="1000/minute") as replicas, asking(replicas) as ask:
        before = len(replicas.upstream.chat_requests)
        replicas.upstream.script(UpstreamAnswer(delay_s=60))
        leading = ask(0, 1)
        replicas.upstream.wait_for(lambda upstream: len(upstream.chat_requests) == before + 1, 20)
        following = [ask(number, 20) for number in (1, 2)]
        killed = replicas.processes[0].process
        assert killed is not None
        killed.kill()
        assert sum((one.results() for one in following), Counter()) == {"MISS": 1, "HIT": 39}
        assert len(replicas.upstream.chat_requests) == before + 2
        assert isinstance(leading.answers[0].exception(20), OSError | HTTPException)


def test_those_who_wait_ask_the_model_themselves_when_the_server_is_killed() -> None:
    with running(REPLICAS, RATE_LIMIT="1000/minute") as replicas, asking(replicas) as ask:
        before = len(replicas.upstream.chat_requests)
        replicas.upstream.script(UpstreamAnswer(delay_s=5))
        leading = ask(0, 1)
        replicas.upstream.wait_for(lambda upstream: len(upstream.chat_requests) == before + 1, 20)
        following = [ask(number, 5) for number in (1, 2)]
        # They ask for the lease, and again while they wait.
        until(lambda: int(told(replicas.valkey, "evalsha")) > 20, "the others to wait")
        replicas.valkey.kill()
        assert [one.results() for one in following] == [{"MISS": 1, "HIT": 4}] * 2
        assert leading.results() == {"MISS": 1}
        assert len(replicas.upstream.chat_requests) == before + REPLICAS


def told(valkey: Valkey, command: str) -> str:
    """How often a server was given a command."""
    found = re.search(rb"cmdstat_%b:calls=(\d+)" % command.encode(), valkey.ask("INFO", "commandstats"))
    return found[1].decode() if found else "0"
