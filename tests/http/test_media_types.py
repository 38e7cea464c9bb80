"""What a body may be: its content type, its coding, its character set, and its size on each route."""

import gzip
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.fakes.upstream import FakeUpstream, Status
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import eventually

MODEL = {"model": "demo"}
BODIES: Mapping[str, dict[str, Any]] = {
    "/auth/login": {"username": "user", "password": "wrong-é-password"},
    "/llm/generate": {"prompt": "What is é?"},
    "/v1/chat/completions": {**MODEL, "messages": [{"role": "user", "content": "What is é?"}]},
    "/v1/embeddings": {**MODEL, "input": "What is é?"},
}
PATHS = sorted(BODIES)
MIB = 2**20
IMAGE = "data:image/png;base64,"
REASON = "Images of this model must not be wider than they are high"


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(litellm_url=upstream.url) as served:
        yield served


def _send(app: AppUnderTest, path: str, body: bytes, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return app.call("POST", path, body=body, token=app.token(), headers=named)


def _error(answer: Answer) -> tuple[str, str]:
    """The error's name and message, in either shape."""
    said = answer.json["error"]
    if isinstance(said, dict):
        return said["type"], said["message"]
    return said, answer.json["message"]


def _is_read(path: str, answer: Answer) -> bool:
    """Whether the body was read: of a sign-in, the wrong password in it."""
    return answer.status == (401 if path == "/auth/login" else 200)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "kind",
    [
        *("application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'),
        *(
            "application/vnd.api+json",
            "application/json; charset=us-ascii; profile=x",
            "application/json ;x=1",
        ),
    ],
)
def test_json_in_utf_8_is_read(app: AppUnderTest, path: str, kind: str) -> None:
    content = json.dumps(BODIES[path], ensure_ascii=False).encode()
    assert _is_read(path, _send(app, path, content, Content_Type=kind))


@pytest.mark.parametrize("path", PATHS)
def test_a_body_without_a_type_is_taken_for_json(app: AppUnderTest, path: str) -> None:
    assert _is_read(path, _send(app, path, json.dumps(BODIES[path]).encode(), Content_Type=""))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
        *("application/jsonl", "application/json; charset=utf-16", "application/json; charset=latin-1"),
        *("application/json, text/plain", "json", "application/xjson", "text/json"),
    ],
)
def test_another_type_is_415_and_says_what_is_expected(app: AppUnderTest, path: str, kind: str) -> None:
    answer = _send(app, path, json.dumps(BODIES[path]).encode(), Content_Type=kind)
    assert answer.status == 415
    assert _error(answer)[0] == "UnsupportedMediaTypeError"
    assert "application/json" in _error(answer)[1]
    assert answer.headers["accept"] == "application/json"
    duration = "http.server.request.duration"
    eventually(lambda: app.value(duration, error__type="UnsupportedMediaTypeError") == 1, "the metric")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, identity", "zstd"])
def test_a_content_coding_is_415_and_says_what_is_expected(app: AppUnderTest, path: str, coding: str) -> None:
    content = gzip.compress(json.dumps(BODIES[path]).encode())
    answer = _send(app, path, content, Content_Encoding=coding)
    assert (answer.status, _error(answer)[0]) == (415, "UnsupportedMediaTypeError")
    assert "Content-Encoding" in _error(answer)[1]
    assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("path", PATHS)
def test_identity_is_no_coding(app: AppUnderTest, path: str) -> None:
    content = json.dumps(BODIES[path]).encode()
    assert _is_read(path, _send(app, path, content, Content_Encoding="identity"))


@pytest.mark.parametrize("path", PATHS)
def test_a_byte_order_mark_before_utf_8_is_taken(
    app: AppUnderTest, upstream: FakeUpstream, path: str
) -> None:
    content = json.dumps(BODIES[path], ensure_ascii=False).encode("utf-8-sig")
    assert _is_read(path, _send(app, path, content))
    # What LiteLLM reads has none.
    assert all(seen.body.startswith(b"{") for seen in upstream.requests if seen.method == "POST")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("encode", "said"),
    [
        pytest.param(lambda text: text.encode("utf-16"), "UTF-16", id="UTF-16"),
        pytest.param(lambda text: text.encode("utf-16-le"), "UTF-16", id="UTF-16 LE without a mark"),
        pytest.param(lambda text: text.encode("utf-16-be"), "UTF-16", id="UTF-16 BE without a mark"),
        pytest.param(lambda text: text.encode("utf-32"), "UTF-32", id="UTF-32"),
        pytest.param(lambda text: text.encode("latin-1"), "UTF-8", id="latin-1"),
        pytest.param(lambda text: gzip.compress(text.encode()), "compressed", id="gzip"),
    ],
)
def test_what_a_body_is_instead_of_utf_8_is_said(
    app: AppUnderTest, path: str, encode: Any, said: str
) -> None:
    answer = _send(app, path, encode(json.dumps(BODIES[path], ensure_ascii=False)))
    assert (answer.status, _error(answer)[0]) == (422, "ValidationError")
    details = answer.json.get("details") or [{"message": _error(answer)[1]}]
    assert said in details[0]["message"]


def test_images_fit_under_v1(app: AppUnderTest, upstream: FakeUpstream) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 20 * MIB}}
    body = {**MODEL, "messages": [{"role": "user", "content": [image]}]}
    answer = app.call("POST", "/v1/chat/completions", body=body, token=app.token())
    assert answer.status == 200
    (seen,) = upstream.chat_requests
    assert seen.json == body


def test_a_large_request_is_answered_from_the_cache_by_its_bytes(upstream: FakeUpstream) -> None:
    text = "What is a trace? " * 80_000
    body = {**MODEL, "temperature": 0, "messages": [{"role": "user", "content": text}]}
    with running_app(litellm_url=upstream.url, cache_enabled=True, qdrant_path=":memory:") as app:
        token = app.token()

        def ask(content: bytes) -> str:
            answer = app.call("POST", "/v1/chat/completions", body=content, token=token)
            return str(answer.headers["x-cache"])

        first = json.dumps(body).encode()
        assert ask(first) == "MISS"
        assert ask(first) == "HIT"
        assert ask(json.dumps(body, indent=1).encode()) == "MISS", "the same request in other bytes"
        assert ask(first.replace(b"What", b"That", 1)) == "MISS"


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        pytest.param([{"type": "image_url", "image_url": {"url": IMAGE + "A" * 2 * MIB}}], True, id="image"),
        pytest.param([{"type": "file", "file": {"file_data": "A" * 2 * MIB}}], True, id="file"),
        pytest.param("x" * (MIB - 10), True, id="text"),
        pytest.param("x" * (MIB + 10), False, id="text beyond what is compared"),
        pytest.param([{"type": "text", "text": REASON}], False, id="the reason itself"),
    ],
)
def test_a_reason_is_shown_where_it_can_be_compared(
    app: AppUnderTest, upstream: FakeUpstream, content: Any, *, shown: bool
) -> None:
    upstream.script(Status(400, {"error": {"message": REASON, "type": "invalid_request_error"}}))
    body = {**MODEL, "messages": [{"role": "user", "content": content}]}
    answer = app.call("POST", "/v1/chat/completions", body=body, token=app.token())
    assert answer.status == 400
    assert (REASON in _error(answer)[1]) is shown


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "setting"),
    [
        ("/llm/generate", "MAX_BODY_BYTES"),
        ("/v1/chat/completions", "MAX_V1_BODY_BYTES"),
        ("/v1/embeddings", "MAX_V1_BODY_BYTES"),
        ("/auth/login", "of a sign-in"),
    ],
)
def test_a_413_names_the_limit(upstream: FakeUpstream, path: str, setting: str, *, chunked: bool) -> None:
    limits = {"MAX_BODY_BYTES": 20_000, "MAX_V1_BODY_BYTES": 40_000, "of a sign-in": 8_192}
    with running_app(litellm_url=upstream.url, max_body_bytes=20_000, max_v1_body_bytes=40_000) as app:
        token = app.token()
        limit = limits[setting]
        for size, refused in ((limit - 100, False), (limit + 1, True)):
            content = b'{"x": "' + b"x" * (size - 9) + b'"}'
            body: Any = iter([content[:100], content[100:]]) if chunked else content
            answer = app.call("POST", path, body=body, token=token)
            assert (answer.status == 413) is refused, size
        assert setting in _error(answer)[1]
        assert f"{limit:,}" in _error(answer)[1]


def test_one_callers_large_bodies_leave_memory_for_others(upstream: FakeUpstream) -> None:
    """The service holds eight of the largest bodies, four of one caller; a body counts until its answer."""
    with running_app(litellm_url=upstream.url, max_body_bytes=20_000, max_v1_body_bytes=40_000) as app:
        tokens = {user: app.token(user) for user in ("user", "admin")}
        waiting = [_announce(app, tokens["user"], 39_000) for _ in range(4)]
        eventually(lambda: _large(app, tokens["user"]) == 503, "the first caller's share to be used up")
        assert _large(app, tokens["admin"]) == 200
        assert app.value("llmops.requests.rejected", reason="overloaded") >= 1
        for connection in waiting:
            connection.close()
        eventually(lambda: _large(app, tokens["user"]) == 200, "the memory to be given back")


def _large(app: AppUnderTest, token: str) -> int:
    messages = [{"role": "user", "content": "x" * 30_000}]
    return app.call("POST", "/v1/chat/completions", body={**MODEL, "messages": messages}, token=token).status


def _announce(app: AppUnderTest, token: str, size: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", app.port), timeout=10)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    )
    connection.sendall(head.encode() + b"{")
    return connection


@pytest.mark.parametrize("field", ["temperature", "top_p", "max_tokens", "n"])
def test_a_number_of_more_than_64_bits_is_refused(app: AppUnderTest, field: str) -> None:
    body = {**BODIES["/v1/chat/completions"], field: 18_446_744_073_709_551_615}
    answer = app.call("POST", "/v1/chat/completions", body=body, token=app.token())
    assert (answer.status, _error(answer)[0]) == (422, "ValidationError")
    assert not [line for line in app.lines() if "18446744073709551615" in json.dumps(line)]


@pytest.mark.parametrize("temperature", [1, 0.5, 2**62])
def test_the_temperature_on_the_span_is_a_double(app: AppUnderTest, temperature: float) -> None:
    body = {**BODIES["/v1/chat/completions"], "temperature": temperature}
    answer = app.call("POST", "/v1/chat/completions", body=body, token=app.token())
    assert answer.status == 200
    (chat,) = [span for span in app.spans(answer.request_id) if span.name == "chat demo"]
    assert chat.attributes is not None
    found = chat.attributes["gen_ai.request.temperature"]
    assert (found, type(found)) == (float(temperature), float)


def test_a_permitted_origin_may_send_any_field(upstream: FakeUpstream) -> None:
    asked = "authorization,content-type,x-stainless-new-one,baggage,helicone-id,anthropic-version"
    fields = {
        "Origin": "https://app.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }
    with running_app(litellm_url=upstream.url, cors_origins=["https://app.example.org"]) as app:
        answer = app.call("OPTIONS", "/v1/chat/completions", headers=fields)
        assert answer.status == 200
        allowed = answer.headers["access-control-allow-headers"].replace(" ", "").lower().split(",")
        assert set(asked.split(",")) <= set(allowed)
        elsewhere = {**fields, "Origin": "https://elsewhere.example.org"}
        assert app.call("OPTIONS", "/v1/chat/completions", headers=elsewhere).status == 400
