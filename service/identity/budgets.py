"""Decides whether a caller's budgets are spent, from what is in memory.

What is spent is what the ledger had when it was read, and each call that it did not have then, of this
process and of others, which tell of theirs. A call is counted when it has ended, so calls in flight may go
beyond a budget by what they cost themselves.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final, Protocol

import cachetools

from service.errors import BudgetExceededError, DependencyUnavailableError
from service.identity.principal import MAX_NAME_CHARS, Budget, Limited, Period, Principal, Scope
from service.recording.record import CallRecord
from service.telemetry import names
from service.telemetry.events import emit
from service.telemetry.instruments import Instruments

NANO: Final = 1_000_000_000
"""Money is counted in whole billionths of a US dollar: sums are exact, whatever their order."""

MAX_COST: Final = 1_000_000.0
MAX_TOKENS: Final = 1_000_000_000.0
"""The most that one call adds; sums of billions of calls fit into the database's 64 bits."""

DAY_S: Final = 86_400
MAX_SECONDS: Final = 253_402_300_799.0
"""The last second of the year 9999."""

NEAR_PERCENT: Final = 80
"""The part of a budget from which on it is near its limit."""

MAX_KNOWN: Final = 50_000
"""How many keys, users and teams with budgets a process remembers."""

MAX_HEARD: Final = 10_000
"""Calls of other processes that the ledger does not have yet; of more, the oldest are dropped, and count when
the ledger has them."""

MAX_READINGS: Final = 450
"""Readings of the ledger, one each 2 s, that may be without a call of another process. After them it counts
no more: its process was killed, and its spool is lost. While the database fails, nothing expires."""

EXPIRY_S: Final = 900.0
"""How long ago a call that is told of may have ended. That is as long as ``MAX_READINGS`` take."""

logger = logging.getLogger(__name__)

Subject = tuple[Scope, str]
"""Whose budget it is: ``key``, ``user`` or ``team``, and its id or name."""

Periods = tuple[str, str]
"""A day and a month, as ``2026-01-15`` and ``2026-01``."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent in a period, in billionths of a US dollar and in tokens."""

    cost_nano: int = 0
    tokens: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        """The sum."""
        return Spent(self.cost_nano + other.cost_nano, self.tokens + other.tokens)

    def __sub__(self, other: "Spent") -> "Spent":
        """The difference."""
        return Spent(self.cost_nano - other.cost_nano, self.tokens - other.tokens)

    def of(self, budget: Budget) -> int:
        """What counts for a budget: billionths of a US dollar, or tokens."""
        return self.cost_nano if budget.unit == "usd" else self.tokens


NOTHING: Final = Spent()


@dataclass(frozen=True, slots=True)
class Spending:
    """What one call has spent.

    Args:
        record_id: The id of its record.
        ended_s: When it has ended, as Unix time.
        spent: How much.
        subjects: Whose budgets it counts for.
    """

    record_id: str
    ended_s: int
    spent: Spent
    subjects: tuple[Subject, ...]

    @property
    def periods(self) -> Periods:
        """The day on which the call has ended, and its month."""
        return periods_of(self.ended_s)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the ledger has at one moment.

    Args:
        totals: What was spent in all, by subject and period.
        booked: Which of the records that were asked about it has.
        latest: The ids of the records that were booked last.
    """

    totals: Mapping[tuple[Subject, str], Spent]
    booked: Collection[str] = frozenset()
    latest: Collection[str] = frozenset()


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget, and what is spent of it.

    Args:
        scope: Whose it is.
        name: The key's id, the user's or the team's name.
        budget: The budget.
        spent: In its unit.
        is_spent: Whether nothing is left.
        renews_at: Unix time in seconds.
    """

    scope: Scope
    name: str
    budget: Budget
    spent: float
    is_spent: bool
    renews_at: float

    @property
    def share(self) -> float:
        """The share that is spent; 1 and more where nothing is left."""
        return self.spent / self.budget.amount if self.budget.amount else 1.0

    @property
    def left(self) -> float:
        """What is left."""
        return max(0.0, self.budget.amount - self.spent)


class SpentSource(Protocol):
    """Where it is written what was spent."""

    async def spent(self, subject: Subject, periods: Periods, record_ids: Collection[str]) -> Reading:
        """What was spent by a subject, and which of these records are in it.

        Raises:
            DependencyUnavailableError: It cannot be read.
        """
        ...


@dataclass(slots=True)
class _Known:
    """What is known of a subject, by period: what was read, what is not in it, and what was announced."""

    written: dict[str, Spent]
    budget: Budget | None = None
    announced: dict[str, int] = field(default_factory=dict)
    unpriced_in: str = ""
    """The period in which it was last said that a call has no price."""
    open: dict[str, Spending] = field(default_factory=dict)
    """Calls that are not in ``written``, by the id of the record."""
    sums: dict[str, Spent] = field(default_factory=dict)
    """What these have spent."""

    def spent(self, period: str) -> Spent:
        """What was spent in a period."""
        return self.written.get(period, NOTHING) + self.sums.get(period, NOTHING)

    def add(self, spending: Spending) -> None:
        """Add a call that was not in what was read; once, whoever tells of it how often."""
        if spending.record_id not in self.open and spending.spent != NOTHING:
            self.open[spending.record_id] = spending
            _add(self.sums, spending.periods, spending.spent)

    def remove(self, record_id: str) -> Spending | None:
        """Remove a call, which is in what was read now."""
        spending = self.open.pop(record_id, None)
        if spending is not None:
            _add(self.sums, spending.periods, NOTHING - spending.spent)
        if not self.open:
            # Sums of past periods are not kept for ever.
            self.sums.clear()
        return spending

    def move(self, record_id: str) -> None:
        """Add a call to what was read, as this process has booked it since."""
        spending = self.remove(record_id)
        if spending is not None:
            _add(
                self.written,
                [period for period in spending.periods if period in self.written],
                spending.spent,
            )


def _add(sums: dict[str, Spent], periods: Collection[str], spent: Spent) -> None:
    for period in periods:
        sums[period] = sums.get(period, NOTHING) + spent


@dataclass(slots=True)
class _Heard:
    """A call of another process, or one that another process has booked, and how often it was not found."""

    spending: Spending
    readings: int = 0


# ---- What a record counts for ----------------------------------------------------------------------------
#
# Every record counts for something, whatever it holds: one that could not be booked would hold up its file.


def spent_by(record: CallRecord) -> Spent:
    """What a call has cost."""
    tokens = count(record.total_tokens)
    if record.total_tokens is None:
        tokens = count(record.prompt_tokens) + count(record.completion_tokens)
    return Spent(nano(record.cost), tokens)


def spending_of(record: CallRecord) -> Spending:
    """What a record counts for."""
    return Spending(record.record_id, int(_ended_s(record)), spent_by(record), tuple(subjects_of(record)))


def periods_by(record: CallRecord) -> Periods:
    """The day on which a call has ended, and its month."""
    return periods_of(_ended_s(record))


def _ended_s(record: CallRecord) -> float:
    return min(record.started_ns / 1e9 + _number(record.duration_s, MAX_SECONDS), MAX_SECONDS)


def subjects_of(record: CallRecord) -> list[Subject]:
    """Whose budgets a call counts for."""
    subjects: list[Subject] = [("user", as_name(record.user))]
    if record.key_id:
        subjects.append(("key", as_name(record.key_id)))
    if record.team:
        subjects.append(("team", as_name(record.team)))
    return subjects


def is_unpriced(record: CallRecord) -> bool:
    """Whether the upstream has answered a call without a price, as in a stream that was left."""
    answered = record.outcome in {"success", "cancelled"} and record.attempts > 0
    return record.cost is None and record.cache != "hit" and (answered or bool(record.total_tokens))


def nano(cost: object) -> int:
    """A record's US dollars in billionths."""
    return round(_number(cost, MAX_COST) * NANO)


def count(tokens: object) -> int:
    """A record's number of tokens."""
    return int(_number(tokens, MAX_TOKENS))


def _number(value: object, most: float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return min(value, most)
    return 0.0


@lru_cache(maxsize=4_096)
def as_name(text: object) -> str:
    """A name as every database takes it: no NUL, no half of a surrogate pair, not too long."""
    cleaned = str(text).encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    return cleaned[:MAX_NAME_CHARS]


# ---- Periods ---------------------------------------------------------------------------------------------


def periods_of(moment_s: float) -> Periods:
    """The day and the month of a moment, in UTC."""
    return _periods(int(moment_s // DAY_S))


@lru_cache(maxsize=64)
def _periods(day: int) -> Periods:
    moment = datetime.fromtimestamp(day * DAY_S, UTC)
    return moment.strftime("%Y-%m-%d"), moment.strftime("%Y-%m")


def renewal_s(period: Period, moment_s: float) -> float:
    """When the day or the month of a moment ends, as Unix time."""
    return _renewal_s(period, int(moment_s // DAY_S))


@lru_cache(maxsize=64)
def _renewal_s(period: Period, day: int) -> float:
    if period == "day":
        return (day + 1) * float(DAY_S)
    midnight = datetime.fromtimestamp(day * DAY_S, UTC)
    return (midnight.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()


def _units(budget: Budget) -> int:
    """In how many parts the unit of a budget is counted."""
    return NANO if budget.unit == "usd" else 1


def _current(budget: Budget, periods: Periods) -> str:
    """The one of a moment's periods that a budget is for."""
    day, month = periods
    return day if budget.period == "day" else month


def _limit(budget: Budget) -> int:
    return round(budget.amount * _units(budget))


class Budgets:
    """Knows what was spent by whoever has a budget.

    Not thread-safe: it belongs to the event loop.

    Args:
        source: The ledger.
        instruments: Counts refused calls, budgets near their limits, and calls without a price.
        now: Unix time in seconds.
    """

    def __init__(
        self, source: SpentSource, instruments: Instruments, now: Callable[[], float] = time.time
    ) -> None:
        self._source = source
        self._exceeded = instruments.budget_exceeded
        self._near_limit = instruments.budget_near_limit
        self._unpriced = instruments.budget_unpriced
        self._now = now
        self._known: cachetools.LRUCache[Subject, _Known] = cachetools.LRUCache(MAX_KNOWN)
        # This process's calls that are not booked yet, by the id of the record, oldest first.
        self._open: dict[str, CallRecord] = {}
        # Those of others, likewise.
        self._heard: dict[str, _Heard] = {}
        self._latest: Collection[str] = frozenset()
        # What this process has booked counts already, whoever tells of it afterwards.
        self._booked: cachetools.FIFOCache[str, bool] = cachetools.FIFOCache(MAX_HEARD)
        self._tell: Callable[[Spending], None] = lambda _spending: None
        self.is_shared = False
        """Whether other processes tell of their calls."""

    def share(self, tell: Callable[[Spending], None]) -> None:
        """Tell other processes of each call that counts for a budget; ``hear`` takes what they tell."""
        self._tell, self.is_shared = tell, True

    async def check(self, caller: Principal) -> None:
        """Refuse a call of a caller with a spent budget.

        Raises:
            BudgetExceededError: With the seconds until the last of the spent budgets is renewed.
            DependencyUnavailableError: It is not known what was spent, because the database does not answer.
        """
        if not any(limited.limits.budget for limited in caller.limits):
            return
        spent = [state for state in await self.states(caller) if state.is_spent]
        if not spent:
            return
        last = max(spent, key=lambda state: state.renews_at)
        for state in spent:
            self._exceeded.add(1, {"scope": state.scope})
        unit = "US dollars" if last.budget.unit == "usd" else "tokens"
        renewal = datetime.fromtimestamp(last.renews_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        raise BudgetExceededError(
            f"The budget of the {last.scope} is spent: {last.budget.amount:g} {unit} a {last.budget.period}. "
            f"It is renewed at {renewal}.",
            retry_after_s=max(1.0, last.renews_at - self._now()),
        )

    async def states(self, caller: Principal) -> list[BudgetState]:
        """The caller's budgets; raises ``DependencyUnavailableError``."""
        return [await self.state(limited) for limited in caller.limits if limited.limits.budget is not None]

    async def state(self, limited: Limited) -> BudgetState:
        """The budget of a key, a user or a team, which has one; raises ``DependencyUnavailableError``."""
        budget = limited.limits.budget
        if budget is None:
            raise ValueError("no budget")
        subject, now_s = (limited.scope, limited.name), self._now()
        periods = periods_of(now_s)
        known = self._known.get(subject)
        if known is None or not set(periods) <= known.written.keys():
            known = await self._learn(subject, periods, known)
        known.budget = budget
        period = _current(budget, periods)
        spent = known.spent(period).of(budget)
        known.announced.setdefault(period, spent)
        return BudgetState(
            limited.scope,
            limited.name,
            budget,
            spent / _units(budget),
            spent >= _limit(budget),
            renewal_s(budget.period, now_s),
        )

    async def _learn(self, subject: Subject, periods: Periods, before: _Known | None) -> _Known:
        """Read what a subject has spent.

        Where the database fails as a period begins, what is known of the period before goes on: nothing of
        the new one can be written either, but by processes that have another way to the database.
        """
        asked = {spending.record_id for spending in self._open_of(subject)}
        try:
            reading = await self._source.spent(subject, periods, asked)
        except DependencyUnavailableError:
            if before is None:
                raise
            reading = Reading({(subject, period): spent for period, spent in before.written.items()})
        known = _Known({period: reading.totals.get((subject, period), NOTHING) for period in periods})
        known.unpriced_in = "" if before is None else before.unpriced_in
        for spending in self._open_of(subject):
            if spending.record_id not in reading.booked:
                known.add(spending)
        self._known[subject] = known
        return known

    def _open_of(self, subject: Subject) -> Iterator[Spending]:
        """The calls of a subject that the ledger did not have when it was last read."""
        for record in self._open.values():
            if subject in subjects_of(record):
                yield spending_of(record)
        for heard in self._heard.values():
            if subject in heard.spending.subjects:
                yield heard.spending

    # ---- What the ledger and other processes tell ----------------------------------------------------------

    def add(self, record: CallRecord) -> None:
        """Count a call of this process, which the ledger does not have yet."""
        if record.record_id in self._open:
            return
        self._open[record.record_id] = record
        if not self._known:
            return
        unpriced, spending, is_limited = is_unpriced(record), spending_of(record), False
        for subject in spending.subjects:
            known = self._known.get(subject)
            if known is None:
                continue
            is_limited = True
            known.add(spending)
            self._announce(subject, known)
            if unpriced:
                self._note_unpriced(subject, known, record.model)
        if is_limited and spending.spent != NOTHING:
            self._tell(spending)

    def hear(self, spending: Spending) -> None:
        """Count a call of another process, until the ledger has it."""
        name = spending.record_id
        if any(name in counted for counted in (self._open, self._heard, self._latest, self._booked)):
            return
        if self._now() - spending.ended_s > EXPIRY_S:
            return
        self._keep(spending)
        for subject in spending.subjects:
            known = self._known.get(subject)
            if known is not None:
                known.add(spending)
                self._announce(subject, known)

    def _keep(self, spending: Spending) -> None:
        if len(self._heard) >= MAX_HEARD:
            self._forget(self._heard.pop(next(iter(self._heard))).spending)
        self._heard[spending.record_id] = _Heard(spending)

    def booked(self, records: Collection[CallRecord], inserted: Collection[str]) -> None:
        """Take over what this process has booked.

        Args:
            records: The calls that the ledger has now.
            inserted: The ids of those that it did not have before.
        """
        for record in records:
            name = record.record_id
            is_own = self._open.pop(name, None) is not None
            if name in inserted:
                self._booked[name] = True
                self._heard.pop(name, None)
                for subject in subjects_of(record) if self._known else ():
                    if (known := self._known.get(subject)) is not None:
                        known.move(name)
            elif is_own and self._known:
                # Somebody else has booked it, or this process beyond the time limit: the last reading may be
                # with it or without it, and the next one tells.
                self._keep(spending_of(record))

    def read(self, reading: Reading) -> None:
        """Take over what the ledger has, after what it had before."""
        # Some may have been told while it was read.
        for name in {*reading.booked, *(name for name in self._heard if name in reading.latest)}:
            record, heard = self._open.pop(name, None), self._heard.pop(name, None)
            if record is not None:
                self._forget(spending_of(record))
            elif heard is not None:
                self._forget(heard.spending)
        self._latest = reading.latest
        for (subject, period), total in reading.totals.items():
            known = self._known.get(subject)
            if known is not None and period in known.written:
                known.written[period] = total
                self._announce(subject, known)
        for heard in list(self._heard.values()):
            heard.readings += 1
            if heard.readings > MAX_READINGS:
                del self._heard[heard.spending.record_id]
                self._forget(heard.spending)

    def drop_oldest(self) -> None:
        """Forget the oldest call of this process that is not booked."""
        self._forget(spending_of(self._open.pop(next(iter(self._open)))))

    @property
    def waiting(self) -> Mapping[str, CallRecord]:
        """The calls of this process that are not booked, by the id of the record, oldest first."""
        return self._open

    @property
    def open(self) -> list[str]:
        """The ids of all records that the ledger did not have when it was last read."""
        return [*self._open, *self._heard]

    def _forget(self, spending: Spending) -> None:
        for subject in spending.subjects if self._known else ():
            known = self._known.get(subject)
            if known is not None:
                known.remove(spending.record_id)

    def _note_unpriced(self, subject: Subject, known: _Known, model: str) -> None:
        """Count a call without a price for a budget in US dollars; emit an event once in each period."""
        budget = known.budget
        if budget is None or budget.unit != "usd":
            return
        self._unpriced.add(1, {"scope": subject[0]})
        period = _current(budget, periods_of(self._now()))
        if known.unpriced_in == period:
            return
        known.unpriced_in = period
        emit(
            logger,
            names.EVENT_BUDGET_UNPRICED,
            f"The call has no price: the budget of the {subject[0]} counts only its tokens",
            {"scope": subject[0], "subject": subject[1], "model": model},
            level=logging.WARNING,
        )

    def _announce(self, subject: Subject, known: _Known) -> None:
        """Emit an event when a budget comes near its limit, and when it is spent; once in each period."""
        budget = known.budget
        if budget is None:
            return
        period = _current(budget, periods_of(self._now()))
        if period not in known.written:
            return
        spent = known.spent(period).of(budget)
        before = known.announced.get(period, 0)
        known.announced[period] = max(spent, before)
        for percent, event, said in (
            (NEAR_PERCENT, names.EVENT_BUDGET_NEAR_LIMIT, "near its limit"),
            (100, names.EVENT_BUDGET_EXCEEDED, "spent"),
        ):
            # In whole numbers: four fifths of 0.1 are not 0.08 for a computer.
            if 100 * before < percent * _limit(budget) <= 100 * spent:
                if percent == NEAR_PERCENT:
                    self._near_limit.add(1, {"scope": subject[0]})
                fields: dict[str, str | float] = {
                    "scope": subject[0],
                    "subject": subject[1],
                    "spent": spent / _units(budget),
                    "budget": budget.amount,
                    "unit": budget.unit,
                    "period": period,
                }
                emit(
                    logger, event, f"The budget of the {subject[0]} is {said}", fields, level=logging.WARNING
                )
