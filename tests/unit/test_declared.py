"""A signal that is changed in one place only is found, and the finding says what to do."""

from dataclasses import replace
from typing import Any

import pytest

from service.telemetry import names
from tests.fakes.otlp_records import Log, Point, Span, SpanEvent
from tests.score.capture import Capture
from tests.score.declared import HOW, Comparison

RESOURCE = {
    "telemetry.sdk.language": "python",
    "telemetry.sdk.name": "opentelemetry",
    "telemetry.sdk.version": "1.45.2",
    "service.name": "llmops-api",
    "service.namespace": "llmops",
    "service.version": "0.1.0",
    "service.instance.id": "8c8c6267",
    "deployment.environment.name": "production",
}
FALLBACK = SpanEvent(names.EVENT_SHARED_FALLBACK_STARTED, {"reason": "unreachable"}, 0)
LOOKUP = Span(
    name=names.SPAN_CACHE_LOOKUP,
    kind="INTERNAL",
    trace_id="1" * 32,
    span_id="2" * 16,
    parent_id="3" * 16,
    attributes={names.ATTR_CACHE_KIND: "exact", names.ATTR_CACHE_RESULT: "hit", names.ATTR_CACHE_AGE: 0.5},
    events=[FALLBACK],
    status="UNSET",
    status_message="",
    links=[],
    start_ns=0,
    end_ns=1,
    flags=1,
    trace_state="",
    scope="service",
    resource=RESOURCE,
)
EVENT = Log(
    body="Valkey fails",
    severity="WARN",
    severity_number=13,
    event_name=names.EVENT_SHARED_FALLBACK_STARTED,
    trace_id="1" * 32,
    span_id="2" * 16,
    attributes={"reason": "unreachable", "request_id": "1" * 32, "incident_id": "inc_2"},
    scope="service.shared.counts",
    resource=RESOURCE,
    time_ns=0,
)
RECORD = replace(
    EVENT, body="llm_request_started", severity="INFO", event_name="", attributes={"model": "demo"}
)
POINT = Point(
    name=names.CACHE_LOOKUPS.name,
    unit="{lookup}",
    kind="sum",
    value=1.0,
    attributes={"kind": "exact", "result": "hit"},
    exemplars=[],
    scope="service",
    resource=RESOURCE,
    time_ns=0,
    monotonic=True,
)
LINE = {"timestamp": "now", "level": "INFO", "message": "llm_request_started", "logger": "x", "model": "demo"}
AS_DECLARED = Capture([LOOKUP], [EVENT, RECORD], [POINT], [LINE])


def with_attributes(record: Any, **changed: Any) -> Any:
    """The record with these attributes too; None removes one."""
    attributes = {**record.attributes, **{key.replace("__", "."): value for key, value in changed.items()}}
    return replace(record, attributes={key: value for key, value in attributes.items() if value is not None})


def test_what_is_declared_gives_no_finding() -> None:
    assert Comparison(AS_DECLARED).undeclared == []


CHANGES = {
    "a span's name": ("span", {"spans": [replace(LOOKUP, name="cache look-up")]}),
    "a span's kind": ("span", {"spans": [replace(LOOKUP, kind="CLIENT")]}),
    "a span that begins a trace": ("root", {"spans": [replace(LOOKUP, parent_id="")]}),
    "an attribute of a span": ("attribute", {"spans": [with_attributes(LOOKUP, llmops__cache__ages=1.0)]}),
    "an attribute of another span": ("attribute", {"spans": [with_attributes(LOOKUP, llmops__key__id="k")]}),
    "an attribute's type": ("type", {"spans": [with_attributes(LOOKUP, llmops__cache__age=1)]}),
    "an attribute's value": ("value", {"spans": [with_attributes(LOOKUP, llmops__cache__result="hits")]}),
    "an attribute that is missing": ("level", {"spans": [with_attributes(LOOKUP, llmops__cache__kind=None)]}),
    "a span event's name": (
        "event",
        {"spans": [replace(LOOKUP, events=[replace(FALLBACK, name="llmops.x")])]},
    ),
    "an event's name": ("event", {"logs": [replace(EVENT, event_name="llmops.shared.fallback.begun")]}),
    "an event's severity": ("severity", {"logs": [replace(EVENT, severity="INFO")]}),
    "an event's field": ("log field", {"logs": [with_attributes(EVENT, why="x")]}),
    "a log field": ("log field", {"logs": [with_attributes(RECORD, models="demo")]}),
    "a log field's value": ("value", {"logs": [with_attributes(RECORD, outcome="succeeded")]}),
    "a field of a line": ("log field", {"lines": [{**LINE, "models": "demo"}]}),
    "a metric's name": ("metric", {"points": [replace(POINT, name="llmops.cache.look_ups")]}),
    "a metric's unit": ("unit", {"points": [replace(POINT, unit="{look-up}")]}),
    "a metric's instrument": ("instrument", {"points": [replace(POINT, monotonic=False)]}),
    "an attribute of a metric": ("attribute of a metric", {"points": [with_attributes(POINT, user="alice")]}),
    "a metric's value": ("value", {"points": [with_attributes(POINT, kind="nearly")]}),
    "an attribute of the resource": (
        "attribute",
        {"spans": [replace(LOOKUP, resource={**RESOURCE, "host.ip": "10.0.0.1"})]},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_one_place_only_is_found(change: str) -> None:
    kind, changed = CHANGES[change]
    found = Comparison(replace(AS_DECLARED, **changed)).undeclared
    assert [finding.kind for finding in found] == [kind]
    assert HOW[kind] in str(found[0])
    assert "make dashboards" in str(found[0])


def test_what_was_not_seen_is_listed() -> None:
    unseen = Comparison(AS_DECLARED).unseen
    assert "span llmops.llm.call" in unseen
    assert "span llmops.cache.lookup" not in unseen
    assert f"event {names.EVENT_SHARED_FALLBACK_ENDED}" in unseen
    assert f"metric {names.LLM_CALLS.name}" in unseen
    assert "error InternalError" in unseen
    assert "attribute llmops.team" in unseen
