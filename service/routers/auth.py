"""Sign-in with name and password, and the identity behind a token."""

from fastapi import APIRouter, Request

from service.dependencies import CurrentUser, ServicesDep, token_of
from service.errors import (
    AuthenticationError,
    OverloadedError,
    PayloadTooLargeError,
    RateLimitError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
    ValidationError,
)
from service.middleware.request_limits import address_of
from service.routers.bodies import JsonRoute
from service.routers.schemas import LoginRequest, LoginResponse, UserBody, errors

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


@router.post("/logout", status_code=204, responses=errors(AuthenticationError, OverloadedError))
async def logout(_user: CurrentUser, request: Request, services: ServicesDep) -> None:
    """Sign the token out; it is refused from then on."""
    services.auth.logout(token_of(request.scope) or "")


@router.get("/me", responses=errors(AuthenticationError, OverloadedError))
async def me(user: CurrentUser) -> UserBody:
    """The user that the token belongs to."""
    return UserBody(username=user.username, role=user.role)
