"""What a route asks for: the process's services, the caller, and the model call, as annotated aliases."""

import json
import re
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Annotated, Final, cast

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.security.base import SecurityBase
from opentelemetry import trace
from opentelemetry.semconv._incubating.attributes.enduser_attributes import ENDUSER_ID
from opentelemetry.semconv._incubating.attributes.user_attributes import USER_ROLES
from starlette.types import Scope

from service.cache.control import CacheControl, parse_cache_control
from service.cache.response_cache import CacheAdmin, NoCacheAdmin
from service.context import DEPLOYMENT, current_request
from service.errors import AuthenticationError, PermissionDeniedError, ValidationError
from service.explain.explainer import Explainer
from service.identity.accounts import Accounts
from service.identity.callers import Callers
from service.identity.keys import ApiKeys
from service.identity.ledger import Ledger
from service.identity.principal import Principal
from service.identity.response_owners import ResponseOwners
from service.identity.tokens import Authenticator
from service.services.call_report import CallSpec
from service.services.drain import Drain
from service.services.generation import Generation
from service.services.health_checker import HealthChecker
from service.services.rate_limit import RateLimiter
from service.telemetry.names import ATTR_KEY_ID, ATTR_TEAM
from service.upstream.messages import LlmRequest
from service.utils.deadline import Deadline

ENDUSER_ROLE = "enduser.role"

CALLER: Final = "llmops.caller"
"""Key in the scope: the caller, or why what they sent proves nothing."""

MODEL_DENIED: Final = "Your key, your user or your team does not permit this model."

PARAMETER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")
MAX_DETAILS = 20

KEY_FIELDS: Final = frozenset({b"authorization", b"x-api-key", b"api-key"})


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
        callers: Tells who is calling.
        keys: API keys.
        accounts: Users and teams.
        ledger: What was used, and what was spent of budgets.
        generation: Answers model calls.
        cache: Statistics and clearing of the cache.
        rate_limiter: Counts the model calls of each user, key and team.
        drain: Requests in flight, and the state of the stop.
        health: The state of the dependencies.
        health_required: Dependencies without which the process is not ready.
        stream_times: The time limits of the caller's side of a stream.
        pass_litellm_fields: Fields of LiteLLM's own that callers may send.
        responses: The owners of stored responses.
        explainer: Says what became of a request.
    """

    auth: Authenticator
    callers: Callers
    keys: ApiKeys
    accounts: Accounts
    ledger: Ledger
    generation: Generation
    cache: CacheAdmin | NoCacheAdmin
    rate_limiter: RateLimiter
    drain: Drain
    health: HealthChecker
    health_required: frozenset[str]
    stream_times: StreamTimes
    pass_litellm_fields: frozenset[str]
    responses: ResponseOwners
    explainer: Explainer


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


async def identify(scope: Scope) -> Principal | None:
    """Find out who is calling, once for each request; None where nobody says so, or it is not true.

    Raises:
        OverloadedError: Too many unknown keys are looked up.
        DependencyUnavailableError: It is not known, because the database does not answer.
    """
    token = token_of(scope)
    if token is None:
        return None
    started = time.monotonic()
    try:
        found: Principal | AuthenticationError = await services_of(scope).callers.identify(token)
    except AuthenticationError as error:
        found = error
    scope[CALLER] = found
    caller = found if isinstance(found, Principal) else None
    context = current_request.get()
    if context is not None:
        context.auth_s = time.monotonic() - started
        if caller is not None:
            context.user, context.team, context.key_id = caller.username, caller.team, caller.key_id
    return caller


def signed_in_caller(scope: Scope) -> Principal:
    """The caller, who becomes known to the server span.

    Raises:
        AuthenticationError: Nothing was sent that proves who is calling.
    """
    user: Principal | AuthenticationError | None = scope.get(CALLER)
    if user is None:
        raise AuthenticationError
    if isinstance(user, AuthenticationError):
        raise user
    context = current_request.get()
    if context is not None:
        context.route = getattr(scope.get("route"), "path", None)
    attributes: dict[str, str | tuple[str]] = {
        ENDUSER_ID: user.username,
        # The conventions are renaming it: who searches by either name finds it.
        ENDUSER_ROLE: user.role,
        USER_ROLES: (user.role,),
    }
    if user.team is not None:
        attributes[ATTR_TEAM] = user.team
    if user.key_id is not None:
        attributes[ATTR_KEY_ID] = user.key_id
    trace.get_current_span().set_attributes(attributes)
    return user


class _Bearer(SecurityBase):
    """A dependency on a signed-in caller, which the API's description shows as a bearer token."""

    def __init__(self) -> None:
        self.model = HTTPBearerModel(bearerFormat="JWT", description="An API key, or a token")
        self.scheme_name = "HTTPBearer"


class SignedIn(_Bearer):
    """The dependency on the caller."""

    async def __call__(self, request: Request) -> Principal:
        """The caller; raises as ``signed_in_caller``."""
        return signed_in_caller(request.scope)


signed_in = SignedIn()


async def admin_user(user: Annotated[Principal, Depends(signed_in)]) -> Principal:
    """The signed-in caller, who must be an administrator."""
    if user.role != "admin":
        raise PermissionDeniedError("This needs the role admin.")
    return user


async def model_caller(request: Request, user: Annotated[Principal, Depends(signed_in)]) -> Principal:
    """The signed-in caller, with this call counted against their rate limits."""
    await services_of(request.scope).rate_limiter.count(user)
    return user


async def _named_model(request: Request) -> str | None:
    """The model in a request's path or JSON body; None where there is none, or the route will refuse it."""
    if DEPLOYMENT in request.scope:
        return str(request.scope[DEPLOYMENT])
    if request.headers.get("content-type", "").startswith("multipart/"):
        # It is passed on as it arrives, and the model is somewhere in it.
        return None
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        return None
    model = body.get("model") if isinstance(body, dict) else None
    return model if isinstance(model, str) else None


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What a route that calls a model needs beside the body.

    Args:
        user: The caller.
        services: The process's services.
        deadline: When the call must be over; it began when the request arrived, not when its body was read.
        cache_control: The directives of the caller's ``Cache-Control``.
        request_id: The trace id.
    """

    user: Principal
    services: AppServices
    deadline: Deadline
    cache_control: CacheControl
    request_id: str

    def spec(self, request: LlmRequest, *, streamed: bool = False, own_protocol: bool = False) -> CallSpec:
        """The call of the use case for this request; arguments as ``CallSpec`` has them.

        Raises:
            PermissionDeniedError: The caller's key, user or team may not ask the model.
        """
        if not self.user.may_ask(request.model):
            raise PermissionDeniedError(MODEL_DENIED, param="model")
        return CallSpec(
            request,
            self.user.username,
            self.deadline,
            streamed,
            self.cache_control,
            own_protocol,
            self.user.team,
            self.user.key_id,
        )


class ModelCalls(_Bearer):
    """The dependency on a model call: signs the caller in, counts the call, and refuses what they may not do.

    The order is: the model, where the body names it and the caller may not ask all; rates; budgets. The route
    reads the body afterwards, and checks the model again. All of it is one dependency, because FastAPI spends
    more time on each than most of them do.

    Args:
        free: Whether the calls cost nothing, and are possible with a spent budget and whatever their model.
    """

    def __init__(self, *, free: bool) -> None:
        super().__init__()
        self._free = free

    async def __call__(self, request: Request) -> ModelCall:
        """The call; raises what refuses it."""
        scope = request.scope
        user, services, context = signed_in_caller(scope), services_of(scope), current_request.get()
        if user.models is not None and not self._free:
            model = await _named_model(request)
            if model is not None and not user.may_ask(model):
                raise PermissionDeniedError(MODEL_DENIED, param="model")
        await services.rate_limiter.count(user)
        if user.limits and not self._free:
            await services.ledger.budgets.check(user)
        control = [value.decode("latin-1") for name, value in scope["headers"] if name == b"cache-control"]
        return ModelCall(
            user,
            services,
            Deadline.after(services.generation.timeout_s, since=context.entered_s if context else None),
            parse_cache_control(", ".join(control)),
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
CurrentUser = Annotated[Principal, Depends(signed_in)]
ModelCaller = Annotated[Principal, Depends(model_caller)]
ModelCallDep = Annotated[ModelCall, Depends(ModelCalls(free=False))]
FreeCallDep = Annotated[ModelCall, Depends(ModelCalls(free=True))]
"""A call that costs nothing, and is possible with a spent budget."""

AdminUser = Annotated[Principal, Depends(admin_user)]
