"""A scriptable OpenAI-compatible upstream on a real TCP port; it plays a LiteLLM proxy."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Self

from tests.fakes.behaviours import (
    AcceptOnly,
    Answer,
    Behaviour,
    Drip,
    Embeddings,
    Endless,
    Garbage,
    NotJson,
    Reset,
    Silent,
    Status,
    Stream,
    WrongLength,
)
from tests.fakes.operations import SAMPLES, STORED
from tests.fakes.streams import RawStream
from tests.fakes.waiting import Watched
from tests.fakes.wire import (
    Exchange,
    Head,
    SeenRequest,
    WatchfulReader,
    noticing_hangup_unread,
    read_body,
    read_head,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

__all__ = [
    "AcceptOnly",
    "Answer",
    "Behaviour",
    "Drip",
    "Embeddings",
    "Endless",
    "FakeUpstream",
    "Garbage",
    "NotJson",
    "Reset",
    "SeenRequest",
    "Silent",
    "Status",
    "Stream",
    "WrongLength",
    "refusing_port",
]


def _is_chat(request: Head | SeenRequest) -> bool:
    return request.method == "POST" and request.path.endswith("/chat/completions")


def _is_embeddings(request: SeenRequest) -> bool:
    return request.method == "POST" and request.path.endswith("/embeddings")


def _sample_of(request: SeenRequest) -> Behaviour | None:
    """A correct answer to a request of any other operation."""
    for sample in SAMPLES.values():
        if request.method == "POST" and request.path == f"/v1{sample.path}":
            if sample.stream is not None and request.json.get("stream"):
                return RawStream(sample.stream)
            return Status(200, sample.content, content_type=sample.media)
    for stored in STORED.values():
        path = re.fullmatch(r"/v1/responses/[^/]+(/.*)?", request.path)
        if path is not None and (request.method, path[1] or "") == (stored.method, stored.below):
            return Status(200, stored.content)
    return None


@contextmanager
def refusing_port() -> Iterator[int]:
    """Hold a loopback port on which nothing listens, so that a connection to it is refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


class FakeUpstream(Watched):
    """A server that records every request and answers model calls by script, else by default.

    Args:
        tls: The context with which it speaks TLS, as localhost; without it, plain HTTP.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self._tls = tls
        self.default: Behaviour = Answer()
        self.default_stream: Behaviour = Stream()
        self.models: list[str] = ["demo", "other-model"]
        self.wildcards: list[str] = []
        self.models_behaviour: Behaviour | None = None
        self.health_behaviour: Behaviour | None = None
        self.embeddings_behaviour: Behaviour = Embeddings()
        self.unknown_model_error = True
        self._script: deque[Behaviour] = deque()
        self._requests: list[SeenRequest] = []
        self._connections = 0
        self._disconnects = 0
        self._failures: list[Exception] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        # Whatever loop policy the service installs, the fake keeps to the loop that its tricks are made for.
        self._runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name="fake-upstream")
        self._thread.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._failures:
            raise ExceptionGroup("the fake upstream could not do its part", self._failures)

    def __repr__(self) -> str:
        with self._changed:
            seen = [f"{request.method} {request.path}" for request in self._requests]
            return f"<FakeUpstream {seen} connections={self._connections} disconnects={self._disconnects}>"

    @property
    def url(self) -> str:
        """The base URL, without /v1."""
        return f"http://127.0.0.1:{self.port}" if self._tls is None else f"https://localhost:{self.port}"

    @property
    def requests(self) -> list[SeenRequest]:
        """A copy of the requests seen so far, in the order of their arrival."""
        with self._changed:
            return list(self._requests)

    @property
    def chat_requests(self) -> list[SeenRequest]:
        """The chat completions among the requests."""
        return [request for request in self.requests if _is_chat(request)]

    @property
    def open_connections(self) -> int:
        """The number of TCP connections that are open now."""
        return len(self._tasks)

    @property
    def connections(self) -> int:
        """The number of TCP connections accepted since the start."""
        with self._changed:
            return self._connections

    @property
    def disconnects(self) -> int:
        """The number of requests since the start whose client left before the answer was complete."""
        with self._changed:
            return self._disconnects

    def script(self, *behaviours: Behaviour) -> None:
        """Queue behaviours for the next model calls, whatever model they ask for."""
        with self._changed:
            self._script.extend(behaviours)

    def clear(self) -> None:
        """Forget the requests and what is left of the script; the two counters go on."""
        with self._changed:
            self._requests.clear()
            self._script.clear()

    def _run(self) -> None:
        with self._runner:
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        server = await self._loop.create_server(self._protocol, sock=self._listener, ssl=self._tls)
        await self._stop.wait()
        server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = WatchfulReader(self._loop)

        def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # asyncio leaves Nagle's algorithm on for a listener that it did not make: 40 ms an answer.
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                self._connections += 1
                self._changed.notify_all()
            task = self._loop.create_task(self._converse(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._conversed)

        return asyncio.StreamReaderProtocol(reader, connected, loop=self._loop)

    def _conversed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._failures.append(error)

    async def _converse(self, reader: WatchfulReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve_request(reader, writer):
                pass
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        finally:
            # Nothing to do after an orderly end; otherwise a client that does not read must not hold us up.
            writer.transport.abort()

    async def _serve_request(self, reader: WatchfulReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; tell whether the connection can take another."""
        head = await read_head(reader)
        if head is None:
            return False
        with ExitStack() as stack:
            unread = self._leaves_unread(head)
            if unread:
                stack.enter_context(noticing_hangup_unread(writer, reader.gone))
            body = b"" if unread else await read_body(reader, head)
            if body is None:
                self._count_disconnect()
                return False
            seen = SeenRequest(head.method, head.path, head.headers, body, time.monotonic(), query=head.query)
            return await self._play(self._take(seen), Exchange(seen, writer), reader.gone)

    def _leaves_unread(self, head: Head) -> bool:
        with self._changed:
            coming = self._script[0] if self._script else self.default
            return _is_chat(head) and isinstance(coming, AcceptOnly)

    def _take(self, request: SeenRequest) -> Behaviour:
        """Record the request and choose what to do with it, as one step for whoever is waiting."""
        with self._changed:
            behaviour = self._choose(request)
            self._requests.append(request)
            self._changed.notify_all()
            return behaviour

    def _choose(self, request: SeenRequest) -> Behaviour:
        if _is_chat(request):
            return self._choose_for_chat(request)
        if _is_embeddings(request):
            return self._script.popleft() if self._script else self.embeddings_behaviour
        sample = _sample_of(request)
        if sample is not None:
            return self._script.popleft() if self._script else sample
        if request.method == "GET" and request.path in {"/models", "/v1/models"}:
            return self.models_behaviour or self._list_of_models(request)
        if request.method == "GET" and request.path in {"/health/liveliness", "/health/readiness"}:
            return self.health_behaviour or Status(200, {"status": "healthy"})
        return Status(404)

    def _choose_for_chat(self, request: SeenRequest) -> Behaviour:
        if self._script:
            return self._script.popleft()
        if isinstance(self.default, AcceptOnly):
            return self.default
        model = request.json.get("model")
        if self.unknown_model_error and model not in self.models:
            return _unknown_model(model)
        streamed = type(self.default) is Answer and request.json.get("stream")
        return self.default_stream if streamed else self.default

    def _list_of_models(self, request: SeenRequest) -> Behaviour:
        """The list; where any name is answered, with a wildcard if that is asked for, as LiteLLM has it."""
        entry = {"object": "model", "created": 0, "owned_by": "fake"}
        wildcards = [*self.wildcards, *(() if self.unknown_model_error else ("*",))]
        names = [*self.models, *(wildcards if "return_wildcard_routes=true" in request.query else ())]
        return Status(200, {"object": "list", "data": [{"id": name, **entry} for name in names]})

    async def _play(self, behaviour: Behaviour, exchange: Exchange, gone: asyncio.Event) -> bool:
        """Play until the answer is complete or the client has gone; tell whether to keep the connection."""
        playing = asyncio.ensure_future(behaviour.play(exchange))
        leaving = asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({playing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            playing.cancel()
            leaving.cancel()
            outcome, _ = await asyncio.gather(playing, leaving, return_exceptions=True)
        # An OSError is only how the client's leaving looks to a write.
        if isinstance(outcome, Exception) and not isinstance(outcome, OSError):
            raise outcome
        if not exchange.complete:
            self._count_disconnect()
            return False
        return exchange.keep_alive

    def _count_disconnect(self) -> None:
        with self._changed:
            self._disconnects += 1
            self._changed.notify_all()


def _unknown_model(model: object) -> Status:
    message = (
        f"/chat/completions: Invalid model name passed in model={model}. "
        "Call `/v1/models` to view available models for your key."
    )
    kind = "invalid_request_error"
    return Status(400, {"error": {"message": message, "type": kind, "param": "model", "code": "400"}})
