"""Rows of the fault table, against one real process, on every surface; then with the breaker open.

``make faults`` plays every fault on every route. Here are all of them on one route, and some on each other
one, so chosen that every fault meets several routes.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest

from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Status
from tests.faults.bench import LATE, Bench, changed, differences
from tests.faults.cases import Case, Outcome, product
from tests.faults.routes import ROUTES
from tests.faults.table import FAULTS, VARIABLES
from tests.faults.traces import (
    CALLS,
    COUNTERS,
    REJECTED,
    REJECTIONS,
    Trace,
    check_records,
    differences_in_counters,
    differences_in_telemetry,
)

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

BREAKER_TIMEOUT_S = 300.0
OF_OTHER_ROUTES = 4
"""Of each other route, one of so many cases is played."""

FEW = 2
"""A fault that so few routes can meet is played on all of them."""

CASES = product()
GROUPS = {
    streamed: list(dict.fromkeys(case.group for case in CASES if case.streamed is streamed))
    for streamed in (False, True)
}
ROUTES_OF = {fault: {case.route.name for case in CASES if case.fault is fault} for fault in FAULTS}
CHOSEN = [
    case
    for case in CASES
    if case.route.name == "generate"
    or len(ROUTES_OF[case.fault]) <= FEW
    or (FAULTS.index(case.fault) + GROUPS[case.streamed].index(case.group)) % OF_OTHER_ROUTES == 0
]
WITH_OPEN_BREAKER = [
    next(case for case in CASES[number % len(CASES) :] + CASES if case.fault is fault)
    for number, fault in zip(range(0, 97 * len(FAULTS), 97), FAULTS, strict=True)
]
"""Every fault once, on one of the routes."""


@dataclass(frozen=True)
class Played:
    """What came of cases that were played at the same time."""

    outcomes: Mapping[Case, Outcome]
    in_telemetry: Mapping[Case, list[str]]
    in_counters: list[str]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with OtlpReceiver() as receiver, Bench(VARIABLES, receiver) as bench:
        yield bench


def played_by(bench: Bench, cases: list[Case]) -> Played:
    bench.prepare(cases)
    before = bench.counts(*COUNTERS)
    outcomes: dict[Case, Outcome] = {}
    for place in dict.fromkeys(case.fault.place for case in cases):
        there = [case for case in cases if case.fault.place == place]
        outcomes.update(zip(there, bench.play_all(there), strict=True))
    return Played(
        outcomes,
        {case: differences_in_telemetry(bench.receiver, case, one) for case, one in outcomes.items()},
        differences_in_counters(cases, changed(before, bench.counts(*COUNTERS))),
    )


@pytest.fixture(scope="module")
def played(bench: Bench) -> Played:
    return played_by(bench, CHOSEN)


def test_every_fault_meets_routes_of_every_kind() -> None:
    assert {case.group for case in CHOSEN} == {*GROUPS[False], *GROUPS[True]}
    for fault in FAULTS:
        met = [case for case in CHOSEN if case.fault is fault]
        assert len({case.route.name for case in met}) >= min(FEW, len(ROUTES_OF[fault])), fault.name


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_a_fault_looks_the_same_on_every_surface(bench: Bench, played: Played, case: Case) -> None:
    found = differences(case, played.outcomes[case])
    if found == [LATE]:
        # A machine that stands still for a moment delays some of many calls; one alone must be in time.
        bench.prepare([case])
        found = differences(case, *bench.play_all([case]))
    assert not found
    assert not played.in_telemetry[case]


def test_every_call_and_attempt_is_counted_once(played: Played) -> None:
    assert not played.in_counters


def test_what_differs_from_the_table_is_found_on_every_surface(bench: Bench) -> None:
    fault = next(fault for fault in FAULTS if fault.name == "500")
    wrong = replace(fault, behaviours=(Status(429),), attempts=2, outcomes={"not_retryable": 1})
    case = Case(wrong, ROUTES["messages"])
    found = played_by(bench, [case])
    seen = "\n".join(
        [*differences(case, found.outcomes[case]), *found.in_telemetry[case], *found.in_counters]
    )
    for surface in (
        *("status", "requests seen upstream", "X-LLM-Attempts", "Retry-After", "log lines", "the answer"),
        *("check_spans", "check_events", "llmops.llm.calls", "llmops.retry.attempts"),
    ):
        assert surface in seen
    streamed = Case(
        replace(next(fault for fault in FAULTS if fault.name == "garbage"), behaviours=FAULTS[0].behaviours),
        ROUTES["responses"],
        streamed=True,
    )
    (outcome,) = bench.play_all([streamed])
    assert "the answer cannot be read" in "\n".join(differences(streamed, outcome))


@dataclass(frozen=True)
class OpenBench:
    """What came of every fault with a breaker that has opened; the moments lie before and after it did."""

    played: Mapping[Case, Outcome]
    traces: Mapping[Case, Trace]
    receiver: OtlpReceiver
    added: dict[str, float]
    opened_after: float
    opened_before: float
    asked: float
    answered: float


@pytest.fixture(scope="module")
def open_bench() -> Iterator[OpenBench]:
    variables = {
        **VARIABLES,
        "BREAKER_FAILURE_THRESHOLD": "1",
        "BREAKER_TIMEOUT_S": f"{BREAKER_TIMEOUT_S}",
    }
    with OtlpReceiver() as receiver, Bench(variables, receiver) as bench:
        cases = [replace(case, fault=replace(case.fault, place="answering")) for case in WITH_OPEN_BREAKER]
        bench.prepare(cases)
        before = time.monotonic()
        with bench.stopped("refusing"):
            answer = bench.generate()
        after = time.monotonic()
        # The call during which it opens ends with its own error.
        assert (answer.status, answer.json["error"]) == (504, "UpstreamTimeoutError")
        assert "Giving up after attempt 1: the circuit breaker is open" in bench.messages(answer.request_id)
        counted, asked = bench.counts(*COUNTERS), time.monotonic()
        outcomes = dict(zip(WITH_OPEN_BREAKER, bench.play_all(cases), strict=True))
        answered = time.monotonic()
        traces = {case: Trace(receiver, one.answer.request_id) for case, one in outcomes.items()}
        added = changed(counted, bench.counts(*COUNTERS))
        yield OpenBench(
            outcomes,
            traces,
            receiver,
            {f"{name} {sorted(attributes)}": value for (name, attributes), value in added.items()},
            before,
            after,
            asked,
            answered,
        )


@pytest.mark.parametrize("case", WITH_OPEN_BREAKER, ids=str)
def test_with_the_breaker_open_no_fault_is_met(open_bench: OpenBench, case: Case) -> None:
    outcome, trace = open_bench.played[case], open_bench.traces[case]
    answer = outcome.answer

    said = case.route.error_in(answer.json)
    assert (answer.status, said["name"], outcome.seen) == (503, "CircuitOpenError", 0)
    assert answer.headers["x-llm-attempts"] == "0"
    until_open = int(answer.headers["retry-after"])
    least = open_bench.opened_after + BREAKER_TIMEOUT_S - open_bench.answered
    most = open_bench.opened_before + BREAKER_TIMEOUT_S - open_bench.asked
    assert math.ceil(least) <= until_open <= math.ceil(most)
    assert outcome.messages == [
        "llm_request_started",
        "Circuit breaker open: the upstream is not asked",
        "llm_request_failed",
        "http_request_completed",
    ]
    assert (trace.chats, trace.posts) == ([], [])
    (event,) = trace.events(REJECTED)
    assert event.attributes["breaker"] == "litellm"
    assert math.ceil(event.attributes["retry_after_s"]) == until_open
    assert len(trace.call.events) == 1
    assert trace.call.attributes["llmops.llm.attempts"] == 0
    assert trace.call.attributes["error.type"] == trace.server.attributes["error.type"] == "CircuitOpenError"
    check_records(open_bench.receiver, trace)


def test_with_the_breaker_open_every_call_is_counted_once(open_bench: OpenBench) -> None:
    call = {"model": "demo", "outcome": "error", "error.type": "CircuitOpenError"}
    assert open_bench.added == {
        f"{CALLS} {sorted(call.items())}": len(FAULTS),
        f"{REJECTIONS} {[('breaker', 'litellm')]}": len(FAULTS),
    }
