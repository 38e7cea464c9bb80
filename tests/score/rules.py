"""The rules of the Instrumentation Score (github.com/instrumentation-score/spec), over a capture.

Each rule says what it looked at, and what breaks it. What the specification leaves open is decided here, and
said at the rule. Of RES-008 and RES-009 no text was found.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import metadata, version
from typing import Any, Final, Literal

from packaging.specifiers import SpecifierSet

from tests.fakes.otlp_records import Log, Point, Span
from tests.score.capture import Capture
from tests.score.conventions import ATTRIBUTES, RESOURCE_NAMESPACES
from tests.score.sensitive import sensitive_in

Impact = Literal["Critical", "Important", "Normal", "Low"]
WEIGHTS: Final[Mapping[Impact, int]] = {"Critical": 40, "Important": 30, "Normal": 20, "Low": 10}
PRODUCTION: Final = "production"
CRITICALITIES: Final = frozenset({"mission_critical", "high", "medium", "low"})
VOLATILE: Final = frozenset(
    {
        *("host.ip", "host.mac", "os.description", "process.runtime.description"),
        *("process.command_args", "process.command_line"),
    }
)
MAX_INTERNAL: Final = 10
MAX_SHORT: Final = 20
SHORT_NS: Final = 5_000_000
MAX_VALUES: Final = 10_000
MAX_SPAN_NAMES: Final = 100
"""The specification gives no number; this is enough for each route, operation and store."""

UNIT: Final = re.compile(r"1|s|ms|By|%|\{[a-z_]+\}|[A-Z]{3}")
"""Codes of UCUM that are in use here. UCUM has no currencies; those are the codes of ISO 4217."""

UNIT_NAMES: Final = re.compile(
    r"(^|[._])(s|ms|ns|us|second(s)?|millisecond(s)?|by|byte(s)?|kb|mb|percent|ratio|usd|dollar(s)?)([._]|$)"
)
"""Units as words of a metric's name. A note in braces is no unit: {token} does not forbid the word."""


@dataclass(frozen=True)
class Verdict:
    """What came of a rule.

    Args:
        evidence: What it looked at.
        broken: What breaks it; it is kept where there is nothing.
    """

    evidence: str
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A rule of the specification."""

    id: str
    impact: Impact
    description: str
    check: Callable[[Capture], Verdict]


def score(results: Iterable[tuple[Rule, Verdict]]) -> float:
    """The score: the weight of the rules that are kept, of the weight of all, times 100."""
    kept = total = 0
    for rule, verdict in results:
        total += WEIGHTS[rule.impact]
        kept += 0 if verdict.broken else WEIGHTS[rule.impact]
    return 100 * kept / total


def _verdict(evidence: str, broken: Iterable[str]) -> Verdict:
    return Verdict(evidence, tuple(dict.fromkeys(broken)))


# ---- Resources ---------------------------------------------------------------------------------------------


def _name(resource: Mapping[str, Any]) -> str:
    return f"{resource.get('service.name')} pid {resource.get('process.pid')}"


def _has(key: str) -> Callable[[Capture], Verdict]:
    def check(capture: Capture) -> Verdict:
        lacking = [_name(one) for one in capture.resources if not str(one.get(key) or "").strip()]
        values = sorted({str(one.get(key)) for one in capture.resources})
        return _verdict(f"{len(capture.resources)} resources: {', '.join(values)}", lacking)

    return check


def _unique_instance(capture: Capture) -> Verdict:
    """A process is a worker in a pod; the pod's uid and the process id tell two of them apart."""
    processes = defaultdict(set)
    for resource in capture.resources:
        processes[resource.get("service.instance.id")].add(
            (resource.get("k8s.pod.uid"), resource.get("process.pid"))
        )
    pods = Counter(resource.get("k8s.pod.uid") for resource in capture.resources)
    evidence = f"{len(processes)} ids, {len(capture.resources)} processes in {len(pods)} pods"
    shared = [
        f"{instance} is that of {len(them)} processes"
        for instance, them in processes.items()
        if len(them) > 1
    ]
    missing = len(capture.resources) - len(processes)
    return _verdict(evidence, [*shared, *([f"{missing} processes share an id"] if missing else [])])


def _pod_uid(capture: Capture) -> Verdict:
    in_pods = [one for one in capture.resources if any(str(key).startswith("k8s.") for key in one)]
    return _verdict(
        f"{len(in_pods)} of {len(capture.resources)} processes are in a pod",
        [_name(one) for one in in_pods if not one.get("k8s.pod.uid")],
    )


def _right_level(capture: Capture) -> Verdict:
    """Attributes that identify what sends the telemetry stand on the resource, and no other ones do."""
    own = {
        key
        for attributes in (
            *(span.attributes for span in capture.spans),
            *(log.attributes for log in capture.logs),
            *(point.attributes for point in capture.points),
        )
        for key in attributes
    }
    below = sorted(key for key in own if key.startswith(RESOURCE_NAMESPACES))
    on_resources = {key for resource in capture.resources for key in resource}
    above = sorted(
        key for key in on_resources if key in ATTRIBUTES and not key.startswith(RESOURCE_NAMESPACES)
    )
    return _verdict(
        f"{len(own)} keys on signals, {len(on_resources)} on resources",
        [*[f"{key} on a signal" for key in below], *[f"{key} on a resource" for key in above]],
    )


def _criticality(capture: Capture) -> Verdict:
    found = [str(one["service.criticality"]) for one in capture.resources if "service.criticality" in one]
    return _verdict(
        f"set on {len(found)} resources", [value for value in found if value not in CRITICALITIES]
    )


def _resource_texts(capture: Capture) -> Verdict:
    return _sensitive(f"{len(capture.resources)} resources", capture.resources)


def _sensitive(what: str, records: Iterable[Mapping[str, Any]]) -> Verdict:
    return _verdict(what, [found for record in records for found in sensitive_in(record)])


# ---- Spans -------------------------------------------------------------------------------------------------


def _traces(capture: Capture) -> dict[str, list[Span]]:
    found = defaultdict(list)
    for span in capture.spans:
        found[span.trace_id].append(span)
    return found


def _few_internal(capture: Capture) -> Verdict:
    numbers = {
        trace: sum(span.kind == "INTERNAL" for span in spans) for trace, spans in _traces(capture).items()
    }
    return _verdict(
        f"{len(numbers)} traces, at most {max(numbers.values(), default=0)} INTERNAL spans in one",
        [f"{number} in {trace}" for trace, number in numbers.items() if number > MAX_INTERNAL],
    )


def orphans(capture: Capture) -> list[Span]:
    """Spans whose parent nobody sent."""
    known = {(span.trace_id, span.span_id) for span in capture.spans}
    return [span for span in capture.spans if span.parent_id and (span.trace_id, span.parent_id) not in known]


def _no_orphans(capture: Capture) -> Verdict:
    return _verdict(
        f"{len(capture.spans)} spans, those of the callers included",
        [f"{span.name} in {span.trace_id}" for span in orphans(capture)],
    )


def _few_names(capture: Capture) -> Verdict:
    found = {span.name for span in capture.spans}
    digits = re.compile(r"[0-9a-f]{16,}|/\d{3,}|\?")
    broken = [name for name in found if digits.search(name)]
    if len(found) > MAX_SPAN_NAMES:
        broken.append(f"{len(found)} names")
    return _verdict(f"{len(found)} names, none with an id, a query or a path of its own", broken)


def _no_client_roots(capture: Capture) -> Verdict:
    roots = [span for span in capture.spans if not span.parent_id]
    kinds = Counter(span.kind for span in roots)
    return _verdict(
        ", ".join(f"{number} {kind} roots" for kind, number in sorted(kinds.items())),
        [f"{span.name} in {span.trace_id}" for span in roots if span.kind == "CLIENT"],
    )


def _few_short(capture: Capture) -> Verdict:
    numbers = {
        trace: sum(span.end_ns - span.start_ns < SHORT_NS for span in spans)
        for trace, spans in _traces(capture).items()
    }
    return _verdict(
        f"{len(numbers)} traces, at most {max(numbers.values(), default=0)} spans under 5 ms in one",
        [f"{number} in {trace}" for trace, number in numbers.items() if number > MAX_SHORT],
    )


def _span_texts(capture: Capture) -> Verdict:
    def parts(span: Span) -> Iterator[Mapping[str, Any]]:
        yield {"name": span.name, "status_message": span.status_message, "scope": span.scope}
        yield span.attributes
        for event in span.events:
            yield {"name": event.name, **event.attributes}
        for link in span.links:
            yield link.attributes

    return _sensitive(
        f"{len(capture.spans)} spans with their events and links",
        [part for span in capture.spans for part in parts(span)],
    )


# ---- Metrics -----------------------------------------------------------------------------------------------


def _by_metric(capture: Capture) -> dict[str, list[Point]]:
    found = defaultdict(list)
    for point in capture.points:
        found[point.name].append(point)
    return found


def _bounded(capture: Capture) -> Verdict:
    values: dict[tuple[str, str], set[Any]] = defaultdict(set)
    for point in capture.points:
        for key, value in point.attributes.items():
            values[point.name, key].add(value)
    most = max(values, key=lambda key: len(values[key]), default=("", ""))
    return _verdict(
        f"at most {len(values.get(most, ()))} values: {most[1]} of {most[0]}",
        [f"{key} of {name}" for (name, key), them in values.items() if len(them) >= MAX_VALUES],
    )


def _units(capture: Capture) -> Verdict:
    found = {name: {point.unit for point in points} for name, points in _by_metric(capture).items()}
    used = sorted({unit for units in found.values() for unit in units})
    return _verdict(
        f"{len(found)} metrics: {' '.join(used)}",
        [f"{name}: {unit!r}" for name, units in found.items() for unit in units if not UNIT.fullmatch(unit)],
    )


def _one_unit(capture: Capture) -> Verdict:
    found = {name: {point.unit for point in points} for name, points in _by_metric(capture).items()}
    return _verdict(f"{len(found)} metrics", [name for name, units in found.items() if len(units) > 1])


def _one_set_of_buckets(capture: Capture) -> Verdict:
    found = {
        name: {tuple(point.bounds) for point in points if point.kind == "histogram"}
        for name, points in _by_metric(capture).items()
    }
    histograms = {name: bounds for name, bounds in found.items() if bounds}
    return _verdict(
        f"{len(histograms)} histograms", [name for name, bounds in histograms.items() if len(bounds) > 1]
    )


def _no_unit_in_names(capture: Capture) -> Verdict:
    found = _by_metric(capture)
    return _verdict(f"{len(found)} metrics", [name for name in found if UNIT_NAMES.search(name)])


def _no_attributes_name(capture: Capture) -> Verdict:
    found = _by_metric(capture)
    return _verdict(
        f"{len(found)} metrics beside {len(ATTRIBUTES)} attributes of the conventions",
        [name for name in found if name in ATTRIBUTES],
    )


def _steady_resource(capture: Capture) -> Verdict:
    resources = [point.resource for point in capture.points]
    return _verdict(
        f"{len({repr(one) for one in resources})} resources of metrics",
        [key for resource in resources for key in resource if key in VOLATILE],
    )


def _metric_texts(capture: Capture) -> Verdict:
    records = [
        {"name": point.name, "description": point.description, "unit": point.unit, **point.attributes}
        for point in capture.points
    ]
    return _sensitive(f"{len(records)} points of {len(_by_metric(capture))} metrics", records)


# ---- Logs and the SDK --------------------------------------------------------------------------------------


def _no_debug(capture: Capture) -> Verdict:
    in_production = [
        log for log in capture.logs if log.resource.get("deployment.environment.name") == PRODUCTION
    ]
    levels = Counter(log.severity for log in in_production)
    return _verdict(
        "in production " + ", ".join(f"{number} {level}" for level, number in sorted(levels.items())),
        [str(log.body) for log in in_production if log.severity == "DEBUG"],
    )


def _severity(capture: Capture) -> Verdict:
    return _verdict(
        f"{len(capture.logs)} log records", [str(log.body) for log in capture.logs if not log.severity_number]
    )


def _log_texts(capture: Capture) -> Verdict:
    def record(log: Log) -> Mapping[str, Any]:
        return {"body": log.body, "event": log.event_name, "scope": log.scope, **log.attributes}

    return _sensitive(f"{len(capture.logs)} log records", [record(log) for log in capture.logs])


def _supported(capture: Capture) -> Verdict:
    """The SDK says which versions of Python it supports."""
    required = SpecifierSet(metadata("opentelemetry-sdk")["Requires-Python"])
    found = {str(one.get("process.runtime.version")) for one in capture.resources}
    sdk = {str(one.get("telemetry.sdk.version")) for one in capture.resources}
    wrong = [f"Python {one}" for one in found if one not in required]
    other = [f"SDK {one}" for one in sdk if one != version("opentelemetry-sdk")]
    return _verdict(f"Python {', '.join(found)}; SDK {', '.join(sdk)} wants {required}", [*wrong, *other])


RULES: Final = (
    Rule("RES-001", "Normal", "service.instance.id is present", _has("service.instance.id")),
    Rule("RES-002", "Important", "service.instance.id is unique", _unique_instance),
    Rule("RES-003", "Important", "k8s.pod.uid is present in a pod", _pod_uid),
    Rule("RES-004", "Important", "attributes are at the right level", _right_level),
    Rule("RES-005", "Critical", "service.name is present", _has("service.name")),
    Rule("RES-006", "Normal", "service.criticality is a known value", _criticality),
    Rule("RES-007", "Important", "the environment has a name", _has("deployment.environment.name")),
    Rule("RES-010", "Critical", "resources have no sensitive data", _resource_texts),
    Rule("SPA-001", "Normal", "a trace has few INTERNAL spans", _few_internal),
    Rule("SPA-002", "Normal", "no orphan spans", _no_orphans),
    Rule("SPA-003", "Important", "span names are few", _few_names),
    Rule("SPA-004", "Important", "no CLIENT roots", _no_client_roots),
    Rule("SPA-005", "Important", "a trace has few short spans", _few_short),
    Rule("SPA-006", "Critical", "spans have no sensitive data", _span_texts),
    Rule("MET-001", "Important", "attributes of metrics are bounded", _bounded),
    Rule("MET-002", "Important", "metrics have units", _units),
    Rule("MET-003", "Important", "a metric has one unit", _one_unit),
    Rule("MET-004", "Normal", "a histogram has one set of buckets", _one_set_of_buckets),
    Rule("MET-005", "Normal", "names of metrics have no unit", _no_unit_in_names),
    Rule("MET-006", "Important", "no metric has an attribute's name", _no_attributes_name),
    Rule("MET-007", "Normal", "metrics have no volatile resource attributes", _steady_resource),
    Rule("MET-008", "Critical", "metrics have no sensitive data", _metric_texts),
    Rule("LOG-001", "Important", "no DEBUG in production", _no_debug),
    Rule("LOG-002", "Important", "log records have a severity", _severity),
    Rule("LOG-003", "Critical", "log records have no sensitive data", _log_texts),
    Rule("SDK-001", "Low", "the SDK supports the runtime", _supported),
)
