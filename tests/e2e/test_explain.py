"""What became of a request, from a real MLflow server and from the disk, by HTTP and by the command."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.recording import new_trace, until, variables
from tests.e2e.servers import MlflowServer
from tests.e2e.support import decoded, generate, run, stopped
from tests.e2e.test_mlflow import left_with_nothing
from tests.fakes.behaviours import Answer, Reset, Status, Stream
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess, coverage_variables
from tests.http.streaming import calling

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

UNKNOWN = "0af7651916cd43dd8448eb211c80319c"
ONLY_IN_MEMORY = {"method", "status", "known_from", "times", "error", "waits_in_spool", "summary", "time"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as mlflow:
        yield mlflow


def given_for(upstream: FakeUpstream, server: MlflowServer, spool: Path, name: str) -> dict[str, str]:
    return {
        **variables(upstream.url, server.url, spool),
        "MLFLOW_TIMEOUT_S": "5",
        "MLFLOW_EXPERIMENT_NAME": name,
        "MLFLOW_UI_URL": "https://mlflow.example.com",
        "CACHE_ENABLED": "true",
        "RETRY_MAX": "2",
        "RETRY_BASE_DELAY_S": "0.05",
        "BREAKER_FAILURE_THRESHOLD": "1",
        # What is captured for MLflow is not shown here.
        "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY",
    }


def the_one(process: ServiceProcess, identifier: str, token: str) -> Any:
    answer = process.call("GET", f"/requests/{identifier}", token=token)
    assert answer.status == 200, answer.body
    assert b"canary" not in answer.body
    (request,) = answer.json["requests"]
    return request


def make_requests(process: ServiceProcess, upstream: FakeUpstream, token: str) -> dict[str, str]:
    """The id of a request of each kind."""
    prompt = {"prompt": "canary prompt"}
    upstream.script(Status(503), Reset(), Answer(content="canary answer"))
    found = {"retried": generate(process, token, body=prompt).request_id}
    found["hit"] = generate(process, token, body=prompt).request_id
    upstream.script(Stream(interval_s=0.1, chunks=("canary ",) * 200))
    with calling(process, token) as caller:
        caller.event()
        found["left"] = caller.request_id
    _, header = new_trace()
    upstream.script(Status(400))
    found["continued"] = generate(process, token, body={"prompt": "c"}, headers=header).json["incident_id"]
    refused = process.call("POST", "/llm/generate", body={"prompt": 7}, token=token)
    found["422"] = refused.json["incident_id"]
    upstream.script(*[Status(500)] * 3)
    found["failed"] = generate(process, token, body={"prompt": "f"}).request_id
    found["refused"] = generate(process, token, body={"prompt": "r"}).request_id
    until(
        lambda: bool(process.call("GET", f"/requests/{found['left']}", token=token).status == 200), "the end"
    )
    return found


def test_what_one_process_remembers_another_finds_in_mlflow(
    upstream: FakeUpstream, server: MlflowServer, tmp_path: Path
) -> None:
    given = given_for(upstream, server, tmp_path / "spool", "explained")
    with ServiceProcess(given) as process:
        process.wait_ready()
        token = process.token()
        ids = make_requests(process, upstream, token)
        until(lambda: left_with_nothing(tmp_path / "spool"), "MLflow to have all", 60)
        remembered = {name: the_one(process, identifier, token) for name, identifier in ids.items()}
        stopped(process)
    assert {name: each["outcome"] for name, each in remembered.items()} == {
        **dict.fromkeys(("continued", "422", "failed", "refused"), "error"),
        "retried": "success",
        "hit": "cached",
        "left": "cancelled",
    }
    with ServiceProcess(given) as process:
        process.wait_ready()
        user, admin = process.token(), process.token("admin")
        for name, identifier in ids.items():
            if name == "422":
                # It made no call, and the process that remembers it has ended.
                assert process.call("GET", f"/requests/{identifier}", token=admin).status == 404
                continue
            told = the_one(process, identifier, user)
            assert told == the_one(process, told["record_id"], admin), name
            assert_is_the_same(told, remembered[name])
        theirs = generate(process, admin, body={"prompt": "x"})
        until(lambda: left_with_nothing(tmp_path / "spool"), "MLflow to have it", 60)
        stopped(process)
    with ServiceProcess(given) as process:
        process.wait_ready()
        user = process.token()
        answers = [
            process.call("GET", f"/requests/{identifier}", token=user)
            for identifier in (UNKNOWN, theirs.request_id, f"tr-{theirs.request_id}")
        ]
        assert [answer.status for answer in answers] == [404, 404, 404]
        assert len({answer.json["message"] for answer in answers}) == 1
        stopped(process)


def assert_is_the_same(told: Any, remembered: Any) -> None:
    """What MLflow has of a request is what the process had that answered it."""
    assert told["known_from"] == "mlflow"
    alike = told.keys() - ONLY_IN_MEMORY - {"attempts", "cache"}
    assert {name: told[name] for name in alike} == {name: remembered[name] for name in alike}
    assert "https://mlflow.example.com/#/experiments/" in told["links"]["record"]
    assert told["cache"] == pytest.approx(remembered["cache"])
    for one, other in zip(told["attempts"], remembered["attempts"], strict=True):
        assert one == pytest.approx(other, abs=2e-6)
    if remembered["error"] is not None:
        same = ("name", "status", "fault", "meaning", "upstream_status", "upstream_code")
        assert [told["error"][name] for name in same] == [remembered["error"][name] for name in same]


def explain(folder: Path, given: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, {**coverage_variables(), **given}, "-m", "service", "explain", *arguments)


def test_the_command_needs_no_service_and_no_mlflow(
    upstream: FakeUpstream, server: MlflowServer, tmp_path: Path
) -> None:
    given = given_for(upstream, server, tmp_path / "spool", "commanded")
    with ServiceProcess(given) as process:
        process.wait_ready()
        sent = generate(process, process.token()).request_id
        until(lambda: left_with_nothing(tmp_path / "spool"), "MLflow to have it", 60)
        server.kill()
        upstream.script(Status(503), Answer())
        token = process.token()
        waiting = generate(process, token, body={"prompt": "canary"}).request_id
        request = the_one(process, waiting, token)
        assert (request["known_from"], request["waits_in_spool"]) == ("memory", True)
        refused = process.call("POST", "/llm/generate", body={}, token=token)
        where = {"LLMOPS_URL": f"http://127.0.0.1:{process.port}", "LLMOPS_TOKEN": token}
        mine = {**where, "PYTHONPATH": process.environment["PYTHONPATH"]}
        assert_the_running_service_is_asked(tmp_path, mine, refused.request_id)

        env = {**process.environment, "CACHE_ENABLED": "true"}
        found = explain(tmp_path, env, waiting)
        assert found.returncode == 0, found.stderr
        assert "The model answered after 1 retry" in found.stdout
        assert "waits on disk: MLflow does not have it yet" in found.stdout
        assert "canary" not in found.stdout
        missing = explain(tmp_path, env, sent)
        assert missing.returncode == 1
        assert "mlflow (failed: Connection error)" in decoded(missing.stderr)[-1]["message"]
        server.start()
        server.wait_ready()
        again = explain(tmp_path, env, f"tr-{sent}", "--json")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["requests"][0]["known_from"] == "mlflow"
        stopped(process)


def assert_the_running_service_is_asked(folder: Path, given: dict[str, str], refused: str) -> None:
    """It remembers a request that made no call, and the command needs none of its settings."""
    found = explain(folder, given, refused)
    assert (found.returncode, found.stderr) == (0, "")
    assert "422 ValidationError, the fault of the caller" in found.stdout
    page = explain(folder, given, refused, "--html")
    assert page.returncode == 0
    assert page.stdout.startswith("<!doctype html>")
    unknown = explain(folder, given, UNKNOWN)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    for arguments in (("xyz",), (refused, "--token", "wrong"), (refused, "--url", "ftp://x"), ()):
        wrong = explain(folder, given, *arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert decoded(wrong.stderr)[-1]["level"] == "ERROR"
