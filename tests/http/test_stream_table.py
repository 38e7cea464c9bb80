"""What can happen to a stream, row by row: what the caller saw, and what was seen of it everywhere."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.fakes.streams import DONE, EndlessStream, RawStream, chunk, text, usage
from tests.fakes.upstream import Behaviour, FakeUpstream, Reset, Silent, Status
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.streaming import (
    STREAMED,
    add_task_count,
    assert_nothing_left,
    data,
    events,
    name,
    stream,
    tasks_of,
)
from tests.http.support import attribute_sets, attributes, completed_line, eventually, server_span, trace_of

LIMITS: dict[str, Any] = {
    "llm_timeout_s": 0.8,
    "llm_connect_timeout_s": 0.5,
    "stream_chunk_timeout_s": 0.4,
    "stream_timeout_s": 1.2,
    "stream_keep_alive_s": 0.1,
    "breaker_failure_threshold": 1,
}
WHOLE = (text("a "), text("trace"), chunk(reason="stop"), usage(), DONE)
ODD_PIECES = [b"".join(WHOLE)[at : at + 7] for at in range(0, len(b"".join(WHOLE)), 7)]
EMOJI = json.dumps({"choices": [{"index": 0, "delta": {"content": "🙂"}}]}, ensure_ascii=False).encode()
CUT_CHARACTER = b"data: " + EMOJI[: EMOJI.index("🙂".encode()) + 2]
UPSTREAM_SAYS = b'data: {"error": {"message": "slow down", "code": "429"}}\n\n'
BUSY = RawStream((text("a "), UPSTREAM_SAYS))
CUT = RawStream((text("a "), CUT_CHARACTER), "cut")
TIMEOUT = "UpstreamTimeoutError"
SHAPES = ("/v1/chat/completions", "/llm/generate")


@dataclass(frozen=True)
class Row:
    """One thing that can happen.

    Args:
        name: Names the row.
        behaviour: The upstream's.
        error: The error that the caller and all telemetry must show; empty for none.
        saw: The upstream's events that the caller must have got; None where they are without number.
        status: Of the answer; 200 for whatever happens after the first piece.
        opens: Whether it counts against the upstream.
        tokens: What is recorded as the answer's tokens.
    """

    name: str
    behaviour: Behaviour
    error: str = ""
    saw: Sequence[bytes] | None = ()
    status: int = 200
    opens: bool = False
    tokens: int | None = None


def _before(name_: str, behaviour: Behaviour, status: int, error: str, *, opens: bool = True) -> Row:
    return Row(name_, behaviour, error, (), status, opens)


def _after_the_first(name_: str, behaviour: Behaviour, error: str, *, opens: bool = True) -> Row:
    return Row(name_, behaviour, error, (text("a "),), opens=opens, tokens=1)


ROWS = (
    Row("ends well", RawStream(WHOLE), saw=WHOLE[:3], tokens=20),
    Row("ends well, in odd pieces", RawStream(ODD_PIECES), saw=WHOLE[:3], tokens=20),
    Row("counts nothing", RawStream((*WHOLE[:3], DONE)), saw=WHOLE[:3], tokens=2),
    _before("dies before the head", Reset(), 502, "UpstreamError"),
    _before("dies before the first event", RawStream((), "cut"), 502, "UpstreamError"),
    _before("refuses", Status(400), 400, "BadRequestError", opens=False),
    _before("fails", Status(500), 502, "UpstreamError"),
    _before("says at first that it is busy", RawStream((UPSTREAM_SAYS,)), 429, "RateLimitError", opens=False),
    _before("garbage at first", RawStream((b"data: oops\n\n",)), 502, "UpstreamError"),
    _before("nothing but the end", RawStream((DONE,)), 502, "UpstreamError"),
    _before("silent before the head", Silent(), 504, TIMEOUT),
    _before("silent before the first event", RawStream((b": hello\n\n",), "silence"), 504, TIMEOUT),
    _after_the_first("dies after the first event", RawStream((text("a "),), "reset"), "UpstreamError"),
    _after_the_first("ends without an end", RawStream((text("a "), b"\n")), "UpstreamError"),
    _after_the_first("dies within a character", CUT, "UpstreamError"),
    _after_the_first("garbage", RawStream((text("a "), b"data: {oops\n\n", DONE)), "UpstreamError"),
    _after_the_first("no object", RawStream((text("a "), b"data: 7\n\n", DONE)), "UpstreamError"),
    _after_the_first("says that it is busy", BUSY, "RateLimitError", opens=False),
    _after_the_first("silence", RawStream((text("a "),), "silence"), TIMEOUT),
    Row("endless", EndlessStream(0.02), TIMEOUT, None),
)


@contextmanager
def serving(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(add_task_count, litellm_url=upstream.url, **LIMITS) as app:
        yield app


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row(row: Row, path: str, upstream: FakeUpstream) -> None:
    with serving(upstream) as app:
        token, tasks = app.token(), tasks_of(app)
        upstream.script(row.behaviour)
        body = STREAMED if path == SHAPES[0] else {"prompt": "What is a trace?", "stream": True}
        answer = stream(app, token, body, path)

        assert answer.status == row.status
        if row.status == 200:
            _check_events(row, path, answer)
        else:
            assert _error_of(answer.json)["name"] == row.error
            assert answer.headers["content-type"] == "application/json"
        _check_telemetry(row, app, answer)
        assert app.value("llmops.circuit_breaker.state", breaker="litellm", state="closed") == 1
        assert app.value("llmops.circuit_breaker.open_callers", model="demo") == int(row.opens)
        assert_nothing_left(app, tasks)
        # Whoever is still at it is told to stop.
        if isinstance(row.behaviour, (Silent, EndlessStream)) or (
            isinstance(row.behaviour, RawStream) and row.behaviour.then == "silence"
        ):
            upstream.wait_for(lambda fake: fake.disconnects == 1)


def _error_of(body: dict[str, object]) -> dict[str, object]:
    """The facts of either shape."""
    inner = body["error"]
    if isinstance(inner, dict):
        return {**inner, "name": inner["type"]}
    return {**body, "name": inner}


def _check_events(row: Row, path: str, answer: Answer) -> None:
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["traceresponse"].split("-")[1] == answer.request_id
    assert answer.headers["x-llm-attempts"] == "1"
    assert answer.headers["x-cache"] == "BYPASS"
    assert {"llm", "total"} <= {part.split(";")[0] for part in answer.headers["server-timing"].split(", ")}
    answer.body.decode()
    *seen, last = events(answer.body)
    if row.error:
        assert b"[DONE]" not in answer.body
        error = _error_of(data(last))
        assert (error["name"], error["request_id"]) == (row.error, answer.request_id)
        assert name(last) == ("" if path == SHAPES[0] else "error")
    elif path == SHAPES[0]:
        assert last == DONE
    else:
        assert (name(last), data(last)["request_id"]) == ("done", answer.request_id)
    if row.saw is None:
        assert len(seen) > 5
    elif path == SHAPES[0]:
        assert seen == list(row.saw)
    else:
        deltas = [data(event)["choices"][0]["delta"].get("content") for event in row.saw]
        assert [data(event) for event in seen] == [{"text": delta} for delta in deltas if delta]
        assert {name(event) for event in seen} <= {"token"}


def _check_telemetry(row: Row, app: AppUnderTest, answer: Answer) -> None:
    spans = trace_of(app, answer.request_id)
    server = server_span(app, answer.request_id)
    (call,) = [span for span in spans if span.name == "llm call"]
    (chat,) = [span for span in spans if span.name == "chat demo"]
    assert len(spans) == 4, "one of each: server, call, attempt, request"
    assert chat.end_time is not None
    assert call.end_time is not None
    assert server.end_time is not None
    assert chat.end_time <= call.end_time <= server.end_time
    for span in (server, call, chat):
        assert attributes(span).get("error.type", "") == row.error
    for span in (call, chat):
        assert span.status.is_ok == (not row.error)
    if row.status == 200:
        assert server.status.is_ok == (not row.error)
        assert attributes(chat)["gen_ai.response.time_to_first_chunk"] > 0
        assert app.value("gen_ai.client.operation.time_to_first_chunk") == 1
        assert app.value("llmops.llm.time_to_first_chunk", model="demo") == 1
        assert attributes(chat)["gen_ai.request.stream"] is True

    outcome = "error" if row.error else "success"
    counted = {key: value for key, value in attribute_sets(app, "llmops.llm.calls").items() if value}
    labels = {"model": "demo", "outcome": outcome, **({"error.type": row.error} if row.error else {})}
    assert counted == {frozenset(labels.items()): 1}
    error = {"error__type": row.error} if row.error else {}
    duration = "http.server.request.duration"

    def timed() -> bool:
        routes = ("/v1/chat/completions", "/llm/generate")
        return sum(app.value(duration, http__route=route, **error) for route in routes) == 1

    eventually(timed, "the metric, which comes after the span and the line")

    messages = [line for line in app.lines(answer.request_id) if line["message"].startswith("llm_request")]
    assert [line["message"] for line in messages] == [
        "llm_request_started",
        "llm_request_failed" if row.error else "llm_request_completed",
    ]
    if row.tokens is not None:
        assert messages[1]["completion_tokens"] == row.tokens
        assert messages[1].get("estimated", False) == (row.tokens != 20)
        assert attributes(chat)["gen_ai.usage.output_tokens"] == row.tokens
    assert completed_line(app, answer.request_id).get("error", "") == row.error
