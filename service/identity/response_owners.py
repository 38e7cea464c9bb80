"""The owners of stored responses: who made which response, and with which model.

A response that a provider stores can be read, continued and deleted by whoever knows its id and has the
provider's key, which all callers of this service share. So each id is kept here with the caller who got it.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import cachetools
import sqlalchemy as sa

from service.errors import DependencyUnavailableError
from service.identity.database import Database, DatabaseFailedError, metadata

RETENTION_S: Final = 30 * 86_400
"""OpenAI keeps a response for 30 days."""

MAX_IN_MEMORY: Final = 10_000
MAX_NAME_CHARS: Final = 256
RETRY_INTERVAL_S: Final = 1.0
"""How often the rows that a failing database has not taken are written again."""

MAX_EACH: Final = 200_000
"""Rows of one caller that stay when rows are removed. LiteLLM gives a response another id in each answer, so
polling makes rows."""

PURGE_INTERVAL_S: Final = 3_600.0
PURGE_ROWS: Final = 1_000
"""Rows that one transaction removes, so that others do not wait for long."""

WRITTEN_ROWS: Final = 500
"""Rows that one transaction writes after an outage."""

TABLE: Final = sa.Table(
    "response_owners",
    metadata,
    sa.Column("id_hash", sa.LargeBinary(32), primary_key=True),
    sa.Column("owner", sa.String(MAX_NAME_CHARS), nullable=False),
    sa.Column("model", sa.String(MAX_NAME_CHARS), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Index("response_owners_created_at", "created_at"),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """Who made a response, and with which model."""

    owner: str
    model: str


@dataclass(frozen=True, slots=True)
class _Row:
    stored: StoredResponse
    created_at: int


@asynccontextmanager
async def open_response_owners(database: Database) -> AsyncIterator["ResponseOwners"]:
    """The owners of stored responses; on exit, what the database has not taken is offered to it once more."""
    owners = ResponseOwners(database)
    yield owners
    with suppress(DatabaseFailedError):  # it has been logged
        await owners.write()


class ResponseOwners:
    """Keeps the owner of each stored response.

    A database that fails fails no call: ids of this process are answered from memory, and what the database
    has not taken is written when it works again.

    Args:
        database: Where they are kept.
        max_in_memory: How many ids of this process are answered without the database.
        max_each: How many rows of one caller stay when rows are removed.
        now: Unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_in_memory: int = MAX_IN_MEMORY,
        max_each: int = MAX_EACH,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._max_each = max_each
        self._now = now
        self._known: cachetools.LRUCache[bytes, _Row] = cachetools.LRUCache(max_in_memory)
        # What the database has not taken: a row, or None for one that must go.
        self._unwritten: cachetools.LRUCache[bytes, _Row | None] = cachetools.LRUCache(max_in_memory)

    async def keep(self, response_id: str, owner: str, model: str) -> None:
        """Keep the owner of a response, before anybody is told its id; does not raise.

        The first owner of an id stays its owner: a second one is a provider's fault, or an attempt to get at
        the first one's response.
        """
        key, row = _hash(response_id), self._row(owner, model)
        known = self._from_memory(key)
        if known is None:
            known = await self._keep_new(key, row)
        if known.owner != row.stored.owner:
            # Neither the id nor the other owner: the line belongs to this caller's request.
            logger.warning("The upstream gave a response's id that belongs to another caller")

    async def _keep_new(self, key: bytes, row: _Row) -> StoredResponse:
        if self._database.failing(writes=True):
            # Not on the caller's time: `run` tries the database again.
            self._defer({key: row})
            return row.stored
        try:
            kept = await self._database.run("keep", partial(self._insert, key, row), writes=True)
        except DatabaseFailedError:
            self._defer({key: row})
            return row.stored
        self._known[key] = kept
        return kept.stored

    def _insert(self, key: bytes, row: _Row, connection: sa.Connection) -> _Row:
        """Write a row, unless there is one that has not expired; the row that is there then."""
        values = {"owner": row.stored.owner, "model": row.stored.model, "created_at": row.created_at}
        insert = self._database.insert(TABLE).values(id_hash=key, **values)
        written = connection.execute(
            insert.on_conflict_do_update(
                index_elements=["id_hash"], set_=values, where=TABLE.c.created_at < self._oldest()
            )
        )
        if written.rowcount == 1:
            return row
        return self._select(key, connection) or row

    async def keep_items(self, item_ids: Iterable[str], owner: str, model: str) -> None:
        """Keep the owner of a response's items, which can be referred to by their ids; as ``keep``."""
        row = self._row(owner, model)
        batch = {key: row for key in map(_hash_of_item, item_ids) if self._from_memory(key) is None}
        if not batch:
            return
        if self._database.failing(writes=True):
            self._defer(batch)
            return
        try:
            self._known.update(await self._database.run("keep", partial(self._write_all, batch), writes=True))
        except DatabaseFailedError:
            self._defer(batch)

    async def find_items(self, item_ids: Iterable[str]) -> dict[str, StoredResponse]:
        """The owners of those items that are known.

        Raises:
            DependencyUnavailableError: The database failed, so that it is not known.
        """
        found: dict[str, StoredResponse] = {}
        missing: dict[bytes, str] = {}
        for item_id in item_ids:
            key = _hash_of_item(item_id)
            known = self._from_memory(key)
            if known is not None:
                found[item_id] = known
            else:
                missing[key] = item_id
        if missing:
            try:
                rows = await self._database.run("find", partial(self._select_all, missing), writes=False)
            except DatabaseFailedError:
                raise DependencyUnavailableError from None
            self._known.update(rows)
            found |= {missing[key]: row.stored for key, row in rows.items()}
        return found

    def _select_all(self, keys: Iterable[bytes], connection: sa.Connection) -> dict[bytes, _Row]:
        columns = TABLE.c.id_hash, TABLE.c.owner, TABLE.c.model, TABLE.c.created_at
        rows = connection.execute(
            sa.select(*columns).where(TABLE.c.id_hash.in_(keys), TABLE.c.created_at >= self._oldest())
        )
        return {bytes(row[0]): _Row(StoredResponse(row[1], row[2]), row[3]) for row in rows}

    async def find(self, response_id: str) -> StoredResponse | None:
        """The owner and the model of a response; None where nobody has made it, or its time is over.

        Raises:
            DependencyUnavailableError: The database failed, so that it is not known.
        """
        key = _hash(response_id)
        known = self._from_memory(key)
        if known is not None or key in self._unwritten:
            return known
        try:
            row = await self._database.run("find", partial(self._select, key), writes=False)
        except DatabaseFailedError:
            raise DependencyUnavailableError from None
        if row is None:
            return None
        self._known[key] = row
        return row.stored

    def _select(self, key: bytes, connection: sa.Connection) -> _Row | None:
        found = connection.execute(
            sa.select(TABLE.c.owner, TABLE.c.model, TABLE.c.created_at).where(
                TABLE.c.id_hash == key, TABLE.c.created_at >= self._oldest()
            )
        ).one_or_none()
        return None if found is None else _Row(StoredResponse(found[0], found[1]), found[2])

    async def forget(self, response_id: str) -> None:
        """Forget a response that does not exist any more; does not raise."""
        key = _hash(response_id)
        self._known.pop(key, None)
        # Until the database has done it, this process knows that it must.
        self._unwritten[key] = None
        if self._database.failing(writes=True):
            return
        try:
            await self._database.run("forget", partial(_delete, key), writes=True)
        except DatabaseFailedError:
            return
        # A new owner of the same id may have come meanwhile.
        if key in self._unwritten and self._unwritten[key] is None:
            del self._unwritten[key]

    async def run(self) -> None:
        """Write what a failing database has not taken, and remove what has expired, until cancelled."""
        purge_at = time.monotonic()
        while True:
            try:
                await self.write()
                if time.monotonic() >= purge_at:
                    await self.purge()
                    purge_at = time.monotonic() + PURGE_INTERVAL_S
            except DatabaseFailedError:
                pass  # it has been logged
            except Exception:
                # A bug here must not take the lifespan down with it, and the requests in flight.
                logger.exception("The owners of responses could not be written")
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def write(self) -> None:
        """Write what the database has not taken; raises ``DatabaseFailedError``."""
        while batch := dict(list(self._unwritten.items())[:WRITTEN_ROWS]):
            kept = await self._database.run("keep", partial(self._write_all, batch), writes=True)
            for key, row in batch.items():
                # It may have changed meanwhile.
                if key in self._unwritten and self._unwritten[key] is row:
                    del self._unwritten[key]
                # The database may have had an owner whom this process did not know.
                if key in self._known and key in kept:
                    self._known[key] = kept[key]

    def _write_all(self, batch: Mapping[bytes, _Row | None], connection: sa.Connection) -> dict[bytes, _Row]:
        kept: dict[bytes, _Row] = {}
        for key, row in batch.items():
            if row is None:
                _delete(key, connection)
            else:
                kept[key] = self._insert(key, row, connection)
        return kept

    async def purge(self) -> int:
        """Remove the rows whose time is over, and the oldest ones of callers who have too many.

        Returns how many; raises ``DatabaseFailedError``.
        """
        removed = 0
        for delete in (self._delete_expired, self._delete_excess):
            while count := await self._database.run("purge", delete, writes=True):
                removed += count
        return removed

    def _delete_excess(self, connection: sa.Connection) -> int:
        number = sa.func.count()
        counted = sa.select(TABLE.c.owner, number).group_by(TABLE.c.owner).having(number > self._max_each)
        removed = 0
        for owner, count in connection.execute(counted).all():
            oldest = (
                sa.select(TABLE.c.id_hash)
                .where(TABLE.c.owner == owner)
                .order_by(TABLE.c.created_at)
                .limit(min(PURGE_ROWS, count - self._max_each))
            )
            removed += connection.execute(sa.delete(TABLE).where(TABLE.c.id_hash.in_(oldest))).rowcount
        return removed

    def _delete_expired(self, connection: sa.Connection) -> int:
        expired = sa.select(TABLE.c.id_hash).where(TABLE.c.created_at < self._oldest()).limit(PURGE_ROWS)
        return connection.execute(sa.delete(TABLE).where(TABLE.c.id_hash.in_(expired))).rowcount

    def _row(self, owner: str, model: str) -> _Row:
        """A row that every database takes: PostgreSQL's texts have no NUL."""
        names = (text.replace("\0", "")[:MAX_NAME_CHARS] for text in (owner, model))
        return _Row(StoredResponse(*names), int(self._now()))

    def _defer(self, rows: Mapping[bytes, _Row]) -> None:
        """Keep rows in memory until the database takes them; a caller has a quarter of the places."""
        owners = {row.stored.owner for row in rows.values()}
        own = sum(1 for other in self._unwritten.values() if other and other.stored.owner in owners)
        for number, (key, row) in enumerate(rows.items(), own):
            place = self._unwritten if number < self._unwritten.maxsize / 4 else self._known
            place[key] = row

    def _from_memory(self, key: bytes) -> StoredResponse | None:
        # Not of the first alone: whoever reads much would push out what is nowhere else.
        row = self._unwritten.get(key) if key in self._unwritten else self._known.get(key)
        return None if row is None or row.created_at < self._oldest() else row.stored

    def _oldest(self) -> int:
        return int(self._now()) - RETENTION_S


def _delete(key: bytes, connection: sa.Connection) -> None:
    connection.execute(sa.delete(TABLE).where(TABLE.c.id_hash == key))


def _hash(response_id: str) -> bytes:
    """What stands for an id in memory and on disk, where it cannot be used to get at the response."""
    return hashlib.sha256(response_id.encode("utf-8", "surrogatepass")).digest()


def _hash_of_item(item_id: str) -> bytes:
    """As ``_hash``; the ids of items are apart from those of responses."""
    return _hash(f"item {item_id}")
