"""One model call as it is kept: what the recorder writes, and MLflow shows."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

TRACE_ID = re.compile(r"[0-9a-f]{32}")
SPAN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """A call that has ended; ``trace_id`` and ``span_id`` together are its identity.

    Args:
        trace_id: 32 hex digits; the request id of the answer.
        span_id: 16 hex digits: the ``llm call`` span.
        operation: The GenAI operation, like ``chat``.
        started_ns: Unix time in nanoseconds.
        duration_s: Seconds from the call's start to its end, attempts and waits together.
        user: Who asked.
        model: The model that was asked for.
        outcome: A value of ``outcome`` on ``llmops.llm.calls``.
        response_model: The model that answered, as the upstream names it.
        error: The error's name, where there is one.
        attempts: How often the upstream was asked.
        prompt_tokens: None where nobody counted; so are the other counts.
        cost: US dollars; None where the upstream named no price.
        estimated: Whether the counts are this service's own estimate.
        streamed: Whether the answer came in pieces.
        first_chunk_s: Seconds until the first piece of a streamed answer.
        cache: ``hit``, ``miss`` or ``bypass``.
        saved_cost: US dollars that a cached answer did not cost.
        prompt: The messages as JSON; None unless content is captured.
        answer: The answer's text; None unless content is captured.
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

    def as_line(self) -> bytes:
        """The record as one line of JSON, with its line feed; what is None is left out."""
        # Not dataclasses.asdict: it copies each value, and takes longer than writing the line.
        given = {name: value for name in _NAMES if (value := getattr(self, name)) is not None}
        return json.dumps(given, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """The record in a line; ``ValueError`` when the line holds none.

        Fields that this version does not know are passed over: a later one may have written the line.
        """
        try:
            read: Any = json.loads(line)
            record = cls(**{name: value for name, value in read.items() if name in _NAMES})
            named = TRACE_ID.fullmatch(record.trace_id) and SPAN_ID.fullmatch(record.span_id)
            timed = record.started_ns >= 0 and record.duration_s >= 0
        except (AttributeError, TypeError, RecursionError) as error:
            raise ValueError("no record") from error
        if not named or not timed:
            raise ValueError("no record")
        return record


_NAMES = tuple(field.name for field in fields(CallRecord))


def read(path: Path) -> tuple[list[CallRecord], int]:
    """The records in a file of lines, and how many of its lines are garbled; raises ``OSError``.

    What a crash has cut off is passed over and not counted: its call was never answered.
    """
    *lines, cut_off = path.read_bytes().split(b"\n")
    records, garbled = [], 0
    for line in lines:
        try:
            records.append(CallRecord.from_line(line))
        except ValueError:
            garbled += 1
    with suppress(ValueError):
        # Nothing but its line feed may be missing.
        records.append(CallRecord.from_line(cut_off))
    return records, garbled
