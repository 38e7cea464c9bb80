"""The facts of the request at hand, as one context variable."""

from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestContext:
    """What is known of the request at hand; made when it enters, completed on the way.

    Args:
        request_id: The trace id, 32 hex digits.
        incident_id: ``inc_`` and the server span's id.
        entered_s: When it arrived, on the monotonic clock.
        client_request_id: The caller's own ``X-Request-ID``, where it is harmless.
        user: The caller's name, once known.
        error: The name of the error that it was answered with.
        auth_s: Seconds that the token's check took.
        headers: More header fields for the answer, whatever it is.
        timings_s: Seconds by what they were spent on; filled in for a model call only.
    """

    request_id: str
    incident_id: str
    entered_s: float = 0.0
    client_request_id: str | None = None
    user: str | None = None
    error: str | None = None
    auth_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)


current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)
