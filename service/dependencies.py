"""What a route asks for: the process's services, the caller, and the model call, as annotated aliases."""

import re
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Annotated, Final, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from opentelemetry import trace
from opentelemetry.semconv._incubating.attributes.enduser_attributes import ENDUSER_ID
from starlette.types import Scope

from service.cache.control import CacheControl, parse_cache_control
from service.cache.response_cache import CacheAdmin, NoCacheAdmin
from service.context import current_request
from service.errors import AuthenticationError, PermissionDeniedError, ValidationError
from service.identity.response_owners import ResponseOwners
from service.identity.tokens import Authenticator, User
from service.services.call_report import CallSpec
from service.services.drain import Drain
from service.services.generation import Generation
from service.services.health_checker import HealthChecker
from service.services.rate_limit import RateLimiter
from service.upstream.messages import LlmRequest
from service.utils.deadline import Deadline

ENDUSER_ROLE = "enduser.role"
PARAMETER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")
MAX_DETAILS = 20

KEY_FIELDS: Final = frozenset({b"authorization", b"x-api-key", b"api-key"})

bearer = HTTPBearer(auto_error=False, bearerFormat="JWT", description="The token from POST /auth/login")


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """The time limits of the caller's side of a stream.

    Args:
        keep_alive_s: Seconds of silence after which a comment is sent.
        write_timeout_s: Seconds after which a caller who takes nothing is disconnected.
    """

    keep_alive_s: float
    write_timeout_s: float


@dataclass(frozen=True, slots=True)
class AppServices:
    """The process's services, made once by the lifespan.

    Args:
        auth: Signs users in and checks tokens.
        generation: Answers model calls.
        cache: Statistics and clearing of the cache.
        rate_limiter: Counts model calls per user.
        drain: Requests in flight, and the state of the stop.
        health: The state of the dependencies.
        health_required: Dependencies without which the process is not ready.
        stream_times: The time limits of the caller's side of a stream.
        pass_litellm_fields: Fields of LiteLLM's own that callers may send.
        responses: The owners of stored responses.
    """

    auth: Authenticator
    generation: Generation
    cache: CacheAdmin | NoCacheAdmin
    rate_limiter: RateLimiter
    drain: Drain
    health: HealthChecker
    health_required: frozenset[str]
    stream_times: StreamTimes
    pass_litellm_fields: frozenset[str]
    responses: ResponseOwners


def services_of(scope: Scope) -> AppServices:
    """The services that the lifespan put into the ASGI state, which is untyped: the one cast."""
    return cast("AppServices", scope["state"]["services"])


# Coroutines, though nothing is awaited: FastAPI runs plain functions in a thread each.
async def _services(request: Request) -> AppServices:
    return services_of(request.scope)


def token_of(scope: Scope) -> str | None:
    """The token that a request carries; None without one.

    It is in ``Authorization: Bearer``, or else where Anthropic's or Azure's clients send a key.
    """
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in KEY_FIELDS:
            found.setdefault(name, value)
    scheme, _, token = found.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    key = found.get(b"x-api-key", found.get(b"api-key"))
    return None if key is None else key.decode("latin-1").strip()


async def current_user(
    request: Request, _documented: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> User:
    """The signed-in caller; their name goes into the log context, name and role onto the server span."""
    token = token_of(request.scope)
    if token is None:
        raise AuthenticationError
    started = time.monotonic()
    user = services_of(request.scope).auth.identify(token)
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
    """The signed-in caller, with this model call counted against their rate limit."""
    await services_of(request.scope).rate_limiter.count(user.username)
    return user


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What a route that calls a model needs beside the body.

    One dependency for all of it: FastAPI spends more time on each than most of them do.

    Args:
        user: The caller.
        services: The process's services.
        deadline: When the call must be over; it began when the request arrived, not when its body was read.
        cache_control: The directives of the caller's ``Cache-Control``.
        request_id: The trace id.
    """

    user: User
    services: AppServices
    deadline: Deadline
    cache_control: CacheControl
    request_id: str

    def spec(self, request: LlmRequest, *, streamed: bool = False, own_protocol: bool = False) -> CallSpec:
        """The call of the use case for this request; arguments as ``CallSpec`` has them."""
        name, control = self.user.username, self.cache_control
        return CallSpec(request, name, self.deadline, streamed, control, own_protocol)


async def _model_call(request: Request, user: Annotated[User, Depends(model_caller)]) -> ModelCall:
    services, context = services_of(request.scope), current_request.get()
    return ModelCall(
        user,
        services,
        Deadline.after(services.generation.timeout_s, since=context.entered_s if context else None),
        parse_cache_control(", ".join(request.headers.getlist("cache-control"))),
        context.request_id if context else "",
    )


def only_query(
    *known: str, repeatable: Collection[str] = ()
) -> Callable[[Request], Coroutine[None, None, None]]:
    """A dependency that refuses unknown and repeated query parameters.

    FastAPI ignores both, which is dangerous where a parameter limits what a route does. It stands behind the
    caller among the route's arguments, which are looked at in their order.

    Args:
        known: The names of the route's query parameters.
        repeatable: Those of them that are lists.
    """

    async def check(request: Request) -> None:
        seen: set[str] = set()
        details: list[dict[str, str]] = []
        for name, _ in request.query_params.multi_items():
            if name not in known:
                # A name that is none may be a secret in the wrong place.
                shown = name if PARAMETER_NAME.fullmatch(name) else "?"
                details.append(
                    {"field": f"query.{shown}", "message": "is not known", "type": "extra_forbidden"}
                )
            elif name in seen and name not in repeatable:
                details.append({"field": f"query.{name}", "message": "is given twice", "type": "repeated"})
            seen.add(name)
        if details:
            summary = "; ".join(f"{detail['field']}: {detail['message']}" for detail in details[:3])
            raise ValidationError(f"The request is not valid: {summary}", details=details[:MAX_DETAILS])

    return check


ServicesDep = Annotated[AppServices, Depends(_services)]
CurrentUser = Annotated[User, Depends(current_user)]
ModelCaller = Annotated[User, Depends(model_caller)]
ModelCallDep = Annotated[ModelCall, Depends(_model_call)]
AdminUser = Annotated[User, Depends(admin_user)]
