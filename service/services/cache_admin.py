"""What the cache says of itself, and how it is emptied."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self

from service.clients.vectors import COLLECTION, StoreError, Vectors
from service.config.settings import Settings
from service.errors import UpstreamError, ValidationError
from service.services.response_cache import ResponseCache

PAGE = 1_000


@dataclass(frozen=True)
class CacheStats:
    """How the cache does; counts since this process's start, ``entries`` of the whole store.

    ``entries`` is None where the store did not say it in time.
    """

    entries: int | None
    hits: int
    misses: int
    bypassed: int
    errors: int
    memory_entries: int
    memory_bytes: int
    waiting: int
    dropped: int

    @property
    def ratio(self) -> float:
        """Hits as a share of the look-ups that could have been hits."""
        looked = self.hits + self.misses + self.errors
        return round(self.hits / looked, 4) if looked else 0.0


@dataclass(frozen=True)
class CacheFacts:
    """How the cache is set."""

    enabled: bool
    semantic: bool
    scope: Literal["user", "shared"]
    ttl_s: int
    max_entries: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What the settings say."""
        return cls(
            settings.cache_enabled,
            settings.cache_enabled and settings.cache_semantic,
            settings.cache_scope,
            settings.cache_ttl_s,
            settings.cache_max_entries,
        )


class CacheAdmin:
    """Counts and clears.

    Args:
        cache: The cache.
        vectors: Finds what is to go.
        settings: How long a count may take.
    """

    def __init__(self, cache: ResponseCache, vectors: Vectors, settings: Settings) -> None:
        self._cache = cache
        self._vectors = vectors
        self._limit_s = settings.cache_timeout_s
        self._shared = settings.cache_scope == "shared"

    async def stats(self) -> CacheStats:
        """How the cache does now; what has just been answered is counted, if the store takes it in time."""
        cache = self._cache
        await cache.writer.idle(self._limit_s)
        entries: int | None = None
        with suppress(StoreError):
            entries = await cache.store.count(COLLECTION)
        return CacheStats(
            entries=entries,
            hits=cache.results["hit"],
            misses=cache.results["miss"],
            bypassed=cache.results["bypass"],
            errors=cache.results["error"],
            memory_entries=len(cache.memory),
            memory_bytes=cache.memory.size_bytes,
            waiting=cache.writer.waiting,
            dropped=cache.writer.dropped,
        )

    async def clear(self, *, user: str | None = None, model: str | None = None) -> int:
        """Take out everything, or everything of this user and this model; how many answers that were.

        Raises:
            ValidationError: No answer is one user's, because all of them share theirs.
            UpstreamError: The store did not do it, or not all of it.
        """
        cache = self._cache
        if user is not None and self._shared:
            raise ValidationError("The cache is shared (CACHE_SCOPE): no answer in it is one user's.")
        # Calls under way do not bring back what is being cleared.
        cache.epoch += 1
        equal: dict[str, str] = {}
        if user is not None:
            equal["tenant"] = cache.tenant(user)
        if model is not None:
            equal["model"] = model
        cache.memory.clear(tenant=equal.get("tenant"), model=model)
        # What waits is written, and taken out with the rest; what the store does not take is forgotten.
        await cache.writer.idle(self._limit_s)
        try:
            async with cache.writer.paused():
                cleared = await self._clear_store(equal)
        except StoreError as error:
            raise UpstreamError(
                f"The cache's store did not do it ({error.reason}). Try again.", label=error.reason
            ) from None
        # Look-ups that read the store while it was being cleared do not bring back what they found.
        cache.epoch += 1
        cache.memory.clear(tenant=equal.get("tenant"), model=model)
        return cleared

    async def _clear_store(self, equal: dict[str, str]) -> int:
        store = self._cache.store
        cleared = 0
        for collection in await store.collections():
            if equal:
                gone = await self._clear_some(collection, equal)
            else:
                gone = await store.count(collection)
                await store.drop(collection)
                if collection == COLLECTION:
                    # Other processes are not to find it missing.
                    await store.prepare(COLLECTION)
            cleared += gone if collection == COLLECTION else 0
        return cleared

    async def _clear_some(self, collection: str, equal: dict[str, str]) -> int:
        gone = 0
        while True:
            ids = await self._cache.store.ids(collection, self._vectors.having(collection, equal, PAGE))
            await self._cache.store.delete(collection, ids)
            gone += len(ids)
            if len(ids) < PAGE:
                return gone
