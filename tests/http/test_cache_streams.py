"""A stored answer is handed on as a stream, and a streamed answer that ended well is stored."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.behaviours import Behaviour
from tests.fakes.streams import DONE, RawStream, chunk
from tests.fakes.upstream import Answer as Reply
from tests.fakes.upstream import FakeUpstream, Stream
from tests.harness import Answer, AppUnderTest, running_app

BODY = {"messages": [{"role": "user", "content": "What is a trace?"}], "temperature": 0}
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(litellm_url=upstream.url, cache_enabled=True) as served:
        yield served


def chat(app: AppUnderTest, token: str, **more: Any) -> Answer:
    answer = app.call("POST", "/v1/chat/completions", body=BODY | more, token=token)
    assert answer.status == 200, answer.body
    return answer


def events(answer: Answer) -> list[Any]:
    data = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(entry) for entry in data[:-1]]


def joined(found: list[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in found for choice in event["choices"])


def test_a_whole_answer_is_replayed_as_a_stream(app: AppUnderTest, upstream: FakeUpstream) -> None:
    token = app.token()
    chat(app, token)
    streamed = chat(app, token, stream=True)
    with_usage = chat(app, token, stream=True, stream_options={"include_usage": True})

    assert streamed.headers["x-cache"] == "HIT"
    assert streamed.headers["content-type"] == "text/event-stream"
    assert joined(events(streamed)) == "Hello from the fake."
    assert [event["choices"][0]["finish_reason"] for event in events(streamed)] == [None, "stop"]
    assert {event["object"] for event in events(streamed)} == {"chat.completion.chunk"}
    assert events(with_usage)[-1]["usage"]["total_tokens"] == 30
    assert not events(with_usage)[-1]["choices"]
    assert len(upstream.chat_requests) == 1
    assert app.value("llmops.llm.calls", outcome="cached") == 2


def test_a_streamed_answer_is_stored_and_replayed_in_both_forms(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    upstream.script(Stream())
    token = app.token()
    first = chat(app, token, stream=True)
    again, whole = chat(app, token, stream=True), chat(app, token)

    assert [answer.headers["x-cache"] for answer in (first, again, whole)] == ["MISS", "HIT", "HIT"]
    assert joined(events(again)) == joined(events(first)) == "Hello from the fake."
    assert whole.json["object"] == "chat.completion"
    assert whole.json["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello from the fake."},
        "finish_reason": "stop",
    }
    assert whole.json["usage"]["total_tokens"] == 30
    assert len(upstream.chat_requests) == 1


def test_the_services_own_stream_is_served_from_the_cache_too(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    token = app.token()
    body = {"prompt": "What is a trace?", "stream": True}
    upstream.script(Stream())
    first, second = (app.call("POST", "/llm/generate", body=body, token=token) for _ in range(2))

    done = [json.loads(answer.body.decode().rsplit("data: ", 1)[1]) for answer in (first, second)]
    assert [entry["cache"] for entry in done] == ["miss", "hit"]
    assert (done[1]["cache_kind"], done[1]["cost"]) == ("exact", 0.0)
    assert b'data: {"text": "Hello from the fake."}' in second.body
    assert second.headers["x-cache"] == "HIT"
    assert len(upstream.chat_requests) == 1


def test_calls_of_tools_come_back_in_both_forms(app: AppUnderTest, upstream: FakeUpstream) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    upstream.default = Reply(extra={"choices": [choice]})
    token = app.token()
    whole, streamed = chat(app, token), chat(app, token, stream=True)

    assert streamed.headers["x-cache"] == "HIT"
    first, last = events(streamed)
    assert first["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **TOOL_CALL}]
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert whole.json["choices"][0]["message"]["tool_calls"] == [TOOL_CALL]


def test_streamed_calls_of_tools_are_put_together(app: AppUnderTest, upstream: FakeUpstream) -> None:
    name, start, end = "look", '{"at": ', '"it"}'
    upstream.script(
        RawStream(
            (
                chunk(
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "index": 0,
                                "id": "call_1",
                                "type": "function",
                                "function": {"name": name, "arguments": start},
                            }
                        ],
                    }
                ),
                chunk({"tool_calls": [{"index": 0, "function": {"arguments": end}}]}),
                chunk({}, "tool_calls"),
                DONE,
            )
        )
    )
    token = app.token()
    chat(app, token, stream=True)
    whole = chat(app, token)

    assert whole.headers["x-cache"] == "HIT"
    assert whole.json["choices"][0]["message"]["tool_calls"] == [TOOL_CALL]


@pytest.mark.parametrize(
    "behaviour",
    [
        Stream(cut_after=2),
        RawStream((chunk({"content": "cut"}, "length"), DONE)),
        RawStream((chunk({"content": "cut"}, "content_filter"), DONE)),
        RawStream((chunk({"content": "no end"}), DONE)),
        RawStream((chunk({"refusal": "no"}), chunk({}, "stop"), DONE)),
    ],
    ids=["cut off", "length", "filter", "no reason", "refusal"],
)
def test_a_stream_that_is_not_whole_is_not_stored(
    app: AppUnderTest, upstream: FakeUpstream, behaviour: Behaviour
) -> None:
    upstream.script(behaviour)
    token = app.token()
    chat(app, token, stream=True)

    assert chat(app, token).headers["x-cache"] == "MISS"
    assert len(upstream.chat_requests) == 2
