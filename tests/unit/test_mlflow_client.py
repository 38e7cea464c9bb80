"""The client of MLflow on the wire: its requests, and the error for each answer."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deploy.ports import unused_port
from service.errors import UpstreamError
from service.recording.mlflow import (
    MAX_PARAM_CHARS,
    GoneError,
    RefusedError,
    Run,
    Tracker,
    TrackerError,
    in_thread,
)
from tests.fakes.mlflow import FakeMlflow
from tests.harness import make_settings
from tests.unit.recording import make_record

RUN = Run("run-1", "1")
JSON = "application/json"


class Scripted:
    """A server with one answer for everything; for those that no MLflow gives."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 200, {"Content-Type": JSON}, b"{}"
        self.paths: list[str] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                scripted.paths.append(f"{self.command} {self.path}")
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                self.send_response(scripted.status)
                for name, value in {**scripted.headers, "Content-Length": str(len(scripted.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(scripted.body)

            do_GET = do_POST = answer  # noqa: N815 - the base class looks for these names

            def log_message(self, *_args: object) -> None:
                """Keep the test's output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answers(self, status: int, body: Any, content_type: str = JSON) -> None:
        """Answer so from now on."""
        self.status, self.headers = status, {"Content-Type": content_type}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    found = Scripted()
    yield found
    found.close()


@pytest.fixture
def mlflow() -> Iterator[FakeMlflow]:
    with FakeMlflow() as fake:
        yield fake


def tracker(url: str, **settings: Any) -> Tracker:
    settings = {"mlflow_tracking_uri": url, "mlflow_timeout_s": 1, **settings}
    return Tracker(make_settings(**settings), {"service.name": "llmops-api"})


def reason(work: Callable[[], object], kind: type[TrackerError] = TrackerError) -> str:
    with pytest.raises(TrackerError) as raised:
        work()
    assert type(raised.value) is kind
    return raised.value.reason


def test_a_run_with_parameters_metrics_and_traces(mlflow: FakeMlflow) -> None:
    it = tracker(mlflow.url, mlflow_experiment_name="calls")
    run = it.start_run("name", 5)
    it.log_params(run, {"version": "1", "long": "x" * 1_000})
    it.log_totals(run, {"calls": 3.0}, 7)
    it.send([make_record(1), make_record(2)], run)
    it.end_run(run, "FINISHED", 9)
    (kept,) = mlflow.runs
    assert (kept.name, kept.started_ms, kept.status, kept.ended_ms) == ("name", 5, "FINISHED", 9)
    assert kept.params == {"version": "1", "long": "x" * MAX_PARAM_CHARS}
    assert kept.metrics == {"calls": 3.0}
    assert [(each.span.trace_id, each.run_id, each.experiment_id) for each in mlflow.kept] == [
        (make_record(number).trace_id, run.run_id, run.experiment_id) for number in (1, 2)
    ]


def test_a_run_of_a_name_is_created_once(mlflow: FakeMlflow) -> None:
    it = tracker(mlflow.url)
    assert it.start_run("name", 5) == it.start_run("name", 5) == tracker(mlflow.url).start_run("name", 6)
    assert it.start_run("other", 5) != it.start_run("name", 5)
    assert len({run.experiment_id for run in mlflow.runs}) == 1


def test_an_unknown_run_is_gone(mlflow: FakeMlflow) -> None:
    it = tracker(mlflow.url)
    it.start_run("name", 5)
    gone = Run("f" * 32, "1")
    assert reason(lambda: it.log_totals(gone, {"calls": 1.0}, 5), GoneError) == "RESOURCE_DOES_NOT_EXIST"
    reason(lambda: it.end_run(gone, "FAILED", 5), GoneError)


def test_a_deleted_run_is_gone_and_one_that_refuses_a_change_is_not(
    mlflow: FakeMlflow, scripted: Scripted
) -> None:
    it = tracker(mlflow.url)
    run = it.start_run("name", 5)
    mlflow.delete_run(run.run_id)
    # The real server answers with the code of a malformed request.
    assert reason(lambda: it.log_totals(run, {"calls": 1.0}, 5), GoneError) == "INVALID_PARAMETER_VALUE"
    assert reason(lambda: it.end_run(run, "FINISHED", 5), GoneError) == "INVALID_PARAMETER_VALUE"
    assert it.start_run("name", 5) != run
    scripted.answers(400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "deleted"})
    with pytest.raises(TrackerError, match="INVALID_PARAMETER_VALUE") as raised:
        tracker(scripted.url).end_run(RUN, "FINISHED", 5)
    assert not isinstance(raised.value, GoneError)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RefusedError),
        (413, RefusedError),
        (422, RefusedError),
        (404, GoneError),
        (401, TrackerError),
        (403, TrackerError),
        (429, TrackerError),
        (500, TrackerError),
        (503, TrackerError),
    ],
)
def test_the_error_for_each_status_of_an_export(
    scripted: Scripted, status: int, kind: type[TrackerError]
) -> None:
    scripted.answers(status, b"")
    assert reason(lambda: tracker(scripted.url).send([make_record()], RUN), kind) == f"HTTP {status}"
    # Sent once: the recorder retries by itself.
    assert scripted.paths == ["POST /v1/traces"]


def test_a_page_of_another_server_is_an_error(scripted: Scripted) -> None:
    scripted.answers(200, b"<html>Sign in</html>", "text/html")
    it = tracker(scripted.url)
    assert reason(lambda: it.send([make_record()], RUN)) == "not MLflow's answer"
    assert reason(it.check) == "not MLflow's answer"
    assert reason(lambda: it.start_run("name", 5))


def test_a_redirect_is_not_followed(scripted: Scripted) -> None:
    scripted.answers(302, b"")
    scripted.headers["Location"] = "/login"
    it = tracker(scripted.url)
    assert reason(lambda: it.send([make_record()], RUN)) == "HTTP 302"
    assert reason(it.check) == "HTTP 302"
    assert [path for path in scripted.paths if "login" in path] == []


@pytest.mark.parametrize("body", [{}, [], {"experiment": []}, {"experiment": {"experiment_id": {}}}, 5])
def test_an_answer_of_another_shape_is_a_tracker_error(scripted: Scripted, body: Any) -> None:
    scripted.answers(200, body)
    assert reason(lambda: tracker(scripted.url).start_run("name", 5))


def test_a_server_that_is_down_or_hangs_says_which(mlflow: FakeMlflow) -> None:
    nobody = tracker(f"http://127.0.0.1:{unused_port()}")
    assert reason(nobody.check) == "Connection error"
    assert reason(lambda: nobody.send([make_record()], RUN)) == "Connection error"
    mlflow.hang = True
    assert reason(tracker(mlflow.url).check) == "Timeout"


def test_errors_have_no_text_of_the_server_or_the_sdk(scripted: Scripted) -> None:
    scripted.answers(500, {"error_code": "INTERNAL_ERROR", "message": "canary"})
    with pytest.raises(TrackerError) as raised:
        tracker(scripted.url).end_run(RUN, "FINISHED", 5)
    assert "canary" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_a_ping_calls_the_api_and_raises_an_upstream_error(mlflow: FakeMlflow) -> None:
    it = tracker(mlflow.url)
    asyncio.run(it.ping())
    assert mlflow.requests == ["GET /api/2.0/mlflow/experiments/search"]
    mlflow.answer_status = 503
    with pytest.raises(UpstreamError) as raised:
        asyncio.run(it.ping())
    assert raised.value.label == "HTTP 503"


def test_a_thread_is_awaited_and_abandoned_on_cancellation() -> None:
    let_go, ended = threading.Event(), threading.Event()

    def fail() -> None:
        raise ValueError("a bug")

    def hang() -> None:
        let_go.wait(10)
        ended.set()

    async def scenario() -> None:
        await in_thread(lambda: None, "test")
        with pytest.raises(ValueError, match="a bug"):
            await in_thread(fail, "test")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await in_thread(hang, "left behind")

    asyncio.run(scenario())
    # The thread ends after the loop is closed, and that raises nothing.
    let_go.set()
    assert ended.wait(10)
    for thread in threading.enumerate():
        if thread.name == "left behind":
            thread.join(10)
