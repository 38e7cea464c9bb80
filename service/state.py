"""What the lifespan hands to each request."""

from typing import TypedDict

from service.services.auth import Authenticator
from service.services.generation import Generation
from service.services.rate_limit import RateLimiter


class State(TypedDict):
    """The use cases, opened once per process."""

    auth: Authenticator
    generation: Generation
    rate_limiter: RateLimiter
