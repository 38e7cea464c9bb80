"""The stop signal, taken over from the server while it starts."""

import asyncio
import signal
from types import FrameType

import uvicorn

from service.services.drain import SAME_SIGNAL_S, STOP_SIGNALS, Drain, drain_on_signal
from tests.fakes.clock import FakeClock


class Server(uvicorn.Server):
    """A server that is not running, and records the signals it handles."""

    def __init__(self) -> None:
        super().__init__(uvicorn.Config("no.app:at_all"))
        self.stopped_by: list[int] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stopped_by.append(sig)
        super().handle_exit(sig, frame)


def taken_over(server: Server, raised_inside: int = 0, apart_s: float = SAME_SIGNAL_S) -> Drain:
    """Open and close the drain over the server's handlers, with so many signals in between."""
    clock = FakeClock()

    async def main() -> Drain:
        drain = Drain(grace_s=0, timeout_s=1)
        async with asyncio.TaskGroup() as tasks:
            with drain_on_signal(drain, tasks, clock):
                for _ in range(raised_inside):
                    signal.raise_signal(signal.SIGTERM)
                    clock.advance(apart_s)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        return drain

    before = {number: signal.signal(number, server.handle_exit) for number in STOP_SIGNALS}
    try:
        drain = asyncio.run(main())
        # Bound methods are equal, not the same.
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [server.handle_exit] * 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return drain


def test_without_a_signal_nothing_happens() -> None:
    server = Server()
    assert not taken_over(server).draining
    assert not server.stopped_by


def test_the_first_signal_drains_and_is_then_the_servers() -> None:
    server = Server()
    assert taken_over(server, raised_inside=1).draining
    assert server.stopped_by == [signal.SIGTERM]
    assert not server.force_exit


def test_the_second_ends_it_at_once() -> None:
    server = Server()
    assert taken_over(server, raised_inside=2).draining
    assert server.stopped_by == [signal.SIGTERM] * 2
    assert server.force_exit


def test_a_second_one_within_a_second_is_the_same() -> None:
    server = Server()
    assert taken_over(server, raised_inside=4, apart_s=SAME_SIGNAL_S / 4).draining
    assert server.stopped_by == [signal.SIGTERM]
    assert not server.force_exit


def test_one_that_the_server_has_had_is_drained_for_and_not_handed_over_again() -> None:
    server = Server()
    server.handle_exit(signal.SIGINT, None)
    assert taken_over(server).draining
    assert server.stopped_by == [signal.SIGINT]
    assert not server.force_exit
