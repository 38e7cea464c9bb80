"""The ledger and the budgets, over a real SQLite file and a real PostgreSQL server."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import BudgetExceededError, DependencyUnavailableError, ValidationError
from service.identity.budgets import MAX_COST, NANO, Spent, periods_by, periods_of, renewal_s
from service.identity.database import Database, DatabaseFailedError, make_engine
from service.identity.ledger import (
    DIMENSIONS,
    RECORDS,
    SPENT,
    USAGE,
    DirectLedger,
    Ledger,
)
from service.recording.delivery import NotBookedError
from tests.harness import make_settings
from tests.unit.databases import run
from tests.unit.ledgers import DAY, KEPT_S, NOON_S, caller, process, record
from tests.unit.resilience import Readable


@pytest.fixture
def metrics() -> Readable:
    return Readable()


def test_a_record_counts_once_whichever_way_it_comes(url: str, metrics: Readable) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one, process(url, metrics) as two:
            records = [record(number) for number in range(1_200)]
            for each in records:
                one.ledger.take(each)
            # From the spool, in two processes, while it is written from memory.
            await asyncio.gather(
                one.ledger.flush(),
                asyncio.to_thread(one.ledger.book, records),
                asyncio.to_thread(two.ledger.book, records[::-1]),
            )
            engine = make_engine(make_settings(database_url=url))
            DirectLedger(engine).book(records)
            engine.dispose()
            for single in (one, two):
                total = await single.total()
                assert (total["calls"], total["cost"], total["completion_tokens"]) == (1_200, 12.0, 24_000)
            reading = await two.ledger.spent(("team", "blue"), ("2026-01-31", "2026-01"), ())
            periods = [(("team", "blue"), period) for period in ("2026-01-31", "2026-01")]
            assert reading.totals == dict.fromkeys(periods, Spent(12 * NANO, 36_000))

    run(scenario)


def test_usage_is_told_by_each_dimension(url: str, metrics: Readable) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one:
            no_tokens = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"))
            one.ledger.take(record(1))
            one.ledger.take(record(2, outcome="cached", cache="hit", cost=0.0, saved_cost=0.01, **no_tokens))
            one.ledger.take(record(3, user="bob", team=None, key_id=None, cost=None))
            one.ledger.take(record(4, model="made-up", outcome="error", cost=None, **no_tokens))
            one.ledger.take(record(5, outcome="cancelled", started_ns=int((NOON_S - 86_400) * 1e9)))
            rows, total = await one.ledger.usage(replace(DAY, since=date(2026, 1, 1), by=("user", "team")))
            names = ("calls", "cached", "errors", "unpriced", "prompt_tokens", "cost", "saved_cost")
            assert [total[name] for name in names] == [5, 1, 1, 1, 30, 0.02, 0.01]
            assert [(row["user"], row["team"], row["calls"]) for row in rows] == [
                ("alice", "blue", 4),
                ("bob", None, 1),
            ]
            models, _ = await one.ledger.usage(replace(DAY, by=("day", "model", "key"), user="alice"))
            assert [(row["day"], row["model"], row["key"], row["calls"]) for row in models] == [
                ("2026-01-31", "demo", "key1", 2),
                # Callers can make up names.
                ("2026-01-31", "other", "key1", 1),
            ]
            nothing, none = await one.ledger.usage(replace(DAY, user="nobody", by=DIMENSIONS))
            assert (nothing, none["calls"], none["cost"]) == ([], 0, 0.0)

    run(scenario)


@pytest.mark.parametrize("scope", ["key", "user", "team"])
def test_a_spent_budget_refuses_until_it_is_renewed(url: str, metrics: Readable, scope: Any) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one, process(url, metrics) as two:
            who = caller(0.02, scope=scope)
            assert not await one.is_spent(who)
            one.ledger.take(record(1))
            assert not await one.is_spent(who)
            # At once, before the database has it.
            one.ledger.take(record(2))
            with pytest.raises(BudgetExceededError) as refused:
                await one.ledger.budgets.check(who)
            assert refused.value.retry_after_s == 12 * 3_600
            assert not refused.value.retryable
            assert f"budget of the {scope} is spent: 0.02 US dollars a day" in refused.value.message
            assert "2026-02-01T00:00:00Z" in refused.value.message
            # The other process sees it once it is written.
            assert not await two.is_spent(who)
            await one.ledger.flush()
            assert await one.is_spent(who)
            await two.ledger.poll()
            assert await two.is_spent(who)
            one.time.advance(12 * 3_600)
            assert not await one.is_spent(who)

    run(scenario)
    assert metrics.value("llmops.budget.exceeded", scope=scope) == 3


def test_a_budget_counts_what_was_spent_before_it_was_set(url: str, metrics: Readable) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one:
            one.ledger.take(record(1, started_ns=int((NOON_S - 10 * 86_400) * 1e9)))
            assert await one.is_spent(caller(30, "tokens", "month"))
            assert not await one.is_spent(caller(30, "tokens", "day"))
            assert not await one.is_spent(caller(0.011, "usd", "month"))
            await one.ledger.flush()
            assert await one.is_spent(caller(0.01, "usd", "month"))
            assert await one.is_spent(caller(0, "usd", "day"))

    run(scenario)


def test_a_budget_near_its_limit_is_announced_once(
    url: str, metrics: Readable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "service.identity.budgets")

    async def scenario() -> None:
        async with process(url, metrics) as one:
            for number in range(1, 7):
                one.ledger.take(record(number))
            await one.ledger.budgets.check(caller(0.1))
            for number in range(7, 14):
                one.ledger.take(record(number))
                await one.ledger.flush()
                await one.ledger.poll()

    run(scenario)
    assert caplog.messages == ["The budget of the key is near its limit", "The budget of the key is spent"]
    assert vars(caplog.records[0])["subject"] == "key1"
    assert vars(caplog.records[0])["spent"] == pytest.approx(0.08)
    assert metrics.value("llmops.budget.near_limit", scope="key") == 1


def test_a_call_without_a_price_counts_its_tokens_and_says_so(
    url: str, metrics: Readable, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one:
            await one.ledger.budgets.check(caller(1.0))
            one.ledger.take(record(1, cost=None))
            one.ledger.take(record(2, cost=None, cache="hit", outcome="cached"))
            one.ledger.take(record(3, cost=0.0))
            one.ledger.take(record(4, cost=None))
            assert (await one.total())["unpriced"] == 2
            assert await one.is_spent(caller(120, "tokens"))
            lines.append(len(said()))
            one.time.advance(86_400)
            await one.ledger.budgets.check(caller(1.0))
            one.ledger.take(record(5, cost=None))
            lines.append(len(said()))

    def said() -> list[str]:
        return [vars(line)["model"] for line in caplog.records if "no price" in line.getMessage()]

    lines: list[int] = []
    run(scenario)
    assert metrics.value("llmops.budget.unpriced", scope="key") == 3
    # Once in each period: a key with a user and a team would get three lines for each call.
    assert (lines, said()) == ([1, 2], ["demo", "demo"])


def test_a_failing_database_loses_nothing_and_opens_nothing(url: str, metrics: Readable) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one:
            who = caller(0.02)
            assert not await one.is_spent(who)
            await one.database.run("purge", _rename("", "_gone"), writes=True)
            for number in (1, 2):
                one.ledger.take(record(number))
            with pytest.raises(DatabaseFailedError):
                await one.ledger.flush()
            with pytest.raises(NotBookedError):
                await asyncio.to_thread(one.ledger.book, [record(3)])
            # What is known keeps counting; what is not known opens nothing.
            assert await one.is_spent(who)
            with pytest.raises(DependencyUnavailableError):
                await one.ledger.budgets.check(caller(0.02, scope="team"))
            with pytest.raises(DependencyUnavailableError):
                await one.total()
            # A new day begins meanwhile.
            one.time.advance(12 * 3_600)
            assert not await one.is_spent(who)
            await one.database.run("purge", _rename("_gone", ""), writes=True)
            await one.ledger.flush()
            assert (await one.total())["calls"] == 2
            reading = await one.ledger.spent(("team", "blue"), ("2026-01-31", "2026-01"), ())
            assert {found.tokens for found in reading.totals.values()} == {60}

    run(scenario)


def _rename(before: str, after: str) -> Callable[[sa.Connection], None]:
    def rename(connection: sa.Connection) -> None:
        for table in (RECORDS, USAGE, SPENT):
            connection.exec_driver_sql(f"ALTER TABLE {table.name}{before} RENAME TO {table.name}{after}")

    return rename


def test_what_was_committed_after_its_time_limit_counts(url: str, metrics: Readable) -> None:
    """It is written again, changes nothing, and must still be told."""

    async def scenario() -> None:
        async with process(url, metrics) as one, process(url, metrics) as two:
            assert not await one.is_spent(caller(0.01))
            one.ledger.take(record(1))
            # As if by itself, without having been told.
            await asyncio.to_thread(two.ledger.book, [record(1)])
            await one.ledger.flush()
            assert not one.ledger.budgets.waiting
            assert await one.is_spent(caller(0.01))

    run(scenario)


def test_callers_do_not_wait_for_a_hanging_database_one_after_the_other(metrics: Readable) -> None:
    class Hanging:
        waiting = 0

        async def run(self, *_: Any, **__: Any) -> Any:
            self.waiting += 1
            await asyncio.Event().wait()

    async def scenario() -> None:
        hanging = Hanging()
        ledger = Ledger(
            cast("Database", hanging), metrics.instruments, known=lambda model: model, records_kept_s=1
        )
        asked = [
            asyncio.create_task(ledger.budgets.check(caller(1, scope=scope)))
            for scope in ("key", "user", "team") * 3
        ]
        await asyncio.sleep(0)
        assert hanging.waiting == len(asked)
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(error) for error in found} == {DependencyUnavailableError}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.identity.ledger.TIMEOUT_S", 0.05)
        run(scenario)


def test_what_is_booked_while_it_is_read_is_not_missed(url: str, metrics: Readable) -> None:
    """It was neither in what was read, nor any more among the calls that wait."""

    async def scenario() -> None:
        async with process(url, metrics) as one:
            run_in_database, flushed = one.database.run, asyncio.Event()

            async def run_slowly(operation: Any, work: Any, *, writes: bool) -> Any:
                found = await run_in_database(operation, work, writes=writes)
                if operation == "find" and not flushed.is_set():
                    flushed.set()
                    await one.ledger.flush()
                return found

            one.ledger.take(record(1))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(one.database, "run", run_slowly)
                assert await one.is_spent(caller(0.01))
            assert flushed.is_set()
            assert not one.ledger.budgets.waiting

    run(scenario)


def test_memory_is_bounded_while_the_database_fails(
    url: str, metrics: Readable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.identity.ledger.MAX_WAITING", 10)

    async def scenario() -> None:
        async with process(url, metrics) as one:
            records = [record(number) for number in range(25)]
            for each in records:
                one.ledger.take(each)
            assert len(one.ledger.budgets.waiting) == 10
            await asyncio.to_thread(one.ledger.book, records)
            assert (await one.total())["calls"] == 25
            assert not one.ledger.budgets.waiting
            assert await one.is_spent(caller(0.25))
            assert not await one.is_spent(caller(0.26))

    run(scenario)


TEXTS = st.text(max_size=400)
CHANGES = {
    **dict.fromkeys(
        ("cost", "saved_cost", "total_tokens", "prompt_tokens", "completion_tokens"),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just([])),
    ),
    **dict.fromkeys(("user", "model", "team"), TEXTS),
    "duration_s": st.floats(0),
    "started_ns": st.integers(0, 2**80),
}


@settings(deadline=None, max_examples=5)
@given(st.lists(st.fixed_dictionaries({}, optional=CHANGES), min_size=30, max_size=60))
def test_every_record_can_be_booked(changes: list[dict[str, Any]]) -> None:
    """One that could not would hold up its file for ever."""

    async def scenario() -> None:
        async with process("sqlite://", Readable()) as one:
            records = [record(number, **each) for number, each in enumerate(changes)]
            await asyncio.to_thread(one.ledger.book, records)
            query = replace(DAY, since=date.min, until=date.max)
            assert (await one.ledger.usage(query))[1]["calls"] == len(records)

    run(scenario)


def test_what_no_database_takes_is_booked(url: str, metrics: Readable) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one:
            odd = record(1, user="a\0\ud800" + "x" * 300, model="\0" * 300, team="\udfff", cost=1e30)
            await asyncio.to_thread(one.ledger.book, [odd, record(2)])
            total = await one.total()
            assert (total["calls"], total["cost"]) == (2, MAX_COST + 0.01)

    run(scenario)


def test_what_is_old_is_deleted(url: str, metrics: Readable) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one:
            one.ledger.take(record(1))
            await one.ledger.flush()
            one.time.advance(KEPT_S + 1)
            await one.ledger.purge()
            assert await _rows(one.database) == {"usage_records": 0, "usage_by_day": 1, "budget_spent": 6}
            one.time.advance(1_150 * 86_400)
            await one.ledger.purge()
            assert set((await _rows(one.database)).values()) == {0}

    run(scenario)


async def _rows(database: Database) -> dict[str, int]:
    def count(connection: sa.Connection) -> dict[str, int]:
        return {
            table.name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in (RECORDS, USAGE, SPENT)
        }

    return await database.run("find", count, writes=False)


def test_too_many_rows_are_refused(
    metrics: Readable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.identity.ledger.MAX_ROWS", 50)

    async def scenario() -> None:
        async with process(f"sqlite:///{tmp_path}/many.db", metrics) as one:
            many = [record(number, user=f"user {number}") for number in range(51)]
            await asyncio.to_thread(one.ledger.book, many)
            with pytest.raises(ValidationError, match="50 rows"):
                await one.ledger.usage(replace(DAY, by=("user",)))
            assert (await one.total())["calls"] == 51

    run(scenario)


@pytest.mark.parametrize(
    ("moment", "periods", "day_ends", "month_ends"),
    [
        ("2026-01-31T23:59:59", ("2026-01-31", "2026-01"), "2026-02-01", "2026-02-01"),
        ("2026-12-01T00:00:00", ("2026-12-01", "2026-12"), "2026-12-02", "2027-01-01"),
        ("2028-02-28T12:00:00", ("2028-02-28", "2028-02"), "2028-02-29", "2028-03-01"),
    ],
)
def test_periods_are_days_and_months_in_utc(
    moment: str, periods: tuple[str, str], day_ends: str, month_ends: str
) -> None:
    moment_s = datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()
    assert periods_of(moment_s) == periods
    for period, ends in (("day", day_ends), ("month", month_ends)):
        renewed = renewal_s(period, moment_s)  # type: ignore[arg-type]  # the two that there are
        assert datetime.fromtimestamp(renewed, UTC).isoformat() == f"{ends}T00:00:00+00:00"


def test_a_call_counts_for_the_day_on_which_it_ended() -> None:
    late = record(started_ns=int((NOON_S + 43_199) * 1e9), duration_s=2.0)
    assert periods_by(late) == ("2026-02-01", "2026-02")
