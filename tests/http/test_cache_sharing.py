"""Equal calls at the same time: one goes to the model, and all are answered, traced and paid for once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan

from tests.fakes.streams import Gate
from tests.fakes.upstream import Answer as Reply
from tests.fakes.upstream import FakeUpstream, Silent, Status
from tests.fakes.wire import Exchange
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import as_json, eventually

BODY = {"prompt": "What is a trace?"}


class Gated:
    """A behaviour that begins when the gate lets it."""

    def __init__(self, gate: Gate, behaviour: Any) -> None:
        self._gate = gate
        self._behaviour = behaviour

    async def play(self, exchange: Exchange) -> None:
        """Wait, then play."""
        await self._gate.step()
        await self._behaviour.play(exchange)


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(litellm_url=upstream.url, cache_enabled=True, max_in_flight=300) as served:
        yield served


def ask(app: AppUnderTest, token: str) -> Answer:
    return app.call("POST", "/llm/generate", body=BODY, token=token)


def calls(app: AppUnderTest) -> list[ReadableSpan]:
    return [span for span in app.spans() if span.name == "llm call"]


def in_flight(app: AppUnderTest, number: int) -> None:
    eventually(lambda: app.value("llmops.requests.in_flight") == number, f"{number} in flight", limit_s=30)
    eventually(
        lambda: len([line for line in app.lines() if line["message"] == "llm_request_started"]) >= number,
        "their calls to begin",
    )


def test_a_hundred_equal_calls_are_one_call_a_hundred_answers_a_hundred_traces(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    gate = Gate()
    upstream.script(Gated(gate, Reply()))
    token = app.token()
    with ThreadPoolExecutor(100) as pool:
        asking = [pool.submit(ask, app, token) for _ in range(100)]
        in_flight(app, 100)
        gate.allow()
        answers = [future.result() for future in asking]

    assert {answer.status for answer in answers} == {200}
    assert len(upstream.chat_requests) == 1
    assert len({answer.request_id for answer in answers}) == 100
    spans = calls(app)
    (worker,) = [span for span in spans if not span.links]
    linked = [link.context.span_id for span in spans for link in span.links]
    assert linked == [worker.context.span_id] * 99
    assert app.value("llmops.llm.calls", outcome="success") == 1
    assert app.value("llmops.llm.calls", outcome="cached") == 99
    assert app.value("llmops.llm.cost") == pytest.approx(0.00042)
    assert sorted(answer.headers["x-cache"] for answer in answers) == ["HIT"] * 99 + ["MISS"]
    assert sum(answer.json["cost"] for answer in answers) == pytest.approx(0.00042)


def leave_first(app: AppUnderTest, token: str) -> HTTPConnection:
    """Ask on a connection that the test can close."""
    connection = HTTPConnection("127.0.0.1", app.port)
    fields = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection.request("POST", "/llm/generate", as_json(BODY), fields)
    return connection


def test_the_first_caller_leaves_and_the_others_are_answered(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    gate = Gate()
    upstream.script(Gated(gate, Reply()))
    token = app.token()
    first = leave_first(app, token)
    upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
    with ThreadPoolExecutor(99) as pool:
        asking = [pool.submit(ask, app, token) for _ in range(99)]
        in_flight(app, 100)
        first.close()
        eventually(lambda: app.value("llmops.llm.calls", outcome="cancelled") == 1, "the first to be gone")
        gate.allow()
        answers = [future.result() for future in asking]

    assert [answer.status for answer in answers] == [200] * 99
    assert len(upstream.chat_requests) == 1
    assert upstream.disconnects == 0
    # Somebody has to pay: the next in line.
    assert app.value("llmops.llm.calls", outcome="success") == 1
    assert app.value("llmops.llm.calls", outcome="cached") == 98
    assert app.value("llmops.llm.cost") == pytest.approx(0.00042)


def test_the_work_is_stopped_when_all_have_left(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Silent())
    token = app.token()
    first = leave_first(app, token)
    upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
    second = leave_first(app, token)
    in_flight(app, 2)
    first.close()
    eventually(lambda: app.value("llmops.llm.calls", outcome="cancelled") == 1, "the first to be gone")
    assert upstream.disconnects == 0
    second.close()
    upstream.wait_for(lambda fake: fake.disconnects == 1)

    answer = ask(app, token)
    assert (answer.status, answer.headers["x-cache"]) == (200, "MISS")


def test_a_failure_is_shared_too_and_the_next_call_is_a_new_one(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    gate = Gate()
    upstream.script(Gated(gate, Status(500)))
    token = app.token()
    with ThreadPoolExecutor(10) as pool:
        asking = [pool.submit(ask, app, token) for _ in range(10)]
        in_flight(app, 10)
        gate.allow()
        answers = [future.result() for future in asking]

    assert {(answer.status, answer.json["error"]) for answer in answers} == {(502, "UpstreamError")}
    assert {answer.headers["x-cache"] for answer in answers} == {"MISS"}
    assert len({answer.json["incident_id"] for answer in answers}) == 10
    assert len(upstream.chat_requests) == 1
    assert app.value("llmops.llm.calls", outcome="error") == 10
    assert ask(app, token).status == 200


def test_users_do_not_share(app: AppUnderTest, upstream: FakeUpstream) -> None:
    gate = Gate()
    upstream.script(Gated(gate, Reply()), Gated(gate, Reply()))
    tokens = [app.token(), app.token("admin")]
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, app, token) for token in tokens]
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 2)
        gate.allow(2)
        assert [future.result().headers["x-cache"] for future in asking] == ["MISS", "MISS"]
