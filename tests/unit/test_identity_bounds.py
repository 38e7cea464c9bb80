"""What guesses, many keys and a clock that was set back cost: counted in transactions of the database."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from service.errors import AuthenticationError, OverloadedError
from service.identity.changes import CHANGES, MAX_CHANGES, note_change
from service.identity.keys import KEYS, MAX_LOOKUPS, MAX_UNKNOWN, SECRETS, ApiKey, new_id, new_key
from service.identity.principal import Limits
from tests.unit import ledgers
from tests.unit.databases import run
from tests.unit.resilience import Readable
from tests.unit.test_api_keys import NOW_S, Process, process

DAY_S = 86_400.0
MANY = 10_000


async def _make_many(one: Process, count: int) -> list[tuple[str, str]]:
    """Insert keys at once: their ids and texts."""
    made = [(key_id, new_key(key_id)) for key_id in (new_id() for _ in range(count))]
    rows = [
        {
            "id": key_id,
            "name": "app",
            "owner": f"app-{number % 10}",
            "role": "user",
            "team": None,
            "limits": Limits().to_json(),
            "created_at": NOW_S,
        }
        for number, (key_id, _) in enumerate(made)
    ]
    hashes = [{"hash": one.keys._hash(text), "key_id": key_id} for key_id, text in made]  # noqa: SLF001

    for start in range(0, count, 500):

        def insert(connection: sa.Connection, start: int = start) -> None:
            connection.execute(sa.insert(KEYS), rows[start : start + 500])
            connection.execute(sa.insert(SECRETS), hashes[start : start + 500])

        await one.database.run("keep", insert, writes=True)
    return made


def test_ten_thousand_keys_are_listed_and_looked_up(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            made = await _make_many(one, MANY)
            before = one.look_ups
            listed: list[ApiKey] = []
            while page := await one.keys.page(after=listed[-1].id if listed else "", limit=1_000):
                listed += page
            assert [key.id for key in listed] == sorted(key_id for key_id, _ in made)
            # A page is one transaction, and the empty one at the end.
            assert one.look_ups - before == MANY // 1_000 + 1
            owned = await one.keys.page(owner="app-7", limit=1_000)
            assert (len(owned), {key.owner for key in owned}) == (MANY // 10, {"app-7"})

            before = one.look_ups
            some = made[:: MANY // (2 * MAX_LOOKUPS)]
            for number, (key_id, text) in enumerate(some, 1):
                if number % MAX_LOOKUPS == 0:
                    one.clock.advance(2.0)
                assert (await one.keys.identify(text)).id == key_id
            assert one.look_ups - before == len(some)
            for _ in range(3):
                for key_id, text in some:
                    assert (await one.keys.identify(text)).id == key_id
            # Warm, none of them is a transaction.
            assert one.look_ups - before == len(some)

    run(scenario)


def test_a_look_up_reads_one_row_through_an_index(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            made = await _make_many(one, MANY)
            said: list[tuple[str, Any]] = []
            engine = one.database._engine  # noqa: SLF001

            def executing(
                _connection: object, _cursor: object, sql: str, values: Any, *_more: object
            ) -> None:
                if sql.startswith("SELECT"):
                    said.append((sql, values))

            sa.event.listen(engine, "before_cursor_execute", executing)
            await one.keys.identify(made[0][1])
            sa.event.remove(engine, "before_cursor_execute", executing)
            ((sql, values),) = said

            def plan(connection: sa.Connection) -> str:
                connection.exec_driver_sql("ANALYZE")
                explain = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
                return repr(connection.exec_driver_sql(f"{explain} {sql}", values).all())

            found = await one.database.run("find", plan, writes=True)
            assert "SEARCH" in found or "Index Scan" in found
            assert "SCAN" not in found
            assert "Seq Scan" not in found

    run(scenario)


def test_twenty_thousand_guesses_ask_for_a_bounded_number_and_take_bounded_memory(
    url: str,
) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            key, text = await one.make()
            assert await one.keys.identify(text) == key
            one.clock.advance(2.0)
            before, periods, refused = one.look_ups, 4, 0
            for period in range(periods):
                asked = one.look_ups
                for _ in range(20_000 // periods):
                    try:
                        await one.keys.identify(new_key(new_id()))
                    except OverloadedError:
                        refused += 1
                    except AuthenticationError:
                        pass
                    else:
                        raise AssertionError("a guess was right")
                assert one.look_ups - asked == MAX_LOOKUPS, period
                # Those who are known notice nothing.
                assert await one.keys.identify(text) == key
                one.clock.advance(2.0)
            assert one.look_ups - before == periods * MAX_LOOKUPS
            assert refused == 20_000 - periods * MAX_LOOKUPS
            # What is remembered of guesses is what was asked for, and no more than there is room for.
            assert len(one.keys._unknown) == periods * MAX_LOOKUPS  # noqa: SLF001
            assert one.keys._unknown.maxsize == MAX_UNKNOWN  # noqa: SLF001
            assert len(one.keys._known) == 1  # noqa: SLF001

    run(scenario)


# ---- The clock is set back -----------------------------------------------------------------------------


def _set(clock: Any, now: float) -> None:
    """Set the wall clock, which may go back."""
    clock._now = now  # noqa: SLF001 - of a fake for monotonic clocks


def test_a_clock_that_is_set_back_ends_and_revives_no_key_for_good(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            revoked, revoked_text = await one.make()
            expiring, expiring_text = await one.make(expires_at=NOW_S + 10)
            plain, plain_text = await one.make()
            await one.keys.revoke(revoked.id)
            _, second = await one.keys.rotate(plain.id, 0)
            _set(one.time, NOW_S + 20)
            with pytest.raises(AuthenticationError, match="expired"):
                await one.keys.identify(expiring_text)
            assert (await one.keys.identify(second)).id == plain.id
            await one.keys.write_used()
            _set(one.time, NOW_S - 40 * DAY_S)
            assert (await one.keys.identify(second)).id == plain.id
            with pytest.raises(AuthenticationError, match="revoked"):
                await one.keys.identify(revoked_text)
            # By that clock it has not expired; it does again once the clock is right.
            assert (await one.keys.identify(expiring_text)).id == expiring.id
            await one.keys.write_used()
            found = await one.keys.get(plain.id)
            assert found is not None
            assert found.last_used_at == NOW_S + 20
            late, _ = await one.make(name="made in the past")
            assert await one.keys.revoke(late.id) == await one.keys.get(late.id)
            _set(one.time, NOW_S + 20)
            with pytest.raises(AuthenticationError, match="expired"):
                await one.keys.identify(expiring_text)
            with pytest.raises(AuthenticationError, match="revoked"):
                await one.keys.identify(revoked_text)
            with pytest.raises(AuthenticationError, match="replaced"):
                await one.keys.identify(plain_text)

    run(scenario)


@pytest.mark.parametrize("ahead_s", [DAY_S, -DAY_S])
def test_a_change_reaches_the_others_whatever_the_clocks_say(url: str, ahead_s: float) -> None:
    async def scenario() -> None:
        async with process(url) as right, process(url) as wrong, process(url) as other:
            _set(wrong.time, NOW_S + ahead_s)
            made = [await right.make() for _ in range(2)]
            for one in (right, wrong, other):
                await one.feed.poll()
                for key, text in made:
                    assert (await one.keys.identify(text)).id == key.id
            await wrong.keys.revoke(made[0][0].id)
            await right.keys.revoke(made[1][0].id)
            # Whoever deletes old changes must not delete those that nobody has read yet.
            await wrong.make(name="one more")
            await wrong.keys.rotate((await wrong.make())[0].id, 0)
            await other.feed.poll()
            for _, text in made:
                with pytest.raises(AuthenticationError, match="revoked"):
                    await other.keys.identify(text)

    run(scenario)


def test_a_process_that_is_far_behind_forgets_what_it_knows(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one, process(url) as other:
            key, text = await one.make()
            await other.feed.poll()
            assert await other.keys.identify(text) == key
            await one.keys.revoke(key.id)

            def note_some(connection: sa.Connection) -> None:
                for number in range(MAX_CHANGES // 10 + 1):
                    note_change(connection, "other", str(number), NOW_S)

            for _ in range(10):
                await one.database.run("keep", note_some, writes=True)
            await other.feed.poll()
            with pytest.raises(AuthenticationError, match="revoked"):
                await other.keys.identify(text)
            rows = await one.database.run(
                "find", lambda connection: len(connection.execute(sa.select(CHANGES)).all()), writes=False
            )
            assert rows == MAX_CHANGES + 1

    run(scenario)


def test_a_process_sees_that_its_database_was_replaced(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one, process(url) as other:
            key, text = await one.make()
            for _ in range(3):
                await one.keys.rotate((await one.make())[0].id, 0)
            await other.feed.poll()
            assert await other.keys.identify(text) == key

            def restore(connection: sa.Connection) -> None:
                connection.execute(sa.delete(CHANGES))
                connection.execute(sa.update(KEYS).values(revoked_at=NOW_S))

            await one.database.run("keep", restore, writes=True)
            await other.feed.poll()
            with pytest.raises(AuthenticationError, match="revoked"):
                await other.keys.identify(text)

    run(scenario)


def test_a_clock_that_is_set_back_counts_nothing_twice(url: str) -> None:
    async def scenario() -> None:
        async with ledgers.process(url, Readable()) as one:
            who = ledgers.caller(0.02, period="month")
            one.ledger.take(ledgers.record(1))
            one.ledger.take(ledgers.record(2))
            assert await one.is_spent(who)
            await one.ledger.flush()
            # Into last month: nothing was spent in it, and the call of then counts there.
            _set(one.time, ledgers.NOON_S - 40 * DAY_S)
            assert not await one.is_spent(who)
            past = int(one.time() * 1e9)
            one.ledger.take(ledgers.record(3, started_ns=past))
            one.ledger.take(ledgers.record(1))
            await one.ledger.flush()
            await one.ledger.poll()
            await one.ledger.purge()
            assert not await one.is_spent(who)
            one.ledger.take(ledgers.record(4, started_ns=past))
            assert await one.is_spent(who)
            # And forth again.
            _set(one.time, ledgers.NOON_S)
            assert await one.is_spent(who)
            assert not await one.is_spent(ledgers.caller(0.021, period="month"))
            await one.ledger.flush()
            await asyncio.to_thread(one.ledger.book, [ledgers.record(number) for number in (1, 2)])
            assert (await one.total())["calls"] == 2
            last = datetime.fromtimestamp(ledgers.NOON_S - 40 * DAY_S, UTC).date()
            query = replace(ledgers.DAY, since=last, until=last)
            assert (await one.ledger.usage(query))[1]["calls"] == 2

    run(scenario)
