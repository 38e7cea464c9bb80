"""Tells the processes that share a database what one of them has changed: keys, users and teams.

A change is a row of ``identity_changes``, written in the transaction of the change itself and read by every
process each ``POLL_INTERVAL_S``. As long as it can be read, what a process remembers is no older than that.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

import sqlalchemy as sa

from service.identity.database import Database, DatabaseFailedError, metadata
from service.identity.principal import MAX_NAME_CHARS

POLL_INTERVAL_S: Final = 2.0
MAX_CHANGES: Final = 2_000
"""How many changes are kept, and read at a time; a process that is further behind forgets all that it knows.
They are kept by their number and not by their age, as the clocks of two machines may differ."""

CHANGES: Final = sa.Table(
    "identity_changes",
    metadata,
    # Of SQLite only this type counts up by itself.
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.String(MAX_NAME_CHARS), nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

Reader = Callable[[Collection[str] | None], Awaitable[None]]

logger = logging.getLogger(__name__)


def note_change(connection: sa.Connection, kind: str, name: str, now_s: int) -> None:
    """Note in a transaction what it changes."""
    insert = sa.insert(CHANGES).values(kind=kind, name=name, at=now_s)
    number = connection.execute(insert.returning(CHANGES.c.number)).scalar_one()
    connection.execute(sa.delete(CHANGES).where(CHANGES.c.number < number - MAX_CHANGES))


class ChangeFeed:
    """Reads the changes, and hands each kind to whoever remembers what it is about.

    Args:
        database: Where they are.
        stale_s: How long what is remembered may be used while the changes cannot be read.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self, database: Database, stale_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._stale_s = stale_s
        self._clock = clock
        self._readers: dict[str, Reader] = {}
        self._last = 0
        self._seen: set[int] = set()
        self._read_at: float | None = None

    def subscribe(self, kind: str, reader: Reader) -> None:
        """Call a reader with the names of what has changed; None stands for everything, as at the start."""
        self._readers[kind] = reader

    @property
    def is_stale(self) -> bool:
        """Whether the changes could not be read for so long that nothing remembered may be used."""
        return self._read_at is None or self._clock() - self._read_at > self._stale_s

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            try:
                await self.poll()
            except DatabaseFailedError:
                pass  # it has been logged
            except Exception:
                # A bug here must not take the lifespan down with it, and the requests in flight.
                logger.exception("The changes of keys, users and teams could not be read")
            await asyncio.sleep(POLL_INTERVAL_S)

    async def poll(self) -> None:
        """Read the changes once.

        Raises:
            DatabaseFailedError: What is remembered stays, and the changes are read again.
        """
        started_s = self._clock()
        rows = await self._database.run("poll", self._select, writes=False)
        newest = max((row.number for row in rows), default=0)
        missed = (
            self._read_at is None
            or newest - self._last > MAX_CHANGES
            # The newest is never deleted: the database was replaced, by a backup for example.
            or newest < self._last
        )
        new = [row for row in rows if row.number not in self._seen]
        for kind, reader in self._readers.items():
            names = {row.name for row in new if row.kind == kind}
            if missed or names:
                await reader(None if missed else names)
        self._seen = {row.number for row in rows}
        self._last = newest
        self._read_at = started_s

    def _select(self, connection: sa.Connection) -> list[sa.Row[tuple[int, str, str, int]]]:
        # All that are kept, each time: a number may be given before others and be committed after them.
        return list(connection.execute(sa.select(CHANGES)))
