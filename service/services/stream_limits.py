"""How long a stream may be silent, and how long it may go on."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from service.clients.llm_stream import StreamEvent
from service.config.settings import Settings
from service.errors import UpstreamTimeoutError

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
