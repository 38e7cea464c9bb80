"""What happens over several calls: the breaker, overload, callers who leave, limits, the retry budget."""

import http.client
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

import pytest

from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Answer, Silent, Status
from tests.faults.bench import Bench, changed, until
from tests.faults.traces import (
    ATTEMPTS,
    CALLS,
    COUNTERS,
    REJECTIONS,
    SCHEDULED,
    TRANSITIONS,
    Counts,
    Trace,
)

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

LIMIT_S = 4
FIRST_WAIT_S = 1
STATE = "llmops.circuit_breaker.state"
IN_FLIGHT = "llmops.requests.in_flight"
REJECTED_REQUESTS = "llmops.requests.rejected"


def added(counts: Counts, metric: str, attribute: str) -> dict[object, float]:
    """What was added to a metric, by the values of one attribute."""
    return {
        value: number
        for (name, having), number in counts.items()
        if name == metric
        for key, value in having
        if key == attribute
    }


def test_by_default_a_stopped_litellm_costs_one_slow_call_then_a_quick_one_then_none() -> None:
    with Bench({}) as bench:
        with bench.stopped("refusing"):
            first, second = bench.generate(), bench.generate()
        # It is back, so a request to it would be seen.
        third = bench.generate()
        assert not bench.upstream.chat_requests

        assert (first.status, first.json["error"], first.headers["x-llm-attempts"]) == (
            504,
            "UpstreamTimeoutError",
            "4",
        )
        assert first.seconds >= 7
        wanted = ["llm_request_started"]
        for number, delay in enumerate(("1.[0-3]", "2.[0-5]", "[45].[0-9]"), 1):
            wanted += [f"Attempt {number}: Connection error", f"Retrying in {delay}s..."]
        wanted += ["Attempt 4: Connection error", "Giving up after attempt 4: no retries left"]
        wanted += ["llm_request_failed", "http_request_completed"]
        lines = bench.messages(first.request_id)
        assert len(lines) == len(wanted)
        assert all(map(fnmatchcase, lines, wanted)), lines

        # The fifth failure in a row opens the breaker; the call in which it does keeps its own error.
        assert (second.status, second.headers["x-llm-attempts"]) == (504, "1")
        assert second.seconds < first.seconds / 2
        said = bench.messages(second.request_id)
        assert "Circuit breaker closed -> open" in said
        assert "Giving up after attempt 1: the circuit breaker is open" in said

        assert (third.status, third.json["error"]) == (503, "CircuitOpenError")
        assert third.seconds < first.seconds / 2
        assert 28 <= int(third.headers["retry-after"]) <= 30


def test_after_the_time_out_one_of_fifty_callers_reaches_the_upstream() -> None:
    variables = {"BREAKER_FAILURE_THRESHOLD": "1", "BREAKER_TIMEOUT_S": "1", "RETRY_MAX": "0"}
    with OtlpReceiver() as receiver, Bench(variables, receiver) as bench:
        before = bench.counts(*COUNTERS)
        with bench.stopped("refusing"):
            assert bench.generate().status == 504
            assert bench.generate().status == 503
        until(lambda: bench.value(STATE, state="half_open") == 1, "the breaker's time-out")
        bench.upstream.clear()

        # Slow enough for all to call while the probe is under way.
        bench.upstream.default = Answer(delay_s=1.5)
        answers = bench.generate_often(50)
        assert Counter(answer.status for answer in answers) == {200: 1, 503: 49}
        assert len(bench.upstream.chat_requests) == 1
        (probe,) = (answer for answer in answers if answer.status == 200)
        rejected = [answer for answer in answers if answer.status == 503]
        assert {answer.json["error"] for answer in rejected} == {"CircuitOpenError"}
        assert {answer.headers["retry-after"] for answer in rejected} == {"1"}
        assert statistics.median(answer.seconds for answer in rejected) < probe.seconds / 2

        assert bench.value(STATE, state="closed") == 1
        bench.upstream.default = Answer()
        assert {answer.status for answer in bench.generate_often(50)} == {200}
        assert len(bench.upstream.chat_requests) == 51
        counts = changed(before, bench.counts(*COUNTERS))
        assert added(counts, TRANSITIONS, "to") == {"open": 1, "half_open": 1, "closed": 1}
        assert added(counts, REJECTIONS, "breaker") == {"litellm": 50}


def health_p99_ms(bench: Bench, number: int, over: Callable[[], bool] = lambda: False) -> float:
    """The 99th percentile of so many probes, or of fewer when it is over; each must be answered."""
    took_ms: list[float] = []
    while len(took_ms) < number and not over():
        answer = bench.process.call("GET", "/health", timeout_s=5)
        assert answer.status == 200
        took_ms.append(answer.seconds * 1_000)
    return sorted(took_ms)[math.ceil(0.99 * len(took_ms)) - 1]


def test_two_hundred_callers_of_a_silent_upstream_leave_the_service_responsive() -> None:
    variables = {"MAX_IN_FLIGHT": "50", "MAX_IN_FLIGHT_PER_USER": "50", "LLM_TIMEOUT_S": f"{LIMIT_S}"}
    variables |= {"LLM_CONNECT_TIMEOUT_S": "2", "RETRY_MAX": "0", "BREAKER_FAILURE_THRESHOLD": "1000"}
    with OtlpReceiver() as receiver, Bench(variables, receiver) as bench:
        health_p99_ms(bench, 50)
        idle_ms = health_p99_ms(bench, 500)
        bench.upstream.default = Silent()
        with ThreadPoolExecutor(1) as background:
            calls = background.submit(bench.generate_often, 200)
            # From the first caller's arrival until the last one's answer.
            busy_ms = health_p99_ms(bench, 10_000, calls.done)
            answers = calls.result()
        assert busy_ms <= 10 * idle_ms

        assert Counter(answer.status for answer in answers) == {504: 50, 503: 150}
        turned_away = [answer for answer in answers if answer.status == 503]
        timed_out = [answer for answer in answers if answer.status == 504]
        assert {answer.json["error"] for answer in turned_away} == {"OverloadedError"}
        assert {answer.headers["retry-after"] for answer in turned_away} == {"1"}
        assert statistics.median(answer.seconds for answer in turned_away) < LIMIT_S / 2
        assert LIMIT_S <= statistics.median(answer.seconds for answer in timed_out) < 2 * LIMIT_S
        assert len(bench.upstream.chat_requests) == 50
        assert max(point.value for point in receiver.points(IN_FLIGHT)) == 50
        assert bench.value(IN_FLIGHT) == 0
        assert bench.value(REJECTED_REQUESTS, reason="overloaded") == 150
        assert bench.value(CALLS, error__type="UpstreamTimeoutError") == 50


def test_a_caller_who_leaves_between_two_attempts_stops_the_call() -> None:
    variables = {"RETRY_BASE_DELAY_S": f"{FIRST_WAIT_S}", "RETRY_JITTER": "0"}
    with OtlpReceiver() as receiver, Bench(variables, receiver) as bench:
        before = bench.counts(*COUNTERS)
        bench.upstream.default = Status(500)
        caller = http.client.HTTPConnection("127.0.0.1", bench.process.port, timeout=10)
        headers = {"Authorization": f"Bearer {bench.token}", "Content-Type": "application/json"}
        caller.request("POST", "/llm/generate", b'{"prompt": "What is a trace?"}', headers)
        until(lambda: '"Retrying in 2.0s..."' in bench.process.text(), "the second back-off")
        left = time.monotonic()
        caller.close()

        until(
            lambda: "http_request_completed" in bench.process.text().split("Retrying in 2.0s")[1], "the end"
        )
        assert time.monotonic() < left + 2 * FIRST_WAIT_S
        # The third attempt would have come within this time.
        time.sleep(max(0.0, left + 2 * FIRST_WAIT_S + 0.3 - time.monotonic()))
        assert len(bench.upstream.chat_requests) == 2
        assert "Attempt 3" not in bench.process.text()

        counts = changed(before, bench.counts(*COUNTERS))
        assert added(counts, CALLS, "outcome") == {"cancelled": 1}
        assert added(counts, ATTEMPTS, "outcome") == {"retried": 2}
        assert bench.value(STATE, state="closed") == 1
        assert bench.value(IN_FLIGHT) == 0
        trace = Trace(receiver, receiver.spans(name="llm call")[0].trace_id)
        facts = trace.call.attributes
        assert (facts["llmops.llm.outcome"], facts["llmops.llm.attempts"]) == ("cancelled", 2)
        assert len(trace.chats) == len(trace.posts) == len(trace.events(SCHEDULED)) == 2
        assert trace.server.attributes["error.type"] == "CallerLeftError"


def test_the_sixth_call_in_a_minute_is_one_too_many_and_another_user_is_none_the_worse() -> None:
    with OtlpReceiver() as receiver, Bench({"RATE_LIMIT": "5/minute"}, receiver) as bench:
        answers = [bench.generate() for _ in range(6)]
        other = bench.generate(token=bench.process.token("admin"))

        assert [answer.status for answer in answers] == [200] * 5 + [429]
        assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"per-user";q=5;w=60'}
        remaining = [answer.headers["ratelimit"].split(";")[1] for answer in answers]
        assert remaining == ["r=4", "r=3", "r=2", "r=1", "r=0", "r=0"]
        assert answers[-1].json["error"] == "RateLimitError"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert (other.status, other.headers["ratelimit"].split(";")[1]) == (200, "r=4")
        assert len(bench.upstream.chat_requests) == 6
        assert bench.value(REJECTED_REQUESTS, reason="rate_limited") == 1


def test_retries_end_with_their_budget() -> None:
    variables = {
        "RETRY_BUDGET_FLOOR": "3",
        "RETRY_BUDGET_WINDOW_S": "60",
        "RETRY_BASE_DELAY_S": "0.01",
        "BREAKER_FAILURE_THRESHOLD": "1000",
    }
    with OtlpReceiver() as receiver, Bench(variables, receiver) as bench:
        bench.upstream.default = Status(500)
        answers = [bench.generate() for _ in range(20)]

        assert {answer.status for answer in answers} == {502}
        # A fifth of the calls, once that is more than the floor.
        assert len(bench.upstream.chat_requests) == 20 + max(3, 4)
        assert bench.value(ATTEMPTS, outcome="retried") == 4
        assert bench.value(ATTEMPTS, outcome="budget") == 19
        assert bench.value(ATTEMPTS, outcome="exhausted") == 1
        last = bench.messages(answers[1].request_id)
        assert "Giving up after attempt 1: the retry budget is spent" in last
