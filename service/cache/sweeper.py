"""Takes out of the store what is too old, too much, or damaged; in the background, a little at a time."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager

from opentelemetry.context import Context
from opentelemetry.trace import Span, Tracer

from service.cache.store import CacheStore, StoreError, VectorStore
from service.telemetry import names

INTERVAL_S = 60.0
PAGE = 1_000
MAX_PAGES = 50
"""A round takes out so many pages of a collection at most; what is left is the next round's."""

SLACK = 20
"""A round begins early when a twentieth of the entries are new."""

MAX_DOOMED = 1_000

logger = logging.getLogger(__name__)


class CacheSweeper:
    """Keeps the store within its bounds.

    Args:
        store: The store.
        vectors: Finds what is to go.
        max_entries: How many points a collection may have.
        tracer: For the one root span of a round.
        interval_s: Seconds between two rounds.
        now: Unix time in seconds.
    """

    def __init__(  # noqa: PLR0913 - ends, a bound and seams
        self,
        store: CacheStore,
        vectors: VectorStore,
        max_entries: int,
        tracer: Tracer,
        *,
        interval_s: float = INTERVAL_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._vectors = vectors
        self._max_entries = max_entries
        self._tracer = tracer
        self._interval_s = interval_s
        self._now = now
        self._written = 0
        self._wake = asyncio.Event()
        self._doomed: dict[str, set[str]] = defaultdict(set)

    def mark_for_removal(self, collection: str, point_id: str) -> None:
        """Let a point be taken out soon."""
        if len(self._doomed[collection]) < MAX_DOOMED:
            self._doomed[collection].add(point_id)
        self._wake.set()

    def count_written(self, points: int) -> None:
        """Note that points were written; many of them bring the next round forward."""
        self._written += points
        if self._many_written:
            self._wake.set()

    @property
    def _many_written(self) -> bool:
        return self._written * SLACK >= self._max_entries

    async def run(self) -> None:
        """Sweep for ever; ends by cancellation only."""
        while True:
            due = False
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()
            except TimeoutError:
                due = True
            self._wake.clear()
            try:
                if due or self._many_written:
                    await self.sweep()
                else:
                    with self._round():
                        await self._take_out_doomed()
            except StoreError:
                # Said by the store; the next round finds what this one did not reach.
                await asyncio.sleep(1)
            except Exception:
                # A bug here must not end the lifespan.
                logger.exception("The cache could not be swept")
                await asyncio.sleep(1)

    def _round(self) -> AbstractContextManager[Span]:
        return self._tracer.start_as_current_span(
            names.SPAN_CACHE_SWEEP, context=Context(), record_exception=False, set_status_on_exception=False
        )

    async def sweep(self) -> int:
        """One round; how many points it took out. Raises ``StoreError``."""
        self._written = 0
        with self._round() as span:
            gone = await self._take_out_doomed()
            for collection in await self._store.collections():
                gone += await self._sweep_expired(collection)
                gone += await self._sweep_excess(collection)
            span.set_attribute(names.ATTR_CACHE_ENTRIES, gone)
        return gone

    async def _take_out_doomed(self) -> int:
        gone = 0
        while self._doomed:
            collection, ids = self._doomed.popitem()
            await self._store.delete(collection, list(ids))
            gone += len(ids)
        return gone

    async def _sweep_expired(self, collection: str) -> int:
        gone = 0
        for _ in range(MAX_PAGES):
            finding = self._vectors.expired(collection, self._now(), PAGE)
            ids = await self._store.ids(collection, finding)
            await self._store.delete(collection, ids)
            gone += len(ids)
            if len(ids) < PAGE:
                break
        return gone

    async def _sweep_excess(self, collection: str) -> int:
        gone = 0
        excess = await self._store.count(collection) - self._max_entries
        for _ in range(MAX_PAGES):
            if gone >= excess:
                break
            finding = self._vectors.oldest(collection, min(PAGE, excess - gone))
            ids = await self._store.ids(collection, finding)
            if not ids:
                break
            await self._store.delete(collection, ids)
            gone += len(ids)
        return gone
