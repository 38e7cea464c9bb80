"""POST /llm/generate and GET /llm/models: what goes upstream, what comes back, and a caller who leaves."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.trace import SpanKind

from tests.fakes.upstream import Answer as Completion
from tests.fakes.upstream import Behaviour, Drip, FakeUpstream, NotJson, Silent, Status
from tests.harness import Answer, AppUnderTest
from tests.http.support import (
    LLM_CALLS,
    TraceParent,
    as_json,
    assert_error_body,
    assert_failed_once,
    attribute_sets,
    attributes,
    completed_line,
    http_request,
    module_app,
    server_span,
    trace_of,
    value_of,
)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=fake.url, litellm_api_key="key-for-litellm") as served:
        yield served


@pytest.fixture(scope="module")
def token(app: AppUnderTest) -> str:
    return app.token()


@pytest.fixture(autouse=True)
def _no_leftovers(fake: FakeUpstream) -> None:
    fake.clear()


def generate(app: AppUnderTest, token: str, **body: Any) -> Answer:
    return app.call("POST", "/llm/generate", body={"prompt": "What is a trace?", **body}, token=token)


def test_every_parameter_reaches_the_upstream_with_our_key(
    app: AppUnderTest, fake: FakeUpstream, token: str
) -> None:
    parameters = {
        "model": "other-model",
        "temperature": 0.25,
        "max_tokens": 77,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    }
    answer = generate(app, token, system_prompt="Be brief.", **parameters)

    assert answer.status == 200
    assert answer.json["model"] == "other-model"
    (sent,) = fake.chat_requests
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a trace?"},
    ]
    assert sent.json == {"messages": messages, **parameters}
    assert sent.path == "/v1/chat/completions"
    assert sent.headers["authorization"] == "Bearer key-for-litellm"
    assert token not in str(sent.headers)


def test_what_was_not_given_is_not_sent(app: AppUnderTest, fake: FakeUpstream, token: str) -> None:
    assert generate(app, token).status == 200
    (sent,) = fake.chat_requests
    assert sent.json == {"model": "demo", "messages": [{"role": "user", "content": "What is a trace?"}]}


@pytest.mark.parametrize(
    ("completion", "changed"),
    [
        (Completion(usage=False), {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None}),
        (Completion(cost=None), {"cost": None}),
        (Completion(cost="nan"), {"cost": None}),
        (Completion(content=None), {"response": ""}),
        (Completion(content="naïve 🙂 \x00"), {"response": "naïve 🙂 \x00"}),
        (
            Completion(extra={"usage": {"prompt_tokens": "many"}}),
            {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None},
        ),
    ],
    ids=["no usage", "no cost", "cost nan", "content null", "odd text", "usage of another shape"],
)
def test_what_the_upstream_leaves_out_is_null(
    app: AppUnderTest, fake: FakeUpstream, token: str, completion: Completion, changed: dict[str, Any]
) -> None:
    fake.script(completion)
    answer = generate(app, token)

    assert answer.status == 200, answer.body
    assert answer.json == {
        "response": "Hello from the fake.",
        "model": "demo",
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "total_tokens": 30,
        "cost": 0.00042,
        "cache": "bypass",
        "request_id": answer.request_id,
        **changed,
    }


@pytest.mark.parametrize("when", ["before an answer", "in the middle of one"])
def test_a_caller_who_leaves_stops_the_models_work(
    app: AppUnderTest, fake: FakeUpstream, token: str, when: str
) -> None:
    before, gone = attribute_sets(app, LLM_CALLS), fake.disconnects
    fake.script(Silent() if when == "before an answer" else Drip(interval_s=0.2))
    parent = TraceParent.new("01")
    assert parent.trace_id
    headers = {"Authorization": f"Bearer {token}".encode(), "traceparent": parent.header.encode()}
    with socket.create_connection(("127.0.0.1", app.port)) as connection:
        connection.sendall(http_request("POST", b"/llm/generate", headers, as_json({"prompt": "hi"})))
        fake.wait_for(lambda upstream: len(upstream.chat_requests) == 1)
        assert fake.disconnects == gone
    fake.wait_for(lambda upstream: upstream.disconnects == gone + 1, timeout_s=1)

    assert_failed_once(app, parent.trace_id, "cancelled", before)
    server = server_span(app, parent.trace_id)
    assert attributes(server)["error.type"] == "CallerLeftError"
    assert completed_line(app, parent.trace_id)["error"] == "CallerLeftError"
    assert completed_line(app, parent.trace_id)["http.response.status_code"] == 499
    assert attributes(server)["http.response.status_code"] == 499
    (chat,) = [span for span in trace_of(app, parent.trace_id) if span.name == "chat demo"]
    assert attributes(chat)["error.type"] == "cancelled"


def test_a_call_is_counted_in_tokens_and_money(app: AppUnderTest, fake: FakeUpstream, token: str) -> None:
    cost, calls = value_of(app, "llmops.llm.cost", {"model": "demo"}), attribute_sets(app, LLM_CALLS)
    fake.script(Completion(prompt_tokens=3, completion_tokens=4, cost="0.5"))
    answer = generate(app, token, temperature=0.5, max_tokens=9)

    assert (answer.json["total_tokens"], answer.json["cost"]) == (7, 0.5)
    (chat,) = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
    assert chat.kind is SpanKind.CLIENT
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
        "llmops.llm.cost": 0.5,
    }
    assert expected.items() <= dict(attributes(chat)).items()
    assert value_of(app, "llmops.llm.cost", {"model": "demo"}) == pytest.approx(cost + 0.5)
    key = frozenset({"model": "demo", "outcome": "success"}.items())
    assert attribute_sets(app, LLM_CALLS)[key] == calls[key] + 1
    (line,) = [line for line in app.lines(answer.request_id) if line["message"] == "llm_request_completed"]
    assert (line["prompt_tokens"], line["completion_tokens"], line["total_tokens"]) == (3, 4, 7)
    assert (line["cost"], line["model"], line["user"]) == (0.5, "demo", "user")


def test_the_models_on_offer_are_listed(app: AppUnderTest, token: str) -> None:
    answer = app.call("GET", "/llm/models", token=token)

    assert answer.status == 200
    assert answer.json == {"models": ["demo", "other-model"], "default_model": "demo"}
    assert [span.name for span in trace_of(app, answer.request_id)] == ["GET /llm/models", "GET"]


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        (Status(500), 502),
        (Status(401), 502),
        (Status(429), 429),
        (NotJson(), 502),
        (NotJson(b'{"data": 7}', "application/json"), 502),
    ],
)
def test_models_that_cannot_be_listed_are_an_error(
    app: AppUnderTest, fake: FakeUpstream, token: str, behaviour: Behaviour, status: int
) -> None:
    fake.models_behaviour = behaviour
    try:
        answer = app.call("GET", "/llm/models", token=token)
    finally:
        fake.models_behaviour = None

    assert answer.status == status
    assert_error_body(app, answer, "RateLimitError" if status == 429 else "UpstreamError")
