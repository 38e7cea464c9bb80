"""The events of a streamed answer, and the time limits under which they are passed on."""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

import httpx2

from service.errors import ServiceError, UpstreamError
from service.upstream.errors import from_event, from_transport, invalid_answer
from service.upstream.messages import (
    MAX_CHOICES,
    MAX_NAME_CHARS,
    Completion,
    LlmRequest,
    cost_of,
    count,
    counts_of,
    name_of,
    read_object,
    unusable_numbers,
)
from service.upstream.spans import AttemptSpan

MAX_EVENT_BYTES = 4_194_304
"""The largest single event: without a limit, a stream without line ends would be buffered whole."""

END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n|\r\n\n")
LINE_END = re.compile(rb"\r\n|\n|\r")
MAX_END_BYTES = 4


class EventTooLargeError(ValueError):
    """An event is larger than the limit."""


class EventDecoder:
    """Splits a stream of bytes into events; an event without its end is not returned."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add bytes; return each event that is complete now, with the empty line that ends it.

        Raises:
            EventTooLargeError: An event is not complete within the limit.
        """
        seen = max(0, len(self._rest) - MAX_END_BYTES + 1)
        buffer = self._rest + data if self._rest else data
        start = 0
        while found := END_OF_EVENT.search(buffer, max(seen, start)):
            yield buffer[start : found.end()]
            start = found.end()
        self._rest = buffer[start:]
        if len(self._rest) > self._max_event_bytes:
            raise EventTooLargeError


def data_of(event: bytes) -> bytes:
    """The event's data: its ``data`` lines, joined; empty for a comment."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2:
        # A single line: nearly every event.
        return event[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in LINE_END.split(event) if line.startswith(b"data:")]
    return b"\n".join(lines).strip()


def comment(text: str) -> bytes:
    """A comment line: it keeps a connection from being idle, and clients ignore it."""
    return b": " + text.encode() + b"\n\n"


def event(data: bytes, name: str | None = None) -> bytes:
    """One event; the data must be a single line."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"


DONE: Final = b"[DONE]"
"""The data of the event that ends a stream in OpenAI's format."""

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


class LlmStream:
    """The events of one answer, to be iterated once.

    Iteration ends after the upstream's last event, and raises an error in every other case.

    Args:
        response: The upstream's, with its body unread.
        request: What was asked.
        span: The attempt's; it measures the time to each event.
        known_model: Whether the upstream has listed the model.
        keep_chars: How much of the text is kept for the record of the call.
    """

    def __init__(
        self,
        response: httpx2.Response,
        request: LlmRequest,
        span: AttemptSpan,
        *,
        known_model: bool,
        keep_chars: int = 0,
    ) -> None:
        self._response = response
        self._bytes = response.aiter_raw()
        self._events = self._read()
        self._first: StreamEvent | None = None
        self._ended = False
        self._request = request
        self._span = span
        self._known_model = known_model
        self._deltas = 0
        self._keep_chars = keep_chars
        self._kept: list[str] = []
        self._id: str | None = None
        self._model: str | None = None
        self._usage = counts_of({})
        self._reasons: dict[int, str] = {}

    async def first(self) -> None:
        """Wait for the first event, which stays to be iterated; raises as iterating does."""
        self._first = await anext(self._events, None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._events)

    def completion(self) -> Completion:
        """What is known of the answer so far; without the upstream's count, the deltas are the tokens."""
        usage = self._usage
        unusable_numbers.log(self._request.model, self._response.headers, usage)
        counted = count(usage.get("completion_tokens"))
        estimated = counted is None and self._deltas > 0
        return Completion(
            text="".join(self._kept),
            model=self._model or self._request.model,
            prompt_tokens=count(usage.get("prompt_tokens")),
            completion_tokens=self._deltas if estimated else counted,
            total_tokens=count(usage.get("total_tokens")),
            cost=cost_of(self._response.headers, usage),
            estimated=estimated,
            id=self._id,
            finish_reasons=tuple(reason for _, reason in sorted(self._reasons.items())),
        )

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

    async def _read(self) -> AsyncGenerator[StreamEvent, None]:
        decoder = EventDecoder()
        try:
            async for data in self._bytes:
                events, failure = self._decode(decoder, data)
                for event in events:
                    yield event
                if failure is not None:
                    raise failure
                if self._ended:
                    return
        except httpx2.HTTPError as error:
            raise from_transport(error) from None
        raise UpstreamError("The model's side ended its answer too early. Try again.", label="Cut off")

    def _decode(self, decoder: EventDecoder, data: bytes) -> tuple[list[StreamEvent], ServiceError | None]:
        """The events that are complete with these bytes, and the failure that comes after them, if any."""
        events: list[StreamEvent] = []
        try:
            for raw in decoder.feed(data):
                content = data_of(raw)
                if content == DONE:
                    if self._deltas == 0 and not self._reasons:
                        raise invalid_answer()
                    self._ended = True
                    break
                # A comment has no data: it shows that the upstream is alive.
                if content:
                    events.append(self._event(raw, content))
        except EventTooLargeError:
            return events, invalid_answer()
        except ServiceError as error:
            return events, error
        return events, None

    def _event(self, raw: bytes, data: bytes) -> StreamEvent:
        payload = read_object(data)
        if payload.get("error"):
            raise from_event(payload["error"], self._request.body, known_model=self._known_model)
        self._span.record_chunk()
        self._id = self._id or name_of(payload, "id")
        self._model = self._model or name_of(payload, "model")
        usage = counts_of(payload)
        self._usage = usage or self._usage
        choices = payload.get("choices")
        if not isinstance(choices, list):
            choices = []
        text = self._collect(choices)
        if text and self._keep_chars > 0:
            self._kept.append(text[: self._keep_chars])
            self._keep_chars -= len(text)
        usage_only = bool(usage) and not any(map(_has_content, choices))
        return StreamEvent(raw, text, usage_only, payload)

    def _collect(self, choices: list[Any]) -> str:
        """Collect the finish reasons and count the deltas; the first choice's text."""
        text = ""
        for place, choice in enumerate(choices[:MAX_CHOICES]):
            if not isinstance(choice, dict):
                continue
            index = count(choice.get("index"))
            reason = choice.get("finish_reason")
            if isinstance(reason, str) and len(self._reasons) < MAX_CHOICES:
                self._reasons[place if index is None else index] = reason[:MAX_NAME_CHARS]
            delta = choice.get("delta")
            if not isinstance(delta, dict):
                continue
            if any(value for name, value in delta.items() if name != "role"):
                self._deltas += 1
            content = delta.get("content")
            if index in {0, None} and isinstance(content, str):
                text += content
        return text


def _has_content(choice: object) -> bool:
    """Whether a choice holds more than its index; LiteLLM sends an empty one with the usage."""
    if not isinstance(choice, dict):
        return True
    delta = choice.get("delta")
    content = any(delta.values()) if isinstance(delta, dict) else bool(delta)
    return content or any(value for name, value in choice.items() if name not in {"index", "delta"})
