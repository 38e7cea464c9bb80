"""Where an event ends, however the bytes arrive."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.upstream.messages import LlmRequest, to_json
from service.upstream.stream import EventDecoder, EventTooLargeError, comment, data_of, event

LINE = st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), min_size=1)


@given(
    lines=st.lists(LINE, min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n"]),
    cuts=st.lists(st.integers(1, 9), max_size=80),
)
def test_events_come_out_as_they_are_however_they_are_cut(
    lines: list[str], end: str, cuts: list[int]
) -> None:
    wanted = [f"data: {line}{end}{end}".encode() for line in lines]
    rest = b"".join(wanted)
    decoder = EventDecoder(1_000_000)
    found: list[bytes] = []
    for cut in [*cuts, len(rest)]:
        found += decoder.feed(rest[:cut])
        rest = rest[cut:]
    assert found == wanted
    assert [data_of(raw) for raw in found] == [line.encode().strip() for line in lines]


def test_what_is_cut_off_never_comes_out() -> None:
    assert list(EventDecoder(1_000_000).feed(b"data: a\n\ndata: \xf0\x9f")) == [b"data: a\n\n"]


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\n\n", b"a"),
        (b"data: a\r\n\r\n", b"a"),
        (b"event: x\ndata: a\ndata: b\nid: 1\n\n", b"a\nb"),
        (b": comment\n\n", b""),
        (b"\n\n", b""),
        (b"event: x\n\n", b""),
        (b"data\n\n", b""),
    ],
)
def test_the_data_of_an_event(raw: bytes, data: bytes) -> None:
    assert data_of(raw) == data


def test_an_event_without_end_is_not_kept_for_ever() -> None:
    decoder = EventDecoder(max_event_bytes=100)
    assert list(decoder.feed(b"data: " + b"x" * 80)) == []
    with pytest.raises(EventTooLargeError):
        list(decoder.feed(b"x" * 80))


def test_what_is_written_can_be_read() -> None:
    assert list(EventDecoder(1_000_000).feed(event(b"{}", "done") + comment("hi"))) == [
        b"event: done\ndata: {}\n\n",
        b": hi\n\n",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    fields=st.dictionaries(st.text(), JSON, max_size=4),
    options=st.sampled_from([None, {}, {"include_usage": False, "x": 1}, {"include_usage": True}, "absent"]),
    stream=st.sampled_from([True, False, None, "absent"]),
    indent=st.sampled_from([None, 1]),
)
def test_a_stream_is_asked_for_and_the_rest_stays(
    fields: dict[str, object], options: object, stream: object, indent: int | None
) -> None:
    body = {"messages": [{}], **fields}
    given_ = {"stream_options": options, "stream": stream}
    body = {**body, **{name: value for name, value in given_.items() if value != "absent"}}
    content = json.dumps(body, indent=indent).encode()
    asked = LlmRequest("chat", "demo", body, content).streamed(with_usage=True)
    kept = options if isinstance(options, dict) else {}
    assert json.loads(asked.content) == {
        **body,
        "stream": True,
        "stream_options": {**kept, "include_usage": True},
    }
    assert asked.body == json.loads(asked.content)
    nothing_was_there = options == "absent" and stream in {True, "absent"}
    if nothing_was_there:
        assert asked.content.endswith(content.lstrip()[1:])
    if options == {"include_usage": True} and stream is True:
        assert asked.content is content


def test_json_is_written_so_that_anybody_can_read_it() -> None:
    assert to_json({"a": "ü\ud83d"}) == b'{"a":"\\u00fc\\ud83d"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": float("inf")})


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_empty_lines_between_events_are_left_out_wherever_a_read_ends(end: bytes) -> None:
    stream = b"data: a" + 4 * end + b"data: b" + 2 * end
    for cut in range(len(stream)):
        decoder = EventDecoder(1_000)
        events = [*decoder.feed(stream[:cut]), *decoder.feed(stream[cut:])]
        assert events == [b"data: a" + 2 * end, b"data: b" + 2 * end], cut
