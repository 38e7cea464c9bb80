"""What a route asks for, as annotated aliases; the one cast from ASGI's untyped state stands here."""

import time
from dataclasses import dataclass
from typing import Annotated, TypedDict, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from opentelemetry import trace
from opentelemetry.semconv._incubating.attributes.enduser_attributes import ENDUSER_ID

from service.cache.control import CacheWish, wish_of
from service.cache.response_cache import CacheAdmin, CacheFacts
from service.context import current_request
from service.errors import AuthenticationError, PermissionDeniedError
from service.identity.tokens import Authenticator, User
from service.services.drain import Drain
from service.services.generation import Generation
from service.services.health_checker import HealthChecker
from service.services.rate_limit import RateLimiter
from service.utils.deadline import Deadline


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


ENDUSER_ROLE = "enduser.role"

bearer = HTTPBearer(auto_error=False, bearerFormat="JWT", description="The token from POST /auth/login")


def _state(request: Request) -> State:
    return cast("State", request.scope["state"])


# Coroutines, though nothing is awaited: FastAPI runs plain functions in a thread each.
async def _auth(request: Request) -> Authenticator:
    return _state(request)["auth"]


async def _generation(request: Request) -> Generation:
    return _state(request)["generation"]


async def current_user(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> User:
    """The signed-in caller; their name goes into the log context, name and role onto the server span."""
    if credentials is None:
        raise AuthenticationError
    started = time.monotonic()
    user = _state(request)["auth"].identify(credentials.credentials)
    context = current_request.get()
    if context is not None:
        context.user = user.username
        context.auth_s = time.monotonic() - started
    trace.get_current_span().set_attributes({ENDUSER_ID: user.username, ENDUSER_ROLE: user.role})
    return user


async def admin_user(user: Annotated[User, Depends(current_user)]) -> User:
    """The signed-in caller, who must be an administrator."""
    if user.role != "admin":
        raise PermissionDeniedError("This needs the role admin.")
    return user


async def model_caller(request: Request, user: Annotated[User, Depends(current_user)]) -> User:
    """The signed-in caller, with this model call counted against their rate."""
    await _state(request)["rate_limiter"].count(user.username)
    return user


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What a route that calls a model needs beside the caller and the body.

    One dependency for all of it: FastAPI spends more time on each than most of them do.

    Args:
        generation: The use case.
        deadline: When the call must be over; it began when the request entered, not when its body was there.
        wish: What the caller wants of the cache.
        request_id: The trace id.
        keep_alive_s: Seconds of silence after which a stream gets a comment.
    """

    generation: Generation
    deadline: Deadline
    wish: CacheWish
    request_id: str
    keep_alive_s: float


async def _model_call(request: Request) -> ModelCall:
    state, context = _state(request), current_request.get()
    generation = state["generation"]
    return ModelCall(
        generation,
        Deadline.after(generation.timeout_s, since=context.entered_s if context else None),
        wish_of(", ".join(request.headers.getlist("cache-control"))),
        context.request_id if context else "",
        state["stream_keep_alive_s"],
    )


async def _drain(request: Request) -> Drain:
    return _state(request)["drain"]


async def _health(request: Request) -> HealthChecker:
    return _state(request)["health"]


async def _required(request: Request) -> frozenset[str]:
    return _state(request)["health_required"]


async def _cache(request: Request) -> CacheAdmin | None:
    return _state(request)["cache"]


async def _cache_facts(request: Request) -> CacheFacts:
    return _state(request)["cache_facts"]


CacheDep = Annotated[CacheAdmin | None, Depends(_cache)]
CacheFactsDep = Annotated[CacheFacts, Depends(_cache_facts)]
DrainDep = Annotated[Drain, Depends(_drain)]
HealthDep = Annotated[HealthChecker, Depends(_health)]
RequiredDep = Annotated[frozenset[str], Depends(_required)]
AuthDep = Annotated[Authenticator, Depends(_auth)]
GenerationDep = Annotated[Generation, Depends(_generation)]
CurrentUser = Annotated[User, Depends(current_user)]
ModelCaller = Annotated[User, Depends(model_caller)]
ModelCallDep = Annotated[ModelCall, Depends(_model_call)]
AdminUser = Annotated[User, Depends(admin_user)]
