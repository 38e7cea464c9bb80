"""Bytes and values that are legal somewhere and break things elsewhere, from caller and upstream."""

import pytest

from tests.fakes.upstream import Answer as Completion
from tests.fakes.upstream import FakeUpstream, Garbage, Status
from tests.harness import AppUnderTest, running_app
from tests.http.support import completed_line, trace_of


@pytest.mark.parametrize(
    "response_format",
    [
        *(b'{"type":"\\ud83d"}', b'{"\\ud83d":1}', b'{"a":NaN}', b'{"a":1e999}'),
        *(b"{}", b'{"type":5}', b'{"type":"json_schema"}', b'{"type":"json_schema","json_schema":5}'),
    ],
)
def test_a_response_format_that_no_json_can_say_or_no_provider_reads_is_refused(
    service: AppUnderTest, response_format: bytes
) -> None:
    body = b'{"prompt":"hi","response_format":' + response_format + b"}"
    assert service.call("POST", "/llm/generate", body=body, token=service.token()).status == 422


def test_half_a_surrogate_pair_is_no_password(service: AppUnderTest) -> None:
    body = b'{"username":"user","password":"\\ud83d"}'
    assert service.call("POST", "/auth/login", body=body).status == 422


@pytest.mark.parametrize(
    "body", [b'{"prompt":"\xff"}', b"[" * 100_000, b'{"max_tokens":' + b"9" * 5_000 + b"}"]
)
def test_a_body_that_is_no_json_is_a_validation_error(service: AppUnderTest, body: bytes) -> None:
    answer = service.call("POST", "/llm/generate", body=body, token=service.token())
    assert (answer.status, answer.json["error"]) == (422, "ValidationError")


@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        (Completion(content="\ud83d"), 200),
        (Completion(model="\ud83d"), 200),
        (Completion(extra={"id": "\ud83d"}), 200),
        (Status(400, b'{"error":{"message":"no \\ud83d"}}'), 400),
        (Status(400, b'{"error":{"message":["no"]}}'), 400),
    ],
)
def test_half_an_emoji_from_upstream_is_answered(
    service: AppUnderTest, upstream: FakeUpstream, behaviour: Completion | Status, status: int
) -> None:
    upstream.script(behaviour)
    answer = service.call("POST", "/llm/generate", body={"prompt": "hi"}, token=service.token())
    assert answer.status == status
    assert trace_of(service, answer.request_id)


def test_an_absurd_count_counts_as_none(service: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Completion(prompt_tokens=10**30, cost="1e300"))
    answer = service.call("POST", "/llm/generate", body={"prompt": "hi"}, token=service.token())
    assert answer.json["prompt_tokens"] is None
    assert answer.json["cost"] is None


def test_bytes_from_upstream_are_not_quoted_on_a_span(service: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Garbage(b"canary prompt\r\n\r\n"))
    answer = service.call("POST", "/llm/generate", body={"prompt": "canary prompt"}, token=service.token())
    assert "canary" not in "".join(span.to_json() for span in trace_of(service, answer.request_id))


def test_a_key_that_no_header_can_carry_is_not_quoted_on_a_span(upstream: FakeUpstream) -> None:
    with running_app(litellm_url=upstream.url, litellm_api_key="canary-key\n") as app:
        answer = app.call("POST", "/llm/generate", body={"prompt": "hi"}, token=app.token())
        assert "canary" not in "".join(span.to_json() for span in trace_of(app, answer.request_id))


def test_a_bug_in_the_background_does_not_end_the_lifespan(upstream: FakeUpstream) -> None:
    # No request can have a URL of more than 65,536 characters, which no setting rules out.
    url = upstream.url + "/a".ljust(65_530 - len(upstream.url), "a")
    with running_app(litellm_url=url) as app:
        answer = app.call("POST", "/llm/generate", body={"prompt": "hi"}, token=app.token())
        assert answer.status == 500
        assert trace_of(app, answer.request_id)
    messages = [line["message"] for line in app.lines()]
    assert "The list of models could not be read" in messages
    assert any(message.startswith("Graceful shutdown completed") for message in messages)


def test_the_line_of_a_sign_in_says_who(service: AppUnderTest) -> None:
    body = {"username": "user", "password": service.passwords["user"]}
    answer = service.call("POST", "/auth/login", body=body)
    assert completed_line(service, answer.request_id)["user"] == "user"
