"""A call with retries and breaker, as its caller and its trace show it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind

from tests.fakes.upstream import Answer, FakeUpstream, Silent, Status
from tests.harness import Answer as Reply
from tests.harness import AppUnderTest, running_app
from tests.http.support import eventually, trace_of


@pytest.fixture
def resilient(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(
        litellm_url=upstream.url,
        retry_max=3,
        retry_base_delay_s=0.02,
        llm_timeout_s=2.0,
        llm_connect_timeout_s=0.5,
        breaker_failure_threshold=5,
        breaker_timeout_s=60.0,
    ) as app:
        yield app


def ask(app: AppUnderTest, token: str) -> Reply:
    return app.call("POST", "/llm/generate", body={"prompt": "What is a retry?"}, token=token)


def timings(answer: Reply) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in re.findall(r"(\w+);dur=([0-9.]+)", answer.headers["server-timing"])
    }


def named(spans: list[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def test_a_retried_call_tells_it_attempt_by_attempt(resilient: AppUnderTest, upstream: FakeUpstream) -> None:
    token = resilient.token()
    upstream.script(Status(503), Status(500), Answer())
    answer = ask(resilient, token)

    assert answer.status == 200
    assert answer.headers["x-llm-attempts"] == "3"
    spent = timings(answer)
    assert set(spent) == {"auth", "llm", "retry", "total"}
    assert spent["retry"] >= 20 + 40
    assert spent["total"] >= spent["retry"] + spent["llm"]
    assert len(upstream.chat_requests) == 3

    spans = trace_of(resilient, answer.request_id)
    attempts = named(spans, "chat demo")
    assert [dict(span.attributes or {}).get("error.type") for span in attempts] == [
        "UpstreamError",
        "UpstreamError",
        None,
    ]
    assert len([span for span in spans if span.kind is SpanKind.SERVER]) == 1
    (call,) = named(spans, "llm call")
    assert {span.parent.span_id for span in attempts if span.parent} == {call.context.span_id}
    assert [event.name for event in call.events] == [
        "llmops.retry.scheduled",
        "llmops.retry.scheduled",
        "llmops.retry.succeeded",
    ]
    first = dict(call.events[0].attributes or {})
    assert first["attempt"] == 1
    assert first["error.type"] == "UpstreamError"
    assert isinstance(first["delay_s"], float)
    assert isinstance(first["remaining_s"], float)
    assert 0 < first["remaining_s"] <= 2.0
    attributes = dict(call.attributes or {})
    assert attributes["llmops.llm.attempts"] == 3
    assert attributes["llmops.llm.outcome"] == "success"
    messages = [
        re.sub(r"in 0\.[01]s", "in 0.0s", line["message"]) for line in resilient.lines(answer.request_id)
    ]
    assert messages == [
        "llm_request_started",
        "Attempt 1: HTTP 503",
        "Retrying in 0.0s...",
        "Attempt 2: HTTP 500",
        "Retrying in 0.0s...",
        "Attempt 3: Success",
        "llm_request_completed",
        "http_request_completed",
    ]
    assert resilient.value("llmops.retry.attempts", outcome="retried", operation="chat") == 2
    assert resilient.value("llmops.retry.attempts", outcome="success", operation="chat") == 1
    exported = [record.log_record.event_name for record in resilient.records()]
    assert exported.count("llmops.retry.scheduled") == 2
    assert exported.count("llmops.retry.succeeded") == 1


def test_a_call_that_succeeds_at_once_says_one_attempt_and_no_retry(
    resilient: AppUnderTest, upstream: FakeUpstream
) -> None:
    del upstream
    answer = ask(resilient, resilient.token())
    assert answer.headers["x-llm-attempts"] == "1"
    assert set(timings(answer)) == {"auth", "llm", "total"}


def test_server_timing_can_be_switched_off(upstream: FakeUpstream) -> None:
    with running_app(litellm_url=upstream.url, server_timing=False) as app:
        answer = ask(app, app.token())
    assert answer.headers["x-llm-attempts"] == "1"
    assert "server-timing" not in answer.headers


def test_the_fifth_failed_call_opens_the_callers_circuit_and_nobody_elses(
    resilient: AppUnderTest, upstream: FakeUpstream
) -> None:
    token = resilient.token()
    upstream.default = Status(500)
    *failed, third = (ask(resilient, token) for _ in range(6))

    assert [answer.status for answer in (*failed, third)] == [502] * 5 + [503]
    assert [answer.headers["x-llm-attempts"] for answer in (*failed, third)] == ["4"] * 5 + ["0"]
    assert len(upstream.chat_requests) == 20
    assert third.json["error"] == "CircuitOpenError"
    assert 55 <= int(third.headers["retry-after"]) <= 60

    (call,) = named(trace_of(resilient, failed[-1].request_id), "llm call")
    assert [event.name for event in call.events][-2:] == [
        "llmops.retry.exhausted",
        "llmops.circuit_breaker.state_changed",
    ]
    changed = dict(call.events[-1].attributes or {})
    assert changed == {"breaker": "model", "model": "demo", "from": "closed", "to": "open", "failures": 5}
    spans = trace_of(resilient, third.request_id)
    assert named(spans, "chat demo") == []
    (call,) = named(spans, "llm call")
    assert [event.name for event in call.events] == ["llmops.circuit_breaker.rejected"]
    assert resilient.value("llmops.circuit_breaker.open_callers", model="demo") == 1
    assert resilient.value("llmops.circuit_breaker.state", state="open") == 0
    assert resilient.value("llmops.circuit_breaker.rejections", breaker="model", model="demo") == 1
    assert resilient.value("llmops.llm.calls", outcome="error", error__type="CircuitOpenError") == 1

    upstream.default = Answer()
    assert ask(resilient, resilient.token("admin")).status == 200
    other = {"prompt": "What is a retry?", "model": "other-model"}
    assert resilient.call("POST", "/llm/generate", body=other, token=token).status == 200


def test_two_callers_open_circuits_open_the_models_for_everybody(upstream: FakeUpstream) -> None:
    upstream.default = Status(500)
    policy: dict[str, Any] = {"retry_max": 0, "breaker_failure_threshold": 1, "breaker_timeout_s": 1.0}
    with running_app(litellm_url=upstream.url, **policy) as app:
        tokens = app.token(), app.token("admin")
        assert [ask(app, token).status for token in tokens] == [502, 502]
        assert app.value("llmops.circuit_breaker.state", breaker="model", model="demo", state="open") == 1
        assert app.value("llmops.circuit_breaker.open_callers", model="demo") == 2
        other = {"prompt": "What is a retry?", "model": "other-model"}
        upstream.default = Answer()
        assert app.call("POST", "/llm/generate", body=other, token=tokens[0]).status == 200

        eventually(
            lambda: app.value("llmops.circuit_breaker.state", model="demo", state="half_open") == 1,
            "the time-out",
        )
        # One probe, whose success closes every caller's circuit for the model.
        assert [ask(app, token).status for token in tokens] == [200, 200]
        assert app.value("llmops.circuit_breaker.state", model="demo", state="closed") == 1
        assert app.value("llmops.circuit_breaker.open_callers", model="demo") == 0


@pytest.mark.parametrize("status", [400, 422, 429])
def test_a_refusal_neither_counts_nor_keeps_a_circuit_open(upstream: FakeUpstream, status: int) -> None:
    policy: dict[str, Any] = {"retry_max": 0, "breaker_failure_threshold": 2, "breaker_timeout_s": 0.3}
    with running_app(litellm_url=upstream.url, **policy) as app:
        token = app.token()
        upstream.default = Status(status)
        for _ in range(4):
            assert ask(app, token).status in {400, 429}
        upstream.default = Status(500)
        assert [ask(app, token).status for _ in range(3)] == [502, 502, 503]
        upstream.default = Status(status)
        eventually(lambda: ask(app, token).status != 503, "the probe")
        assert app.value("llmops.circuit_breaker.open_callers", model="demo") == 0


LITELLM_SAYS = {
    "wrong type": "litellm.APIConnectionError: OpenAIException - 'int' object is not iterable",
    "no attribute": "litellm.APIConnectionError: 'str' object has no attribute 'get'",
    "format": "litellm.APIConnectionError: Unsupported response_format type - 1",
    "options": "litellm.types.llms.openai.X() argument after ** must be a mapping, not int",
    "round": "litellm.APIConnectionError: type str doesn't define __round__ method",
    "message": "litellm.APIConnectionError: Invalid user message at index 0. Please ensure all are valid.",
    "refused": "litellm.BadRequestError: OpenAIException - temperature is too high",
    "nested": "litellm.InternalServerError: InternalServerError: litellm.UnsupportedParamsError: no x here",
    "context": "litellm.ContextWindowExceededError: litellm.BadRequestError: OpenAIException - too long",
    "filter": "litellm.APIError: litellm.ContentPolicyViolationError: filtered",
}


@pytest.mark.parametrize("said", LITELLM_SAYS.values(), ids=LITELLM_SAYS)
def test_a_500_about_the_request_is_the_callers_and_touches_no_circuit(
    resilient: AppUnderTest, upstream: FakeUpstream, said: str
) -> None:
    token = resilient.token()
    more = "\n\nLiteLLM: model group 'demo' failed with the error above. No fallback was attempted."
    upstream.default = litellm_error(500, said + more)
    answers = [ask(resilient, token) for _ in range(6)]
    assert {(answer.status, answer.headers["x-llm-attempts"]) for answer in answers} == {(400, "1")}
    assert answers[0].json["error"] == "BadRequestError"
    assert "object" not in answers[0].json["message"]
    assert resilient.value("llmops.circuit_breaker.open_callers", model="demo") == 0
    upstream.default = Answer()
    assert ask(resilient, token).status == 200


@pytest.mark.parametrize(
    "said",
    [
        "litellm.InternalServerError: InternalServerError: OpenAIException - The server had an error",
        "litellm.ServiceUnavailableError: overloaded. Handle with `litellm.BadRequestError`.",
        # What a provider's answer lacks shows as None.
        "litellm.APIConnectionError: 'NoneType' object is not subscriptable",
        "litellm.InternalServerError: no.\n\nError doing the fallback: litellm.BadRequestError: no model",
    ],
)
def test_a_500_that_is_the_upstreams_own_is_retried_and_counts(
    resilient: AppUnderTest, upstream: FakeUpstream, said: str
) -> None:
    upstream.default = litellm_error(500, said)
    token = resilient.token()
    answers = [ask(resilient, token) for _ in range(6)]
    assert [answer.status for answer in answers] == [502] * 5 + [503]
    assert answers[0].headers["x-llm-attempts"] == "4"


def litellm_error(status: int, message: str, kind: str = "internal_server_error") -> Status:
    return Status(status, {"error": {"message": message, "type": kind, "param": None, "code": str(status)}})


def test_a_500_of_the_type_of_an_invalid_request_is_the_callers(
    resilient: AppUnderTest, upstream: FakeUpstream
) -> None:
    upstream.script(litellm_error(500, "no", "invalid_request_error"))
    answer = ask(resilient, resilient.token())
    assert (answer.status, answer.headers["x-llm-attempts"]) == (400, "1")


def test_a_408_is_the_callers_where_the_request_has_its_own_limit(upstream: FakeUpstream) -> None:
    policy: dict[str, Any] = {"retry_max": 1, "retry_base_delay_s": 0.01, "pass_litellm_fields": ["timeout"]}
    with running_app(litellm_url=upstream.url, **policy) as app:
        token = app.token()
        body = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
        timeout = litellm_error(408, "litellm.Timeout: Request timed out.", "invalid_request_error")
        upstream.script(timeout, timeout, timeout)
        own = app.call("POST", "/v1/chat/completions", body={**body, "timeout": 0.001}, token=token)
        assert (own.status, own.headers["x-llm-attempts"]) == (400, "1")
        assert own.json["error"]["param"] == "timeout"
        litellms = app.call("POST", "/v1/chat/completions", body=body, token=token)
        assert (litellms.status, litellms.headers["x-llm-attempts"]) == (504, "2")


def test_the_deadline_covers_attempts_and_waits_together(upstream: FakeUpstream) -> None:
    upstream.default = Status(500)
    with running_app(
        litellm_url=upstream.url,
        retry_max=3,
        retry_base_delay_s=0.4,
        llm_timeout_s=1.0,
        llm_connect_timeout_s=0.5,
    ) as app:
        answer = ask(app, app.token())
        assert answer.status == 502
        assert answer.headers["x-llm-attempts"] == "2"
        (call,) = named(trace_of(app, answer.request_id), "llm call")
        assert [event.name for event in call.events] == ["llmops.retry.scheduled", "llmops.retry.exhausted"]
        assert dict(call.events[1].attributes or {})["reason"] == "deadline"
        assert dict(call.attributes or {})["llmops.retry.outcome"] == "deadline"


def test_a_silent_upstream_spends_the_deadline_in_one_attempt(
    resilient: AppUnderTest, upstream: FakeUpstream
) -> None:
    upstream.default = Silent()
    answer = ask(resilient, resilient.token())
    assert answer.status == 504
    assert answer.headers["x-llm-attempts"] == "1"


def test_retry_after_of_a_503_is_waited_for(upstream: FakeUpstream) -> None:
    upstream.script(Status(503, headers={"Retry-After": "1"}), Answer())
    with running_app(litellm_url=upstream.url, retry_max=3, retry_base_delay_s=0.01) as app:
        answer = ask(app, app.token())
    assert answer.status == 200
    assert timings(answer)["retry"] >= 1_000
