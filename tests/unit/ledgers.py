"""What the tests of ledger and budgets share: records, callers, and the ledger of one process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

from service.errors import BudgetExceededError
from service.identity.database import Database, open_database
from service.identity.ledger import Ledger, UsageQuery, UsageRow
from service.identity.principal import Budget, Limited, Limits, Principal
from service.recording.record import CallRecord
from tests.fakes.clock import FakeClock
from tests.harness import make_settings
from tests.unit.resilience import Readable

NOON_S = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
KEPT_S = 86_400.0
DAY = UsageQuery(date(2026, 1, 31), date(2026, 1, 31), ())


def record(number: int = 1, **changes: Any) -> CallRecord:
    """The record of a call that cost a cent and 30 tokens."""
    made = CallRecord(
        trace_id=f"{number:032x}",
        span_id=f"{number:016x}",
        operation="chat",
        started_ns=int(NOON_S * 1e9),
        duration_s=0.5,
        user="alice",
        model="demo",
        outcome="success",
        attempts=1,
        prompt_tokens=10,
        completion_tokens=20,
        total_tokens=30,
        cost=0.01,
        team="blue",
        key_id="key1",
    )
    return replace(made, **changes)


def caller(amount: float, unit: Any = "usd", period: Any = "day", scope: Any = "key") -> Principal:
    """A caller whose key, user or team has a budget."""
    limits = Limits(budget=Budget(amount, unit, period))
    name = {"key": "key1", "user": "alice", "team": "blue"}[scope]
    return Principal("alice", "user", "key", "blue", "key1", (Limited(scope, name, limits),))


class Process:
    """The ledger of one process, and its clock."""

    def __init__(self, database: Database, metrics: Readable) -> None:
        self.database, self.metrics = database, metrics
        self.time = FakeClock(NOON_S)
        self.ledger = Ledger(
            database,
            metrics.instruments,
            known=lambda model: model if model == "demo" else "other",
            records_kept_s=KEPT_S,
            now=self.time,
        )

    async def total(self) -> UsageRow:
        """The sum of all usage of the day."""
        return (await self.ledger.usage(DAY))[1]

    async def is_spent(self, who: Principal) -> bool:
        try:
            await self.ledger.budgets.check(who)
        except BudgetExceededError:
            return True
        return False


@asynccontextmanager
async def process(url: str, metrics: Readable) -> AsyncIterator[Process]:
    async with open_database(make_settings(database_url=url), metrics.instruments) as database:
        yield Process(database, metrics)
