"""Behaviours of the upstream that are made of an operation's own answer."""

import asyncio
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tests.fakes.streams import RawStream
from tests.fakes.upstream import Behaviour, Status
from tests.fakes.wire import Exchange
from tests.faults.routes import Route

HEAD_FIELDS = ("id", "model", "created", "usage")
"""The fields that an answer may have beside the answer itself."""

Ending: TypeAlias = Literal["end", "cut", "reset", "silence"]
Kind: TypeAlias = Literal["json", "stored", "events", "unasked", "bytes"]
"""What an answer is: ``stored`` are answers about stored responses, and ``unasked`` are events where the
upstream decides whether it answers with them."""

JSON = "application/json"
EVENTS = "text/event-stream"
BEGUN = 2
"""How many events of a stream are there before something happens to it."""

BETWEEN_S = 0.05
"""Between two pieces, so that the first of them are read before something happens."""


@dataclass(frozen=True)
class Given:
    """What an upstream would answer to one call.

    Args:
        route: Where the call is made.
        streamed: Whether it asks for a stream.
    """

    route: Route
    streamed: bool

    @property
    def pieces(self) -> Sequence[bytes]:
        """The answer, in the pieces in which it is written."""
        return self.route.events if self.streamed else (self.route.sample.content,)

    @property
    def content(self) -> bytes:
        """The answer's bytes."""
        return b"".join(self.pieces)

    @property
    def media_type(self) -> str:
        """The answer's ``Content-Type``."""
        return EVENTS if self.streamed else self.route.sample.media

    @property
    def kind(self) -> Kind:
        """What the answer is."""
        if self.streamed:
            return "events" if self.route.row.answer_body == "json" else "unasked"
        if self.route.row.stored:
            return "stored"
        return "json" if self.media_type == JSON else "bytes"

    @property
    def begun(self) -> Sequence[bytes]:
        """What is there of an answer before something happens to it: some events, or half of the bytes."""
        return self.pieces[:BEGUN] if self.streamed else (self.content[: len(self.content) // 2],)


Own: TypeAlias = Callable[[Given], Behaviour]
"""Makes a behaviour of what an upstream would answer."""


def correct(given: Given) -> Behaviour:
    """The answer as it is."""
    if given.streamed:
        return RawStream(given.pieces)
    return Status(200, given.content, content_type=given.media_type)


def as_plain_text(given: Given) -> Behaviour:
    """The answer under another ``Content-Type``."""
    return Status(200, given.content, content_type="text/plain")


def zipped(given: Given) -> Behaviour:
    """The answer, compressed."""
    headers = {"Content-Encoding": "gzip"}
    return Status(200, gzip.compress(given.content), headers, given.media_type)


def without_an_answer(given: Given) -> Behaviour:
    """An object that has all that an answer may have beside the answer itself."""
    answer = given.route.sample.answer
    fields = {} if isinstance(answer, bytes) else answer
    return Status(200, {name: fields[name] for name in HEAD_FIELDS if name in fields})


def too_large(given: Given, size: int) -> Behaviour:
    """An answer of the right shape, larger than the limit."""
    answer = given.route.sample.answer
    if given.kind == "bytes":
        return RawStream((*given.begun, b"x" * size), interval_s=BETWEEN_S, headers=_typed(given))
    fields = {} if isinstance(answer, bytes) else answer
    return Status(200, json.dumps({**fields, "padding": "x" * size}))


def cut_short(given: Given) -> Behaviour:
    """The answer under a length that is too large, and then the end of the connection."""
    return CutShort(given.content, given.media_type)


def byte_by_byte(given: Given) -> Behaviour:
    """The answer, too slowly."""
    return Dripping(given.content, given.media_type)


def first(*pieces: bytes, then: Ending = "end") -> Own:
    """A stream that has these pieces instead of its events."""
    return lambda _given: RawStream(pieces, then)


def after(*pieces: bytes, then: Ending = "end") -> Own:
    """A stream that has begun, and goes on with these pieces."""
    return lambda given: RawStream((*given.begun, *pieces), then, BETWEEN_S, _typed(given))


def _typed(given: Given) -> dict[str, str]:
    return {"Content-Type": given.media_type, "Transfer-Encoding": "chunked"}


def busy_at_first(given: Given) -> Behaviour:
    """A stream whose first event says that the upstream has too much to do."""
    return RawStream((given.route.busy,))


def busy_after(given: Given) -> Behaviour:
    """A stream that has begun, and then says so."""
    return RawStream((*given.begun, given.route.busy), interval_s=BETWEEN_S)


def for_ever(given: Given) -> Behaviour:
    """An answer that has begun, and repeats its last piece."""
    return Repeating(given.begun, given.begun[-1][:1_000], headers=_typed(given))


def comments_for_ever(given: Given) -> Behaviour:
    """A stream that has begun, and says only that it is alive."""
    return Repeating(given.begun, b": here\n\n")


@dataclass(frozen=True)
class CutShort:
    """Content that announces more bytes than it has, then the end of the connection."""

    content: bytes
    media_type: str = JSON
    missing: int = 100

    async def play(self, exchange: Exchange) -> None:
        """Write the content under a length that is too large and hang up."""
        length = f"{len(self.content) + self.missing}"
        await exchange.send_head(200, {"Content-Type": self.media_type, "Content-Length": length})
        exchange.hang_up()
        await exchange.send(self.content, last=True)


@dataclass(frozen=True)
class Dripping:
    """Content that comes one byte at a time."""

    content: bytes
    media_type: str = JSON
    interval_s: float = 0.1

    async def play(self, exchange: Exchange) -> None:
        """Write the head at once and the content slowly."""
        headers = {"Content-Type": self.media_type, "Content-Length": f"{len(self.content)}"}
        await exchange.send_head(200, headers)
        for at in range(len(self.content)):
            await asyncio.sleep(self.interval_s)
            await exchange.send(self.content[at : at + 1], last=at + 1 == len(self.content))


@dataclass(frozen=True)
class Repeating:
    """Pieces, and then one more again and again."""

    pieces: Sequence[bytes]
    again: bytes
    interval_s: float = 0.05
    headers: Mapping[str, str] = field(
        default_factory=lambda: {"Content-Type": EVENTS, "Transfer-Encoding": "chunked"}
    )

    async def play(self, exchange: Exchange) -> None:
        """Write until the client goes away."""
        await exchange.send_head(200, self.headers)
        for piece in self.pieces:
            await exchange.send_chunk(piece)
        while True:
            await exchange.send_chunk(self.again)
            await asyncio.sleep(self.interval_s)
