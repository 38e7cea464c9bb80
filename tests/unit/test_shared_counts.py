"""Counting in a Valkey server: as in memory, together or not at all, and never an error of a caller's."""

import asyncio
import logging
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.trace import INVALID_SPAN_CONTEXT
from valkey.asyncio import Valkey as Client

from service.errors import UpstreamError
from service.services.circuit_breaker import CircuitBreaker
from service.shared.counts import Count, Counted, How, Limit, LocalCounts
from service.shared.exchange import BREAKER_FAILURES, BREAKER_S, Waited
from service.shared.state import SharedState, open_shared
from service.shared.valkey import PREFIX, SCRIPT, ValkeyServer, key_of, open_valkey
from service.utils.deadline import Deadline
from service.utils.rates import MAX_EXACT_EVENTS, Rate
from tests.fakes.clock import FakeClock
from tests.fakes.tls import PrivateAuthority
from tests.harness import ROOT, make_settings
from tests.unit.conftest import Lines
from tests.unit.resilience import Readable
from tests.valkey import Valkey

COUNTED = MAX_EXACT_EVENTS + 1
CLOCK = "clock"
ON_THE_CLOCK = SCRIPT.replace("redis.call('TIME')", f"redis.call('LRANGE', '{CLOCK}', 0, 1)")
"""The script with a clock that the tests set."""


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


class Desk:
    """A server with the script on a clock of the tests, and a plain client beside it."""

    def __init__(self, server: ValkeyServer, plain: Client, clock: Callable[[], float]) -> None:
        self._server = server
        self._clock = clock
        self.plain: Any = plain  # the client's types are those of two clients at once

    async def count(self, *limits: Limit) -> Counted:
        """Count one call."""
        seconds = self._clock()
        moments = (int(seconds), round(seconds % 1 * 1_000_000))
        await self.plain.delete(CLOCK)
        await self.plain.rpush(CLOCK, *moments)
        (counted,) = await self._server.exchange([Count(limits)])
        assert isinstance(counted, Counted)
        return counted


@asynccontextmanager
async def on_a_clock(valkey: Valkey, clock: Callable[[], float]) -> AsyncIterator[Desk]:
    plain = Client(host="127.0.0.1", port=valkey.port, decode_responses=True)
    await plain.flushdb()
    try:
        async with open_valkey(valkey.url, ON_THE_CLOCK) as server:
            yield Desk(server, plain, clock)
    finally:
        await plain.aclose()


PAUSES = st.integers(0, 40 * 64).map(lambda steps: steps / 64)
"""Seconds that binary numbers hold exactly."""

HOWS: st.SearchStrategy[How] = st.sampled_from(("together", "alone", "look"))
CALLS = st.lists(
    st.tuples(PAUSES, st.dictionaries(st.sampled_from("abc"), HOWS, min_size=1)), min_size=1, max_size=40
)


@pytest.mark.parametrize("scale", [1, COUNTED])
@settings(deadline=None, max_examples=60)
@given(calls=CALLS, amounts=st.tuples(*[st.integers(1, 4)] * 3))
def test_the_server_counts_as_the_memory_does(
    valkey: Valkey, scale: int, calls: list[tuple[float, dict[str, How]]], amounts: tuple[int, int, int]
) -> None:
    """A high rate is used up to its last few events before, so that its limit is met too."""

    async def scenario() -> None:
        clock = FakeClock(1_800_000_000.0)
        wholes = {name: amount if scale == 1 else scale for name, amount in zip("abc", amounts, strict=True)}
        rates = {name: Rate(f"{whole}/minute", clock) for name, whole in wholes.items()}
        local = LocalCounts()
        async with on_a_clock(valkey, clock) as desk:
            if scale > 1:
                await _use_up(desk, rates, dict(zip("abc", amounts, strict=True)))
            for pause_s, hows in calls:
                clock.advance(pause_s)
                limits = [Limit(rates[name], name, how) for name, how in hows.items()]
                there, here = await desk.count(*limits), await local.count(limits)
                assert there.allowed == here.allowed
                for one, other in zip(there.windows, here.windows, strict=True):
                    assert one.remaining == other.remaining
                    assert one.reset_s == pytest.approx(other.reset_s, abs=2e-6)

    with pytest.MonkeyPatch.context() as patch:
        # The library reads the system's time twice for the counters, and takes the difference.
        patch.setattr(time, "time", lambda: 1_800_000_000.0)
        run(scenario)


async def _use_up(desk: Desk, rates: dict[str, Rate], left: dict[str, int]) -> None:
    """Count in both until only a few events are left."""
    local = LocalCounts()
    for name, rate in rates.items():
        limit = Limit(rate, name)
        await desk.count(limit)
        await local.count([limit])
        while (await local.count([limit])).windows[0].remaining > left[name]:
            pass
        await desk.plain.hset(key_of(limit), "current", COUNTED - left[name])


def test_a_call_is_counted_against_all_of_its_limits_or_none(valkey: Valkey) -> None:
    async def scenario() -> None:
        async with open_valkey(valkey.url) as server:
            of_user = Limit(Rate("5/minute"), "user all or none")
            of_team = Limit(Rate("2/minute"), "team all or none")
            found = [(await server.exchange([Count([of_user, of_team])]))[0] for _ in range(4)]
        assert [counted.allowed for counted in found] == [True, True, False, False]
        assert [counted.windows[0].remaining for counted in found] == [4, 3, 3, 3]
        assert [counted.windows[1].remaining for counted in found] == [1, 0, 0, 0]

    run(scenario)


@pytest.mark.parametrize(("amount", "kept_s"), [(3, 60), (COUNTED, 120)])
def test_keys_expire_and_hold_no_name(valkey: Valkey, amount: int, kept_s: int) -> None:
    async def scenario() -> None:
        clock = FakeClock(1_800_000_000.0)
        async with on_a_clock(valkey, clock) as desk:
            name = "user " + "anna@example.org" * 1_000
            await desk.count(Limit(Rate(f"{amount}/minute", clock), name))
            (key,) = set(await desk.plain.keys()) - {CLOCK}
            assert key.startswith(PREFIX)
            assert "anna" not in key
            assert len(key) < 80
            left_ms = await desk.plain.pttl(key)
            assert (kept_s - 10) * 1_000 < left_ms <= kept_s * 1_000
            # What is only looked at is not kept.
            await desk.count(Limit(Rate(f"{amount}/minute", clock), "user other", "look"))
            assert len(await desk.plain.keys()) == 2

    run(scenario)


@pytest.mark.parametrize("amount", [3, COUNTED])
def test_a_clock_of_the_server_that_is_set_back_stops_nobody(valkey: Valkey, amount: int) -> None:
    async def scenario() -> None:
        moments = [1_800_007_200.0]
        async with on_a_clock(valkey, lambda: moments[-1]) as desk:
            limit = Limit(Rate(f"{amount}/minute"), "x")
            for _ in range(3):
                await desk.count(limit)
            moments.append(1_800_000_000.0)
            counted = await desk.count(limit)
            assert counted.allowed
            assert counted.windows[0].remaining == amount - 1

    run(scenario)


def test_the_script_is_sent_again_when_the_server_has_forgotten_it(valkey: Valkey) -> None:
    async def scenario() -> None:
        limit = Limit(Rate("3/minute"), "forgotten")
        plain = Client(host="127.0.0.1", port=valkey.port, decode_responses=True)
        async with open_valkey(valkey.url) as server:
            (first,) = await server.exchange([Count([limit])])
            await plain.script_flush()
            batch = await server.exchange([Count([limit])] * 3)
        await plain.aclose()
        assert [counted.allowed for counted in (first, *batch)] == [True, True, True, False]

    run(scenario)


class Instance:
    """What one process shares, with a breaker on a clock of its own."""

    def __init__(self, shared: SharedState, breaker: CircuitBreaker, clock: FakeClock) -> None:
        self.shared = shared
        self.counts = shared.counts
        self.breaker = breaker
        self.clock = clock


@asynccontextmanager
async def opened(
    metrics: Readable, url: str, *, timeout_s: float = 5.0, on_change: Callable[[], None] = lambda: None
) -> AsyncIterator[Instance]:
    clock = FakeClock(0)
    breakers: list[CircuitBreaker] = []

    def make(name: str) -> CircuitBreaker:
        breakers.append(CircuitBreaker(name, BREAKER_FAILURES, BREAKER_S, metrics.instruments, clock))
        return breakers[0]

    made = make_settings(valkey_url=url, valkey_timeout_s=timeout_s)
    async with open_shared(made, metrics.instruments, make, on_change) as shared:
        background = [asyncio.create_task(work()) for work in shared.background]
        try:
            yield Instance(shared, breakers[0], clock)
        finally:
            for task in background:
                task.cancel()
            await asyncio.wait(background)


def test_a_burst_of_calls_takes_one_connection_and_few_exchanges(valkey: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        plain = Client(host="127.0.0.1", port=valkey.port, decode_responses=True)
        before = await plain.info("stats")
        async with opened(metrics, valkey.url) as here:
            limit = Limit(Rate("100/minute"), "burst")
            found = await asyncio.gather(*[here.counts.count([limit]) for _ in range(300)])
            after = await plain.info("stats")
        await plain.aclose()
        assert sum(counted.allowed for counted in found) == 100
        assert after["total_connections_received"] - before["total_connections_received"] == 1
        assert after["total_reads_processed"] - before["total_reads_processed"] < 30

    run(scenario)


def test_counts_are_one_over_processes(valkey: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        async with opened(metrics, valkey.url) as one, opened(metrics, valkey.url) as other:
            calls = [
                instance.counts.count([Limit(Rate("30/minute"), "both")])
                for _ in range(30)
                for instance in (one, other)
            ]
            assert sum([counted.allowed for counted in await asyncio.gather(*calls)]) == 30

    run(scenario)


def test_what_the_server_allowed_is_counted_here_too(metrics: Readable, lines: Lines) -> None:
    """Else a server that fails would give everybody a whole window more."""
    lines.configure(logging.getLevelName(logging.INFO))
    changes: list[str] = []

    async def scenario() -> None:
        with Valkey() as valkey:
            async with opened(metrics, valkey.url, on_change=lambda: changes.append("changed")) as here:
                limit = Limit(Rate("5/minute"), "user anna")
                for _ in range(3):
                    assert (await here.counts.count([limit])).allowed
                assert metrics.value("llmops.shared.fallback") == 0
                valkey.kill()
                allowed = [(await here.counts.count([limit])).allowed for _ in range(BREAKER_FAILURES + 3)]
                assert allowed == [True, True, *[False] * (BREAKER_FAILURES + 1)]
                assert metrics.value("llmops.shared.fallback") == 1
                valkey.start()
                assert not (await here.counts.count([limit])).allowed
                here.clock.advance(BREAKER_S)
                assert (await here.counts.count([limit])).windows[0].remaining == 4
                assert metrics.value("llmops.shared.fallback") == 0

    run(scenario)
    ours = [
        (line["level"], line["message"]) for line in lines.all if line["logger"] == "service.shared.exchange"
    ]
    assert ours == [
        ("WARNING", "Valkey fails: unreachable. Each process counts by itself"),
        ("INFO", "Valkey works again. The processes count together"),
    ]
    assert changes == ["changed", "changed"]


GARBAGE = {
    "no_protocol": (b"HTTP/1.0 400 Bad Request\r\n\r\n", "nonsense"),
    "text": (b"+OK\r\n", "nonsense"),
    "nothing": (b"$-1\r\n", "nonsense"),
    "too_few": (b"*1\r\n:1\r\n", "nonsense"),
    "no_numbers": (b"*3\r\n:1\r\n$1\r\nx\r\n:0\r\n", "nonsense"),
    "more_than_allowed": (b"*3\r\n:1\r\n:99\r\n:0\r\n", "nonsense"),
    "later_than_a_period": (b"*3\r\n:1\r\n:4\r\n:99999999999\r\n", "nonsense"),
    "out_of_memory": (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", "out_of_memory"),
    "read_only": (b"-READONLY You can't write against a read only replica.\r\n", "read_only"),
    "no_password": (b"-NOAUTH Authentication required.\r\n", "not_permitted"),
    "no_permission": (b"-NOPERM this user has no permissions\r\n", "not_permitted"),
    "loading": (b"-LOADING Valkey is loading the dataset in memory\r\n", "loading"),
    "elsewhere": (b"-MOVED 1 192.0.2.1:6379\r\n", "moved"),
    "broken_disk": (b"-MISCONF cannot persist\r\n", "misconfigured"),
    "refused": (b"-ERR user_script:1: secret-of-a-server\r\n", "refused"),
    "closed": (b"", "unreachable"),
}


@asynccontextmanager
async def answering(
    answer: bytes | None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers each command so, or with None not at all; its URL, and what was sent to it."""
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                received.append(data)
                if answer == b"":
                    break
                if answer is not None:
                    writer.write(answer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", received
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("name", GARBAGE)
def test_whatever_a_server_answers_no_caller_sees_an_error(
    metrics: Readable, lines: Lines, name: str
) -> None:
    lines.configure(logging.getLevelName(logging.INFO))
    answer, reason = GARBAGE[name]

    async def scenario() -> None:
        async with answering(answer) as (url, received), opened(metrics, url) as here:
            limit = Limit(Rate("5/minute"), "user anna")
            found = [await here.counts.count([limit]) for _ in range(8)]
            assert [counted.allowed for counted in found] == [True] * 5 + [False] * 3
            assert len(received) == BREAKER_FAILURES

    run(scenario)
    (line,) = [line for line in lines.all if line["logger"] == "service.shared.exchange"]
    assert line["reason"] == reason
    assert "secret-of-a-server" not in str(lines.all)


def test_a_server_that_never_answers_is_waited_for_a_few_times_only(metrics: Readable) -> None:
    async def scenario() -> None:
        async with answering(None) as (url, received), opened(metrics, url, timeout_s=0.2) as here:
            limit = Limit(Rate("1000/minute"), "user anna")
            for _ in range(20):
                assert (await here.counts.count([limit])).allowed
            assert len(received) == BREAKER_FAILURES
            here.clock.advance(BREAKER_S)
            found = await asyncio.gather(*[here.counts.count([limit]) for _ in range(20)])
            assert all(counted.allowed for counted in found)
            assert len(received) == BREAKER_FAILURES + 1

    run(scenario)


def test_a_late_answer_is_nobodys(metrics: Readable) -> None:
    """An answer that comes after its caller has left must not be taken for the next one's."""

    async def scenario() -> None:
        seen: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(1 << 16):
                seen.append(writer)
                if len(seen) == 2:
                    seen[0].write(b"*3\r\n:1\r\n:1\r\n:0\r\n")
                    seen[1].write(b"*3\r\n:1\r\n:2\r\n:0\r\n")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"valkey://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with opened(metrics, url, timeout_s=0.5) as here:
            limit = Limit(Rate("9/minute"), "user anna")
            assert (await here.counts.count([limit])).windows[0].remaining == 8
            assert (await here.counts.count([limit])).windows[0].remaining == 2
        server.close()
        await server.wait_closed()

    run(scenario)


def test_the_counts_of_one_request_share_the_time_limit(metrics: Readable) -> None:
    async def scenario() -> None:
        async with answering(None) as (url, received), opened(metrics, url, timeout_s=0.05) as here:
            waited = Waited()
            for _ in range(5):
                assert (await here.counts.count([Limit(Rate("9/minute"), "sign-in")], waited)).allowed
            assert len(received) == 1

    run(scenario)


def test_a_caller_who_leaves_harms_nobody(valkey: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        async with opened(metrics, valkey.url) as here:
            limit = Limit(Rate("9/minute"), "leaving")
            leaving = [asyncio.create_task(here.counts.count([limit])) for _ in range(3)]
            staying = asyncio.create_task(here.counts.count([limit]))
            await asyncio.sleep(0)
            for task in leaving:
                task.cancel()
            # Who has left before the exchange is not counted.
            assert (await staying).windows[0].remaining == 8
            assert [task.cancelled() for task in leaving] == [True] * 3
            assert here.breaker.state == "closed"
            assert metrics.value("llmops.shared.fallback") == 0

    run(scenario)


def test_a_server_that_does_not_count_is_seen_by_the_check_and_fails_no_call(
    valkey: Valkey, metrics: Readable
) -> None:
    async def outcome(url: str) -> str:
        async with opened(metrics, url) as here:
            assert (await here.counts.count([Limit(Rate("1/minute"), "user of the check")])).allowed
            (ping,) = here.shared.pings.values()
            try:
                await ping()
            except UpstreamError as error:
                return error.label
        return "up"

    async def scenario() -> None:
        assert await outcome(valkey.url) == "up"
        with Valkey("--requirepass", "open-sesame") as other:
            assert await outcome(other.url) == "the server: not_permitted"
            assert await outcome(other.url.replace("://", "://:open-sesame@")) == "up"
        with Valkey("--replicaof", "127.0.0.1", str(valkey.port)) as other:
            assert await outcome(other.url) == "the server: read_only"
        with Valkey("--maxmemory", "1") as other:
            assert await outcome(other.url) == "the server: out_of_memory"

    run(scenario)


def test_the_servers_certificate_must_be_for_its_host(
    metrics: Readable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = PrivateAuthority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))

    async def outcome(scheme: str, host: str) -> bool:
        async with answering(b"*3\r\n:1\r\n:3\r\n:0\r\n", authority.server()) as (url, _):
            port = url.rpartition(":")[2]
            async with opened(metrics, f"{scheme}://{host}:{port}") as here:
                return (await here.counts.count([Limit(Rate("9/minute"), "x")])).windows[0].remaining == 3

    async def scenario() -> None:
        assert await outcome("valkeys", "localhost")
        assert await outcome("rediss", "localhost")
        assert not await outcome("valkeys", "127.0.0.1")
        assert not await outcome("valkey", "localhost")

    run(scenario)


def test_without_a_url_the_client_is_not_imported() -> None:
    program = (
        "import sys; import service.config.lifespan; sys.exit(bool({'redis', 'valkey'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_without_a_url_the_memory_counts(metrics: Readable) -> None:
    async def scenario() -> None:
        def never(_name: str) -> CircuitBreaker:
            raise AssertionError

        async with open_shared(make_settings(), metrics.instruments, never) as shared:
            assert isinstance(shared.counts, LocalCounts)
            assert (shared.pings, shared.background) == ({}, ())
            async with shared.leases.lease("x", Deadline.after(1), INVALID_SPAN_CONTEXT) as lease:
                assert lease.answer is None

    run(scenario)


def test_shared_counts_stop_with_their_work(metrics: Readable) -> None:
    """A call that waits while the process stops is counted in memory at once."""

    async def scenario() -> None:
        async with answering(None) as (url, received), opened(metrics, url, timeout_s=10.0) as here:
            limit = Limit(Rate("9/minute"), "x")
            asked = asyncio.create_task(here.counts.count([limit]))
            while not received:  # noqa: ASYNC110 - a list has no event
                await asyncio.sleep(0.01)
            waiting = asyncio.create_task(here.counts.count([limit]))
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert [(await task).allowed for task in (asked, waiting)] == [True, True]

    run(scenario)
