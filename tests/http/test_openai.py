"""The routes under /v1: what passes through, what is refused, and every error in OpenAI's shape."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from openai import InternalServerError, OpenAI

from tests.fakes.streams import DONE, RawStream, chunk, text
from tests.fakes.upstream import FakeUpstream, NotJson, Reset, Silent, Status, refusing_port
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.openai_bodies import ANSWERS, REQUESTS
from tests.http.streaming import CHAT
from tests.http.support import (
    assert_failed_once,
    attribute_sets,
    attributes,
    module_app,
    server_span,
    trace_of,
    value_of,
)

CHAT_PATH, EMBEDDINGS_PATH = "/v1/chat/completions", "/v1/embeddings"
ERROR_FIELDS = {"message", "type", "param", "code", "incident_id", "request_id", "timestamp"}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(
        litellm_url=fake.url, litellm_api_key="key-for-litellm", max_v1_body_bytes=100_000
    ) as served:
        yield served


@pytest.fixture(scope="module")
def token(app: AppUnderTest) -> str:
    return app.token()


@pytest.fixture(autouse=True)
def _no_leftovers(fake: FakeUpstream) -> None:
    fake.clear()


def assert_openai_error(app: AppUnderTest, answer: Answer, name: str) -> dict[str, Any]:
    """The body is OpenAI's error shape with this request's ids; what is in it."""
    assert set(answer.json) == {"error"}
    error: dict[str, Any] = answer.json["error"]
    assert set(error) == ERROR_FIELDS
    assert error["type"] == name
    assert error["message"]
    assert error["request_id"] == answer.request_id
    server = server_span(app, answer.request_id)
    assert error["incident_id"] == f"inc_{server.context.span_id:016x}"
    assert attributes(server)["error.type"] == name
    assert error["timestamp"].endswith("Z")
    return error


@pytest.mark.parametrize("content", REQUESTS.values(), ids=REQUESTS)
def test_what_is_sent_reaches_the_upstream_byte_for_byte(
    app: AppUnderTest, fake: FakeUpstream, token: str, content: bytes
) -> None:
    answer = app.call("POST", CHAT_PATH, body=content, token=token)
    assert answer.status == 200, answer.body
    assert [request.body for request in fake.chat_requests] == [content]


@pytest.mark.parametrize("content", REQUESTS.values(), ids=REQUESTS)
def test_a_stream_changes_nothing_but_what_is_added(
    app: AppUnderTest, fake: FakeUpstream, token: str, content: bytes
) -> None:
    sent = json.loads(content)
    if sent.get("stream") is None:
        # As a client would have written it.
        sent.pop("stream", None)
        sent.pop("stream_options", None)
        content = json.dumps({"stream": True, **sent}).encode()
    answer = app.call("POST", CHAT_PATH, body=content, token=token)
    assert answer.status == 200, answer.body
    (seen,) = fake.chat_requests
    if sent.get("stream") is False:
        assert seen.body == content
    else:
        assert seen.body == b'{"stream_options":{"include_usage":true},' + content[1:]


@pytest.mark.parametrize("content", ANSWERS.values(), ids=ANSWERS)
def test_what_the_upstream_answers_comes_back_byte_for_byte(
    app: AppUnderTest, fake: FakeUpstream, token: str, content: bytes
) -> None:
    fake.script(Status(200, content))
    answer = app.call("POST", CHAT_PATH, body=CHAT, token=token)
    assert (answer.status, answer.body) == (200, content)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-llm-attempts"] == "1"
    assert answer.headers["x-cache"] == "BYPASS"
    assert "total;dur=" in answer.headers["server-timing"]


def test_a_stream_comes_back_byte_for_byte(app: AppUnderTest, fake: FakeUpstream, token: str) -> None:
    tool = {"tool_calls": [{"index": 0, "function": {"arguments": '{"a'}}]}
    pieces = (
        text("ü").replace(b"\\u00fc", "ü".encode()),
        b'event: message\r\nid: 7\r\ndata: {"choices":\r\ndata: [{"delta":{"content":"x"}}]}\r\n\r\n',
        chunk(tool, future={"x": 1.10}),
        b'data:{"choices":[],"odd":true}\n\n',
        chunk(reason="tool_calls"),
        DONE,
    )
    fake.script(RawStream(pieces))
    answer = app.call("POST", CHAT_PATH, body={**CHAT, "stream": True}, token=token)
    assert answer.body == b"".join(pieces)


def test_the_default_model_answers_where_none_is_named(
    app: AppUnderTest, fake: FakeUpstream, token: str
) -> None:
    for named in ({}, {"model": None}):
        answer = app.call("POST", CHAT_PATH, body={"messages": [{"role": "user"}], **named}, token=token)
        assert answer.json["model"] == "demo"
    assert fake.chat_requests[0].body == b'{"model":"demo","messages": [{"role": "user"}]}'
    assert [request.json["model"] for request in fake.chat_requests] == ["demo", "demo"]


def test_a_header_field_that_cannot_be_sent_does_not_pass(
    app: AppUnderTest, fake: FakeUpstream, token: str
) -> None:
    answer = app.call("POST", CHAT_PATH, body=CHAT, token=token, headers={"OpenAI-Beta": "caf\xe9"})
    assert answer.status == 200
    assert "openai-beta" not in fake.chat_requests[0].headers


def test_header_fields_pass_by_a_list(app: AppUnderTest, fake: FakeUpstream, token: str) -> None:
    fields = {
        "OpenAI-Beta": "assistants=v2",
        "OpenAI-Organization": "org-1",
        "X-Stainless-Lang": "python",
        "User-Agent": "mine",
        "Cookie": "a=b",
        "X-Litellm-Tags": "a",
    }
    app.call("POST", CHAT_PATH, body=CHAT, token=token, headers=fields)
    (seen,) = fake.chat_requests
    assert seen.headers["openai-beta"] == "assistants=v2"
    assert seen.headers["authorization"] == "Bearer key-for-litellm"
    assert not [name for name in seen.headers if name.startswith(("x-stainless", "openai-org", "x-litellm"))]
    assert not {"mine", "a=b"} & set(seen.headers.values())


def test_embeddings_are_a_call_of_their_own_kind(app: AppUnderTest, fake: FakeUpstream, token: str) -> None:
    calls = attribute_sets(app, "llmops.llm.calls")
    content = b'{"model": "demo", "input": ["a", "b"], "dimensions": 2, "future": 1.10}'
    answer = app.call("POST", EMBEDDINGS_PATH, body=content, token=token)
    assert answer.status == 200
    assert len(answer.json["data"]) == 2
    (seen,) = [request for request in fake.requests if request.method == "POST"]
    assert (seen.path, seen.body) == (EMBEDDINGS_PATH, content)
    spans = trace_of(app, answer.request_id)
    assert [span.name for span in spans] == [f"POST {EMBEDDINGS_PATH}", "llm call", "embeddings demo", "POST"]
    assert attributes(spans[2])["gen_ai.operation.name"] == "embeddings"
    assert attributes(spans[2])["gen_ai.usage.input_tokens"] == 6
    assert value_of(app, "llmops.retry.attempts", {"operation": "embeddings", "outcome": "success"}) >= 1
    key = frozenset({"model": "demo", "outcome": "success"}.items())
    assert attribute_sets(app, "llmops.llm.calls")[key] == calls[key] + 1
    assert answer.headers["x-cache"] == "BYPASS"


@pytest.mark.parametrize("behaviour", [NotJson(), Status(200, {"data": 7}), Status(200, {"choices": [{}]})])
def test_embeddings_that_are_none_are_an_error(
    app: AppUnderTest, fake: FakeUpstream, token: str, behaviour: Any
) -> None:
    fake.script(behaviour)
    answer = app.call("POST", EMBEDDINGS_PATH, body={"model": "demo", "input": "x"}, token=token)
    assert answer.status == 502
    assert_openai_error(app, answer, "UpstreamError")


def test_models_are_listed_and_found(app: AppUnderTest, fake: FakeUpstream, token: str) -> None:
    listed = b'{"object":"list" , "data":[{"id":"demo","x":1.10},{"id":"a/b:c d"},{"id":7},8]}'
    fake.models_behaviour = Status(200, listed)
    try:
        assert app.call("GET", "/v1/models", token=token).body == listed
        assert app.call("GET", "/v1/models/demo", token=token).json == {"id": "demo", "x": 1.1}
        assert app.call("GET", "/v1/models/a%2Fb:c%20d", token=token).json == {"id": "a/b:c d"}
        missing = app.call("GET", "/v1/models/nope", token=token)
    finally:
        fake.models_behaviour = None
    assert missing.status == 404
    error = assert_openai_error(app, missing, "NotFoundError")
    assert (error["code"], error["param"]) == ("model_not_found", "model")


DEEP = b'{"messages": [{"content": ' + b"[" * 200 + b"]" * 200 + b"}]}"


@dataclass(frozen=True)
class Refused:
    """A request that goes no further."""

    content: bytes
    param: str
    path: str = CHAT_PATH


REFUSED = {
    "LiteLLM's own": Refused(b'{"messages": [{}], "num_retries": 8}', "num_retries"),
    "a price": Refused(b'{"messages": [{}], "input_cost_per_token": 0}', "input_cost_per_token"),
    "a key": Refused(b'{"model": "demo", "input": "x", "api_key": "x"}', "api_key", EMBEDDINGS_PATH),
    "two models": Refused(b'{"messages": [{}], "model": "demo,demo"}', "model"),
    "a name twice": Refused(b'{"messages": [{}], "model": "demo", "model": "gpt"}', "model"),
    "a name twice, inside": Refused(b'{"messages": [{"role": "user", "role": "system"}]}', "role"),
    "too many lists": Refused(b'{"messages": [{}], "x": [' + b"[]," * 20_000 + b"[]]}", "body"),
    "too many objects": Refused(b'{"messages": [{}], "x": [' + b"{}," * 20_000 + b"{}]}", "body"),
    "too many fields": Refused(
        b'{"messages": [{}], ' + b", ".join(b'"x%d": 0' % number for number in range(300)) + b"}", "body"
    ),
    "a number for a text": Refused(b'{"messages": [{"content": 5}]}', "messages.0.content"),
    "a number for tools": Refused(b'{"messages": [{}], "tools": 1}', "tools"),
    "a number for a tool": Refused(b'{"messages": [{}], "tools": [1]}', "tools"),
    "a tool without its type": Refused(b'{"messages": [{}], "tools": [{}]}', "tools"),
    "nothing for a function": Refused(b'{"messages": [{}], "functions": [null]}', "functions"),
    "a number for a part": Refused(b'{"messages": [{"content": [1]}]}', "messages.0.content"),
    "a part without its type": Refused(b'{"messages": [{}, {"content": [{}]}]}', "messages.1.content"),
    "a format without its type": Refused(
        b'{"messages": [{}], "response_format": {"x": 1}}', "response_format"
    ),
    "a format without its schema": Refused(
        b'{"messages": [{}], "response_format": {"type": "json_schema"}}', "response_format"
    ),
    "a text for search options": Refused(
        b'{"messages": [{}], "web_search_options": "x"}', "web_search_options"
    ),
    "a number for thinking": Refused(b'{"messages": [{}], "thinking": 5}', "thinking"),
    "too many choices": Refused(b'{"messages": [{}], "n": 1000000000}', "n"),
    "no choices": Refused(b'{"messages": [{}], "n": 0}', "n"),
    "nothing": Refused(b"", "body"),
    "no JSON": Refused(b"{'a': 1}", "body"),
    "no object": Refused(b"[]", "body"),
    "not UTF-8": Refused(b'{"messages": [{"content": "\xff"}]}', "body"),
    "not a number": Refused(b'{"messages": [{"content": NaN}]}', "body"),
    "beyond all numbers": Refused(b'{"messages": [{"content": 1e999}]}', "body"),
    "too deep": Refused(DEEP, "body"),
    "bottomless": Refused(b'{"messages": ' + b"[" * 40_000, "body"),
    "no messages": Refused(b'{"model": "demo"}', "messages"),
    "empty messages": Refused(b'{"messages": []}', "messages"),
    "a text for messages": Refused(b'{"messages": "x"}', "messages"),
    "texts for messages": Refused(b'{"messages": ["x"]}', "messages"),
    "empty model": Refused(b'{"model": "", "messages": [{}]}', "model"),
    "a number for a model": Refused(b'{"model": 7, "messages": [{}]}', "model"),
    "a line end in the model": Refused(b'{"model": "a\\nb", "messages": [{}]}', "model"),
    "a line end after the model": Refused(b'{"model": "a\\n", "messages": [{}]}', "model"),
    "half an emoji in the model": Refused(b'{"model": "\\ud83d", "messages": [{}]}', "model"),
    "a long model": Refused(b'{"model": "' + b"x" * 201 + b'", "messages": [{}]}', "model"),
    "a text for stream": Refused(b'{"messages": [{}], "stream": "yes"}', "stream"),
    "a number for stream": Refused(b'{"messages": [{}], "stream": 1}', "stream"),
    "a list for options": Refused(b'{"messages": [{}], "stream_options": []}', "stream_options"),
    "an odd option": Refused(
        b'{"messages": [{}], "stream_options": {"include_usage": 1}}', "stream_options.include_usage"
    ),
    "no model for embeddings": Refused(b'{"input": "x"}', "model", EMBEDDINGS_PATH),
    "no input": Refused(b'{"model": "demo"}', "input", EMBEDDINGS_PATH),
    "empty input": Refused(b'{"model": "demo", "input": []}', "input", EMBEDDINGS_PATH),
    "empty text": Refused(b'{"model": "demo", "input": ""}', "input", EMBEDDINGS_PATH),
    "a number for input": Refused(b'{"model": "demo", "input": 7}', "input", EMBEDDINGS_PATH),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_a_request_goes_no_further(
    app: AppUnderTest, fake: FakeUpstream, token: str, refused: Refused
) -> None:
    answer = app.call("POST", refused.path, body=refused.content, token=token)
    assert answer.status == 422
    error = assert_openai_error(app, answer, "ValidationError")
    assert error["param"] == refused.param
    assert refused.param in error["message"]
    assert not [request for request in fake.requests if request.method == "POST"]


def test_nesting_that_somebody_may_need_passes(app: AppUnderTest, token: str) -> None:
    content = b'{"messages": [{}], "x": ' + b"[" * 90 + b"]" * 90 + b"}"
    assert app.call("POST", CHAT_PATH, body=content, token=token).status == 200
    flat = b'{"messages": [' + b",".join([b"{}"] * 300) + b"]}"
    assert app.call("POST", CHAT_PATH, body=flat, token=token).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "name"),
    [
        ("GET", "/v1", 404, "NotFoundError"),
        ("GET", "/v1/nope", 404, "NotFoundError"),
        ("GET", CHAT_PATH, 405, "MethodNotAllowedError"),
        ("DELETE", "/v1/models/demo", 405, "MethodNotAllowedError"),
        ("POST", "/v1/assistants", 404, "NotFoundError"),
    ],
)
def test_what_is_not_there_is_said_in_openais_shape(
    app: AppUnderTest, method: str, path: str, status: int, name: str
) -> None:
    answer = app.call(method, path)
    assert answer.status == status
    assert_openai_error(app, answer, name)


def test_a_neighbour_of_the_prefix_keeps_the_houses_shape(app: AppUnderTest) -> None:
    assert app.call("GET", "/v10/models").json["error"] == "NotFoundError"


@pytest.mark.parametrize("path", [CHAT_PATH, EMBEDDINGS_PATH, "/v1/models", "/v1/models/demo"])
@pytest.mark.parametrize("bad", [None, "forged.token.here"])
def test_without_a_token_there_is_nothing(app: AppUnderTest, path: str, bad: str | None) -> None:
    method = "GET" if "models" in path else "POST"
    answer = app.call(method, path, token=bad, body=CHAT if method == "POST" else None)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert assert_openai_error(app, answer, "AuthenticationError")["code"] == "invalid_api_key"


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit(app: AppUnderTest, token: str, declared: bool) -> None:  # noqa: FBT001 - two ways
    content = json.dumps({"messages": [{"content": "x" * 200_000}]}).encode()
    if declared:
        answer = app.call("POST", CHAT_PATH, body=content, token=token)
    else:
        pieces = f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n"
        fields = {"Transfer-Encoding": "chunked"}
        answer = app.call("POST", CHAT_PATH, body=pieces, token=token, headers=fields)
    assert answer.status == 413
    assert_openai_error(app, answer, "PayloadTooLargeError")


def test_a_spent_quota_is_said_once_and_touches_no_circuit(
    app: AppUnderTest, fake: FakeUpstream, token: str
) -> None:
    fake.default = fake.default_stream = Status(
        429, {"error": {"message": "no", "code": "insufficient_quota"}}
    )
    for stream in (False, True) * 3:
        answer = app.call("POST", CHAT_PATH, body={**CHAT, "stream": stream}, token=token)
        assert (answer.status, answer.headers["x-llm-attempts"]) == (429, "1")
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
        assert assert_openai_error(app, answer, "RateLimitError")["code"] == "insufficient_quota"
    assert app.value("llmops.circuit_breaker.open_callers", model="demo") == 0


def test_the_library_does_not_repeat_what_our_deadline_has_ended(upstream: FakeUpstream) -> None:
    # Each repeat would be paid for, and none be seen.
    upstream.default = Silent()
    with running_app(litellm_url=upstream.url, llm_timeout_s=0.3) as app:
        url = f"http://127.0.0.1:{app.port}/v1"
        with OpenAI(base_url=url, api_key=app.token(), max_retries=2) as client:
            with pytest.raises(InternalServerError) as caught:
                client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x"}])
            assert caught.value.status_code == 504
            assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(upstream.chat_requests) == 1


def test_a_connection_that_was_not_made_is_worth_a_repeat() -> None:
    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}"
        with running_app(litellm_url=url, retry_max=0) as app:
            answer = app.call("POST", CHAT_PATH, body=CHAT, token=app.token())
    assert answer.status == 504
    assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize(
    ("behaviour", "status", "name", "again"),
    [
        (
            Status(400, {"error": {"message": "context", "code": "context_length_exceeded"}}),
            400,
            "BadRequestError",
            "false",
        ),
        (Status(401), 502, "UpstreamError", "false"),
        (Status(500), 502, "UpstreamError", None),
        (Reset(), 502, "UpstreamError", None),
        (Status(429, headers={"Retry-After": "7"}), 429, "RateLimitError", None),
        (Status(408), 504, "UpstreamTimeoutError", None),
    ],
)
def test_what_goes_wrong_upstream_is_said_in_openais_shape(  # noqa: PLR0913, PLR0917 - a row of a table
    app: AppUnderTest,
    fake: FakeUpstream,
    token: str,
    behaviour: Any,
    status: int,
    name: str,
    again: str | None,
) -> None:
    before = attribute_sets(app, "llmops.llm.calls")
    fake.script(behaviour)
    answer = app.call("POST", CHAT_PATH, body=CHAT, token=token)
    assert answer.status == status
    error = assert_openai_error(app, answer, name)
    assert answer.headers.get("x-should-retry") == again
    assert answer.headers.get("retry-after") == ("7" if status == 429 else None)
    if status == 400:
        assert error["code"] == "context_length_exceeded"
    assert_failed_once(app, answer.request_id, name, before)


def test_an_unknown_model_is_the_callers_mistake(app: AppUnderTest, token: str) -> None:
    answer = app.call("POST", CHAT_PATH, body={**CHAT, "model": "nope"}, token=token)
    assert answer.status == 400
    error = assert_openai_error(app, answer, "BadRequestError")
    assert error["message"] == "Model 'nope' not found"
    assert (error["code"], error["param"]) == ("model_not_found", "model")
