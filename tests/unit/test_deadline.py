"""The deadline is one moment, whoever asks."""

from service.utils.deadline import Deadline
from tests.fakes.clock import FakeClock


def test_time_left_shrinks_and_ends_at_zero() -> None:
    clock = FakeClock(100.0)
    deadline = Deadline.after(30.0, clock=clock)
    assert deadline.left_s == 30.0
    clock.advance(29.0)
    assert deadline.left_s == 1.0
    clock.advance(5.0)
    assert deadline.left_s == 0.0
    assert deadline.limit_s == 30.0


def test_it_counts_from_the_moment_given() -> None:
    clock = FakeClock(100.0)
    assert Deadline.after(30.0, since=90.0, clock=clock).left_s == 20.0
