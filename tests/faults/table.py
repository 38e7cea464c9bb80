"""The fault table: what an upstream may do, and what must come back, as data."""

import gzip
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Literal

from tests.fakes.streams import DONE
from tests.fakes.upstream import (
    AcceptOnly,
    Answer,
    Behaviour,
    Endless,
    Garbage,
    NotJson,
    Reset,
    Silent,
    Status,
)
from tests.fakes.wire import Exchange
from tests.faults.own import (
    Kind,
    Own,
    after,
    as_plain_text,
    busy_after,
    busy_at_first,
    byte_by_byte,
    comments_for_ever,
    correct,
    cut_short,
    first,
    for_ever,
    too_large,
    without_an_answer,
    zipped,
)

DEADLINE_S = 2.0
SILENCE_S = 1.0
ATTEMPTS = 4
DELAYS_S = (0.05, 0.1, 0.2)
MAX_ANSWER_BYTES = 65_536
VARIABLES = {
    "LLM_TIMEOUT_S": f"{DEADLINE_S}",
    "LLM_CONNECT_TIMEOUT_S": "0.25",
    "STREAM_CHUNK_TIMEOUT_S": f"{SILENCE_S}",
    "STREAM_TIMEOUT_S": f"{DEADLINE_S}",
    "LLM_MAX_ANSWER_BYTES": f"{MAX_ANSWER_BYTES}",
    "RETRY_BASE_DELAY_S": f"{DELAYS_S[0]}",
    "RETRY_JITTER": "0",
    # One fault does not spend another's budget, nor open the breaker for it.
    "RETRY_BUDGET_FLOOR": "1000",
    "BREAKER_FAILURE_THRESHOLD": "1000",
}
"""The service's settings under which the table holds: everything happens, in seconds instead of minutes."""

NO_RETRIES_LEFT = "no retries left"
DEADLINE_FIRST = "the deadline comes first"

Place = Literal["answering", "refusing", "unreachable"]
Calls = tuple[Kind, ...]
"""What the answer to a call is."""

JSON: Calls = ("json", "stored")
EVENTS: Calls = ("events", "unasked")
BYTES: Calls = ("bytes",)
READ: Calls = (*JSON, *EVENTS)
PIECES: Calls = (*EVENTS, *BYTES)
ALL: Calls = (*JSON, *EVENTS, *BYTES)


@dataclass(frozen=True, eq=False)
class Fault:
    """One row: what the upstream does, and what must be seen of it on every surface.

    Args:
        name: Names the row.
        behaviours: The upstream's, one for each attempt; the last one stands for all that follow. What is
            called with a correct answer makes a behaviour of it.
        status: Of the answer.
        error: The answer's error; empty for none.
        attempts: How many the answer and the telemetry must tell of.
        outcomes: What ``llmops.retry.attempts`` must count, by outcome.
        attempt_error: The error of each failed attempt; without it, the answer's.
        label: The words of the attempts' lines.
        delays_s: The waits between the attempts; None is one that the clock decides, below 2 s.
        gives_up: Why there is no further attempt; empty where no line says so.
        retry_after: The answer's ``Retry-After``.
        place: Whether anything listens at the upstream's address.
        calls: Which calls the row is about.
        begins: Whether the answer's first events reach the caller, so that it fails afterwards.
        waits: Whether the upstream is still at it when the caller has its answer.
        repeated: Whether the connection breaks before the head of an answer. The HTTP client then repeats a
            request of an idempotent method once by itself, within the same attempt.
    """

    name: str
    behaviours: tuple[Behaviour | Own, ...]
    status: int
    error: str
    attempts: int
    outcomes: Mapping[str, int]
    attempt_error: str = ""
    label: str = ""
    delays_s: tuple[float | None, ...] = ()
    gives_up: str = ""
    retry_after: str | None = None
    place: Place = "answering"
    calls: Calls = ALL
    begins: bool = False
    waits: bool = False
    repeated: bool = False

    @property
    def succeeds(self) -> bool:
        """Whether an attempt does."""
        return self.begins or not self.error

    @property
    def seen(self) -> int:
        """Requests that the upstream must really see."""
        return self.attempts if self.place == "answering" else 0

    @property
    def failed(self) -> str:
        """The ``error.type`` of the attempts that fail."""
        return self.attempt_error or self.error

    @property
    def messages(self) -> list[str]:
        """All of the request's log lines in their order, as patterns of ``fnmatch``."""
        lines = ["llm_request_started"]
        for number, delay_s in enumerate(self.delays_s, 1):
            waits = "[01].?" if delay_s is None else f"{delay_s:.1f}"
            lines += [f"Attempt {number}: {self.label}", f"Retrying in {waits}s..."]
        if self.gives_up:
            lines += [
                f"Attempt {self.attempts}: {self.label}",
                f"Giving up after attempt {self.attempts}: {self.gives_up}",
            ]
        elif self.succeeds and self.attempts > 1:
            lines.append(f"Attempt {self.attempts}: Success")
        return [*lines, f"llm_request_{'failed' if self.error else 'completed'}", "http_request_completed"]


@dataclass(frozen=True)
class UntilDate:
    """A status whose ``Retry-After`` is an HTTP date, a whole second between 0.2 s and 1.2 s from now."""

    code: int

    async def play(self, exchange: Exchange) -> None:
        """Answer with the status at once."""
        moment = datetime.fromtimestamp(math.floor(time.time() + 1.2), UTC)
        await Status(self.code, headers={"Retry-After": format_datetime(moment, usegmt=True)}).play(exchange)


@dataclass(frozen=True)
class Zipped:
    """A correct answer, compressed."""

    answer: Answer = field(default_factory=Answer)

    async def play(self, exchange: Exchange) -> None:
        """Answer at once."""
        headers = {**self.answer.all_headers(), "Content-Encoding": "gzip"}
        await exchange.respond(200, headers, gzip.compress(self.answer.body("demo")))


def _again_and_again(  # noqa: PLR0913 - as many as there are columns
    name: str,
    status: int,
    error: str,
    label: str,
    behaviour: Behaviour | Own,
    *,
    place: Place = "answering",
    calls: Calls = ALL,
    retry_after: str | None = None,
) -> Fault:
    """A failure that passes, only it does not: every attempt is made."""
    return Fault(
        name,
        (behaviour,),
        status,
        error,
        ATTEMPTS,
        {"retried": ATTEMPTS - 1, "exhausted": 1},
        label=label,
        delays_s=DELAYS_S,
        gives_up=NO_RETRIES_LEFT,
        retry_after=retry_after,
        place=place,
        calls=calls,
    )


def _broken(name: str, behaviour: Behaviour | Own, calls: Calls = ALL) -> Fault:
    return _again_and_again(name, 502, "UpstreamError", "Connection error", behaviour, calls=calls)


def _no_event(name: str, behaviour: Behaviour | Own) -> Fault:
    """A stream that ends before its first event, as one does whose connection is cut off."""
    return _again_and_again(name, 502, "UpstreamError", "Cut off", behaviour, calls=EVENTS)


def _failing(code: int) -> Fault:
    return _again_and_again(f"{code}", 502, "UpstreamError", f"HTTP {code}", Status(code))


def _too_late(  # noqa: PLR0913 - as many as there are columns
    name: str,
    behaviour: Behaviour | Own,
    status: int = 504,
    error: str = "UpstreamTimeoutError",
    label: str = "Timeout",
    *,
    retry_after: str | None = None,
    calls: Calls = ALL,
) -> Fault:
    """Another attempt might help, and could not end before the deadline."""
    return Fault(
        name,
        (behaviour,),
        status,
        error,
        1,
        {"deadline": 1},
        label=label,
        gives_up=DEADLINE_FIRST,
        retry_after=retry_after,
        calls=calls,
        waits=label == "Timeout",
    )


def _once(name: str, behaviour: Behaviour | Own, status: int, error: str, *, calls: Calls = ALL) -> Fault:
    """No further attempt would end otherwise, so there is none, and nothing is said about one."""
    return Fault(name, (behaviour,), status, error, 1, {"not_retryable": 1}, calls=calls)


def _answers(name: str, behaviour: Behaviour | Own, calls: Calls = ALL) -> Fault:
    return Fault(name, (behaviour,), 200, "", 1, {"success": 1}, calls=calls)


def _recovers(  # noqa: PLR0913, PLR0917 - as many as there are columns
    name: str,
    behaviour: Behaviour,
    label: str,
    failures: int = 1,
    error: str = "UpstreamError",
    delays_s: tuple[float | None, ...] = DELAYS_S,
) -> Fault:
    return Fault(
        name,
        (*[behaviour] * failures, correct),
        200,
        "",
        failures + 1,
        {"retried": failures, "success": 1},
        attempt_error=error,
        label=label,
        delays_s=delays_s[:failures],
    )


def _begins(
    name: str, behaviour: Own, error: str = "UpstreamError", *, waits: bool = False, calls: Calls = EVENTS
) -> Fault:
    """The answer has begun, so that nothing is tried again; of a stream, the last event says why it ends."""
    return Fault(name, (behaviour,), 200, error, 1, {"success": 1}, calls=calls, begins=True, waits=waits)


def _rate_limited(seconds: int) -> Status:
    return Status(429, headers={"Retry-After": f"{seconds}"})


_UNKNOWN_MODEL = {"error": {"message": "Invalid model name passed in model=demo.", "param": "model"}}
_TIMEOUT = "UpstreamTimeoutError"
_RATE = "RateLimitError"
_CUT_CHARACTER = 'data: {"text": "🙂'.encode()[:-2]
_LONG_EVENT = b'data: {"text": "' + b"x" * MAX_ANSWER_BYTES

FAULTS: tuple[Fault, ...] = (
    _again_and_again("connection refused", 504, _TIMEOUT, "Connection error", correct, place="refusing"),
    _again_and_again("connect gets no answer", 504, _TIMEOUT, "Timeout", correct, place="unreachable"),
    _too_late("accepts, says nothing", AcceptOnly()),
    _too_late("silent after reading", Silent()),
    replace(_broken("reset before the answer", Reset("before")), repeated=True),
    replace(_broken("reset within the headers", Reset("headers")), repeated=True),
    _broken("reset within the body", Reset("body")),
    _too_late("body byte by byte", byte_by_byte, calls=READ),
    _begins("body byte by byte", byte_by_byte, _TIMEOUT, waits=True, calls=BYTES),
    _too_late("endless body", Endless()),
    replace(_once("endless flood", Endless(0.0, b" " * 16_384), 502, "UpstreamError"), waits=True),
    *(_failing(code) for code in (500, 502, 503)),
    _recovers(
        "503, Retry-After fits", Status(503, headers={"Retry-After": "1"}), "HTTP 503", delays_s=(1.0,)
    ),
    _too_late(
        "503, Retry-After too long",
        Status(503, headers={"Retry-After": "30"}),
        502,
        "UpstreamError",
        "HTTP 503",
        retry_after="30",
    ),
    _recovers("429, Retry-After in seconds", _rate_limited(1), "Rate limit", 1, _RATE, (1.0,)),
    _recovers("429, Retry-After a date", UntilDate(429), "Rate limit", 1, _RATE, (None,)),
    _too_late("429, Retry-After too long", _rate_limited(30), 429, _RATE, "Rate limit", retry_after="30"),
    _again_and_again("429 without Retry-After", 429, _RATE, "Rate limit", Status(429), retry_after="1"),
    _again_and_again("408", 504, _TIMEOUT, "Timeout", Status(408)),
    _failing(409),
    _once("400, unknown model", Status(400, _UNKNOWN_MODEL), 400, "BadRequestError"),
    *(_once(f"{code}", Status(code), 502, "UpstreamError") for code in (401, 403)),
    *(_once(f"{code}", Status(code), 400, "BadRequestError") for code in (400, 422)),
    # A stored response that is no longer there has an answer of its own.
    _once("404", Status(404), 400, "BadRequestError", calls=("json", *EVENTS, *BYTES)),
    _once("redirect", Status(302, headers={"Location": "http://127.0.0.1:1/"}), 502, "UpstreamError"),
    _broken("garbage bytes", Garbage()),
    _once("HTML with 200", NotJson(), 502, "UpstreamError", calls=(*JSON, "unasked", "bytes")),
    replace(_no_event("HTML with 200", NotJson()), calls=("events",)),
    _once("JSON, cut off, with 200", NotJson(b'{"choices": [', "application/json"), 502, "UpstreamError"),
    _broken("wrong length", cut_short, JSON),
    _answers("wrong length", cut_short, EVENTS),
    _answers("content type is another", as_plain_text, (*JSON, "events")),
    _once("content type is another", as_plain_text, 502, "UpstreamError", calls=BYTES),
    _once("compressed answer, not asked for", zipped, 502, "UpstreamError", calls=JSON),
    _no_event("compressed answer, not asked for", zipped),
    _once("no answer in it", without_an_answer, 502, "UpstreamError"),
    _once(
        "answer too large",
        lambda given: too_large(given, MAX_ANSWER_BYTES),
        502,
        "UpstreamError",
        calls=READ,
    ),
    _begins("answer too large", lambda given: too_large(given, MAX_ANSWER_BYTES), calls=BYTES),
    *(_recovers(f"recovers after {n} x 500", Status(500), "HTTP 500", n) for n in (1, 2, 3)),
    _recovers("recovers after 2 resets", Reset("body"), "Connection error", 2),
    # Streams, before their first event: like any other answer.
    _answers("ends well", correct, EVENTS),
    _no_event("ends before the first event", first(b": hello\n\n")),
    _broken("cut off before the first event", first(b": hello\n\n", then="cut"), EVENTS),
    _too_late("silent before the first event", first(b": hello\n\n", then="silence"), calls=EVENTS),
    _once("garbage at first", first(b"data: oops\n\n"), 502, "UpstreamError", calls=EVENTS),
    _once("no object at first", first(b"data: 7\n\n"), 502, "UpstreamError", calls=EVENTS),
    _once("over-long first event", first(_LONG_EVENT), 502, "UpstreamError", calls=EVENTS),
    _again_and_again("busy at first", 429, _RATE, "Rate limit", busy_at_first, calls=EVENTS, retry_after="1"),
    # And after it: the caller has got a part of the answer, and an event ends it.
    _begins("ends without an end", after(b"\n")),
    _begins("cut off", after(then="cut"), calls=PIECES),
    _begins("wrong length", cut_short, calls=BYTES),
    _begins("cut off within a character", after(_CUT_CHARACTER, then="cut")),
    _begins("reset", after(then="reset"), calls=PIECES),
    _begins("garbage", after(b"data: {oops\n\n", DONE)),
    _begins("no object", after(b"data: 7\n\n", DONE)),
    _begins("over-long event", after(_LONG_EVENT, then="silence"), waits=True),
    _begins("says that it is busy", busy_after, _RATE),
    _begins("silence", after(then="silence"), _TIMEOUT, waits=True, calls=PIECES),
    _begins("never ends", for_ever, _TIMEOUT, waits=True, calls=PIECES),
    _begins("says only that it is alive", comments_for_ever, _TIMEOUT, waits=True),
    Fault(
        "recovers, then cut off",
        (Status(500), after(then="cut")),
        200,
        "UpstreamError",
        2,
        {"retried": 1, "success": 1},
        label="HTTP 500",
        delays_s=DELAYS_S[:1],
        calls=EVENTS,
        begins=True,
    ),
)
