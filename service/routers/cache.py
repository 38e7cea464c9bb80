"""What the cache says of itself, and clearing it."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query

from service.cache.response_cache import CacheStats
from service.dependencies import AdminUser, CacheDep, CacheFactsDep, CurrentUser
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

UNAVAILABLE = (OverloadedError, ShuttingDownError)
NOTHING = CacheStats(0, 0, 0, 0, 0, 0, 0, 0, 0)


@router.get("/stats", responses=errors(AuthenticationError, *UNAVAILABLE))
async def stats(_user: CurrentUser, cache: CacheDep, facts: CacheFactsDep) -> CacheStatsResponse:
    """How the cache is set, and how it does."""
    found = NOTHING if cache is None else await cache.stats()
    return CacheStatsResponse(**asdict(facts), **asdict(found), ratio=found.ratio)


@router.delete(
    "",
    responses=errors(
        AuthenticationError, PermissionDeniedError, ValidationError, UpstreamError, *UNAVAILABLE
    ),
)
async def clear(
    _admin: AdminUser,
    cache: CacheDep,
    user: Annotated[str | None, Query(max_length=256, description="Only this user's answers.")] = None,
    model: Annotated[str | None, Query(max_length=200, description="Only this model's answers.")] = None,
) -> CacheCleared:
    """Clear the cache; calls under way do not bring back what is gone."""
    return CacheCleared(cleared=0 if cache is None else await cache.clear(user=user, model=model))
