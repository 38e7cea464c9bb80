"""The budget holds for any order of calls and retries."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from service.utils.retry import SLICES, RetryBudget
from tests.fakes.clock import FakeClock


def test_the_floor_lets_a_quiet_process_retry() -> None:
    budget = RetryBudget(0.2, 3, 10.0, FakeClock())
    budget.count_call()
    assert [budget.take() for _ in range(5)] == [True, True, True, False, False]


def test_a_busy_process_may_retry_a_fifth_of_its_calls() -> None:
    budget = RetryBudget(0.2, 3, 10.0, FakeClock())
    for _ in range(100):
        budget.count_call()
    assert sum(budget.take() for _ in range(100)) == 20


def test_what_is_spent_comes_back_when_the_window_has_passed() -> None:
    clock = FakeClock()
    budget = RetryBudget(0.2, 1, 10.0, clock)
    assert budget.take()
    assert not budget.take()
    clock.advance(10.0)
    assert budget.take()


@given(st.lists(st.one_of(st.just("call"), st.just("retry"), st.floats(0.0, 4.0)), max_size=300))
def test_never_more_than_allowed_in_any_window(steps: list[str | float]) -> None:
    clock = FakeClock()
    budget = RetryBudget(0.2, 3, 10.0, clock)
    calls: deque[float] = deque()
    retries: deque[float] = deque()
    for step in steps:
        if step == "call":
            budget.count_call()
            calls.append(clock())
        elif step == "retry":
            if budget.take():
                retries.append(clock())
        elif isinstance(step, float):
            clock.advance(step)
        # The oldest slice is let go whole, so the window is one slice shorter at worst.
        certain = clock() - 10.0 * (SLICES - 1) / SLICES
        recent = sum(at > certain for at in retries)
        assert recent <= max(3, 0.2 * sum(at > clock() - 10.0 - 10.0 / SLICES for at in calls))
