"""Users and teams: their limits, and what they have spent; set by administrators."""

from datetime import UTC, datetime
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Path, Query

from service.dependencies import AdminUser, AppServices, ServicesDep, only_query
from service.errors import AuthenticationError, PermissionDeniedError, ValidationError
from service.identity.accounts import Team, User
from service.identity.audit import report_change
from service.identity.principal import Limited, Limits, Scope, checked_name
from service.routers.bodies import JsonRoute, refuse
from service.routers.keys import UNAVAILABLE, WITH_BODY
from service.routers.schemas import (
    SpentBody,
    TeamBody,
    TeamList,
    TeamSettings,
    UserList,
    UserSettings,
    UserState,
    errors,
    limits_of,
    shown_limits,
)

MAX_SHOWN: Final = 1_000

LIST_ERRORS = errors(AuthenticationError, PermissionDeniedError, ValidationError, *UNAVAILABLE)

router = APIRouter(tags=["accounts"], route_class=JsonRoute)

# A name may hold slashes, as that of a user of an identity provider does.
Name = Annotated[str, Path(max_length=1_024, description="The name.")]


@router.put(
    "/teams/{name:path}",
    responses=errors(AuthenticationError, PermissionDeniedError, *WITH_BODY, *UNAVAILABLE),
)
async def put_team(name: Name, body: TeamSettings, admin: AdminUser, services: ServicesDep) -> TeamBody:
    """Set a team's limits; what is left out is no limit. Applies at once here, within seconds elsewhere."""
    team = Team(_checked(name), limits_of(body))
    await services.accounts.put_team(team)
    report_change(admin.username, "team_set", team.name, limits=team.limits.to_json())
    return await _shown_team(team, services)


@router.get("/teams", responses=LIST_ERRORS)
async def teams(
    _admin: AdminUser,
    services: ServicesDep,
    _query: Annotated[None, Depends(only_query("limit", "after"))],
    limit: Annotated[int, Query(ge=1, le=MAX_SHOWN)] = 100,
    after: Annotated[str, Query(max_length=256, description="The last name of the page before.")] = "",
) -> TeamList:
    """The teams that were set, by name, with what they have spent."""
    found = [team for team in services.accounts.teams if team.name > after][:limit]
    return TeamList(teams=[await _shown_team(team, services) for team in found])


@router.put(
    "/users/{name:path}",
    responses=errors(AuthenticationError, PermissionDeniedError, *WITH_BODY, *UNAVAILABLE),
)
async def put_user(name: Name, body: UserSettings, admin: AdminUser, services: ServicesDep) -> UserState:
    """Set a user's limits and team, or disable them: built-in, of an identity provider, or a key's owner.

    What is left out is no limit, no team, not disabled. Administrators cannot disable themselves.
    """
    user = User(_checked(name), limits_of(body), body.team, body.disabled)
    if user.disabled and user.name == admin.username:
        refuse("body.disabled", "would shut yourself out")
    await services.accounts.put_user(user)
    disabled = "true" if user.disabled else None
    report_change(
        admin.username,
        "user_set",
        user.name,
        limits=user.limits.to_json(),
        team=user.team,
        disabled=disabled,
    )
    return await _shown_user(user, services)


@router.get("/users", responses=LIST_ERRORS)
async def users(
    _admin: AdminUser,
    services: ServicesDep,
    _query: Annotated[None, Depends(only_query("limit", "after"))],
    limit: Annotated[int, Query(ge=1, le=MAX_SHOWN)] = 100,
    after: Annotated[str, Query(max_length=256, description="The last name of the page before.")] = "",
) -> UserList:
    """The built-in users, the owners of keys, and all users that were set, by name."""
    names = {user.name for user in services.accounts.users} | set(services.auth.usernames)
    names |= set(await services.keys.owners(after, limit))
    found = sorted(name for name in names if name > after)[:limit]
    return UserList(users=[await _shown_user(services.accounts.user(name), services) for name in found])


def _checked(name: str) -> str:
    """A name from the path; ``ValidationError`` where it can be none."""
    try:
        return checked_name(name)
    except ValueError as error:
        refuse("path.name", str(error))


async def _shown_team(team: Team, services: AppServices) -> TeamBody:
    spent = await _spent("team", team.name, team.limits, services)
    return TeamBody(name=team.name, **shown_limits(team.limits), **spent.model_dump())


async def _shown_user(user: User, services: AppServices) -> UserState:
    spent = await _spent("user", user.name, user.limits, services)
    return UserState(
        name=user.name,
        role=services.auth.role_of(user.name),
        team=user.team,
        disabled=user.disabled,
        **shown_limits(user.limits),
        **spent.model_dump(),
    )


async def _spent(scope: Scope, name: str, limits: Limits, services: AppServices) -> SpentBody:
    if limits.budget is None:
        return SpentBody(spent=None, left=None, renews_at=None)
    state = await services.ledger.budgets.state(Limited(scope, name, limits))
    return SpentBody(
        spent=state.spent, left=state.left, renews_at=datetime.fromtimestamp(state.renews_at, UTC)
    )
