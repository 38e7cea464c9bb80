"""What processes tell each other: in order, once, and kept while the server is away."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry.metrics import Counter

from service.errors import OverloadedError
from service.shared.news import DELAYS_S, MAX_FACT_CHARS, MAX_WAITING, Facts, NoNews, SharedNews, open_news
from tests.harness import make_settings
from tests.unit.resilience import Readable

LIMIT_S = 20.0


class FakeLog:
    """A log in memory, which fails while ``down``; readers wait for further entries."""

    def __init__(self) -> None:
        self.entries: list[Facts] = []
        self.down = False
        self.asked = 0
        self._changed = asyncio.Event()

    async def append(self, entries: Sequence[Facts]) -> None:
        self.asked += 1
        if self.down:
            raise ConnectionError("away")
        self.entries += map(dict, entries)
        self._changed.set()

    async def begin(self) -> str:
        if self.down:
            raise ConnectionError("away")
        return "0-0"

    async def read(self, after: str, wait_s: float) -> Sequence[tuple[str, Facts]]:
        if self.down:
            raise ConnectionError("away")
        first = int(after.partition("-")[0])
        if len(self.entries) <= first and wait_s:
            self._changed.clear()
            await self._changed.wait()
        return [(f"{number}-0", entry) for number, entry in enumerate(self.entries, 1) if number > first]

    def change(self, *, down: bool) -> None:
        """Fail, or work again."""
        self.down = down
        self._changed.set()


class Waits:
    """Waits for nobody, and notes how long it was asked to."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        await asyncio.sleep(0.001)


@contextmanager
def running(*news: SharedNews) -> Iterator[None]:
    tasks = [asyncio.get_running_loop().create_task(one.run()) for one in news]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


@pytest.fixture
def counter(metrics: Readable) -> Counter:
    return metrics.instruments.shared_news


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def hearing(news: SharedNews, *, kept: bool = False) -> list[Mapping[str, str]]:
    heard: list[Mapping[str, str]] = []
    news.on("cache_cleared", heard.append, kept=kept)
    return heard


def numbers(heard: Sequence[Mapping[str, str]]) -> list[str]:
    return [facts["number"] for facts in heard]


def counted(metrics: Readable, outcome: str) -> float:
    return metrics.value("llmops.shared.news", topic="cache_cleared", outcome=outcome)


def test_all_others_hear_everything_once_and_in_order(metrics: Readable, counter: Counter) -> None:
    async def scenario() -> None:
        log = FakeLog()
        first, *others = [SharedNews(log, counter) for _ in range(3)]
        own, *heard = [hearing(news) for news in (first, *others)]
        with running(first, *others):
            for number in range(100):
                first.tell("cache_cleared", {"number": f"{number}"})
            await until(lambda: all(len(one) == 100 for one in heard))
        assert [numbers(one) for one in heard] == [[f"{number}" for number in range(100)]] * 2
        assert own == []

    run(scenario)
    assert (counted(metrics, "told"), counted(metrics, "heard"), counted(metrics, "dropped")) == (100, 200, 0)


def test_what_is_told_while_the_server_is_away_is_told_when_it_is_back(counter: Counter) -> None:
    async def scenario() -> None:
        log, waits = FakeLog(), Waits()
        one, other = SharedNews(log, counter, waits), SharedNews(log, counter, Waits())
        heard = hearing(other)
        log.change(down=True)
        with running(one, other):
            for number in range(3):
                one.tell("cache_cleared", {"number": f"{number}"})
            await until(lambda: len(waits.asked) > 2 * len(DELAYS_S) + 2)
            assert heard == []
            log.change(down=False)
            await until(lambda: len(heard) == 3)
        assert numbers(heard) == ["0", "1", "2"]
        assert set(waits.asked) == set(DELAYS_S)

    run(scenario)


def test_what_waits_is_bounded_and_the_oldest_go(
    metrics: Readable, counter: Counter, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        log = FakeLog()
        one, other = SharedNews(log, counter), SharedNews(log, counter)
        heard = hearing(other)
        for number in range(MAX_WAITING + 2):
            one.tell("cache_cleared", {"number": f"{number}"})
        with running(one, other):
            await until(lambda: len(heard) == MAX_WAITING)
        assert numbers(heard)[0] == "2"
        assert numbers(heard)[-1] == f"{MAX_WAITING + 1}"

    run(scenario)
    # Said once: there may be thousands.
    assert caplog.text.count("Too much waits for Valkey") == 1
    assert (counted(metrics, "told"), counted(metrics, "dropped")) == (MAX_WAITING, 2)


def test_who_starts_learns_only_of_what_still_holds(counter: Counter) -> None:
    async def scenario() -> None:
        log = FakeLog()
        old = SharedNews(log, counter)
        with running(old):
            old.tell("cache_cleared", {"number": "1"})
            old.tell("signed_out", {"token": "t"})
            await until(lambda: len(log.entries) == 2)
        new = SharedNews(log, counter)
        cleared = hearing(new)
        signed_out: list[Mapping[str, str]] = []
        new.on("signed_out", signed_out.append, kept=True)
        await new.catch_up()
        assert (cleared, [facts["token"] for facts in signed_out]) == ([], ["t"])
        with running(old, new):
            old.tell("cache_cleared", {"number": "2"})
            await until(lambda: cleared)
        assert (numbers(cleared), len(signed_out)) == (["2"], 1)

    run(scenario)


def test_without_the_server_a_process_starts_all_the_same(counter: Counter) -> None:
    async def scenario() -> None:
        log = FakeLog()
        log.change(down=True)
        news = SharedNews(log, counter, Waits())
        signed_out: list[Mapping[str, str]] = []
        news.on("signed_out", signed_out.append, kept=True)
        await news.catch_up()
        log.entries.append({"topic": "signed_out", "origin": "other", "token": "t"})
        with running(news):
            log.change(down=False)
            await until(lambda: signed_out)

    run(scenario)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"topic": "of a later version", "origin": "x"},
        {"topic": "cache_cleared"},
        {"topic": "cache_cleared", "number": "x" * (MAX_FACT_CHARS + 1)},
        {"topic": "cache_cleared", "number": "not a number"},
        {"topic": "cache_cleared", "number": "-1"},
    ],
    ids=str,
)
def test_what_cannot_be_used_is_left_out(metrics: Readable, counter: Counter, entry: dict[str, str]) -> None:
    async def scenario() -> None:
        log = FakeLog()
        one, other = SharedNews(log, counter), SharedNews(log, counter)
        heard: list[int] = []

        def take(facts: Facts) -> None:
            number = int(facts["number"])
            if number < 0:
                raise OverloadedError
            heard.append(number)

        other.on("cache_cleared", take)
        log.entries.append(entry)
        with running(one, other):
            one.tell("cache_cleared", {"number": "7"})
            await until(lambda: heard)
        assert heard == [7]

    run(scenario)
    assert counted(metrics, "unusable") == (entry.get("topic") == "cache_cleared")


def test_what_waits_is_told_in_few_round_trips(metrics: Readable, counter: Counter) -> None:
    async def scenario() -> None:
        log = FakeLog()
        one, other = SharedNews(log, counter, at_once=100), SharedNews(log, counter)
        heard = hearing(other)
        for number in range(250):
            one.tell("cache_cleared", {"number": f"{number}"})
        with running(one, other):
            await until(lambda: len(heard) == 250)
        assert numbers(heard) == [f"{number}" for number in range(250)]
        assert log.asked == 3

    run(scenario)
    assert counted(metrics, "told") == 250


def test_what_need_not_be_told_any_more_is_left_out(metrics: Readable, counter: Counter) -> None:
    async def scenario() -> None:
        log, needed = FakeLog(), {0, 1, 2}
        one, other = SharedNews(log, counter, at_once=100), SharedNews(log, counter)
        heard = hearing(other)
        log.change(down=True)
        for number in (0, 1, 2):
            one.tell("cache_cleared", {"number": f"{number}"}, lambda number=number: number in needed)  # type: ignore[misc]
        needed -= {0, 1}
        with running(one, other):
            log.change(down=False)
            await until(lambda: heard)
        assert numbers(heard) == ["2"]
        # Nor is it missed where too many wait.
        needed.clear()
        for number in range(MAX_WAITING + 2):
            one.tell("cache_cleared", {"number": f"{number}"}, lambda: bool(needed))

    run(scenario)
    assert (counted(metrics, "told"), counted(metrics, "dropped")) == (1, 0)


def test_what_is_too_long_is_not_told(counter: Counter, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        log = FakeLog()
        news = SharedNews(log, counter)
        with running(news):
            news.tell("cache_cleared", {"model": "x" * (MAX_FACT_CHARS + 1)})
            news.tell("cache_cleared", {"model": "x"})
            await until(lambda: log.entries)
        assert [entry["model"] for entry in log.entries] == ["x"]

    run(scenario)
    assert "Too long to be told to other processes: cache_cleared" in caplog.text


def test_a_server_that_does_not_answer_is_left_and_asked_again(counter: Counter) -> None:
    class Silent(FakeLog):
        async def append(self, entries: Sequence[Facts]) -> None:
            self.asked += 1
            if self.asked == 1:
                await asyncio.Event().wait()
            await super().append(entries)

    async def scenario() -> None:
        log = Silent()
        news = SharedNews(log, counter, Waits(), grace_s=0.01)
        with running(news):
            news.tell("cache_cleared", {"number": "1"})
            await until(lambda: log.entries)
        assert len(log.entries) == 1

    run(scenario)


def test_what_waits_at_the_stop_is_told_if_the_server_takes_it(counter: Counter) -> None:
    async def scenario() -> None:
        log = FakeLog()
        news = SharedNews(log, counter)
        news.tell("cache_cleared", {"number": "1"})
        await news.flush()
        assert len(log.entries) == 1
        log.change(down=True)
        news.tell("cache_cleared", {"number": "2"})
        await news.flush()
        assert len(log.entries) == 1

    run(scenario)


def test_without_an_address_nothing_is_told(metrics: Readable) -> None:
    async def scenario() -> None:
        async with open_news(make_settings(), metrics.instruments) as news:
            assert isinstance(news, NoNews)
            news.on("cache_cleared", lambda _facts: None)
            news.tell("cache_cleared", {})
            await news.catch_up()
            await news.run()

    run(scenario)
