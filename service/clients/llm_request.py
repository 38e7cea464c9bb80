"""What is asked of a model: the bytes that are sent, and the little that this service reads of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self

Operation = Literal["chat", "embeddings"]

PATHS: Final[Mapping[Operation, str]] = {"chat": "/chat/completions", "embeddings": "/embeddings"}


@dataclass(frozen=True)
class LlmRequest:
    """One request in OpenAI's shape.

    Args:
        operation: The GenAI operation.
        model: The model that is asked.
        body: The request, parsed; for telemetry, and to know the caller's words again in an error.
        content: The bytes that are sent.
        headers: More header fields for the upstream.
        verbatim: Whether the caller gets the upstream's bytes, which may hold what is not known here.
    """

    operation: Operation
    model: str
    body: Mapping[str, Any]
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    verbatim: bool = False

    @property
    def path(self) -> str:
        """Where it goes, below ``/v1``."""
        return PATHS[self.operation]

    def streamed(self) -> Self:
        """The same, asking for a stream that ends with the count of its tokens."""
        options = self.body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") is True:
            asked: dict[str, Any] = {}
        else:
            asked = {"stream_options": {**(options or {}), "include_usage": True}}
        if self.body.get("stream") is not True:
            asked["stream"] = True
        return replace(self, body={**self.body, **asked}, content=with_fields(self.body, self.content, asked))


def with_fields(body: Mapping[str, Any], content: bytes, fields: Mapping[str, Any]) -> bytes:
    """The same object with these fields too; all that was there stays as it was written.

    Args:
        body: The object, parsed.
        content: The object as JSON; not an empty one.
        fields: What is put in. Only where one of them is there already is the whole object written anew.
    """
    if not fields:
        return content
    if fields.keys() & body.keys():
        return to_json({**body, **fields})
    return b"{" + to_json(fields)[1:-1] + b"," + content.lstrip().removeprefix(b"{")


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON without spaces, in ASCII: half a surrogate pair, too, comes out as it came in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
