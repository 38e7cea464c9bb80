"""Every row of the fault table, against one real process, on every surface; then with the breaker open."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Drip, Endless, Silent
from tests.faults.bench import Bench, changed, differences, timings_ms
from tests.faults.table import FAULTS, VARIABLES, Fault
from tests.faults.traces import (
    CALLS,
    COUNTERS,
    REJECTED,
    REJECTIONS,
    Trace,
    check_events,
    check_records,
    check_spans,
    expected_counts,
)

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

BREAKER_TIMEOUT_S = 300.0
NEVER_DONE = (Silent, Drip, Endless)

each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with OtlpReceiver() as receiver, Bench(VARIABLES, receiver) as bench:
        yield bench


@dataclass(frozen=True)
class OpenBench:
    """A process whose breaker has opened; the moments lie before and after it did."""

    bench: Bench
    opened_after: float
    opened_before: float


@pytest.fixture(scope="module")
def open_bench() -> Iterator[OpenBench]:
    variables = {
        **VARIABLES,
        "BREAKER_FAILURE_THRESHOLD": "1",
        "BREAKER_TIMEOUT_S": f"{BREAKER_TIMEOUT_S}",
    }
    with OtlpReceiver() as receiver, Bench(variables, receiver) as bench:
        before = time.monotonic()
        with bench.stopped("refusing"):
            answer = bench.generate()
        # The call during which it opens ends with its own error.
        assert (answer.status, answer.json["error"]) == (504, "UpstreamTimeoutError")
        assert "Giving up after attempt 1: the circuit breaker is open" in bench.messages(answer.request_id)
        yield OpenBench(bench, before, time.monotonic())


@each_fault
def test_a_fault_looks_the_same_on_every_surface(bench: Bench, fault: Fault) -> None:
    receiver = bench.receiver
    receiver.clear()
    before, left_before = bench.counts(*COUNTERS), bench.upstream.disconnects
    outcome = bench.play(fault)

    assert not differences(fault, outcome)
    if isinstance(fault.behaviours[-1], NEVER_DONE):
        # What nobody waits for any more is not left running on the model's side.
        bench.upstream.wait_for(lambda it: it.disconnects == left_before + 1)
    assert changed(before, bench.counts(*COUNTERS)) == expected_counts(fault)
    trace = Trace(receiver, outcome.answer.request_id)
    check_spans(trace, fault)
    check_events(trace, fault)
    check_records(receiver, trace)
    if fault.error:
        assert outcome.answer.json["incident_id"] == f"inc_{trace.server.span_id}"
    spent = timings_ms(outcome.answer)
    assert spent["llm"] + spent.get("retry", 0.0) <= spent["total"] + 1
    # An attempt's header carries its own span's context: the upstream's spans would hang below it.
    parents = {request.headers["traceparent"].split("-")[2] for request in bench.upstream.chat_requests}
    if fault.place == "answering":
        assert parents == {span.span_id for span in trace.posts}


@each_fault
def test_with_the_breaker_open_no_fault_is_met(open_bench: OpenBench, fault: Fault) -> None:
    bench, receiver = open_bench.bench, open_bench.bench.receiver
    receiver.clear()
    counted = bench.counts(*COUNTERS)
    asked = time.monotonic()
    outcome = bench.play(fault)
    answer = outcome.answer

    assert (answer.status, answer.json["error"], outcome.seen) == (503, "CircuitOpenError", 0)
    assert answer.headers["x-llm-attempts"] == "0"
    until_open = int(answer.headers["retry-after"])
    least = open_bench.opened_after + BREAKER_TIMEOUT_S - time.monotonic()
    most = open_bench.opened_before + BREAKER_TIMEOUT_S - asked
    assert math.ceil(least) <= until_open <= math.ceil(most)
    assert outcome.messages == [
        "llm_request_started",
        "Circuit breaker open: the upstream is not asked",
        "llm_request_failed",
        "http_request_completed",
    ]

    trace = Trace(receiver, answer.request_id)
    assert (trace.chats, trace.posts) == ([], [])
    (event,) = trace.events(REJECTED)
    assert event.attributes["breaker"] == "litellm"
    assert math.ceil(event.attributes["retry_after_s"]) == until_open
    assert len(trace.call.events) == 1
    assert trace.call.attributes["llmops.llm.attempts"] == 0
    assert trace.call.attributes["error.type"] == trace.server.attributes["error.type"] == "CircuitOpenError"
    check_records(receiver, trace)

    call = {"model": "demo", "outcome": "error", "error.type": "CircuitOpenError"}
    assert changed(counted, bench.counts(*COUNTERS)) == {
        (CALLS, frozenset(call.items())): 1,
        (REJECTIONS, frozenset({("breaker", "litellm")})): 1,
    }
