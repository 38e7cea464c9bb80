"""Work in a thread that lets the event loop run between its items."""

import itertools
from collections.abc import Callable

import pytest

from service.telemetry.slices import BUSY_S, FEWEST, MOST, PAUSE_S, Slices
from tests.fakes.clock import FakeClock


class Interpreter:
    """Where a thread pauses: notes after how many items, and lets each pause take so many seconds more."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.clock = FakeClock()
        self.takes_s = takes_s
        self.done = 0
        self.pauses: list[int] = []

    def sleep(self, seconds: float) -> None:
        assert seconds == PAUSE_S
        self.pauses.append(self.done)
        self.clock.advance(seconds + self.takes_s)

    def work(self, items: int, then: Callable[[int], None] = lambda _item: None) -> list[int]:
        seen = []
        for item in Slices(range(items), self.sleep, self.clock):
            seen.append(item)
            self.done += 1
            then(item)
        return seen


def test_all_items_come_in_order_with_a_pause_after_each_few() -> None:
    interpreter = Interpreter()
    assert interpreter.work(4 * FEWEST) == list(range(4 * FEWEST))
    assert interpreter.pauses == [FEWEST, 2 * FEWEST, 3 * FEWEST]


@pytest.mark.parametrize("items", [0, 1, FEWEST])
def test_few_items_need_no_pause(items: int) -> None:
    interpreter = Interpreter()
    assert len(interpreter.work(items)) == items
    assert interpreter.pauses == []


def test_pauses_become_rarer_while_the_event_loop_is_busy_and_frequent_again_afterwards() -> None:
    interpreter = Interpreter(2 * BUSY_S)
    interpreter.work(10 * MOST)
    between = [after - before for before, after in itertools.pairwise([0, *interpreter.pauses])]
    assert between[:3] == [FEWEST, 2 * FEWEST, 4 * FEWEST]
    assert between[-1] == MOST == max(between)

    def recover(item: int) -> None:
        if item == MOST:
            interpreter.takes_s = 0.0

    interpreter.done, interpreter.pauses = 0, []
    interpreter.work(10 * MOST, recover)
    assert interpreter.pauses[-1] - interpreter.pauses[-2] == FEWEST


def test_slices_are_the_sequence_that_they_were_made_of() -> None:
    found = Slices("abcdef")
    assert (len(found), found[1], found[-2:]) == (6, "b", "ef")
    assert list(found) == list(found) == list("abcdef")
