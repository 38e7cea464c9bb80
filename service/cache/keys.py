"""What makes two requests the same: canonical hashes of everything that changes an answer."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

SCHEMA = 1
"""Part of every key: an entry that another version of this code wrote is not found, not misread."""

NOT_PART_OF_IT: Final = frozenset({"stream", "stream_options", "model"})
"""How the answer is handed over changes nothing of it; the model is in the key by its name as resolved. All
else is in, what is not known here too: a field that changes nothing costs a hit, the opposite costs trust."""

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
"""What OpenAI's reference gives for a parameter that is absent
(https://platform.openai.com/docs/api-reference/chat/create); null means absent there, too."""

MAX_EXACT = 2**53
"""Up to here a float without a fraction is exactly one whole number."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Where an answer is kept.

    Args:
        digest: 64 hex digits; two requests have the same one when their answers may be the same.
        tenant: 64 hex digits: whose answer it is. A name cannot break out of a hash.
    """

    digest: str
    tenant: str

    @property
    def point_id(self) -> str:
        """The point's id, made from the key: two writers cannot make two entries."""
        return str(uuid.UUID(self.digest[:32]))


def tenant_of(user: str | None, realm: str = "") -> str:
    """The tenant of a user; None stands for all of them together.

    Args:
        user: The user's name.
        realm: What else keeps answers apart: the same name elsewhere is somebody else.
    """
    return _hash(["tenant", realm, "shared"] if user is None else ["tenant", realm, "user", user])


def key_of(
    tenant: str, model: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> CacheKey:
    """The key of a request.

    Args:
        tenant: As ``tenant_of`` gives it.
        model: The model that is asked, the default one where none was named.
        body: The request in OpenAI's shape.
        headers: Header fields that go to the upstream with it.

    Raises:
        RecursionError: The request is nested too deeply to be looked at.
    """
    asked = {name: value for name, value in body.items() if not _is_default(name, value)}
    return CacheKey(_hash(["answer", tenant, model, dict(headers or {}), canonical(asked)]), tenant)


def scope_of(tenant: str, model: str, body: Mapping[str, Any], guard: str) -> str:
    """What has to be equal for two questions to be compared by their meaning: all but the last message.

    Args:
        tenant: As ``tenant_of`` gives it.
        model: The model that is asked.
        body: The request in OpenAI's shape.
        guard: What must not differ in the last message, as ``guard_of`` gives it.
    """
    asked = {name: value for name, value in body.items() if not _is_default(name, value)}
    asked["messages"] = list(asked.get("messages", ()))[:-1]
    return _hash(["scope", tenant, model, guard, canonical(asked)])


def canonical(value: object) -> object:
    """The same JSON value with one spelling for each number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < MAX_EXACT else value
    if isinstance(value, Mapping):
        return {name: canonical(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(inner) for inner in value]
    return value


def _is_default(name: str, value: object) -> bool:
    if name in NOT_PART_OF_IT or value is None:
        return True
    if name not in DEFAULTS:
        return False
    default = DEFAULTS[name]
    # True equals 1 in Python and is something else in JSON.
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)


def _hash(parts: list[Any]) -> str:
    # One JSON list: no part can pretend to be the beginning of the next one.
    text = json.dumps([SCHEMA, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
