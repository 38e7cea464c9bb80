"""A call's record as a real MLflow server shows it: the call, its look-up, its attempts, its first chunk."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.recording import end_of, kill, start_replay, until
from tests.e2e.servers import MlflowServer, StoredSpan
from tests.e2e.support import generate, stopped
from tests.e2e.test_mlflow import given_for, ids_of, left_with_nothing
from tests.fakes.streams import EndlessStream
from tests.fakes.upstream import Answer as Reply
from tests.fakes.upstream import FakeUpstream, Reset, Status, refusing_port
from tests.harness import Answer, ServiceProcess
from tests.http.streaming import calling

pytestmark = pytest.mark.e2e

EXPERIMENT = "trees"
CHANGED = {
    "RETRY_MAX": "2",
    "RETRY_BASE_DELAY_S": "0.05",
    "BREAKER_FAILURE_THRESHOLD": "1",
    "CACHE_ENABLED": "true",
}
ASKED = {
    "mlflow.spanType": "CHAT_MODEL",
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "litellm",
    "gen_ai.request.model": "demo",
}
"""What each attempt says."""

USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 50,
    "total_tokens": 150,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"reasoning_tokens": 32},
}


@dataclass(frozen=True)
class Calls:
    """One call of each kind, and the server that has their records."""

    server: MlflowServer
    retried: Answer
    hit: Answer
    refused: Answer
    failed: Answer
    rejected: Answer
    left: str
    """The request id of a stream that its caller left."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as mlflow:
        yield mlflow


@pytest.fixture(scope="module")
def calls(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Calls:
    spool = tmp_path_factory.mktemp("calls") / "spool"
    with (
        FakeUpstream() as upstream,
        ServiceProcess({**given_for(upstream, server, spool, EXPERIMENT), **CHANGED}) as process,
    ):
        process.wait_ready()
        token = process.token()
        upstream.script(Status(503), Reset(), Reply(extra={"usage": USAGE}))
        retried, hit = generate(process, token), generate(process, token)
        upstream.script(Status(422))
        refused = generate(process, token, body={"prompt": "too much"})
        upstream.script(EndlessStream(0.02))
        with calling(process, token) as caller:
            assert caller.event()
        upstream.script(*[Status(503)] * 3)
        other = {"prompt": "x", "model": "other-model"}
        failed, rejected = generate(process, token, body=other), generate(process, token, body=other)
        until(lambda: left_with_nothing(spool), "MLflow to have them", 60)
        stopped(process)
    return Calls(server, retried, hit, refused, failed, rejected, caller.request_id)


def said_by(attempt: StoredSpan) -> dict[str, Any]:
    """What became of an attempt."""
    assert attempt.attributes.items() >= ASKED.items()
    shown = {**attempt.attributes}
    shown.pop("llmops.retry.delay", None)
    # MLflow adds attributes of its own.
    return {
        name: value for name, value in shown.items() if name not in ASKED and not name.startswith("mlflow.")
    }


def test_an_answer_after_two_retries(calls: Calls) -> None:
    assert calls.retried.status == 200
    root, lookup, *attempts = calls.server.tree(calls.retried.request_id)
    assert (root.name, root.parent, root.status) == ("chat demo", "", "STATUS_CODE_OK")
    assert root.attributes["mlflow.spanType"] == "CHAIN"
    assert {span.parent for span in (lookup, *attempts)} == {root.span_id}
    assert (lookup.name, lookup.attributes["llmops.cache.result"]) == ("cache lookup", "miss")
    assert [(span.name, span.status, said_by(span)) for span in attempts] == [
        (
            "attempt 1",
            "STATUS_CODE_ERROR",
            {"error.type": "UpstreamError", "llmops.upstream.status_code": 503},
        ),
        (
            "attempt 2",
            "STATUS_CODE_ERROR",
            {"error.type": "UpstreamError", "llmops.upstream.cause": "reset"},
        ),
        ("attempt 3", "STATUS_CODE_OK", {}),
    ]
    waits_s = [float(span.attributes.get("llmops.retry.delay", 0)) for span in attempts]
    assert waits_s[2] == 0
    for wait_s, before, after in zip(waits_s, attempts, attempts[1:], strict=False):
        # Timers of the event loop may fire a little early.
        assert after.start_ns - before.end_ns >= 0.9e9 * wait_s > 0
    assert root.start_ns <= lookup.start_ns
    assert attempts[-1].end_ns <= root.end_ns


def test_a_cache_hit_asks_no_model(calls: Calls) -> None:
    root, lookup = calls.server.tree(calls.hit.request_id)
    assert (root.status, root.attributes["llmops.llm.outcome"]) == ("STATUS_CODE_OK", "cached")
    found = {"llmops.cache.result": "hit", "llmops.cache.kind": "exact"}
    assert lookup.attributes.items() >= found.items()


def test_a_request_that_the_upstream_refuses(calls: Calls) -> None:
    assert (calls.refused.status, calls.refused.json["error"]) == (400, "BadRequestError")
    root, _lookup, attempt = calls.server.tree(calls.refused.request_id)
    assert (root.status, root.attributes["error.type"]) == ("STATUS_CODE_ERROR", "BadRequestError")
    assert root.attributes["http.route"] == "/llm/generate"
    assert attempt.status == "STATUS_CODE_ERROR"
    assert said_by(attempt) == {"error.type": "BadRequestError", "llmops.upstream.status_code": 422}


def test_a_stream_that_its_caller_left(calls: Calls) -> None:
    # A request that does not fix its temperature is not looked up.
    root, attempt, first_chunk = calls.server.tree(calls.left)
    assert (root.status, root.attributes["llmops.llm.outcome"]) == ("STATUS_CODE_ERROR", "cancelled")
    assert (attempt.status, said_by(attempt)) == ("STATUS_CODE_ERROR", {"error.type": "cancelled"})
    assert (first_chunk.name, first_chunk.parent) == ("first chunk", attempt.span_id)
    assert attempt.start_ns == first_chunk.start_ns < first_chunk.end_ns <= attempt.end_ns <= root.end_ns


def test_a_call_that_the_breaker_refuses(calls: Calls) -> None:
    assert calls.failed.json["error"] == "UpstreamError"
    assert [span.name for span in calls.server.tree(calls.failed.request_id)] == [
        "chat other-model",
        "cache lookup",
        *(f"attempt {number}" for number in (1, 2, 3)),
    ]
    root, _lookup = calls.server.tree(calls.rejected.request_id)
    assert (root.status, root.attributes["error.type"]) == ("STATUS_CODE_ERROR", "CircuitOpenError")


def test_records_are_found_by_what_people_know(calls: Calls) -> None:
    retried, hit, refused = (one.request_id for one in (calls.retried, calls.hit, calls.refused))
    failed, rejected = calls.failed.request_id, calls.rejected.request_id
    for query, expected in {
        "tags.user = 'user'": {retried, hit, refused, failed, rejected, calls.left},
        "tags.outcome = 'cached'": {hit},
        "tags.outcome = 'cancelled'": {calls.left},
        "tags.cached_tokens = '64'": {retried},
        "tags.reasoning_tokens = '32'": {retried},
        "tags.cost = '0.00042'": {retried},
        "tags.error IS NOT NULL": {refused, failed, rejected},
        "tags.error = 'CircuitOpenError'": {rejected},
        "tags.model = 'other-model'": {failed, rejected},
        f"tags.request_id = '{refused}'": {refused},
        f"tags.incident_id = '{calls.refused.json['incident_id']}'": {refused},
        "span.name = 'attempt 3' AND tags.outcome = 'success'": {retried},
    }.items():
        assert set(ids_of(calls.server.traces(EXPERIMENT, query))) == expected, query


def test_tokens_and_cost_are_those_of_the_call_and_not_of_its_attempts(calls: Calls) -> None:
    (paid,) = calls.server.traces(EXPERIMENT, "tags.cached_tokens = '64'")
    assert json.loads(paid["trace_metadata"]["mlflow.trace.tokenUsage"]) == {
        "input_tokens": 100,
        "output_tokens": 50,
        "total_tokens": 150,
        "cache_read_input_tokens": 64,
    }
    assert json.loads(paid["trace_metadata"]["mlflow.trace.cost"])["total_cost"] == 0.00042


@contextmanager
def killed_after_two_calls(given: dict[str, str], upstream: FakeUpstream) -> Iterator[tuple[Any, list[str]]]:
    """A process that was killed with the records of a call with retries, and of a hit, in its spool."""
    with ServiceProcess(given) as process:
        process.wait_ready()
        token = process.token()
        upstream.script(Status(503), Reset(), Reply())
        ids = [generate(process, token).request_id for _ in range(2)]
        kill(process)
        yield process, ids


def test_a_tree_that_is_sent_twice_after_a_kill_is_there_once_and_the_same(
    upstream: FakeUpstream, server: MlflowServer, tmp_path: Path
) -> None:
    spool, kept = tmp_path / "spool", tmp_path / "kept"
    given = {**given_for(upstream, server, spool, "again"), **CHANGED}
    with refusing_port() as nobody:
        unreachable = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{nobody}"}
        with killed_after_two_calls({**given, **unreachable}, upstream) as (process, ids):
            process.environment.update(given)
            shutil.copytree(spool, kept)
            trees = []
            for _time in range(2):
                shutil.copytree(kept, spool, dirs_exist_ok=True)
                status, lines = end_of(start_replay(process))
                assert status == 0, lines
                trees.append([server.tree(identifier) for identifier in ids])
    assert trees[0] == trees[1]
    assert [len(tree) for tree in trees[0]] == [5, 2]
    traces = server.traces("again")
    assert sorted(ids_of(traces)) == sorted(ids)
    costs = [json.loads(trace["trace_metadata"]["mlflow.trace.cost"])["total_cost"] for trace in traces]
    assert sorted(costs) == [0.0, 0.00042]
