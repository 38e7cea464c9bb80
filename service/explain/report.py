"""What became of a request: its call's record, put together with what this process remembers of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from service.config.logging import timestamp
from service.errors import ERRORS_BY_NAME, CallerLeftError, Fault, InternalError, fault_of
from service.recording.recent import Remembered
from service.recording.record import CallRecord

VARYING: Final = frozenset({"UpstreamError", "UpstreamTimeoutError", "RateLimitError"})
"""Errors of which some are worth a retry and some are not: only the answer said which."""

Kept = Literal["memory", "spool", "mlflow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReport:
    """An error, what it means, and what can be done; null where it is not known any more.

    Args:
        name: Its name, as in the body and in telemetry.
        status: The HTTP status of its name.
        message: What the body said; only this process's memory has it.
        meaning: What the name means.
        fault: Who can do something about it: ``caller``, ``upstream``, ``cache`` or ``service``.
        advice: What can be done.
        retry: Whether the same request may succeed later.
        retry_after_s: The seconds of ``Retry-After``.
        reason: What happened, in two or three words.
        code: OpenAI's code.
        param: The field at fault.
        fields: Each field at fault, and the rule that it breaks.
        upstream_status: The status of the upstream's answer.
        upstream_code: The code in it.
        cause: Why the exchange with the upstream failed below HTTP.
    """

    name: str
    status: int
    message: str | None = None
    meaning: str
    fault: str
    advice: str
    retry: bool | None
    retry_after_s: int | None = None
    reason: str | None = None
    code: str | None = None
    param: str | None = None
    fields: tuple[str, ...] = ()
    upstream_status: int | None = None
    upstream_code: str | None = None
    cause: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """One request to the upstream; times in seconds since the call's start.

    Args:
        number: Counted from 1.
        started_s: When it began.
        duration_s: How long it took.
        error: The name of its error; ``cancelled`` where nobody waited any more, null where it succeeded.
        cause: Why it failed below HTTP.
        status: The upstream's status, of a failure.
        wait_s: The wait after it.
    """

    number: int
    started_s: float
    duration_s: float
    error: str | None
    cause: str | None
    status: int | None
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """What the cache did; ages in seconds, costs in US dollars."""

    result: str
    kind: str | None
    similarity: float | None
    age_s: float | None
    shared: bool
    failed: bool
    saved_cost: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReport:
    """The tokens that were paid for."""

    prompt: int | None
    completion: int | None
    total: int | None
    cached: int | None
    reasoning: int | None
    estimated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeReport:
    """Where the time went, in seconds; null for a part that there was not, or that is not known.

    Args:
        total_s: From the arrival of the request where this process remembers it, else the call's.
        call_s: Of the call.
        auth_s: To find out who is calling.
        cache_s: The cache look-up.
        llm_s: The attempts.
        retry_s: The waits between them.
        first_piece_s: Until the first piece of a stream.
    """

    total_s: float
    call_s: float | None
    auth_s: float | None
    cache_s: float | None
    llm_s: float | None
    retry_s: float | None
    first_piece_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """Where more is; null where no address is configured."""

    trace: str | None = None
    logs: str | None = None
    record: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport:
    """What became of one request; null where it is not known, or there was none.

    Args:
        summary: It all in one sentence.
        request_id: The trace id.
        incident_id: The request's own id.
        record_id: The id of the call's record in MLflow.
        known_from: Where this was found: ``memory``, ``spool`` or ``mlflow``.
        waits_in_spool: Whether the record has not been sent to MLflow yet.
        time: When it began.
        method: The HTTP method.
        route: The route's path.
        status: The status that was answered with.
        user: The caller.
        team: The team that the request belongs to.
        key_id: The id of the caller's API key.
        operation: What was asked of the model.
        model: The model that was asked.
        response_model: The model that answered.
        streamed: Whether the answer came in pieces.
        outcome: ``success``, ``cached``, ``error`` or ``cancelled``.
        error: What went wrong.
        attempts: The requests to the upstream.
        retry_ended: Why there was no further one.
        cache: What the cache did.
        tokens: What was used.
        cost: US dollars.
        times: Where the time went.
        links: Where more is.
    """

    summary: str
    request_id: str
    incident_id: str | None
    record_id: str | None
    known_from: Kept
    waits_in_spool: bool
    time: str
    method: str | None
    route: str | None
    status: int | None
    user: str | None
    team: str | None
    key_id: str | None
    operation: str | None
    model: str | None
    response_model: str | None
    streamed: bool
    outcome: Literal["success", "cached", "error", "cancelled"]
    error: ErrorReport | None
    attempts: tuple[AttemptReport, ...]
    retry_ended: str | None
    cache: CacheReport | None
    tokens: TokenReport | None
    cost: float | None
    times: TimeReport
    links: LinkReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What became of the requests of an id.

    Args:
        id: The id that was asked for.
        kind: ``request``, ``incident`` or ``record``.
        requests: The requests, oldest first.
        more: Whether there are, or may be, others.
        searched: What each place said: ``memory``, ``spool`` and ``mlflow``.
    """

    id: str
    kind: str
    requests: tuple[RequestReport, ...]
    more: bool
    searched: Mapping[str, str] = field(default_factory=dict)


def report_of(found: Remembered, known_from: Kept, *, waits: bool, links: LinkReport) -> RequestReport:
    """Put together what is known of one request."""
    call, failed = found.call, found.failed
    error = _error_of(found)
    about: dict[str, Any] = {
        "request_id": found.trace_id,
        "incident_id": failed.incident_id if failed is not None else call.incident_id if call else None,
        "record_id": None if call is None else f"tr-{call.record_id}",
        "known_from": known_from,
        "waits_in_spool": waits,
        "time": timestamp(found.started_ns / 1e9),
        "method": None if failed is None else failed.method,
        "route": (failed.route if failed is not None else None) or (call.route if call is not None else None),
        "status": None if failed is None else failed.status,
        "error": error,
        "links": links,
    }
    whose = call or failed
    if whose is not None:
        about |= {"user": whose.user, "team": whose.team, "key_id": whose.key_id}
    about |= _call_part(call, failed.duration_s if failed is not None else None, _auth_s(found))
    if failed is not None:
        # A caller may leave after the call has ended well.
        about["outcome"] = "cancelled" if failed.error.name == CallerLeftError.__name__ else "error"
    return RequestReport(summary=summary_of(about), **about)


def _auth_s(found: Remembered) -> float | None:
    return None if found.failed is None else round(found.failed.auth_s, 6)


def _call_part(call: CallRecord | None, total_s: float | None, auth_s: float | None) -> dict[str, Any]:
    if call is None:
        return {
            **dict.fromkeys(("operation", "model", "response_model", "retry_ended", "cost")),
            "streamed": False,
            "outcome": "error",
            "attempts": (),
            "cache": None,
            "tokens": None,
            "times": TimeReport(
                total_s=total_s or 0.0,
                call_s=None,
                auth_s=auth_s,
                cache_s=None,
                llm_s=None,
                retry_s=None,
                first_piece_s=None,
            ),
        }
    attempts = tuple(
        AttemptReport(
            number=number,
            started_s=each.started_s,
            duration_s=each.duration_s,
            error=each.error,
            cause=each.cause,
            status=each.status,
            wait_s=each.wait_s,
        )
        for number, each in enumerate(call.tries, 1)
    )
    return {
        "operation": call.operation,
        "model": call.model,
        "response_model": call.response_model,
        "streamed": call.streamed,
        "outcome": call.outcome if call.outcome in {"success", "cached", "cancelled"} else "error",
        "attempts": attempts,
        "retry_ended": call.retry_ended,
        "cache": CacheReport(
            result=call.cache,
            kind=call.cache_kind,
            similarity=call.similarity,
            age_s=call.age_s,
            shared=call.shared,
            failed=call.lookup_failed,
            saved_cost=call.saved_cost,
        ),
        "tokens": TokenReport(
            prompt=call.prompt_tokens,
            completion=call.completion_tokens,
            total=call.total_tokens,
            cached=call.cached_tokens,
            reasoning=call.reasoning_tokens,
            estimated=call.estimated,
        ),
        "cost": call.cost,
        "times": TimeReport(
            total_s=total_s or call.duration_s,
            call_s=call.duration_s,
            auth_s=auth_s,
            cache_s=call.lookup_s,
            llm_s=round(sum(each.duration_s for each in attempts), 6) if attempts else None,
            retry_s=round(sum(each.wait_s for each in attempts), 6) if len(attempts) > 1 else None,
            first_piece_s=call.first_chunk_s,
        ),
    }


def _error_of(found: Remembered) -> ErrorReport | None:
    call, failed = found.call, found.failed
    name = failed.error.name if failed is not None else call.error if call is not None else None
    if name is None:
        if call is None or call.outcome != "cancelled":
            return None
        name = CallerLeftError.__name__
    kind = ERRORS_BY_NAME.get(name, InternalError)
    general: dict[str, Any] = {
        "name": name,
        "status": kind.status,
        "meaning": kind.meaning,
        "advice": kind.advice,
        "reason": call.error_reason if call is not None else None,
    }
    if failed is not None:
        said = failed.error
        return ErrorReport(
            **general,
            message=said.message,
            fault=said.fault.value,
            retry=said.retry,
            retry_after_s=said.retry_after_s,
            code=said.code,
            param=said.param,
            fields=said.fields,
            upstream_status=said.upstream_status,
            upstream_code=said.upstream_code,
            cause=said.cause,
        )
    upstream_status = call.upstream_status if call is not None else None
    last = call.tries[-1] if call is not None and call.tries else None
    return ErrorReport(
        **general,
        fault=Fault(fault_of(kind, upstream_status)).value,
        retry=None if name in VARYING else kind.retry,
        upstream_status=upstream_status,
        upstream_code=call.upstream_code if call is not None else None,
        cause=last.cause if last is not None else None,
    )


FAULTS: Final[Mapping[str, str]] = {
    "caller": "the caller",
    "upstream": "the model's side",
    "cache": "the cache's store",
    "service": "this service",
}
"""How a sentence names the party at fault."""


def summary_of(about: Mapping[str, Any]) -> str:
    """What became of a request, in one sentence."""
    error: ErrorReport | None = about["error"]
    attempts: tuple[AttemptReport, ...] = about["attempts"]
    total = seconds(about["times"].total_s)
    if error is not None:
        if error.name == CallerLeftError.__name__:
            return f"The caller left after {total}, before the whole answer was sent."
        tries = f" after {len(attempts)} attempts" if len(attempts) > 1 else ""
        answered = f"{about['status']} " if about["status"] is not None else ""
        return f"It failed{tries} in {total}: {answered}{error.name}, the fault of {FAULTS[error.fault]}."
    if about["outcome"] == "cached":
        how = "shared the answer to an equal call" if about["cache"].shared else "came from the cache"
        return f"The answer {how}, in {total}."
    if len(attempts) > 1:
        retries = "1 retry" if len(attempts) == 2 else f"{len(attempts) - 1} retries"  # noqa: PLR2004 - one retry
        return f"The model answered after {retries}, in {total}."
    return f"The model answered in {total}."


def seconds(value: float) -> str:
    """A duration as people read it."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1_000:.1f} ms"
