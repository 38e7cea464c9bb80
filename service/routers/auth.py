"""Sign-in with name and password, and the identity behind a token."""

from fastapi import APIRouter, Request

from service.dependencies import CurrentUser, ServicesDep
from service.errors import (
    AuthenticationError,
    OverloadedError,
    PayloadTooLargeError,
    RateLimitError,
    RequestTimeoutError,
    ValidationError,
)
from service.routers.schemas import LoginRequest, LoginResponse, UserBody, errors

router = APIRouter(prefix="/auth", tags=["auth"])


@router.post(
    "/login",
    responses=errors(
        AuthenticationError,
        RequestTimeoutError,
        PayloadTooLargeError,
        ValidationError,
        RateLimitError,
        OverloadedError,
    ),
)
async def login(body: LoginRequest, request: Request, services: ServicesDep) -> LoginResponse:
    """Sign in with name and password; the token goes into `Authorization: Bearer …`."""
    address = request.client.host if request.client else ""
    session = await services.auth.login(body.username, body.password.get_secret_value(), address)
    return LoginResponse(
        access_token=session.token,
        expires_in=session.expires_in_s,
        user=UserBody(username=session.user.username, role=session.user.role),
    )


@router.get("/me", responses=errors(AuthenticationError, OverloadedError))
async def me(user: CurrentUser) -> UserBody:
    """The user that the token belongs to."""
    return UserBody(username=user.username, role=user.role)
