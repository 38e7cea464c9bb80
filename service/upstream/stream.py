"""How long a stream may be silent, and how long it may go on."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import httpx2

from service.config.settings import Settings
from service.errors import ServiceError, UpstreamError, UpstreamTimeoutError
from service.upstream.errors import from_event, from_transport, nonsense
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
)
from service.upstream.spans import AttemptSpan

MAX_EVENT_BYTES = 4_194_304
"""Largest single event; a stream without an end of line would be kept whole otherwise."""

END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n|\r\n\n")
LINE_END = re.compile(rb"\r\n|\n|\r")
LONGEST_END = 4


class EventTooLargeError(ValueError):
    """An event is larger than anybody's."""


class EventDecoder:
    """Cuts a stream of bytes into whole events; what is cut off in the middle never comes out."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what has arrived; each event that is whole now, with the empty line that ends it.

        Raises:
            EventTooLargeError: An event does not end.
        """
        seen = max(0, len(self._rest) - LONGEST_END + 1)
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
        # One line and the empty one: nearly every event there is.
        return event[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in LINE_END.split(event) if line.startswith(b"data:")]
    return b"\n".join(lines).strip()


def comment(text: str) -> bytes:
    """A line that keeps a connection busy and that no reader takes for an event."""
    return b": " + text.encode() + b"\n\n"


def event(data: bytes, name: str | None = None) -> bytes:
    """One event; the data is one line."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"


DONE = b"[DONE]"
LAST_BYTES_S = 0.1
"""So long the end of a body is waited for after the last event, so that the connection is used again."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event.

    Args:
        raw: As the upstream wrote it, with the empty line that ends it.
        text: The piece of the answer's text in it.
        usage_only: Whether it is the count of tokens that the upstream was asked for, and nothing else.
        payload: The event, parsed.
    """

    raw: bytes
    text: str = ""
    usage_only: bool = False
    payload: Mapping[str, Any] | None = None


class LlmStream:
    """The events of one answer, to be iterated once; it ends in order, or with an error, never in between.

    Args:
        response: The upstream's, with its body unread.
        request: What was asked.
        span: The attempt's; each piece is noted there.
        known_model: Whether the upstream has listed the model.
        keep_chars: So much of the text is kept, for a record that holds it.
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
        self._request = request
        self._span = span
        self._known_model = known_model
        self._decoder = EventDecoder()
        self._ready: deque[StreamEvent] = deque()
        self._ended = False
        self._failure: ServiceError | None = None
        self._pieces = 0
        self._keep_chars = keep_chars
        self._kept: list[str] = []
        self._id: str | None = None
        self._model: str | None = None
        self._usage = counts_of({})
        self._reasons: dict[int, str] = {}

    async def first(self) -> None:
        """Wait until there is something to pass on; raises as iterating does."""
        while not self._ready and not self._ended:
            if self._failure is not None:
                raise self._failure
            await self._read()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        await self.first()
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    def completion(self) -> Completion:
        """What is known of the answer so far; where nobody counted, its pieces are the tokens."""
        usage = self._usage
        counted = count(usage.get("completion_tokens"))
        estimated = counted is None and self._pieces > 0
        return Completion(
            text="".join(self._kept),
            model=self._model or self._request.model,
            prompt_tokens=count(usage.get("prompt_tokens")),
            completion_tokens=self._pieces if estimated else counted,
            total_tokens=count(usage.get("total_tokens")),
            cost=cost_of(self._response.headers, usage),
            estimated=estimated,
            id=self._id,
            finish_reasons=tuple(reason for _, reason in sorted(self._reasons.items())),
        )

    async def aclose(self) -> None:
        """Let the connection go: back to the pool when the answer was read to its end, closed otherwise."""
        if self._ended:
            with suppress(TimeoutError, httpx2.HTTPError):
                async with asyncio.timeout(LAST_BYTES_S):
                    async for _ in self._bytes:
                        pass
        try:
            await self._bytes.aclose()
        finally:
            await self._response.aclose()

    async def _read(self) -> None:
        try:
            data = await anext(self._bytes, None)
        except httpx2.HTTPError as error:
            raise from_transport(error) from None
        if data is None:
            raise UpstreamError("The model's side ended its answer too early. Try again.", label="Cut off")
        try:
            for raw in self._decoder.feed(data):
                self._take(raw)
                if self._ended:
                    return
        except EventTooLargeError:
            self._failure = nonsense()
        except ServiceError as error:
            # What came before it goes out first, though both were in one packet.
            self._failure = error

    def _take(self, raw: bytes) -> None:
        data = data_of(raw)
        if not data:
            # A comment says that the upstream lives, and is nothing of the answer.
            return
        if data == DONE:
            if self._pieces == 0 and not self._reasons:
                raise nonsense()
            self._ended = True
            return
        payload = read_object(data)
        if payload.get("error"):
            raise from_event(payload["error"], self._request.body, known_model=self._known_model)
        self._span.chunk()
        self._id = self._id or name_of(payload, "id")
        self._model = self._model or name_of(payload, "model")
        self._usage = counts_of(payload) or self._usage
        choices = payload.get("choices")
        if not isinstance(choices, list):
            choices = []
        text = self._learn(choices)
        if text and self._keep_chars > 0:
            self._kept.append(text[: self._keep_chars])
            self._keep_chars -= len(text)
        counted_only = bool(counts_of(payload)) and not any(map(_says_something, choices))
        self._ready.append(StreamEvent(raw, text, counted_only, payload))

    def _learn(self, choices: list[Any]) -> str:
        """Take the reasons and count the pieces; the first choice's text."""
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
                self._pieces += 1
            content = delta.get("content")
            if index in {0, None} and isinstance(content, str):
                text += content
        return text


def _says_something(choice: object) -> bool:
    """Whether a choice is more than a place; LiteLLM sends its count with an empty one, OpenAI with none."""
    if not isinstance(choice, dict):
        return True
    delta = choice.get("delta")
    said = any(delta.values()) if isinstance(delta, dict) else bool(delta)
    return said or any(value for name, value in choice.items() if name not in {"index", "delta"})


Relay = Callable[[StreamEvent], Awaitable[None]]
"""Hands one event on to the caller; the next one is not read before it returns."""


@dataclass(frozen=True)
class StreamLimits:
    """The limits of one stream.

    Args:
        silence_s: Seconds between two pieces; the time that the caller takes to read one is not counted.
        whole_s: Seconds from the call's start to the stream's end, everything together.
    """

    silence_s: float
    whole_s: float

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The limits as they are set; the whole is never shorter than the wait for the first piece."""
        return cls(settings.stream_chunk_timeout_s, max(settings.stream_timeout_s, settings.llm_timeout_s))

    async def hand_on(self, events: AsyncIterator[StreamEvent], relay: Relay, spent_s: float) -> None:
        """Hand each event on as it comes.

        Args:
            events: The events; the next is not read before the last is handed on.
            relay: Hands one on.
            spent_s: Seconds since the call's start.

        Raises:
            UpstreamTimeoutError: A limit was reached.
            ServiceError: As iterating the events does.
        """
        now = asyncio.get_running_loop().time
        end = now() + self.whole_s - spent_s
        try:
            async with asyncio.timeout_at(end) as limit:
                async for event in events:
                    limit.reschedule(end)
                    await relay(event)
                    limit.reschedule(min(end, now() + self.silence_s))
        except TimeoutError:
            if not limit.expired():
                raise
            # Timers fire a little early, so the clock does not tell which limit it was.
            if limit.when() == end:
                # Nobody's fault: the upstream was still at it, so this does not count against it.
                raise UpstreamTimeoutError(
                    f"The answer was not complete within {self.whole_s:g} s.",
                    retryable=False,
                    label="Stream too long",
                ) from None
            raise UpstreamTimeoutError(
                f"The model said nothing for {self.silence_s:g} s. Try again.", label="Silence"
            ) from None
