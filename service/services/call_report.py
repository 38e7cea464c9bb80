"""A model call as asked and as ended, and the one place that reports it.

``CallSpec`` is what is asked, ``CallOutcome`` is what came of it. ``CallReport`` turns an outcome into the
``llm call`` span's attributes, the metrics, the log line, the facts for the answer's head, and the record for
MLflow.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import Span, Status, StatusCode, format_span_id, format_trace_id
from opentelemetry.util.types import AttributeValue

from service.cache.control import NO_DIRECTIVES, CacheControl
from service.cache.response_cache import Lookup
from service.config.log_records import log
from service.context import CallFacts, current_request
from service.recording.record import AttemptRecord, CallRecord
from service.telemetry import names
from service.telemetry.instruments import Instruments
from service.upstream.messages import MAX_CONTENT_CHARS, Completion, LlmRequest
from service.upstream.operations import OPERATIONS
from service.utils.deadline import Deadline

Outcome = Literal["success", "cached", "error", "cancelled"]
PROMPTS: Final = ("messages", "input", "prompt", "query")
"""Where the operations have what is asked; one has one of them."""

SUCCESSFUL: Final = frozenset({"success", "cached"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallSpec:
    """What is asked of a model, by whom, and until when.

    Args:
        request: The request in OpenAI's format.
        user: Name of the caller.
        deadline: When the whole answer, or the first piece of a stream, must be there.
        streamed: Whether the caller wants the answer in pieces.
        cache_control: The directives of the caller's ``Cache-Control``.
        own_protocol: Whether it came in this service's own protocol, not in OpenAI's.
        team: The team that the call belongs to.
        key_id: The id of the caller's API key.
    """

    request: LlmRequest
    user: str
    deadline: Deadline
    streamed: bool = False
    cache_control: CacheControl = NO_DIRECTIVES
    own_protocol: bool = False
    team: str | None = None
    key_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOutcome:
    """What came of a call, when it has ended or when the first piece of a stream is about to be sent.

    Args:
        outcome: A value of ``outcome`` on ``llmops.llm.calls``.
        error: Name of the error; None unless ``outcome`` is ``error``.
        reason: What happened, in two or three words; None without an error.
        completion: The answer, or the part of it that arrived.
        lookup: What the cache look-up found.
        cache: ``hit``, ``miss`` or ``bypass``, as callers and records see it.
        saved_tokens: Tokens that a cached answer did not cost.
        saved_cost: US dollars that a cached answer did not cost; None where its price is not known.
        attempts: Requests sent to the upstream.
        tries: What became of each of them.
        retry_ended: Why there was no further attempt; empty where there was none at all.
        retry_s: Seconds spent waiting between attempts.
        llm_s: Seconds spent waiting for the upstream.
        first_chunk_s: Seconds until the first piece of a streamed answer.
        started_ns: Unix time in nanoseconds.
        duration_s: Seconds from the call's start until now.
        failure: What the error's body says, and what the upstream said or did, as fields of the log line.
        upstream_status: The upstream's HTTP status where the call failed.
        upstream_code: The upstream's error code where the call failed, one of a closed set.
    """

    outcome: Outcome
    error: str | None
    reason: str | None
    completion: Completion | None
    lookup: Lookup
    cache: Literal["hit", "miss", "bypass"]
    saved_tokens: int
    saved_cost: float | None
    attempts: int
    tries: tuple[AttemptRecord, ...]
    retry_ended: str
    retry_s: float
    llm_s: float
    first_chunk_s: float | None
    started_ns: int
    duration_s: float
    failure: Mapping[str, AttributeValue] = field(default_factory=dict)
    upstream_status: int | None = None
    upstream_code: str | None = None


class CallReport:
    """Reports that a call began, that its first piece is there, and how it ended.

    Args:
        instruments: Where calls and costs are counted.
        known: Maps a model's name to the value that may stand on a metric.
        record: Takes the record of each call that has ended, before its answer is sent.
        capture: Whether records hold prompt and answer.
    """

    def __init__(
        self,
        instruments: Instruments,
        known: Callable[[str], str],
        record: Callable[[CallRecord], None],
        *,
        capture: bool,
    ) -> None:
        self._instruments = instruments
        self._known = known
        self._record = record
        self._capture = capture

    def started(self, spec: CallSpec) -> None:
        """Log that the call began."""
        log(logger, logging.INFO, "llm_request_started", {"user": spec.user, "model": spec.request.model})

    def answering(self, spec: CallSpec, outcome: CallOutcome) -> None:
        """Report the first piece of a streamed answer, which is about to be sent."""
        self._instruments.llm_first_chunk.record(
            outcome.first_chunk_s or 0.0, {"model": self._known(spec.request.model)}
        )
        _put_facts(outcome)

    def ended(self, span: Span, spec: CallSpec, outcome: CallOutcome) -> None:
        """Report how the call ended.

        Args:
            span: The ``llm call`` span, still current.
            spec: What was asked.
            outcome: What came of it.
        """
        record = self._record_of(span, spec, outcome)
        self._record(record)
        attributes: dict[str, str | int | float] = {
            names.ATTR_LLM_OUTCOME: outcome.outcome,
            names.ATTR_LLM_ATTEMPTS: outcome.attempts,
            names.ATTR_LLM_DEADLINE_LEFT: round(spec.deadline.left_s, 3),
            names.ATTR_CACHE_RESULT: outcome.cache,
        }
        known, instruments = self._known(spec.request.model), self._instruments
        labels: dict[str, str] = {"model": known, "outcome": outcome.outcome}
        if outcome.error is not None:
            labels[ERROR_TYPE] = attributes[ERROR_TYPE] = outcome.error
            if outcome.retry_ended:
                attributes[names.ATTR_RETRY_OUTCOME] = outcome.retry_ended
        if outcome.outcome == "cached":
            kind = {"kind": outcome.lookup.kind}
            attributes[names.ATTR_CACHE_SAVED_TOKENS] = outcome.saved_tokens
            attributes[names.ATTR_CACHE_SAVED_COST] = outcome.saved_cost or 0.0
            instruments.cache_saved_tokens.add(outcome.saved_tokens, kind)
            instruments.cache_saved_cost.add(outcome.saved_cost or 0.0, kind)
        span.set_attributes(attributes)
        if outcome.outcome not in SUCCESSFUL:
            span.set_status(Status(StatusCode.ERROR))
        instruments.llm_calls.add(1, labels)
        if outcome.completion is not None and outcome.completion.cost is not None:
            instruments.llm_cost.add(outcome.completion.cost, {"model": known})
        _put_facts(outcome)
        _write_line(spec, outcome, record.record_id)

    def _record_of(self, span: Span, spec: CallSpec, outcome: CallOutcome) -> CallRecord:
        context, request = span.get_span_context(), current_request.get()
        completion, lookup = outcome.completion, outcome.lookup
        hit = outcome.cache == "hit"
        # The tokens of a cached answer stand in the record of the call that paid for it.
        paid = None if hit else completion
        asked = answer = None
        if self._capture:
            body = spec.request.body
            given = next((body[name] for name in PROMPTS if name in body), None)
            text = json.dumps(given, ensure_ascii=False)
            # A request under /v1 may hold half a surrogate pair, which cannot be encoded.
            asked = text.encode("utf-8", "replace").decode()[:MAX_CONTENT_CHARS]
            answer = completion.text[:MAX_CONTENT_CHARS] if completion else None
        return CallRecord(
            trace_id=format_trace_id(context.trace_id),
            span_id=format_span_id(context.span_id),
            operation=OPERATIONS[spec.request.operation].genai,
            started_ns=outcome.started_ns,
            duration_s=outcome.duration_s,
            user=spec.user,
            team=spec.team,
            key_id=spec.key_id,
            model=spec.request.model,
            outcome=outcome.outcome,
            error=outcome.error,
            attempts=outcome.attempts,
            response_model=completion.model if completion else None,
            prompt_tokens=paid.prompt_tokens if paid else None,
            completion_tokens=paid.completion_tokens if paid else None,
            total_tokens=paid.total_tokens if paid else None,
            cost=completion.cost if completion else None,
            estimated=paid.estimated if paid else False,
            streamed=spec.streamed,
            first_chunk_s=outcome.first_chunk_s,
            cache=outcome.cache,
            saved_cost=outcome.saved_cost if outcome.outcome == "cached" else None,
            prompt=asked,
            answer=answer,
            continued=request is not None and request.continued,
            incident_id=request.incident_id if request is not None else None,
            route=request.route if request is not None else None,
            tries=outcome.tries,
            lookup_s=round(lookup.lookup_s, 6) if lookup.result != "bypass" else None,
            lookup_failed=lookup.result == "error",
            cache_kind=lookup.kind if hit and lookup.entry is not None else None,
            similarity=lookup.similarity if hit else None,
            age_s=round(lookup.age_s, 3) if hit and lookup.entry is not None else None,
            shared=hit and lookup.entry is None,
            cached_tokens=paid.cache_read_tokens if paid else None,
            reasoning_tokens=paid.reasoning_tokens if paid else None,
            error_reason=outcome.reason,
            retry_ended=(outcome.retry_ended or None) if outcome.error is not None else None,
            upstream_status=outcome.upstream_status,
            upstream_code=outcome.upstream_code,
        )


def _put_facts(outcome: CallOutcome) -> None:
    """Leave the facts for the head of the answer, whichever answer that is."""
    request = current_request.get()
    if request is not None:
        request.call = CallFacts(
            outcome.attempts,
            outcome.cache,
            outcome.lookup.age_s,
            outcome.lookup.similarity,
            outcome.lookup.lookup_s,
            outcome.llm_s,
            outcome.retry_s,
        )


def _write_line(spec: CallSpec, outcome: CallOutcome, record_id: str) -> None:
    completion = outcome.completion
    paid = None if outcome.cache == "hit" else completion
    fields = {
        "user": spec.user,
        names.ATTR_TEAM: spec.team,
        names.ATTR_KEY_ID: spec.key_id,
        "record_id": record_id,
        "model": spec.request.model,
        "outcome": outcome.outcome,
        "error": outcome.error,
        "reason": outcome.reason,
        "prompt_tokens": paid.prompt_tokens if paid else None,
        "completion_tokens": paid.completion_tokens if paid else None,
        "total_tokens": paid.total_tokens if paid else None,
        "cost": completion.cost if completion else None,
        "estimated": (paid.estimated or None) if paid else None,
        "cache": outcome.cache,
        "saved_cost": outcome.saved_cost if outcome.outcome == "cached" else None,
        "attempts": outcome.attempts,
        "streamed": spec.streamed or None,
        "first_chunk_s": outcome.first_chunk_s,
        "duration_s": outcome.duration_s,
        **outcome.failure,
    }
    succeeded = outcome.outcome in SUCCESSFUL
    log(
        logger,
        logging.INFO if succeeded else logging.WARNING,
        "llm_request_completed" if succeeded else "llm_request_failed",
        {name: value for name, value in fields.items() if value is not None},
    )
