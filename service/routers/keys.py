"""API keys: making, listing, revoking and rotating them; one's own, or, for administrators, all."""

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Path, Query, Request

from service.dependencies import CurrentUser, ServicesDep, only_query, token_of
from service.errors import (
    AuthenticationError,
    DependencyUnavailableError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RequestTimeoutError,
    ShuttingDownError,
    UnsupportedMediaTypeError,
    ValidationError,
)
from service.identity.audit import report_change
from service.identity.keys import ID_CHARS, ApiKey, new_id
from service.identity.principal import NO_LIMITS, Budget, Limits, Principal
from service.routers.bodies import JsonRoute, refuse
from service.routers.schemas import (
    KeyBody,
    KeyList,
    NewKey,
    NewKeyBody,
    Rotation,
    errors,
    limits_of,
    shown_limits,
)
from service.services.rate_limit import RateLimiter
from service.utils.rates import per_second

MAX_PAGE: Final = 1_000
MAX_KEYS_EACH: Final = 1_000
"""How many keys a user can make who is no administrator."""

KEY_ID: Final = re.compile(rf"[0-9A-Za-z]{{{ID_CHARS}}}")
DAYS_OF_A_MONTH: Final = 31
LAST_S: Final = 253_370_764_800
"""The first second of the year 9999; later ones are not the same year in all time zones."""

UNAVAILABLE = (DependencyUnavailableError, OverloadedError, ShuttingDownError)
WITH_BODY = (RequestTimeoutError, PayloadTooLargeError, UnsupportedMediaTypeError, ValidationError)

router = APIRouter(prefix="/keys", tags=["keys"], route_class=JsonRoute)

KeyId = Annotated[str, Path(max_length=64, description="The key's id.")]


@router.post(
    "",
    status_code=201,
    responses=errors(AuthenticationError, PermissionDeniedError, *WITH_BODY, *UNAVAILABLE),
)
async def create(body: NewKey, request: Request, user: CurrentUser, services: ServicesDep) -> NewKeyBody:
    """Make a key; its secret is shown here and nowhere else.

    A key without limits that an administrator makes for themselves is an administrator's. Another `owner`, a
    `team`, and a `rate`, `budget` or `models` beyond one's own need the role admin.
    """
    _check_current(request, services)
    owner, limits = body.owner or user.username, limits_of(body)
    expires_at = None if body.expires_at is None else _seconds(body.expires_at)
    if expires_at is not None and not time.time() < expires_at < LAST_S:
        refuse("body.expires_at", "must be in the future, and before the year 9999")
    if user.role != "admin":
        if owner != user.username:
            raise PermissionDeniedError("Only an administrator makes keys for others.", param="owner")
        if body.team is not None and body.team != user.team:
            raise PermissionDeniedError("Only an administrator gives a key to a team.", param="team")
        _check_within(user, limits, services.rate_limiter)
        if await services.keys.number_of(owner) >= MAX_KEYS_EACH:
            refuse("body", f"cannot be kept: you have {MAX_KEYS_EACH:,} keys, revoked ones included")
    parent = await services.keys.get(user.key_id) if user.key_id is not None else None
    if parent is not None:
        if user.role != "admin" and (parent.limits.rate or parent.limits.budget):
            # Each key would have the limit once more.
            raise PermissionDeniedError("A key with a rate or a budget makes no other keys. Sign in.")
        if parent.expires_at is not None:
            # A key that was lost must not live on in others that it has made.
            expires_at = min(expires_at or parent.expires_at, parent.expires_at)
    key = ApiKey(
        new_id(),
        body.name,
        owner,
        "admin" if _is_administrators(user, owner, limits) else "user",
        body.team or _inherited_team(user, parent, owner),
        limits,
        int(time.time()),
        expires_at,
    )
    text = await services.keys.create(key)
    report_change(user.username, "key_created", key.id, owner=owner, team=key.team)
    return NewKeyBody(key=text, **_shown(key))


def _is_administrators(user: Principal, owner: str, limits: Limits) -> bool:
    """Whether a key may do what its owner may do: one with limits could lift them."""
    return user.role == "admin" and user.method != "oidc" and owner == user.username and limits == NO_LIMITS


def _inherited_team(user: Principal, parent: ApiKey | None, owner: str) -> str | None:
    """The team that a new key has because of how its maker has come; a user's is found with each call."""
    if owner != user.username:
        return None
    if parent is not None:
        return parent.team
    # A token's team is in no other place.
    return user.team if user.method == "oidc" else None


def _seconds(moment: datetime) -> int:
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _check_within(user: Principal, asked: Limits, rates: RateLimiter) -> None:
    """Refuse what goes beyond what the caller may do: only administrators grant that."""
    if asked.rate is not None and per_second(asked.rate) > per_second(rates.rate_of(user)):
        raise PermissionDeniedError("Only an administrator grants a rate above yours.", param="rate")
    for own in user.limits:
        _check_within_limits(own.limits, asked)


def _check_within_limits(own: Limits, asked: Limits) -> None:
    if own.rate is not None and asked.rate is not None and per_second(asked.rate) > per_second(own.rate):
        raise PermissionDeniedError("Only an administrator grants a rate above yours.", param="rate")
    if own.models is not None and (asked.models is None or not set(asked.models) <= set(own.models)):
        raise PermissionDeniedError(
            "Only an administrator grants models that you may not ask; name those that you may.",
            param="models",
        )
    if own.budget is not None and asked.budget is not None and _is_above(asked.budget, own.budget):
        raise PermissionDeniedError("Only an administrator grants a budget above yours.", param="budget")


def _is_above(asked: Budget, own: Budget) -> bool:
    """Whether a budget permits more than another; of two units neither does, and both apply."""
    if asked.unit != own.unit:
        return False
    longer = asked.period == "month" and own.period == "day"
    return asked.amount > own.amount * (DAYS_OF_A_MONTH if longer else 1)


@router.get("", responses=errors(AuthenticationError, PermissionDeniedError, ValidationError, *UNAVAILABLE))
async def page(
    user: CurrentUser,
    services: ServicesDep,
    _query: Annotated[None, Depends(only_query("owner", "team", "limit", "after"))],
    owner: Annotated[str | None, Query(max_length=256, description="Only this owner's.")] = None,
    team: Annotated[str | None, Query(max_length=256, description="Only this team's.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[str, Query(max_length=64, description="The last id of the page before.")] = "",
) -> KeyList:
    """Keys without their secrets, in the order of their ids; one's own, or, for administrators, all."""
    if user.role != "admin":
        if owner not in {None, user.username}:
            raise PermissionDeniedError("Only an administrator lists the keys of others.", param="owner")
        if team not in {None, user.team}:
            raise PermissionDeniedError("Only an administrator lists the keys of teams.", param="team")
        owner = user.username
    for name, value in (("owner", owner), ("team", team), ("after", after)):
        if value is not None and not value.isprintable():
            refuse(f"query.{name}", "must be printable text")
    found = await services.keys.page(owner=owner, team=team, after=after, limit=limit)
    return KeyList(keys=[KeyBody(**_shown(key)) for key in found])


@router.delete(
    "/{key_id}",
    status_code=204,
    responses=errors(
        AuthenticationError, PermissionDeniedError, NotFoundError, ValidationError, *UNAVAILABLE
    ),
)
async def revoke(key_id: KeyId, request: Request, user: CurrentUser, services: ServicesDep) -> None:
    """Revoke a key, at once in this process and within seconds in the others."""
    _check_current(request, services)
    key = await _own(key_id, user, services)
    if key.revoked_at is None:
        await services.keys.revoke(key_id)
        report_change(user.username, "key_revoked", key_id, owner=key.owner)


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    responses=errors(AuthenticationError, PermissionDeniedError, NotFoundError, *WITH_BODY, *UNAVAILABLE),
)
async def rotate(
    key_id: KeyId, request: Request, user: CurrentUser, services: ServicesDep, body: Rotation | None = None
) -> NewKeyBody:
    """Give a key a new secret; the old one works for `overlap_s` more seconds."""
    _check_current(request, services)
    await _own(key_id, user, services)
    key, text = await services.keys.rotate(key_id, body.overlap_s if body is not None else 0)
    report_change(user.username, "key_rotated", key_id, owner=key.owner)
    return NewKeyBody(key=text, **_shown(key))


def _check_current(request: Request, services: ServicesDep) -> None:
    """Refuse a secret that was replaced and works for a while: whoever has it must not outlive that."""
    if services.keys.is_replaced(token_of(request.scope) or ""):
        raise PermissionDeniedError("This secret was replaced: until it ends, it only makes calls.")


async def _own(key_id: str, user: Principal, services: ServicesDep) -> ApiKey:
    """The key, which must be the caller's own unless they are an administrator.

    Raises:
        NotFoundError: It is not, or there is none.
        PermissionDeniedError: The caller has come with another key, which may do less.
    """
    found = await services.keys.get(key_id) if KEY_ID.fullmatch(key_id) else None
    if found is None or (user.role != "admin" and found.owner != user.username):
        raise NotFoundError("There is no such key.")
    if user.role != "admin" and user.key_id not in {None, key_id}:
        sent = await services.keys.get(user.key_id or "")
        if sent is None or sent.limits != NO_LIMITS or sent.expires_at is not None:
            raise PermissionDeniedError("A key with limits, or that expires, changes no other keys. Sign in.")
    return found


def _shown(key: ApiKey) -> dict[str, object]:
    """A key as it is shown; times in ISO 8601."""
    times = {
        name: None if value is None else datetime.fromtimestamp(min(value, LAST_S), UTC)
        for name, value in (
            ("created_at", key.created_at),
            ("expires_at", key.expires_at),
            ("last_used_at", key.last_used_at),
            ("revoked_at", key.revoked_at),
        )
    }
    return {
        **{name: getattr(key, name) for name in ("id", "name", "owner", "team")},
        **shown_limits(key.limits),
        **times,
    }
