"""Finds out what became of a request: in memory first, then, in a bounded thread, on disk and in MLflow."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from service.config.settings import Settings
from service.errors import NotFoundError, OverloadedError
from service.explain.links import Links
from service.explain.report import Explanation, Kept, RequestReport, report_of
from service.recording.mlflow import NoTracker, Tracker, TrackerError, in_thread
from service.recording.recent import RecentRequests, Remembered
from service.recording.request_key import RequestKey
from service.recording.search import MAX_FOUND, SEARCHED, Found, search_mlflow, search_spools

SEARCHES: Final = 4
SEARCHES_PER_USER: Final = 2
"""How many searches of disk and MLflow there may be at the same time, in all and of one user."""

LIMIT_S: Final = 8.0
"""Time limit of one search. A request to MLflow has ``MLFLOW_TIMEOUT_S``."""

BUSY: Final = "busy"
NOT_NEEDED: Final = "not needed"
TOO_LATE: Final = "failed: Timeout"
NOTHING: Final = (
    "Nothing is known of this id. Calls are kept, and requests that failed; another process may remember it."
)


class Explainer:
    """Answers what became of an id. A user is told about their own requests, an administrator about all.

    Args:
        recent: The memory of this process.
        spool: The folder of the spools.
        tracker: MLflow, if it is used. One of its own: the recorder's waits for exports.
        links: Makes the links.
        limit_s: Time limit of a search.
    """

    def __init__(
        self,
        recent: RecentRequests,
        spool: Path,
        tracker: Tracker | NoTracker,
        links: Links,
        limit_s: float = LIMIT_S,
    ) -> None:
        self.recent = recent
        self._spool = spool
        self._tracker = tracker
        self._links = links
        self._limit_s = limit_s
        self._searching: Counter[str] = Counter()
        self._experiment_id: str | None = None

    async def explain(self, key: RequestKey, asker: str, *, sees_all: bool) -> Explanation:
        """What became of the requests of an id.

        Args:
            key: The id.
            asker: The name of the user who asks.
            sees_all: Whether the requests of others are shown too.

        Raises:
            NotFoundError: Nothing is known, or nothing that this user may see; the two look the same.
            OverloadedError: Too many searches are going on.
        """
        user = None if sees_all else asker
        remembered = [found for found in self.recent.find(key) if user in {None, found.user}]
        searched: dict[str, str] = {"memory": SEARCHED}
        spooled = asked = Found((), NOT_NEEDED, complete=True)
        settled = bool(remembered) and all(_is_whole(key, found) for found in remembered)
        if not settled or any(found.call is not None for found in remembered):
            spooled, asked = await self._search(key, user, asker, with_mlflow=not settled)
        searched |= {"spool": spooled.state, "mlflow": asked.state}
        if not (remembered or spooled.records or asked.records):
            if BUSY in searched.values():
                raise OverloadedError("Too many ids are being searched for. Try again later.")
            raise NotFoundError(_nothing(searched))
        requests, cut = self._merged(remembered, spooled, asked)
        more = cut or (not settled and not (spooled.complete and asked.complete))
        return Explanation(id=key.text, kind=key.kind, requests=tuple(requests), more=more, searched=searched)

    def _merged(
        self, remembered: list[Remembered], spooled: Found, asked: Found
    ) -> tuple[list[RequestReport], bool]:
        """Each request once, oldest first, and whether some were left out."""
        waiting = {record.record_id for record in spooled.records}
        in_mlflow: Kept = "mlflow"
        in_spool: Kept = "spool"
        calls = {record.record_id: (record, in_mlflow) for record in asked.records} | {
            record.record_id: (record, in_spool) for record in spooled.records
        }
        parts: list[tuple[Remembered, Kept]] = []
        for found in remembered:
            call = found.call
            if call is None and found.failed is not None and found.failed.called:
                same = (one for one, _ in calls.values() if one.incident_id == found.failed.incident_id)
                call = next(same, None)
            if call is not None:
                calls.pop(call.record_id, None)
            parts.append((Remembered(call, found.failed), "memory"))
        parts += [(Remembered(record, None), kept) for record, kept in calls.values()]
        parts.sort(key=lambda part: part[0].started_ns)
        reports = [
            report_of(
                found,
                kept,
                waits=found.call is not None and found.call.record_id in waiting,
                links=self._links.of(
                    found.trace_id,
                    None if found.call is None else found.call.record_id,
                    found.started_ns,
                    self._experiment_id,
                ),
            )
            for found, kept in parts[-MAX_FOUND:]
        ]
        return reports, len(parts) > MAX_FOUND

    async def _search(
        self, key: RequestKey, user: str | None, asker: str, *, with_mlflow: bool
    ) -> tuple[Found, Found]:
        """Search disk and MLflow in a thread; what is not done in time is left out."""
        if self._searching.total() >= SEARCHES or self._searching[asker] >= SEARCHES_PER_USER:
            return Found((), BUSY, complete=False), Found((), BUSY, complete=False)
        self._searching[asker] += 1
        loop = asyncio.get_running_loop()
        late = Found((), TOO_LATE, complete=False)
        found: dict[str, Found] = {}

        def work() -> None:
            try:
                found["spool"] = search_spools(self._spool, key, user)
                if with_mlflow:
                    found["mlflow"] = search_mlflow(self._tracker, key, user)
                self._learn_experiment()
            finally:
                # A thread that nobody waits for any more keeps its place until the disk or MLflow answers.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._ended, asker)

        with suppress(TimeoutError):
            async with asyncio.timeout(self._limit_s):
                await in_thread(work, "explain")
        asked = found.get("mlflow", late) if with_mlflow else Found((), NOT_NEEDED, complete=True)
        return found.get("spool", late), asked

    def _ended(self, asker: str) -> None:
        self._searching[asker] -= 1
        if not self._searching[asker]:
            del self._searching[asker]

    def _learn_experiment(self) -> None:
        """Ask once for what links to records need."""
        if self._links.mlflow_url and self._experiment_id is None and isinstance(self._tracker, Tracker):
            with suppress(TrackerError):
                self._experiment_id = self._tracker.experiment_id()


def _is_whole(key: RequestKey, found: Remembered) -> bool:
    """Whether there is nothing else to be found by this id."""
    if key.kind == "request" and found.continued:
        return False
    return found.call is not None or (found.failed is not None and not found.failed.called)


def _nothing(searched: Mapping[str, str]) -> str:
    failed = [f"{name} ({state})" for name, state in searched.items() if state.startswith("failed")]
    return f"{NOTHING} Not everything could be searched: {', '.join(failed)}." if failed else NOTHING


def open_explainer(settings: Settings, resource: Mapping[str, str], recent: RecentRequests) -> Explainer:
    """What explains the requests of this process; nothing is opened before the first search."""
    tracker = Tracker(settings, resource) if settings.mlflow_tracking_uri else NoTracker()
    return Explainer(recent, Path(settings.spool_path), tracker, Links.from_settings(settings))
