"""The ledger: what was used, by day, user, team, key and model, and what was spent of budgets.

It is fed by the records of calls, in two ways. Each record goes from memory into the database within
``FLUSH_INTERVAL_S``; and a file of the spool is removed only when the database has its records, so that the
records of a process that was killed get there too. A record is counted once, whichever way it comes: its id
is inserted in the same transaction.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, Literal, TypeVar, cast

import cachetools
import sqlalchemy as sa

from service.config.settings import Settings
from service.errors import DependencyUnavailableError, ValidationError
from service.identity.budgets import (
    NANO,
    Budgets,
    Periods,
    Reading,
    Spent,
    Subject,
    as_name,
    count,
    is_unpriced,
    nano,
    periods_by,
    spent_by,
)
from service.identity.database import (
    TIMEOUT_S,
    Database,
    DatabaseFailedError,
    insert_of,
    metadata,
    see_one_moment,
)
from service.identity.keys import ID_CHARS
from service.identity.principal import MAX_NAME_CHARS, Scope
from service.recording.delivery import NotBookedError
from service.recording.record import CallRecord
from service.telemetry.instruments import Instruments

FLUSH_INTERVAL_S: Final = 1.0
POLL_INTERVAL_S: Final = 2.0
"""How often it is read what other processes have booked."""

CHANGED_S: Final = 60
"""How far back it is read: the clocks of the machines may differ by so much."""

BATCH: Final = 500
"""Records of one transaction, and ids of one question."""

LATEST: Final = 2_000
"""How many of the records booked last are read with what was spent: calls of which other processes may tell
later, or have told while it was read."""

MAX_WAITING: Final = 50_000
"""Records that wait in memory while the database fails; more of them come from the spool only."""

MAX_BOOKED: Final = 50_000
"""How many of the records booked last are remembered, so that the spool's files need not be booked again."""

DAY_S: Final = 86_400.0
PURGE_INTERVAL_S: Final = 3_600.0
PURGE_ROWS: Final = 5_000
USAGE_DAYS: Final = 1_100
"""How long usage and spent budgets are kept."""

MAX_ROWS: Final = 10_000
"""Most rows of one answer about usage."""

OTHER_MODEL: Final = "other"
"""Stands for the model of a failed call that the upstream does not list: callers can make up any number."""

USAGE: Final = sa.Table(
    "usage_by_day",
    metadata,
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("user_name", sa.String(MAX_NAME_CHARS), primary_key=True),
    # Empty where there is none, as NULL is equal to nothing.
    sa.Column("team", sa.String(MAX_NAME_CHARS), primary_key=True),
    sa.Column("key_id", sa.String(ID_CHARS), primary_key=True),
    sa.Column("model", sa.String(MAX_NAME_CHARS), primary_key=True),
    sa.Column("calls", sa.BigInteger, nullable=False),
    sa.Column("cached", sa.BigInteger, nullable=False),
    sa.Column("errors", sa.BigInteger, nullable=False),
    sa.Column("unpriced", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cost_nano", sa.BigInteger, nullable=False),
    sa.Column("saved_cost_nano", sa.BigInteger, nullable=False),
    sa.Index("usage_by_day_user", "user_name", "day"),
)
RECORDS: Final = sa.Table(
    "usage_records",
    metadata,
    sa.Column("record_id", sa.String(32), primary_key=True),
    sa.Column("taken_at", sa.BigInteger, nullable=False, index=True),
)
SPENT: Final = sa.Table(
    "budget_spent",
    metadata,
    sa.Column("scope", sa.String(8), primary_key=True),
    sa.Column("name", sa.String(MAX_NAME_CHARS), primary_key=True),
    sa.Column("period", sa.String(10), primary_key=True),
    sa.Column("cost_nano", sa.BigInteger, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("changed_at", sa.BigInteger, nullable=False, index=True),
)

Dimension = Literal["day", "model", "user", "team", "key"]
COLUMNS: Final[Mapping[Dimension, sa.Column[Any]]] = {
    "day": USAGE.c.day,
    "model": USAGE.c.model,
    "user": USAGE.c.user_name,
    "team": USAGE.c.team,
    "key": USAGE.c.key_id,
}
DIMENSIONS: Final = tuple(COLUMNS)
COUNTS: Final = ("calls", "cached", "errors", "prompt_tokens", "completion_tokens", "unpriced")
MONEY: Final = {"cost": "cost_nano", "saved_cost": "saved_cost_nano"}

Totals = Mapping[tuple[Subject, str], Spent]
Insert = Callable[[sa.Table], Any]
Known = Callable[[str], str]
Item = TypeVar("Item")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What is asked about usage.

    Args:
        since: The first day.
        until: The last day.
        by: What the rows are grouped by.
        user: Only this user's calls.
    """

    since: date
    until: date
    by: tuple[Dimension, ...]
    user: str | None = None


UsageRow = Mapping[str, str | int | float | None]


def write_records(
    connection: sa.Connection, insert: Insert, records: Sequence[CallRecord], known: Known, now_s: float
) -> Collection[str]:
    """Add calls to the ledger in the connection's transaction; those that it has change nothing.

    Returns the ids of those that it did not have.
    """
    by_id = {record.record_id: record for record in records}
    # Rows as parameters, not as values of one statement, which SQLAlchemy would compile each time.
    rows = [{"record_id": name, "taken_at": int(now_s)} for name in sorted(by_id)]
    adding = insert(RECORDS).on_conflict_do_nothing().returning(RECORDS.c.record_id)
    inserted = frozenset(connection.execute(adding, rows).scalars())
    if inserted:
        sums = _summed([by_id[record_id] for record_id in sorted(inserted)], known)
        _add_usage(connection, insert, sums)
        _add_spent(connection, insert, sums, int(now_s))
    return inserted


Place = tuple[Periods, str, str, str, str]
"""Periods, user, team, key and model; empty where there is no team or key."""


def _summed(records: Iterable[CallRecord], known: Known) -> dict[Place, list[int]]:
    """The sums of ``COUNTS``, of ``MONEY`` and of the tokens that count for budgets, by place."""
    sums: dict[Place, list[int]] = {}
    for record in records:
        spent = spent_by(record)
        place = (
            periods_by(record),
            as_name(record.user),
            as_name(record.team or ""),
            as_name(record.key_id or "")[:ID_CHARS],
            as_name(_model_of(record, known)),
        )
        found = sums.setdefault(place, [0] * (len(COUNTS) + len(MONEY) + 1))
        for number, value in enumerate(
            (
                1,
                record.outcome == "cached",
                record.outcome == "error",
                count(record.prompt_tokens),
                count(record.completion_tokens),
                is_unpriced(record),
                spent.cost_nano,
                nano(record.saved_cost),
                spent.tokens,
            )
        ):
            found[number] += value
    return sums


def _add_usage(connection: sa.Connection, insert: Insert, sums: Mapping[Place, Sequence[int]]) -> None:
    keys, names = ("user_name", "team", "key_id", "model"), (*COUNTS, *MONEY.values())
    # In the order of their keys: two processes that lock rows in different orders would wait for each other.
    rows = [
        {
            "day": date.fromisoformat(place[0][0]),
            **dict(zip(keys, place[1:], strict=True)),
            **dict(zip(names, sums[place], strict=False)),
        }
        for place in sorted(sums)
    ]
    added = insert(USAGE)
    added = added.on_conflict_do_update(
        index_elements=["day", *keys], set_={name: USAGE.c[name] + added.excluded[name] for name in names}
    )
    connection.execute(added, rows)


def _places_of(sums: Mapping[Place, Sequence[int]]) -> dict[tuple[Scope, str, str], Spent]:
    """What was spent by each subject in each period."""
    spent: dict[tuple[Scope, str, str], Spent] = {}
    for (periods, user, team, key_id, _model), summed in sums.items():
        more = Spent(summed[len(COUNTS)], summed[-1])
        for period in periods:
            subjects: tuple[Subject, ...] = (("user", user), ("team", team), ("key", key_id))
            for scope, name in subjects:
                if name:
                    place = scope, name, period
                    spent[place] = spent.get(place, Spent()) + more
    return spent


def _select_booked(connection: sa.Connection, record_ids: Collection[str]) -> frozenset[str]:
    """Which of these records the ledger has."""
    found: set[str] = set()
    for batch in _batches(sorted(record_ids)):
        query = sa.select(RECORDS.c.record_id).where(RECORDS.c.record_id.in_(batch))
        found.update(connection.execute(query).scalars())
    return frozenset(found)


def _add_spent(
    connection: sa.Connection, insert: Insert, sums: Mapping[Place, Sequence[int]], now_s: int
) -> None:
    spent = _places_of(sums)
    rows = [
        {
            "scope": place[0],
            "name": place[1],
            "period": place[2],
            "cost_nano": spent[place].cost_nano,
            "tokens": spent[place].tokens,
            "changed_at": now_s,
        }
        for place in sorted(spent)
    ]
    added = insert(SPENT)
    added = added.on_conflict_do_update(
        index_elements=["scope", "name", "period"],
        set_={
            "cost_nano": SPENT.c.cost_nano + added.excluded.cost_nano,
            "tokens": SPENT.c.tokens + added.excluded.tokens,
            "changed_at": added.excluded.changed_at,
        },
    )
    connection.execute(added, rows)


def _totals_of(rows: Iterable[Any]) -> Totals:
    return {
        ((cast("Scope", row.scope), row.name), row.period): Spent(row.cost_nano, row.tokens) for row in rows
    }


def _model_of(record: CallRecord, known: Known) -> str:
    answered = record.outcome in {"success", "cached"} or record.completion_tokens
    return record.model if answered else known(record.model)


def records_kept_s(settings: Settings) -> float:
    """How long the ids of records are kept: until no spool can have the records any more."""
    return settings.spool_max_age_s + DAY_S


class DirectLedger:
    """Books records at once, in the thread that asks; for commands that run without an event loop.

    Args:
        engine: A database that was migrated.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def take(self, record: CallRecord) -> None:
        """Do nothing: what is booked here comes from the spool."""

    def book(self, records: Sequence[CallRecord]) -> None:
        """Add records to the ledger; raises ``NotBookedError``."""
        insert = insert_of(self._engine)
        for batch in _batches(records):
            try:
                with self._engine.begin() as connection:
                    write_records(connection, insert, batch, lambda _model: OTHER_MODEL, time.time())
            except sa.exc.SQLAlchemyError:
                raise NotBookedError from None


@asynccontextmanager
async def open_ledger(
    database: Database, instruments: Instruments, *, known: Known, records_kept_s: float
) -> AsyncIterator["Ledger"]:
    """The ledger; on exit it books what waits in memory."""
    ledger = Ledger(database, instruments, known=known, records_kept_s=records_kept_s)
    try:
        yield ledger
    finally:
        with suppress(DatabaseFailedError):
            await ledger.flush()


class Ledger:
    """Books records, and tells what was used and spent.

    Args:
        database: Where it is kept.
        instruments: For the budgets.
        known: Maps a model that the upstream does not list to another name.
        records_kept_s: How long the ids of records are kept: no spool has older ones.
        now: Unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        instruments: Instruments,
        *,
        known: Known,
        records_kept_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._known = known
        self._records_kept_s = records_kept_s
        self._now = now
        self._loop = asyncio.get_running_loop()
        # What was booked and what was read is taken over in the order in which that was done.
        self._order = asyncio.Lock()
        self._changes = 0
        self._polled_at_s = now()
        self._booked: cachetools.FIFOCache[str, bool] = cachetools.FIFOCache(MAX_BOOKED)
        self.budgets = Budgets(self, instruments, now)

    def take(self, record: CallRecord) -> None:
        """Count the record of a call that has ended; it is in the database soon. Does not block."""
        if len(self.budgets.waiting) >= MAX_WAITING:
            self.budgets.drop_oldest()
        self.budgets.add(record)

    def book(self, records: Sequence[CallRecord]) -> None:
        """Wait until records are in the database; called in another thread than the event loop's.

        Raises:
            NotBookedError: The database failed; the records must be booked again.
        """
        work = asyncio.run_coroutine_threadsafe(self._book(records), self._loop)
        try:
            work.result(2 * TIMEOUT_S * (1 + len(records) // BATCH))
        except (DatabaseFailedError, FutureTimeoutError, FutureCancelledError):
            work.cancel()
            raise NotBookedError from None

    async def _book(self, records: Sequence[CallRecord]) -> None:
        missing = [record for record in records if record.record_id not in self._booked]
        for batch in _batches(missing):
            await self._write(batch)

    async def flush(self) -> None:
        """Book what waits in memory; raises ``DatabaseFailedError``."""
        for batch in _batches(list(self.budgets.waiting.values())):
            await self._write(batch)

    async def _write(self, records: Sequence[CallRecord]) -> None:
        def write(connection: sa.Connection) -> Collection[str]:
            return write_records(connection, self._database.insert, records, self._known, self._now())

        async with self._order:
            inserted = await self._database.run("book", write, writes=True)
            self._booked.update((record.record_id, True) for record in records)
            self._changes += 1
            self.budgets.booked(records, inserted)

    async def spent(self, subject: Subject, periods: Periods, record_ids: Collection[str]) -> Reading:
        """What was spent by a subject, and which of these records are in it.

        Raises:
            DependencyUnavailableError: The database does not answer.
        """
        scope, name = subject
        query = sa.select(SPENT).where(
            SPENT.c.scope == scope, SPENT.c.name == name, SPENT.c.period.in_(periods)
        )

        def select(connection: sa.Connection) -> Reading:
            if record_ids:
                see_one_moment(connection)
            booked = _select_booked(connection, record_ids)
            return Reading(_totals_of(connection.execute(query)), booked)

        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._find_undisturbed(select)
        except TimeoutError:
            raise DependencyUnavailableError from None

    async def _find_undisturbed(self, select: Callable[[sa.Connection], Reading]) -> Reading:
        """Read what was spent, again if something else was booked or read meanwhile.

        Those calls would be neither in what was read nor among those that are open. Callers who ask for the
        first time after a start do not wait for one another, nor for a write that waits for another program's
        lock.
        """
        while True:
            changes = self._changes
            found: Reading = await self._find(select)
            if changes == self._changes:
                return found

    async def usage(self, query: UsageQuery) -> tuple[list[UsageRow], UsageRow]:
        """The rows that a query asks for, and their sum.

        Raises:
            ValidationError: There are too many rows.
            DependencyUnavailableError: The database does not answer.
        """
        with suppress(DatabaseFailedError):
            # So that a caller who asks right after a call finds it.
            await self.flush()
        groups = [COLUMNS[dimension] for dimension in query.by]
        names = (*COUNTS, *MONEY.values())
        sums = [sa.func.coalesce(sa.func.sum(USAGE.c[name]), 0).label(name) for name in names]
        where = [USAGE.c.day >= query.since, USAGE.c.day <= query.until]
        if query.user is not None:
            where.append(USAGE.c.user_name == query.user)
        total = sa.select(*sums).where(*where)
        rows = sa.select(*groups, *sums).where(*where).group_by(*groups).order_by(*groups).limit(MAX_ROWS + 1)

        def select(connection: sa.Connection) -> tuple[list[Any], Any]:
            # Without groups, the one row is the total.
            found = list(connection.execute(rows)) if groups else []
            return found, connection.execute(total).one()

        found, whole = await self._find(select)
        if len(found) > MAX_ROWS:
            raise ValidationError(
                f"The answer would have more than {MAX_ROWS:,} rows. Ask for fewer days, or by less."
            )
        return [_shown(row, query.by) for row in found], _shown(whole, ())

    async def _find(self, work: Callable[[sa.Connection], Any]) -> Any:  # noqa: ANN401 - what the work returns
        try:
            return await self._database.run("find", work, writes=False)
        except DatabaseFailedError:
            raise DependencyUnavailableError from None

    async def run(self) -> None:
        """Book, read what other processes have booked, and purge, until cancelled."""
        clock = self._loop.time
        polled_s, purged_s = clock(), float("-inf")
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            try:
                await self.flush()
                if clock() - polled_s >= POLL_INTERVAL_S:
                    await self.poll()
                    polled_s = clock()
                if clock() - purged_s >= PURGE_INTERVAL_S:
                    await self.purge()
                    purged_s = clock()
            except DatabaseFailedError:
                pass  # it has been logged
            except Exception:
                # A bug here must not take the lifespan down with it, and the requests in flight.
                logger.exception("The ledger failed")

    async def poll(self) -> None:
        """Read what other processes have booked of late; raises ``DatabaseFailedError``."""
        async with self._order:
            now_s, record_ids, is_shared = self._now(), self.budgets.open, self.budgets.is_shared
            since = int(min(now_s, self._polled_at_s)) - CHANGED_S
            changed = sa.select(SPENT).where(SPENT.c.changed_at >= since)
            latest = (
                sa.select(RECORDS.c.record_id)
                .where(RECORDS.c.taken_at >= since)
                .order_by(RECORDS.c.taken_at.desc())
                .limit(LATEST)
            )

            def read(connection: sa.Connection) -> Reading:
                see_one_moment(connection)
                return Reading(
                    _totals_of(connection.execute(changed)),
                    _select_booked(connection, record_ids),
                    frozenset(connection.execute(latest).scalars()) if is_shared else frozenset(),
                )

            reading = await self._database.run("poll", read, writes=False)
            self._polled_at_s = now_s
            self._changes += 1
            self.budgets.read(reading)

    async def purge(self) -> None:
        """Delete what is too old; raises ``DatabaseFailedError``."""
        now_s = self._now()
        first_day = datetime.fromtimestamp(now_s, UTC).date() - timedelta(days=USAGE_DAYS)
        old = RECORDS.c.taken_at < int(now_s - self._records_kept_s)

        def delete_some(connection: sa.Connection) -> int:
            some = sa.select(RECORDS.c.record_id).where(old).limit(PURGE_ROWS)
            return connection.execute(sa.delete(RECORDS).where(RECORDS.c.record_id.in_(some))).rowcount

        def delete(connection: sa.Connection) -> None:
            connection.execute(sa.delete(USAGE).where(USAGE.c.day < first_day))
            connection.execute(sa.delete(SPENT).where(SPENT.c.period < first_day.isoformat()[:7]))

        more = True
        while more:
            more = await self._database.run("purge", delete_some, writes=True) == PURGE_ROWS
        await self._database.run("purge", delete, writes=True)


def _batches(items: Sequence[Item]) -> Iterable[Sequence[Item]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def _shown(row: Any, by: Sequence[Dimension]) -> UsageRow:  # noqa: ANN401 - a row
    """A row as it is shown: sums of money in US dollars, and None for no team or key."""
    shown: dict[str, str | int | float | None] = {}
    for dimension in by:
        value = getattr(row, COLUMNS[dimension].name)
        shown[dimension] = value.isoformat() if isinstance(value, date) else (value or None)
    for name in COUNTS:
        shown[name] = int(getattr(row, name))
    for name, column in MONEY.items():
        shown[name] = int(getattr(row, column)) / NANO
    return shown
