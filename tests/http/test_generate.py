"""Each way in which the upstream fails is told to the caller and recorded once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.fakes.upstream import (
    AcceptOnly,
    Behaviour,
    Drip,
    Endless,
    FakeUpstream,
    Garbage,
    NotJson,
    Reset,
    Silent,
    Status,
    WrongLength,
    refusing_port,
)
from tests.fakes.upstream import Answer as Completion
from tests.harness import Answer, AppUnderTest
from tests.http.support import (
    LLM_CALLS,
    assert_error_body,
    assert_failed_once,
    attribute_sets,
    module_app,
    trace_of,
)

LIMIT_S = 0.5
LIMITS = {"llm_timeout_s": LIMIT_S, "llm_connect_timeout_s": 0.2}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=fake.url, litellm_api_key="key-for-litellm", **LIMITS) as served:
        yield served


@pytest.fixture(scope="module")
def token(app: AppUnderTest) -> str:
    return app.token()


@pytest.fixture(autouse=True)
def _no_leftovers(fake: FakeUpstream) -> None:
    fake.clear()


@dataclass(frozen=True)
class Expected:
    """How one call ends."""

    status: int
    error: str
    message: str = ""
    retry_after: str | None = None


TIMED_OUT = Expected(504, "UpstreamTimeoutError", "did not answer within 0.5 s")
BROKEN = Expected(502, "UpstreamError", "broke the connection")
NONSENSE = Expected(502, "UpstreamError", "not an answer")
OUR_KEY = Expected(502, "UpstreamError", "credentials")
NO_DATABASE = {"error": {"message": "No connected db.", "type": "no_db_connection", "code": "400"}}
BAD_PARAMETER = {"error": {"message": "temperature is too high for this", "type": "invalid_request_error"}}

FAILURES: Mapping[str, tuple[Behaviour, Expected]] = {
    "500": (Status(500), Expected(502, "UpstreamError")),
    "503": (Status(503), Expected(502, "UpstreamError")),
    "500 without a body": (Status(500, b""), Expected(502, "UpstreamError")),
    "401": (Status(401), OUR_KEY),
    "403": (Status(403), OUR_KEY),
    "400 no_db_connection": (Status(400, NO_DATABASE), OUR_KEY),
    "400": (Status(400, BAD_PARAMETER), Expected(400, "BadRequestError", "temperature is too high")),
    "408": (Status(408), Expected(504, "UpstreamTimeoutError")),
    "429": (
        Status(429, headers={"Retry-After": "7"}),
        Expected(429, "RateLimitError", "rate limit", retry_after="7"),
    ),
    "429 without Retry-After": (Status(429), Expected(429, "RateLimitError", retry_after="1")),
    "silent": (Silent(), TIMED_OUT),
    "drip": (Drip(interval_s=0.1), TIMED_OUT),
    "endless": (Endless(), TIMED_OUT),
    "garbage": (Garbage(), BROKEN),
    "not json": (NotJson(), NONSENSE),
    "json, and no object": (NotJson(b"[1]", "application/json"), NONSENSE),
    "nested too deep": (NotJson(b"[" * 100_000, "application/json"), NONSENSE),
    "not utf-8": (NotJson(b'{"choices": "\xff"}', "application/json"), NONSENSE),
    "wrong length": (WrongLength(), BROKEN),
    "reset before": (Reset("before"), BROKEN),
    "reset in headers": (Reset("headers"), BROKEN),
    "reset in body": (Reset("body"), BROKEN),
    "empty choices": (Completion(choices=False), NONSENSE),
    "choices of another shape": (Completion(extra={"choices": [7]}), NONSENSE),
    "content of another shape": (Completion(extra={"choices": [{"message": {"content": 7}}]}), NONSENSE),
    "accepts and reads nothing": (AcceptOnly(), TIMED_OUT),
}


def generate(app: AppUnderTest, token: str, **body: Any) -> Answer:
    return app.call("POST", "/llm/generate", body={"prompt": "What is a trace?", **body}, token=token)


@pytest.mark.parametrize("failure", FAILURES)
def test_each_failure_is_told_and_recorded_once(
    app: AppUnderTest, fake: FakeUpstream, token: str, failure: str
) -> None:
    behaviour, expected = FAILURES[failure]
    before = attribute_sets(app, LLM_CALLS)
    fake.script(behaviour)
    answer = generate(app, token)

    assert_failed(app, answer, expected)
    assert_failed_once(app, answer.request_id, expected.error, before)
    assert len(fake.chat_requests) == 1


def test_a_refused_connection_is_told_and_recorded_once() -> None:
    with refusing_port() as port, module_app(litellm_url=f"http://127.0.0.1:{port}", **LIMITS) as app:
        token = app.token()
        before = attribute_sets(app, LLM_CALLS)
        answer = generate(app, token)

        assert_failed(app, answer, Expected(504, "UpstreamTimeoutError", "cannot be reached"))
        assert_failed_once(app, answer.request_id, "UpstreamTimeoutError", before)


def test_a_redirect_is_not_followed_and_the_key_stays_here(
    app: AppUnderTest, fake: FakeUpstream, token: str
) -> None:
    before = attribute_sets(app, LLM_CALLS)
    with FakeUpstream() as elsewhere:
        fake.script(Status(307, headers={"Location": f"{elsewhere.url}/v1/chat/completions"}))
        answer = generate(app, token)

        assert_failed(app, answer, Expected(502, "UpstreamError"))
        assert_failed_once(app, answer.request_id, "UpstreamError", before)
        assert elsewhere.connections == 0


def assert_failed(app: AppUnderTest, answer: Answer, expected: Expected) -> None:
    assert answer.status == expected.status, answer.body
    assert_error_body(app, answer, expected.error)
    assert expected.message in answer.json["message"]
    assert answer.headers.get("retry-after") == expected.retry_after
    if expected is TIMED_OUT:
        assert answer.seconds > LIMIT_S * 0.9


def test_an_unknown_model_is_the_callers_and_is_called_other_on_every_metric(
    app: AppUnderTest, token: str
) -> None:
    # The list is known from here on.
    assert app.call("GET", "/llm/models", token=token).status == 200
    before = attribute_sets(app, LLM_CALLS)
    answer = generate(app, token, model="invented-name")

    assert answer.status == 400
    assert_error_body(app, answer, "BadRequestError")
    assert answer.json["message"] == "Model 'invented-name' not found"
    assert answer.headers["x-llm-attempts"] == "0"
    grown = {key: count - before.get(key, 0) for key, count in attribute_sets(app, LLM_CALLS).items()}
    labels = {"model": "other", "outcome": "error", "error.type": "BadRequestError"}
    assert {key: count for key, count in grown.items() if count} == {frozenset(labels.items()): 1}
    assert {line["model"] for line in app.lines(answer.request_id) if "model" in line} == {"invented-name"}
    assert not [span for span in trace_of(app, answer.request_id) if span.name.startswith("chat")]
    data = app.metrics_out.get_metrics_data()
    assert data
    assert "invented-name" not in data.to_json()
