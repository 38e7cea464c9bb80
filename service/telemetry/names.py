"""Declares the names of this service's own metrics, spans, attributes and events.

Dashboards, documents and tests are generated from these declarations. Standard names come from the packages
of OpenTelemetry's semantic conventions. Units are UCUM. An attribute of a metric has a closed set of
values, which is declared here if it is known before the first request.
"""

from dataclasses import dataclass, field
from typing import Final, Literal

from service.errors import PUBLIC_ERRORS


@dataclass(frozen=True)
class Metric:
    """A metric of this service.

    ``attributes`` maps each attribute to its values, or to a description where they are known only at run
    time. ``buckets`` are a histogram's upper bounds.
    """

    name: str
    kind: Literal["counter", "up_down_counter", "gauge", "histogram"]
    unit: str
    description: str
    attributes: dict[str, tuple[str, ...] | str] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


OTHER_MODEL: Final = "other"
"""Value of ``model`` for a name that the upstream does not list, so that callers cannot create series."""

LLM_PROVIDER: Final = "litellm"
"""The value of ``gen_ai.provider.name`` for every model call."""

UPSTREAM_LISTED: Final = "models that the upstream lists, otherwise other"
ERROR_NAMES: Final = tuple(error.__name__ for error in PUBLIC_ERRORS)
MODEL_BREAKER: Final = "model"
"""Value of ``breaker`` for a circuit of one model; ``model`` says which."""

BREAKERS: Final = ("litellm", MODEL_BREAKER, "qdrant", "qdrant_search", "embeddings", "valkey")
BREAKER_MODEL: Final = f"with breaker {MODEL_BREAKER} only: {UPSTREAM_LISTED}"
STORE_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
"""For stores that a request waits for, on the same machine or near it."""

CACHE_KINDS: Final = ("exact", "semantic")
DEPENDENCIES: Final = ("qdrant", "litellm", "mlflow", "oidc", "valkey")
"""The dependencies; in the place of ``oidc`` there is ``oidc_<host>`` for each of several issuers."""


LLM_CALLS: Final = Metric(
    "llmops.llm.calls",
    "counter",
    "{call}",
    "Model calls by outcome",
    {
        "model": UPSTREAM_LISTED,
        "outcome": ("success", "cached", "error", "cancelled"),
        "error.type": ERROR_NAMES,
    },
)
LLM_COST: Final = Metric(
    "llmops.llm.cost",
    "counter",
    "USD",
    "Cost of model calls, as reported by LiteLLM",
    {"model": UPSTREAM_LISTED},
)
LLM_FIRST_CHUNK: Final = Metric(
    "llmops.llm.time_to_first_chunk",
    "histogram",
    "s",
    "Time from the start of a streamed call to its first chunk, including retries and back-off",
    {"model": UPSTREAM_LISTED},
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60),
)
OPERATION_NAMES: Final = (
    *("chat", "embeddings", "completions", "responses", "messages", "count_tokens", "moderations"),
    *("images", "rerank", "speech", "transcriptions"),
    *("get_response", "delete_response", "cancel_response", "list_input_items"),
)
"""The kinds of calls; ``service.upstream.operations`` has a row for each."""

RETRY_ATTEMPTS: Final = Metric(
    "llmops.retry.attempts",
    "counter",
    "{attempt}",
    "Attempts by outcome",
    {
        "operation": OPERATION_NAMES,
        "outcome": ("success", "retried", "exhausted", "not_retryable", "deadline", "budget"),
        "error.type": ERROR_NAMES,
    },
)
BREAKER_STATE: Final = Metric(
    "llmops.circuit_breaker.state",
    "gauge",
    "1",
    "1 for the breaker's current state, 0 for the other states",
    {"breaker": BREAKERS, "model": BREAKER_MODEL, "state": ("closed", "open", "half_open")},
)
BREAKER_TRANSITIONS: Final = Metric(
    "llmops.circuit_breaker.transitions",
    "counter",
    "{transition}",
    "State changes of the breaker",
    {"breaker": BREAKERS, "model": BREAKER_MODEL, "to": ("closed", "open", "half_open")},
)
BREAKER_REJECTIONS: Final = Metric(
    "llmops.circuit_breaker.rejections",
    "counter",
    "{call}",
    "Attempts that the breaker rejected",
    {"breaker": BREAKERS, "model": BREAKER_MODEL},
)
BREAKER_OPEN_CALLERS: Final = Metric(
    "llmops.circuit_breaker.open_callers",
    "gauge",
    "{caller}",
    "Callers whose own circuit for the model is open",
    {"model": UPSTREAM_LISTED},
)
CACHE_LOOKUPS: Final = Metric(
    "llmops.cache.lookups",
    "counter",
    "{lookup}",
    "Cache lookups by result",
    {"kind": CACHE_KINDS, "result": ("hit", "miss", "bypass", "error")},
)
CACHE_LOOKUP_DURATION: Final = Metric(
    "llmops.cache.lookup.duration",
    "histogram",
    "s",
    "Duration of cache lookups",
    {"kind": CACHE_KINDS},
    buckets=STORE_BUCKETS,
)
CACHE_SIMILARITY: Final = Metric(
    "llmops.cache.similarity",
    "histogram",
    "1",
    "Similarity of the nearest cached question, where it reaches the threshold",
    {"kind": ("semantic",)},
    buckets=(0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1),
)
CACHE_SAVED_TOKENS: Final = Metric(
    "llmops.cache.saved_tokens",
    "counter",
    "{token}",
    "Tokens of answers that came from the cache",
    {"kind": CACHE_KINDS},
)
CACHE_SAVED_COST: Final = Metric(
    "llmops.cache.saved_cost",
    "counter",
    "USD",
    "Original cost of answers that came from the cache",
    {"kind": CACHE_KINDS},
)
CACHE_WRITES: Final = Metric(
    "llmops.cache.writes",
    "counter",
    "{entry}",
    "Cache writes by outcome",
    # skipped: an answer that says nothing, was cut off, or cannot be given back as it was.
    {"outcome": ("stored", "dropped", "failed", "cleared", "skipped")},
)
REQUESTS_IN_FLIGHT: Final = Metric(
    "llmops.requests.in_flight",
    "up_down_counter",
    "{request}",
    "Requests in flight, without health routes",
)
AUTH_ATTEMPTS: Final = Metric(
    "llmops.auth.attempts",
    "counter",
    "{attempt}",
    "Sign-ins, and requests with a token or an API key, by outcome",
    {
        "method": ("password", "token", "key", "oidc"),
        "outcome": ("success", "wrong_credentials", "rate_limited", "invalid", "unavailable"),
    },
)
BUDGET_EXCEEDED: Final = Metric(
    "llmops.budget.exceeded",
    "counter",
    "{call}",
    "Calls refused because a budget is spent",
    {"scope": ("key", "user", "team")},
)
BUDGET_NEAR_LIMIT: Final = Metric(
    "llmops.budget.near_limit",
    "counter",
    "{budget}",
    "Budgets of which 80 % was spent, once in each period",
    {"scope": ("key", "user", "team")},
)
BUDGET_UNPRICED: Final = Metric(
    "llmops.budget.unpriced",
    "counter",
    "{call}",
    "Calls without a price, of which a budget in US dollars counts nothing",
    {"scope": ("key", "user", "team")},
)
IDENTITY_STORE_DURATION: Final = Metric(
    "llmops.identity.store.duration",
    "histogram",
    "s",
    "Duration of the SQL database's transactions, including the wait for a thread",
    {"operation": ("keep", "find", "forget", "purge", "poll", "book"), "outcome": ("success", "error")},
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2),
)
SHARED_OPERATION_DURATION: Final = Metric(
    "llmops.shared.operation.duration",
    "histogram",
    "s",
    "Time that a request waited for Valkey; with outcome error, until this process went on without it",
    {"operation": ("count", "look", "lease"), "outcome": ("success", "error")},
    buckets=STORE_BUCKETS,
)
SHARED_NEWS: Final = Metric(
    "llmops.shared.news",
    "counter",
    "{message}",
    "Messages between replicas: told to the others, heard from another one, of no use (not understood, or "
    "more than this process can hold), or dropped as too many waited",
    {
        "topic": ("signed_out", "cache_cleared", "circuit", "spent"),
        "outcome": ("told", "heard", "dropped", "unusable"),
    },
)
SHARED_LEASES: Final = Metric(
    "llmops.shared.leases",
    "counter",
    "{call}",
    "Calls that other processes may share: made here as the first, or taken over from a process that gave no "
    "answer; answered by another process; or made here, as Valkey did not say",
    {"outcome": ("leader", "taken_over", "follower", "none")},
)
SHARED_FALLBACK: Final = Metric(
    "llmops.shared.fallback",
    "gauge",
    "1",
    "With VALKEY_URL: 1 while limits are counted per process because Valkey cannot be had, else 0",
)
REQUESTS_REJECTED: Final = Metric(
    "llmops.requests.rejected",
    "counter",
    "{request}",
    "Requests rejected before any work was done",
    {"reason": ("overloaded", "draining", "rate_limited", "too_large")},
)
HEALTH_STATUS: Final = Metric(
    "llmops.health.status",
    "gauge",
    "1",
    "1 for a dependency that is up, 0 for one that is down or not checked",
    {"dependency": DEPENDENCIES},
)
HEALTH_AGE: Final = Metric(
    "llmops.health.age",
    "gauge",
    "s",
    "Time since the last check of a dependency",
    {"dependency": DEPENDENCIES},
)
HEALTH_CHECK_DURATION: Final = Metric(
    "llmops.health.check.duration",
    "histogram",
    "s",
    "Duration of the checks of a dependency",
    {"dependency": DEPENDENCIES},
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
RECORDER_QUEUE: Final = Metric(
    "llmops.recorder.queue",
    "gauge",
    "{record}",
    "Call records that have not been delivered to MLflow",
)
RECORDER_SPOOLED: Final = Metric(
    "llmops.recorder.spooled",
    "counter",
    "{record}",
    "Records spooled because MLflow did not accept them",
)
RECORDER_REPLAYED: Final = Metric(
    "llmops.recorder.replayed",
    "counter",
    "{record}",
    "Spooled records delivered to MLflow, including those of orphaned spools",
)
RECORDER_LOST: Final = Metric(
    "llmops.recorder.lost",
    "counter",
    "{record}",
    "Records lost",
)
EVENT_LOOP_LAG: Final = Metric(
    "llmops.event_loop.lag",
    "histogram",
    "s",
    "Delay between the scheduled and the actual wake-up of a timer on the event loop",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)

METRICS: Final = (
    LLM_CALLS,
    LLM_COST,
    LLM_FIRST_CHUNK,
    RETRY_ATTEMPTS,
    BREAKER_STATE,
    BREAKER_TRANSITIONS,
    BREAKER_REJECTIONS,
    BREAKER_OPEN_CALLERS,
    CACHE_LOOKUPS,
    CACHE_LOOKUP_DURATION,
    CACHE_SIMILARITY,
    CACHE_SAVED_TOKENS,
    CACHE_SAVED_COST,
    CACHE_WRITES,
    REQUESTS_IN_FLIGHT,
    REQUESTS_REJECTED,
    AUTH_ATTEMPTS,
    BUDGET_EXCEEDED,
    BUDGET_NEAR_LIMIT,
    BUDGET_UNPRICED,
    IDENTITY_STORE_DURATION,
    SHARED_OPERATION_DURATION,
    SHARED_NEWS,
    SHARED_LEASES,
    SHARED_FALLBACK,
    HEALTH_STATUS,
    HEALTH_AGE,
    HEALTH_CHECK_DURATION,
    RECORDER_QUEUE,
    RECORDER_SPOOLED,
    RECORDER_REPLAYED,
    RECORDER_LOST,
    EVENT_LOOP_LAG,
)

HTTP_DURATION_BUCKETS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120),
)
"""The standard buckets of ``http.server.request.duration`` end at 10 s; model calls take longer."""

SPAN_LLM_CALL: Final = "llm call"
SPAN_CACHE_LOOKUP: Final = "cache lookup"
SPAN_CACHE_WRITE: Final = "cache write"
SPAN_CACHE_SWEEP: Final = "cache sweep"
SPAN_HEALTH_CHECK: Final = "health check"
SPAN_MLFLOW_RECORD: Final = "mlflow record"
SPAN_SPOOL_REPLAY: Final = "spool replay"
ATTR_CLIENT_REQUEST_ID: Final = "client_request_id"
ATTR_INCIDENT_ID: Final = "llmops.incident_id"
ATTR_LLM_ATTEMPTS: Final = "llmops.llm.attempts"
ATTR_LLM_COST: Final = "llmops.llm.cost"
ATTR_LLM_DEADLINE: Final = "llmops.llm.deadline"
ATTR_LLM_DEADLINE_LEFT: Final = "llmops.llm.deadline_left"
ATTR_RETRY_OUTCOME: Final = "llmops.retry.outcome"
ATTR_RETRY_DELAY: Final = "llmops.retry.delay"
"""The back-off after an attempt, in seconds; in MLflow's records only."""
ATTR_LLM_OUTCOME: Final = "llmops.llm.outcome"
ATTR_LLM_STREAMED: Final = "llmops.llm.streamed"
ATTR_LLM_FIRST_CHUNK: Final = "llmops.llm.time_to_first_chunk"
ATTR_LLM_ESTIMATED: Final = "llmops.llm.tokens_estimated"
ATTR_CACHE_KIND: Final = "llmops.cache.kind"
ATTR_CACHE_SIMILARITY: Final = "llmops.cache.similarity"
ATTR_CACHE_AGE: Final = "llmops.cache.age"
ATTR_CACHE_SHARED: Final = "llmops.cache.shared"
ATTR_CACHE_ENTRIES: Final = "llmops.cache.entries"
ATTR_CACHE_SAVED_TOKENS: Final = "llmops.cache.saved_tokens"
ATTR_CACHE_RESULT: Final = "llmops.cache.result"
ATTR_CACHE_SAVED_COST: Final = "llmops.cache.saved_cost"
ATTR_UPSTREAM_CAUSE: Final = "llmops.upstream.cause"
"""Why an attempt failed below HTTP: one of the words of ``service.errors.Cause``."""
ATTR_UPSTREAM_STATUS: Final = "llmops.upstream.status_code"
"""The HTTP status of the upstream's answer to a failed attempt, or the one that its event names."""
ATTR_UPSTREAM_CODE: Final = "llmops.upstream.code"
"""OpenAI's code for what the upstream said, by its own code or LiteLLM's exception; else ``other``."""
ATTR_TEAM: Final = "llmops.team"
ATTR_KEY_ID: Final = "llmops.key.id"
ATTR_RECORDS: Final = "llmops.recorder.records"

EVENT_AUDIT: Final = "llmops.identity.changed"
EVENT_BUDGET_NEAR_LIMIT: Final = "llmops.budget.near_limit"
EVENT_BUDGET_EXCEEDED: Final = "llmops.budget.exceeded"
EVENT_BUDGET_UNPRICED: Final = "llmops.budget.unpriced"
EVENT_CACHE_ERROR: Final = "llmops.cache.error"
EVENT_HEALTH_CHANGED: Final = "llmops.health.changed"
EVENT_IDENTITY_STORE_FAILED: Final = "llmops.identity.store.failed"
EVENT_IDENTITY_STORE_RECOVERED: Final = "llmops.identity.store.recovered"
EVENT_IDENTITY_ISSUER_FAILED: Final = "llmops.identity.issuer.failed"
EVENT_IDENTITY_ISSUER_RECOVERED: Final = "llmops.identity.issuer.recovered"
EVENT_RECORDER_SPOOLED: Final = "llmops.recorder.spooled"
EVENT_RECORDER_REPLAYED: Final = "llmops.recorder.replayed"
EVENT_SHARED_FALLBACK_STARTED: Final = "llmops.shared.fallback.started"
EVENT_SHARED_FALLBACK_ENDED: Final = "llmops.shared.fallback.ended"
EVENT_SHUTDOWN_STARTED: Final = "llmops.shutdown.started"
EVENT_SHUTDOWN_WAITING: Final = "llmops.shutdown.waiting"
EVENT_SHUTDOWN_STEP: Final = "llmops.shutdown.step"
EVENT_SHUTDOWN_COMPLETED: Final = "llmops.shutdown.completed"
EVENT_RETRY_SCHEDULED: Final = "llmops.retry.scheduled"
EVENT_RETRY_SUCCEEDED: Final = "llmops.retry.succeeded"
EVENT_RETRY_EXHAUSTED: Final = "llmops.retry.exhausted"
EVENT_BREAKER_STATE_CHANGED: Final = "llmops.circuit_breaker.state_changed"
EVENT_BREAKER_REJECTED: Final = "llmops.circuit_breaker.rejected"
EVENTS: Final = (
    EVENT_RETRY_SCHEDULED,
    EVENT_RETRY_SUCCEEDED,
    EVENT_RETRY_EXHAUSTED,
    EVENT_BREAKER_STATE_CHANGED,
    EVENT_BREAKER_REJECTED,
    EVENT_AUDIT,
    EVENT_BUDGET_NEAR_LIMIT,
    EVENT_BUDGET_EXCEEDED,
    EVENT_BUDGET_UNPRICED,
    EVENT_CACHE_ERROR,
    EVENT_HEALTH_CHANGED,
    EVENT_IDENTITY_STORE_FAILED,
    EVENT_IDENTITY_STORE_RECOVERED,
    EVENT_IDENTITY_ISSUER_FAILED,
    EVENT_IDENTITY_ISSUER_RECOVERED,
    EVENT_RECORDER_SPOOLED,
    EVENT_RECORDER_REPLAYED,
    EVENT_SHARED_FALLBACK_STARTED,
    EVENT_SHARED_FALLBACK_ENDED,
    EVENT_SHUTDOWN_STARTED,
    EVENT_SHUTDOWN_WAITING,
    EVENT_SHUTDOWN_STEP,
    EVENT_SHUTDOWN_COMPLETED,
)
