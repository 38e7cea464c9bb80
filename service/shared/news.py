"""What one process tells all others at once, for instance that a token was signed out.

News are entries of a log in the Valkey server. Each process waits for further ones over a connection of its
own, and goes on behind the last one that it has read after it was away. What is told while the server cannot
be had waits in this process.
"""

import asyncio
import logging
import math
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal, Protocol

from opentelemetry.metrics import Counter

from service.config.settings import Settings
from service.errors import ServiceError
from service.telemetry.instruments import Instruments

Topic = Literal["signed_out", "cache_cleared", "circuit", "spent"]
Facts = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Stream:
    """A log of its own: many entries of one kind cannot push out the few of another.

    Args:
        key: Its name in the server.
        max_entries: How many it keeps.
        told_at_once: How many are told in one round trip. If the connection fails in the middle, all are told
            again.
        read_at_once: How many are read in one round trip; the event loop does nothing else for as long.
        kept_s: A process that starts reads the entries that were told within so many seconds before the last.
    """

    key: str
    max_entries: int
    told_at_once: int
    read_at_once: int
    kept_s: float


NEWS: Final = Stream("llmops:news", 100_000, 1, 500, math.inf)
SPENT: Final = Stream("llmops:spent", 10_000, 100, 100, 120.0)
"""For the topic ``spent``: an entry for each call that counts for a budget, until the ledger has it."""

MAX_WAITING: Final = 1_000
"""News that wait for the server; of more, the oldest are dropped."""

MAX_FACT_CHARS: Final = 2_048
"""Longest value that is told or taken."""

WAIT_S: Final = 5.0
"""How long the server lets a reader wait for an entry. Asking again shows that it is still there."""

GRACE_S: Final = 2.0
"""Seconds that an answer may take beyond that, and that of any other: no request waits for it."""

CATCH_UP_S: Final = 1.0
"""How long the start waits for the news that are there."""

FLUSH_S: Final = 1.0
"""How long the stop waits until the others are told what waits."""

DELAYS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds before the server is tried again; the last one stands for all that follow."""

TOPIC: Final = "topic"
ORIGIN: Final = "origin"

logger = logging.getLogger(__name__)


def always() -> bool:
    """True."""
    return True


class News(Protocol):
    """Tells all processes something, and hears what they tell."""

    def on(self, topic: Topic, take: Callable[[Facts], None], *, kept: bool = False) -> None:
        """Let a function take what others tell about a topic.

        Args:
            topic: The topic.
            take: Takes it; raises ``ValueError`` or ``KeyError`` for what it does not understand.
            kept: Whether it also takes what was told before this process started.
        """
        ...

    def tell(self, topic: Topic, facts: Facts, still: Callable[[], bool] = always) -> None:
        """Tell all other processes; never waits and never fails.

        Args:
            topic: The topic.
            facts: What is told.
            still: Whether it must still be told, asked when the server can be had.
        """
        ...

    async def catch_up(self) -> None:
        """Read what is there, for a bounded time; for the start, when all who take it are known."""
        ...

    async def run(self) -> None:
        """Tell and hear until cancelled."""
        ...


class NoNews:
    """Stands for news where no server is configured: nobody else is there."""

    def on(self, topic: Topic, take: Callable[[Facts], None], *, kept: bool = False) -> None:
        """Nothing will come."""

    def tell(self, topic: Topic, facts: Facts, still: Callable[[], bool] = always) -> None:
        """Nobody hears it."""

    async def catch_up(self) -> None:
        """Nothing is there."""

    async def run(self) -> None:
        """Nothing is done in the background."""


class Log(Protocol):
    """A log of entries on a server that may be down; every method raises whatever its client raises."""

    async def append(self, entries: Sequence[Facts]) -> None:
        """Add entries; the oldest of too many are removed."""
        ...

    async def begin(self) -> str:
        """The id behind which a process that starts reads."""
        ...

    async def read(self, after: str, wait_s: float) -> Sequence[tuple[str, Facts]]:
        """The entries behind one, with their ids, oldest first; waits where there are none."""
        ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An entry that was not told yet."""

    entry: Facts
    still: Callable[[], bool]


@asynccontextmanager
async def open_news(
    settings: Settings, instruments: Instruments, stream: Stream = NEWS
) -> AsyncIterator[News]:
    """Open the news of all processes at ``VALKEY_URL``; without one, nothing is told."""
    url = settings.valkey_url.get_secret_value()
    if not url:
        yield NoNews()
        return
    from service.shared.valkey import open_log  # noqa: PLC0415 - as in ``open_shared``

    async with open_log(url, stream) as log:
        news = SharedNews(log, instruments.shared_news, at_once=stream.told_at_once)
        try:
            yield news
        finally:
            await news.flush()


class SharedNews:
    """News in a log that all processes read.

    Args:
        log: The log.
        counter: Counts what was told, heard and dropped, by topic.
        sleep: Waits for so many seconds.
        grace_s: Seconds that the server may take for an answer.
        at_once: How many entries are told in one round trip.
    """

    def __init__(
        self,
        log: Log,
        counter: Counter,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        grace_s: float = GRACE_S,
        at_once: int = 1,
    ) -> None:
        self._log = log
        self._counter = counter
        self._timeout_s = grace_s
        self._origin = secrets.token_hex(8)
        self._takes: dict[str, Callable[[Facts], None]] = {}
        self._kept: set[str] = set()
        self._starting = False
        self._at_once = at_once
        self._waiting: deque[_Waiting] = deque()
        self._dropping = self._puzzled = False
        self._wanted = asyncio.Event()
        self._sleep = sleep
        self._last = "0-0"

    def on(self, topic: Topic, take: Callable[[Facts], None], *, kept: bool = False) -> None:
        """Let a function take what others tell about a topic."""
        self._takes[topic] = take
        if kept:
            self._kept.add(topic)

    def tell(self, topic: Topic, facts: Facts, still: Callable[[], bool] = always) -> None:
        """Tell all other processes, as soon as the server takes it."""
        if any(len(value) > MAX_FACT_CHARS for value in facts.values()):
            logger.warning("Too long to be told to other processes: %s", topic)
            return
        if len(self._waiting) >= MAX_WAITING:
            self._drop(self._waiting.popleft())
        self._waiting.append(_Waiting({TOPIC: topic, ORIGIN: self._origin, **facts}, still))
        self._wanted.set()

    def _drop(self, waiting: _Waiting) -> None:
        if not waiting.still():
            return
        self._count(waiting.entry, "dropped")
        if not self._dropping:
            # Once, until the server takes something: there may be thousands.
            self._dropping = True
            logger.warning("Too much waits for Valkey: other processes do not learn of everything")

    async def catch_up(self) -> None:
        """Read what is there, for a bounded time; without the server, it is read when it is back."""
        self._starting = True
        with suppress(Exception):
            async with asyncio.timeout(CATCH_UP_S):
                self._last = await self._log.begin()
                while await self._hear(0.0):
                    pass
        self._starting = False

    async def flush(self) -> None:
        """Tell what waits, for a bounded time; for the stop, when ``run`` has ended."""
        with suppress(Exception):
            async with asyncio.timeout(FLUSH_S):
                while self._waiting:
                    await self._tell_next()

    async def run(self) -> None:
        """Tell and hear until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._again_and_again(self._tell_next))
            tasks.create_task(self._again_and_again(self._hear_next))

    async def _again_and_again(self, step: Callable[[], Awaitable[object]]) -> None:
        failures = 0
        while True:
            try:
                await step()
                failures = 0
            except Exception as error:  # noqa: BLE001 - the client raises whatever it meets
                # That the server fails is told by the health check and by the counts.
                logger.debug("No news from Valkey: %s", type(error).__name__)
                await self._sleep(DELAYS_S[min(failures, len(DELAYS_S) - 1)])
                failures += 1

    async def _tell_next(self) -> None:
        await self._wanted.wait()
        if not self._waiting:
            self._wanted.clear()
            return
        while self._waiting and not self._waiting[0].still():
            self._waiting.popleft()
        telling = list(islice(self._waiting, self._at_once))
        if not telling:
            return
        async with asyncio.timeout(self._timeout_s):
            await self._log.append([waiting.entry for waiting in telling])
        self._dropping = False
        for waiting in telling:
            # Not before: what was not added is told again. Some may have been dropped meanwhile.
            if self._waiting and self._waiting[0] is waiting:
                self._waiting.popleft()
            self._count(waiting.entry, "told")

    def _count(self, entry: Facts, outcome: str) -> None:
        self._counter.add(1, {"topic": entry[TOPIC], "outcome": outcome})

    async def _hear_next(self) -> None:
        await self._hear(WAIT_S)

    async def _hear(self, wait_s: float) -> int:
        """Read the next entries; how many there were."""
        async with asyncio.timeout(wait_s + self._timeout_s):
            entries = await self._log.read(self._last, wait_s)
        for identifier, entry in entries:
            self._last = identifier
            self._take(entry)
        return len(entries)

    def _take(self, entry: Facts) -> None:
        topic = entry.get(TOPIC, "")
        take = self._takes.get(topic)
        if take is None or entry.get(ORIGIN) == self._origin or (self._starting and topic not in self._kept):
            return
        reason = _reason_against(take, entry)
        self._count(entry, "unusable" if reason else "heard")
        if reason and not self._puzzled:
            # Once, until one is understood: there may be thousands.
            logger.warning("A message from another process is of no use: %s", reason)
        self._puzzled = bool(reason)


def _reason_against(take: Callable[[Facts], None], entry: Facts) -> str:
    """Let an entry be taken; why it was not, or an empty text."""
    if any(len(value) > MAX_FACT_CHARS for value in entry.values()):
        return "too long"
    try:
        take(entry)
    except (KeyError, ValueError, ServiceError) as error:
        # Of another version, or more than this process can hold.
        return type(error).__name__
    return ""
