"""Sign-in with name and password, and the identity behind a token."""

import time
from datetime import UTC, datetime

from fastapi import APIRouter, Request

from service.dependencies import CurrentUser, ServicesDep, token_of
from service.errors import (
    AuthenticationError,
    DependencyUnavailableError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
    ValidationError,
)
from service.middleware.request_limits import address_of
from service.routers.bodies import JsonRoute
from service.routers.schemas import (
    BudgetLeft,
    LoginRequest,
    LoginResponse,
    MeBody,
    RateLeft,
    UserBody,
    errors,
)

UNAVAILABLE = (DependencyUnavailableError, OverloadedError)

router = APIRouter(prefix="/auth", tags=["auth"], route_class=JsonRoute)


@router.post(
    "/login",
    responses=errors(
        AuthenticationError,
        RequestTimeoutError,
        PayloadTooLargeError,
        UnsupportedMediaTypeError,
        ValidationError,
        RateLimitError,
        OverloadedError,
    ),
)
async def login(body: LoginRequest, request: Request, services: ServicesDep) -> LoginResponse:
    """Sign in with name and password; the token goes into `Authorization: Bearer …`."""
    session = await services.auth.login(
        body.username, body.password.get_secret_value(), address_of(request.scope)
    )
    return LoginResponse(
        access_token=session.token,
        expires_in=session.expires_in_s,
        user=UserBody(username=session.user.username, role=session.user.role),
    )


@router.post(
    "/logout", status_code=204, responses=errors(AuthenticationError, PermissionDeniedError, *UNAVAILABLE)
)
async def logout(user: CurrentUser, request: Request, services: ServicesDep) -> None:
    """Sign the token out; it is refused from then on. `DELETE /keys/{id}` ends an API key."""
    if user.method == "key":
        raise PermissionDeniedError("An API key cannot be signed out. DELETE /keys/{id} ends it.")
    await services.callers.sign_out(token_of(request.scope) or "")


@router.get("/me", responses=errors(AuthenticationError, *UNAVAILABLE))
async def me(user: CurrentUser, services: ServicesDep) -> MeBody:
    """The caller, what they may do, and what is left of it."""
    rate = await services.rate_limiter.nearest(user)
    budgets = await services.ledger.budgets.states(user)
    nearest = max(budgets, key=lambda state: state.share, default=None)
    now_s = time.time()
    return MeBody(
        username=user.username,
        role=user.role,
        team=user.team,
        key=user.key_id,
        models=None if user.models is None else sorted(user.models),
        rate=RateLeft(
            limit=rate.rate, left=rate.left, renews_at=datetime.fromtimestamp(now_s + rate.reset_s, UTC)
        ),
        budget=None
        if nearest is None
        else BudgetLeft(
            limit=nearest.budget.amount,
            spent=nearest.spent,
            left=nearest.left,
            unit=nearest.budget.unit,
            period=nearest.budget.period,
            renews_at=datetime.fromtimestamp(nearest.renews_at, UTC),
        ),
    )
