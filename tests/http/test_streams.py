"""Streams as a caller meets them: piece by piece, with comments, and free to leave or to be slow."""

import statistics
import time
from collections.abc import Iterator

import pytest

from tests.fakes.streams import DONE, EndlessStream, Gate, GatedStream, RawStream, chunk, text, usage
from tests.fakes.upstream import FakeUpstream, Reset, Silent, Status, Stream
from tests.harness import AppUnderTest, running_app
from tests.http.streaming import (
    CHAT,
    STREAMED,
    add_task_count,
    assert_nothing_left,
    calling,
    data,
    events,
    name,
    stream,
    tasks_of,
)
from tests.http.support import attributes, completed_line, eventually, server_span, trace_of, value_of

WHOLE = (text("a "), text("trace"), chunk(reason="stop"), usage(), DONE)
COMMENT = b": keep-alive\n\n"


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(
        add_task_count,
        litellm_url=upstream.url,
        retry_max=2,
        retry_base_delay_s=0.01,
        retry_jitter=0,
        stream_keep_alive_s=0.1,
    ) as served:
        yield served


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/llm/generate"])
def test_each_piece_is_out_before_the_next_exists(
    app: AppUnderTest, upstream: FakeUpstream, path: str
) -> None:
    gate = Gate()
    upstream.script(GatedStream(WHOLE, gate))
    gate.allow()
    body = STREAMED if path.startswith("/v1") else {"prompt": "x", "stream": True}
    with calling(app, app.token(), body, path) as caller:
        for piece in WHOLE[:2]:
            event = caller.event()
            while event == COMMENT:
                event = caller.event()
            # The upstream has not been allowed to make any other.
            if path.startswith("/v1"):
                assert event == piece
            else:
                assert data(event)["text"] == data(piece)["choices"][0]["delta"]["content"]
            gate.allow()
        gate.allow(len(WHOLE))
        rest = events(caller.rest())
    assert rest[-1] == DONE if path.startswith("/v1") else name(rest[-1]) == "done"


def test_a_silent_model_is_covered_by_comments(app: AppUnderTest, upstream: FakeUpstream) -> None:
    gate = Gate()
    upstream.script(GatedStream(WHOLE, gate))
    gate.allow()
    with calling(app, app.token()) as caller:
        assert caller.event() == WHOLE[0]
        assert [caller.event(), caller.event()] == [COMMENT, COMMENT]
        gate.allow(len(WHOLE))
        assert events(caller.rest())[-1] == DONE


@pytest.mark.parametrize(
    "asked", [None, {}, {"include_usage": None}, {"include_usage": False}, {"include_usage": True}]
)
def test_the_count_is_always_asked_for_and_shown_to_who_asked(
    app: AppUnderTest, upstream: FakeUpstream, asked: dict[str, bool | None] | None
) -> None:
    body = {**STREAMED, **({} if asked is None else {"stream_options": {**asked, "other": 1}})}
    upstream.script(RawStream(WHOLE))
    answer = stream(app, app.token(), body)

    wanted = bool(asked and asked.get("include_usage"))
    assert events(answer.body) == [piece for piece in WHOLE if wanted or piece != usage()]
    (sent,) = upstream.chat_requests
    kept = {} if asked is None else {"other": 1}
    assert sent.json == {**body, "stream_options": {**kept, "include_usage": True}}


@pytest.mark.parametrize(
    "place", [{"index": 0, "delta": {}}, {"index": 0, "delta": {}, "finish_reason": None}]
)
def test_a_count_beside_an_empty_choice_is_a_count_and_nothing_else(
    app: AppUnderTest, upstream: FakeUpstream, place: dict[str, object]
) -> None:
    counts = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    said = chunk(choices=[{**place, "delta": {"content": "x"}}], usage=counts)
    upstream.script(RawStream((said, chunk(choices=[place], usage=counts), DONE)))
    assert events(stream(app, app.token()).body) == [said, DONE]


def test_a_call_is_retried_until_the_first_piece_and_not_after_it(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    token = app.token()
    upstream.script(Reset(), RawStream((), "cut"), RawStream(WHOLE))
    answer = stream(app, token)
    assert (answer.status, answer.headers["x-llm-attempts"], events(answer.body)[-1]) == (200, "3", DONE)
    spans = trace_of(app, answer.request_id)
    (call,) = [span for span in spans if span.name == "llm call"]
    assert [event.name for event in call.events] == ["llmops.retry.scheduled"] * 2 + [
        "llmops.retry.succeeded"
    ]
    chats = [span for span in spans if span.name == "chat demo"]
    assert [attributes(span).get("error.type") for span in chats] == ["UpstreamError", "UpstreamError", None]
    assert all(span.parent == call.context for span in chats)
    assert value_of(app, "llmops.retry.attempts", {"operation": "chat", "outcome": "success"}) == 1

    upstream.clear()
    upstream.script(RawStream((text("a "),), "cut"))
    answer = stream(app, token)
    assert (answer.status, len(upstream.chat_requests)) == (200, 1)
    assert data(events(answer.body)[-1])["error"]["type"] == "UpstreamError"


def test_the_server_span_covers_the_whole_stream_and_so_does_its_metric(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    upstream.script(Stream(("a", "b", "c", "d"), interval_s=0.05))
    answer = stream(app, app.token())
    server = server_span(app, answer.request_id)
    assert server.end_time is not None
    assert server.start_time is not None
    assert server.end_time - server.start_time >= 0.2e9
    (chat,) = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
    assert attributes(chat)["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes(chat)["gen_ai.usage.output_tokens"] == 20
    # It is recorded after the span has ended.
    (point,) = eventually(
        lambda: [
            point
            for point in app.points("http.server.request.duration")
            if (point.attributes or {}).get("http.route") == "/v1/chat/completions"
        ],
        "the duration",
    )
    assert point.sum >= 0.2  # type: ignore[union-attr]  # a histogram's
    # Six events: the first is timed by itself, each further one by its distance.
    assert app.value("gen_ai.client.operation.time_per_output_chunk") == 5


def test_a_price_named_with_the_count_is_the_streams(app: AppUnderTest, upstream: FakeUpstream) -> None:
    priced = chunk(usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 0.25})
    upstream.script(RawStream((text("a"), priced, DONE)))
    answer = stream(app, app.token(), {"prompt": "x", "stream": True}, "/llm/generate")
    done = data(events(answer.body)[-1])
    assert done == {
        "model": "demo",
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "total_tokens": 3,
        "cost": 0.25,
        "cache": "bypass",
        "request_id": answer.request_id,
    }
    assert value_of(app, "llmops.llm.cost", {"model": "demo"}) == 0.25


def test_what_nobody_counted_is_null_for_the_caller(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(RawStream((text("a"), text("\ud83d"), chunk(reason="stop"), DONE)))
    answer = stream(app, app.token(), {"prompt": "x", "stream": True}, "/llm/generate")
    first, second, last = events(answer.body)
    assert (data(first), data(second)) == ({"text": "a"}, {"text": "?"})
    done = data(last)
    assert [done[field] for field in ("prompt_tokens", "completion_tokens", "total_tokens", "cost")] == [
        None
    ] * 4


def assert_left(app: AppUnderTest, request_id: str, status: int, tokens: int | None) -> None:
    """A caller who left is a success nowhere, and is counted once."""
    server = server_span(app, request_id)
    (call,) = [span for span in trace_of(app, request_id) if span.name == "llm call"]
    (chat,) = [span for span in trace_of(app, request_id) if span.name == "chat demo"]
    for span in (server, call, chat):
        assert not span.status.is_ok
    assert attributes(server)["error.type"] == "CallerLeftError"
    assert attributes(server)["http.response.status_code"] == status
    assert attributes(chat)["error.type"] == "cancelled"
    assert attributes(chat).get("gen_ai.usage.output_tokens") == tokens
    assert completed_line(app, request_id)["error"] == "CallerLeftError"
    (line,) = [line for line in app.lines(request_id) if line["message"] == "llm_request_failed"]
    assert (line["outcome"], line.get("completion_tokens"), line.get("estimated")) == (
        "cancelled",
        tokens,
        True if tokens else None,
    )
    assert not [line for line in app.lines(request_id) if line["level"] == "ERROR"]
    assert app.value("llmops.llm.calls", outcome="cancelled") == 1
    assert app.value("llmops.llm.calls", outcome="success") == 0
    eventually(
        lambda: app.value("http.server.request.duration", error__type="CallerLeftError") == 1, "the metric"
    )
    assert app.value("llmops.circuit_breaker.state", breaker="litellm", state="closed") == 1
    assert app.value("llmops.circuit_breaker.open_callers") == 0


@pytest.mark.parametrize("streamed", [True, False])
def test_a_caller_who_leaves_before_the_first_piece(
    app: AppUnderTest,
    upstream: FakeUpstream,
    streamed: bool,  # noqa: FBT001 - a row of the table
) -> None:
    token, tasks = app.token(), tasks_of(app)
    upstream.script(Silent())
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    fields = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    with pytest.raises(TimeoutError):
        app.call(
            "POST",
            "/v1/chat/completions",
            body={**CHAT, "stream": streamed},
            token=token,
            headers=fields,
            timeout_s=0.3,
        )
    upstream.wait_for(lambda fake: fake.disconnects == 1)
    assert_left(app, trace_id, 499, None)
    assert_nothing_left(app, tasks)


def test_a_caller_who_leaves_in_the_middle(app: AppUnderTest, upstream: FakeUpstream) -> None:
    token, tasks = app.token(), tasks_of(app)
    upstream.script(RawStream((text("a "), text("trace")), "silence"))
    with calling(app, token) as caller:
        request_id = caller.request_id
        assert [caller.event(), caller.event()] == [text("a "), text("trace")]
    upstream.wait_for(lambda fake: fake.disconnects == 1)
    assert_left(app, request_id, 200, 2)
    assert_nothing_left(app, tasks)


@pytest.mark.alone
def test_the_upstream_is_stopped_soon_after_the_caller_left(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    token, took_s, whole_s = app.token(), [], []
    for number in range(1, 8):
        whole_s.append(app.call("POST", "/v1/chat/completions", body=CHAT, token=token).seconds)
        upstream.script(RawStream((text("a "),), "silence"))
        with calling(app, token) as caller:
            assert caller.event() == text("a ")
            left_at = caller.leave()
        upstream.wait_for(lambda fake, number=number: fake.disconnects == number)  # type: ignore[misc]
        took_s.append(time.monotonic() - left_at)
    assert statistics.median(took_s) < 10 * statistics.median(whole_s)


def test_a_slow_reader_slows_the_upstream(app: AppUnderTest, upstream: FakeUpstream) -> None:
    token, tasks = app.token(), tasks_of(app)
    endless = EndlessStream(content="x" * 10_000)
    upstream.script(endless)
    with calling(app, token) as caller:
        assert caller.event()

        def stands_still() -> bool:
            before = endless.written
            time.sleep(0.25)
            return endless.written == before

        eventually(stands_still, "the upstream to wait for the reader")
        # What the sockets between the two hold, and not a byte that grows with time.
        held = endless.written
        assert held < 32_000_000
        for _ in range(held // 10_000 // 2):
            caller.event()
        eventually(lambda: endless.written > held, "the upstream to go on")
    upstream.wait_for(lambda fake: fake.disconnects == 1)
    assert_nothing_left(app, tasks)


def test_an_error_before_the_first_piece_is_an_answer_like_any_other(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    upstream.script(Status(429, headers={"Retry-After": "120"}))
    answer = stream(app, app.token())
    assert (answer.status, answer.headers["retry-after"]) == (429, "120")
    assert answer.json["error"]["type"] == "RateLimitError"
    assert answer.json["error"]["code"] == "rate_limit_exceeded"
