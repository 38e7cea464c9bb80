"""The facts of the request at hand, as one context variable.

The middleware makes one ``RequestContext`` for each request. Dependencies and services add what they learn;
log lines, error bodies and the header fields of the answer are made from it.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

DEPLOYMENT: Final = "llmops.deployment"
"""Key in the ASGI scope: the model that an Azure client names in the path."""


@dataclass(frozen=True, slots=True)
class RateFacts:
    """The state of the caller's rate limit after this call was counted.

    Args:
        policy: Whose limit it is: ``per-key``, ``per-user`` or ``per-team``.
        quota: Calls permitted in one window.
        window_s: Length of the window in seconds.
        remaining: Calls left in the window.
        reset_s: Seconds until a call is available again.
    """

    policy: str
    quota: int
    window_s: int
    remaining: int
    reset_s: int


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What the head of an answer says about the model call behind it.

    Args:
        attempts: Requests sent to the upstream.
        cache: ``hit``, ``miss`` or ``bypass``.
        age_s: Age of the stored answer in seconds; of a hit only.
        similarity: Cosine similarity of the stored question; of a semantic hit only.
        lookup_s: Seconds spent on the cache look-up.
        llm_s: Seconds spent waiting for the upstream.
        retry_s: Seconds spent waiting between attempts.
    """

    attempts: int
    cache: str
    age_s: float
    similarity: float | None
    lookup_s: float
    llm_s: float
    retry_s: float


@dataclass(slots=True)
class RequestContext:
    """What is known of one request.

    Args:
        request_id: The trace id, 32 hex digits.
        incident_id: ``inc_`` and the server span's id.
        continued: Whether the trace is the caller's; then other requests may have the same ``request_id``.
        entered_s: Arrival time on the monotonic clock.
        client_request_id: The caller's own ``X-Request-ID``, when it has a permitted form.
        route: The route's path, with its parameters' names, of a request that needs a caller.
        user: The caller's name, once known; the same holds for the next two.
        team: The team that the call belongs to.
        key_id: The id of the caller's API key.
        error: Name of the error that the request was answered with.
        auth_s: Seconds spent on authentication.
        rate: The caller's rate limit, once the call was counted.
        call: The model call behind the answer, once its head can be written.
    """

    request_id: str
    incident_id: str
    continued: bool = False
    entered_s: float = 0.0
    client_request_id: str | None = None
    route: str | None = None
    user: str | None = None
    team: str | None = None
    key_id: str | None = None
    error: str | None = None
    auth_s: float = 0.0
    rate: RateFacts | None = None
    call: CallFacts | None = None


current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)
