"""The grammar fuzzer: conversations of one connection each, against a reference."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.faults.attack.grammar import Callers, Sent, conversations
from tests.faults.attack.reference import Reading, problems_of, read
from tests.faults.attack.target import Tally
from tests.faults.attack.wire import Conversation, NotHttpError, converse

BATCH: Final = 50
"""Conversations of one seed; the clock is looked at between two seeds."""

MAX_SHOWN: Final = 3
TIMEOUT_S: Final = 3.0


class Attacked(Protocol):
    """What is needed of a service to converse with it."""

    @property
    def port(self) -> int:
        """Its port."""
        ...

    @property
    def token(self) -> str:
        """A user's token."""
        ...

    @property
    def admin(self) -> str:
        """An administrator's token."""
        ...

    @property
    def tally(self) -> Tally:
        """Counts inputs and answers."""
        ...


@dataclass
class Fuzzed:
    """What came of the conversations."""

    conversations: int = 0
    requests: int = 0
    seeds: int = 0
    problems: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    """Trace ids from bodies that became requests, as the bytes around them were damaged."""

    def add(self, sent: Sent, found: list[str]) -> None:
        """Keep what is wrong with a conversation, and the bytes that show it."""
        if found and len(self.problems) < MAX_SHOWN:
            shown = [packet if len(packet) < 2_000 else packet[:2_000] + b"..." for packet in sent.packets]
            self.problems.append("; ".join(found) + f"\n      packets: {shown!r}")


def play(target: Attacked, sent: Sent) -> list[str]:
    """Have a conversation; what is wrong with the answers."""
    reading = read(sent.data)
    expected = len(reading.complete)
    # An answer more, or the end of the connection, comes soon or never.
    ends = reading.malformed or expected < len(reading.requests)
    try:
        seen = converse(
            target.port,
            sent.packets,
            expected=expected,
            methods=[request.method for request in reading.requests],
            timeout_s=TIMEOUT_S,
            linger_s=0.03 if ends else 0.0,
        )
    except NotHttpError as error:
        return [f"not an answer: {error}"]
    target.tally.add(max(1, len(reading.requests)), seen.statuses or ["none"])
    forbidden = set(sent.traps) - {request.request_id for request in reading.requests}
    return problems_of(reading, seen, forbidden) + _otherwise(sent, reading, seen)


def _otherwise(sent: Sent, reading: Reading, seen: Conversation) -> list[str]:
    """What is wrong with the answers to a conversation of which every request is valid."""
    if sent.valid is None:
        return []
    if reading.malformed or len(reading.complete) != len(sent.valid):
        return ["the reference does not take it for valid"]
    wrong = [
        f"answer {number + 1}: {answer.status}, not one of {sorted(statuses)}: {answer.body[:200]!r}"
        for number, (answer, statuses) in enumerate(zip(seen.answers, sent.valid, strict=False))
        if answer.status not in statuses
    ]
    return wrong if len(seen.answers) == len(sent.valid) else [*wrong, f"{len(seen.answers)} answers"]


def fuzz(target: Attacked, limit_s: float, first_seed: int = 0, most: int = 1_000_000) -> Fuzzed:
    """Have conversations until the time is over, so many were had, or ``MAX_SHOWN`` of them went wrong.

    The seeds are numbers from ``first_seed`` on, so that a run can be repeated from the one that it prints.
    """
    found = Fuzzed()
    callers = Callers(target.token, target.admin)
    end_s = time.monotonic() + limit_s

    def over() -> bool:
        shown = len(found.problems) >= MAX_SHOWN
        return shown or found.conversations >= most or time.monotonic() >= end_s

    for seed in itertools.count(first_seed):
        found.seeds += 1

        @hypothesis.seed(seed)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(sent=conversations(callers))
        def one(sent: Sent) -> None:
            if not over():
                found.conversations += 1
                reading = read(sent.data)
                found.requests += len(reading.requests)
                found.answered |= set(sent.traps) & {request.request_id for request in reading.requests}
                found.add(sent, play(target, sent))

        one()
        if over():
            return found
    raise AssertionError


def cut_everywhere(target: Attacked, step: int = 1) -> Iterator[tuple[Sent, list[str]]]:
    """Have one conversation again and again, in two packets, cut at every byte.

    It holds what a framing can get wrong: bodies that are requests, by length and in chunks with extensions
    and trailers, offers to upgrade, an empty line, and a body of a method that has none.
    """
    callers = Callers(target.token, target.admin)
    length = len(fixed(callers).data)
    for cut in range(1, length, step):
        sent = fixed(callers)
        one = Sent(sent.data, (cut,), sent.traps, sent.valid)
        yield one, play(target, one)


def fixed(callers: Callers) -> Sent:
    """The conversation that is cut at every byte; its trace ids are new each time."""
    first, second, third, last = (callers.trap() for _ in range(4))
    trace = callers.trace
    user = f"Authorization: Bearer {callers.user}"
    upgrade = ("Connection: Upgrade", "Upgrade: h2c")
    middle = len(second[0]) // 2
    parts = (second[0][:middle], second[0][middle:])
    framed = b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\nX-Sum: 1\r\n\r\n"
    data = b"".join(
        (
            _head("POST /llm/generate", trace(), user, *upgrade, f"Content-Length: {len(first[0])}")
            + first[0],
            b"\r\n" + _head("POST /llm/generate", trace(), user, "Transfer-Encoding: chunked") + framed,
            _head("POST /auth/login", trace(), "Expect: 100-continue", f"Content-Length: {len(third[0])}")
            + third[0],
            _head("GET /auth/me", trace(), user, f"Content-Length: {len(last[0])}") + last[0],
        )
    )
    traps = tuple(trace_id for _, trace_id in (first, second, third, last))
    return Sent(data, (), traps, (*[frozenset({422})] * 3, frozenset({200})))


def _head(line: str, *fields: str) -> bytes:
    return "\r\n".join(
        (f"{line} HTTP/1.1", "Host: x", "Content-Type: application/json", *fields, "", "")
    ).encode()
