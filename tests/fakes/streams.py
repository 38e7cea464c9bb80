"""Streams that the fake upstream can make, well or badly, in bytes that a test chooses."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.fakes.wire import Exchange

_HEADERS = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}
DONE = b"data: [DONE]\n\n"


def chunk(delta: Mapping[str, Any] | None = None, reason: str | None = None, **more: Any) -> bytes:
    """One event of a chat completion; without a delta and a reason it has no choices."""
    choices = []
    if delta is not None or reason is not None:
        choices = [{"index": 0, "delta": dict(delta or {}), "finish_reason": reason}]
    fields = {
        "id": "chatcmpl-fake",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "demo",
    }
    # What more there is may be other choices.
    return b"data: " + json.dumps({**fields, "choices": choices, **more}).encode() + b"\n\n"


def text(content: str) -> bytes:
    """One event with a piece of text."""
    return chunk({"content": content})


def usage(prompt: int = 10, completion: int = 20) -> bytes:
    """The event with the count of tokens."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return chunk(usage=counts)


@dataclass(frozen=True)
class RawStream:
    """Pieces of a body as they are, one write each, and then an end.

    ``then``: ``end`` in order, ``cut`` the connection without the end of the body, ``reset`` it, or
    ``silence``.
    """

    pieces: Sequence[bytes]
    then: Literal["end", "cut", "reset", "silence"] = "end"
    interval_s: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)

    async def play(self, exchange: Exchange) -> None:
        """Write the pieces."""
        await exchange.send_head(200, {**_HEADERS, **self.headers})
        if self.then == "end":
            for piece in self.pieces[:-1]:
                await self._write(exchange, piece)
            await exchange.send_last_chunk(self.pieces[-1])
            return
        for piece in self.pieces:
            await self._write(exchange, piece)
        if self.then == "cut":
            exchange.hang_up()
        elif self.then == "reset":
            # What was written must be read before the reset throws it away.
            await asyncio.sleep(0.1)
            exchange.reset()
        else:
            await asyncio.Event().wait()

    async def _write(self, exchange: Exchange, piece: bytes) -> None:
        await exchange.send_chunk(piece)
        await asyncio.sleep(self.interval_s)


class Gate:
    """Lets through as many steps as were allowed; for a test's thread to hold and the fake's loop to pass."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)

    def allow(self, steps: int = 1) -> None:
        """Allow further steps."""
        self._allowed.release(steps)

    async def step(self) -> None:
        """Wait until a step is allowed."""
        while not self._allowed.acquire(blocking=False):  # noqa: ASYNC110 - it is set from another thread
            await asyncio.sleep(0.001)


@dataclass(frozen=True)
class GatedStream:
    """Pieces that are written one by one, each when the gate allows it; the last one ends the body."""

    pieces: Sequence[bytes]
    gate: Gate

    async def play(self, exchange: Exchange) -> None:
        """Write the pieces."""
        await exchange.send_head(200, _HEADERS)
        for number, piece in enumerate(self.pieces, 1):
            await self.gate.step()
            if number == len(self.pieces):
                await exchange.send_last_chunk(piece)
            else:
                await exchange.send_chunk(piece)


class EndlessStream:
    """Pieces for ever; ``written`` counts the bytes that the connection took."""

    def __init__(self, interval_s: float = 0.0, content: str = "again and again ") -> None:
        self._interval_s = interval_s
        self._piece = text(content)
        self.written = 0

    async def play(self, exchange: Exchange) -> None:
        """Write until the client goes away."""
        await exchange.send_head(200, _HEADERS)
        while True:
            await exchange.send_chunk(self._piece)
            self.written += len(self._piece)
            await asyncio.sleep(self._interval_s)
