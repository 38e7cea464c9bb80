"""A caller who reads a stream piece by piece, and may leave."""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any, Self

from fastapi import FastAPI

from tests.harness import Answer, AppUnderTest, Client
from tests.http.support import eventually

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "What is a trace?"}]}
STREAMED = {**CHAT, "stream": True}


def add_task_count(app: FastAPI) -> None:
    """Let a test count what runs on the app's event loop, and what is open at its upstream."""

    async def tasks() -> list[str]:
        return sorted(task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task())

    app.add_api_route("/tasks", tasks)


def tasks_of(app: AppUnderTest) -> int:
    """How many tasks run on the app's event loop, but for the one that answers this."""
    answer = app.call("GET", "/tasks", headers={"Connection": "close"})
    assert answer.status == 200
    return len(answer.json)


def assert_nothing_left(app: AppUnderTest, tasks_before: int) -> None:
    """No task more than before, and no request in flight but the one that asks."""
    eventually(lambda: tasks_of(app) <= tasks_before, "the tasks to end")
    eventually(lambda: app.value("llmops.requests.in_flight") == 0, "the requests to end")


@dataclass
class Caller:
    """One connection with a streamed answer on it."""

    connection: HTTPConnection
    response: HTTPResponse

    @property
    def status(self) -> int:
        """The answer's status."""
        return self.response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """The answer's header fields, in lower case."""
        return {name.lower(): value for name, value in self.response.getheaders()}

    @property
    def request_id(self) -> str:
        """The header, which every answer has."""
        return self.headers["x-request-id"]

    def event(self) -> bytes:
        """The next event or comment, with the empty line that ends it; nothing at the end of the answer."""
        lines = b""
        while not lines.endswith(b"\n\n"):
            line = self.response.readline()
            if not line:
                return lines
            lines += line
        return lines

    def rest(self) -> bytes:
        """Everything to the end of the answer."""
        return self.response.read()

    def leave(self) -> float:
        """Close the connection; the moment when that was done."""
        self.response.close()
        self.connection.close()
        return time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.leave()


@contextmanager
def calling(
    client: Client, token: str, body: Any = None, path: str = "/v1/chat/completions", **headers: str
) -> Iterator[Caller]:
    """Ask for a stream; the block begins when the head of the answer is there."""
    connection = HTTPConnection("127.0.0.1", client.port, timeout=15)
    fields = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **headers}
    connection.request("POST", path, json.dumps(STREAMED if body is None else body).encode(), fields)
    with Caller(connection, connection.getresponse()) as caller:
        yield caller


def stream(client: Client, token: str, body: Any = None, path: str = "/v1/chat/completions") -> Answer:
    """Ask for a stream, and read it to its end."""
    return client.call("POST", path, body=STREAMED if body is None else body, token=token)


def events(body: bytes) -> list[bytes]:
    """The events of an answer, without the comments."""
    pieces = body.split(b"\n\n")
    assert pieces.pop() == b"", "the last event is not whole"
    return [piece + b"\n\n" for piece in pieces if not piece.startswith(b":")]


def data(event: bytes) -> Any:
    """What an event carries, decoded."""
    (line,) = [line for line in event.splitlines() if line.startswith(b"data: ")]
    return json.loads(line.removeprefix(b"data: "))


def name(event: bytes) -> str:
    """The event's name; empty where it has none."""
    first = event.splitlines()[0].decode()
    return first.removeprefix("event: ") if first.startswith("event: ") else ""
