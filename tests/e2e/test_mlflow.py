"""The service beside a real MLflow server: what its page shows, and that nothing is lost between the two."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.recording import Load, ids_in_spool, kill, left_in, new_trace, show, until, variables
from tests.e2e.servers import MlflowServer
from tests.e2e.support import generate, stopped
from tests.fakes.upstream import FakeUpstream, Status
from tests.harness import ServiceProcess

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as mlflow:
        yield mlflow


def given_for(upstream: FakeUpstream, server: MlflowServer, spool: Path, name: str) -> dict[str, str]:
    return {
        **variables(upstream.url, server.url, spool),
        "MLFLOW_TIMEOUT_S": "5",
        "MLFLOW_EXPERIMENT_NAME": name,
        "HEALTH_TIMEOUT_S": "3",
        "HEALTH_REQUIRED": "mlflow,qdrant,litellm",
    }


def ids_of(traces: list[Any]) -> list[str]:
    return [trace["trace_id"].removeprefix("tr-") for trace in traces]


def assert_has_each_once(server: MlflowServer, name: str, load: Load) -> None:
    traces = server.traces(name)
    assert len(set(ids_of(traces))) == len(traces)
    ids = [trace["tags"]["request_id"] for trace in traces]
    assert len(ids) == len(set(ids))
    assert load.answered <= set(ids) <= load.answered | load.unanswered


def test_the_page_shows_a_run_with_totals_and_a_trace_for_each_call(
    upstream: FakeUpstream, server: MlflowServer, tmp_path: Path
) -> None:
    given = {**given_for(upstream, server, tmp_path / "spool", "page"), "LITELLM_API_KEY": "sk-upstream"}
    with ServiceProcess(given) as process:
        process.wait_ready()
        answer = generate(process, process.token("admin"))
        upstream.script(Status(400))
        refused = generate(process, process.token())
        until(lambda: left_with_nothing(tmp_path / "spool"), "MLflow to have both", 60)
        stopped(process)
    assert left_in(tmp_path / "spool") == []

    (run,) = server.runs("page")
    assert run["info"]["status"] == "FINISHED"
    params = {entry["key"]: entry["value"] for entry in run["data"]["params"]}
    assert params.items() >= {"default_model": "demo", "mlflow_experiment_name": "page"}.items()
    hidden = {*process.passwords.values(), process.environment["JWT_SECRET_KEY"], "sk-upstream"}
    assert not [value for value in hidden if value in json.dumps(server.runs("page"))]
    totals = {entry["key"]: entry["value"] for entry in run["data"]["metrics"]}
    assert (totals["calls"], totals["calls_success"], totals["calls_error"]) == (2, 1, 1)
    assert totals["cost_usd"] == answer.json["cost"]
    assert totals["prompt_tokens"] == answer.json["prompt_tokens"]

    found = server.api("GET", f"3.0/mlflow/traces/tr-{answer.request_id}")["trace"]["trace_info"]
    assert found["state"] == "OK"
    about = found["trace_metadata"]
    assert json.loads(about["mlflow.trace.tokenUsage"])["total_tokens"] == answer.json["total_tokens"]
    assert json.loads(about["mlflow.trace.cost"])["total_cost"] == answer.json["cost"]
    assert about["mlflow.trace.user"] == "admin"
    assert ids_of(server.traces("page", f"tags.request_id = '{answer.request_id}'")) == [answer.request_id]
    (error,) = server.traces("page", "tags.outcome = 'error'")
    assert ids_of([error]) == [refused.request_id]
    assert error["state"] == "ERROR"
    linked = ids_of(server.traces("page", f"attributes.run_id = '{run['info']['run_id']}'"))
    assert set(linked) == {answer.request_id, refused.request_id}


def test_calls_with_one_traceparent_have_a_record_each(
    upstream: FakeUpstream, server: MlflowServer, tmp_path: Path
) -> None:
    trace_id, header = new_trace()
    with ServiceProcess(given_for(upstream, server, tmp_path / "spool", "shared")) as process:
        process.wait_ready()
        generate(process, process.token("admin"), headers=header)
        until(lambda: left_with_nothing(tmp_path / "spool"), "MLflow to have the first", 60)
        (first,) = server.traces("shared")
        upstream.script(Status(400))
        refused = generate(process, process.token(), headers=header, body={"prompt": "another"})
        until(lambda: left_with_nothing(tmp_path / "spool"), "MLflow to have the second", 60)
        stopped(process)

    traces = server.traces("shared", f"tags.request_id = '{trace_id}'")
    assert len(traces) == 2
    assert trace_id not in ids_of(traces)
    # The administrator's record is as it was, and the other user's is found by what its caller was told.
    assert first in traces
    assert first["trace_metadata"]["mlflow.trace.user"] == "admin"
    assert first["state"] == "OK"
    assert {trace["tags"]["record_id"] for trace in traces} == set(ids_of(traces))
    (other,) = server.traces("shared", f"tags.incident_id = '{refused.json['incident_id']}'")
    assert other["trace_metadata"]["mlflow.trace.user"] == "user"
    assert server.traces("shared", f"tags.span_id = '{other['tags']['span_id']}'") == [other]


def left_with_nothing(spool: Path) -> bool:
    return not list(spool.glob("*.jsonl"))


def test_killed_under_load_and_started_again_mlflow_counts_as_many_as_were_answered(
    upstream: FakeUpstream, server: MlflowServer, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    given = given_for(upstream, server, spool, "killed")
    with ServiceProcess(given) as process:
        process.wait_ready()
        load = Load(process)
        with load.running():
            load.wait_for(150)
            kill(process)
    on_disk = ids_in_spool(spool)
    assert on_disk
    with ServiceProcess(given) as process:
        process.wait_ready()
        until(lambda: "FAILED" in server.statuses("killed"), "the dead one's run to end", 60)
        assert_has_each_once(server, "killed", load)
        stopped(process)
    there = len(server.traces("killed"))
    show({"answered": len(load.answered), "in MLflow": there, "of these from disk": len(on_disk)})
    assert left_in(spool) == []


def test_mlflow_killed_and_started_again_in_the_middle_of_load(
    upstream: FakeUpstream, server: MlflowServer, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    with ServiceProcess(given_for(upstream, server, spool, "restarted")) as process:
        process.wait_ready()
        until(lambda: process.call("GET", "/health/detailed").status == 200, "readiness")
        load = Load(process, threads=2)
        with load.running():
            load.wait_for(150)
            server.kill()
            until(lambda: process.call("GET", "/health/detailed").status == 503, "MLflow's end to be seen")
            body = process.call("GET", "/health/detailed").json
            assert body["checks"] == {"mlflow": False, "qdrant": True, "litellm": True}
            assert process.call("GET", "/health").status == 200
            load.wait_for(150)
            server.start()
        server.wait_ready()
        until(lambda: process.call("GET", "/health/detailed").status == 200, "readiness")
        until(lambda: left_with_nothing(spool), "an empty spool", 60)
        lines = stopped(process)
    assert load.statuses == {200}
    assert not load.unanswered
    assert_has_each_once(server, "restarted", load)
    assert server.statuses("restarted") == ["FINISHED"]
    assert not [line for line in lines if line["level"] == "ERROR"]
