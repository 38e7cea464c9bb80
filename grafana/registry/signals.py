"""The spans, the events, and the groups of attributes that are neither."""

from dataclasses import dataclass
from typing import Final, Literal

from service.telemetry import names

Kind = Literal["server", "client", "internal"]
Level = Literal["INFO", "WARN", "ERROR"]


@dataclass(frozen=True)
class Span:
    """A kind of span.

    Args:
        id: Its name in the registry.
        kind: Its kind.
        names: The templates of its name: an attribute's key in braces stands for its value.
        brief: What it is.
        root: Whether it begins a trace; None for either.
    """

    id: str
    kind: Kind
    names: tuple[str, ...]
    brief: str
    root: bool | None = False


@dataclass(frozen=True)
class Event:
    """An event: a log record with this event name, and a span event where a span is current."""

    name: str
    levels: tuple[Level, ...]
    brief: str

    @property
    def id(self) -> str:
        """Its name in the registry."""
        return self.name


@dataclass(frozen=True)
class Group:
    """Attributes that stand together, on something that the registry has no kind of signal for."""

    id: str
    brief: str


Place = Span | Event | Group

SERVER: Final = Span(
    "llmops.server",
    "server",
    ("{http.request.method} {http.route}", "{http.request.method}"),
    "A request to this service; without a route in its name, one that no route takes",
    root=None,
)
LLM_CALL: Final = Span("llmops.llm.call", "internal", (names.SPAN_LLM_CALL,), "One call of a use case")
ATTEMPT: Final = Span(
    "llmops.llm.attempt",
    "client",
    ("{gen_ai.operation.name} {gen_ai.request.model}",),
    "One attempt at a model, by the GenAI conventions",
)
UPSTREAM_REQUEST: Final = Span(
    "llmops.upstream.request", "client", ("{http.request.method}",), "A request to LiteLLM"
)
CACHE_LOOKUP: Final = Span(
    "llmops.cache.lookup", "internal", (names.SPAN_CACHE_LOOKUP,), "A look-up of the cache"
)
CACHE_WRITE: Final = Span(
    "llmops.cache.write",
    "internal",
    (names.SPAN_CACHE_WRITE,),
    "Answers that are written to the cache, after they were sent",
    root=True,
)
CACHE_SWEEP: Final = Span(
    "llmops.cache.sweep",
    "internal",
    (names.SPAN_CACHE_SWEEP,),
    "The removal of what the cache need not keep",
    root=True,
)
CACHE_STORE: Final = Span(
    "llmops.cache.store",
    "client",
    ("{db.operation.name} {db.collection.name}",),
    "A call of the vector store",
)
HEALTH_CHECK: Final = Span(
    "llmops.health.check", "internal", (names.SPAN_HEALTH_CHECK,), "A check of a dependency", root=None
)
MLFLOW_RECORD: Final = Span(
    "llmops.recorder.record",
    "internal",
    (names.SPAN_MLFLOW_RECORD,),
    "Records that are sent to MLflow, with a link to each call",
    root=True,
)
SPOOL_REPLAY: Final = Span(
    "llmops.recorder.replay",
    "internal",
    (names.SPAN_SPOOL_REPLAY,),
    "Records that had to wait and are sent to MLflow, with a link to each call",
    root=True,
)
SPANS: Final = (
    SERVER,
    LLM_CALL,
    ATTEMPT,
    UPSTREAM_REQUEST,
    CACHE_LOOKUP,
    CACHE_WRITE,
    CACHE_SWEEP,
    CACHE_STORE,
    HEALTH_CHECK,
    MLFLOW_RECORD,
    SPOOL_REPLAY,
)

RETRY_SCHEDULED: Final = Event(
    names.EVENT_RETRY_SCHEDULED, ("WARN",), "An attempt failed, and there will be another one"
)
RETRY_SUCCEEDED: Final = Event(names.EVENT_RETRY_SUCCEEDED, ("INFO",), "A later attempt succeeded")
RETRY_EXHAUSTED: Final = Event(
    names.EVENT_RETRY_EXHAUSTED, ("ERROR",), "An attempt failed for a passing reason, and is the last one"
)
BREAKER_STATE_CHANGED: Final = Event(
    names.EVENT_BREAKER_STATE_CHANGED, ("INFO", "WARN"), "A circuit breaker changed its state"
)
BREAKER_REJECTED: Final = Event(names.EVENT_BREAKER_REJECTED, ("WARN",), "A circuit breaker rejected a call")
AUDIT: Final = Event(names.EVENT_AUDIT, ("INFO",), "Somebody changed a key, a user or a team")
BUDGET_NEAR_LIMIT: Final = Event(names.EVENT_BUDGET_NEAR_LIMIT, ("WARN",), "80 % of a budget is spent")
BUDGET_EXCEEDED: Final = Event(names.EVENT_BUDGET_EXCEEDED, ("WARN",), "A budget is spent")
BUDGET_UNPRICED: Final = Event(
    names.EVENT_BUDGET_UNPRICED,
    ("WARN",),
    "A call without a price, of which a budget in dollars counts nothing",
)
CACHE_ERROR: Final = Event(names.EVENT_CACHE_ERROR, ("WARN",), "The cache fails; calls go on without it")
HEALTH_CHANGED: Final = Event(
    names.EVENT_HEALTH_CHANGED, ("INFO", "WARN"), "A dependency went down or came up"
)
STORE_FAILED: Final = Event(names.EVENT_IDENTITY_STORE_FAILED, ("WARN",), "The SQL database fails")
STORE_RECOVERED: Final = Event(
    names.EVENT_IDENTITY_STORE_RECOVERED, ("INFO",), "The SQL database works again"
)
ISSUER_FAILED: Final = Event(
    names.EVENT_IDENTITY_ISSUER_FAILED, ("WARN",), "An OpenID Connect issuer does not give its keys"
)
ISSUER_RECOVERED: Final = Event(
    names.EVENT_IDENTITY_ISSUER_RECOVERED, ("INFO",), "An OpenID Connect issuer gives its keys again"
)
RECORDER_SPOOLED: Final = Event(
    names.EVENT_RECORDER_SPOOLED, ("WARN",), "MLflow does not take records; they wait on disk"
)
RECORDER_REPLAYED: Final = Event(
    names.EVENT_RECORDER_REPLAYED, ("INFO",), "MLflow has the records that had to wait"
)
FALLBACK_STARTED: Final = Event(
    names.EVENT_SHARED_FALLBACK_STARTED, ("WARN",), "Valkey cannot be had; each process counts by itself"
)
FALLBACK_ENDED: Final = Event(
    names.EVENT_SHARED_FALLBACK_ENDED, ("INFO",), "Valkey works again; the processes count together"
)
SHUTDOWN_STARTED: Final = Event(names.EVENT_SHUTDOWN_STARTED, ("INFO",), "The process was told to stop")
SHUTDOWN_WAITING: Final = Event(
    names.EVENT_SHUTDOWN_WAITING, ("INFO",), "The stop waits for the requests in flight"
)
SHUTDOWN_STEP: Final = Event(
    names.EVENT_SHUTDOWN_STEP, ("INFO",), "A step of the stop, or a request that ended"
)
SHUTDOWN_COMPLETED: Final = Event(names.EVENT_SHUTDOWN_COMPLETED, ("INFO",), "The stop is complete")
EVENTS: Final = (
    RETRY_SCHEDULED,
    RETRY_SUCCEEDED,
    RETRY_EXHAUSTED,
    BREAKER_STATE_CHANGED,
    BREAKER_REJECTED,
    AUDIT,
    BUDGET_NEAR_LIMIT,
    BUDGET_EXCEEDED,
    BUDGET_UNPRICED,
    CACHE_ERROR,
    HEALTH_CHANGED,
    STORE_FAILED,
    STORE_RECOVERED,
    ISSUER_FAILED,
    ISSUER_RECOVERED,
    RECORDER_SPOOLED,
    RECORDER_REPLAYED,
    FALLBACK_STARTED,
    FALLBACK_ENDED,
    SHUTDOWN_STARTED,
    SHUTDOWN_WAITING,
    SHUTDOWN_STEP,
    SHUTDOWN_COMPLETED,
)

LOG_LINE: Final = Group("llmops.log_line", "The fields of log records that are no events")
REQUEST: Final = Group(
    "llmops.request",
    "The fields of each log record of a request, events included; its span events are without",
)
RESOURCE: Final = Group("llmops.resource", "The process, and the pod where there is one")
GROUPS: Final = (LOG_LINE, REQUEST, RESOURCE)
