"""What the telemetry of one faulty call must be, computed from its row of the table."""

import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.fakes.otlp import OtlpReceiver, SpanEvent
from tests.faults.cases import Case, Outcome
from tests.faults.own import correct
from tests.faults.table import DEADLINE_S, Fault

Counts = dict[tuple[str, frozenset[tuple[str, Any]]], float]
"""The values of counters, by their name and attributes."""

CALLS = "llmops.llm.calls"
ATTEMPTS = "llmops.retry.attempts"
REJECTIONS = "llmops.circuit_breaker.rejections"
TRANSITIONS = "llmops.circuit_breaker.transitions"
COUNTERS = (CALLS, ATTEMPTS, REJECTIONS, TRANSITIONS)
SCHEDULED, SUCCEEDED, EXHAUSTED = (f"llmops.retry.{what}" for what in ("scheduled", "succeeded", "exhausted"))
METHODS = frozenset({"GET", "POST", "DELETE"})
REJECTED = "llmops.circuit_breaker.rejected"


class Trace:
    """The spans of one trace; there is one SERVER span, and it is the last to end."""

    def __init__(self, receiver: OtlpReceiver, trace_id: str) -> None:
        receiver.wait_for(lambda it: any(span.kind == "SERVER" for span in it.spans(trace_id)))
        self.spans = sorted(receiver.spans(trace_id), key=lambda span: span.start_ns)
        (self.server,) = [span for span in self.spans if span.kind == "SERVER"]
        (self.call,) = [span for span in self.spans if span.name == "llm call"]
        self.chats = [span for span in self.spans if "gen_ai.operation.name" in span.attributes]
        self.posts = [span for span in self.spans if span.name in METHODS]
        assert len(self.spans) == 2 + len(self.chats) + len(self.posts)

    def events(self, name: str) -> list[SpanEvent]:
        """The events of a name; ours stand on the call's span only."""
        others = [event.name for span in self.spans if span is not self.call for event in span.events]
        assert not [other for other in others if other.startswith("llmops.")]
        return [event for event in self.call.events if event.name == name]


def check_spans(trace: Trace, case: Case) -> None:
    """One SERVER span, in it one call, in it one GenAI span for each attempt, in that one HTTP request."""
    server, call, fault = trace.server, trace.call, case.fault
    assert server.attributes["http.route"] == case.route.path
    assert server.attributes["http.response.status_code"] == fault.status
    assert server.attributes.get("error.type", "") == fault.error
    assert (call.parent_id, call.kind) == (server.span_id, "INTERNAL")
    assert call.attributes["llmops.llm.attempts"] == fault.attempts
    assert call.attributes["llmops.llm.outcome"] == ("error" if fault.error else "success")
    assert 0 <= call.attributes["llmops.llm.deadline_left"] <= DEADLINE_S
    assert call.attributes.get("error.type", "") == fault.error
    assert call.status == ("ERROR" if fault.error else "UNSET")

    assert [(span.name, span.kind, span.parent_id) for span in trace.chats] == [
        (f"{case.route.sample.genai} demo", "CLIENT", call.span_id)
    ] * fault.attempts
    for span in trace.chats:
        assert span.attributes["gen_ai.operation.name"] == case.route.sample.genai
        # Nobody has asked where the upstream decides; an attempt that is read in pieces is a stream.
        began = fault.succeeds and span is trace.chats[-1]
        streamed = case.streamed if case.route.row.answer_body == "json" else began
        assert span.attributes.get("gen_ai.request.stream", False) is streamed
    # An answer in text is not read.
    counts = case.route.row.answer_body == "json" or fault.behaviours[-1] is correct
    if case.route.sample.counts and counts and not fault.error:
        last = trace.chats[-1].attributes
        counted = last.get("gen_ai.usage.input_tokens"), last.get("gen_ai.usage.output_tokens")
        assert counted == case.route.sample.counts
    ended = [fault.failed] * (fault.attempts - 1) + [fault.error]
    assert [span.attributes.get("error.type", "") for span in trace.chats] == ended
    assert [span.status for span in trace.chats] == ["ERROR" if error else "UNSET" for error in ended]
    assert [span.parent_id for span in trace.posts] == [span.span_id for span in trace.chats]
    for earlier, later in itertools.pairwise(trace.chats):
        assert earlier.end_ns <= later.start_ns


def check_events(trace: Trace, fault: Fault) -> None:
    """Each decision about another attempt is an event, once, with its facts."""
    waits = trace.events(SCHEDULED)
    assert [event.attributes["attempt"] for event in waits] == list(range(1, len(fault.delays_s) + 1))
    for event, delay_s in zip(waits, fault.delays_s, strict=True):
        facts = event.attributes
        assert facts["error.type"] == fault.failed
        assert facts["delay_s"] <= facts["remaining_s"] <= DEADLINE_S
        if delay_s is not None:
            assert facts["delay_s"] == pytest.approx(delay_s, abs=0.001)
    given_up = [_picked(event, "attempts", "error.type", "reason") for event in trace.events(EXHAUSTED)]
    reason = next((outcome for outcome in fault.outcomes if outcome != "retried"), "")
    assert given_up == ([(fault.attempts, fault.error, reason)] if fault.gives_up else [])
    succeeded = [event.attributes["attempts"] for event in trace.events(SUCCEEDED)]
    assert succeeded == ([fault.attempts] if fault.attempts > 1 and fault.succeeds else [])
    assert len(trace.call.events) == len(waits) + len(given_up) + len(succeeded)


def _picked(event: SpanEvent, *names: str) -> tuple[Any, ...]:
    assert 0 <= event.attributes["remaining_s"] <= DEADLINE_S
    return tuple(event.attributes[name] for name in names)


def expected_counts(cases: Iterable[Case]) -> Counts:
    """What the calls add to the counters."""
    counts: Counter[tuple[str, frozenset[tuple[str, Any]]]] = Counter()
    for case in cases:
        fault = case.fault
        call = {"model": "demo", "outcome": "success"}
        if fault.error:
            call = {"model": "demo", "outcome": "error", "error.type": fault.error}
        counts[CALLS, frozenset(call.items())] += 1
        for outcome, number in fault.outcomes.items():
            attempt = {"operation": case.route.operation, "outcome": outcome}
            if outcome != "success":
                attempt["error.type"] = fault.failed
            counts[ATTEMPTS, frozenset(attempt.items())] += number
    return {key: float(number) for key, number in counts.items()}


def check_records(receiver: OtlpReceiver, trace: Trace) -> None:
    """Each event of the call's span is an OTLP log record too, once."""
    wanted = Counter(event.name for event in trace.call.events)

    def found(it: OtlpReceiver) -> Counter[str]:
        return Counter(log.event_name for log in it.logs(trace.server.trace_id) if log.event_name)

    # The last line of the request: what was logged before it is here when it is.
    receiver.wait_for(
        lambda it: any(log.body == "http_request_completed" for log in it.logs(trace.server.trace_id))
    )
    assert found(receiver) == wanted


def check_ids(trace: Trace, outcome: Outcome, case: Case) -> None:
    """The answer names its span, and each attempt's request carries the context of its own."""
    if case.fault.error and outcome.complete:
        assert f'"inc_{trace.server.span_id}"'.encode() in outcome.answer.body
    if case.fault.place == "answering":
        # The upstream's spans would hang below these.
        assert outcome.parents == {span.span_id for span in trace.posts}


def differences_in_telemetry(receiver: OtlpReceiver, case: Case, outcome: Outcome) -> list[str]:
    """What is otherwise than the table says in a call's spans and log records, one line each."""
    try:
        trace = Trace(receiver, outcome.answer.request_id)
    except (AssertionError, TimeoutError, ValueError) as error:
        return [f"the spans of the call: {error}"]
    checks: list[Callable[[], None]] = [
        lambda: check_spans(trace, case),
        lambda: check_events(trace, case.fault),
        lambda: check_records(receiver, trace),
        lambda: check_ids(trace, outcome, case),
    ]
    found = []
    for check in checks:
        try:
            check()
        except AssertionError as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"{where.name}: {where.line} {error}".strip())
    return found


def differences_in_counters(cases: Iterable[Case], added: Counts) -> list[str]:
    """What is otherwise than the table says in what calls have added to the counters, one line each."""
    wanted = expected_counts(cases)
    return [
        f"{name} {dict(attributes)}: {added.get((name, attributes), 0):g}, not "
        f"{wanted.get((name, attributes), 0):g}"
        for name, attributes in sorted(added.keys() | wanted.keys(), key=str)
        if added.get((name, attributes), 0) != wanted.get((name, attributes), 0)
    ]
