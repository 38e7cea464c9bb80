"""Each call becomes one trace in MLflow, whatever became of the call, and says nothing it should not."""

import json
import re
import secrets
import stat
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.e2e.recording import (
    kill,
    left_in,
    new_trace,
    until,
    variables,
)
from tests.e2e.support import generate, stopped
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.upstream import Answer, FakeUpstream, Silent, Status
from tests.harness import ServiceProcess

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

SPOOL_NAME = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9]+-[0-9a-f]{6}\.[0-9]{6}\.jsonl")


def leave_while_it_is_answered(process: ServiceProcess, token: str, upstream: FakeUpstream) -> str:
    """Ask, and go away once the upstream has the question; the call's trace id."""
    trace_id, header = new_trace()
    before = len(upstream.chat_requests)
    connection = HTTPConnection("127.0.0.1", process.port, timeout=10)
    fields = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **header}
    connection.request("POST", "/llm/generate", b'{"prompt": "x"}', fields)
    upstream.wait_for(lambda fake: len(fake.chat_requests) > before)
    connection.close()
    return trace_id


def test_every_call_is_one_trace_that_says_how_it_ended(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    given = {
        **variables(upstream.url, mlflow.url, tmp_path / "spool"),
        "RETRY_MAX": "1",
        "RETRY_BASE_DELAY_S": "0.01",
    }
    with ServiceProcess(given) as process:
        process.wait_ready()
        token, admin = process.token(), process.token("admin")
        answered = generate(process, token)
        other = generate(process, admin, body={"prompt": "x", "model": "other-model"})
        upstream.script(Status(500), Answer())
        retried = generate(process, token)
        upstream.script(Status(400))
        refused = generate(process, token)
        upstream.script(Status(500), Status(500))
        failed = generate(process, token)
        upstream.script(Silent())
        left = leave_while_it_is_answered(process, token, upstream)
        # Nobody called a model here, so there is nothing to record.
        assert process.call("POST", "/llm/generate", body={}, token=token).status == 422
        assert process.call("POST", "/llm/generate", body={"prompt": "x"}).status == 401
        mlflow.wait_for(lambda fake: left in fake.request_ids)
        stopped(process)

    asked = [answered, other, retried, refused, failed]
    assert [answer.status for answer in asked] == [200, 200, 200, 400, 502]
    assert sorted(kept.request_id for kept in mlflow.kept) == sorted(
        [*(answer.request_id for answer in asked), left]
    )
    assert mlflow.repeats == 0
    (run,) = mlflow.runs
    assert {(kept.run_id, kept.experiment_id) for kept in mlflow.kept} == {(run.run_id, run.experiment_id)}

    span = mlflow.span(answered.request_id)
    assert span.parent_id == ""
    assert span.status == "OK"
    assert 0 < (span.end_ns - span.start_ns) / 1e9 <= answered.seconds
    assert (
        span.attributes.items()
        >= {
            "gen_ai.request.model": "demo",
            "gen_ai.response.model": "demo",
            "gen_ai.usage.input_tokens": answered.json["prompt_tokens"],
            "gen_ai.usage.output_tokens": answered.json["completion_tokens"],
            "user.id": "user",
            "llmops.llm.outcome": "success",
            "mlflow.traceTag.request_id": answered.request_id,
        }.items()
    )
    assert span.attributes["mlflow.llm.cost"] == {"total_cost": answered.json["cost"]}
    assert span.resource["service.name"] == "llmops-api"
    assert mlflow.span(other.request_id).attributes["gen_ai.request.model"] == "other-model"
    assert mlflow.span(other.request_id).attributes["user.id"] == "admin"
    assert mlflow.span(retried.request_id).attributes["llmops.llm.attempts"] == 2
    for answer, error in ((refused, "BadRequestError"), (failed, "UpstreamError")):
        span = mlflow.span(answer.request_id)
        assert (span.status, span.attributes["error.type"]) == ("ERROR", error)
        assert span.attributes["llmops.llm.outcome"] == "error"
    span = mlflow.span(left)
    assert (span.status, span.attributes["llmops.llm.outcome"]) == ("ERROR", "cancelled")


def test_a_run_ends_as_its_process_did(upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path) -> None:
    given = variables(upstream.url, mlflow.url, tmp_path / "spool")
    with ServiceProcess(given) as killed:
        killed.wait_ready()
        generate(killed, killed.token())
        mlflow.wait_for(lambda fake: len(fake.kept) == 1 and bool(fake.runs[0].params))
        kill(killed)
    assert [run.status for run in mlflow.runs] == ["RUNNING"]

    upstream.script(Status(400))
    with ServiceProcess({**given, "LITELLM_API_KEY": "sk-of-the-upstream"}) as process:
        process.wait_ready()
        token = process.token()
        generate(process, token)
        answer = generate(process, token)
        mlflow.wait_for(lambda fake: bool(fake.runs) and fake.runs[0].status == "FAILED")
        stopped(process)

    first, second = mlflow.runs
    assert (first.status, second.status) == ("FAILED", "FINISHED")
    assert first.ended_ms is not None
    assert second.ended_ms is not None
    assert first.started_ms <= first.ended_ms <= second.ended_ms
    assert (
        second.metrics.items()
        >= {
            "calls": 2,
            "calls_success": 1,
            "calls_error": 1,
            "prompt_tokens": answer.json["prompt_tokens"],
            "completion_tokens": answer.json["completion_tokens"],
            "cost_usd": answer.json["cost"],
        }.items()
    )
    assert 0 < second.metrics["latency_p50_s"] <= second.metrics["latency_p99_s"]
    assert second.params["default_model"] == "demo"
    assert second.params["version"]
    hidden = {*process.passwords.values(), process.environment["JWT_SECRET_KEY"], "sk-of-the-upstream"}
    assert not [value for value in hidden if any(value.encode() in body for body in mlflow.raw)]
    assert left_in(tmp_path / "spool") == []


def test_no_content_goes_anywhere_by_default(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    canary = {name: f"canary-{name}-{secrets.token_hex(8)}" for name in ("prompt", "system", "answer")}
    upstream.default = Answer(content=canary["answer"])
    spool = tmp_path / "spool"
    with ServiceProcess(variables(upstream.url, mlflow.url, spool)) as process:
        process.wait_ready()
        token = process.token()
        body = {"prompt": canary["prompt"], "system_prompt": canary["system"]}
        sent = generate(process, token, body=body)
        mlflow.wait_for(lambda fake: sent.request_id in fake.request_ids)
        mlflow.down()
        waiting = generate(process, token, body=body)
        until(lambda: "MLflow does not take records" in process.text(), "the dead MLflow to be seen")
        on_disk = b"".join(path.read_bytes() for path in spool.iterdir())
        files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in spool.iterdir()}
        mlflow.up()
        mlflow.wait_for(lambda fake: waiting.request_id in fake.request_ids)
        stopped(process)
        written = process.text().encode()

    assert canary["answer"].encode() in sent.body
    assert waiting.request_id.encode() in on_disk
    places = [on_disk, *mlflow.raw, written]
    hidden = {**canary, "token": token, **process.passwords}
    assert not [name for name, value in hidden.items() if any(value.encode() in place for place in places)]
    assert set(files.values()) == {0o600}
    assert [name for name in files if SPOOL_NAME.fullmatch(name)]
    assert stat.S_IMODE(spool.stat().st_mode) == 0o700


def test_content_is_there_when_it_is_asked_for(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    upstream.default = Answer(content="A tree of spans.")
    capturing = {"OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY"}
    given = {**variables(upstream.url, mlflow.url, tmp_path / "spool"), **capturing}
    with ServiceProcess(given) as process:
        process.wait_ready()
        answer = generate(process, process.token(), body={"prompt": "What is a träce?"})
        stopped(process)

    span = mlflow.span(answer.request_id)
    (message,) = json.loads(span.attributes["mlflow.spanInputs"])
    assert message == {"role": "user", "content": "What is a träce?"}
    assert "A tree of spans." in span.attributes["mlflow.spanOutputs"]


@pytest.mark.parametrize("sampler", ["always_on", "always_off"])
def test_calls_that_share_a_traceparent_have_a_record_each(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path, sampler: str
) -> None:
    given = {**variables(upstream.url, mlflow.url, tmp_path / "spool"), "OTEL_TRACES_SAMPLER": sampler}
    with ServiceProcess(given) as process:
        process.wait_ready()
        users = ["admin", "user", "user"]
        tokens = [process.token(user) for user in users]
        own = generate(process, tokens[0])
        # The caller's, and one of an earlier answer of ours.
        headers = [new_trace()[1], {"traceparent": own.headers["traceresponse"]}]
        shared = [[generate(process, token, headers=header) for token in tokens] for header in headers]
        lines = stopped(process)

    assert len({kept.span.trace_id for kept in mlflow.kept}) == 7
    assert mlflow.kept[0].span.trace_id == own.request_id
    for answers in shared:
        (request_id,) = {answer.request_id for answer in answers}
        records = [kept.span for kept in mlflow.kept if kept.request_id == request_id]
        theirs = [record for record in records if record.trace_id != request_id]
        assert [record.attributes["user.id"] for record in theirs] == users
        tags = [record.attributes["mlflow.traceTag.incident_id"] for record in theirs]
        assert tags == [f"inc_{answer.headers['traceresponse'].split('-')[2]}" for answer in answers]
        assert {record.attributes["mlflow.traceTag.span_id"] for record in theirs} == {
            record.span_id for record in theirs
        }
    # The line that reports a call leads to its record.
    ended = [line["record_id"] for line in lines if line["message"] == "llm_request_completed"]
    assert ended == [kept.span.trace_id for kept in mlflow.kept]
