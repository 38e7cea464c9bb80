"""Callers who go on while the replicas behind a balancer are restarted: whole calls and streams."""

import json
import secrets
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Final

from tests.bench.fleet import Order

CHAT: Final = "/v1/chat/completions"
PAUSE_S: Final = 0.2
"""Between two calls of a caller: a connection is idle for a while, as those of most clients are."""

WHOLE: Final = Order(delay_s=0.05)
STREAMED: Final = Order(pieces=10, every_s=0.1)
LAST_EVENT: Final = b"data: [DONE]"
ANSWER_TIMEOUT_S: Final = 60.0


@dataclass
class Made:
    """What became of the calls.

    Args:
        whole: Trace ids of calls that were answered at once, with 200.
        streamed: Trace ids of streams that came to their last event.
        lost: Of each other call its trace id, and what happened.
        opened: How many connections the callers have opened.
    """

    whole: list[str] = field(default_factory=list)
    streamed: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    opened: int = 0

    @property
    def calls(self) -> int:
        """How many calls have ended."""
        return len(self.whole) + len(self.streamed) + len(self.lost)


class Callers:
    """Threads with one connection each, half of whose calls are streams.

    A connection that was closed before a call is opened anew, as every client does it. A call that was sent
    must be answered.

    Args:
        port: The balancer's.
        key: Whose calls these are.
        threads: How many callers there are.
    """

    def __init__(self, port: int, key: str, threads: int) -> None:
        self._port = port
        self._fields = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._call_on, args=(bool(number % 2),), name=f"caller {number}")
            for number in range(threads)
        ]
        self.made = Made()

    @contextmanager
    def running(self) -> Iterator[Made]:
        """Call until the block ends."""
        for thread in self._threads:
            thread.start()
        try:
            yield self.made
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _call_on(self, streamed: bool) -> None:  # noqa: FBT001 - an argument of a thread
        order = STREAMED if streamed else WHOLE
        messages = [{"role": "user", "content": order.prompt}]
        body = json.dumps({"model": "demo", "messages": messages, "stream": streamed}).encode()
        connection = HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_TIMEOUT_S)
        while not self._stop.wait(PAUSE_S):
            if connection.sock is not None and _is_closed(connection):
                connection.close()
            if connection.sock is None:
                with self._lock:
                    self.made.opened += 1
            self._call(connection, body, streamed=streamed)
        connection.close()

    def _call(self, connection: HTTPConnection, body: bytes, *, streamed: bool) -> None:
        trace_id = secrets.token_hex(16)
        fields = {**self._fields, "traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
        lost = ""
        try:
            connection.request("POST", CHAT, body, fields)
            answer = connection.getresponse()
            read = answer.read()
            if answer.status != 200:
                lost = f"{answer.status} {read[:200]!r}"
            elif streamed and not read.rstrip().endswith(LAST_EVENT):
                lost = f"a stream ended with {read[-100:]!r}"
        except (OSError, HTTPException) as error:
            lost = repr(error)
            connection.close()
        with self._lock:
            if lost:
                self.made.lost[trace_id] = lost
            elif streamed:
                self.made.streamed.append(trace_id)
            else:
                self.made.whole.append(trace_id)


def _is_closed(connection: HTTPConnection) -> bool:
    """Whether the other end has closed the idle connection: it can be read, and there is nothing to read."""
    return bool(select.select([connection.sock], [], [], 0)[0])
