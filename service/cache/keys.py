"""Cache keys: which requests are equal, and whose answers a user gets."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

SCHEMA = 3
"""Part of every key, so that entries which another version of this code wrote are not found."""

IGNORED: Final = frozenset({"stream", "stream_options", "model"})
"""Fields that do not change the answer; the model is in the key under its resolved name. All other fields are
in the key, including unknown ones: a field too many costs a hit, a field too few returns a wrong answer."""

DEFAULTS: Final[Mapping[str, Any]] = {
    "temperature": 1,
    "top_p": 1,
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
}
"""The values of absent parameters in OpenAI's reference
(https://platform.openai.com/docs/api-reference/chat/create), where null means absent, too."""

LARGE_REQUEST_BYTES: Final = 1_048_576
"""Requests with larger bodies are equal only where their bytes are, and are not looked up by meaning."""

MAX_TENANTS: Final = 4_096
"""How many users' hashes are kept."""

MAX_EXACT = 2**53
"""Up to here, a float without a fraction equals exactly one integer."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """The key of a stored answer.

    Args:
        digest: 64 hex digits; equal requests of one tenant have the same digest.
        tenant: 64 hex digits: whose answer it is. A hash, so that no name can be mistaken for a filter.
    """

    digest: str
    tenant: str

    @property
    def point_id(self) -> str:
        """The id of the entry's point; made from the digest, so that two writers make one entry."""
        return str(uuid.UUID(self.digest[:32]))


@lru_cache(MAX_TENANTS)
def tenant_of(user: str | None, realm: str = "") -> str:
    """The tenant of a user; None stands for all users together.

    Args:
        user: The user's name.
        realm: Separates deployments that share a store and have users of the same names.
    """
    return _hash(["tenant", realm, "shared"] if user is None else ["tenant", realm, "user", user])


def key_of(
    tenant: str, model: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> CacheKey:
    """The key of a request.

    Args:
        tenant: As ``tenant_of`` returns it.
        model: The model that is asked; the default model where the request names none.
        body: The request in OpenAI's shape.
        headers: Header fields that are sent to the upstream with it.

    Raises:
        RecursionError: The request is nested too deeply.
    """
    return CacheKey(_hash(["answer", tenant, model, dict(headers or {}), _relevant_fields(body)]), tenant)


def large_key_of(
    tenant: str, model: str, content: bytes, headers: Mapping[str, str] | None = None
) -> CacheKey:
    """The key of a large request: its bytes count as they are.

    A request whose fields are compared is serialised anew, which takes the event loop 4 ms for each MB. Bytes
    are hashed in a thread.
    """
    digest = hashlib.sha256(content).hexdigest()
    return CacheKey(_hash(["large answer", tenant, model, dict(headers or {}), digest]), tenant)


def scope_of(tenant: str, model: str, body: Mapping[str, Any], guard: str) -> str:
    """A hash of all that has to be equal for two questions to be compared by meaning.

    Args:
        tenant: As ``tenant_of`` returns it.
        model: The model that is asked.
        body: The request in OpenAI's shape; all of it counts but its last message.
        guard: What must not differ in the last message, as ``guard_of`` returns it.
    """
    fields = _relevant_fields(body)
    fields["messages"] = fields.get("messages", [])[:-1]
    return _hash(["scope", tenant, model, guard, fields])


def _relevant_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change the answer, without those that have their default values."""
    fields = {}
    for name, value in body.items():
        if name in IGNORED or value is None:
            continue
        default = DEFAULTS.get(name)
        # True equals 1 in Python, but not in JSON.
        if value == default and isinstance(value, bool) == isinstance(default, bool):
            continue
        fields[name] = canonical(value)
    return fields


def canonical(value: object) -> Any:  # noqa: ANN401 - any JSON value
    """The same JSON value with one spelling for each number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < MAX_EXACT else value
    if isinstance(value, Mapping):
        return {name: canonical(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(inner) for inner in value]
    return value


def _hash(parts: list[Any]) -> str:
    # One JSON list: no part can be mistaken for the beginning of the next.
    text = json.dumps([SCHEMA, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
