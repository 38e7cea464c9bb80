"""One log line of a failed request says all that its answer says, for every error, in every protocol."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from service.errors import PUBLIC_ERRORS, Cause, ServiceError
from tests.fakes.behaviours import Reset, Status, Stream
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest
from tests.http.streaming import stream
from tests.http.support import completed_line, module_app, trace_of

CANARY = "a canary, 4711"
PREFIXES = ("/test", "/v1/test", "/v1/messages/test")


def raised(name: str) -> ServiceError:
    """An error of this name, with everything that an error can have and its class does not set itself."""
    kind = next(error for error in PUBLIC_ERRORS if error.__name__ == name)
    error = kind(f"What happened to {name}.")
    error.param, error.code, error.retry_after_s = "messages.0.role", error.code or "a_code", 2.5
    error.upstream_status, error.upstream_code, error.cause = 418, "other", Cause.RESET
    error.details = (
        {"field": "body.messages.0.role", "message": "must be a text", "type": "string_type"},
        {"field": f"body.{CANARY}", "message": "is not known", "type": "extra_forbidden"},
    )
    return error


def add_routes(app: FastAPI) -> None:
    for prefix in PREFIXES:

        @app.get(prefix + "/{name}")
        async def fail(name: str) -> None:
            raise raised(name)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(add_routes, litellm_url=fake.url, retry_max=1, retry_base_delay_s=0.01) as served:
        yield served


@pytest.fixture(scope="module")
def token(app: AppUnderTest) -> str:
    return app.token()


def said(answer: Answer) -> dict[str, Any]:
    """An error's body in one form for all protocols."""
    body = answer.json
    inner = body["error"] if isinstance(body["error"], dict) else body
    name = inner.get("name") or (inner["type"] if inner is not body else body["error"])
    return {**inner, "name": name}


def assert_says_the_same(app: AppUnderTest, answer: Answer) -> dict[str, Any]:
    """The request's last line has all that the answer has, and each of its lines the incident's id."""
    line, body = completed_line(app, answer.request_id), said(answer)
    assert (line["error"], line["llmops.error.message"]) == (body["name"], body["message"])
    assert line["llmops.error.retry"] is ("x-should-retry" not in answer.headers)
    wait = answer.headers.get("retry-after")
    assert line.get("llmops.error.retry_after") == (None if wait is None else int(wait))
    assert line["http.response.status_code"] == answer.status
    assert line["llmops.error.fault"] in {"caller", "upstream", "cache", "service"}
    for field in ("code", "param"):
        if field in body:
            assert line.get(f"llmops.error.{field}") == body[field]
    for each in app.lines(answer.request_id):
        assert each["incident_id"] == body["incident_id"]
        assert each["trace_id"] == answer.request_id
    return line


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", [error.__name__ for error in PUBLIC_ERRORS])
def test_the_line_says_what_the_body_says(app: AppUnderTest, prefix: str, name: str) -> None:
    answer = app.call("GET", f"{prefix}/{name}")

    line = assert_says_the_same(app, answer)
    assert line["llmops.error.fields"] == ["body.messages.0.role: string_type", "?: extra_forbidden"]
    assert (line["llmops.upstream.status_code"], line["llmops.upstream.code"]) == (418, "other")
    assert line["llmops.upstream.cause"] == "reset"
    assert CANARY not in json.dumps(app.lines(answer.request_id))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/llm/generate", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
    ],
)
def test_both_lines_of_a_failed_call_say_it(
    app: AppUnderTest, fake: FakeUpstream, token: str, path: str, body: Any
) -> None:
    fake.script(Status(503), Status(503))
    answer = app.call("POST", path, body=body, token=token)
    assert answer.status == 502

    line = assert_says_the_same(app, answer)
    (call,) = [each for each in app.lines(answer.request_id) if each["message"] == "llm_request_failed"]
    told = {
        name: value for name, value in line.items() if name.startswith(("llmops.error", "llmops.upstream"))
    }
    assert told.items() <= call.items()
    assert (call["error"], call["llmops.upstream.status_code"]) == ("UpstreamError", 503)


def test_what_ends_a_stream_is_on_its_lines(app: AppUnderTest, fake: FakeUpstream, token: str) -> None:
    fake.script(Stream(cut_after=1))
    answer = stream(app, token)
    assert answer.status == 200
    event = json.loads(answer.body.decode().strip().split("\n\n")[-1].removeprefix("data: "))["error"]

    line = completed_line(app, answer.request_id)
    assert (line["error"], line["llmops.error.message"]) == (event["type"], event["message"])
    assert (line["incident_id"], line["llmops.upstream.cause"]) == (event["incident_id"], "reset")
    (call,) = [each for each in app.lines(answer.request_id) if each["message"] == "llm_request_failed"]
    assert call["llmops.error.message"] == event["message"]


def test_a_field_that_the_caller_made_up_is_not_repeated(app: AppUnderTest, token: str) -> None:
    body = {"prompt": "hi", CANARY: 1, "sk-0123456789abcdef0123456789abcdef": 2}
    answer = app.call("POST", "/llm/generate", body=body, token=token)
    assert answer.status == 422
    assert CANARY in answer.json["message"]

    trace_of(app, answer.request_id)
    logged = json.dumps(app.lines(answer.request_id))
    assert CANARY not in logged
    assert "0123456789abcdef" not in logged
    line = completed_line(app, answer.request_id)
    assert line["llmops.error.fields"] == ["?: extra_forbidden", "?: extra_forbidden"]
    assert "?" in line["llmops.error.message"]


def test_a_connection_that_breaks_has_its_cause(app: AppUnderTest, fake: FakeUpstream, token: str) -> None:
    fake.script(Reset(), Reset())
    answer = app.call("POST", "/llm/generate", body={"prompt": "hi"}, token=token)
    assert assert_says_the_same(app, answer)["llmops.upstream.cause"] == "reset"
