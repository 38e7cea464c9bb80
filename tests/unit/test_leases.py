"""Leases in a Valkey server: one of several equal calls is made; whatever fails costs calls, not errors."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry.trace import SpanContext
from valkey.asyncio import Valkey as Client

from service.shared.leases import (
    ANSWER_S,
    LEASE_S,
    MAX_ANSWER_BYTES,
    RENEW_S,
    LeaseTimeoutError,
    SharedLeases,
)
from service.shared.valkey import CALL_PREFIX
from service.utils.deadline import Deadline
from tests.unit.resilience import Readable
from tests.unit.test_shared_counts import GARBAGE, Instance, answering, opened, run
from tests.valkey import Valkey

ANSWER = b'{"an": "answer"}\n'


def span(number: int) -> SpanContext:
    return SpanContext(number, number, is_remote=False)


def outcomes(metrics: Readable) -> dict[str, float]:
    """How often each outcome was counted, without those that were not."""
    names = ("leader", "taken_over", "follower", "none")
    counted = {name: metrics.value("llmops.shared.leases", outcome=name) for name in names}
    return {name: value for name, value in counted.items() if value}


@dataclass
class Gate:
    """Where a call that is made waits; its beginning and its end are events."""

    opened: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)


async def lead(
    here: Instance, call: str, gate: Gate, *, answer: bytes = ANSWER, limit_s: float = 30
) -> bytes | None:
    """Make a call when there is no answer of another; the answer of another."""
    async with here.shared.leases.lease(call, Deadline.after(limit_s), span(7)) as lease:
        if lease.answer is None:
            gate.begun.set()
            await gate.opened.wait()
            if answer:
                lease.made = lambda: answer
        return lease.answer


def open_gate() -> Gate:
    gate = Gate()
    gate.opened.set()
    return gate


async def kept(valkey: Valkey, call: str) -> tuple[bytes | None, int]:
    """What the server has for a call, and for how many milliseconds more."""
    async with Client(host="127.0.0.1", port=valkey.port) as plain:
        answer, left_ms = await plain.get(CALL_PREFIX + call), await plain.pttl(CALL_PREFIX + call)
    assert answer is None or isinstance(answer, bytes)
    return answer, left_ms


async def until_seen(found: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    async with asyncio.timeout(20):
        while not await found():  # noqa: ASYNC110 - it is the server's state
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Any:
    with Valkey() as valkey:
        yield valkey


def test_one_process_makes_the_call_and_the_others_take_its_answer(server: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        async with opened(metrics, server.url) as one, opened(metrics, server.url) as other:
            gate = Gate()
            leading = asyncio.create_task(lead(one, "shared", gate))
            await gate.begun.wait()
            following = [asyncio.create_task(lead(other, "shared", gate)) for _ in range(5)]
            # It has asked once, and waits.
            await until_seen(asked)
            gate.opened.set()
            assert await leading is None
            assert await asyncio.gather(*following) == [ANSWER] * 5
            answer, left_ms = await kept(server, "shared")
            assert answer is not None
            assert 0 < left_ms <= ANSWER_S * 1_000
            async with other.shared.leases.lease("shared", Deadline.after(1), span(9)) as late:
                assert (late.answer, late.followed) == (ANSWER, False)
                assert late.origin == SpanContext(7, 7, is_remote=True)

    async def asked() -> bool:
        asked = metrics.value("llmops.shared.operation.duration", operation="lease", outcome="success")
        return asked >= 6

    run(scenario)
    assert outcomes(metrics) == {"leader": 1, "follower": 6}


@pytest.mark.parametrize("answer", [b"", b"x" * (MAX_ANSWER_BYTES + 1)], ids=["failed", "too_large"])
def test_a_call_without_an_answer_for_others_is_made_again_by_one_of_them(
    server: Valkey, metrics: Readable, answer: bytes
) -> None:
    async def scenario() -> None:
        async with opened(metrics, server.url) as one, opened(metrics, server.url) as other:
            gate = Gate()
            second = Gate(gate.opened)
            call = f"without {len(answer)}"
            leading = asyncio.create_task(lead(one, call, gate, answer=answer))
            await gate.begun.wait()
            following = asyncio.create_task(lead(other, call, second))
            gate.opened.set()
            await leading
            assert await following is None
            assert second.begun.is_set()

    run(scenario)
    assert sum(outcomes(metrics).values()) == 2
    assert "follower" not in outcomes(metrics)


def test_a_lease_ends_soon_after_its_owner_and_lasts_as_long_as_the_owner(
    server: Valkey, metrics: Readable
) -> None:
    async def scenario() -> None:
        gate = Gate()
        second = Gate(gate.opened)
        async with opened(metrics, server.url) as other:
            async with opened(metrics, server.url) as one:
                leading = asyncio.create_task(lead(one, "killed", gate))
                await gate.begun.wait()
                following = asyncio.create_task(lead(other, "killed", second))
                await asyncio.sleep(LEASE_S + 2 * RENEW_S)
                # It was renewed.
                assert (await kept(server, "killed"))[0] is not None
                assert not second.begun.is_set()
            # The process is gone with its connection: nothing renews or ends the lease.
            async with asyncio.timeout(20):
                await second.begun.wait()
            gate.opened.set()
            assert await following is None
            await leading

    run(scenario)
    assert outcomes(metrics) == {"leader": 1, "taken_over": 1}


def test_a_lease_does_not_outlast_its_owners_deadline(server: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        async with opened(metrics, server.url) as here:
            gate = Gate()
            leading = asyncio.create_task(lead(here, "late", gate, limit_s=0.5))
            await gate.begun.wait()
            assert (await kept(server, "late"))[1] <= 500
            await until_seen(gone)
            gate.opened.set()
            await leading

    async def gone() -> bool:
        return (await kept(server, "late"))[0] is None

    run(scenario)


def test_a_caller_who_leaves_gives_the_lease_back(server: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        async with opened(metrics, server.url) as here:
            gate = Gate()
            leading = asyncio.create_task(lead(here, "left", gate))
            await gate.begun.wait()
            leading.cancel()
            await until_seen(gone)

    async def gone() -> bool:
        return (await kept(server, "left"))[0] is None

    run(scenario)


def test_who_waits_longer_than_their_deadline_gets_an_error(server: Valkey, metrics: Readable) -> None:
    async def scenario() -> None:
        async with opened(metrics, server.url) as here:
            gate = Gate()
            leading = asyncio.create_task(lead(here, "long", gate))
            await gate.begun.wait()
            with pytest.raises(LeaseTimeoutError):
                await lead(here, "long", gate, limit_s=0.2)
            gate.opened.set()
            await leading

    run(scenario)


def test_an_owner_who_lost_the_lease_leaves_no_answer(server: Valkey, metrics: Readable) -> None:
    """As where its event loop stood still for longer than the lease."""

    async def scenario() -> None:
        async with opened(metrics, server.url) as here, Client(host="127.0.0.1", port=server.port) as plain:
            gate = Gate()
            leading = asyncio.create_task(lead(here, "lost", gate))
            await gate.begun.wait()
            await plain.set(CALL_PREFIX + "lost", "of another")
            gate.opened.set()
            await leading
            # The next exchange comes after the one that ends the lease.
            await lead(here, "another", gate)
            assert (await kept(server, "lost"))[0] == b"of another"

    run(scenario)


NONSENSE: dict[str, tuple[str, ...]] = {
    "text": ("SET", "nonsense"),
    "no_owner": ("SET", "held "),
    "no_span": ("SET", "made 0123456789abcdef x y"),
    "a_list": ("RPUSH", "x"),
    "a_hash": ("HSET", "x", "y"),
}


@pytest.mark.parametrize("put", NONSENSE.values(), ids=NONSENSE)
def test_whatever_else_the_key_holds_the_call_is_made(
    server: Valkey, metrics: Readable, put: tuple[str, ...]
) -> None:
    async def scenario() -> None:
        plain: Any = Client(host="127.0.0.1", port=server.port)  # some of its methods have no types
        async with opened(metrics, server.url) as here, plain:
            await plain.delete(CALL_PREFIX + "nonsense")
            await plain.execute_command(put[0], CALL_PREFIX + "nonsense", *put[1:])
            gate = open_gate()
            assert await lead(here, "nonsense", gate) is None

    run(scenario)
    # It is no fault of the server's.
    assert outcomes(metrics) == {"none": 1}
    assert metrics.value("llmops.shared.fallback") == 0


@pytest.mark.parametrize("answer", [answer for answer, _ in GARBAGE.values()], ids=GARBAGE)
def test_whatever_the_server_answers_the_call_is_made(metrics: Readable, answer: bytes) -> None:
    async def scenario() -> None:
        async with answering(answer) as (url, _), opened(metrics, url) as here:
            gate = open_gate()
            assert await lead(here, "garbage", gate) is None

    run(scenario)
    assert outcomes(metrics) == {"none": 1}


def test_a_server_that_is_killed_sends_those_who_wait_to_the_model(metrics: Readable) -> None:
    async def scenario() -> None:
        with Valkey() as valkey:
            async with opened(metrics, valkey.url) as one, opened(metrics, valkey.url) as other:
                gate = Gate()
                second = Gate(gate.opened)
                leading = asyncio.create_task(lead(one, "orphan", gate))
                await gate.begun.wait()
                following = asyncio.create_task(lead(other, "orphan", second))
                valkey.kill()
                async with asyncio.timeout(20):
                    await second.begun.wait()
                gate.opened.set()
                assert [await leading, await following] == [None, None]

    run(scenario)
    assert outcomes(metrics) == {"leader": 1, "none": 1}


def test_a_silent_server_is_waited_for_once_and_then_not_asked(metrics: Readable) -> None:
    async def scenario() -> None:
        async with answering(None) as (url, received), opened(metrics, url, timeout_s=0.05) as here:
            gate = open_gate()
            for number in range(6):
                assert await lead(here, f"silent {number}", gate) is None
            commands = b"".join(received).count(b"EVALSHA")
            assert commands <= 6
            assert here.breaker.state == "open"

    run(scenario)
    assert outcomes(metrics) == {"none": 6}


def test_only_leases_that_are_held_are_renewed(server: Valkey, metrics: Readable) -> None:
    pauses: list[float] = []

    async def scenario() -> None:
        async with opened(metrics, server.url) as here:
            assert isinstance(here.shared.leases, SharedLeases)
            gate = Gate()
            leading = asyncio.create_task(lead(here, "held", gate))
            await gate.begun.wait()
            gate.opened.set()
            await leading
            before = await kept(server, "held")
            await asyncio.sleep(2 * RENEW_S)
            # The answer is not kept for longer by a renewal.
            answer, left_ms = await kept(server, "held")
            assert answer == before[0]
            pauses.append(before[1] - left_ms)

    run(scenario)
    assert pauses[0] > 0
