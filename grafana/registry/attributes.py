"""The attributes, each with what it means and the places where it may stand.

An attribute of a metric needs no place here: `service/telemetry/names.py` and `grafana/standard.py` say which
metrics it stands on. Short names without a namespace are those of metrics and log lines, which are a part of
this service's interface.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai

from grafana.registry import signals as at
from grafana.registry.signals import Place
from grafana.standard import ATTEMPT_ERRORS, REQUEST_ERRORS, STANDARD
from service.errors import Cause, Fault
from service.telemetry import names

Type = Literal["string", "int", "double", "boolean", "string[]"]
Level = Literal["required", "recommended"]


@dataclass(frozen=True)
class Attribute:
    """An attribute.

    Args:
        key: Its name.
        type: The type of its values.
        brief: What it says, for one of ours; the conventions say it of theirs.
        examples: Some values; an attribute with ``values`` needs none.
        values: All values that it may have, where these are known.
        required: Where it always stands.
        recommended: Where it stands when there is something to say.
    """

    key: str
    type: Type
    brief: str = ""
    examples: tuple[str | int | float | tuple[str, ...], ...] = ()
    values: tuple[str, ...] = ()
    required: tuple[Place, ...] = ()
    recommended: tuple[Place, ...] = ()

    def level_at(self, place: Place) -> Level | None:
        """How much it is needed at a place; None where it may not stand."""
        if place in self.required:
            return "required"
        return "recommended" if place in self.recommended else None


def _values_of(key: str) -> tuple[str, ...]:
    """The values that an attribute has on any metric of ours, in their order."""
    found: dict[str, None] = {}
    for metric in names.METRICS:
        values = metric.attributes.get(key, ())
        if not isinstance(values, str):
            found |= dict.fromkeys(values)
    return tuple(found)


RETRIES: Final = (at.RETRY_SCHEDULED, at.RETRY_SUCCEEDED, at.RETRY_EXHAUSTED)
BREAKER: Final = (at.BREAKER_STATE_CHANGED, at.BREAKER_REJECTED)
BUDGETS: Final = (at.BUDGET_NEAR_LIMIT, at.BUDGET_EXCEEDED)
STORE: Final = (at.STORE_FAILED, at.STORE_RECOVERED)
ISSUER: Final = (at.ISSUER_FAILED, at.ISSUER_RECOVERED)

OWN: Final = (
    # Of spans.
    Attribute(
        names.ATTR_INCIDENT_ID,
        "string",
        "The request's own id, also where several requests share a trace",
        ("inc_00f067aa0ba902b7",),
        required=(at.SERVER,),
    ),
    Attribute(
        names.ATTR_CLIENT_REQUEST_ID,
        "string",
        "The id that the caller gave the request",
        ("order-17",),
        recommended=(at.SERVER, at.REQUEST),
    ),
    Attribute(
        names.ATTR_TEAM,
        "string",
        "The team of the caller",
        ("red",),
        recommended=(at.SERVER, at.LOG_LINE),
    ),
    Attribute(
        names.ATTR_KEY_ID,
        "string",
        "The id of the API key, which is no secret",
        ("SJ3WsvmX49pc",),
        recommended=(at.SERVER, at.LOG_LINE),
    ),
    Attribute(
        names.ATTR_LLM_DEADLINE, "double", "Seconds that the call has", (30.0,), required=(at.LLM_CALL,)
    ),
    Attribute(
        names.ATTR_LLM_DEADLINE_LEFT,
        "double",
        "Seconds that the call had left when it ended",
        (28.214,),
        required=(at.LLM_CALL,),
    ),
    Attribute(names.ATTR_LLM_ATTEMPTS, "int", "Attempts that were made", (1, 3), required=(at.LLM_CALL,)),
    Attribute(
        names.ATTR_LLM_OUTCOME,
        "string",
        "What came of the call",
        values=tuple(names.LLM_CALLS.attributes["outcome"]),
        required=(at.LLM_CALL,),
    ),
    Attribute(
        names.ATTR_LLM_COST,
        "double",
        "Cost of the attempt in US dollars, as reported by LiteLLM",
        (0.00042,),
        recommended=(at.ATTEMPT,),
    ),
    Attribute(
        names.ATTR_LLM_ESTIMATED,
        "boolean",
        "The tokens of the answer are estimated, as the stream ended early",
        recommended=(at.ATTEMPT,),
    ),
    Attribute(
        names.ATTR_RETRY_OUTCOME,
        "string",
        "Why there was no further attempt",
        values=tuple(names.RETRY_ATTEMPTS.attributes["outcome"]),
        recommended=(at.LLM_CALL,),
    ),
    Attribute(
        names.ATTR_UPSTREAM_CAUSE,
        "string",
        "Why an attempt failed below HTTP",
        values=tuple(cause.value for cause in Cause),
        recommended=(at.ATTEMPT, at.LOG_LINE),
    ),
    Attribute(
        names.ATTR_UPSTREAM_STATUS,
        "int",
        "The HTTP status of the upstream's answer to a failed attempt",
        (503,),
        recommended=(at.ATTEMPT, at.LOG_LINE),
    ),
    Attribute(
        names.ATTR_UPSTREAM_CODE,
        "string",
        "OpenAI's code for what the upstream said; other for one that OpenAI does not have",
        ("context_length_exceeded", "other"),
        recommended=(at.ATTEMPT, at.LOG_LINE),
    ),
    Attribute(
        names.ATTR_CACHE_KIND,
        "string",
        "Which look-up the cache made last",
        values=names.CACHE_KINDS,
        required=(at.CACHE_LOOKUP,),
    ),
    Attribute(
        names.ATTR_CACHE_RESULT,
        "string",
        "What the cache had",
        values=tuple(names.CACHE_LOOKUPS.attributes["result"]),
        required=(at.CACHE_LOOKUP, at.LLM_CALL),
    ),
    Attribute(
        names.ATTR_CACHE_SIMILARITY,
        "double",
        "Similarity of the nearest cached question",
        (0.9412,),
        recommended=(at.CACHE_LOOKUP,),
    ),
    Attribute(
        names.ATTR_CACHE_AGE,
        "double",
        "Age of the cached answer in seconds",
        (12.5,),
        recommended=(at.CACHE_LOOKUP,),
    ),
    Attribute(
        names.ATTR_CACHE_SHARED,
        "boolean",
        "The answer is that of a call that was under way",
        recommended=(at.CACHE_LOOKUP,),
    ),
    Attribute(
        names.ATTR_CACHE_ENTRIES,
        "int",
        "Entries that were written or removed",
        (7,),
        required=(at.CACHE_WRITE,),
        recommended=(at.CACHE_SWEEP,),
    ),
    Attribute(
        names.ATTR_CACHE_SAVED_TOKENS,
        "int",
        "Tokens of the answer that came from the cache",
        (30,),
        recommended=(at.LLM_CALL,),
    ),
    Attribute(
        names.ATTR_CACHE_SAVED_COST,
        "double",
        "Original cost of the answer that came from the cache, in US dollars",
        (0.00042,),
        recommended=(at.LLM_CALL,),
    ),
    Attribute(
        names.ATTR_RECORDS,
        "int",
        "Records that were sent together",
        (15,),
        required=(at.MLFLOW_RECORD, at.SPOOL_REPLAY),
    ),
    # Of metrics, events and log lines.
    Attribute(
        "model",
        "string",
        "The model",
        ("demo", "other"),
        recommended=(*BREAKER, at.BUDGET_UNPRICED, at.LOG_LINE),
    ),
    Attribute(
        "outcome", "string", "What came of it", values=_values_of("outcome"), recommended=(at.LOG_LINE,)
    ),
    Attribute(
        "operation",
        "string",
        "What was done",
        ("chat", "upsert"),
        required=(*RETRIES, at.STORE_FAILED),
        recommended=(at.CACHE_ERROR,),
    ),
    Attribute("breaker", "string", "The circuit breaker", values=names.BREAKERS, required=BREAKER),
    Attribute("state", "string", "A state of a circuit breaker", values=_values_of("state")),
    Attribute(
        "from",
        "string",
        "What it was before",
        ("closed",),
        required=(at.BREAKER_STATE_CHANGED,),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        "to",
        "string",
        "What it is now",
        ("open",),
        required=(at.BREAKER_STATE_CHANGED,),
        recommended=(at.LOG_LINE,),
    ),
    Attribute("kind", "string", "The kind of look-up", values=_values_of("kind")),
    Attribute("result", "string", "What the cache had", values=_values_of("result")),
    Attribute("method", "string", "How somebody said who they are", values=_values_of("method")),
    Attribute(
        "scope",
        "string",
        "Whose budget it is",
        values=_values_of("scope"),
        required=(*BUDGETS, at.BUDGET_UNPRICED),
    ),
    Attribute("topic", "string", "What a message between replicas is about", values=_values_of("topic")),
    Attribute(
        "reason",
        "string",
        "Why, in a few words",
        ("exhausted", "status_500"),
        required=(
            *(at.RETRY_EXHAUSTED, at.CACHE_ERROR, at.STORE_FAILED, at.ISSUER_FAILED),
            *(at.RECORDER_SPOOLED, at.FALLBACK_STARTED),
        ),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        "dependency",
        "string",
        "The dependency; oidc_<host> for each of several issuers",
        ("qdrant", "litellm"),
        required=(at.HEALTH_CHECK, at.HEALTH_CHANGED),
    ),
    Attribute(
        "attempt",
        "int",
        "The number of the attempt",
        (1,),
        required=(at.RETRY_SCHEDULED,),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        "attempts",
        "int",
        "Attempts that were made",
        (3,),
        required=(at.RETRY_SUCCEEDED, at.RETRY_EXHAUSTED),
        recommended=(at.LOG_LINE,),
    ),
    Attribute("delay_s", "double", "Seconds until the next attempt", (1.07,), required=(at.RETRY_SCHEDULED,)),
    Attribute(
        "remaining_s",
        "double",
        "Seconds that the call has left",
        (28.2,),
        required=(at.RETRY_SCHEDULED, at.RETRY_EXHAUSTED),
    ),
    Attribute(
        "failures",
        "int",
        "Failures in a row, or since it failed first",
        (5,),
        required=(at.BREAKER_STATE_CHANGED, at.CACHE_ERROR, at.STORE_RECOVERED, at.ISSUER_RECOVERED),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        "retry_after_s",
        "double",
        "Seconds until the breaker lets a call try",
        (12.4,),
        required=(at.BREAKER_REJECTED,),
    ),
    Attribute("actor", "string", "Who made the change", ("admin",), required=(at.AUDIT,)),
    Attribute(
        "action",
        "string",
        "What was changed",
        values=("key_created", "key_rotated", "key_revoked", "user_set", "team_set"),
        required=(at.AUDIT,),
    ),
    Attribute(
        "target", "string", "The key's id, or the user's or team's name", ("red",), required=(at.AUDIT,)
    ),
    Attribute("owner", "string", "Whose key it is", ("app-1",), recommended=(at.AUDIT,)),
    Attribute("team", "string", "The team of a user or a key", ("red",), recommended=(at.AUDIT,)),
    Attribute(
        "limits", "string", "The new limits, as JSON", ('{"models": ["demo"]}',), recommended=(at.AUDIT,)
    ),
    Attribute(
        "subject",
        "string",
        "The key's id, the user or the team",
        ("red",),
        required=(*BUDGETS, at.BUDGET_UNPRICED),
    ),
    Attribute("spent", "double", "How much is spent, in the budget's unit", (0.81,), required=BUDGETS),
    Attribute("budget", "double", "The budget", (1.0,), required=BUDGETS),
    Attribute("unit", "string", "The budget's unit", values=("usd", "tokens"), required=BUDGETS),
    Attribute(
        "period", "string", "The day or month of the budget", ("2026-11-28", "2026-11"), required=BUDGETS
    ),
    Attribute("writes", "boolean", "Whether writes are meant, or reads", required=STORE),
    Attribute("issuer", "string", "The issuer's URL", ("https://login.example.org",), required=ISSUER),
    Attribute(
        "records",
        "int",
        "Records",
        (12,),
        required=(at.RECORDER_SPOOLED, at.RECORDER_REPLAYED),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        "in_flight",
        "int",
        "Requests in flight",
        (3,),
        required=(at.SHUTDOWN_STARTED, at.SHUTDOWN_WAITING),
        recommended=(at.SHUTDOWN_STEP,),
    ),
    Attribute(
        "duration_s",
        "double",
        "Seconds that it took",
        (0.482,),
        required=(at.SHUTDOWN_COMPLETED,),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        "error",
        "string",
        "The name of the error that the caller was told, or what a check met",
        ("UpstreamTimeoutError",),
        recommended=(at.HEALTH_CHANGED, at.LOG_LINE),
    ),
    Attribute(
        "record_id",
        "string",
        "The trace id of the call's record in MLflow",
        ("4bf92f3577b34da6a3ce929d0e0e4736",),
        recommended=(at.LOG_LINE,),
    ),
    Attribute("prompt_tokens", "int", "Tokens of the input", (10,), recommended=(at.LOG_LINE,)),
    Attribute("completion_tokens", "int", "Tokens of the answer", (20,), recommended=(at.LOG_LINE,)),
    Attribute("total_tokens", "int", "Tokens of both", (30,), recommended=(at.LOG_LINE,)),
    Attribute(
        "cost", "double", "Cost in US dollars, as reported by LiteLLM", (0.00042,), recommended=(at.LOG_LINE,)
    ),
    Attribute(
        "saved_cost", "double", "Original cost of a cached answer", (0.00042,), recommended=(at.LOG_LINE,)
    ),
    Attribute("estimated", "boolean", "The tokens of the answer are estimated", recommended=(at.LOG_LINE,)),
    Attribute(
        "cache", "string", "What the cache had", values=_values_of("result"), recommended=(at.LOG_LINE,)
    ),
    Attribute("streamed", "boolean", "The answer is a stream", recommended=(at.LOG_LINE,)),
    Attribute(
        "first_chunk_s", "double", "Seconds until the first piece", (0.31,), recommended=(at.LOG_LINE,)
    ),
    Attribute(
        "step", "string", "A step of the stop", ("Finalizing MLflow run...",), recommended=(at.LOG_LINE,)
    ),
    Attribute(
        "place",
        "string",
        "Where in the upstream's answer something is wrong",
        ("usage",),
        recommended=(at.LOG_LINE,),
    ),
    Attribute("problem", "string", "What is wrong with it", ("negative",), recommended=(at.LOG_LINE,)),
    Attribute(
        "request_id", "string", "The trace id", ("4bf92f3577b34da6a3ce929d0e0e4736",), required=(at.REQUEST,)
    ),
    Attribute(
        "incident_id", "string", "The request's own id", ("inc_00f067aa0ba902b7",), required=(at.REQUEST,)
    ),
    Attribute("user", "string", "Who is calling", ("alice",), recommended=(at.REQUEST, at.LOG_LINE)),
    # Of lines about failed requests, which say what the body says.
    Attribute(
        names.ATTR_ERROR_MESSAGE,
        "string",
        "The message of the error's body, without what the caller has written",
        ("The request body is not valid.",),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        names.ATTR_ERROR_FAULT,
        "string",
        "Who can do something about the error",
        values=tuple(fault.value for fault in Fault),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        names.ATTR_ERROR_RETRY,
        "boolean",
        "Whether the caller was told to try again",
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        names.ATTR_ERROR_RETRY_AFTER,
        "int",
        "After how many seconds the caller was told to try again",
        (5,),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        names.ATTR_ERROR_CODE,
        "string",
        "OpenAI's code for the error, as the body has it",
        ("context_length_exceeded", "rate_limit_exceeded"),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        names.ATTR_ERROR_PARAM,
        "string",
        "The field at fault, as the body has it",
        ("messages",),
        recommended=(at.LOG_LINE,),
    ),
    Attribute(
        names.ATTR_ERROR_FIELDS,
        "string[]",
        "Each field at fault and the rule that it breaks, without its value",
        (("body.prompt: string_type",),),
        recommended=(at.LOG_LINE,),
    ),
    # Of the GenAI conventions, and not so in the version that the registry depends on.
    Attribute(
        gen_ai.GEN_AI_REQUEST_TOP_K,
        "int",
        "From how many of the likeliest tokens the model is to choose",
        (40,),
        recommended=(at.ATTEMPT,),
    ),
    Attribute(
        "gen_ai.request.reasoning.level",
        "string",
        "How much the model is to reason",
        ("low", "high"),
        recommended=(at.ATTEMPT,),
    ),
    Attribute(
        "gen_ai.request.previous_response.id",
        "string",
        "The response that this one continues",
        ("resp_1",),
        recommended=(at.ATTEMPT,),
    ),
    Attribute(
        "gen_ai.usage.cache_write.input_tokens",
        "int",
        "Tokens of the input that the provider wrote to its cache",
        (2,),
        recommended=(at.ATTEMPT,),
    ),
)


def _standard(
    type_: Type,
    *keys: str,
    required: tuple[Place, ...] = (),
    recommended: tuple[Place, ...] = (),
    values: tuple[str, ...] = (),
) -> tuple[Attribute, ...]:
    """Attributes of the conventions that stand at the same places."""
    return tuple(
        Attribute(key, type_, values=values, required=required, recommended=recommended) for key in keys
    )


RENAMED: Final = {"enduser.role": "user.roles"}
"""Deprecated attributes, and those that are emitted beside them until nobody searches by the old name."""

UPSTREAM: Final = (
    *_standard(
        "string", "http.request.method", required=(at.SERVER, at.UPSTREAM_REQUEST), recommended=(at.LOG_LINE,)
    ),
    *_standard("string", "http.route", recommended=(at.SERVER, at.LOG_LINE)),
    *_standard("int", "http.response.status_code", recommended=(at.SERVER, at.UPSTREAM_REQUEST, at.LOG_LINE)),
    *_standard("string", "url.scheme", "url.path", required=(at.SERVER,)),
    *_standard("string", "url.query", "user_agent.original", "client.address", recommended=(at.SERVER,)),
    *_standard("int", "client.port", recommended=(at.SERVER,)),
    *_standard("string", "network.protocol.version", recommended=(at.SERVER, at.UPSTREAM_REQUEST)),
    *_standard("string", "network.peer.address", recommended=(at.UPSTREAM_REQUEST,)),
    *_standard("int", "network.peer.port", recommended=(at.UPSTREAM_REQUEST,)),
    *_standard("string", "url.full", required=(at.UPSTREAM_REQUEST,)),
    *_standard(
        "string",
        "server.address",
        required=(at.UPSTREAM_REQUEST,),
        recommended=(at.SERVER, at.ATTEMPT, at.CACHE_STORE),
    ),
    *_standard(
        "int",
        "server.port",
        required=(at.UPSTREAM_REQUEST,),
        recommended=(at.SERVER, at.ATTEMPT, at.CACHE_STORE),
    ),
    *_standard("string", "enduser.id", recommended=(at.SERVER, at.LOG_LINE)),
    *_standard("string[]", "user.roles", recommended=(at.SERVER,)),
    *_standard("string", *RENAMED, recommended=(at.SERVER,)),
    *_standard(
        "string", "db.system.name", "db.operation.name", "db.collection.name", required=(at.CACHE_STORE,)
    ),
    *_standard(
        "string",
        "error.type",
        required=(at.RETRY_SCHEDULED, at.RETRY_EXHAUSTED),
        recommended=(
            *(at.SERVER, at.LLM_CALL, at.ATTEMPT, at.UPSTREAM_REQUEST, at.CACHE_STORE),
            *(at.CACHE_WRITE, at.CACHE_SWEEP, at.HEALTH_CHECK),
        ),
    ),
    *_standard(
        "string",
        gen_ai.GEN_AI_OPERATION_NAME,
        gen_ai.GEN_AI_PROVIDER_NAME,
        gen_ai.GEN_AI_REQUEST_MODEL,
        required=(at.ATTEMPT,),
    ),
    *_standard(
        "string",
        *(gen_ai.GEN_AI_RESPONSE_MODEL, gen_ai.GEN_AI_RESPONSE_ID, gen_ai.GEN_AI_CONVERSATION_ID),
        recommended=(at.ATTEMPT,),
    ),
    *_standard(
        "int",
        *(gen_ai.GEN_AI_REQUEST_MAX_TOKENS, gen_ai.GEN_AI_REQUEST_SEED, gen_ai.GEN_AI_REQUEST_CHOICE_COUNT),
        *(gen_ai.GEN_AI_USAGE_INPUT_TOKENS, gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS),
        *(gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS, gen_ai.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS),
        recommended=(at.ATTEMPT,),
    ),
    *_standard(
        "double",
        *(gen_ai.GEN_AI_REQUEST_TEMPERATURE, gen_ai.GEN_AI_REQUEST_TOP_P),
        *(gen_ai.GEN_AI_REQUEST_FREQUENCY_PENALTY, gen_ai.GEN_AI_REQUEST_PRESENCE_PENALTY),
        gen_ai.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK,
        recommended=(at.ATTEMPT,),
    ),
    *_standard("boolean", gen_ai.GEN_AI_REQUEST_STREAM, recommended=(at.ATTEMPT,)),
    *_standard(
        "string[]",
        *(gen_ai.GEN_AI_REQUEST_STOP_SEQUENCES, gen_ai.GEN_AI_RESPONSE_FINISH_REASONS),
        recommended=(at.ATTEMPT,),
    ),
    *_standard("string", gen_ai.GEN_AI_TOKEN_TYPE),
    *_standard("string", "otel.component.name", "otel.component.type"),
    *_standard("string", "otel.span.parent.origin", "otel.span.sampling_result"),
    *_standard(
        "string", "exception.type", "exception.message", "exception.stacktrace", recommended=(at.LOG_LINE,)
    ),
    *_standard(
        "string",
        *("telemetry.sdk.language", "telemetry.sdk.name", "telemetry.sdk.version"),
        *("service.name", "service.namespace", "service.version", "service.instance.id"),
        "deployment.environment.name",
        required=(at.RESOURCE,),
    ),
    *_standard(
        "string",
        *(
            "process.runtime.name",
            "process.runtime.version",
            "process.executable.name",
            "process.executable.path",
        ),
        *("process.command", "process.owner"),
        *("k8s.cluster.name", "k8s.namespace.name", "k8s.node.name", "k8s.pod.name", "k8s.pod.uid"),
        recommended=(at.RESOURCE,),
    ),
    *_standard("int", "process.pid", "process.parent_pid", recommended=(at.RESOURCE,)),
)

ATTRIBUTES: Final = {attribute.key: attribute for attribute in (*OWN, *UPSTREAM)}

ERRORS_AT: Final[dict[Place, tuple[str, ...]]] = {
    at.SERVER: REQUEST_ERRORS,
    at.LLM_CALL: ATTEMPT_ERRORS,
    at.ATTEMPT: ATTEMPT_ERRORS,
    at.RETRY_SCHEDULED: names.ERROR_NAMES,
    at.RETRY_EXHAUSTED: names.ERROR_NAMES,
}
"""The values of ``error.type`` where they are this service's names of errors."""

METRICS: Final = (*names.METRICS, *STANDARD)


def at_place(place: Place) -> Iterable[tuple[Attribute, Level]]:
    """The attributes that may stand at a place."""
    for attribute in ATTRIBUTES.values():
        level = attribute.level_at(place)
        if level is not None:
            yield attribute, level


def allowed_at(attribute: Attribute, place: Place) -> tuple[str, ...]:
    """All values that an attribute may have at a place; none where these are not known."""
    if attribute.key == "error.type":
        return ERRORS_AT.get(place, ())
    return attribute.values
