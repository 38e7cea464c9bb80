"""What a connection's bytes mean, as h11 reads them: another parser than the service's, and a strict one."""

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final

import h11

from tests.faults.attack.wire import Conversation

MAX_HEAD_BYTES: Final = 70_000
TRACEPARENT: Final = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
DELIBERATE: Final = frozenset({502, 503, 504})
"""The only answers of 500 and more that the service gives deliberately."""


@dataclass(frozen=True)
class Meant:
    """A request among the bytes of a connection."""

    method: str
    request_id: str
    """The trace id that its caller chose; empty where it chose none, or more than one."""

    complete: bool
    """Whether all of it is there."""


@dataclass(frozen=True)
class Reading:
    """What the bytes of a connection are."""

    requests: tuple[Meant, ...]
    malformed: bool
    """Whether they end in something that is no request."""

    @property
    def complete(self) -> tuple[Meant, ...]:
        """The requests that are to be answered."""
        return tuple(request for request in self.requests if request.complete)


def read(data: bytes) -> Reading:
    """Read the bytes of a connection as h11 does, but without the empty lines that servers ignore."""
    found: list[Meant] = []
    try:
        while True:
            while data.startswith(b"\r\n"):
                data = data[2:]
            reader = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
            reader.receive_data(data)
            event = reader.next_event()
            if not isinstance(event, h11.Request):
                return Reading(tuple(found), malformed=False)
            found.append(Meant(event.method.decode(), _trace_id(event), complete=False))
            event = reader.next_event()
            while isinstance(event, h11.Data):
                event = reader.next_event()
            if not isinstance(event, h11.EndOfMessage):
                return Reading(tuple(found), malformed=False)
            found[-1] = replace(found[-1], complete=True)
            reader.send(h11.Response(status_code=404, headers=[("Content-Length", "0")]))
            reader.send(h11.EndOfMessage())
            if reader.our_state is not h11.DONE:
                return Reading(tuple(found), malformed=False)
            data = reader.trailing_data[0]
    except h11.RemoteProtocolError:
        return Reading(tuple(found), malformed=True)


def _trace_id(request: h11.Request) -> str:
    values = [value for name, value in request.headers if name == b"traceparent"]
    chosen = TRACEPARENT.fullmatch(values[0]) if len(values) == 1 else None
    if chosen is None or not int(chosen[1], 16) or not int(chosen[2], 16):
        return ""
    return chosen[1].decode()


def problems_of(reading: Reading, seen: Conversation, forbidden: AbstractSet[str] = frozenset()) -> list[str]:
    """Say what is wrong with what the service answered.

    Each complete request has one answer, in order; at the end there may be one more: to a request that was
    refused before all of it was there, or to bytes that are no request. After either the connection ends.

    Args:
        reading: What the bytes mean.
        seen: What the service answered.
        forbidden: Trace ids that stand in bodies, and are of no request.
    """
    problems = []
    known = {request.request_id for request in reading.requests} - {""}
    for number, answer in enumerate(seen.answers):
        said = f"answer {number + 1} ({answer.status})"
        if answer.status >= 500 and answer.status not in DELIBERATE:
            problems.append(f"{said}: {answer.body[:300]!r}")
        if answer.request_id in forbidden:
            problems.append(f"{said} is to a request in a body")
        if number < len(reading.requests):
            wanted = reading.requests[number].request_id
            if answer.status == 400 and answer.request_id not in known:
                # The service is stricter than the reference.
                if number + 1 < len(seen.answers):
                    problems.append(f"{said} does not end the connection")
            elif wanted and answer.request_id != wanted:
                problems.append(f"{said} has the id {answer.request_id}, not {wanted}")
        elif answer.status != 400 or answer.request_id in known:
            problems.append(f"{said} is one too many")
        elif number > len(reading.requests):
            problems.append(f"{said} comes after the end")
    problems += _at_the_end(reading, seen)
    return problems


def _at_the_end(reading: Reading, seen: Conversation) -> list[str]:
    answers, complete = seen.answers, reading.complete
    problems = []
    if len(answers) < len(complete):
        last = answers[-1] if answers else None
        if last is None or not last.closes:
            problems.append(f"{len(answers)} answers to {len(complete)} requests")
        elif not seen.closed:
            problems.append("Connection: close, and it stays open")
    if seen.rest:
        problems.append(f"bytes that belong to no answer: {seen.rest[:100]!r}")
    if reading.malformed and not seen.closed and len(answers) > len(reading.requests):
        problems.append("a malformed request leaves the connection open")
    return problems
