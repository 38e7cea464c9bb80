"""Dashboards and rules ask for nothing that the service, the collector or a rule does not have."""

import re

import pytest
import yaml

from grafana import signals
from grafana.__main__ import FOLDER, generated
from grafana.objectives import AVAILABILITY, CALLS, LATENCY, NOT_SERVED, OBJECTIVES, SLOW_S, WINDOW
from grafana.parties import FAILURES, PARTIES
from grafana.series import RESOURCE_LABELS, label, series_of
from grafana.standard import COLLECTOR, STANDARD
from service.errors import PUBLIC_ERRORS
from service.telemetry import names
from tests.contract.promql import selectors
from tests.stack.queries import boards, of_panels, of_rules, panels, rules

ROOT = FOLDER.parents[1]
RUNBOOK = (ROOT / "grafana/README.md").read_text(encoding="utf-8")
RECORDED = {rule["record"]: rule["expr"] for rule in rules("record")}
METRICS = {series: metric for metric in (*names.METRICS, *STANDARD) for series in series_of(metric)}
NEXT_NAMES = re.compile(
    r"gen_ai_client_inference_(duration_seconds_bucket|usage_(input|output)_tokens_total)"
)
"""The GenAI conventions' next names, which the rules accept beside today's."""

SQL = "grafana-postgresql-datasource"
"""Its queries are run against a real PostgreSQL: see tests/stack/test_spending.py."""

PROMQL = [query for query in of_panels() if query.datasource == "prometheus"]
EVERYTHING = [*PROMQL, *of_rules("record"), *of_rules("alert")]
PROMETHEUS = {"type": "prometheus", "uid": "prometheus"}
PANELS = [(board["uid"], panel) for board in boards() for panel in panels(board)]


def _by_where(query: object) -> str:
    return str(getattr(query, "where", query))


def _title(panel: object) -> str:
    return str(panel[1]["title"]) if isinstance(panel, tuple) else str(panel)


def test_the_dashboards_are_as_generated() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")} == generated()


def test_the_table_of_signals_is_as_generated() -> None:
    text = signals.README.read_text(encoding="utf-8")
    assert signals.with_table(text) == text


@pytest.mark.parametrize("query", EVERYTHING, ids=_by_where)
def test_a_query_reads_what_is_declared(query: object) -> None:
    found = list(selectors(getattr(query, "filled", "")))
    assert found
    for series, matchers in found:
        asked = {name for name, _, _ in matchers}
        if series in METRICS:
            metric = METRICS[series]
            known = {label(attribute): values for attribute, values in metric.attributes.items()}
            assert asked <= {*known, *RESOURCE_LABELS, "le"}, series
            for name, operator, value in matchers:
                allowed = known.get(name, "")
                # Of a closed set: an equal value is in it, and each part of an alternative is.
                if not isinstance(allowed, str) and value and operator in {"MatchOp.Equal", "MatchOp.Re"}:
                    assert set(value.split("|")) <= set(allowed), (series, name, value)
        elif series in COLLECTOR:
            assert asked <= {*COLLECTOR[series], "job"}, series
        else:
            assert series in RECORDED or NEXT_NAMES.fullmatch(series), series


def test_a_name_that_nobody_declares_is_noticed() -> None:
    (found,) = selectors("rate(llmops_llm_calls_renamed_total[5m])")
    assert found[0] not in METRICS


@pytest.mark.parametrize("panel", PANELS, ids=_title)
def test_a_panel_says_what_it_shows_and_what_to_do(panel: tuple[str, dict[str, object]]) -> None:
    _, drawn = panel
    about = str(drawn["description"])
    shows, _, do = about.partition("\n\n**When it is red:** ")
    assert len(shows) > 20
    assert len(do) > 20
    assert drawn["links"]
    if drawn["datasource"] in (PROMETHEUS, {"type": SQL, "uid": "postgresql"}):
        assert drawn["fieldConfig"]["defaults"]["unit"]  # type: ignore[index]  # decoded JSON
        assert drawn["fieldConfig"]["defaults"]["noValue"] == "0"  # type: ignore[index]  # decoded JSON


@pytest.mark.parametrize("query", PROMQL, ids=_by_where)
def test_a_panel_of_a_fresh_system_is_not_empty(query: object) -> None:
    """A gauge is there from the start; anything else has its zero written into the query."""
    expr = getattr(query, "expr", "")
    gauges = ("llmops_circuit_breaker_state", "llmops_health_status", "(up)")
    assert "vector(" in expr or any(gauge in expr for gauge in gauges)


def test_links_between_dashboards_lead_somewhere() -> None:
    uids = {board["uid"] for board in boards()}
    text = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json"))
    assert {match[1] for match in re.finditer(r"/d/([a-z-]+)", text)} <= uids
    assert {rule["annotations"]["dashboard"].removeprefix("/d/") for rule in rules("alert")} <= uids


def test_every_declared_metric_of_ours_is_on_a_dashboard() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json"))
    unseen = [m.name for m in names.METRICS if not any(series in text for series in series_of(m))]
    assert not unseen


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_an_alert_has_a_runbook_that_begins_with_what_to_look_at(rule: dict[str, dict[str, str]]) -> None:
    name = str(rule["alert"])
    assert rule["annotations"]["runbook"] == f"grafana/README.md#{name.lower()}"
    assert rule["labels"]["severity"] in {"page", "ticket"}
    heading = f"### {name}\n\n**Look at** "
    assert heading in RUNBOOK


def test_each_error_has_one_party() -> None:
    listed = [error for party in PARTIES.values() for error in party]
    assert sorted(listed) == sorted(error.__name__ for error in PUBLIC_ERRORS)


def test_rules_and_collector_have_the_objectives_numbers() -> None:
    for name, expr in RECORDED.items():
        if name.startswith("llmops:availability:"):
            assert f'error_type=~"{"|".join(FAILURES)}"' in expr
            assert expr.count(f'http_route!~"{NOT_SERVED}"') == 3
        if name.startswith("llmops:latency:"):
            assert f'le="{SLOW_S}"' in expr
            assert expr.count(f'http_route=~"{CALLS}"') == 2
    for objective in OBJECTIVES:
        assert objective.ratio(WINDOW) in RECORDED
        burning = [rule["expr"] for rule in rules("alert") if f"llmops:{objective.name}:" in rule["expr"]]
        assert len(burning) == 2
        factors = {match[1] for expr in burning for match in re.finditer(r"> ([\d.]+) \* ([\d.]+)", expr)}
        budgets = {match[2] for expr in burning for match in re.finditer(r"> ([\d.]+) \* ([\d.]+)", expr)}
        assert factors == {"14.4", "6", "3", "1"}
        assert budgets == {f"{objective.budget:g}"}
    assert (AVAILABILITY.budget, LATENCY.budget) == (0.005, 0.05)
    configured = yaml.safe_load((ROOT / "otel/collector.yaml").read_text(encoding="utf-8"))
    policies = configured["processors"]["tail_sampling"]["policies"]
    assert [one["latency"]["threshold_ms"] for one in policies if one["name"] == "slow"] == [SLOW_S * 1_000]
    assert SLOW_S in names.HTTP_DURATION_BUCKETS


def test_panels_of_tempo_and_loki_name_what_exists() -> None:
    """Their languages have no parser here: braces and known events are what can be checked."""
    others = [query for query in of_panels() if query.datasource not in {"prometheus", SQL}]
    assert {query.datasource for query in others} == {"tempo", "loki"}
    for query in others:
        assert query.expr.count("{") == query.expr.count("}") == 1
        for group in re.findall(r"llmops\\+\.\(([a-z_|]+)\)", query.expr):
            for part in group.split("|"):
                assert any(event.startswith(f"llmops.{part}.") for event in names.EVENTS), part
