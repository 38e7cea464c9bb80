"""The upstream of the bench: answers at once, and takes whatever telemetry it is sent.

One protocol on uvloop and httptools, in a process of its own. ``POST`` to a path that ends in
``/chat/completions`` gets an answer in OpenAI's shape, streamed where it is asked for (the field ``n`` says
in how many pieces); any other ``POST`` an empty 200, as a collector answers; ``GET`` the list of models.
"""

import asyncio
import json
import multiprocessing
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httptools
import uvloop

from tests.fakes.streams import DONE, chunk, text, usage

ANSWER = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "A trace is the path of one request."},
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20},
    }
).encode()
MODELS = json.dumps(
    {
        "object": "list",
        "data": [{"id": "demo", "object": "model"}, {"id": "other", "object": "model"}],
        # LiteLLM's readiness, for the service's health check.
        "status": "healthy",
    }
).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PROTOBUF = b"application/x-protobuf"
JSON = b"application/json"


def _whole(body: bytes, kind: bytes) -> bytes:
    return HEAD % (kind, len(body)) + body


ANSWERED, LISTED, TAKEN = _whole(ANSWER, JSON), _whole(MODELS, JSON), _whole(b"", PROTOBUF)


def streamed(pieces: int) -> bytes:
    """An answer in so many pieces, all at once."""
    # Each another: LiteLLM ends a stream that says the same thing a hundred times.
    words = (text(f"{number} ") for number in range(pieces))
    events = [*words, chunk(reason="stop"), usage(12, pieces), DONE]
    return STREAM_HEAD + b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


class _Upstream(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # a TCP connection's

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        # Only what asks for a stream is looked at, and that is short.
        if len(self._body) < 4_096:
            self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._transport.write(LISTED)
        elif not self._url.endswith(b"/chat/completions"):
            self._transport.write(TAKEN)
        elif b'"stream":true' in self._body.replace(b" ", b""):
            self._transport.write(streamed(json.loads(self._body).get("max_tokens", 1)))
        else:
            self._transport.write(ANSWERED)


def _serve(listener: socket.socket) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(_Upstream, sock=listener)
        await server.serve_forever()

    uvloop.run(main())


@contextmanager
def upstream() -> Iterator[int]:
    """The upstream in a process of its own; its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=1_000) as listener:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,))
        process.start()
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.join()
