"""What this service reads of a request under ``/v1``: as little as it needs, and nothing is changed by it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from service.errors import ValidationError

MAX_DEPTH = 100
"""Deepest nesting of a request; the schema of a tool needs a few dozen."""

MODEL_NAME = r"^[!-~]([ -~]{0,198}[!-~])?$"
"""A model's name: it stands in span names, log lines and messages, so nothing odd is in it."""

_MODEL_NAME = re.compile(MODEL_NAME)


@dataclass(frozen=True)
class JsonBody:
    """A request's body: as it was written, and parsed."""

    content: bytes
    fields: Mapping[str, Any]

    @property
    def model(self) -> str | None:
        """The model that is asked for; None when none is named."""
        model = self.fields.get("model")
        return None if model is None else str(model)

    @property
    def stream(self) -> bool:
        """Whether the answer is wanted in pieces."""
        return self.fields.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the count of its tokens."""
        options = self.fields.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


def read_chat(content: bytes) -> JsonBody:
    """A chat completion's request; ``ValidationError`` where it cannot be one."""
    body = _read(content)
    messages = body.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "must be a list with at least one message")
    if not all(isinstance(message, dict) for message in messages):
        _refuse("messages", "must be a list of objects")
    if not isinstance(body.fields.get("stream"), bool | None):
        _refuse("stream", "must be true or false")
    options = body.fields.get("stream_options")
    if not isinstance(options, dict | None):
        _refuse("stream_options", "must be an object")
    if options is not None and not isinstance(options.get("include_usage"), bool | None):
        _refuse("stream_options.include_usage", "must be true or false")
    return body


def read_embeddings(content: bytes) -> JsonBody:
    """An embeddings request; ``ValidationError`` where it cannot be one."""
    body = _read(content)
    if body.model is None:
        _refuse("model", "must name a model")
    given = body.fields.get("input")
    if not isinstance(given, (str, list)) or not given:
        _refuse("input", "must be a text, or a list that is not empty")
    return body


def _read(content: bytes) -> JsonBody:
    try:
        fields = json.loads(content.decode(), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        _refuse("body", "cannot be read as JSON", kind="json_invalid")
    if not isinstance(fields, dict):
        _refuse("body", "must be a JSON object")
    if _too_deep(content, fields):
        _refuse("body", f"must not be nested more than {MAX_DEPTH} deep")
    model = fields.get("model")
    if model is not None and not (isinstance(model, str) and _MODEL_NAME.fullmatch(model)):
        _refuse("model", "must be the name of a model: up to 200 printable ASCII characters")
    return JsonBody(content, fields)


def _no_number(text: str) -> NoReturn:
    """Refuse what Python's parser takes and no JSON can say."""
    raise ValueError(text)


def _finite(text: str) -> float:
    """A number that can be written again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _too_deep(content: bytes, value: object) -> bool:
    if content.count(b"[") + content.count(b"{") <= MAX_DEPTH:
        return False
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _refuse(field: str, problem: str, kind: str = "value_error") -> NoReturn:
    message = f"The request is not valid: {field}: {problem}"
    raise ValidationError(message, details=[{"field": field, "message": problem, "type": kind}])
