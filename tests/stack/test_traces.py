"""One id from a metric to the trace, to the log lines, to MLflow's record; and which traces are kept."""

import json
from collections import defaultdict

import pytest

from deploy import api as demo_api
from grafana.series import base
from grafana.standard import SERVER_DURATION
from tests.fakes.otlp import Span
from tests.stack.conftest import Run
from tests.stack.proof import Row
from tests.stack.sampling import in_share, justified, must_keep

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


def _kept(run: Run) -> dict[str, list[Span]]:
    traces: dict[str, list[Span]] = defaultdict(list)
    for span in run.world.tempo.spans():
        traces[span.trace_id].append(span)
    return traces


def _exemplar_ids(run: Run) -> set[str]:
    start = run.mix.ledger.moments["before"]
    found = run.world.api.exemplars(f'{base(SERVER_DURATION)}_bucket{{service_name!=""}}', start, run.at)
    return {exemplar["labels"]["trace_id"] for exemplar in found}


def test_an_exemplar_leads_to_the_trace_its_logs_and_its_record(run: Run) -> None:
    trace_id = run.mix.real_call
    assert trace_id in _exemplar_ids(run)

    spans = _kept(run)[trace_id]
    ours = {span.name for span in spans if span.resource["service.name"] == "llmops-api"}
    assert {"POST /llm/generate", "llm call", "chat demo", "POST"} <= ours

    records = run.world.loki.logs(trace_id)
    written = run.mix.lines[trace_id]
    assert sorted(str(line["message"]) for line in written) == sorted(record.body for record in records)

    # The trace is the caller's, and may hold several calls: the log line names the record of this one.
    (record_id,) = [line["record_id"] for line in written if "record_id" in line]
    experiment = demo_api.experiment_of(run.world.mlflow.port, str(record_id))
    assert experiment is not None
    run.rows.append(
        Row(
            f"{trace_id}: exemplar, trace, log lines, MLflow",
            "each has it",
            f"1 exemplar, {len(spans)} spans, {len(records)} records, experiment {experiment}",
        )
    )


def test_litellms_spans_are_children_in_the_same_trace(run: Run) -> None:
    spans = _kept(run)[run.mix.real_call]
    theirs = [span for span in spans if span.resource["service.name"] == "litellm"]
    assert theirs, {span.resource["service.name"] for span in spans}
    # Ours is the request to LiteLLM: an HTTP client span whose id went there as traceparent.
    (request,) = [span for span in spans if span.kind == "CLIENT" and span.name == "POST"]
    ids = {span.span_id for span in theirs}
    assert {span.parent_id for span in theirs} <= ids | {request.span_id}
    assert any(span.parent_id == request.span_id for span in theirs)
    run.rows.append(
        Row("LiteLLM's spans in our trace", "some", f"{len(theirs)}: {sorted(s.name for s in theirs)}")
    )


def test_tail_sampling_keeps_exactly_what_it_must(run: Run) -> None:
    kept = _kept(run)
    requests = {entry.trace_id: entry for entry in run.mix.ledger.entries}
    must = {trace_id for trace_id, entry in requests.items() if must_keep(entry)} | run.mix.ledger.touched
    wanted = must | {trace_id for trace_id in requests if in_share(trace_id)}
    assert must - kept.keys() == set()
    assert {trace_id for trace_id in requests if trace_id in kept} == wanted
    # The rest is background work: each trace that was kept has its reason.
    assert [trace_id for trace_id, spans in kept.items() if not justified(spans)] == []
    run.rows.append(
        Row(
            "traces of requests kept: must, and the share of the rest",
            f"{len(must)} and {len(wanted - must)} of {len(requests)}",
            f"{len(must & kept.keys())} and {len(kept.keys() & wanted - must)}",
        )
    )


def test_exemplars_are_traces_of_requests_and_those_kept_can_be_opened(run: Run) -> None:
    requests = {entry.trace_id: entry for entry in run.mix.ledger.entries}
    exemplars = _exemplar_ids(run)
    kept = _kept(run)
    openable = {one for one in exemplars if one in requests and (must_keep(requests[one]) or in_share(one))}
    assert openable
    assert openable <= kept.keys()
    run.rows.append(
        Row(
            "exemplars: those of failed, slow, retried and shared requests can be opened",
            f"{len(openable)} of {len(exemplars)}",
            f"{len(exemplars & kept.keys())}",
        )
    )


def test_log_records_agree_with_stdout(run: Run) -> None:
    requests = {entry.trace_id for entry in run.mix.ledger.entries}
    different = []
    number = 0
    for trace_id in requests:
        records = run.world.loki.logs(trace_id)
        written = run.mix.lines.get(trace_id, [])
        number += len(written)
        left = sorted((str(line["message"]), str(line["level"]), str(line["span_id"])) for line in written)
        right = sorted((str(record.body), _level(record.severity), record.span_id) for record in records)
        if left != right:
            different.append((trace_id, left, right))
    assert not different[:3]
    assert number > len(requests)
    run.rows.append(
        Row("log lines of requests, on stdout and in the collector's output", str(number), str(number))
    )


def _level(severity: str) -> str:
    return {"WARN": "WARNING", "FATAL": "CRITICAL"}.get(severity, severity)


def test_no_canary_and_no_secret_has_left(run: Run) -> None:
    hidden = [*run.mix.canaries.all(), *run.mix.secrets, "of litellm?", "of fake?"]
    out = run.world.left()
    found = [word for word in hidden if any(word.encode() in payload for payload in out)]
    assert not found
    series = json.dumps(run.world.api.get("series", **{"match[]": '{__name__=~".+"}'}))
    assert not [word for word in hidden if word in series]
    log = (run.world.folder / "collector/collector.log").read_text(encoding="utf-8")
    assert not [word for word in hidden if word in log]
    run.rows.append(Row("canaries and secrets outside", "0", "0"))
