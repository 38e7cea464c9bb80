"""A load generator on uvloop and httptools: fast enough not to be what is measured.

`python -m tests.bench.http_load` is run by the bench in a process of its own: it reads a plan as one line of
JSON from its standard input and answers with one line, again and again, until the input ends.
"""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Self

import httptools
import uvloop

COUNTER = "%(number)08d"
"""Stands in a body for a number that no other request of the run has."""


@dataclass(frozen=True)
class Plan:
    """What is sent.

    Args:
        port: Where, on loopback.
        method: The request's method.
        path: The request's path.
        headers: Its header fields; several sets are taken in turns.
        body: Its body; ``COUNTER`` in it becomes a number of its own in each request.
        connections: How many ask at the same time, each one request after the other.
        seconds: For how long.
        calls: After so many requests it ends in any case; 0 for no such end.
        first_number: The first of the numbers.
        every_s: So long after a request its connection sends the next one, at the earliest.
        reconnects: Whether a connection that an answer ends is opened anew; otherwise that is a failure.
    """

    port: int
    method: str
    path: str
    headers: list[dict[str, str]]
    body: str = ""
    connections: int = 1
    seconds: float = 1.0
    calls: int = 0
    first_number: int = 0
    every_s: float = 0.0
    reconnects: bool = False


@dataclass(frozen=True)
class Measured:
    """What came of it.

    Args:
        calls: Answers that came, all with the status 200.
        seconds: From the first request to the last answer.
        p50_s: Median of the time to the last byte.
        p99_s: Its 99th percentile.
        first_s: Median of the time to the first piece of the body.
        events: Server-sent events with data that came.
        failures: What else came, by status; ``closed`` for a connection that was closed in the middle.
    """

    calls: int
    seconds: float
    p50_s: float
    p99_s: float
    first_s: float
    events: int
    failures: dict[str, int]

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.calls / self.seconds


class _Run:
    """A plan under way."""

    def __init__(self, plan: Plan) -> None:
        self.until = time.perf_counter() + plan.seconds
        self.times: list[float] = []
        self.firsts: list[float] = []
        self.failures: dict[str, int] = {}
        self.events = 0
        self.last_s = 0.0
        self.every_s = plan.every_s
        self.reconnects = plan.reconnects
        self.port = plan.port
        self.tasks: set[asyncio.Task[None]] = set()
        self._left = plan.calls or sys.maxsize
        self._number = plan.first_number
        self._heads = [_head(plan, headers) for headers in plan.headers]
        self._body = plan.body

    def next_request(self) -> bytes | None:
        """The bytes of the next request; None when it is over."""
        if self._left <= 0 or time.perf_counter() >= self.until:
            return None
        self._left -= 1
        self._number += 1
        head = self._heads[self._number % len(self._heads)]
        return head + self._body.replace(COUNTER, f"{self._number:08d}").encode()

    def fail(self, what: str) -> None:
        """Count a failure."""
        self.failures[what] = self.failures.get(what, 0) + 1


def _head(plan: Plan, headers: dict[str, str]) -> bytes:
    length = len(plan.body.replace(COUNTER, "00000000").encode())
    fields = {"Host": f"127.0.0.1:{plan.port}", **headers}
    if plan.body:
        fields |= {"Content-Type": "application/json", "Content-Length": str(length)}
    lines = [f"{plan.method} {plan.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Caller(asyncio.Protocol):
    """One connection: sends the next request when the answer to the last one is whole."""

    def __init__(self, run: _Run, ended: "asyncio.Future[None]") -> None:
        self._run = run
        self._ended = ended
        self._left = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._sent_s = 0.0
        self._first_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a TCP connection's is a Transport
        self._send()

    def _send(self) -> None:
        if self._ended.done():
            return
        request = self._run.next_request()
        assert self._transport is not None
        if request is None:
            self._end()
            return
        self._first_s = 0.0
        self._sent_s = time.perf_counter()
        self._transport.write(request)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._run.events += body.count(b"data: {")
        if not self._first_s:
            self._first_s = time.perf_counter()

    def on_message_complete(self) -> None:
        now = self._run.last_s = time.perf_counter()
        status = self._parser.get_status_code()
        if status == 200:
            self._run.times.append(now - self._sent_s)
            self._run.firsts.append((self._first_s or now) - self._sent_s)
        else:
            self._run.fail(str(status))
        keeps = self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        if not keeps and self._run.reconnects:
            self._left = True
            task = asyncio.get_running_loop().create_task(self._go_on(self._sent_s + self._run.every_s - now))
            self._run.tasks.add(task)
            task.add_done_callback(self._run.tasks.discard)
        elif not keeps:
            self._run.fail("not kept alive")
            self._end()
        elif (wait_s := self._sent_s + self._run.every_s - now) > 0:
            asyncio.get_running_loop().call_later(wait_s, self._send)
        else:
            self._send()

    async def _go_on(self, wait_s: float) -> None:
        """Send the next request on a new connection."""
        assert self._transport is not None
        self._transport.close()
        await asyncio.sleep(wait_s)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: _Caller(self._run, self._ended), "127.0.0.1", self._run.port
            )
        except OSError:
            self._run.fail("not connected")
            self._ended.set_result(None)

    def connection_lost(self, _error: Exception | None) -> None:
        if not self._ended.done() and not self._left:
            self._run.fail("closed")
            self._ended.set_result(None)


async def run(plan: Plan) -> Measured:
    """Carry the plan out."""
    loop = asyncio.get_running_loop()
    going = _Run(plan)
    began = time.perf_counter()
    waits = []
    for _ in range(plan.connections):
        ended: asyncio.Future[None] = loop.create_future()
        waits.append(ended)
        await loop.create_connection(lambda ended=ended: _Caller(going, ended), "127.0.0.1", plan.port)  # type: ignore[misc]
    await asyncio.wait_for(asyncio.gather(*waits), plan.seconds + 60)
    times = sorted(going.times) or [0.0]
    firsts = sorted(going.firsts) or [0.0]
    return Measured(
        calls=len(going.times),
        seconds=max(going.last_s - began, 1e-9),
        p50_s=times[len(times) // 2],
        p99_s=times[min(len(times) - 1, len(times) * 99 // 100)],
        first_s=firsts[len(firsts) // 2],
        events=going.events,
        failures=going.failures,
    )


class Load:
    """The generator's process; a context that ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            # A plan is under way, and whoever asked for it does not wait any more.
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def measure(self, plan: Plan) -> Measured:
        """Carry the plan out there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the load generator has ended")
        answer: dict[str, Any] = json.loads(line)
        return Measured(**answer)


def main() -> None:
    """Carry out plans until the input ends."""
    for line in sys.stdin:
        measured = uvloop.run(run(Plan(**json.loads(line))))
        sys.stdout.write(json.dumps(asdict(measured)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
