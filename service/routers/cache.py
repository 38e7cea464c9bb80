"""Statistics of the cache, and clearing it."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from service.dependencies import AdminUser, CurrentUser, ServicesDep, only_query
from service.errors import (
    AuthenticationError,
    OverloadedError,
    PermissionDeniedError,
    ShuttingDownError,
    UpstreamError,
    ValidationError,
)
from service.routers.schemas import CacheCleared, CacheStatsResponse, errors

router = APIRouter(prefix="/llm/cache", tags=["llm"])


@router.get(
    "/stats", responses=errors(AuthenticationError, ValidationError, OverloadedError, ShuttingDownError)
)
async def stats(
    _user: CurrentUser, _query: Annotated[None, Depends(only_query())], services: ServicesDep
) -> CacheStatsResponse:
    """How the cache is configured, and how it performs."""
    found = await services.cache.stats()
    return CacheStatsResponse(**asdict(services.cache.facts), **asdict(found), ratio=found.ratio)


@router.delete(
    "",
    responses=errors(
        AuthenticationError,
        PermissionDeniedError,
        ValidationError,
        UpstreamError,
        OverloadedError,
        ShuttingDownError,
    ),
)
async def clear(
    _admin: AdminUser,
    _query: Annotated[None, Depends(only_query("user", "model"))],
    services: ServicesDep,
    user: Annotated[str | None, Query(max_length=256, description="Only this user's answers.")] = None,
    model: Annotated[str | None, Query(max_length=200, description="Only this model's answers.")] = None,
) -> CacheCleared:
    """Clear the cache; calls under way do not store what was cleared."""
    return CacheCleared(cleared=await services.cache.clear(user=user, model=model))
