"""Every query of every panel, recording rule and alert, against the real Prometheus."""

import re
from collections.abc import Mapping

import pytest

from grafana.objectives import AVAILABILITY, LATENCY
from grafana.series import base, series_of
from grafana.standard import COLLECTOR, STANDARD
from service.telemetry import names
from tests.stack.api import Labels
from tests.stack.conftest import Run
from tests.stack.expectations import Expectations
from tests.stack.proof import Row, ask_all
from tests.stack.queries import Query, of_panels, of_rules
from tests.stack.verdicts import Expected, Same, Within, labels, show

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

SERVICE = "llmops-api"
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d", "30d")
THRESHOLD = re.compile(r"(>|==) [\d.]+( \* [\d.]+)?")

FIRES = {
    "AvailabilityBudgetBurnsFast": "after",
    "AvailabilityBudgetBurnsSlowly": "after",
    "BugInTheService": "after",
    "BreakerOpen": "breaker open",
    "DependencyDown": "mlflow up",
    "RecorderSpooling": "mlflow up",
}
"""Alerts whose condition must hold in this run, and the moment up to which it must have begun."""

NEEDS_A_FAULT = {"TelemetryDropped", "ServiceSilent"}
"""Alerts on series that exist only with the fault: see `test_outage.py`, and the time before the service."""


def _agree(run: Run, rows: list[Row]) -> None:
    run.rows.extend(rows)
    wrong = [f"{row.where}: {row.verdict}" for row in rows if row.differences]
    assert not wrong, "\n".join(wrong)


def test_every_panel_shows_what_callers_saw(run: Run) -> None:
    queries = [query for query in of_panels() if query.datasource == "prometheus"]
    _agree(run, ask_all(run.world.api, queries, Expectations(run.mix).table(), run.at))


def test_every_recording_rule_records_it(run: Run) -> None:
    expectations = Expectations(run.mix)
    panels = expectations.table()
    own: dict[str, Expected] = {}
    for objective, ratio in (
        (AVAILABILITY, expectations.failure_ratio()),
        (LATENCY, expectations.slow_ratio()),
    ):
        for window in WINDOWS:
            own[objective.ratio(window)] = Same({labels(service_name=SERVICE): ratio}, 0.1)
    for kind in ("input", "output"):
        seen = panels[f"llm: Tokens by model: {kind} A"]
        assert isinstance(seen, Same)
        own[f"llmops:gen_ai_{kind}_tokens:rate5m"] = Same(_of_service(seen.values))
    rules = of_rules("record")
    buckets = "llmops:gen_ai_duration_seconds_bucket:rate5m"
    _agree(run, ask_all(run.world.api, [rule for rule in rules if rule.where != buckets], own, run.at))
    recorded = [Query(f"recorded: {rule.where}", rule.where) for rule in rules if rule.where != buckets]
    _agree(
        run,
        ask_all(
            run.world.api,
            [Query(query.where, f"sum without (__name__) ({query.expr})") for query in recorded],
            {f"recorded: {name}": expected for name, expected in own.items()},
            run.at,
        ),
    )


def _of_service(values: Mapping[Labels, float]) -> dict[Labels, float]:
    return {key | labels(service_name=SERVICE): value for key, value in values.items()}


def test_the_recorded_buckets_hold_every_attempt(run: Run) -> None:
    attempts = sum(entry.attempts for entry in run.mix.ledger.calls())
    (value,) = run.world.api.query(
        'sum(llmops:gen_ai_duration_seconds_bucket:rate5m{le="+Inf"}) * 300', run.at
    ).values()
    row = Row("llmops:gen_ai_duration_seconds_bucket:rate5m", f"{attempts}", f"{value:.4g}")
    assert value == pytest.approx(attempts, rel=0.05)
    run.rows.append(row)


def test_every_alert_has_data_and_holds_when_it_must(run: Run) -> None:
    rows = []
    moments = run.mix.ledger.moments
    for rule in of_rules("alert"):
        if rule.where not in NEEDS_A_FAULT:
            open_ended = THRESHOLD.sub(">= 0", rule.expr)
            found = run.world.api.query(open_ended, run.at)
            rows.append(Row(f"{rule.where}, whatever the threshold", "data", show(found), _missing(found)))
        if rule.where in FIRES:
            over = run.world.api.over(rule.expr, moments["before"], run.at)
            begun = [at for values in over.values() for at in values]
            got = f"from {min(begun) - moments['before']:.0f} s on" if begun else "never"
            late = () if begun and min(begun) <= moments[FIRES[rule.where]] + 25 else ("too late",)
            rows.append(Row(f"{rule.where}, as it is", f"by {FIRES[rule.where]!r}", got, late))
    _agree(run, rows)


def _missing(found: Mapping[Labels, float]) -> tuple[str, ...]:
    return () if found else ("no data",)


def test_a_service_that_is_not_there_is_noticed(run: Run) -> None:
    rule = next(rule for rule in of_rules("alert") if rule.where == "ServiceSilent")
    before = run.world.api.query(rule.expr, run.mix.ledger.moments["before"])
    run.rows.append(Row("ServiceSilent, before the service", "1", show(before), _missing(before)))
    assert list(before.values()) == [1.0]
    assert not run.world.api.query(rule.expr, run.at)


def test_counters_are_exactly_what_callers_saw(run: Run) -> None:
    """Instant values, without a rate: nothing is extrapolated, so nothing is approximate."""
    entries = run.mix.ledger.entries
    calls = list(run.mix.ledger.calls())
    duration = "http_server_request_duration_seconds_count"
    exact = {
        f'sum({duration}{{http_route!~"/health.*", service_name!=""}})': len(entries),
        f"sum({series_of(names.LLM_CALLS)[0]})": len(calls),
        f'sum({series_of(names.LLM_CALLS)[0]}{{outcome="success"}})': sum(
            call.outcome == "success" for call in calls
        ),
        f'sum({series_of(names.LLM_CALLS)[0]}{{outcome="cancelled"}})': sum(
            call.outcome == "cancelled" for call in calls
        ),
        f"sum({base(names.LLM_FIRST_CHUNK)}_count)": sum(call.first_piece_s is not None for call in calls),
        f"sum({series_of(names.RETRY_ATTEMPTS)[0]})": sum(
            call.attempts for call in calls if call.streamed or call.outcome != "cancelled"
        ),
        f"sum({series_of(names.BREAKER_REJECTIONS)[0]})": sum(
            call.error == "CircuitOpenError" for call in calls
        ),
        f'sum({series_of(names.AUTH_ATTEMPTS)[0]}{{method="password"}})': sum(
            entry.route == "/auth/login" for entry in entries
        ),
        # Behind the collector: what went in came out.
        "sum(otelcol_receiver_accepted_log_records_total)": len(run.world.loki.logs()),
        "sum(otelcol_exporter_sent_log_records_total)": len(run.world.loki.logs()),
        "sum(otelcol_exporter_sent_spans_total)": len(run.world.tempo.spans()),
    }
    fake = sum(call.attempts for call in calls if call.upstream == "fake")
    unseen = run.mix.ledger.facts["unseen"]
    assert run.mix.seen_upstream + unseen == fake, "the upstream saw other attempts than callers were told of"
    # Of processes that ended: their last value, which `last_over_time` keeps for as long as the run was.
    rows = []
    for expr, wanted in exact.items():
        text = re.sub(r"\((\w+(\{[^}]*\})?)\)", r"(last_over_time(\1[10m]))", expr)
        (got,) = run.world.api.query(text, run.at).values()
        rows.append(Row(expr, str(wanted), f"{got:g}", () if got == wanted else ("differs",)))
    _agree(run, rows)


def test_every_declared_metric_has_the_name_that_is_written_down(run: Run) -> None:
    known = run.world.api.names()
    missing = [
        series
        for metric in (*names.METRICS, *STANDARD)
        for series in series_of(metric)
        if series not in known
    ]
    # With the semantic look-up only, which needs a model for embeddings, and with a Valkey server only.
    switched_on = (names.CACHE_SIMILARITY, names.SHARED_OPERATION_DURATION, names.SHARED_FALLBACK)
    assert set(missing) == {series for metric in switched_on for series in series_of(metric)}
    # What counts losses only, exists with the first.
    lossy = re.compile(r"send_failed|enqueue_failed|logs_filtered")
    assert not [series for series in COLLECTOR if series not in known and not lossy.search(series)]


def test_memory_and_queues_are_bounded(run: Run) -> None:
    rss = run.world.api.over(
        'otelcol_process_memory_rss_bytes{job="collector"}', run.mix.ledger.moments["before"], run.at, 5
    )
    (values,) = rss.values()
    assert Within({labels(): (0.0, 5.12e8)}).differences({labels(): max(values.values())}) == []
