"""A model call, and the one place that says how it ended: span, metrics, log line, answer's head, record."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import Span, Status, StatusCode, format_span_id, format_trace_id

from service.cache.control import ANY, CacheUse, CacheWish
from service.context import current_request
from service.errors import ServiceError
from service.recording.record import CallRecord
from service.telemetry import names
from service.telemetry.instruments import Instruments
from service.upstream.messages import (
    MAX_CONTENT_CHARS,
    Completion,
    LlmRequest,
    Operation,
    to_json,
    with_fields,
)
from service.utils.deadline import Deadline
from service.utils.retry import Progress

if TYPE_CHECKING:
    from service.cache.response_cache import Ticket

Outcome = Literal["success", "cached", "error", "cancelled"]
ENDED_WELL: Final = frozenset({"success", "cached"})

logger = logging.getLogger(__name__)


@dataclass
class Call:
    """One request on its way: what is asked, by whom, until when, and how far it has come.

    Args:
        body: The request in OpenAI's shape.
        model: The model that is asked.
        user: Who asks; stands in the log lines.
        deadline: When the answer must be there, or its first piece.
        clock: For durations, in seconds.
        operation: The GenAI operation.
        content: The request as the caller wrote it, whose bytes go upstream and come back as they are.
            Without it the body is written here, and what comes back is read.
        headers: More header fields for the upstream.
        streamed: Whether the answer is wanted in pieces.
        wish: What the caller wants of the cache.
        cache: What came of the cache.
        ticket: Its way through the cache, where it has one.
        cached: Whether the answer is one that another call has paid for.
        progress: How far the attempts have come.
        llm_s: Seconds spent waiting for the upstream.
        first_chunk_s: Seconds until the first piece of a streamed answer.
        completion: What is known of the answer: all of it, or the part that came.
    """

    body: Mapping[str, Any]
    model: str
    user: str
    deadline: Deadline
    clock: Callable[[], float] = time.perf_counter
    operation: Operation = "chat"
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    streamed: bool = False
    wish: CacheWish = ANY
    cache: CacheUse = field(default_factory=CacheUse)
    ticket: "Ticket | None" = None
    cached: bool = False
    progress: Progress = field(default_factory=Progress)
    llm_s: float = 0.0
    first_chunk_s: float | None = None
    completion: Completion | None = None
    started_ns: int = field(default_factory=time.time_ns)
    started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.clock()

    def as_request(self) -> LlmRequest:
        """What goes to the client."""
        body = {**self.body, "model": self.model}
        verbatim = self.content is not None
        if self.content is None:
            content = to_json(body)
        else:
            unnamed = self.body.get("model") is None
            content = with_fields(self.body, self.content, {"model": self.model} if unnamed else {})
        return LlmRequest(self.operation, self.model, body, content, self.headers, verbatim=verbatim)


class CallReport:
    """Says that a call began, and how it ended.

    Args:
        instruments: Where calls and costs are counted.
        known: The model's name as it may stand on a metric.
        on_ended: Called with the record of each call that has ended, before its answer goes out.
        capture: Whether the record holds what was asked and answered.
    """

    def __init__(
        self,
        instruments: Instruments,
        known: Callable[[str], str],
        on_ended: Callable[[CallRecord], None],
        *,
        capture: bool,
    ) -> None:
        self._calls = instruments.llm_calls
        self._cost = instruments.llm_cost
        self._saved_tokens = instruments.cache_saved_tokens
        self._saved_cost = instruments.cache_saved_cost
        self._first_chunk = instruments.llm_first_chunk
        self._known = known
        self._on_ended = on_ended
        self._capture = capture

    def started(self, call: Call) -> None:
        """Say that the call began."""
        logger.info("llm_request_started", extra={"user": call.user, "model": call.model})

    def answering(self, call: Call) -> None:
        """Say that the first piece of a streamed answer is there, and is about to go out."""
        call.first_chunk_s = round(call.clock() - call.started_s, 6)
        self._first_chunk.record(call.first_chunk_s, {"model": self._known(call.model)})
        _mark_answer(call)

    def ended(
        self,
        span: Span,
        call: Call,
        *,
        completion: Completion | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Say how the call ended: with an answer, or with this error.

        Args:
            span: The ``llm call`` span, still current.
            call: The call, with how far it came.
            completion: The answer, or the part of it that came before the error.
            error: What ended it otherwise; a cancelled call ends with ``CancelledError``.
        """
        outcome: Outcome = "cached" if call.cached else "success"
        if error is not None:
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
        name = _name_of(error) if outcome == "error" else None
        record = _record(span, call, outcome, name, completion)
        if self._capture:
            record = _with_content(record, call, completion)
        self._on_ended(record)
        _mark_span(span, call, record)
        _mark_answer(call)
        known = self._known(call.model)
        labels = {"model": known, "outcome": outcome}
        self._calls.add(1, labels if name is None else {**labels, ERROR_TYPE: name})
        if record.cost is not None:
            self._cost.add(record.cost, {"model": known})
        if outcome == "cached":
            self._saved_tokens.add(call.cache.saved_tokens, {"kind": call.cache.kind})
            self._saved_cost.add(call.cache.saved_cost or 0.0, {"kind": call.cache.kind})
        _write_line(record, reason=error.label if isinstance(error, ServiceError) else "Bug")


def _name_of(error: BaseException | None) -> str:
    return error.name if isinstance(error, ServiceError) else "InternalError"


def _record(
    span: Span, call: Call, outcome: Outcome, error: str | None, completion: Completion | None
) -> CallRecord:
    context = span.get_span_context()
    # The tokens of an answer that another call has paid for are in that call's record.
    spent = None if call.cached else completion
    return CallRecord(
        trace_id=format_trace_id(context.trace_id),
        span_id=format_span_id(context.span_id),
        operation=call.operation,
        started_ns=call.started_ns,
        duration_s=round(call.clock() - call.started_s, 6),
        user=call.user,
        model=call.model,
        outcome=outcome,
        error=error,
        attempts=call.progress.attempts,
        response_model=completion.model if completion else None,
        prompt_tokens=spent.prompt_tokens if spent else None,
        completion_tokens=spent.completion_tokens if spent else None,
        total_tokens=spent.total_tokens if spent else None,
        cost=completion.cost if completion else None,
        estimated=spent.estimated if spent else False,
        streamed=call.streamed,
        first_chunk_s=call.first_chunk_s,
        cache=call.cache.seen,
        saved_cost=call.cache.saved_cost if outcome == "cached" else None,
    )


def _with_content(record: CallRecord, call: Call, completion: Completion | None) -> CallRecord:
    asked = json.dumps(call.body.get("messages", call.body.get("input")), ensure_ascii=False)
    # A caller of /v1 may send half an emoji, which nothing further on could encode.
    asked = asked.encode("utf-8", "replace").decode()
    return replace(
        record,
        prompt=asked[:MAX_CONTENT_CHARS],
        answer=completion.text[:MAX_CONTENT_CHARS] if completion else None,
    )


def _mark_span(span: Span, call: Call, record: CallRecord) -> None:
    span.set_attributes(
        {
            names.ATTR_LLM_OUTCOME: record.outcome,
            names.ATTR_LLM_ATTEMPTS: record.attempts,
            names.ATTR_LLM_DEADLINE_LEFT: round(call.deadline.left_s, 3),
            names.ATTR_CACHE_RESULT: record.cache,
        }
    )
    if record.outcome == "cached":
        span.set_attribute(names.ATTR_CACHE_SAVED_TOKENS, call.cache.saved_tokens)
        span.set_attribute(names.ATTR_CACHE_SAVED_COST, record.saved_cost or 0.0)
    if call.progress.ended and record.outcome == "error":
        span.set_attribute(names.ATTR_RETRY_OUTCOME, call.progress.ended)
    if record.error is not None:
        span.set_attribute(ERROR_TYPE, record.error)
    if record.outcome not in ENDED_WELL:
        span.set_status(Status(StatusCode.ERROR))


def _mark_answer(call: Call) -> None:
    """What the caller gets to see of it, in the answer's head."""
    answer = current_request.get()
    if answer is None:
        return
    answer.headers["X-LLM-Attempts"] = str(call.progress.attempts)
    cache = call.cache
    answer.headers["X-Cache"] = cache.seen.upper()
    if cache.seen == "hit":
        answer.headers["Age"] = str(int(cache.age_s))
    if cache.similarity is not None:
        answer.headers["X-Cache-Similarity"] = f"{cache.similarity:.4f}"
    answer.timings_s["auth"] = answer.auth_s
    if cache.lookup_s:
        answer.timings_s["cache"] = cache.lookup_s
    answer.timings_s["llm"] = call.llm_s
    if call.progress.waited_s:
        answer.timings_s["retry"] = call.progress.waited_s


def _write_line(record: CallRecord, reason: str) -> None:
    succeeded = record.outcome in ENDED_WELL
    fields = {
        "user": record.user,
        "model": record.model,
        "outcome": record.outcome,
        "error": record.error,
        "reason": reason if record.error else None,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.total_tokens,
        "cost": record.cost,
        "estimated": record.estimated or None,
        "cache": record.cache,
        "saved_cost": record.saved_cost,
        "attempts": record.attempts,
        "streamed": record.streamed or None,
        "first_chunk_s": record.first_chunk_s,
        "duration_s": record.duration_s,
    }
    logger.log(
        logging.INFO if succeeded else logging.WARNING,
        "llm_request_completed" if succeeded else "llm_request_failed",
        extra={name: value for name, value in fields.items() if value is not None},
    )
