"""What comes out of an upstream's stream, whatever its bytes are and however they arrive."""

import asyncio
import json
import sys
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import RateLimitError, ServiceError, UpstreamError
from service.upstream.messages import LlmRequest
from service.upstream.operations import NoAnswerError, chat_as_events
from service.upstream.stream import ALIVE, EventDecoder, LlmStream, Reading, data_of

TEXT = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
REQUEST = LlmRequest("chat", "demo", {"model": "demo", "messages": []}, b"{}")


class _Body(httpx2.AsyncByteStream):
    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


class _Span:
    def record_chunk(self) -> None:
        """Measure nothing."""


async def _read(pieces: Sequence[bytes]) -> tuple[list[bytes], ServiceError | None, int]:
    """The events, the error that ended them, and how many signs of life were between them."""
    with ThreadPoolExecutor(1) as readers:
        stream = LlmStream(
            httpx2.Response(200, stream=_Body(pieces)),
            REQUEST,
            cast("Any", _Span()),
            Reading(readers, 33_554_432),
            known_model=True,
        )
        found: list[bytes] = []
        alive = 0
        try:
            await stream.first()
            async for event in stream:
                if event is ALIVE:
                    alive += 1
                else:
                    found.append(event.raw)
        except ServiceError as error:
            return found, error, alive
        finally:
            await stream.aclose()
        return found, None, alive


def _events(*pieces: bytes) -> tuple[list[bytes], ServiceError | None]:
    found, error, _ = asyncio.run(_read(pieces))
    return found, error


ODD = st.sampled_from(
    [
        *(TEXT, STOP, DONE, WHOLE, b"\xef\xbb\xbf", b" ", b"\n", b"\r", b"\r\n", b"\n\n\n", b"\t \r\n\r\n"),
        *(b": {\n\n", b": ping\r\r", b"id: 1\nretry: 5\n", b"event: ping\ndata: x\n\n", b"event: error\n\n"),
        *(b"data: ", b"data: {\n", b"data\n\n", b"data:\n\n", b"{", b"}", b"[]", b"null", b"event: error\n"),
        *(TEXT.replace(b"\n", b"\r\n"), STOP.replace(b"\n", b"\r"), DONE[:-1], DONE[:-2], DONE[:6]),
        *(b'data: {"error":[1]}\n\n', b'data: {"error":{"code":429}}\n\n', b'data: {"type":["x"]}\n\n'),
        *(b'data: {"choices":\ndata: []}\n\n', b"data: \xff\n\n", b"\x00", b'{"error":{"code":true}}'),
    ]
)


@given(
    parts=st.lists(ODD, max_size=8),
    ending=st.sampled_from([b"", DONE, TEXT + DONE]),
    cuts=st.lists(st.integers(1, 12), max_size=60),
)
def test_a_stream_ends_well_or_with_one_error_however_it_is_cut(
    parts: list[bytes], ending: bytes, cuts: list[int]
) -> None:
    content = b"".join(parts) + ending
    pieces, rest = [], content
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    pieces.append(rest)

    found, error = _events(content)
    cut_found, cut_error = _events(*pieces)
    assert [data_of(event) for event in cut_found] == [data_of(event) for event in found]
    assert (type(cut_error), str(cut_error)) == (type(error), str(error))
    for raw in found:
        # Each event is one, and whole, for the caller too.
        (event,) = EventDecoder(1_000_000).feed(raw)
        assert isinstance(json.loads(data_of(event)), dict)
    if error is None:
        assert b"[DONE]" in content or content.strip(b"\xef\xbb\xbf\r\n\t ").startswith(b"{")
        assert any(b'"delta"' in raw for raw in found)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_line_ends_of_each_kind_may_be_cut_anywhere(end: bytes, size: int) -> None:
    content = (b": hello\n\n" + TEXT + b"\n" + STOP + DONE).replace(b"\n", end)
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    found, error = _events(*pieces)
    assert error is None
    assert [data_of(raw) for raw in found] == [data_of(TEXT), data_of(STOP)]


@pytest.mark.parametrize(
    "event",
    [b"event: error\n\n", b"event: error\ndata:\n\n", b"data: \nevent:error\r\n\r\n"],
)
def test_an_error_without_data_is_an_error(event: bytes) -> None:
    found, error = _events(TEXT, event, STOP, DONE)
    assert found == [TEXT]
    assert isinstance(error, UpstreamError)


def test_empty_fields_of_an_error_are_none() -> None:
    empty = TEXT.replace(b'"id"', b'"error":{"code":"","message":"","param":null},"id"')
    assert _events(empty, STOP, DONE) == ([empty, STOP], None)
    _, error = _events(TEXT, b'data: {"error":{"code":""}}\n\n', DONE)
    assert isinstance(error, UpstreamError), "without choices it is no answer"


@pytest.mark.parametrize("said", ["true", "1", "[1]", "{}", '{"code":[]}', '{"type":{}}', '{"status":{}}'])
@pytest.mark.parametrize("form", ['data: {{"error":{}}}\n\n', "event: error\ndata: {}\n\n"])
def test_an_error_of_an_odd_shape_is_the_upstreams(said: str, form: str) -> None:
    found, error = _events(TEXT, form.format(said).encode(), DONE)
    assert found == [TEXT]
    assert isinstance(error, UpstreamError)


@pytest.mark.parametrize("after", [b"x", WHOLE, b"\n" + WHOLE])
def test_json_and_more_is_no_answer(after: bytes) -> None:
    found, error = _events(WHOLE + after)
    assert found == []
    assert isinstance(error, UpstreamError)


def test_json_in_drops_shows_life_and_is_the_answer() -> None:
    found, error, alive = asyncio.run(_read([bytes([byte]) for byte in b"\xef\xbb\xbf \r\n" + WHOLE]))
    assert error is None
    assert alive == 0, "they come before the first event"
    assert [json.loads(data_of(raw))["choices"][0]["delta"] for raw in found] == [
        {"role": "assistant", "content": "a"},
        {},
    ]


@pytest.mark.parametrize("blank", [b" ", b"\n", b"\r\n", b"\xef\xbb\xbf "])
def test_white_space_first_is_not_kept(blank: bytes) -> None:
    """Looked at again with each piece, 16 MB of it took two minutes of the processor."""
    pieces = [blank, *[b" " * 1_000] * 2_000, b"\n", TEXT, STOP, DONE]
    tracemalloc.start()
    try:
        found, error = _events(*pieces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error is None
    assert [data_of(raw) for raw in found] == [data_of(TEXT), data_of(STOP)]
    assert peak < 1_000_000


def test_a_run_of_empty_lines_is_no_event() -> None:
    """Each would cost as much as an event, which a megabyte of them would make minutes."""
    decoder = EventDecoder(1_000_000)
    found = list(decoder.feed(TEXT + b"\n" * 100_000 + STOP))
    assert found == [TEXT, STOP]
    assert list(decoder.feed(b"\r\n" * 100_000)) == []


def test_too_many_choices_are_no_answer() -> None:
    choice = {"message": {"content": "a"}}
    assert len(list(chat_as_events({"choices": [choice] * 128}))) == 256
    with pytest.raises(NoAnswerError):
        list(chat_as_events({"choices": [choice] * 129}))


@pytest.mark.parametrize("pieces", [[TEXT, STOP, DONE], [TEXT, b"data: x\n\n"], [WHOLE]])
def test_nothing_is_left_to_the_garbage_collector(pieces: list[bytes]) -> None:
    """A generator that is not closed costs a task of its own, whenever it is found."""
    left: list[object] = []

    async def run() -> None:
        first, _ = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(first, left.append)
        await _read(pieces)

    asyncio.run(run())
    assert left == []


@pytest.mark.parametrize("event", [b": ping\n\n", TEXT])
def test_many_events_at_once_leave_others_their_turn(event: bytes) -> None:
    async def turns() -> int:
        reading = asyncio.create_task(_read([TEXT + event * 10_000 + STOP + DONE]))
        number = 0
        while not reading.done():
            await asyncio.sleep(0)
            number += 1
        assert reading.result()[1] is None
        return number

    assert asyncio.run(turns()) >= 100


def test_the_status_in_an_error_is_its_own() -> None:
    _, error = _events(b'data: {"error":{"code":"429"}}\n\n')
    assert isinstance(error, RateLimitError)


def test_the_status_beside_an_error_is_its_own() -> None:
    _, error = _events(b'event: error\ndata: {"error":{"message":"x"},"status_code":429}\n\n')
    assert isinstance(error, RateLimitError)


@pytest.mark.parametrize("raw", [b"\xed\xa0\x80", b"\xff"])
@pytest.mark.parametrize("piece", [TEXT, WHOLE])
def test_what_is_not_utf_8_is_no_answer(raw: bytes, piece: bytes) -> None:
    """A half of a surrogate pair, which json takes from bytes, cannot be sent to the collector."""
    found, error = _events(piece.replace(b'"a"', b'"' + raw + b'"'), DONE)
    assert found == []
    assert isinstance(error, UpstreamError)
