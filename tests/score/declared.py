"""Compares a capture with the declarations: what is undeclared, and what is declared but was not seen."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from grafana.registry import signals as at
from grafana.registry.attributes import ATTRIBUTES, METRICS, Attribute, allowed_at
from grafana.registry.signals import EVENTS, SPANS, Place
from service.telemetry.names import ERROR_NAMES
from tests.fakes.otlp_records import Log, Point, Span
from tests.score.capture import Capture

KINDS: Final = {
    "counter": ("sum", True),
    "up_down_counter": ("sum", False),
    "gauge": ("gauge", False),
    "histogram": ("histogram", False),
}
"""A kind of instrument as OTLP has it: its data, and whether they only grow."""

ENVELOPE: Final = frozenset({"timestamp", "level", "message", "logger", "trace_id", "span_id", "event"})
"""What a line on stdout has beside its fields; an OTLP record has them in places of their own."""


HOW: Final = {
    "span": "add it to SPANS in grafana/registry/signals.py",
    "event": "add it to EVENTS in service/telemetry/names.py and in grafana/registry/signals.py",
    "metric": "add it to METRICS in service/telemetry/names.py, or to STANDARD in grafana/standard.py",
    "attribute": "add it to grafana/registry/attributes.py, with the places where it may stand",
    "attribute of a metric": "add it to the metric in service/telemetry/names.py or grafana/standard.py",
    "log field": "add it to grafana/registry/attributes.py, with at.LOG_LINE among its places",
    "value": "add it to the attribute's values, in the metric or in grafana/registry/attributes.py",
    "type": "make the attribute's type in grafana/registry/attributes.py that of its values, or the reverse",
    "level": "see why it is missing, or make it recommended in grafana/registry/attributes.py",
    "unit": "make the unit in service/telemetry/names.py or grafana/standard.py that of the instrument",
    "instrument": "make the kind in service/telemetry/names.py or grafana/standard.py that of the instrument",
    "severity": "add the level to the event in grafana/registry/signals.py",
    "root": "correct the span's `root` in grafana/registry/signals.py, or its parent in the service",
}
"""What to do about each kind of finding; after that, `make dashboards`."""


@dataclass(frozen=True, order=True)
class Finding:
    """Something that is undeclared, or declared otherwise.

    Args:
        kind: A key of ``HOW``.
        where: The signal.
        what: What is wrong with it.
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.where}: {self.what}. To declare it, {HOW[self.kind]}; then make dashboards"
        )


@dataclass(frozen=True)
class Comparison:
    """A capture beside the declarations."""

    capture: Capture

    @cached_property
    def undeclared(self) -> list[Finding]:
        """All that is undeclared or otherwise declared, each once."""
        found: set[Finding] = set()
        for span in self.capture.spans:
            found.update(_span(span))
        for log in self.capture.logs:
            found.update(_log(log))
        for line in self.capture.lines:
            found.update(_line(line))
        for point in self.capture.points:
            found.update(_point(point))
        for resource in self.capture.resources:
            found.update(_attributes("resource", at.RESOURCE, resource))
        return sorted(found)

    @property
    def unseen(self) -> list[str]:
        """What is declared and was not seen: spans, events, errors, metrics, attributes at any place."""
        seen_spans = {kind.id for span in self.capture.spans for kind in kinds_of(span)}
        seen_errors = {span.attributes.get("error.type") for span in self.capture.spans}
        seen_events = {log.event_name for log in self.capture.logs}
        seen_metrics = {point.name for point in self.capture.points}
        keys = {key for record in _all_attributes(self.capture) for key in record}
        return [
            *[f"span {span.id}" for span in SPANS if span.id not in seen_spans],
            *[f"event {event.name}" for event in EVENTS if event.name not in seen_events],
            *[f"error {name}" for name in ERROR_NAMES if name not in seen_errors],
            *[f"metric {metric.name}" for metric in METRICS if metric.name not in seen_metrics],
            *[f"attribute {key}" for key in ATTRIBUTES if key not in keys],
        ]


def _all_attributes(capture: Capture) -> Iterator[Mapping[str, Any]]:
    for span in capture.spans:
        yield span.attributes
        for event in span.events:
            yield event.attributes
    yield from (log.attributes for log in capture.logs)
    yield from (point.attributes for point in capture.points)
    yield from capture.resources


def kinds_of(span: Span) -> list[at.Span]:
    """The declared kinds of a span, of which there should be one."""
    return [
        kind
        for kind in SPANS
        if kind.kind == span.kind.lower()
        and any(_filled(template, span.attributes) == span.name for template in kind.names)
    ]


def _filled(template: str, attributes: Mapping[str, Any]) -> str | None:
    try:
        return re.sub(r"\{([^}]+)\}", lambda key: str(attributes[key[1]]), template)
    except KeyError:
        return None


def _span(span: Span) -> Iterator[Finding]:
    where = f"{span.kind} span {span.name!r}"
    kinds = kinds_of(span)
    if len(kinds) != 1:
        yield Finding("span", where, f"is of {len(kinds)} declared kinds, not of one")
        return
    (kind,) = kinds
    if kind.root is not None and kind.root is bool(span.parent_id):
        yield Finding("root", where, "begins a trace" if not span.parent_id else "has a parent")
    yield from _attributes(where, kind, span.attributes)
    for event in span.events:
        declared = [one for one in EVENTS if one.name == event.name]
        if not declared:
            yield Finding("event", f"event {event.name!r} of {where}", "is undeclared")
        for one in declared:
            yield from _attributes(f"event {event.name!r}", one, event.attributes)


def _log(log: Log) -> Iterator[Finding]:
    fields = dict(log.attributes)
    of_request: dict[str, Any] = {
        key: fields.pop(key)
        for key in list(fields)
        if ATTRIBUTES.get(key) and ATTRIBUTES[key].level_at(at.REQUEST)
    }
    if of_request.keys() - {"user"}:
        yield from _attributes("log record of a request", at.REQUEST, of_request)
    if not log.event_name:
        yield from _attributes(f"log record {str(log.body)[:40]!r}", at.LOG_LINE, fields, kind="log field")
        return
    declared = [event for event in EVENTS if event.name == log.event_name]
    if not declared:
        yield Finding("event", f"event {log.event_name!r}", "is undeclared")
        return
    (event,) = declared
    if log.severity not in event.levels:
        yield Finding("severity", f"event {event.name!r}", f"has the severity {log.severity!r}")
    yield from _attributes(f"event {event.name!r}", event, fields, kind="log field")


def _line(line: Mapping[str, Any]) -> Iterator[Finding]:
    """A line on stdout has the fields of its OTLP record; the first lines of a process have no record."""
    for key in line.keys() - ENVELOPE - ATTRIBUTES.keys():
        yield Finding("log field", f"line {str(line.get('message'))[:40]!r}", f"{key} is undeclared")


def _attributes(
    where: str, place: Place, attributes: Mapping[str, Any], kind: str = "attribute"
) -> Iterator[Finding]:
    for key, value in attributes.items():
        attribute = ATTRIBUTES.get(key)
        if attribute is None or attribute.level_at(place) is None:
            yield Finding(kind, where, f"{key} is undeclared there")
            continue
        yield from _value(where, attribute, value, allowed_at(attribute, place))
    for attribute in ATTRIBUTES.values():
        if attribute.level_at(place) == "required" and attribute.key not in attributes:
            yield Finding("level", where, f"{attribute.key} is required there and missing")


def _value(where: str, attribute: Attribute, value: Any, allowed: Iterable[str]) -> Iterator[Finding]:
    if type_of(value) != attribute.type and value != []:
        yield Finding("type", where, f"{attribute.key} is {type_of(value)}, and declared as {attribute.type}")
    allowed = tuple(allowed)
    if allowed and value not in allowed:
        yield Finding("value", where, f"{attribute.key} has the value {value!r}")


def type_of(value: object) -> str:
    """The type of a value, in the words of the conventions."""
    match value:
        case bool():
            return "boolean"
        case int():
            return "int"
        case float():
            return "double"
        case str():
            return "string"
        case [first, *_]:
            return f"{type_of(first)}[]"
        case _:
            return "none"


def _point(point: Point) -> Iterator[Finding]:
    where = f"metric {point.name}"
    declared = [metric for metric in METRICS if metric.name == point.name]
    if not declared:
        yield Finding("metric", where, "is undeclared")
        return
    metric = declared[0]
    if point.unit != metric.unit:
        yield Finding("unit", where, f"has the unit {point.unit!r}, and is declared with {metric.unit!r}")
    if (point.kind, point.monotonic) != KINDS[metric.kind]:
        yield Finding("instrument", where, f"is a {point.kind}, and is declared as {metric.kind}")
    for key, value in point.attributes.items():
        values = metric.attributes.get(key)
        if values is None:
            yield Finding("attribute of a metric", where, f"{key} is undeclared there")
            continue
        if key not in ATTRIBUTES:
            yield Finding("attribute", where, f"{key} is undeclared")
            continue
        allowed = () if isinstance(values, str) else values
        known = key == "dependency" and str(value).startswith("oidc_")
        yield from _value(where, ATTRIBUTES[key], value, () if known else allowed)
