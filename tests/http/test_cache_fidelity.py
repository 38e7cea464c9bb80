"""A hit is the first answer, field by field, streamed or not, whichever way it was first given."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.client_library import assembled, read
from tests.fakes.streams import DONE, RawStream, chunk, usage
from tests.fakes.upstream import Answer as Reply
from tests.fakes.upstream import FakeUpstream, Status
from tests.harness import Answer, AppUnderTest, running_app

BODY = {"messages": [{"role": "user", "content": "What is a trace?"}], "temperature": 0}
ROLE = chunk({"role": "assistant", "content": ""})
STOP = chunk({}, "stop")
CALLED = chunk({}, "tool_calls")


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(litellm_url=upstream.url, cache_enabled=True) as served:
        # What is not stored is asked again, and then it fails.
        upstream.default = upstream.default_stream = Status(400)
        yield served


class Asked:
    """The first answer of a scripted upstream, and both replays of it."""

    def __init__(self, app: AppUnderTest, upstream: FakeUpstream, first: Any, **more: Any) -> None:
        upstream.script(first)
        self.token = app.token()
        self.app = app
        self.streams_first = isinstance(first, RawStream)
        self.first = self.ask(stream=self.streams_first, **more)
        assert (self.first.status, self.first.headers["x-cache"]) == (200, "MISS"), self.first.body
        self.whole, self.streamed = self.ask(), self.ask(stream=True)
        self.counted = self.ask(stream=True, stream_options={"include_usage": True})

    def ask(self, **more: Any) -> Answer:
        return self.app.call("POST", "/v1/chat/completions", body=BODY | more, token=self.token)

    @property
    def stored(self) -> bool:
        answers = (self.whole, self.streamed, self.counted)
        results = {(answer.status, answer.headers["x-cache"]) for answer in answers}
        assert results in ({(200, "HIT")}, {(400, "MISS")})
        return results == {(200, "HIT")}

    @property
    def message(self) -> dict[str, Any]:
        """The only choice's message in the plain replay; the streamed one must be equal."""
        assert self.stored, self.whole.body
        (whole,), (streamed,) = read(self.whole.body)["choices"], assembled(self.streamed.body)["choices"]
        # The library leaves out further fields of a choice that come later.
        assert streamed.items() <= whole.items()
        (choice,) = self.whole.json["choices"]
        return dict(choice["message"])


def events(answer: Answer) -> list[dict[str, Any]]:
    data = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(entry) for entry in data]


def piece(**call: Any) -> bytes:
    """An event with a piece of a tool call."""
    return chunk({"tool_calls": [call]})


def function(name: str | None, arguments: str) -> dict[str, Any]:
    return {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}


FIRST, SECOND = function("f", '{"x":1}'), function("g", '{"y":2}')


def test_parallel_calls_of_tools_stay_two(app: AppUnderTest, upstream: FakeUpstream) -> None:
    pieces = (
        chunk({"role": "assistant", "content": None}),
        piece(index=0, id="a", type="function", function=function("f", "")),
        piece(index=1, id="b", type="function", function=function("g", "")),
        piece(index=1, function=function(None, '{"y":2}')),
        piece(index=0, function=function(None, '{"x":')),
        piece(index=0, function=function(None, "1}")),
        CALLED,
    )
    asked = Asked(app, upstream, RawStream((*pieces, usage(), DONE)))

    assert asked.message["tool_calls"] == [
        {"id": "a", "type": "function", "function": FIRST},
        {"id": "b", "type": "function", "function": SECOND},
    ]
    assert assembled(asked.streamed.body) == assembled(asked.first.body)


@pytest.mark.parametrize(
    "pieces",
    [
        (piece(id="a", type="function", function=FIRST), piece(id="b", type="function", function=SECOND)),
        (piece(index=0, id="a", function=FIRST), piece(index=0, id="b", function=SECOND)),
        (chunk({"tool_calls": [{"id": "a", "function": FIRST}, {"id": "b", "function": SECOND}]}),),
        (piece(index=1, id="b", function=SECOND), piece(index=0, id="a", function=FIRST)),
        (piece(index=0, id="a", function=FIRST), piece(index=0, function=function("fg", ""))),
        (piece(index=0, id="a", type="function", function=FIRST), piece(index=0, type="custom")),
        (piece(index=0, id="a", type="function", function={"name": "f", "arguments": {"x": 1}}),),
    ],
    ids=[
        *("no index", "one index, two ids", "no index in one event", "out of order"),
        *("a longer name", "two types", "arguments are an object"),
    ],
)
def test_calls_of_tools_that_cannot_be_told_apart_are_not_stored(
    app: AppUnderTest, upstream: FakeUpstream, pieces: tuple[bytes, ...]
) -> None:
    assert not Asked(app, upstream, RawStream((ROLE, *pieces, CALLED, DONE))).stored
    assert app.value("llmops.cache.writes", outcome="skipped") == 1


def test_what_identifies_a_call_is_taken_once(app: AppUnderTest, upstream: FakeUpstream) -> None:
    repeated = {"index": 0, "id": "call_1", "type": "function"}
    pieces = [piece(**repeated, function=function("f", part)) for part in ('{"x"', ":", "1}")]
    asked = Asked(app, upstream, RawStream((ROLE, *pieces, CALLED, DONE)))

    assert asked.message["tool_calls"] == [{"id": "call_1", "type": "function", "function": FIRST}]


def test_a_name_in_parts_is_put_together(app: AppUnderTest, upstream: FakeUpstream) -> None:
    pieces = [piece(index=0, id="a", type="function", function=function("get_", ""))]
    pieces.append(piece(index=0, id="", function=function("time", "{}")))
    asked = Asked(app, upstream, RawStream((ROLE, *pieces, CALLED, DONE)))

    assert asked.message["tool_calls"][0]["function"] == function("get_time", "{}")


def test_custom_calls_and_the_older_function_call(app: AppUnderTest, upstream: FakeUpstream) -> None:
    custom = {"index": 0, "id": "a", "type": "custom", "custom": {"name": "sql", "input": "select "}}
    older = chunk({"function_call": {"name": "f", "arguments": '{"x"'}})
    pieces = (ROLE, piece(**custom), piece(index=0, custom={"input": "1"}), older)
    last = chunk({"function_call": {"arguments": ":1}"}}, "tool_calls")
    asked = Asked(app, upstream, RawStream((*pieces, last, DONE)))

    assert asked.stored
    # OpenAI's library cannot assemble custom calls.
    message, delta = (
        asked.whole.json["choices"][0]["message"],
        events(asked.streamed)[0]["choices"][0]["delta"],
    )
    call = {"id": "a", "type": "custom", "custom": {"name": "sql", "input": "select 1"}}
    assert (message["tool_calls"], delta["tool_calls"]) == ([call], [call | {"index": 0}])
    assert message["function_call"] == delta["function_call"] == FIRST


MORE: dict[str, Any] = {
    "citations": ["https://example.org/a"],
    "search_results": [{"title": "A", "url": "https://example.org/a"}],
    "provider": "Somebody",
    "service_tier": "default",
    "system_fingerprint": "fp_1",
    "x_groq": {"id": "req_1"},
}


@pytest.mark.parametrize("place", ["every", "first", "middle", "last", "counts"])
def test_further_fields_of_an_answer_are_there_on_every_replay(
    app: AppUnderTest, upstream: FakeUpstream, place: str
) -> None:
    def more(here: str) -> dict[str, Any]:
        return MORE if place in {"every", here} else {}

    pieces = (
        chunk({"role": "assistant", "content": "It "}, **more("first")),
        chunk({"content": "is."}, **more("middle")),
        chunk({}, "stop", **more("last")),
        chunk(
            usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
            **more("counts"),
        ),
        DONE,
    )
    asked = Asked(app, upstream, RawStream(pieces), stream_options={"include_usage": True})

    assert asked.stored
    assert MORE.items() <= asked.whole.json.items()
    for replay in (asked.streamed, asked.counted):
        seen: dict[str, Any] = {}
        for found in events(replay):
            seen.update({name: value for name, value in found.items() if name in MORE})
        # The library takes the fingerprint from the last event, where there was none.
        without = place == "middle" or (place == "counts" and replay is asked.streamed)
        hidden = {"system_fingerprint"} if without else set()
        assert {name: value for name, value in MORE.items() if name not in hidden} == seen
    assert assembled(asked.counted.body) == assembled(asked.first.body)
    assert [bool(found["choices"]) for found in events(asked.counted)] == [True, True, False]


def test_a_further_field_between_two_that_are_null_is_there(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    pieces = (
        chunk({"role": "assistant", "content": "It "}, citations=None),
        chunk({"content": "is."}, citations=["https://example.org/a"]),
        chunk({}, "stop", citations=None),
    )
    asked = Asked(app, upstream, RawStream((*pieces, DONE)))

    assert asked.whole.json["citations"] == ["https://example.org/a"]
    assert events(asked.streamed)[-1]["citations"] == ["https://example.org/a"]
    assert assembled(asked.streamed.body) == assembled(asked.first.body)


def test_the_last_event_may_add_to_what_groq_says(app: AppUnderTest, upstream: FakeUpstream) -> None:
    first, last = {"id": "req_1"}, {"id": "req_1", "usage": {"total_time": 0.1}}
    pieces = (chunk({"role": "assistant", "content": "It is."}, x_groq=first), chunk({}, "stop", x_groq=last))
    asked = Asked(app, upstream, RawStream((*pieces, DONE)))

    assert asked.whole.json["x_groq"] == last
    assert [found["x_groq"] for found in events(asked.streamed)] == [first, last]


@pytest.mark.parametrize("field", ["citations", "provider", "timings"])
def test_a_further_field_with_two_values_is_not_stored(
    app: AppUnderTest, upstream: FakeUpstream, field: str
) -> None:
    values: list[dict[str, Any]] = [{field: ["1"]}, {field: ["1", "2"]}]
    pieces = (chunk({"content": "a"}, **values[0]), chunk({}, "stop", **values[1]))
    assert not Asked(app, upstream, RawStream((*pieces, DONE))).stored


def test_what_a_server_changes_in_each_event_is_taken_from_the_first(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    pieces = (
        chunk({"role": "assistant", "content": "It "}, id="1", created=1, model="a", obfuscation="xyz"),
        chunk({"content": "is."}, id="2", created=2, model="b", obfuscation="x"),
        chunk({}, "stop", id="3", created=3, model="c"),
    )
    asked = Asked(app, upstream, RawStream((*pieces, DONE)))

    assert {name: asked.whole.json[name] for name in ("id", "created", "model")} == {
        "id": "1",
        "created": 1,
        "model": "a",
    }
    assert "obfuscation" not in asked.whole.json
    assert assembled(asked.streamed.body) == assembled(asked.first.body)


def _choice(delta: dict[str, Any], reason: str | None = None, index: int = 0, **more: Any) -> bytes:
    return chunk(choices=[{"index": index, "delta": delta, "finish_reason": reason, **more}])


def test_further_fields_of_a_choice_are_there_on_every_replay(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    safe = {"hate": {"filtered": False, "severity": "safe"}}
    pieces = (
        _choice({"role": "assistant", "content": ""}, native_finish_reason=None, content_filter_results={}),
        _choice({"content": "It "}, native_finish_reason=None, content_filter_results=safe),
        _choice({"content": "is."}, native_finish_reason=None, content_filter_results=safe),
        _choice({}, "stop", native_finish_reason="end_turn", content_filter_results={}),
    )
    asked = Asked(app, upstream, RawStream((*pieces, DONE)))

    assert asked.message == {"role": "assistant", "content": "It is."}
    (choice,) = asked.whole.json["choices"]
    assert (choice["native_finish_reason"], choice["content_filter_results"]) == ("end_turn", safe)
    last = events(asked.streamed)[-1]["choices"][0]
    assert (last["native_finish_reason"], last["content_filter_results"]) == ("end_turn", safe)
    assert assembled(asked.streamed.body) == assembled(asked.first.body)


def test_two_verdicts_of_a_filter_are_not_stored(app: AppUnderTest, upstream: FakeUpstream) -> None:
    pieces = [
        _choice({"content": "a"}, content_filter_results={"hate": {"severity": level}}) for level in "ab"
    ]
    assert not Asked(app, upstream, RawStream((*pieces, STOP, DONE))).stored


def test_log_probabilities_are_appended(app: AppUnderTest, upstream: FakeUpstream) -> None:
    def token(text: str) -> dict[str, Any]:
        return {"token": text, "logprob": -0.1, "bytes": list(text.encode()), "top_logprobs": []}

    pieces = (
        _choice({"role": "assistant", "content": ""}, logprobs={"content": [], "refusal": None}),
        _choice({"content": "It "}, logprobs={"content": [token("It ")], "refusal": None}),
        _choice({"content": "is."}, logprobs={"content": [token("is.")], "refusal": None}),
        _choice({}, "stop", logprobs=None),
    )
    asked = Asked(app, upstream, RawStream((*pieces, DONE)))

    assert asked.stored
    assert asked.whole.json["choices"][0]["logprobs"]["content"] == [token("It "), token("is.")]
    assert assembled(asked.streamed.body) == assembled(asked.first.body)


@pytest.mark.parametrize("inside", [False, True], ids=["in the message", "in LiteLLM's own field"])
def test_thoughts_in_pieces_are_one_block(app: AppUnderTest, upstream: FakeUpstream, *, inside: bool) -> None:
    def thought(**block: Any) -> bytes:
        blocks = [{"type": "thinking", **block}]
        delta: dict[str, Any] = {"thinking_blocks": blocks, "reasoning_content": block["thinking"]}
        if inside:
            delta["provider_specific_fields"] = {"thinking_blocks": blocks}
        return chunk(delta)

    pieces = (
        thought(thinking="Let me ", signature=None),
        thought(thinking="think."),
        thought(thinking="", signature="c2lnbmVk"),
        chunk({"thinking_blocks": [{"type": "redacted_thinking", "data": "x"}]}),
        thought(thinking="Again.", signature="YWdhaW4="),
    )
    asked = Asked(app, upstream, RawStream((ROLE, *pieces, chunk({"content": "It is."}), STOP, DONE)))

    blocks = [
        {"type": "thinking", "thinking": "Let me think.", "signature": "c2lnbmVk"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "Again.", "signature": "YWdhaW4="},
    ]
    message = asked.message
    assert message["thinking_blocks"] == blocks
    assert message["reasoning_content"] == "Let me think.Again."
    if inside:
        assert message["provider_specific_fields"]["thinking_blocks"] == [blocks[0], blocks[2]]


@pytest.mark.parametrize(
    "pieces",
    [
        (chunk({"role": "assistant", "content": ""}),),
        (chunk({"role": "assistant", "content": None}),),
        (chunk({"role": "assistant", "content": " \n"}),),
        (chunk({"reasoning_content": "Let me "}), chunk({"reasoning_content": "think."})),
        (chunk({"content": None, "tool_calls": []}),),
        (_choice({"content": "one"}), _choice({"content": ""}, "stop", 1)),
    ],
    ids=["empty", "null", "blank", "thoughts", "no calls", "one choice of two"],
)
def test_a_stream_that_says_nothing_is_not_stored(
    app: AppUnderTest, upstream: FakeUpstream, pieces: tuple[bytes, ...]
) -> None:
    asked = Asked(app, upstream, RawStream((*pieces, STOP, DONE)))
    assert not asked.stored
    assert app.value("llmops.cache.writes", outcome="skipped") == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": ""}, "stop"),
        ({"content": None}, "stop"),
        ({"content": None, "tool_calls": []}, "tool_calls"),
        ({"content": "", "reasoning_content": "Let me think."}, "stop"),
        ({"content": [{"type": "thinking", "thinking": "Let me think."}]}, "stop"),
    ],
    ids=["empty", "null", "no calls", "thoughts", "parts"],
)
def test_an_answer_that_says_nothing_is_not_stored(
    app: AppUnderTest, upstream: FakeUpstream, message: dict[str, Any], reason: str
) -> None:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    asked = Asked(app, upstream, Reply(extra={"choices": [choice]}))
    assert not asked.stored
    assert app.value("llmops.cache.writes", outcome="skipped") == 1


NOTE = {"type": "url_citation", "url_citation": {"url": "https://example.org", "title": "A"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}, "index": 0}
THOUGHT = {"type": "reasoning.text", "text": "a"}
UNKNOWN: dict[str, tuple[Any, Any]] = {
    "annotations": ([NOTE], [NOTE]),
    "images": ([IMAGE], [IMAGE | {"index": 1}]),
    "audio": ({"id": "audio_1", "data": "AA==", "transcript": "It "}, {"data": "AQ==", "transcript": "is."}),
    "reasoning_details": (
        [{"type": "reasoning.text", "text": "a"}],
        [{"type": "reasoning.text", "text": "b"}],
    ),
    "new_text": ("a", "b"),
    "new_number": (1, 1),
    "new_object": ({"a": 1}, {"a": 2}),
    "new_list": ([1], [2]),
}


@pytest.mark.parametrize("field", UNKNOWN)
def test_a_field_that_is_not_known_is_not_put_together(
    app: AppUnderTest, upstream: FakeUpstream, field: str
) -> None:
    pieces = [chunk({"content": "It is. ", field: value}) for value in UNKNOWN[field]]
    assert not Asked(app, upstream, RawStream((ROLE, *pieces, STOP, DONE))).stored


@pytest.mark.parametrize("field", UNKNOWN)
def test_a_field_that_is_not_known_and_comes_whole_is_kept(
    app: AppUnderTest, upstream: FakeUpstream, field: str
) -> None:
    value = UNKNOWN[field][0]
    pieces = (chunk({"content": "It is.", field: None}), chunk({field: value}))
    asked = Asked(app, upstream, RawStream((ROLE, *pieces, STOP, DONE)))

    assert asked.message[field] == value
    assert assembled(asked.streamed.body) == assembled(asked.first.body)


@pytest.mark.parametrize(
    "pieces",
    [
        (chunk({"content": [{"type": "text", "text": "It is."}]}),),
        (chunk({"content": "half \ud83d"}), chunk({"content": "\ude00"})),
        (chunk({"content": "a"}, object="something.else"),),
        (_choice({"content": "a"}), _choice({"content": "b"}, "stop", 2)),
        (chunk(choices=[{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]),),
        (chunk({"content": "a", "images": [{"index": 1}, {"index": 0}]}),),
        (chunk({"content": "a", "role": "assistant"}), chunk({"role": "user"})),
        (usage(), chunk({"content": "a"})),
        (chunk({"content": "a"}, usage={"prompt_tokens": 1}),),
        (b'data: {"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"x":NaN}}]}\n\n',),
    ],
    ids=[
        *("parts", "half a character", "another object", "a missing choice", "no index of a choice"),
        *("indices out of order", "two roles", "counts first", "counts in the middle", "no number"),
    ],
)
def test_what_cannot_be_put_together_without_loss_is_not_stored(
    app: AppUnderTest, upstream: FakeUpstream, pieces: tuple[bytes, ...]
) -> None:
    assert not Asked(app, upstream, RawStream((*pieces, STOP, DONE))).stored


def test_a_character_in_two_escapes_is_no_half(app: AppUnderTest, upstream: FakeUpstream) -> None:
    asked = Asked(app, upstream, RawStream((chunk({"content": "whole \U0001f600"}), STOP, DONE)))
    assert asked.message["content"] == "whole \U0001f600"


@pytest.mark.parametrize("include", [False, True])
def test_counts_in_the_last_piece_stay_there(
    app: AppUnderTest, upstream: FakeUpstream, *, include: bool
) -> None:
    counts = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    pieces = (chunk({"role": "assistant", "content": "It is."}), chunk({}, "stop", usage=counts))
    asked = Asked(app, upstream, RawStream((*pieces, DONE)), stream_options={"include_usage": include})

    assert asked.whole.json["usage"] == counts
    assert assembled(asked.first.body)["usage"] == read(asked.whole.body)["usage"]
    for replay in (asked.streamed, asked.counted):
        assert assembled(replay.body) == assembled(asked.first.body)


def test_choices_that_alternate_are_put_together(app: AppUnderTest, upstream: FakeUpstream) -> None:
    pieces = (
        _choice({"role": "assistant", "content": ""}),
        _choice({"role": "assistant", "content": ""}, index=1),
        *(_choice({"content": text}, index=index) for text, index in (("a", 1), ("b", 0), ("c", 1))),
        _choice({}, "stop", 1, native_finish_reason="x"),
        _choice({"content": "d"}),
        _choice({}, "stop"),
    )
    asked = Asked(app, upstream, RawStream((*pieces, usage(), DONE)))

    assert asked.stored
    assert [choice["message"]["content"] for choice in asked.whole.json["choices"]] == ["bd", "ac"]
    assert assembled(asked.streamed.body) == assembled(asked.first.body)


def test_a_whole_answer_is_the_same_as_a_stream(app: AppUnderTest, upstream: FakeUpstream) -> None:
    def token(text: str) -> dict[str, Any]:
        return {"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": []}

    def choice(index: int, text: str) -> dict[str, Any]:
        message = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "annotations": [NOTE],
            "images": [IMAGE],
        }
        logprobs = {"content": [token(text)], "refusal": None}
        return {"index": index, "message": message, "finish_reason": "stop", "logprobs": logprobs} | {
            "native_finish_reason": "end_turn"
        }

    asked = Asked(app, upstream, Reply(extra={"choices": [choice(0, "one"), choice(1, "two")], **MORE}))

    assert asked.whole.body == asked.first.body
    assert assembled(asked.counted.body) == read(asked.first.body)
    without_counts = {name: value for name, value in read(asked.first.body).items() if name != "usage"}
    assert assembled(asked.streamed.body) == without_counts


@pytest.mark.parametrize(
    "choices",
    [
        [{"index": 1}, {"index": 0}],
        [{"index": 0}, {"index": 0}],
        [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a", "images": [{"index": 1}, {"index": 0}]},
            }
        ],
        [{"index": 0, "message": {"role": "assistant", "content": "a", "tool_calls": ["x"]}}],
    ],
    ids=["choices out of order", "one index twice", "images out of order", "a call that is no object"],
)
def test_a_whole_answer_that_a_stream_would_change_is_not_stored(
    app: AppUnderTest, upstream: FakeUpstream, choices: list[dict[str, Any]]
) -> None:
    base = {"message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
    assert not Asked(app, upstream, Reply(extra={"choices": [base | choice for choice in choices]})).stored
