"""The record of one model call, and its form as a line of JSON in the spool."""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

from service.telemetry.slices import Slices

TRACE_ID = re.compile(r"[0-9a-f]{32}")
SPAN_ID = re.compile(r"[0-9a-f]{16}")


MAX_TRIES = 16
"""The most attempts that a record describes; ``RETRY_MAX`` permits eleven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One attempt of a call.

    In a line it is a list of its values in this order, without the last ones that are as by default.

    Args:
        started_s: Seconds from the start of the call to that of the attempt.
        duration_s: Seconds that it took; of a stream that succeeded, until the stream ended.
        error: The name of the error; ``cancelled`` where nobody waited any more, None where it succeeded.
        cause: Why the exchange failed below HTTP; a value of ``service.errors.Cause``.
        status: The upstream's HTTP status, where it is that of a failure.
        wait_s: The back-off that was planned after it; 0 where no attempt was to follow.
    """

    started_s: float
    duration_s: float
    error: str | None = None
    cause: str | None = None
    status: int | None = None
    wait_s: float = 0.0

    def as_row(self) -> list[object]:
        """The attempt as it stands in a line."""
        said = self.error, self.cause, self.status, self.wait_s or None
        row: list[object] = [self.started_s, self.duration_s, *said]
        while row[-1] is None:
            row.pop()
        return row

    @classmethod
    def from_row(cls, row: object) -> Self:
        """Parse what stands in a line; raises ``TypeError`` or ``ValueError`` when that is no attempt.

        More values than are known are ignored: a later version may have written them.
        """
        if not isinstance(row, list):
            raise TypeError("no attempt")
        given: list[Any] = [*row, None, None, None, None][:6]
        started_s, duration_s, error, cause, status, wait_s = given
        attempt = cls(
            started_s=started_s,
            duration_s=duration_s,
            error=error,
            cause=cause,
            status=status,
            wait_s=wait_s or 0.0,
        )
        if not (attempt.started_s >= 0 and attempt.duration_s >= 0 and attempt.wait_s >= 0):
            raise ValueError("no attempt")
        return attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """A call that has ended; ``record_id`` identifies it.

    Args:
        trace_id: 32 hex digits; the request id of the answer.
        span_id: 16 hex digits; the ``llm call`` span.
        continued: Whether the trace is the caller's; then other calls, of any user, may have the same.
        incident_id: The request's; None where there is none.
        operation: The GenAI operation, like ``chat``.
        started_ns: Unix time in nanoseconds.
        duration_s: Seconds from the start of the call to its end, including retries and back-off.
        user: The caller's user name.
        team: The team that the call belongs to.
        key_id: The id of the API key that the caller has sent.
        model: The requested model.
        outcome: A value of ``outcome`` on ``llmops.llm.calls``.
        response_model: The model that answered, as the upstream names it.
        error: The name of the error; None without one.
        attempts: The number of requests to the upstream.
        prompt_tokens: None where the count is not known; the same holds for the other counts.
        cost: US dollars; None where the upstream gave no price.
        estimated: Whether the counts are an estimate of this service.
        streamed: Whether the answer was streamed.
        first_chunk_s: Seconds until the first chunk of a streamed answer.
        cache: ``hit``, ``miss`` or ``bypass``.
        saved_cost: US dollars that a cached answer saved.
        prompt: The messages as JSON; None unless content is captured.
        answer: The text of the answer; None unless content is captured.
        route: The route's path, with its parameters' names.
        tries: The attempts in their order, ``MAX_TRIES`` at most; one that others still wait for is not among
            them, and records of earlier versions have none.
        lookup_s: Seconds that the cache look-up took; None where there was none.
        lookup_failed: Whether the cache could not be asked, which counts as a miss.
        cache_kind: Whether a hit was ``exact`` or ``semantic``; None without a stored answer.
        similarity: Cosine similarity of the two questions; of a semantic hit only.
        age_s: Age of the stored answer in seconds.
        shared: Whether the answer is that of an equal call at the same time.
        cached_tokens: Prompt tokens that the provider read from its own cache; a part of ``prompt_tokens``.
        reasoning_tokens: A part of ``completion_tokens``.
        error_reason: What happened, in two or three words; None without an error.
        retry_ended: Why there was no further attempt; an outcome of ``llmops.retry.attempts``.
        upstream_status: The upstream's HTTP status where the call failed.
        upstream_code: The upstream's error code, one of a closed set.
    """

    trace_id: str
    span_id: str
    operation: str
    started_ns: int
    duration_s: float
    user: str
    model: str
    outcome: str
    response_model: str | None = None
    error: str | None = None
    attempts: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cost: float | None = None
    estimated: bool = False
    streamed: bool = False
    first_chunk_s: float | None = None
    cache: str = "bypass"
    saved_cost: float | None = None
    prompt: str | None = None
    answer: str | None = None
    continued: bool = False
    incident_id: str | None = None
    team: str | None = None
    key_id: str | None = None
    route: str | None = None
    tries: tuple[AttemptRecord, ...] = ()
    lookup_s: float | None = None
    lookup_failed: bool = False
    cache_kind: str | None = None
    similarity: float | None = None
    age_s: float | None = None
    shared: bool = False
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    error_reason: str | None = None
    retry_ended: str | None = None
    upstream_status: int | None = None
    upstream_code: str | None = None

    @property
    def record_id(self) -> str:
        """32 hex digits that no other call has; the record's trace id in MLflow.

        It is the request's trace id, or where the caller chose that, the first 128 bits of the SHA-256 of the
        trace id and the span id, which is chosen here. Records of earlier versions have the trace id.
        """
        if not self.continued:
            return self.trace_id
        digest = hashlib.sha256(bytes.fromhex(self.trace_id + self.span_id)).digest()
        # 0 is not valid as a trace id.
        return f"{int.from_bytes(digest[:16]) or 1:032x}"

    def as_line(self) -> bytes:
        """The record as one line of JSON with its line feed; fields that are None or False are left out."""
        # Not dataclasses.asdict: it copies each value, which takes longer than writing the line.
        given = {
            name: value
            for name, value in zip(_NAMES, _VALUES(self), strict=True)
            if value is not None and value is not False
        }
        if self.tries:
            given["tries"] = [attempt.as_row() for attempt in self.tries]
        return json.dumps(given, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Parse a line; raises ``ValueError`` when it holds no record.

        Unknown fields are ignored: a later version may have written the line.
        """
        try:
            read: Any = json.loads(line)
            given = {name: value for name, value in read.items() if name in _KNOWN}
            given["tries"] = _tries_in(given.get("tries", []))
            record = cls(**given)
            identified = TRACE_ID.fullmatch(record.trace_id) and SPAN_ID.fullmatch(record.span_id)
            timed = record.started_ns >= 0 and record.duration_s >= 0
        except (AttributeError, TypeError, RecursionError) as error:
            raise ValueError("no record") from error
        if not identified or not timed:
            raise ValueError("no record")
        return record


def _tries_in(rows: object) -> tuple[AttemptRecord, ...]:
    if not isinstance(rows, list):
        raise TypeError("no attempts")
    return tuple(AttemptRecord.from_row(row) for row in rows[:MAX_TRIES])


_NAMES = tuple(field.name for field in fields(CallRecord) if field.name != "tries")
_KNOWN = frozenset({*_NAMES, "tries"})
_VALUES = attrgetter(*_NAMES)


def read_records(path: Path) -> tuple[list[CallRecord], int]:
    """Read the records of a file, and count its invalid lines; raises ``OSError``.

    A last line that a crash cut off is not counted: its call was never answered.
    """
    *lines, last = path.read_bytes().split(b"\n")
    records, invalid = [], 0
    for line in Slices(lines):
        try:
            records.append(CallRecord.from_line(line))
        except ValueError:
            invalid += 1
    with suppress(ValueError):
        # It is complete when only its line feed is missing.
        records.append(CallRecord.from_line(last))
    return records, invalid
