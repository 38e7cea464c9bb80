"""Each rule of the Instrumentation Score is broken by what it is about, and kept without."""

from dataclasses import replace
from typing import Any

import pytest

from tests.score.__main__ import duplicates, report, verdicts
from tests.score.capture import Capture
from tests.score.rules import RULES, WEIGHTS, Rule, Verdict, score
from tests.score.sensitive import sensitive_in
from tests.unit.test_declared import AS_DECLARED, EVENT, LOOKUP, POINT, RESOURCE

POD = {
    **RESOURCE,
    "process.pid": 7,
    "process.runtime.version": "3.11.7",
    "k8s.pod.uid": "p",
    "k8s.pod.name": "n",
}
SERVER = replace(LOOKUP, name="GET /", kind="SERVER", span_id="3" * 16, parent_id="", resource=POD)
CHILD = replace(LOOKUP, resource=POD, start_ns=0, end_ns=10_000_000)
LOG = replace(EVENT, resource=POD)
TOTAL = replace(POINT, resource=POD)
GOOD = Capture([SERVER, CHILD], [LOG], [TOTAL])


def of(resource: dict[str, Any]) -> dict[str, Any]:
    """A capture whose resource is this one."""
    changed = {**POD, **resource}
    changed = {key: value for key, value in changed.items() if value is not None}
    return {"spans": [replace(SERVER, resource=changed)], "logs": [], "points": []}


def spans(number: int, **changed: Any) -> dict[str, Any]:
    """Spans of one trace, below the first one."""
    return {"spans": [SERVER, *[replace(CHILD, span_id=f"{at:016x}", **changed) for at in range(number)]]}


def points(*changed: Any) -> dict[str, Any]:
    """Points like the good one, each with something changed."""
    return {"points": [replace(TOTAL, **one) for one in changed]}


BREAKS: dict[str, dict[str, Any]] = {
    "RES-001": of({"service.instance.id": None}),
    "RES-002": {"spans": [SERVER, replace(CHILD, resource={**POD, "process.pid": 8})]},
    "RES-003": of({"k8s.pod.uid": None}),
    "RES-004": {"spans": [replace(SERVER, attributes={"service.name": "x"})]},
    "RES-005": of({"service.name": ""}),
    "RES-006": of({"service.criticality": "HIGH"}),
    "RES-007": of({"deployment.environment.name": None}),
    "RES-010": of({"process.command": "x --password=hunter2"}),
    "SPA-001": spans(11),
    "SPA-002": {"spans": [CHILD]},
    "SPA-003": {"spans": [replace(SERVER, name="GET /keys/4711")]},
    "SPA-004": {"spans": [replace(SERVER, kind="CLIENT")]},
    "SPA-005": spans(21, kind="CLIENT", end_ns=1_000),
    "SPA-006": {"spans": [replace(SERVER, attributes={"url.full": "http://x?token=abc"})]},
    "MET-001": points(*[{"attributes": {"model": str(number)}} for number in range(10_000)]),
    "MET-002": points({"unit": ""}),
    "MET-003": points({}, {"unit": "s"}),
    "MET-004": points({"kind": "histogram", "bounds": [1.0]}, {"kind": "histogram", "bounds": [2.0]}),
    "MET-005": points({"name": "llmops.cache.duration_seconds"}),
    "MET-006": points({"name": "http.route"}),
    "MET-007": points({"resource": {**POD, "process.runtime.description": "3.11.7 (main)"}}),
    "MET-008": points({"attributes": {"user": "alice@example.com"}}),
    "LOG-001": {"logs": [replace(LOG, severity="DEBUG")]},
    "LOG-002": {"logs": [replace(LOG, severity_number=0)]},
    "LOG-003": {"logs": [replace(LOG, body="card 4111-1111-1111-1111")]},
    "SDK-001": of({"process.runtime.version": "3.6.0"}),
}


def test_there_is_a_case_for_each_rule() -> None:
    assert list(BREAKS) == [rule.id for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_is_broken_by_what_it_is_about(rule: Rule) -> None:
    assert rule.check(GOOD).broken == ()
    assert rule.check(replace(GOOD, **BREAKS[rule.id])).broken


def test_the_score_weighs_the_rules_as_the_specification_says() -> None:
    kept, broken = Verdict(""), Verdict("", ("x",))
    of_impact = {impact: next(rule for rule in RULES if rule.impact == impact) for impact in WEIGHTS}
    example = {"Critical": (4, 8), "Important": (8, 10), "Normal": (6, 8), "Low": (1, 5)}
    results = [
        (of_impact[impact], kept if number < good else broken)  # type: ignore[index]  # an impact
        for impact, (good, all_of_them) in example.items()
        for number in range(all_of_them)
    ]
    assert score(results) == pytest.approx(63.86, abs=0.01)


def test_an_orphan_a_duplicate_and_what_is_undeclared_are_in_the_report() -> None:
    orphan = replace(CHILD, trace_id="9" * 32)
    text, good = report(replace(AS_DECLARED, spans=[SERVER, SERVER, orphan, replace(CHILD, name="x")]))
    assert not good
    assert "orphan cache lookup" in text
    assert duplicates(Capture([SERVER, SERVER])) == [f"SERVER in {'1' * 32}", f"span GET / {'3' * 16}"]
    assert "BROKEN SPA-002 20" in text


def test_spans_below_a_callers_span_are_no_orphans() -> None:
    caller = replace(SERVER, kind="CLIENT", span_id="8" * 16, resource={"service.name": "caller"})
    below = replace(SERVER, parent_id="8" * 16)
    broken = {
        rule.id
        for rule, verdict in verdicts(Capture([caller, below, CHILD], [LOG], [TOTAL]))
        if verdict.broken
    }
    assert not broken & {"SPA-002", "SPA-004", "RES-001"}


@pytest.mark.parametrize(
    "record",
    [
        {"body": "user alice@example.com"},
        {"body": "4111 1111 1111 1111"},
        {"number": 4111111111111111},
        {"body": "123-45-6789"},
        {"body": "Bearer eyJhbGciOiJIUzI1NiIs"},
        {"body": "sk-proj-abc123def456"},
        {"body": "AKIAIOSFODNN7EXAMPLE"},
        {"body": "llmops_SJ3WsvmX49pc_" + "x" * 43},
        {"body": "password=hunter2"},
        {"body": {"nested": ["patient_id=7"]}},
        {"user": {"password": "correct-horse"}},
        {"api_key": "x"},
    ],
)
def test_what_looks_sensitive_is_found(record: dict[str, Any]) -> None:
    (found,) = sensitive_in(record)
    assert "hunter2" not in found


@pytest.mark.parametrize(
    "record",
    [
        {"gen_ai.token.type": "input", "gen_ai.usage.input_tokens": 1_700_000_000},
        {"service.instance.id": "8c8c6267-f73f-4411-94c3-a56499be17e2"},
        {"trace_id": "4111111111111111" * 2, "db.collection.name": "llmops_cache_2a97516c354b_2"},
        {"llmops.key.id": "SJ3WsvmX49pc", "token": ""},
    ],
)
def test_what_is_no_secret_is_not_found(record: dict[str, Any]) -> None:
    assert not list(sensitive_in(record))
