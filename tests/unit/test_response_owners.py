"""The owners of stored responses, over a real SQLite file and a real PostgreSQL server, which fail too."""

import asyncio
import logging
import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader

from service.errors import DependencyUnavailableError
from service.identity.database import (
    MIGRATIONS,
    VERSION_TABLE,
    Database,
    DatabaseFailedError,
    DatabaseUnusableError,
    make_engine,
    metadata,
    migrate,
    open_database,
    prepare_database,
)
from service.identity.response_owners import (
    PURGE_ROWS,
    RETENTION_S,
    TABLE,
    ResponseOwners,
    StoredResponse,
    open_response_owners,
)
from service.telemetry.instruments import Instruments
from tests.fakes.clock import FakeClock
from tests.harness import make_settings
from tests.postgresql import PostgreSql

ALICE = StoredResponse("alice", "demo")
FAILED, RECOVERED = "llmops.identity.store.failed", "llmops.identity.store.recovered"


class Measured:
    """Instruments whose values can be read."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.instruments = Instruments(MeterProvider([self._reader]).get_meter("test"))

    def count(self, operation: str, outcome: str) -> int:
        """How many transactions were measured with these attributes."""
        data = self._reader.get_metrics_data()
        return sum(
            point.count
            for found in (data.resource_metrics if data else ())
            for scope in found.scope_metrics
            for metric in scope.metrics
            if metric.name == "llmops.identity.store.duration"
            for point in metric.data.data_points
            if isinstance(point, HistogramDataPoint)
            and point.attributes == {"operation": operation, "outcome": outcome}
        )


@asynccontextmanager
async def opened(url: str, measured: Measured | None = None) -> AsyncIterator[Database]:
    async with open_database(
        make_settings(database_url=url), (measured or Measured()).instruments
    ) as database:
        yield database


Scenario = Callable[[ResponseOwners, Database], Awaitable[None]]


def owners_of(url: str, scenario: Scenario, measured: Measured | None = None, **options: Any) -> None:
    """Run a scenario with the owners of one process."""

    async def main() -> None:
        async with asyncio.timeout(20), opened(url, measured) as database:
            await scenario(ResponseOwners(database, **options), database)

    asyncio.run(main())


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str | None]]:
    """The database's events so far, each with its reason."""
    found = [vars(record) for record in caplog.records]
    return [
        (fields["otel.event.name"], fields.get("reason")) for fields in found if "otel.event.name" in fields
    ]


def test_an_owner_is_found_by_another_process_and_nobody_else_is(url: str) -> None:
    async def keep(owners: ResponseOwners, _database: Database) -> None:
        await owners.keep("resp_1", "alice", "demo")
        assert await owners.find("resp_1") == ALICE

    async def find(owners: ResponseOwners, _database: Database) -> None:
        assert await owners.find("resp_1") == ALICE
        for other in ("resp_2", "resp_", "RESP_1", "resp_1 ", "resp_1\0", "", "\ud800", "x" * 1_000_000):
            assert await owners.find(other) is None

    owners_of(url, keep)
    owners_of(url, find)


def test_the_database_holds_no_id(url: str) -> None:
    async def scenario(owners: ResponseOwners, database: Database) -> None:
        await owners.keep("resp_secret", "alice", "demo")
        rows = await database.run(
            "find", lambda connection: connection.execute(sa.select(TABLE)).all(), writes=False
        )
        assert [row.owner for row in rows] == ["alice"]
        assert "resp_secret" not in repr(rows)

    owners_of(url, scenario)


def test_what_is_forgotten_is_unknown_and_may_be_kept_again(url: str) -> None:
    async def scenario(owners: ResponseOwners, database: Database) -> None:
        await owners.keep("resp_1", "alice", "demo")
        await owners.forget("resp_1")
        await owners.forget("never kept")
        assert await owners.find("resp_1") is None
        assert await ResponseOwners(database).find("resp_1") is None
        await owners.keep("resp_1", "bob", "demo")
        assert await ResponseOwners(database).find("resp_1") == StoredResponse("bob", "demo")

    owners_of(url, scenario)


@pytest.mark.parametrize("same_process", [True, False])
def test_the_first_owner_of_an_id_keeps_it(
    url: str, caplog: pytest.LogCaptureFixture, *, same_process: bool
) -> None:
    async def scenario(owners: ResponseOwners, database: Database) -> None:
        await owners.keep("resp_1", "alice", "demo")
        await owners.keep("resp_1", "alice", "demo")
        assert not caplog.records
        other = owners if same_process else ResponseOwners(database)
        await other.keep("resp_1", "bob", "demo")
        (line,) = caplog.records
        assert line.message == "The upstream gave a response's id that belongs to another caller"
        assert "resp_1" not in repr(vars(line))
        for owned in (owners, other, ResponseOwners(database)):
            assert await owned.find("resp_1") == ALICE

    caplog.set_level(logging.WARNING)
    owners_of(url, scenario)


def test_rows_expire_after_the_retention_and_are_purged(url: str) -> None:
    clock = FakeClock(1_800_000_000.0)

    async def scenario(owners: ResponseOwners, database: Database) -> None:
        many = [
            {"id_hash": number.to_bytes(32), "owner": "x", "model": "m", "created_at": int(clock())}
            for number in range(PURGE_ROWS + 5)
        ]
        await database.run("keep", lambda connection: connection.execute(sa.insert(TABLE), many), writes=True)
        await owners.keep("resp_1", "alice", "demo")
        clock.advance(RETENTION_S)
        await owners.keep("resp_2", "alice", "demo")
        assert await owners.purge() == 0
        assert await owners.find("resp_1") == ALICE
        clock.advance(1)
        for found in (owners, ResponseOwners(database, now=clock)):
            assert await found.find("resp_1") is None
            assert await found.find("resp_2") == ALICE
        # An expired id that was not purged can be kept by anybody.
        await owners.keep("resp_1", "bob", "demo")
        assert await ResponseOwners(database, now=clock).find("resp_1") == StoredResponse("bob", "demo")
        assert await owners.purge() == PURGE_ROWS + 5
        assert await owners.purge() == 0

    owners_of(url, scenario, now=clock)


def test_memory_is_bounded_and_the_database_knows_the_rest(url: str) -> None:
    async def scenario(owners: ResponseOwners, database: Database) -> None:
        for number in range(6):
            await owners.keep(f"resp_{number}", "alice", "demo")
        await database.run("forget", lambda connection: connection.execute(sa.delete(TABLE)), writes=True)
        found = [await owners.find(f"resp_{number}") for number in range(6)]
        assert found == [None, None, None, ALICE, ALICE, ALICE]

    owners_of(url, scenario, max_in_memory=3)


def test_many_at_once_are_kept_and_measured(url: str) -> None:
    measured = Measured()

    async def main() -> None:
        async with opened(url, measured) as database:
            owners = ResponseOwners(database)
            ids = [f"resp_{number}" for number in range(300)]
            await asyncio.gather(*(owners.keep(one, "alice", "demo") for one in ids))
            others = ResponseOwners(database)
            assert await asyncio.gather(*map(others.find, ids)) == [ALICE] * len(ids)

    asyncio.run(main())
    assert (measured.count("keep", "success"), measured.count("find", "success")) == (300, 300)
    assert (measured.count("keep", "error"), measured.count("find", "error")) == (0, 0)


# ---- Outages -------------------------------------------------------------------------------------------


def test_postgresql_that_is_killed_costs_no_id_and_comes_back(
    postgresql: PostgreSql, caplog: pytest.LogCaptureFixture
) -> None:
    postgresql.empty()
    caplog.set_level(logging.INFO)

    async def scenario(owners: ResponseOwners, database: Database) -> None:
        await owners.keep("resp_before", "alice", "demo")
        caplog.clear()
        postgresql.kill()
        try:
            for number in range(3):
                await owners.keep(f"resp_{number}", "alice", "demo")
                assert await owners.find(f"resp_{number}") == ALICE
            await owners.forget("resp_before")
            assert await owners.find("resp_before") is None
            for _ in range(2):
                with pytest.raises(DependencyUnavailableError) as raised:
                    await owners.find("resp_other")
                assert (raised.value.status, raised.value.retryable) == (503, True)
            # Once for what writes and once for what reads, however many calls it was.
            assert [event for event, _ in events(caplog)] == [FAILED, FAILED]
        finally:
            await asyncio.to_thread(postgresql.start)
        await owners.write()
        assert await owners.find("resp_other") is None
        assert [event for event, _ in events(caplog)] == [FAILED, FAILED, RECOVERED, RECOVERED]
        others = ResponseOwners(database)
        assert [await others.find(f"resp_{number}") for number in range(3)] == [ALICE] * 3
        assert await others.find("resp_before") is None

    owners_of(postgresql.url, scenario)


def test_what_only_memory_holds_is_not_pushed_out_by_others(tmp_path: Path) -> None:
    async def scenario(owners: ResponseOwners, database: Database) -> None:
        await database.run("purge", _rename, writes=True)
        await owners.keep("resp_1", "alice", "demo")
        # One caller reads and makes much while the database fails.
        await owners.keep_items([f"item_{number}" for number in range(100)], "bob", "demo")
        for number in range(100):
            await owners.keep(f"resp_bob_{number}", "bob", "demo")
        assert await owners.find("resp_1") == ALICE
        await owners.keep("resp_1", "bob", "demo")
        assert await owners.find("resp_1") == ALICE
        await database.run("purge", lambda connection: _rename(connection, back=True), writes=True)
        await owners.write()
        assert await ResponseOwners(database).find("resp_1") == ALICE

    owners_of(_file(tmp_path)[0], scenario, max_in_memory=20)


def _rename(connection: sa.Connection, *, back: bool = False) -> None:
    names = ("gone", TABLE.name) if back else (TABLE.name, "gone")
    connection.exec_driver_sql(f"ALTER TABLE {names[0]} RENAME TO {names[1]}")


def test_the_rows_of_one_caller_are_bounded(url: str) -> None:
    clock = FakeClock(1_000_000_000)

    async def scenario(owners: ResponseOwners, _database: Database) -> None:
        await owners.keep("resp_1", "alice", "demo")
        for number in range(15):
            clock.advance(1)
            await owners.keep(f"resp_bob_{number}", "bob", "demo")
        assert await owners.purge() == 5
        assert await owners.purge() == 0

    async def find(owners: ResponseOwners, _database: Database) -> None:
        assert await owners.find("resp_1") == ALICE
        kept = [await owners.find(f"resp_bob_{number}") is not None for number in range(15)]
        assert kept == [False] * 5 + [True] * 10

    owners_of(url, scenario, max_each=10, now=clock)
    owners_of(url, find, now=clock)


def test_a_name_with_a_nul_is_kept(url: str) -> None:
    async def scenario(owners: ResponseOwners, _database: Database) -> None:
        await owners.keep("resp_1", "ali\0ce", "de\0mo")
        await owners.keep_items(["item_1"], "ali\0ce", "de\0mo")

    async def find(owners: ResponseOwners, _database: Database) -> None:
        assert await owners.find("resp_1") == ALICE
        assert await owners.find_items(["item_1", "item_2"]) == {"item_1": ALICE}

    owners_of(url, scenario)
    owners_of(url, find)


def test_the_background_writes_what_was_not_taken(
    postgresql: PostgreSql, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgresql.empty()
    monkeypatch.setattr("service.identity.response_owners.RETRY_INTERVAL_S", 0.02)

    async def scenario(owners: ResponseOwners, database: Database) -> None:
        running = asyncio.create_task(owners.run())
        postgresql.kill()
        try:
            await owners.keep("resp_1", "alice", "demo")
        finally:
            await asyncio.to_thread(postgresql.start)
        other = ResponseOwners(database)
        async with asyncio.timeout(10):
            while await other.find("resp_1") is None:
                pass
        running.cancel()
        assert await other.find("resp_1") == ALICE

    owners_of(postgresql.url, scenario)


def test_the_end_of_the_process_writes_what_was_not_taken(postgresql: PostgreSql) -> None:
    postgresql.empty()

    async def scenario(_owners: ResponseOwners, database: Database) -> None:
        async with open_response_owners(database) as owners:
            postgresql.kill()
            try:
                await owners.keep("resp_1", "alice", "demo")
            finally:
                await asyncio.to_thread(postgresql.start)
        assert await ResponseOwners(database).find("resp_1") == ALICE

    owners_of(postgresql.url, scenario)


def _file(tmp_path: Path) -> tuple[str, Path]:
    path = tmp_path / "data" / "owners.db"
    return f"sqlite:///{path}", path


def test_a_file_that_cannot_be_written_to_costs_no_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, _path = _file(tmp_path)
    caplog.set_level(logging.WARNING)

    async def scenario(owners: ResponseOwners, database: Database) -> None:
        await owners.keep("resp_before", "alice", "demo")

        def read_only(on: str) -> Awaitable[None]:
            # What SQLite says of a file, or a file system, that became read-only.
            statement = f"PRAGMA query_only={on}"
            return database.run(
                "find", lambda connection: connection.exec_driver_sql(statement).close(), writes=False
            )

        await read_only("ON")
        for number in range(3):
            await owners.keep(f"resp_{number}", "alice", "demo")
            assert await owners.find(f"resp_{number}") == ALICE
        # Reading works on.
        assert await ResponseOwners(database).find("resp_before") == ALICE
        assert await owners.find("resp_other") is None
        assert events(caplog) == [(FAILED, "readonly")]
        await read_only("OFF")
        await owners.write()
        assert await ResponseOwners(database).find("resp_2") == ALICE

    owners_of(url, scenario)


LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Have another process hold the file's lock during the block."""
    arguments = [sys.executable, "-c", LOCKER, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
        assert locker.stdout is not None
        assert locker.stdin is not None
        assert locker.stdout.readline() == b"locked\n"
        yield
        locker.stdin.close()


def test_a_file_that_another_process_has_locked_costs_no_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, path = _file(tmp_path)
    caplog.set_level(logging.WARNING)
    measured = Measured()

    async def scenario(owners: ResponseOwners, database: Database) -> None:
        await owners.keep("resp_before", "alice", "demo")
        with _locked(path):
            await owners.keep("resp_1", "alice", "demo")
            assert await owners.find("resp_1") == ALICE
            assert events(caplog) == [(FAILED, "busy")]
            # Those that come now do not wait for the lock, and reading needs none.
            await owners.keep("resp_2", "alice", "demo")
            assert (measured.count("keep", "success"), measured.count("keep", "error")) == (1, 1)
            assert await ResponseOwners(database).find("resp_before") == ALICE
            assert len(events(caplog)) == 1
        await owners.write()
        found = ResponseOwners(database)
        assert [await found.find(f"resp_{number}") for number in (1, 2)] == [ALICE] * 2

    owners_of(url, scenario, measured)


def test_a_lock_that_is_given_back_soon_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, path = _file(tmp_path)

    async def scenario(owners: ResponseOwners, database: Database) -> None:
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            keeping = asyncio.create_task(owners.keep("resp_1", "alice", "demo"))
            await asyncio.sleep(0.1)
            assert not keeping.done()
            other.execute("COMMIT")
            await keeping
        assert await ResponseOwners(database).find("resp_1") == ALICE

    owners_of(url, scenario)
    assert not events(caplog)


FULL_DISK = """
import asyncio, json, resource, signal, sys
from opentelemetry.metrics import NoOpMeter
from service.config.settings import Settings
from service.identity.database import open_database
from service.identity.response_owners import ResponseOwners, StoredResponse
from service.telemetry.instruments import Instruments

ALICE = StoredResponse("alice", "demo")

async def main():
    settings = Settings(_env_file=None, database_url=sys.argv[1])
    async with open_database(settings, Instruments(NoOpMeter("test"))) as database:
        owners = ResponseOwners(database)
        await owners.keep("resp_before", "alice", "demo")
        # The limit is that of each file: no write can make one longer.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        kept = []
        for number in range(50):
            await owners.keep(f"resp_{number}", "alice", "demo")
            kept.append(await owners.find(f"resp_{number}") == ALICE)
        before = await ResponseOwners(database).find("resp_before") == ALICE
        failing = database.failing(writes=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await owners.write()
        after = [await ResponseOwners(database).find(f"resp_{number}") == ALICE for number in range(50)]
        print(json.dumps([all(kept), before, failing, all(after)]))

asyncio.run(main())
"""


def test_a_full_disk_costs_no_id(tmp_path: Path) -> None:
    url, _path = _file(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, url],
        capture_output=True,
        text=True,
        check=False,
        cwd=MIGRATIONS.parents[2],
    )
    assert (done.stdout, done.returncode) == ("[true, true, true, true]\n", 0), done.stderr


async def _fails(work: Awaitable[object]) -> bool:
    try:
        await work
    except DatabaseFailedError:
        return True
    return False


def test_a_database_that_hangs_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, _path = _file(tmp_path)
    release = threading.Event()
    caplog.set_level(logging.WARNING)

    async def main() -> None:
        engine = make_engine(make_settings(database_url=url))
        migrate(engine)
        database = Database(engine, Measured().instruments, timeout_s=0.5, max_waiting=5)
        owners = ResponseOwners(database)
        # Reads and writes have a thread each.
        hanging = [
            asyncio.create_task(database.run("purge", lambda _connection: release.wait(), writes=writes))
            for writes in (True, False)
        ]
        await asyncio.sleep(0)
        finding = [owners.find(f"resp_{number}") for number in range(20)]
        found = await asyncio.gather(*finding, return_exceptions=True)
        assert {type(result) for result in found} == {DependencyUnavailableError}
        for each in hanging:
            with pytest.raises(DatabaseFailedError, match="slow"):
                await each
        await owners.keep("resp_1", "alice", "demo")
        assert await owners.find("resp_1") == ALICE
        assert sorted(events(caplog)) == [(FAILED, "busy"), (FAILED, "slow")]
        release.set()
        async with asyncio.timeout(10):
            # What nobody waits for any more is still in the queue.
            while await _fails(owners.write()):
                pass
            while await _fails(database.run("find", lambda _connection: None, writes=False)):
                pass
        assert await ResponseOwners(database).find("resp_1") == ALICE
        await database.close()

    try:
        asyncio.run(main())
    finally:
        release.set()


# ---- The start -----------------------------------------------------------------------------------------


def _prepare(url: str) -> None:
    prepare_database(make_settings(database_url=url))


def test_the_tables_are_those_that_the_code_knows(url: str) -> None:
    _prepare(url)
    engine = make_engine(make_settings(database_url=url))
    found = sa.MetaData()
    found.reflect(engine)
    assert set(found.tables) == {*metadata.tables, VERSION_TABLE}
    for name, table in metadata.tables.items():
        in_database = found.tables[name]
        assert {column.name for column in in_database.columns} == {column.name for column in table.columns}
        for column in table.columns:
            assert isinstance(
                in_database.columns[column.name].type,
                column.type.dialect_impl(engine.dialect).as_generic().__class__,
            )
            assert in_database.columns[column.name].nullable == column.nullable
        assert {index.name for index in in_database.indexes} == {index.name for index in table.indexes}
    engine.dispose()


def test_a_migration_can_be_repeated_and_keeps_the_rows(url: str) -> None:
    async def keep(owners: ResponseOwners, _database: Database) -> None:
        await owners.keep("resp_1", "alice", "demo")

    async def find(owners: ResponseOwners, _database: Database) -> None:
        assert await owners.find("resp_1") == ALICE

    owners_of(url, keep)
    _prepare(url)
    owners_of(url, find)


IMPORTER = """
import sys
from service.config.settings import Settings
from service.identity.database import prepare_database
prepare_database(Settings(_env_file=None, database_url=sys.argv[1]))
print("alembic" in sys.modules)
"""


def test_alembic_is_imported_only_where_there_is_something_to_migrate(url: str) -> None:
    """It takes a fifth of a start; ``HEAD`` must be the latest of its migrations."""
    command = [sys.executable, "-c", IMPORTER, url]
    said = [
        subprocess.run(command, check=True, capture_output=True, cwd=MIGRATIONS.parents[2]).stdout
        for _ in range(2)
    ]
    assert said == [b"True\n", b"False\n"]


STARTER = """
import sys
from service.config.logging import configure_logging
from service.config.settings import Settings
from service.identity.database import prepare_database
configure_logging("INFO")
print("ready", flush=True)
sys.stdin.readline()
prepare_database(Settings(_env_file=None, database_url=sys.argv[1]))
"""


def test_processes_that_start_at_once_migrate_once(url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=MIGRATIONS.parents[2],
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    done = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, done
    lines = b"".join(stdout for stdout, _ in done).splitlines()
    assert len(lines) == 1, lines
    assert b"The database was migrated" in lines[0]


def test_a_newer_schema_is_refused(url: str) -> None:
    _prepare(url)
    engine = make_engine(make_settings(database_url=url))
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))  # noqa: S608 - ours
    engine.dispose()
    with pytest.raises(DatabaseUnusableError, match="schema 9999, which is newer than this version"):
        _prepare(url)


def test_a_file_is_private_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    url, path = _file(tmp_path)
    before = os.umask(0)
    try:

        async def scenario(owners: ResponseOwners, _database: Database) -> None:
            await owners.keep("resp_1", "alice", "demo")
            modes = {found.name: stat.S_IMODE(found.stat().st_mode) for found in path.parent.iterdir()}
            assert modes == dict.fromkeys(("owners.db", "owners.db-wal", "owners.db-shm"), 0o600)
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

        owners_of(url, scenario)
    finally:
        os.umask(before)


def _not_a_database(folder: Path) -> str:
    (folder / "no.db").write_text("This is no database, but it is long enough to be looked at. " * 20)
    return f"sqlite:///{folder}/no.db"


def _a_folder(folder: Path) -> str:
    return f"sqlite:///{folder}"


def _below_a_file(folder: Path) -> str:
    (folder / "file").touch()
    return f"sqlite:///{folder}/file/owners.db"


def _nobody_listens(_folder: Path) -> str:
    return "postgresql://someone:hunter2secret@127.0.0.1:1/owners"


def _no_url(_folder: Path) -> str:
    return "mysql://someone:hunter2secret@127.0.0.1/owners"


@pytest.mark.parametrize("make", [_not_a_database, _a_folder, _below_a_file, _nobody_listens, _no_url])
def test_a_database_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    with pytest.raises(DatabaseUnusableError) as raised:
        _prepare(make(tmp_path))
    said = str(raised.value)
    assert said.startswith(("The database at DATABASE_URL cannot be used: ", "DATABASE_URL is not valid: "))
    assert len(said) > 60
    assert not re.search(r"\n|hunter2secret|SELECT|sqlalche", said)
