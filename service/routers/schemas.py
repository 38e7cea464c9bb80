"""The bodies of requests and answers, and how OpenAPI documents them.

Bodies under ``/v1`` pass through and are not modelled field by field; OpenAI's own reference describes them.
Only the fields that this service reads are documented here.
"""

import json
from datetime import date, datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
)

from service.errors import InternalError, MethodNotAllowedError, ServiceError
from service.identity.principal import MAX_NAME_CHARS, Budget, Limits, checked_name, checked_rate
from service.services.call_report import CallOutcome
from service.upstream.messages import Completion, LlmRequest, to_json

MODEL_NAME = r"^[!-+\--~]([ -+\--~]{0,198}[!-+\--~])?$"
"""A model's name: it stands in span names, log lines and messages, so nothing odd is in it. LiteLLM reads a
comma as a list of models, each of which it calls."""


def _encodable(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what Python's parser takes and no JSON can say: NaN, infinity, half a surrogate pair."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        raise ValueError("must be plain JSON") from None
    return value


def check_response_format(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse a format without its parts, which LiteLLM answers with 500 for some providers."""
    kind = value.get("type")
    if not isinstance(kind, str):
        raise ValueError("must have a type")  # noqa: TRY004 - pydantic takes no TypeError
    if kind == "json_schema" and not isinstance(value.get(kind), dict):
        raise ValueError("must have a json_schema")
    return value


def _plain_text(value: SecretStr) -> SecretStr:
    """Refuse half a surrogate pair, which pydantic does not look for in a secret."""
    try:
        value.get_secret_value().encode()
    except UnicodeEncodeError:
        raise ValueError("must be plain text") from None
    return value


def _whole(value: object) -> object:
    """Take 1.0 for the integer that it is in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+ -]*$", max_length=200)]


class Inbound(BaseModel):
    """A request's body; a field that we do not know is an error, and no value is guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True)


class LoginRequest(Inbound):
    """Who signs in."""

    username: str = Field(min_length=1, max_length=256, examples=["user"])
    password: Annotated[SecretStr, AfterValidator(_plain_text)] = Field(min_length=1, max_length=1_024)


class UserBody(BaseModel):
    """A user and their role."""

    username: str
    role: Literal["admin", "user"]


class LoginResponse(BaseModel):
    """A token, good for ``expires_in`` seconds."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - a kind of token, not one
    expires_in: int
    user: UserBody


Name = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS), AfterValidator(checked_name)]
RateText = Annotated[str, AfterValidator(checked_rate)]


class BudgetBody(Inbound):
    """What may be spent in a period."""

    amount: float = Field(ge=0, le=1e12, allow_inf_nan=False, description="US dollars, or tokens.")
    unit: Literal["usd", "tokens"]
    period: Literal["day", "month"]


class LimitsBody(Inbound):
    """What a key, a user or a team may do; null where there is no limit."""

    models: Annotated[list[ModelName], Field(min_length=1, max_length=200)] | None = None
    rate: RateText | None = Field(None, examples=["60/minute"])
    budget: BudgetBody | None = None


class TeamSettings(LimitsBody):
    """What a team may do."""


class UserSettings(LimitsBody):
    """What a user may do, and to which team their calls belong."""

    team: Name | None = None
    disabled: bool = Field(default=False, description="Refuses all of the user's tokens and keys.")


def limits_of(body: LimitsBody) -> Limits:
    """The limits that a body sets."""
    budget = body.budget
    return Limits(
        None if body.models is None else tuple(body.models),
        body.rate,
        None if budget is None else Budget(budget.amount, budget.unit, budget.period),
    )


def shown_limits(limits: Limits) -> dict[str, Any]:
    """Limits as a body shows them."""
    budget = limits.budget
    return {
        "models": None if limits.models is None else list(limits.models),
        "rate": limits.rate,
        "budget": None
        if budget is None
        else {"amount": budget.amount, "unit": budget.unit, "period": budget.period},
    }


class SpentBody(BaseModel):
    """What was spent of a budget, in its unit; null without a budget."""

    spent: float | None
    left: float | None
    renews_at: datetime | None


class TeamBody(SpentBody):
    """A team, its limits, and what it has spent."""

    name: str
    models: list[str] | None
    rate: str | None
    budget: BudgetBody | None


class TeamList(BaseModel):
    """A page of teams."""

    teams: list[TeamBody]


class UserState(TeamBody):
    """A user, their limits, and what they have spent; the role is null unless the user is built-in."""

    role: Literal["admin", "user"] | None
    team: str | None
    disabled: bool


class UserList(BaseModel):
    """A page of users."""

    users: list[UserState]


class RateLeft(BaseModel):
    """The rate limit that is nearest."""

    limit: str = Field(examples=["60/minute"])
    left: int
    renews_at: datetime = Field(description="When a call is available again.")


class BudgetLeft(BaseModel):
    """The budget that is nearest; amounts in its unit."""

    limit: float
    spent: float
    left: float
    unit: Literal["usd", "tokens"]
    period: Literal["day", "month"]
    renews_at: datetime


class MeBody(UserBody):
    """The caller and their limits; null where there is none."""

    team: str | None
    key: str | None = Field(description="The id of the API key that was sent.")
    models: list[str] | None = Field(description="The models that may be asked.")
    rate: RateLeft | None
    budget: BudgetLeft | None


class UsageCounts(BaseModel):
    """What was used; costs in US dollars."""

    calls: int
    cached: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    unpriced: int = Field(description="Calls that were answered without a price.")
    cost: float
    saved_cost: float


class UsageRowBody(UsageCounts):
    """What was used of one combination; of the first five, those that were asked for."""

    day: date | None = None
    model: str | None = None
    user: str | None = None
    team: str | None = None
    key: str | None = None


class UsageBody(BaseModel):
    """What was used in a time, both days included."""

    since: date = Field(alias="from")
    until: date = Field(alias="to")
    rows: list[UsageRowBody]
    total: UsageCounts


class NewKey(LimitsBody):
    """A key to be made."""

    name: Name = Field(examples=["my app"])
    owner: Name | None = None
    team: Name | None = None
    expires_at: Annotated[datetime, Field(strict=False)] | None = None


class Rotation(Inbound):
    """How a key is rotated."""

    overlap_s: int = Field(0, ge=0, le=2_592_000, description="Seconds for which the old secret works.")


class KeyBody(BaseModel):
    """A key without its secret; null where there is no limit of its own."""

    id: str
    name: str
    owner: str
    team: str | None
    models: list[str] | None
    rate: str | None
    budget: BudgetBody | None
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class NewKeyBody(KeyBody):
    """A key with its secret, which is shown once."""

    key: str


class KeyList(BaseModel):
    """A page of keys."""

    keys: list[KeyBody]


class GenerateRequest(Inbound):
    """A prompt and what the model is told beside it."""

    prompt: str = Field(min_length=1, examples=["What is a trace?"])
    model: ModelName | None = Field(None, description="One of GET /llm/models; the default model without it.")
    system_prompt: str | None = Field(None, min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000), BeforeValidator(_whole)] | None = None
    response_format: (
        Annotated[dict[str, Any], AfterValidator(_encodable), AfterValidator(check_response_format)] | None
    ) = Field(None, examples=[{"type": "json_object"}])
    stream: bool = Field(default=False, description="Whether the answer comes as server-sent events.")

    def as_request(self, default_model: str) -> LlmRequest:
        """The same as a chat completion in OpenAI's format, without the fields that were not given."""
        model = self.model or default_model
        messages = [{"role": "user", "content": self.prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        body: dict[str, Any] = {"messages": messages, "model": model}
        for name in ("temperature", "max_tokens", "response_format"):
            value = getattr(self, name)
            if value is not None:
                body[name] = value
        return LlmRequest("chat", model, body, to_json(body))


class DoneEvent(BaseModel):
    """What an answer came to; counts and cost (US dollars) are null where the upstream reported none."""

    model: str = Field(examples=["demo"])
    prompt_tokens: int | None = Field(examples=[9])
    completion_tokens: int | None = Field(examples=[12])
    total_tokens: int | None = Field(examples=[21])
    cost: float | None = Field(examples=[0.00033])
    cache: Literal["hit", "miss", "bypass"]
    cache_kind: Literal["exact", "semantic"] | None = Field(
        None, description="With a hit: what kind.", exclude_if=lambda kind: kind is None
    )
    request_id: str = Field(
        description="The trace id, equal to the header X-Request-ID.",
        examples=["4bf92f3577b34da6a3ce929d0e0e4736"],
    )

    @classmethod
    def from_call(cls, completion: Completion, outcome: CallOutcome, request_id: str, **more: str) -> Self:
        """The counts of a call that has ended; an estimated count is left out."""
        return cls(
            model=completion.model,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=None if completion.estimated else completion.completion_tokens,
            total_tokens=completion.total_tokens,
            cost=completion.cost,
            cache=outcome.cache,
            cache_kind=outcome.lookup.kind if outcome.cache == "hit" else None,
            request_id=request_id,
            **more,
        )


class GenerateResponse(DoneEvent):
    """The model's answer with its counts and cost."""

    response: str = Field(examples=["The path of one request."])


class ModelsResponse(BaseModel):
    """The models on offer."""

    models: list[str] = Field(examples=[["demo"]])
    default_model: str = Field(examples=["demo"])


class CacheStatsResponse(BaseModel):
    """How the cache is set and does; counts are this process's since its start, `entries` the store's."""

    enabled: bool
    semantic: bool
    scope: Literal["user", "shared"]
    ttl_s: int
    max_entries: int
    entries: int | None = Field(description="Null while the store does not answer.")
    hits: int
    misses: int
    ratio: float = Field(description="Hits as a share of the look-ups that could have been hits.")
    bypassed: int
    errors: int
    memory_entries: int
    memory_bytes: int
    waiting: int = Field(description="Answers that are not in the store yet.")
    dropped: int = Field(description="Answers that never got there.")


class CacheCleared(BaseModel):
    """What clearing the cache came to."""

    cleared: int = Field(description="Answers that were taken out of the store.")


class HealthResponse(BaseModel):
    """The process serves."""

    status: Literal["alive"] = "alive"


class DependencyHealth(BaseModel):
    """What the last check of a dependency found."""

    error: str | None
    latency_ms: float | None
    age_s: float | None
    required: bool


class DetailedHealth(BaseModel):
    """Whether this process is ready to serve, and why not."""

    status: Literal["healthy", "degraded", "draining"]
    checks: dict[str, bool]
    details: dict[str, DependencyHealth]


class FieldProblem(BaseModel):
    """What is wrong with one field."""

    field: str
    message: str
    type: str


class ErrorBody(BaseModel):
    """Every error's body."""

    error: str = Field(examples=["BadRequestError"])
    message: str = Field(examples=["Model 'invalid' not found"])
    incident_id: str = Field(examples=["inc_00f067aa0ba902b7"])
    request_id: str = Field(examples=["4bf92f3577b34da6a3ce929d0e0e4736"])
    timestamp: str = Field(examples=["2026-01-15T10:30:00.000Z"])
    details: list[FieldProblem] | None = Field(None, description="With ValidationError: each field at fault.")


def event_schema(*names: str) -> dict[str, Any]:
    """The shape of each event of a stream; its data is JSON, or the word that ends the stream.

    Args:
        names: The events' names, where this service knows all of them.
    """
    name = {"type": "string", **({"enum": list(names)} if names else {})}
    return {"type": "object", "required": ["data"], "properties": {"event": name, "data": {"type": "string"}}}


GENERATED: Final[dict[str, Any]] = {
    "description": "The model's answer; with `stream`, in pieces.",
    "content": {
        "text/event-stream": {
            "schema": event_schema("token", "done", "error"),
            "example": 'event: token\ndata: {"text": "The path"}\n\nevent: done\ndata: {"model": "demo", '
            '"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21, "cost": 0.00033, '
            '"cache": "miss", "request_id": "4bf92f3577b34da6a3ce929d0e0e4736"}\n\n',
        }
    },
}


def errors(*kinds: type[ServiceError], model: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI ``responses`` of a route with these errors, and with those that every route has."""
    documented: dict[int | str, dict[str, Any]] = {}
    everywhere: tuple[type[ServiceError], ...] = (MethodNotAllowedError, InternalError)
    for kind in kinds + everywhere:
        sentence = f"`{kind.__name__}`: {kind.default_message}"
        entry = documented.setdefault(kind.status, {"model": model, "description": ""})
        entry["description"] = " ".join(filter(None, (entry["description"], sentence)))
    return documented


REFERENCE = "https://platform.openai.com/docs/api-reference"
Schema = dict[str, Any]


class OpenAiError(BaseModel):
    """What went wrong, in OpenAI's fields and ours."""

    message: str = Field(examples=["Model 'invalid' not found"])
    type: str = Field(examples=["BadRequestError"], description="The error's name, as everywhere here.")
    param: str | None = Field(examples=["model"], description="The field at fault, where one is.")
    code: str | None = Field(examples=["model_not_found"], description="OpenAI's word for it, if any.")
    incident_id: str = Field(examples=["inc_00f067aa0ba902b7"])
    request_id: str = Field(examples=["4bf92f3577b34da6a3ce929d0e0e4736"])
    timestamp: str = Field(examples=["2026-01-15T10:30:00.000Z"])


class OpenAiErrorBody(BaseModel):
    """Every error's body under ``/v1``."""

    error: OpenAiError


def openai_errors(*kinds: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI ``responses`` of a route under ``/v1`` with these errors, and with those of every route."""
    return errors(*kinds, model=OpenAiErrorBody)


def _body(schema: Schema, example: Schema) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def _answer(description: str, schema: Schema, example: Schema) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


_ANY_OBJECT: Final[Schema] = {"type": "object", "additionalProperties": True}
_MODEL_NAME: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": 200, "pattern": MODEL_NAME}
_USAGE: Final[Schema] = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
_MODEL_ENTRY: Final[Schema] = {
    "type": "object",
    "required": ["id"],
    "properties": {"id": {"type": "string"}, "object": {"type": "string"}},
}
_MODEL_EXAMPLE: Final[Schema] = {"id": "demo", "object": "model", "created": 1700000000, "owned_by": "openai"}

CHAT_REQUEST: Final = _body(
    {
        "type": "object",
        "required": ["messages"],
        "description": f"OpenAI's request ({REFERENCE}/chat/create); other fields pass through.",
        "properties": {
            "model": {"anyOf": [_MODEL_NAME, {"type": "null"}]},
            "messages": {"type": "array", "minItems": 1, "items": _ANY_OBJECT},
            "stream": {"type": ["boolean", "null"]},
            "stream_options": {
                "type": ["object", "null"],
                "properties": {"include_usage": {"type": ["boolean", "null"]}},
            },
        },
    },
    {"model": "demo", "messages": [{"role": "user", "content": "What is a trace?"}]},
)
EMBEDDINGS_REQUEST: Final = _body(
    {
        "type": "object",
        "required": ["model", "input"],
        "description": f"OpenAI's request ({REFERENCE}/embeddings/create); other fields pass through.",
        "properties": {
            "model": _MODEL_NAME,
            "input": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}]},
        },
    },
    {"model": "text-embedding-3-small", "input": "What is a trace?"},
)
CHAT_ANSWER: Final = _answer(
    "The model's answer as the upstream gave it; with `stream`, in pieces.",
    {
        "type": "object",
        "required": ["choices"],
        "properties": {"choices": {"type": "array", "minItems": 1, "items": _ANY_OBJECT}},
    },
    {
        "id": "chatcmpl-123",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The path of one request."},
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
    },
)
CHAT_ANSWER["content"]["text/event-stream"] = {
    "schema": event_schema("message"),
    "example": 'data: {"choices":[{"index":0,"delta":{"content":"The"}}]}\n\ndata: [DONE]\n\n',
}
EMBEDDINGS_ANSWER: Final = _answer(
    "The vectors as the upstream gave them.",
    {"type": "object", "required": ["data"], "properties": {"data": {"type": "array"}}},
    {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.1, -0.2]}],
        "model": "text-embedding-3-small",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    },
)
MODELS: Final = _answer(
    "The list as the upstream gave it.",
    {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "array", "items": _MODEL_ENTRY}},
    },
    {"object": "list", "data": [_MODEL_EXAMPLE]},
)
MODEL: Final = _answer("The model.", _MODEL_ENTRY, _MODEL_EXAMPLE)


# ---- Operations of which this service reads little --------------------------------------------------------

ANTHROPIC_REFERENCE: Final = "https://docs.anthropic.com/en/api"


def _request(reference: str, properties: Schema, example: Schema, *required: str) -> dict[str, Any]:
    return _body(
        {
            "type": "object",
            **({"required": list(required)} if required else {}),
            "description": f"The request ({reference}); other fields pass through.",
            "properties": properties,
        },
        example,
    )


def _passed(description: str, field: str, example: Schema, stream: str | None = None) -> dict[str, Any]:
    answer = _answer(
        f"{description}, as the upstream gave it.", {"type": "object", "required": [field]}, example
    )
    if stream is not None:
        answer["content"]["text/event-stream"] = {"schema": event_schema(), "example": stream}
    return answer


_NULLABLE_MODEL: Final[Schema] = {"anyOf": [_MODEL_NAME, {"type": "null"}]}
_STREAM: Final[Schema] = {"type": ["boolean", "null"]}
_TEXT_OR_LIST: Final[Schema] = {"anyOf": [{"type": "string"}, {"type": "array"}]}
_MESSAGES: Final[Schema] = {"type": "array", "minItems": 1, "items": _ANY_OBJECT}

RESPONSES_REQUEST: Final = _request(
    f"{REFERENCE}/responses/create",
    {"model": _NULLABLE_MODEL, "input": _TEXT_OR_LIST, "stream": _STREAM},
    {"model": "demo", "input": "What is a trace?"},
)
RESPONSES_ANSWER: Final = _passed(
    "The response; with `stream`, typed events",
    "id",
    {"id": "resp_123", "object": "response", "status": "completed", "output": [], "model": "demo"},
    'event: response.completed\ndata: {"type":"response.completed","response":{"id":"resp_123"}}\n\n',
)
STORED_RESPONSE: Final = _passed(
    "The response",
    "id",
    {"id": "resp_123", "object": "response", "status": "completed", "output": [], "model": "demo"},
)
DELETED_RESPONSE: Final = _passed(
    "The confirmation", "deleted", {"id": "resp_123", "object": "response", "deleted": True}
)
INPUT_ITEMS: Final = _passed("The items", "data", {"object": "list", "data": [], "has_more": False})
COMPLETIONS_REQUEST: Final = _request(
    f"{REFERENCE}/completions/create",
    {"model": _NULLABLE_MODEL, "prompt": _TEXT_OR_LIST, "stream": _STREAM},
    {"model": "demo", "prompt": "A trace is"},
    "prompt",
)
COMPLETIONS_ANSWER: Final = _passed(
    "The completion; with `stream`, in pieces",
    "choices",
    {"id": "cmpl-123", "object": "text_completion", "choices": [{"index": 0, "text": " a path"}]},
    'data: {"choices":[{"index":0,"text":" a path"}]}\n\ndata: [DONE]\n\n',
)
MODERATIONS_REQUEST: Final = _request(
    f"{REFERENCE}/moderations/create",
    {"model": _NULLABLE_MODEL, "input": _TEXT_OR_LIST},
    {"input": "What is a trace?"},
    "input",
)
MODERATIONS_ANSWER: Final = _passed("The moderation", "results", {"id": "modr-1", "results": []})
IMAGES_REQUEST: Final = _request(
    f"{REFERENCE}/images/create",
    {"model": _MODEL_NAME, "prompt": {"type": "string"}},
    {"model": "gpt-image-1", "prompt": "A trace"},
    "model",
    "prompt",
)
IMAGES_ANSWER: Final = _passed("The images", "data", {"created": 1700000000, "data": [{"b64_json": ""}]})
RERANK_REQUEST: Final = _request(
    "https://docs.cohere.com/reference/rerank",
    {"model": _MODEL_NAME, "query": {"type": "string"}, "documents": {"type": "array"}},
    {"model": "rerank-v3.5", "query": "What is a trace?", "documents": ["A path.", "A cat."]},
    "model",
    "query",
    "documents",
)
RERANK_ANSWER: Final = _passed("The ranking", "results", {"results": [{"index": 0, "relevance_score": 0.9}]})
MESSAGES_REQUEST: Final = _request(
    f"{ANTHROPIC_REFERENCE}/messages",
    {
        "model": _NULLABLE_MODEL,
        "messages": _MESSAGES,
        "max_tokens": {"type": "integer"},
        "stream": _STREAM,
    },
    {"model": "demo", "max_tokens": 100, "messages": [{"role": "user", "content": "What is a trace?"}]},
    "messages",
    "max_tokens",
)
MESSAGES_ANSWER: Final = _passed(
    "The message; with `stream`, as events",
    "content",
    {"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "text", "text": "A path."}]},
    'event: message_stop\ndata: {"type":"message_stop"}\n\n',
)
TOKENS_REQUEST: Final = _request(
    f"{ANTHROPIC_REFERENCE}/messages-count-tokens",
    {"model": _NULLABLE_MODEL, "messages": _MESSAGES},
    {"model": "demo", "messages": [{"role": "user", "content": "What is a trace?"}]},
    "messages",
)
TOKENS_ANSWER: Final = _passed("The number of tokens", "input_tokens", {"input_tokens": 14})


SPEECH_REQUEST: Final = _request(
    f"{REFERENCE}/audio/createSpeech",
    {"model": _MODEL_NAME, "input": {"type": "string"}},
    {"model": "gpt-4o-mini-tts", "input": "A trace is a path.", "voice": "alloy"},
    "model",
    "input",
)
SPEECH_ANSWER: Final[Schema] = {
    "description": "The recording as the upstream gave it; with `stream_format`, as events.",
    "content": {
        "audio/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "text/event-stream": {
            "schema": event_schema(),
            "example": 'data: {"type":"speech.audio.done"}\n\n',
        },
    },
}
TRANSCRIPTION_REQUEST: Final[Schema] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "model"],
                "description": f"The request ({REFERENCE}/audio/createTranscription); other fields pass.",
                "properties": {"file": {"type": "string", "format": "binary"}, "model": _MODEL_NAME},
            }
        }
    },
}
TRANSCRIPTION_ANSWER: Final = _passed("The text", "text", {"text": "A trace is a path."})
TRANSCRIPTION_ANSWER["content"] |= {
    "text/plain": {"schema": {"type": "string"}},
    "text/event-stream": {
        "schema": event_schema(),
        "example": 'data: {"type":"transcript.text.done","text":"A trace is a path."}\n\n',
    },
}


class AnthropicError(OpenAiError):
    """What went wrong, in Anthropic's fields and ours."""

    type: str = Field(examples=["invalid_request_error"], description="Anthropic's type of the error.")
    name: str = Field(examples=["BadRequestError"], description="The error's name, as everywhere here.")


class AnthropicErrorBody(BaseModel):
    """Every error's body under ``/v1/messages``."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str = Field(examples=["4bf92f3577b34da6a3ce929d0e0e4736"])


def anthropic_errors(*kinds: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI ``responses`` of a route of Anthropic's protocol with these errors."""
    return errors(*kinds, model=AnthropicErrorBody)
