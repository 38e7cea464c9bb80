"""What the telemetry of one faulty call must be, computed from its row of the table."""

import itertools
from collections import Counter
from typing import Any

import pytest

from tests.fakes.otlp import OtlpReceiver, SpanEvent
from tests.faults.bench import Counts
from tests.faults.table import DEADLINE_S, Fault

CALLS = "llmops.llm.calls"
ATTEMPTS = "llmops.retry.attempts"
REJECTIONS = "llmops.circuit_breaker.rejections"
TRANSITIONS = "llmops.circuit_breaker.transitions"
COUNTERS = (CALLS, ATTEMPTS, REJECTIONS, TRANSITIONS)
SCHEDULED, SUCCEEDED, EXHAUSTED = (f"llmops.retry.{what}" for what in ("scheduled", "succeeded", "exhausted"))
REJECTED = "llmops.circuit_breaker.rejected"


class Trace:
    """The spans of one trace; there is one SERVER span, and it is the last to end."""

    def __init__(self, receiver: OtlpReceiver, trace_id: str) -> None:
        receiver.wait_for(lambda it: any(span.kind == "SERVER" for span in it.spans(trace_id)))
        self.spans = sorted(receiver.spans(trace_id), key=lambda span: span.start_ns)
        (self.server,) = [span for span in self.spans if span.kind == "SERVER"]
        (self.call,) = [span for span in self.spans if span.name == "llm call"]
        self.chats = [span for span in self.spans if span.name.startswith("chat ")]
        self.posts = [span for span in self.spans if span.name == "POST"]
        assert len(self.spans) == 2 + len(self.chats) + len(self.posts)

    def events(self, name: str) -> list[SpanEvent]:
        """The events of a name; ours stand on the call's span only."""
        others = [event.name for span in self.spans if span is not self.call for event in span.events]
        assert not [other for other in others if other.startswith("llmops.")]
        return [event for event in self.call.events if event.name == name]


def check_spans(trace: Trace, fault: Fault) -> None:
    """One SERVER span, in it one call, in it one GenAI span for each attempt, in that one HTTP request."""
    server, call = trace.server, trace.call
    assert server.attributes["http.response.status_code"] == fault.status
    assert server.attributes.get("error.type", "") == fault.error
    assert (call.parent_id, call.kind) == (server.span_id, "INTERNAL")
    assert call.attributes["llmops.llm.attempts"] == fault.attempts
    assert call.attributes["llmops.llm.outcome"] == ("error" if fault.error else "success")
    assert 0 <= call.attributes["llmops.llm.deadline_left"] <= DEADLINE_S
    assert call.attributes.get("error.type", "") == fault.error
    assert call.status == ("ERROR" if fault.error else "UNSET")

    assert [(span.name, span.kind, span.parent_id) for span in trace.chats] == [
        ("chat demo", "CLIENT", call.span_id)
    ] * fault.attempts
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
    assert succeeded == ([fault.attempts] if fault.attempts > 1 and not fault.error else [])
    assert len(trace.call.events) == len(waits) + len(given_up) + len(succeeded)


def _picked(event: SpanEvent, *names: str) -> tuple[Any, ...]:
    assert 0 <= event.attributes["remaining_s"] <= DEADLINE_S
    return tuple(event.attributes[name] for name in names)


def expected_counts(fault: Fault) -> Counts:
    """What the call adds to the counters."""
    call = {"model": "demo", "outcome": "success"}
    if fault.error:
        call = {"model": "demo", "outcome": "error", "error.type": fault.error}
    counts: Counts = {(CALLS, frozenset(call.items())): 1}
    for outcome, number in fault.outcomes.items():
        attempt = {"operation": "chat", "outcome": outcome}
        if outcome != "success":
            attempt["error.type"] = fault.failed
        counts[ATTEMPTS, frozenset(attempt.items())] = number
    return counts


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
