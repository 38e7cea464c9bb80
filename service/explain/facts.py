"""The facts of a request as lines of a name and a text, for the page and for the terminal."""

from collections.abc import Iterator
from typing import Final

from service.errors import CallerLeftError
from service.explain.report import FAULTS, AttemptReport, ErrorReport, RequestReport, seconds

RETRY_ENDED: Final = {
    "exhausted": "all retries were used",
    "not_retryable": "the error is not one that a retry helps with",
    "deadline": "another one could not have ended within the deadline",
    "budget": "the process's budget of retries was used up",
}
"""Why there was no further attempt."""

SEARCHED: Final = {"memory": "this process's memory", "spool": "the spool on disk", "mlflow": "MLflow"}


def facts_of(request: RequestReport) -> Iterator[tuple[str, str]]:
    """What is known of a request."""
    yield "Time", request.time
    route = " ".join(part for part in (request.method, request.route) if part)
    if route:
        yield "Route", route
    if request.status is not None:
        yield "Answered with", str(request.status)
    if request.user is not None:
        whose = [
            f"{name} {value}" for name, value in (("team", request.team), ("key", request.key_id)) if value
        ]
        yield "Caller", request.user + (f" ({', '.join(whose)})" if whose else "")
    if request.model is not None:
        other = request.response_model
        answered = f", answered by {other}" if other not in {None, request.model} else ""
        yield "Model", f"{request.model} ({request.operation}){answered}"
    yield from _answer_facts(request)
    yield "Request id", request.request_id
    if request.incident_id is not None:
        yield "Incident id", request.incident_id


def _answer_facts(request: RequestReport) -> Iterator[tuple[str, str]]:
    cache, tokens = request.cache, request.tokens
    if cache is not None:
        yield "Cache", _cache(request)
    if tokens is not None and tokens.total is not None:
        parts = [
            f"{count} {name}"
            for name, count in (
                ("prompt", tokens.prompt),
                ("of these cached by the provider", tokens.cached),
                ("completion", tokens.completion),
                ("of these reasoning", tokens.reasoning),
            )
            if count is not None
        ]
        about = " (estimated)" if tokens.estimated else ""
        yield "Tokens", f"{tokens.total}: {', '.join(parts)}{about}"
    if request.cost is not None:
        yield "Cost", f"{request.cost:.6f} US dollars"
    times = request.times
    spent = (
        ("signing in", times.auth_s),
        ("cache", times.cache_s),
        ("model", times.llm_s),
        ("waits", times.retry_s),
        ("first piece after", times.first_piece_s),
    )
    split = ", ".join(f"{name} {seconds(value)}" for name, value in spent if value is not None)
    yield "Duration", seconds(times.total_s) + (f": {split}" if split else "")
    if request.model is not None:
        yield "Record", _record(request)


def _cache(request: RequestReport) -> str:
    cache = request.cache
    if cache is None:
        return ""
    parts = [cache.result]
    if cache.shared:
        parts.append("shared with an equal call under way")
    if cache.kind is not None:
        parts.append(cache.kind)
    if cache.similarity is not None:
        parts.append(f"similarity {cache.similarity:.4f}")
    if cache.age_s is not None:
        parts.append(f"{seconds(cache.age_s)} old")
    if cache.failed:
        parts.append("the store could not be asked")
    if cache.saved_cost:
        parts.append(f"saved {cache.saved_cost:.6f} US dollars")
    return ", ".join(parts)


def _record(request: RequestReport) -> str:
    if request.waits_in_spool:
        state = "waits on disk: MLflow does not have it yet"
    else:
        state = "in MLflow" if request.known_from == "mlflow" else "sent, or about to be"
    return f"{request.record_id}, {state}"


def error_facts(error: ErrorReport) -> Iterator[tuple[str, str]]:
    """What is known of an error."""
    yield "Meaning", error.meaning
    yield "Whose fault", FAULTS[error.fault]
    yield "What to do", error.advice
    if error.name == CallerLeftError.__name__:
        # Nobody was told anything.
        return
    if error.retry is None:
        yield "Retry", "the answer's header X-Should-Retry said whether a retry may help"
    elif error.retry:
        wait = f", after {error.retry_after_s} s" if error.retry_after_s is not None else ""
        yield "Retry", f"yes{wait}"
    else:
        yield "Retry", "no: the same request fails again"
    said = [
        f"{name} {value}"
        for name, value in (
            ("status", error.upstream_status),
            ("code", error.upstream_code),
            ("cause", error.cause),
        )
        if value is not None
    ]
    if said:
        yield "Upstream", ", ".join(said)
    reason = None if error.reason == error.name else error.reason
    for name, value in (("Reason", reason), ("Code", error.code), ("Parameter", error.param)):
        if value is not None:
            yield name, value
    if error.fields:
        yield "Fields", "; ".join(error.fields)


def attempt_text(attempt: AttemptReport) -> str:
    """What became of an attempt."""
    parts = [attempt.error or "success"]
    parts += [str(one) for one in (attempt.status, attempt.cause) if one is not None]
    text = f"{' '.join(parts)}, {seconds(attempt.duration_s)}"
    return f"{text}; then a wait of {seconds(attempt.wait_s)}" if attempt.wait_s else text


def ended_text(request: RequestReport) -> str | None:
    """Why there was no further attempt; None where that needs no words."""
    ended = RETRY_ENDED.get(request.retry_ended or "")
    return None if ended is None or request.error is None else f"No further attempt: {ended}."


def searched_text(searched: dict[str, str]) -> str:
    """What each place said."""
    return ", ".join(f"{SEARCHED.get(name, name)}: {state}" for name, state in searched.items())
