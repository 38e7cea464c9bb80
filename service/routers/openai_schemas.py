"""How the routes under ``/v1`` are documented: what this service itself needs, and OpenAI's shape around it.

The bodies are not modelled field by field: they pass through, and OpenAI's own reference describes them.
"""

from typing import Any, Final

from pydantic import BaseModel, Field

from service.errors import ServiceError
from service.routers.openai_body import MODEL_NAME
from service.routers.schemas import errors, event_schema

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
