"""The SQL database: SQLite in a file, or PostgreSQL; opened, migrated and used here.

``Database`` runs the statements of the stores beside this module in threads of its own, each within a time
limit, and reports when the database begins to fail and when it works again. A table is declared beside its
store; ``migrations`` creates and changes the tables.
"""

import asyncio
import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import anyio.to_thread
import sqlalchemy as sa

from service.config.settings import Settings
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

TIMEOUT_S: Final = 2.0
"""Time limit of one transaction, with the wait for a thread."""

BUSY_TIMEOUT_S: Final = 1.0
"""How long a transaction waits for a lock that another process holds."""

THREADS: Final = 4
"""Threads, and connections, for PostgreSQL. SQLite has one for writes, as a second would only wait for the
lock of the first, and one for reads, which must not wait for writes that wait for another program's lock."""

MAX_WAITING: Final = 1_000
"""Transactions that may wait for a thread; further ones fail at once."""

MIGRATION_TIMEOUT_S: Final = 60.0
"""How long the start waits for another process that migrates the database, and for its own migrations."""

MAX_SAID_CHARS: Final = 300
LOCK_INTERVAL_S: Final = 0.05
LOCK_KEY: Final = 0x6C6C6D6F7073
"""The key of the advisory lock in PostgreSQL under which migrations run."""

VERSION_TABLE: Final = "llmops_schema_version"
"""Not Alembic's own name for it, which another program may use in the same database."""

HEAD: Final = "0003"
"""The latest of the migrations."""

MIGRATIONS: Final = Path(__file__).with_name("migrations")

WRITES: Final = "llmops_writes"
"""The execution option of a transaction that writes."""

DRIVERS: Final = {
    "sqlite": "sqlite+pysqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
}

DATABASE_ERRORS: Final = (sa.exc.SQLAlchemyError, sqlite3.Error)
"""SQLAlchemy wraps the errors of drivers, except for those of a connection's first statements."""

Operation = Literal["keep", "find", "forget", "purge", "poll", "book"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

metadata = sa.MetaData()
"""The tables of all stores."""


class DatabaseUnusableError(Exception):
    """The database cannot be opened or migrated; the message says what to do, and holds no password."""


class DatabaseFailedError(Exception):
    """A transaction failed; ``reason`` is one of a few words, fit for an event's attribute."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def make_engine(settings: Settings) -> sa.Engine:
    """Make the engine for ``DATABASE_URL``; nothing is opened yet.

    Raises:
        DatabaseUnusableError: It is not a URL of one of the two databases.
    """
    try:
        url = sa.make_url(settings.database_url.get_secret_value())
        url = url.set(drivername=DRIVERS[url.drivername.partition("+")[0]])
    except (sa.exc.ArgumentError, ValueError, KeyError):
        raise DatabaseUnusableError(
            "DATABASE_URL is not valid: write sqlite:///path or postgresql://user:password@host/database"
        ) from None
    if url.get_backend_name() == "postgresql":
        return _postgresql_engine(url)
    return _sqlite_engine(url)


def _postgresql_engine(url: sa.URL) -> sa.Engine:
    limit_ms, lock_ms = int(TIMEOUT_S * 1000), int(BUSY_TIMEOUT_S * 1000)
    return sa.create_engine(
        url,
        pool_size=THREADS,
        max_overflow=0,
        # A connection that the server has closed is replaced before it is used.
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "connect_timeout": int(TIMEOUT_S),
            "tcp_user_timeout": limit_ms,
            "application_name": "llmops-api",
            "options": f"-c statement_timeout={limit_ms} -c lock_timeout={lock_ms}",
        },
    )


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    arguments = {"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
    pool: dict[str, Any] = {"poolclass": sa.QueuePool, "pool_size": 2, "max_overflow": 0}
    if _file_of(url) is None:
        # A database in memory is its connection.
        pool = {"poolclass": sa.StaticPool}
    engine = sa.create_engine(url, hide_parameters=True, connect_args=arguments, **pool)

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:  # noqa: ANN401 - a DBAPI's connection
        # The driver would begin transactions by rules of its own, and none before a change of the schema.
        connection.isolation_level = None
        # After a crash of the machine the last transactions may be missing; the file stays intact, and a
        # process that is killed loses nothing (https://www.sqlite.org/pragma.html#pragma_synchronous).
        connection.execute("PRAGMA synchronous=NORMAL")

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # A transaction that began by reading could not wait for the lock when it writes.
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _file_of(url: sa.URL) -> Path | None:
    """The file of a SQLite database; None where it is in memory, or the server's."""
    if url.get_backend_name() != "sqlite" or url.database in {None, "", ":memory:"}:
        return None
    return Path(str(url.database))


# ---- The start -----------------------------------------------------------------------------------------


def prepare_database(settings: Settings) -> None:
    """Open the database, migrate it, and close it again; the process that starts the workers does this.

    Raises:
        DatabaseUnusableError: It cannot be opened, cannot be written to, or is newer than this program.
    """
    engine = make_engine(settings)
    try:
        migrate(engine)
    finally:
        engine.dispose()


def migrate(engine: sa.Engine) -> None:
    """Create the tables, or bring them to this program's version, under a lock that all processes take.

    Raises:
        DatabaseUnusableError: As ``prepare_database``.
    """
    try:
        with _file_lock(_file_of(engine.url)):
            if _file_of(engine.url) is not None:
                _use_write_ahead_log(engine)
            with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
                if connection.dialect.name == "postgresql":
                    limit_ms = int(MIGRATION_TIMEOUT_S * 1000)
                    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {limit_ms}")
                    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {limit_ms}")
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK_KEY)))
                _upgrade(connection)
    except (*DATABASE_ERRORS, OSError) as error:
        raise DatabaseUnusableError(f"The database at DATABASE_URL cannot be used: {_said(error)}") from None


def _upgrade(connection: sa.Connection) -> None:
    """Run the migrations that the database has not had yet; raises ``DatabaseUnusableError``."""
    versions = sa.table(VERSION_TABLE, sa.column("version_num"))
    is_versioned = sa.inspect(connection).has_table(VERSION_TABLE)
    if is_versioned and connection.scalars(sa.select(versions.c.version_num)).all() == [HEAD]:
        return
    # Alembic takes a quarter of a second to import, and most starts have nothing for it to do.
    from service.identity.migrations.upgrade import upgrade  # noqa: PLC0415

    upgrade(connection)


@contextmanager
def _file_lock(path: Path | None) -> Iterator[None]:
    """Create a SQLite file for this user only, and hold a lock on its folder during the block.

    SQLite's own locks do not cover the change to the write-ahead log. A lock on the file itself would be lost
    with the first descriptor of it that is closed.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite gives its other files the mode of this one.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int) -> None:
    end = time.monotonic() + MIGRATION_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise DatabaseUnusableError(
                    "The database at DATABASE_URL is being migrated by another process, which does not end"
                ) from None
            time.sleep(LOCK_INTERVAL_S)
        else:
            return


def _use_write_ahead_log(engine: sa.Engine) -> None:
    """Let look-ups go on while another process writes; the file keeps this setting."""
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.close()
    finally:
        connection.close()


def _said(error: Exception) -> str:
    """What is wrong, in the words of the system or the database; without SQL, which these errors repeat."""
    origin = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    return (" ".join(str(origin).split()) or _reason(error))[:MAX_SAID_CHARS]


def _reason(error: Exception) -> str:
    """Name an error in one word."""
    origin = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    name = getattr(origin, "sqlite_errorname", None)
    if isinstance(name, str):
        return name.removeprefix("SQLITE_").lower()
    # What an error of psycopg has, which is not imported for SQLite: it takes 9 MB.
    if origin is not None and hasattr(origin, "sqlstate"):
        return str(origin.sqlstate or "unreachable")
    return type(origin).__name__


def insert_of(engine: sa.Engine) -> Callable[[sa.Table], Any]:
    """The INSERT of the database's dialect, which knows ``on_conflict_do_update``."""
    # The engine has imported its own dialect; that of the other database would take 2 MB.
    insert: Callable[[sa.Table], Any] = import_module(f"sqlalchemy.dialects.{engine.dialect.name}").insert
    return insert


def see_one_moment(connection: sa.Connection) -> None:
    """Let all statements of a transaction that only reads see the same moment; before the first of them."""
    # SQLite's do so by themselves.
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")


# ---- Transactions --------------------------------------------------------------------------------------


class _Threads:
    """A few daemon threads for work that blocks: one that hangs cannot delay the exit of the process."""

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._serve, name=f"database {number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How much work no thread has begun."""
        return self._jobs.qsize()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run the work when a thread is free; cancelling the future takes it back until then."""
        future: Future[T] = Future()
        self._jobs.put((future, work))
        return future

    def end(self) -> None:
        """End the threads after the work that is waiting."""
        for _ in range(self._count):
            self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - whoever waits for the work gets it
                future.set_exception(error)
            else:
                future.set_result(result)
            # The next job may be long in coming, and this one's objects need not wait for it.
            del job, future, work


@asynccontextmanager
async def open_database(settings: Settings, instruments: Instruments) -> AsyncIterator["Database"]:
    """Open and migrate the database; leaving the block closes it.

    Raises:
        DatabaseUnusableError: As ``prepare_database``.
    """
    engine = make_engine(settings)
    database = Database(engine, instruments)
    try:
        await anyio.to_thread.run_sync(migrate, engine)
        yield database
    finally:
        await database.close()


class Database:
    """Runs transactions; made by ``open_database``.

    Args:
        engine: The engine.
        instruments: Measures the transactions.
        timeout_s: Time limit of one transaction.
        max_waiting: How many may wait for a thread.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        engine: sa.Engine,
        instruments: Instruments,
        *,
        timeout_s: float = TIMEOUT_S,
        max_waiting: int = MAX_WAITING,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine = engine
        self._duration = instruments.identity_store_duration
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self._clock = clock
        in_file = engine.dialect.name == "sqlite" and _file_of(engine.url) is not None
        self._writing = _Threads(1 if engine.dialect.name == "sqlite" else THREADS)
        # A database in memory has one connection.
        self._reading = _Threads(1) if in_file else self._writing
        self._failures = {True: 0, False: 0}

    @property
    def insert(self) -> Callable[[sa.Table], Any]:
        """The INSERT of the database's dialect, which knows ``on_conflict_do_update``."""
        return insert_of(self._engine)

    @property
    def binary(self) -> str:
        """The collation that orders texts by their characters' numbers, as Python does."""
        return "BINARY" if self._engine.dialect.name == "sqlite" else "C"

    def failing(self, *, writes: bool) -> bool:
        """Whether the latest transaction that wrote, or that only read, has failed."""
        return self._failures[writes] > 0

    async def run(self, operation: Operation, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        """Run one transaction in a thread, and commit it.

        Args:
            operation: What it does, for telemetry.
            work: Executes its statements; called once, in another thread.
            writes: Whether it changes anything.

        Raises:
            DatabaseFailedError: It failed or took too long. After a time-out it may still be committed.
        """
        started_s = self._clock()
        try:
            result = await self._limited(work, writes=writes)
        except DatabaseFailedError as error:
            self._measure(operation, "error", started_s)
            self._note_failure(operation, error.reason, writes=writes)
            raise
        self._measure(operation, "success", started_s)
        self._note_success(writes=writes)
        return result

    def _measure(self, operation: Operation, outcome: str, started_s: float) -> None:
        self._duration.record(self._clock() - started_s, {"operation": operation, "outcome": outcome})

    async def _limited(self, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        threads = self._writing if writes else self._reading
        if threads.waiting >= self._max_waiting:
            raise DatabaseFailedError("busy")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(
                    threads.submit(lambda: self._transaction(work, writes=writes))
                )
        except TimeoutError:
            raise DatabaseFailedError("slow") from None
        except DATABASE_ERRORS as error:
            # Not chained: the driver's error may hold the statement's values.
            raise DatabaseFailedError(_reason(error)) from None

    def _transaction(self, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        with self._engine.connect().execution_options(**{WRITES: writes}) as connection, connection.begin():
            return work(connection)

    async def close(self) -> None:
        """Close the connections after the transactions that are waiting, and end the threads."""
        if self._reading is not self._writing:
            read = self._reading.submit(lambda: None)
            self._reading.end()
            await asyncio.wrap_future(read)
        closed = self._writing.submit(self._engine.dispose)
        self._writing.end()
        await asyncio.wrap_future(closed)

    def _note_failure(self, operation: str, reason: str, *, writes: bool) -> None:
        """Report the first failure of an outage; reads and writes may fail apart, as on a full disk."""
        self._failures[writes] += 1
        if self._failures[writes] > 1:
            return
        emit(
            logger,
            names.EVENT_IDENTITY_STORE_FAILED,
            f"The database fails: {reason}",
            {"reason": reason, "operation": operation, "writes": writes},
            level=logging.WARNING,
        )

    def _note_success(self, *, writes: bool) -> None:
        failures = self._failures[writes]
        if failures:
            self._failures[writes] = 0
            emit(
                logger,
                names.EVENT_IDENTITY_STORE_RECOVERED,
                "The database works again",
                {"failures": failures, "writes": writes},
            )
