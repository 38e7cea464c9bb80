"""Budgets over several processes: each call counts once in each, whoever tells of it first."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.errors import BudgetExceededError
from service.identity.budgets import (
    EXPIRY_S,
    MAX_COST,
    MAX_HEARD,
    MAX_READINGS,
    MAX_TOKENS,
    NANO,
    spending_of,
)
from service.identity.database import Database, make_engine, migrate
from service.identity.ledger import DirectLedger
from service.recording.record import CallRecord
from service.services.replicas import SPENT_VERSION, connect_budgets
from service.shared.news import DELAYS_S, SPENT, SharedNews
from service.shared.valkey import open_log
from tests.harness import make_settings
from tests.unit.databases import run
from tests.unit.ledgers import NOON_S, Process, caller, process, record
from tests.unit.resilience import Readable
from tests.valkey import Valkey

TOKENS = 30
"""Of each record."""

PLENTY = 1_000_000
PROCESSES = 3


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


async def spent(one: Process, scope: str = "key") -> float:
    """How many calls a process has counted for a budget."""
    (state,) = await one.ledger.budgets.states(caller(PLENTY, "tokens", scope=scope))
    return state.spent / TOKENS


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


def hear(one: Process, *records: CallRecord) -> None:
    for each in records:
        one.ledger.budgets.hear(spending_of(each))


# ---- Once, in whatever order -------------------------------------------------------------------------------

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("call", "hear", "flush", "poll", "learn")),
        st.integers(0, PROCESSES - 1),
        st.integers(0, 9),
    ),
    min_size=20,
    max_size=40,
)


@settings(deadline=None, max_examples=15)
@example([("call", 0, 0), ("flush", 0, 0), ("hear", 0, 0), ("poll", 0, 0), ("hear", 1, 0), ("poll", 1, 0)])
@given(OPERATIONS)
def test_each_call_counts_once_whatever_comes_first(operations: list[tuple[str, int, int]]) -> None:
    """News may be late, lost or doubled; the ledger may be read before, after and between."""

    async def scenario() -> None:
        with TemporaryDirectory() as folder:
            async with AsyncExitStack() as stack:
                url = f"sqlite:///{folder}/own.db"
                opened = [await stack.enter_async_context(process(url, Readable())) for _ in range(PROCESSES)]
                await play(opened, operations)

    run(scenario)


async def play(processes: list[Process], operations: list[tuple[str, int, int]]) -> None:
    calls: list[CallRecord] = []
    booked: set[str] = set()
    # What each process must count: its own calls, what it heard, and what was booked when it last read.
    known: list[set[str]] = [set() for _ in processes]
    for one in processes:
        one.ledger.budgets.share(lambda _spending: None)
        assert await spent(one) == 0
    for what, number, which in operations:
        one = processes[number]
        if what == "call":
            made = record(len(calls) + 1)
            calls.append(made)
            one.ledger.take(made)
            known[number].add(made.record_id)
        elif what == "hear" and calls:
            heard = calls[which % len(calls)]
            hear(one, heard)
            known[number].add(heard.record_id)
        elif what == "flush":
            booked |= set(one.ledger.budgets.waiting)
            await one.ledger.flush()
        elif what == "poll":
            await one.ledger.poll()
            known[number] |= booked
        elif what == "learn":
            # Another budget, of which the process did not know before.
            scope = ("user", "team")[which % 2]
            assert await spent(one, scope) >= len(known[number])
        assert await spent(one) == len(known[number]), (what, number)
        assert [await spent(each) for each in processes] == [len(names) for names in known]


@pytest.mark.parametrize("scope", ["key", "user", "team"])
def test_a_budget_that_is_learned_of_later_has_the_same_calls(
    url: str, metrics: Readable, scope: str
) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one, process(url, metrics) as two:
            for number in (1, 2, 3):
                one.ledger.take(record(number))
            hear(two, record(1), record(2))
            await asyncio.to_thread(one.ledger.book, [record(1)])
            # One is booked and heard, one is heard only, and of one nothing is known.
            assert await spent(two, scope) == 2
            await one.ledger.flush()
            await two.ledger.poll()
            assert await spent(two, scope) == 3
            assert two.ledger.budgets.open == []

    run(scenario)


class Hooked(Database):
    """A database, and what happens when a transaction has ended and was not told yet."""

    def __init__(self, engine: sa.Engine, metrics: Readable) -> None:
        super().__init__(engine, metrics.instruments)
        self.after: dict[str, Callable[[], Awaitable[None]]] = {}

    async def run(self, operation: Any, work: Any, *, writes: bool) -> Any:
        found = await super().run(operation, work, writes=writes)
        if operation in self.after:
            await self.after.pop(operation)()
        return found


@asynccontextmanager
async def hooked(url: str, metrics: Readable) -> AsyncIterator[tuple[Process, Hooked, sa.Engine]]:
    engine = make_engine(make_settings(database_url=url))
    await asyncio.to_thread(migrate, engine)
    database = Hooked(engine, metrics)
    try:
        yield Process(database, metrics), database, engine
    finally:
        await database.close()


def test_a_call_that_is_told_while_the_ledger_is_read_counts_once(url: str, metrics: Readable) -> None:
    async def scenario() -> None:
        async with hooked(url, metrics) as (one, database, _engine), process(url, metrics) as other:
            one.ledger.budgets.share(lambda _spending: None)
            assert await spent(one) == 0
            other.ledger.take(record(1))
            await other.ledger.flush()

            async def tell() -> None:
                hear(one, record(1))

            database.after["poll"] = tell
            await one.ledger.poll()
            assert await spent(one) == 1
            # Nor later: Valkey was away, for example.
            hear(one, record(1))
            assert await spent(one) == 1

    run(scenario)


def test_a_call_that_is_booked_while_the_ledger_is_read_counts_once(url: str, metrics: Readable) -> None:
    """Between the statements of one transaction, where PostgreSQL would show it to the later ones only."""

    async def scenario() -> None:
        async with hooked(url, metrics) as (one, _database, engine):
            beside = make_engine(make_settings(database_url=url))
            numbers = iter((1, 2))

            @sa.event.listens_for(engine, "after_cursor_execute")
            def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
                if statement.startswith("SELECT") and "budget_spent" in statement:
                    for number in numbers:
                        DirectLedger(beside).book([record(number)])
                        return

            hear(one, record(1), record(2))
            # One is booked while a budget is learned of, the other in a poll.
            assert await spent(one) == 2
            await one.ledger.poll()
            assert await spent(one) == 2
            assert next(numbers, None) is None
            await one.ledger.poll()
            assert (await spent(one), one.ledger.budgets.open) == (2, [])
            beside.dispose()

    run(scenario)


def test_what_this_process_has_booked_for_another_counts_once(url: str, metrics: Readable) -> None:
    """The spool of a process that was killed: the others have heard of its calls."""

    async def scenario() -> None:
        async with process(url, metrics) as one, process(url, metrics) as two:
            assert (await spent(one), await spent(two)) == (0, 0)
            for each in (one, two):
                hear(each, record(1))
            await asyncio.to_thread(one.ledger.book, [record(1), record(2)])
            for each in (one, two):
                await each.ledger.poll()
                assert await spent(each) == 2

    run(scenario)


# ---- Bounds ------------------------------------------------------------------------------------------------


def test_a_call_that_is_never_booked_does_not_count_for_ever(metrics: Readable) -> None:
    async def scenario() -> None:
        async with process("sqlite://", metrics) as one:
            assert await spent(one) == 0
            hear(one, record(1))
            for _ in range(MAX_READINGS):
                await one.ledger.poll()
            assert await spent(one) == 1
            await one.ledger.poll()
            assert (await spent(one), one.ledger.budgets.open) == (0, [])
            # Nor does a process that starts later count it.
            one.time.advance(EXPIRY_S + 1)
            hear(one, record(1))
            assert await spent(one) == 0

    run(scenario)


def test_what_is_heard_is_bounded(metrics: Readable) -> None:
    async def scenario() -> None:
        async with process("sqlite://", metrics) as one:
            assert await spent(one) == 0
            hear(one, *(record(number) for number in range(1, MAX_HEARD + 3)))
            assert (await spent(one), len(one.ledger.budgets.open)) == (MAX_HEARD, MAX_HEARD)
            # They count when the ledger has them.
            await asyncio.to_thread(one.ledger.book, [record(number) for number in (1, 2)])
            await one.ledger.poll()
            assert await spent(one) == MAX_HEARD + 2

    run(scenario)


# ---- Over a server -----------------------------------------------------------------------------------------


class Waits:
    """Waits for a moment, however long it was asked to."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        await asyncio.sleep(0.001)


@asynccontextmanager
async def told(one: Process, valkey: Valkey) -> AsyncIterator[Waits]:
    """Connect a process's budgets to the others, as at its start."""
    waits = Waits()
    async with open_log(valkey.url, SPENT) as log:
        news = SharedNews(log, one.metrics.instruments.shared_news, waits, at_once=SPENT.told_at_once)
        connect_budgets(news, one.ledger.budgets, one.time)
        await news.catch_up()
        running = asyncio.create_task(news.run())
        try:
            yield waits
        finally:
            running.cancel()


def counted(metrics: Readable, outcome: str) -> float:
    return metrics.value("llmops.shared.news", topic="spent", outcome=outcome)


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    if "valkey" in request.fixturenames:
        request.getfixturevalue("valkey").ask("FLUSHALL")


@pytest.mark.parametrize("scope", ["key", "user", "team"])
def test_what_is_spent_in_one_process_counts_in_the_others_at_once(
    valkey: Valkey, url: str, metrics: Readable, scope: str
) -> None:
    async def scenario() -> None:
        async with (
            process(url, metrics) as one,
            process(url, metrics) as two,
            told(one, valkey),
            told(two, valkey),
        ):
            who = caller(3 * TOKENS, "tokens", scope=scope)
            assert (await one.is_spent(who), await two.is_spent(who)) == (False, False)
            for number, each in enumerate((one, two, one), 1):
                each.ledger.take(record(number))
            # Nothing is booked, and nothing was read.
            for each in (one, two):
                await until(lambda each=each: each.is_spent(who))  # type: ignore[misc]
            for each in (one, two, one, two):
                await each.ledger.flush()
                await each.ledger.poll()
                assert await spent(each, scope) == 3
            assert one.ledger.budgets.open == two.ledger.budgets.open == []

    run(scenario)
    assert (counted(metrics, "told"), counted(metrics, "heard")) == (3, 3)


def test_only_what_counts_for_a_budget_is_told(valkey: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        async with process("sqlite://", metrics) as one, told(one, valkey):
            one.ledger.take(record(1))
            assert await spent(one, "team") == 1
            one.ledger.take(record(2, team="red"))
            one.ledger.take(record(3, cost=0.0, prompt_tokens=0, completion_tokens=0, total_tokens=0))
            one.ledger.take(record(4))

            async def is_told() -> bool:
                return counted(metrics, "told") > 0

            await until(is_told)

    run(scenario)
    entries = valkey.ask("XRANGE", SPENT.key, "-", "+")
    assert entries.count(record(4).record_id.encode()) == 1
    assert counted(metrics, "told") == 1


def test_a_process_that_starts_counts_what_is_not_booked_yet(
    valkey: Valkey, url: str, metrics: Readable
) -> None:
    async def scenario() -> None:
        async with process(url, metrics) as one, process(url, metrics) as late:
            async with told(one, valkey):
                assert await spent(one) == 0
                for number in (1, 2):
                    one.ledger.take(record(number))
                await one.ledger.flush()
                for number in (3, 4):
                    one.ledger.take(record(number))

                async def are_told() -> bool:
                    return counted(metrics, "told") == 4

                await until(are_told)
            async with told(late, valkey):
                assert await spent(late) == 4
                await one.ledger.flush()
                await late.ledger.poll()
                assert (await spent(late), late.ledger.budgets.open) == (4, [])

    run(scenario)


def test_a_process_that_starts_reads_the_entries_of_the_last_moments(
    valkey: Valkey, metrics: Readable
) -> None:
    async def scenario() -> None:
        async with process("sqlite://", metrics) as one:
            assert await spent(one) == 0
            newest_ms = 1_700_000_000_000
            for number, age_s in enumerate((SPENT.kept_s + 1, SPENT.kept_s - 1, 0.0)):
                told_ms = newest_ms - round(age_s * 1_000)
                entry = ("topic", "spent", "origin", "other", "call", call(record_id=f"{number:032x}"))
                valkey.ask("XADD", SPENT.key, f"{told_ms}-0", *entry)
            async with told(one, valkey):
                assert await spent(one) == 2

    run(scenario)


def test_while_the_server_is_away_the_ledger_tells_and_what_is_open_is_told_later(
    url: str, metrics: Readable
) -> None:
    async def scenario(valkey: Valkey) -> None:
        async with (
            process(url, metrics) as one,
            process(url, metrics) as two,
            told(one, valkey) as waits,
            told(two, valkey),
        ):
            assert (await spent(one), await spent(two)) == (0, 0)
            valkey.kill()
            one.ledger.take(record(1))
            await one.ledger.flush()
            await two.ledger.poll()
            assert await spent(two) == 1
            one.ledger.take(record(2))

            async def are_late() -> bool:
                return len(waits.asked) > 2 * len(DELAYS_S)

            await until(are_late)
            await asyncio.to_thread(valkey.start)

            async def is_heard() -> bool:
                return await spent(two) == 2

            await until(is_heard)
        assert (counted(metrics, "told"), counted(metrics, "heard")) == (1, 1)

    with Valkey() as own:
        run(lambda: scenario(own))


def call(**changes: Any) -> str:
    """What an entry says of a call."""
    fields = {
        "version": SPENT_VERSION,
        "record_id": "a" * 32,
        "ended_s": int(NOON_S),
        "cost_nano": NANO,
        "tokens": TOKENS,
        "user": "alice",
        "key": "key1",
        "team": "blue",
        **changes,
    }
    return json.dumps(list(fields.values()))


GARBAGE: Mapping[str, str | None] = {
    "no call": None,
    "empty": "",
    "not JSON": "{",
    "a number": "1",
    "an object": "{}",
    "nested": "[" * 1_000 + "]" * 1_000,
    "too few": "[1, 2]",
    "too many": call(more=1),
    "too long": call(user="x" * 3_000),
    "another version": call(version=SPENT_VERSION + 1),
    "no id": call(record_id=None),
    "a short id": call(record_id="abc"),
    "negative cost": call(cost_nano=-1),
    "negative tokens": call(tokens=-TOKENS),
    "a fraction": call(tokens=0.5),
    "infinite": call(tokens=float("inf")),
    "not a number": call(tokens=float("nan")),
    "true": call(tokens=True),
    "a text": call(cost_nano="1"),
    "huge cost": call(cost_nano=int(MAX_COST) * NANO + 1),
    "huge tokens": call(tokens=int(MAX_TOKENS) + 1),
    "the day after tomorrow": call(ended_s=int(NOON_S) + 2 * 86_400),
    "before 1970": call(ended_s=-1),
    "nobody's": call(user=None, key=None, team=None),
    "no name": call(user=""),
    "a list as a name": call(key=["key1"]),
    "a name that no database takes": call(key="key1\0"),
    "a long name": call(team="x" * 257),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_no_process_can_have_told_is_left_out(valkey: Valkey, metrics: Readable, name: str) -> None:
    async def scenario() -> None:
        async with process("sqlite://", metrics) as one, told(one, valkey):
            assert await spent(one) == 0
            text = GARBAGE[name]
            entry = ["other", "x"] if text is None else ["call", text]
            for fields in (entry, ["call", call(record_id="b" * 32)]):
                valkey.ask("XADD", SPENT.key, "*", "topic", "spent", "origin", "other", *fields)

            async def is_heard() -> bool:
                return counted(metrics, "heard") > 0

            await until(is_heard)
            assert [await spent(one, scope) for scope in ("key", "user", "team")] == [1, 1, 1]

    run(scenario)
    assert (counted(metrics, "heard"), counted(metrics, "unusable")) == (1, 1)


def test_the_most_that_an_entry_adds_is_what_a_call_adds(valkey: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        async with process("sqlite://", metrics) as one, told(one, valkey):
            assert await spent(one) == 0
            most = call(cost_nano=int(MAX_COST) * NANO, tokens=int(MAX_TOKENS))
            for _ in range(3):
                valkey.ask("XADD", SPENT.key, "*", "topic", "spent", "origin", "other", "call", most)

            async def are_heard() -> bool:
                return counted(metrics, "heard") == 3

            await until(are_heard)
            assert await spent(one) == MAX_TOKENS / TOKENS

    run(scenario)


def test_each_process_that_knows_a_budget_announces_it_once(
    metrics: Readable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "service.identity.budgets")
    said: list[str] = []

    def messages() -> list[str]:
        return [line.getMessage() for line in caplog.records if line.name == "service.identity.budgets"]

    async def scenario() -> None:
        async with process("sqlite://", metrics) as one:
            await one.ledger.budgets.check(caller(0.1))
            hear(one, *(record(number) for number in range(1, 13)))
            said.extend(messages())
            await asyncio.to_thread(one.ledger.book, [record(number) for number in range(1, 13)])
            await one.ledger.poll()
            with pytest.raises(BudgetExceededError):
                await one.ledger.budgets.check(caller(0.1))

    run(scenario)
    assert said == ["The budget of the key is near its limit", "The budget of the key is spent"]
    assert messages() == said
    assert metrics.value("llmops.budget.near_limit", scope="key") == 1
