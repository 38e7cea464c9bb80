"""Streams that providers write in their own ways: each is judged by what it is."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import openai
import pytest

from tests.fakes.streams import DONE, RawStream, chunk, text, usage
from tests.fakes.upstream import Answer, FakeUpstream, Status
from tests.harness import AppUnderTest, running_app
from tests.http.streaming import STREAMED, data, events, name, stream
from tests.http.support import attributes, eventually, trace_of

WHOLE = (text("a "), text("trace"), chunk(reason="stop"), usage(), DONE)
SHOWN = [*WHOLE[:3], DONE]
MESSAGE = {
    "role": "assistant",
    "content": "a trace",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    "reasoning_content": "hm",
}
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-whole",
    "object": "chat.completion",
    "created": 1_700_000_000,
    "model": "demo",
    "citations": ["a"],
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "tool_calls", "native_finish_reason": "x"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
}
JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(
        litellm_url=upstream.url,
        retry_max=1,
        retry_base_delay_s=0.01,
        stream_chunk_timeout_s=0.5,
        stream_keep_alive_s=0.2,
        llm_timeout_s=5.0,
    ) as served:
        yield served


def _error(event: bytes) -> Mapping[str, Any]:
    found: Mapping[str, Any] = data(event)["error"]
    return found


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"\xef\xbb\xbf" + b"".join(WHOLE)], id="byte order mark"),
        pytest.param([b"\xef", b"\xbb", b"\xbf" + b"".join(WHOLE)], id="byte order mark in pieces"),
        pytest.param([b"\r\n\n", *WHOLE], id="empty lines first"),
        pytest.param([*WHOLE[:4], b"data: [DONE]"], id="no line end after the end"),
        pytest.param([*WHOLE[:4], b"data: [DONE]\n"], id="no empty line after the end"),
        pytest.param([*WHOLE[:4], b"data:[DONE]\r\n"], id="no empty line after the end, CRLF"),
        pytest.param([WHOLE[0], b"event: ping\ndata: {}\n\n", *WHOLE[1:]], id="ping by name"),
        pytest.param([WHOLE[0], b'data: {"type": "ping"}\n\n', *WHOLE[1:]], id="ping by type"),
        pytest.param([b"event: ping\ndata: ping\n\n", *WHOLE], id="ping first, and no JSON"),
    ],
)
def test_the_answer_is_whole(app: AppUnderTest, upstream: FakeUpstream, pieces: list[bytes]) -> None:
    upstream.script(RawStream(pieces))
    answer = stream(app, app.token())
    assert (answer.status, answer.headers["x-llm-attempts"]) == (200, "1")
    assert [data(event) for event in events(answer.body)[:-1]] == [data(event) for event in SHOWN[:-1]]
    assert events(answer.body)[-1] == DONE


@pytest.mark.parametrize("rest", [b"data: [DONE]x", b"data: [DONE", b"[DONE]\n", b": data: [DONE]\n"])
def test_what_only_looks_like_the_end_is_none(app: AppUnderTest, upstream: FakeUpstream, rest: bytes) -> None:
    upstream.script(RawStream([*WHOLE[:4], rest]))
    answer = stream(app, app.token())
    assert b"[DONE]" not in events(answer.body)[-1]
    assert _error(events(answer.body)[-1])["type"] == "UpstreamError"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "text/plain"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/llm/generate"])
def test_a_whole_answer_is_handed_on_as_a_stream(
    app: AppUnderTest, upstream: FakeUpstream, path: str, kind: str
) -> None:
    upstream.script(Status(200, COMPLETION, content_type=kind, headers={"x-litellm-response-cost": "0.5"}))
    body = STREAMED if path.startswith("/v1") else {"prompt": "What is a trace?", "stream": True}
    answer = stream(app, app.token(), body, path)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    assert len(upstream.chat_requests) == 1, "the answer was thrown away"
    got = events(answer.body)
    if path.startswith("/v1"):
        assert got[-1] == DONE
        first, last = data(got[0]), data(got[1])
        assert first["citations"] == ["a"]
        assert first["object"] == "chat.completion.chunk"
        calls = [{"index": 0, **MESSAGE["tool_calls"][0]}]  # type: ignore[dict-item]
        assert first["choices"][0]["delta"] == {**MESSAGE, "tool_calls": calls}
        assert first["choices"][0]["native_finish_reason"] == "x"
        assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]
    else:
        assert data(got[0]) == {"text": "a trace"}
        done = data(got[-1])
        assert (name(got[-1]), done["completion_tokens"], done["cost"]) == ("done", 20, 0.5)
    (chat,) = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
    assert attributes(chat)["gen_ai.usage.output_tokens"] == 20


def test_openais_library_reads_a_whole_answer_as_a_stream(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Status(200, {**COMPLETION, "choices": [_choice(0, "a"), _choice(1, "b")]}))
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{app.port}/v1", api_key=app.token(), max_retries=0
    ) as client:
        chunks = list(
            client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "x"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    texts = {0: "", 1: ""}
    for one in chunks:
        for choice in one.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "a", 1: "b"}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 30


def _choice(index: int, said: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": said}
    return {"index": index, "message": message, "finish_reason": "stop"}


@pytest.mark.parametrize(
    "body", [b"{", b'{"choices": []}', b'{"choices": [{"delta": {}}]}', b'{"choices": 7}', b"{}"]
)
def test_json_that_is_no_answer_is_none(app: AppUnderTest, upstream: FakeUpstream, body: bytes) -> None:
    upstream.script(*[Status(200, body)] * 2)
    answer = stream(app, app.token())
    assert (answer.status, answer.json["error"]["type"]) == (502, "UpstreamError")


BUSY = {"message": "slow down", "code": 429}
ERRORS = [
    pytest.param(BUSY, (429, "RateLimitError"), id="number"),
    pytest.param({"message": "slow down", "code": "429"}, (429, "RateLimitError"), id="text"),
    pytest.param({"message": "x", "type": "rate_limit_error"}, (429, "RateLimitError"), id="type"),
    pytest.param({"message": "x", "status": 400, "code": None}, (400, "BadRequestError"), id="status"),
    pytest.param({"message": "x", "type": "invalid_request_error"}, (400, "BadRequestError"), id="invalid"),
    pytest.param({"message": "x", "type": "overloaded_error"}, (502, "UpstreamError"), id="overloaded"),
    pytest.param({"message": "x"}, (502, "UpstreamError"), id="nothing said"),
    pytest.param("it broke", (502, "UpstreamError"), id="a text"),
]


@pytest.mark.parametrize(("said", "wanted"), ERRORS)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_in_a_200_has_its_own_status(
    app: AppUnderTest, upstream: FakeUpstream, said: object, wanted: tuple[int, str], *, streamed: bool
) -> None:
    upstream.script(*[Status(200, {"error": said}, headers={"Retry-After": "7"})] * 2)
    token = app.token()
    path, body = ("/v1/chat/completions", STREAMED) if streamed else ("/llm/generate", {"prompt": "x"})
    answer = app.call("POST", path, body=body, token=token)
    error = answer.json["error"]["type"] if streamed else answer.json["error"]
    assert (answer.status, error) == wanted
    if answer.status in {429, 502}:
        assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_beside_choices_is_an_error(
    app: AppUnderTest, upstream: FakeUpstream, *, streamed: bool
) -> None:
    upstream.script(Status(200, {**COMPLETION, "error": {"message": "x", "code": 429}}), *[Status(429)] * 9)
    answer = stream(app, app.token(), {**STREAMED, "stream": streamed})
    assert (answer.status, answer.json["error"]["type"]) == (429, "RateLimitError")


@pytest.mark.parametrize("error", [None, {}, "", {"code": "", "message": ""}])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_empty_error_beside_choices_is_none(
    app: AppUnderTest, upstream: FakeUpstream, error: object, *, streamed: bool
) -> None:
    upstream.script(Status(200, {**COMPLETION, "error": error}))
    assert stream(app, app.token(), {**STREAMED, "stream": streamed}).status == 200


@pytest.mark.parametrize(
    "event",
    [
        b'event: error\ndata: {"message": "slow down", "code": 429}\n\n',
        b'event: error\ndata: {"error": {"message": "slow down", "code": 429}}\n\n',
        b'data: {"object": "error", "message": "slow down", "code": 429}\n\n',
        b'data: {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}\n\n',
        b'data: {"error": "slow down", "status": 429}\n\n',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/llm/generate"])
def test_an_error_in_the_middle_is_an_error(
    app: AppUnderTest, upstream: FakeUpstream, path: str, event: bytes
) -> None:
    upstream.script(RawStream([WHOLE[0], event, *WHOLE[1:]]))
    body = STREAMED if path.startswith("/v1") else {"prompt": "x", "stream": True}
    answer = stream(app, app.token(), body, path)
    last = events(answer.body)[-1]
    said = data(last)
    assert (said["error"]["type"] if path.startswith("/v1") else said["error"]) == "RateLimitError"
    assert b"[DONE]" not in answer.body
    assert b"event: done" not in answer.body


def test_an_error_event_may_be_plain_text(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(RawStream([WHOLE[0], b"event: error\ndata: it broke\n\n", *WHOLE[1:]]))
    answer = stream(app, app.token())
    assert _error(events(answer.body)[-1])["type"] == "UpstreamError"
    assert b"[DONE]" not in answer.body


def test_an_event_may_be_as_large_as_an_answer(upstream: FakeUpstream) -> None:
    image = "A" * 5_000_000
    big = chunk({"images": [{"image_url": {"url": image}}], "content": "x"})
    pieces = [big[at : at + 65_536] for at in range(0, len(big), 65_536)]
    with running_app(litellm_url=upstream.url, retry_max=0, llm_max_answer_bytes=6_000_000) as app:
        token = app.token()
        upstream.script(RawStream([*pieces, *WHOLE[1:]]))
        answer = stream(app, token)
        assert events(answer.body)[0] == big
        assert events(answer.body)[-1] == DONE

        upstream.script(RawStream([text("a "), b"data: " + b"x" * 6_100_000 + b"\n\n"]))
        answer = stream(app, token)
        assert _error(events(answer.body)[-1])["type"] == "UpstreamError"


@pytest.mark.parametrize("sign", [b": ping\n\n", b'event: ping\ndata: {"type": "ping"}\n\n', b": "])
def test_signs_of_life_hold_off_the_limit_on_silence(
    app: AppUnderTest, upstream: FakeUpstream, sign: bytes
) -> None:
    # Ten intervals are four times as long as the silence that is permitted.
    upstream.script(RawStream([WHOLE[0], *[sign] * 10, b"\n\n", *WHOLE[1:]], interval_s=0.2))
    answer = stream(app, app.token())
    assert [event for event in events(answer.body) if b"ping" not in event] == SHOWN


def test_signs_of_life_do_not_hold_off_the_limit_on_the_whole(upstream: FakeUpstream) -> None:
    limits: dict[str, Any] = {"stream_chunk_timeout_s": 0.4, "stream_timeout_s": 1.0, "llm_timeout_s": 0.9}
    with running_app(
        litellm_url=upstream.url, stream_keep_alive_s=0.2, llm_connect_timeout_s=0.5, **limits
    ) as app:
        upstream.script(RawStream([WHOLE[0], *[b": ping\n\n"] * 200], interval_s=0.1))
        answer = stream(app, app.token())
        error = _error(events(answer.body)[-1])
        assert (error["type"], error["message"]) == (
            "UpstreamTimeoutError",
            "The answer was not complete within 1 s.",
        )


REFUSALS = [
    pytest.param(
        Status(400, {"error": {"message": "Unsupported parameter: 'stream_options'", "code": "400"}}),
        id="OpenAI",
    ),
    pytest.param(
        Status(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"]}]}),
        id="pydantic",
    ),
    pytest.param(Status(400, "unknown field include_usage", content_type="text/plain"), id="text"),
    pytest.param(
        RawStream([b'data: {"error": {"message": "stream_options is not supported", "code": 400}}\n\n']),
        id="event of a 200",
    ),
    pytest.param(Status(200, {"error": "Extra inputs: stream_options"}), id="JSON in a 200, no status"),
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_model_that_refuses_stream_options_is_asked_without_them_from_then_on(
    app: AppUnderTest, upstream: FakeUpstream, refusal: Status | RawStream
) -> None:
    token = app.token()
    upstream.script(refusal, *[RawStream([*WHOLE[:3], DONE])] * 2, RawStream(WHOLE))
    answers = [stream(app, token), stream(app, token)]
    other = stream(app, token, {**STREAMED, "model": "other-model"})

    assert [events(answer.body) for answer in (*answers, other)] == [SHOWN] * 3
    assert [answer.headers["x-llm-attempts"] for answer in (*answers, other)] == ["1"] * 3
    sent = ["stream_options" in seen.json for seen in upstream.chat_requests]
    assert sent == [True, False, False, True], "asked, refused, and never again for this model"
    (line,) = [line for line in app.lines() if "stream_options" in line["message"]]
    assert (line["level"], line["model"]) == ("WARNING", "demo")


@pytest.mark.parametrize("in_a_200", [False, True])
def test_a_caller_cannot_take_the_token_counts_from_others(
    app: AppUnderTest, upstream: FakeUpstream, *, in_a_200: bool
) -> None:
    """OpenAI quotes what it refuses, and pydantic the whole request."""
    said = {"error": {"message": "Invalid value: 'stream_options'. Supported: 'user'.", "code": 400}}
    upstream.script(*[Status(200 if in_a_200 else 400, said)] * 2, RawStream(WHOLE))
    token = app.token()
    body = {**STREAMED, "messages": [{"role": "stream_options", "content": "x"}]}
    refused = stream(app, token, body)
    assert (refused.status, refused.json["error"]["type"]) == (400, "BadRequestError")
    assert events(stream(app, token).body) == SHOWN
    sent = ["stream_options" in seen.json for seen in upstream.chat_requests]
    assert sent == [True, False, True]
    assert not [line for line in app.lines() if "refuses stream_options" in line["message"]]


def test_a_callers_own_stream_options_are_the_callers(app: AppUnderTest, upstream: FakeUpstream) -> None:
    refusal = Status(400, {"error": {"message": "Unsupported parameter: 'stream_options'"}})
    upstream.script(refusal)
    body = {**STREAMED, "stream_options": {"include_usage": True}}
    answer = stream(app, app.token(), body)
    assert (answer.status, len(upstream.chat_requests)) == (400, 1)


def test_token_counts_need_not_be_asked_for(upstream: FakeUpstream) -> None:
    with running_app(litellm_url=upstream.url, stream_usage="never") as app:
        token = app.token()
        upstream.script(RawStream([*WHOLE[:3], DONE]), RawStream(WHOLE))
        assert events(stream(app, token).body) == SHOWN
        body = {**STREAMED, "stream_options": {"include_usage": True}}
        assert events(stream(app, token, body).body) == list(WHOLE)
    assert [seen.json.get("stream_options") for seen in upstream.chat_requests] == [
        None,
        {"include_usage": True},
    ]


def test_a_refusal_of_something_else_is_the_callers(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Status(400, {"error": {"message": "Unsupported parameter: 'top_k'"}}))
    answer = stream(app, app.token())
    assert (answer.status, len(upstream.chat_requests)) == (400, 1)


def test_a_cached_answer_from_json_is_the_answer(upstream: FakeUpstream) -> None:
    completion = json.loads(Answer().body("demo"))
    with running_app(litellm_url=upstream.url, cache_enabled=True, qdrant_path=":memory:") as app:
        token = app.token()
        body = {"prompt": "x", "stream": True}
        upstream.script(Status(200, completion))
        first = stream(app, token, body, "/llm/generate")
        eventually(lambda: app.value("llmops.cache.writes", outcome="stored") == 1, "the write")
        again = stream(app, token, body, "/llm/generate")
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("MISS", "HIT")
    assert events(first.body)[0] == events(again.body)[0]
