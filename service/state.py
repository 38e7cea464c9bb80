"""What the lifespan hands to each request."""

from typing import TypedDict

from service.services.auth import Authenticator
from service.services.cache_admin import CacheAdmin, CacheFacts
from service.services.drain import Drain
from service.services.generation import Generation
from service.services.health_checker import HealthChecker
from service.services.rate_limit import RateLimiter


class State(TypedDict):
    """The use cases, opened once per process."""

    auth: Authenticator
    generation: Generation
    cache: CacheAdmin | None
    cache_facts: CacheFacts
    rate_limiter: RateLimiter
    drain: Drain
    health: HealthChecker
    health_required: frozenset[str]
    stream_keep_alive_s: float
