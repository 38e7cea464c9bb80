"""What the fake upstream can do with a request, well or badly."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.fakes.wire import Exchange

_JSON = "application/json"
_CREATED = 1_700_000_000
_ID = "chatcmpl-fake"


class Behaviour(Protocol):
    """Something that the fake upstream can do with a request."""

    async def play(self, exchange: Exchange) -> None:
        """Do it."""


def _requested_model(exchange: Exchange) -> str:
    return str(exchange.request.json["model"])


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class Answer:
    """A correct chat completion; None as the model echoes the request's, None as the cost leaves it out."""

    content: str | None = "Hello from the fake."
    model: str | None = None
    prompt_tokens: int = 10
    completion_tokens: int = 20
    cost: str | None = "0.00042"
    usage: bool = True
    choices: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0

    def body(self, requested_model: str) -> bytes:
        """Return the response's body; `extra` replaces whole top-level members."""
        message = {"role": "assistant", "content": self.content}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        usage = {"usage": _usage(self.prompt_tokens, self.completion_tokens)} if self.usage else {}
        completion = {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": requested_model if self.model is None else self.model,
            "choices": [choice] if self.choices else [],
            **usage,
            **self.extra,
        }
        return json.dumps(completion).encode()

    def all_headers(self) -> dict[str, str]:
        """Return the response's headers except for its length."""
        cost = {} if self.cost is None else {"x-litellm-response-cost": self.cost}
        return {"Content-Type": _JSON, **cost, **self.headers}

    async def play(self, exchange: Exchange) -> None:
        """Answer after the delay."""
        await asyncio.sleep(self.delay_s)
        await exchange.respond(200, self.all_headers(), self.body(_requested_model(exchange)))


@dataclass(frozen=True)
class Embeddings:
    """A correct answer to an embeddings request: a small vector for each text."""

    async def play(self, exchange: Exchange) -> None:
        """Answer at once."""
        given = exchange.request.json["input"]
        number = len(given) if isinstance(given, list) else 1
        vectors = [{"object": "embedding", "index": at, "embedding": [0.25, -0.5]} for at in range(number)]
        usage = {"prompt_tokens": 3 * number, "total_tokens": 3 * number}
        answer = {"object": "list", "data": vectors, "model": _requested_model(exchange), "usage": usage}
        await exchange.respond(200, {"Content-Type": _JSON}, json.dumps(answer).encode())


@dataclass(frozen=True)
class Status:
    """Any status with any body; None as the body is an error in OpenAI's shape."""

    code: int
    body: Mapping[str, Any] | str | bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = _JSON

    def encoded_body(self) -> bytes:
        """Return the body as bytes."""
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, str):
            return self.body.encode()
        return json.dumps(self._error() if self.body is None else dict(self.body)).encode()

    def _error(self) -> dict[str, Any]:
        kind = "server_error" if self.code >= 500 else "invalid_request_error"
        message = f"the fake upstream was told to answer {self.code}"
        return {"error": {"message": message, "type": kind, "param": None, "code": str(self.code)}}

    async def play(self, exchange: Exchange) -> None:
        """Answer with the status at once."""
        headers = {"Content-Type": self.content_type, **self.headers}
        await exchange.respond(self.code, headers, self.encoded_body())


@dataclass(frozen=True)
class Silent:
    """Reads the whole request and never answers, until the client goes away or the server stops."""

    async def play(self, exchange: Exchange) -> None:
        """Wait for ever."""
        del exchange
        await asyncio.Event().wait()


@dataclass(frozen=True)
class AcceptOnly(Silent):
    """Takes the connection and the request's head, reads nothing more and never answers."""


@dataclass(frozen=True)
class Reset:
    """Breaks the connection with a TCP RST before the answer or in the middle of its headers or body."""

    when: Literal["before", "headers", "body"] = "before"

    async def play(self, exchange: Exchange) -> None:
        """Write as much as the moment asks for, then reset."""
        if self.when == "headers":
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: appl")
        if self.when == "body":
            await exchange.send_head(200, {"Content-Type": _JSON, "Content-Length": "1000"})
            await exchange.send(b'{"id":"chatcmpl-fa')
        exchange.reset()


@dataclass(frozen=True)
class Garbage:
    """Raw bytes on the wire that need not be HTTP, then the end of the connection."""

    data: bytes = b"\x00\xffnot http at all\r\n\r\n"

    async def play(self, exchange: Exchange) -> None:
        """Write the bytes and hang up."""
        exchange.hang_up()
        await exchange.send(self.data, last=True)


@dataclass(frozen=True)
class NotJson:
    """A 200 whose body is not JSON."""

    body: bytes = b"<html>oops</html>"
    content_type: str = "text/html"

    async def play(self, exchange: Exchange) -> None:
        """Answer with the body as it is."""
        await exchange.respond(200, {"Content-Type": self.content_type}, self.body)


@dataclass(frozen=True)
class WrongLength:
    """A correct answer that announces more bytes than it has, then the end of the connection."""

    answer: Answer = field(default_factory=Answer)
    missing: int = 100

    async def play(self, exchange: Exchange) -> None:
        """Write the body under a length that is too large and hang up."""
        body = self.answer.body(_requested_model(exchange))
        length = {"Content-Length": str(len(body) + self.missing)}
        await exchange.send_head(200, {**self.answer.all_headers(), **length})
        exchange.hang_up()
        await exchange.send(body, last=True)


@dataclass(frozen=True)
class Drip:
    """A correct answer whose body comes a few bytes at a time."""

    interval_s: float = 1.0
    chunk: int = 1
    answer: Answer = field(default_factory=Answer)

    async def play(self, exchange: Exchange) -> None:
        """Write the head at once and the body slowly."""
        body = self.answer.body(_requested_model(exchange))
        await exchange.send_head(200, {**self.answer.all_headers(), "Content-Length": str(len(body))})
        for start in range(0, len(body), self.chunk):
            await asyncio.sleep(self.interval_s)
            end = start + self.chunk
            await exchange.send(body[start:end], last=end >= len(body))


@dataclass(frozen=True)
class Endless:
    """A chunked answer that never ends, made of white space so that no parser can object early."""

    interval_s: float = 0.05
    chunk: bytes = b" "

    async def play(self, exchange: Exchange) -> None:
        """Write chunks until the client goes away."""
        await exchange.send_head(200, {"Content-Type": _JSON, "Transfer-Encoding": "chunked"})
        while True:
            await exchange.send_chunk(self.chunk)
            await asyncio.sleep(self.interval_s)


@dataclass(frozen=True)
class Stream:
    """Server-sent events in OpenAI's shape; `cut_after` chunks of content the connection just ends."""

    chunks: tuple[str, ...] = ("Hello ", "from ", "the fake.")
    interval_s: float = 0.0
    usage: bool = True
    cut_after: int | None = None
    prompt_tokens: int = 10
    completion_tokens: int = 20
    headers: Mapping[str, str] = field(default_factory=dict)

    async def play(self, exchange: Exchange) -> None:
        """Write the events one by one."""
        headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", **self.headers}
        await exchange.send_head(200, headers)
        for text in self.chunks[: self.cut_after]:
            await self._event(exchange, [_delta({"role": "assistant", "content": text}, None)])
            await asyncio.sleep(self.interval_s)
        if self.cut_after is None:
            await self._end(exchange)
        else:
            exchange.hang_up()

    async def _end(self, exchange: Exchange) -> None:
        await self._event(exchange, [_delta({}, "stop")])
        if self.usage:
            await self._event(exchange, [], usage=_usage(self.prompt_tokens, self.completion_tokens))
        # In one write with the end of the body: a client may leave as soon as it has read [DONE].
        await exchange.send_last_chunk(b"data: [DONE]\n\n")

    async def _event(self, exchange: Exchange, choices: list[dict[str, Any]], **more: Any) -> None:
        event = {
            "id": _ID,
            "object": "chat.completion.chunk",
            "created": _CREATED,
            "model": _requested_model(exchange),
            "choices": choices,
            **more,
        }
        await exchange.send_chunk(b"data: " + json.dumps(event).encode() + b"\n\n")


def _delta(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}
