"""The events of a streamed answer, and the time limits under which they are passed on."""

import asyncio
import json
import re
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self, TypeVar

import httpx2

from service.errors import ServiceError, UpstreamError
from service.upstream.errors import error_of, from_event, from_transport, invalid_answer
from service.upstream.large_answers import LARGE_BYTES
from service.upstream.messages import (
    Completion,
    LlmRequest,
    completion_of,
    failure_in,
    read_answer,
    read_object,
)
from service.upstream.operations import MAX_CHOICES, MAX_NAME_CHARS, OPERATIONS, Facts, NoAnswerError
from service.upstream.spans import AttemptSpan
from service.upstream.transport import ENCODED

T = TypeVar("T")

END_OF_EVENT = re.compile(rb"(\r\n\r\n|\n\n|\r\r|\n\r\n|\r\n\n)[\r\n]*")
"""An empty line, in the group, and those that follow it."""

LINE_END = re.compile(rb"\r\n|\n|\r")
MAX_END_BYTES = 4


class EventTooLargeError(ValueError):
    """An event is larger than the limit."""


class EventDecoder:
    """Splits a stream of bytes into events.

    Args:
        max_event_bytes: The largest single event; without a limit, a stream without line ends would be
            buffered whole.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add bytes; return each event that is complete now, with the empty line that ends it.

        Raises:
            EventTooLargeError: An event is not complete within the limit.
        """
        # Most reads end with an event. The others are appended in place: a large event comes in many reads.
        buffer: bytes | bytearray = data
        seen = 0
        if self._rest:
            seen = max(0, len(self._rest) - MAX_END_BYTES + 1)
            self._rest += data
            buffer = self._rest
        elif data[:1] in {b"\n", b"\r"}:
            # Empty lines after an event whose read ended before them.
            buffer = data = data.lstrip(b"\r\n")
        start = 0
        while found := END_OF_EVENT.search(buffer, max(seen, start)):
            yield bytes(buffer[start : found.end(1)])
            start = found.end()
        if buffer is data:
            self._rest += data[start:]
        else:
            del self._rest[:start]
        if len(self._rest) > self._max_event_bytes:
            raise EventTooLargeError

    @property
    def rest(self) -> bytes:
        """The bytes of the event that is not complete."""
        return bytes(self._rest)


def data_of(event: bytes) -> bytes:
    """The event's data: its ``data`` lines, joined; empty for a comment."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2:
        # A single line: nearly every event.
        return event[5:].strip()
    if b"data:" not in event:
        return b""
    lines = [line[5:].removeprefix(b" ") for line in LINE_END.split(event) if line.startswith(b"data:")]
    return b"\n".join(lines).strip()


def name_of_event(event: bytes) -> bytes:
    """The value of the event's ``event`` field; empty where it has none."""
    if b"event:" not in event:
        return b""
    names = [line[6:].strip() for line in LINE_END.split(event) if line.startswith(b"event:")]
    return names[-1] if names else b""


def comment(text: str) -> bytes:
    """A comment line: it keeps a connection from being idle, and clients ignore it."""
    return b": " + text.encode() + b"\n\n"


def event(data: bytes, name: str | None = None) -> bytes:
    """One event; the data must be a single line."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"


DONE: Final = b"[DONE]"
"""The data of the event that ends a stream in OpenAI's format."""

ERROR: Final = b"error"
"""The name of an event that is an error."""

PING: Final = b"ping"
"""The name of an event without content; Anthropic's protocol has it."""

MAX_IN_A_ROW = 100
"""How many events are read from what has arrived before other requests have their turn, after some 5 ms."""

MAX_DRAIN_S = 0.1
"""How long the end of the body is waited for after the last event, so that the connection can be reused."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event.

    Args:
        raw: The event's bytes, with the empty line that ends it.
        text: The part of the answer's text in it.
        usage_only: Whether it holds the token counts, which this service asks for, and nothing else.
        payload: The event, parsed.
    """

    raw: bytes
    text: str = ""
    usage_only: bool = False
    payload: Mapping[str, Any] | None = None


ALIVE: Final = StreamEvent(b"")
"""Stands for bytes of the upstream that are no event of the answer: a comment, a ping, a part of an event.
They show that it is at work, and are not passed on."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers of a client are read.

    Args:
        readers: Where large ones are parsed.
        max_event_bytes: The largest single event.
        keep_chars: How much of the text is kept for the record of the call.
    """

    readers: Executor
    max_event_bytes: int
    keep_chars: int = 0

    async def run(self, size: int, read: Callable[[], T]) -> T:
        """Read so many bytes; in one of a few threads where they are many."""
        if size <= LARGE_BYTES:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self.readers, read)


EVENT_STREAM: Final = "text/event-stream"
JSON: Final = "application/json"
IDENTITY: Final = "identity"
UNKNOWN: Final = "application/octet-stream"


def media_type_of(headers: Mapping[str, str]) -> str:
    """The media type of an answer, in lower case and without parameters; empty where it names none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class AnswerEvents(ABC):
    """An answer that arrives in pieces, to be iterated once.

    Iteration ends after the answer's last piece, and raises an error in every other case.

    Args:
        response: The upstream's, with its body unread.
        request: What was asked.
        span: The attempt's; it measures the time to the pieces.
        reading: How it is read.
        known_model: Whether the upstream has listed the model.
    """

    content_type: str
    """The media type that the caller is told."""

    def __init__(
        self,
        response: httpx2.Response,
        request: LlmRequest,
        span: AttemptSpan,
        reading: Reading,
        *,
        known_model: bool,
    ) -> None:
        self._response = response
        self._request = request
        self._span = span
        self._reading = reading
        self._known_model = known_model
        self._operation = OPERATIONS[request.operation]
        self._keep_chars = reading.keep_chars
        self._bytes = response.aiter_raw()
        self._events = self._read()
        self._first: StreamEvent | None = None
        self._ended = False
        self.error = b""
        """The event that is an error, as it came; empty where there is none."""
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Set what is known of the answer before anything is read."""

    @abstractmethod
    def _read(self) -> AsyncGenerator[StreamEvent, None]:
        """The pieces, with ``ALIVE`` between them."""

    @abstractmethod
    def completion(self) -> Completion:
        """What is known of the answer so far."""

    async def first(self) -> None:
        """Wait for the first piece, which stays to be iterated; raises as iterating does."""
        while (event := await anext(self._events, None)) is ALIVE:
            pass
        self._first = event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._events)

    async def aclose(self) -> None:
        """Release the connection: to the pool when the answer was read to its end, closed otherwise."""
        await self._events.aclose()
        if self._ended:
            with suppress(TimeoutError, httpx2.HTTPError):
                async with asyncio.timeout(MAX_DRAIN_S):
                    async for _ in self._bytes:
                        pass
        try:
            await self._bytes.aclose()
        finally:
            await self._response.aclose()


class LlmStream(AnswerEvents):
    """An answer as server-sent events.

    A whole answer in JSON, which some providers send though they are asked for a stream, comes as the events
    of one. Arguments as the base class has them.
    """

    content_type = EVENT_STREAM

    def _prepare(self) -> None:
        self._started = False
        self._pieces = 0
        self._kept: list[str] = []
        self._id: str | None = None
        self._model: str | None = None
        self._usage: dict[str, Any] = {}
        self._reasons: dict[int, str] = {}
        self._failure: ServiceError | None = None

    def completion(self) -> Completion:
        """What is known of the answer so far; without the upstream's count, the deltas are the tokens."""
        facts = Facts(
            text="".join(self._kept),
            id=self._id,
            model=self._model,
            usage=self._usage,
            finish_reasons=self._reasons,
        )
        return completion_of(self._request, facts, self._response.headers, self._pieces)

    async def _read(self) -> AsyncGenerator[StreamEvent, None]:
        decoder = EventDecoder(self._reading.max_event_bytes)
        try:
            async with aclosing(self._server_sent()) as body:
                async for data in body:
                    alive = True
                    try:
                        for number, raw in enumerate(decoder.feed(data), 1):
                            if number % MAX_IN_A_ROW == 0:
                                await asyncio.sleep(0)
                            event = await self._event(raw)
                            if event is not None:
                                alive = False
                                yield event
                            if self._is_over():
                                return
                    except EventTooLargeError:
                        raise invalid_answer() from None
                    if alive:
                        yield ALIVE
        except httpx2.HTTPError as error:
            self._break_off(error)
            return
        # Some servers close the connection without the empty line that would end their last event.
        async for event in self._without_end(decoder.rest):
            yield event

    def _break_off(self, error: httpx2.HTTPError) -> None:
        """Raise why the body ended, unless all of the answer is there, however its body ends."""
        if not (self._operation.ends_with_body and self._reasons):
            raise from_transport(error) from None
        self._ended = True

    async def _without_end(self, rest: bytes) -> AsyncIterator[StreamEvent]:
        """The event that ends the stream, where only its empty line is missing; raises where it is not so."""
        raw = rest.rstrip(b"\r\n") + b"\n\n"
        if self._operation.ends_with_done:
            if data_of(raw) == DONE:
                self._end()
        elif self._ends(raw):
            event = await self._event(raw)
            if event is not None:
                yield event
        if self._operation.ends_with_body and self._reasons:
            self._ended = True
        if not self._is_over():
            raise UpstreamError("The model's side ended its answer too early. Try again.", label="Cut off")

    def _ends(self, raw: bytes) -> bool:
        """Whether an event is whole, and the last one."""
        read = self._operation.read_event
        if read is None:
            return False
        try:
            return read(read_object(data_of(raw)), name_of_event(raw).decode("utf-8", "replace")).ends
        except UpstreamError:
            return False

    def _is_over(self) -> bool:
        """Whether the last event was read; raises what it says about why the answer failed."""
        if self._failure is not None:
            raise self._failure
        return self._ended

    async def _server_sent(self) -> AsyncGenerator[bytes, None]:
        """The body as server-sent events.

        A body that is a JSON object is read to its end and becomes the events that a stream would have. Its
        first byte decides, not its ``Content-Type``: no server-sent event begins with a brace.
        """
        start, text, past_mark = b"", b"", False
        async for data in self._bytes:
            start += data
            # Not while it may be a part of the byte order mark (WHATWG HTML, section 9.2.5).
            if not past_mark and (len(start) >= len(BOM_UTF8) or not BOM_UTF8.startswith(start)):
                start, past_mark = start.removeprefix(BOM_UTF8), True
            if past_mark:
                text = start.lstrip()
                if text:
                    break
                # Of white space, the last byte tells whether a line has begun.
                start = start[-1:]
            yield b""
        else:
            return
        if not text.startswith(b"{"):
            yield start
            async for data in self._bytes:
                yield data
            return
        whole = bytearray(text)
        async for data in self._bytes:
            whole += data
            yield b""
        for raw in self._events_of(await self._parse(bytes(whole))):
            yield raw

    def _events_of(self, answer: Mapping[str, Any]) -> Iterator[bytes]:
        """A whole answer as the events of a stream; an error is one event."""
        make = self._operation.whole_as_events
        if failure_in(answer) is not None:
            yield event(json.dumps(answer).encode())
        elif make is None:
            raise invalid_answer()
        else:
            try:
                for data, name in make(answer):
                    yield event(json.dumps(data, separators=(",", ":")).encode(), name)
            except NoAnswerError:
                raise invalid_answer() from None
        yield event(DONE)

    async def _parse(self, data: bytes, event_name: bytes = b"") -> dict[str, Any]:
        return await self._reading.run(len(data), partial(_read_payload, data, event_name))

    def _end(self) -> None:
        if self._pieces == 0 and not self._reasons:
            raise invalid_answer()
        self._ended = True

    async def _event(self, raw: bytes) -> StreamEvent | None:
        """One event of the answer; None for what is none: its end, a comment, a ping."""
        data, name = data_of(raw), name_of_event(raw)
        if data == DONE:
            # Where an event ends a stream, as in Responses, this one says nothing.
            if self._operation.ends_with_done:
                self._end()
            return None
        if name == PING or not (data or name == ERROR):
            return self._ping(raw) if data else None
        payload = await self._parse(data, name)
        if payload.get("type") == PING.decode():
            return self._ping(raw)
        said = error_of(payload, is_error=name == ERROR)
        if said is not None and not self._is_part(payload):
            self.error = raw
            raise from_event(said, self._response.headers, self._request.body, known_model=self._known_model)
        self._span.record_chunk()
        self._started = True
        facts = self._take(payload, name.decode("utf-8", "replace"))
        return StreamEvent(raw, facts.text or "", facts.usage_only, payload)

    def _ping(self, raw: bytes) -> StreamEvent | None:
        """A ping of the protocol's is passed on between other events; OpenAI's clients know none."""
        return StreamEvent(raw) if self._started and self._operation.shape == "anthropic" else None

    def _is_part(self, payload: Mapping[str, Any]) -> bool:
        """Whether an event's ``error`` is a field of the protocol; a whole response has one, mostly null."""
        return not self._operation.ends_with_done and payload.get("type") not in {"error", None}

    def _take(self, payload: Mapping[str, Any], name: str) -> Facts:
        """Read one event, and keep what it says about the answer."""
        read = self._operation.read_event
        if read is None:
            raise invalid_answer()
        facts = read(payload, name)
        self._id = self._id or facts.id
        self._model = self._model or facts.model
        # Messages sends its counts in two parts.
        self._usage.update(facts.usage)
        self._pieces += facts.pieces
        for index, reason in facts.finish_reasons.items():
            if index in self._reasons or len(self._reasons) < MAX_CHOICES:
                self._reasons[index] = reason
        if facts.text and self._keep_chars > 0:
            self._kept.append(facts.text[: self._keep_chars])
            self._keep_chars -= len(facts.text)
        if facts.ends:
            self._ended = True
        if facts.failure is not None:
            self._failure = from_event(
                facts.failure, self._response.headers, self._request.body, known_model=self._known_model
            )
            self._failure.told = True
        return facts


class ByteStream(AnswerEvents):
    """An answer that is no stream of events, in the pieces in which it arrives.

    An answer in JSON is read whole before it is passed on, since it may be an error. Arguments as the base
    class has them.
    """

    def _prepare(self) -> None:
        self._completion: Completion | None = None
        self._kept = bytearray()
        self.content_type = self._response.headers.get("content-type", UNKNOWN)
        self._media_type = media_type_of({"content-type": self.content_type})

    def completion(self) -> Completion:
        """What is known of the answer so far; bytes that are no JSON have no counts."""
        if self._completion is not None:
            return self._completion
        text = self._kept.decode("utf-8", "replace")
        return completion_of(self._request, Facts(text=text), self._response.headers)

    async def _read(self) -> AsyncGenerator[StreamEvent, None]:
        is_json = self._media_type == JSON
        if not (is_json or self._operation.has_media_type(self._media_type)) or not self._is_passable:
            # A page of a proxy's, for instance.
            raise invalid_answer()
        started = False
        try:
            if is_json:
                yield await self._whole()
                return
            async for data in self._bytes:
                if not data:
                    continue
                if not started:
                    started = True
                    self._span.record_chunk()
                if self._media_type.startswith("text/") and len(self._kept) < self._keep_chars:
                    self._kept += data[: self._keep_chars - len(self._kept)]
                yield StreamEvent(data)
        except httpx2.HTTPError as error:
            raise from_transport(error) from None
        if not started:
            raise invalid_answer()

    @property
    def _is_passable(self) -> bool:
        """Whether the type can stand in the head of our answer, and the bytes are of that type."""
        given, coding = self.content_type, self._response.headers.get(ENCODED, IDENTITY)
        return (
            coding.lower() == IDENTITY
            and given.isascii()
            and given.isprintable()
            and len(given) <= MAX_NAME_CHARS
        )

    async def _whole(self) -> StreamEvent:
        """An answer in JSON, checked as every whole answer is."""
        content = b"".join([data async for data in self._bytes])
        read = partial(
            read_answer, content, self._response.headers, self._request, known_model=self._known_model
        )
        reply = await self._reading.run(len(content), read)
        self._span.record_chunk()
        self._completion = reply.completion
        return StreamEvent(content)


def _read_payload(data: bytes, event_name: bytes) -> dict[str, Any]:
    """The event's data; an error may be a text alone."""
    try:
        return read_object(data)
    except UpstreamError:
        if event_name != ERROR:
            raise
        return {"message": data.decode("utf-8", "replace")}
