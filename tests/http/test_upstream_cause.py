"""Why an attempt failed: the same words on its span, on its log line and in the health."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.upstream.stream import event
from tests.fakes.streams import RawStream, text
from tests.fakes.upstream import (
    Behaviour,
    FakeUpstream,
    Garbage,
    NotJson,
    Reset,
    Silent,
    Status,
    refusing_port,
)
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import attributes, eventually, trace_of

CAUSE = "llmops.upstream.cause"
SETTINGS: dict[str, Any] = {
    "retry_max": 1,
    "retry_base_delay_s": 0.01,
    "llm_timeout_s": 0.5,
    "llm_connect_timeout_s": 0.25,
    "stream_chunk_timeout_s": 0.2,
    "breaker_failure_threshold": 1_000,
}


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(litellm_url=upstream.url, **SETTINGS) as app:
        yield app


@pytest.fixture
def patient(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    """An app whose time limit no busy machine reaches."""
    with running_app(litellm_url=upstream.url, **{**SETTINGS, "llm_timeout_s": 30.0}) as app:
        yield app


def ask(app: AppUnderTest, *, stream: bool = False) -> Answer:
    return app.call("POST", "/llm/generate", body={"prompt": "Why?", "stream": stream}, token=app.token())


def on_spans(app: AppUnderTest, answer: Answer) -> list[object]:
    """The cause on each attempt's span."""
    spans = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
    return [attributes(span).get(CAUSE) for span in spans]


def on_lines(app: AppUnderTest, answer: Answer) -> list[object]:
    """The cause on each line that tells of a failed attempt."""
    lines = app.lines(answer.request_id)
    return [line.get(CAUSE) for line in lines if line["message"].startswith("Attempt ")]


@pytest.mark.parametrize(
    ("behaviour", "cause"), [(Reset("body"), "reset"), (Garbage(), "protocol"), (Status(503), None)]
)
def test_each_attempt_says_why_it_failed(
    app: AppUnderTest, upstream: FakeUpstream, behaviour: Behaviour, cause: str | None
) -> None:
    upstream.script(behaviour, behaviour)
    answer = ask(app)
    assert answer.status == 502
    assert on_spans(app, answer) == on_lines(app, answer) == [cause, cause]
    assert str(cause) not in answer.json["message"]


STATUS, CODE = "llmops.upstream.status_code", "llmops.upstream.code"


@pytest.mark.parametrize(
    ("status", "said", "code"),
    [
        (503, {"message": "no"}, None),
        (400, {"message": "no", "code": "context_length_exceeded"}, "context_length_exceeded"),
        (
            500,
            {"message": "litellm.ContentPolicyViolationError: no", "code": "500"},
            "content_policy_violation",
        ),
        (401, {"message": "no", "code": "invalid_api_key"}, "invalid_api_key"),
        (429, {"message": "no", "code": "insufficient_quota"}, "insufficient_quota"),
        (400, {"message": "no", "code": "a_new_one"}, "other"),
        (302, {}, None),
    ],
)
def test_what_the_upstream_said_stands_on_span_and_line(
    patient: AppUnderTest, upstream: FakeUpstream, status: int, said: dict[str, str], code: str | None
) -> None:
    upstream.script(*[Status(status, {"error": said})] * 2)
    answer = ask(patient)
    spans = [span for span in trace_of(patient, answer.request_id) if span.name == "chat demo"]
    lines = patient.lines(answer.request_id)
    told = [
        line for line in lines if line["message"] == "llm_request_failed" or "Attempt " in line["message"]
    ]
    assert len(told) == (3 if status == 503 else 1)
    for fields in (*map(attributes, spans), *told):
        assert (fields[STATUS], fields.get(CODE)) == (status, code)


def test_an_answer_that_is_none_has_its_status(patient: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(NotJson())
    answer = ask(patient)
    (span,) = [span for span in trace_of(patient, answer.request_id) if span.name == "chat demo"]
    assert attributes(span)[STATUS] == 200


def test_an_error_within_a_stream_has_its_code(patient: AppUnderTest, upstream: FakeUpstream) -> None:
    error = {"message": "litellm.ContextWindowExceededError: too long", "type": None, "code": "400"}
    upstream.script(RawStream((text("a "), event(json.dumps({"error": error}).encode()))))
    answer = ask(patient, stream=True)
    (span,) = [span for span in trace_of(patient, answer.request_id) if span.name == "chat demo"]
    assert attributes(span)[STATUS] == 400
    assert attributes(span)[CODE] == "context_length_exceeded"
    (line,) = [line for line in patient.lines(answer.request_id) if line["message"] == "llm_request_failed"]
    assert (line["error"], line[CODE]) == ("BadRequestError", "context_length_exceeded")


def test_an_upstream_that_is_silent_is_a_read_timeout(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Silent())
    answer = ask(app)
    assert answer.status == 504
    assert on_spans(app, answer) == on_lines(app, answer) == ["read_timeout"]


@pytest.mark.parametrize(("end", "cause"), [("silence", "read_timeout"), ("reset", "reset"), ("end", None)])
def test_a_stream_that_breaks_says_why_on_its_span(
    app: AppUnderTest, upstream: FakeUpstream, end: str, cause: str | None
) -> None:
    upstream.script(RawStream((text("a "),), end))  # type: ignore[arg-type]
    answer = ask(app, stream=True)
    assert on_spans(app, answer) == [cause]


def test_a_connection_that_cannot_be_made_says_why_on_every_surface() -> None:
    # A resolver may take its time.
    settings = {**SETTINGS, "llm_timeout_s": 60.0, "llm_connect_timeout_s": 60.0}
    with refusing_port() as port:
        for host, cause in ((f"127.0.0.1:{port}", "refused"), ("no-such-host.invalid", "dns")):
            with running_app(litellm_url=f"http://{host}", **settings) as app:
                answer = ask(app)
                assert answer.status == 504
                assert set(on_spans(app, answer)) == set(on_lines(app, answer)) == {cause}
                health = eventually(lambda app=app: _litellm(app), "the first check")  # type: ignore[misc]
                assert health == f"Connection error ({cause})"


def _litellm(app: AppUnderTest) -> str | None:
    error: str = app.call("GET", "/health/detailed").json["details"]["litellm"]["error"]
    return None if error == "not checked yet" else error
