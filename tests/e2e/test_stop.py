"""The stop: who is inside is served to the end, nobody is lost, and it takes no longer than it may."""

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection
from typing import Any

import pytest

from service.services.drain import SAME_SIGNAL_S
from tests.e2e.support import to_collector
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Answer, FakeUpstream, Silent
from tests.harness import Answer as Reply
from tests.harness import ServiceProcess
from tests.http.support import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

SHUTDOWN_TIMEOUT_S = 30
"""The time limit of a stop by default, which nothing here may use up."""

LINES = (
    "Received shutdown signal",
    "Waiting for",
    "Request completed",
    "Closing Qdrant connections...",
    "Finalizing MLflow run...",
    "Graceful shutdown completed in",
)


def ask(process: ServiceProcess, token: str) -> Reply:
    return process.call("POST", "/llm/generate", body={"prompt": "x"}, token=token)


def stop_lines(process: ServiceProcess) -> list[str]:
    ours = [line["message"] for line in process.lines() if line["logger"].startswith("service.")]
    return [message for message in ours if message.startswith(LINES)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_with_nothing_in_flight_it_ends_at_once(upstream: FakeUpstream, number: signal.Signals) -> None:
    with ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        started = time.monotonic()
        assert process.stop(number) == 0
        assert time.monotonic() - started < SHUTDOWN_TIMEOUT_S
        lines = stop_lines(process)
    assert lines[0] == "Received shutdown signal"
    assert lines[1] == "Waiting for 0 in-flight request(s)..."
    assert lines[2:4] == ["Closing Qdrant connections...", "Finalizing MLflow run..."]
    assert lines[4].startswith("Graceful shutdown completed in ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("seen", ["Started server process", "Waiting for application startup."])
def test_a_signal_while_it_starts_stops_it_in_the_same_order(
    upstream: FakeUpstream, number: signal.Signals, seen: str
) -> None:
    with ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        eventually(lambda: seen in process.text(), seen)
        assert process.stop(number) == 0
        lines = stop_lines(process)
        levels = {line["level"] for line in process.lines()}
    assert lines[:2] == ["Received shutdown signal", "Waiting for 0 in-flight request(s)..."]
    assert lines[2:4] == ["Closing Qdrant connections...", "Finalizing MLflow run..."]
    assert lines[4].startswith("Graceful shutdown completed in ")
    assert levels <= {"INFO", "WARNING"}


def test_a_slow_call_ends_and_new_ones_are_refused(upstream: FakeUpstream) -> None:
    upstream.default = Answer(delay_s=1.0)
    with ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        token = process.token()
        with ThreadPoolExecutor(1) as pool:
            slow: Future[Reply] = pool.submit(ask, process, token)
            upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
            assert process.process is not None
            process.process.send_signal(signal.SIGTERM)
            _until_draining(process)
            refused = ask(process, token)
            alive = process.call("GET", "/health")
        assert process.process.wait(10) == 0
        lines = stop_lines(process)
    assert slow.result().status == 200
    assert refused.status == 503
    assert refused.json["error"] == "ShuttingDownError"
    assert refused.headers["connection"] == "close"
    assert int(refused.headers["retry-after"]) >= 1
    assert alive.json == {"status": "alive"}
    assert lines[:3] == [
        "Received shutdown signal",
        "Waiting for 1 in-flight request(s)...",
        "Request completed",
    ]
    assert lines[3:5] == ["Closing Qdrant connections...", "Finalizing MLflow run..."]
    assert lines[5].startswith("Graceful shutdown completed in ")


def test_in_the_grace_new_requests_are_still_taken(upstream: FakeUpstream) -> None:
    with ServiceProcess({"LITELLM_URL": upstream.url, "SHUTDOWN_GRACE_S": "1"}) as process:
        process.wait_ready()
        token = process.token()
        assert process.process is not None
        process.process.send_signal(signal.SIGTERM)
        _until_draining(process)
        taken = ask(process, token)
        assert process.process.wait(10) == 0
    assert taken.status == 200


def test_in_the_grace_each_answer_ends_its_connection(upstream: FakeUpstream) -> None:
    """Behind a balancer that passes connections on, a client's next request then goes to another process."""
    fields = {"Content-Type": "application/json"}
    bodies: list[dict[str, Any]] = [{"prompt": "x"}, {"prompt": "x", "stream": True}]
    with (
        ServiceProcess({"LITELLM_URL": upstream.url, "SHUTDOWN_GRACE_S": "5"}) as process,
        ExitStack() as stack,
    ):
        process.wait_ready()
        fields["Authorization"] = f"Bearer {process.token()}"

        def ask_on(connection: HTTPConnection, body: dict[str, Any]) -> tuple[int, str]:
            connection.request("POST", "/llm/generate", json.dumps(body), fields)
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.getheader("Connection", "")

        connections = [HTTPConnection("127.0.0.1", process.port, timeout=30) for _ in bodies]
        for connection in connections:
            stack.callback(connection.close)
        both = list(zip(connections, bodies, strict=True))
        assert [ask_on(*one) for one in both] == [(200, "")] * 2
        assert process.process is not None
        process.process.send_signal(signal.SIGTERM)
        _until_draining(process)
        assert [ask_on(*one) for one in both] == [(200, "close")] * 2
        assert process.process.wait(10) == 0


def test_a_hundred_calls_under_load_are_all_answered(upstream: FakeUpstream) -> None:
    upstream.default = Answer(delay_s=2.0)
    with ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        token = process.token()
        with ThreadPoolExecutor(100) as pool:
            calls = [pool.submit(ask, process, token) for _ in range(100)]
            upstream.wait_for(lambda fake: len(fake.chat_requests) == 100, timeout_s=20)
            assert process.stop() == 0
        lines = stop_lines(process)
        (begun,) = [line for line in process.lines() if line["message"] == "Received shutdown signal"]
    assert {call.result().status for call in calls} == {200}
    assert 0 < begun["in_flight"] == lines.count("Request completed")


def test_a_call_longer_than_the_limit_ends_with_an_error(upstream: FakeUpstream) -> None:
    upstream.default = Silent()
    with ServiceProcess({"LITELLM_URL": upstream.url, "SHUTDOWN_TIMEOUT_S": "1"}) as process:
        process.wait_ready()
        token = process.token()
        with ThreadPoolExecutor(1) as pool:
            slow: Future[Reply] = pool.submit(ask, process, token)
            upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
            assert process.stop() == 0
    assert slow.result().status == 503
    assert slow.result().json["error"] == "ShuttingDownError"


def test_a_dead_collector_does_not_hold_it_up(upstream: FakeUpstream, receiver: OtlpReceiver) -> None:
    receiver.hang = True
    # An export that is not ended by the stop would outlast it.
    given = {"LITELLM_URL": upstream.url, "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
    with ServiceProcess({**given, **to_collector(receiver)}) as process:
        process.wait_ready()
        ask(process, process.token())
        started = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - started < SHUTDOWN_TIMEOUT_S


def test_a_second_signal_ends_it_at_once(upstream: FakeUpstream) -> None:
    upstream.default = Silent()
    with ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        token = process.token()
        caller = threading.Thread(target=_ask_and_lose, args=(process, token))
        caller.start()
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
        assert process.process is not None
        process.process.send_signal(signal.SIGTERM)
        _until_draining(process)
        time.sleep(SAME_SIGNAL_S)  # an earlier one would be the same signal
        started = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        process.process.wait(10)
        assert time.monotonic() - started < SHUTDOWN_TIMEOUT_S
        caller.join()


WORKERS = {"WORKERS": "2", "QDRANT_URL": "http://127.0.0.1:9"}


@pytest.mark.parametrize("workers", [{}, WORKERS], ids=["one process", "workers"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_sent_twice_within_a_second_is_one(
    upstream: FakeUpstream, number: signal.Signals, workers: dict[str, str]
) -> None:
    upstream.default = Answer(delay_s=1.5)
    with ServiceProcess({"LITELLM_URL": upstream.url, **workers}) as process:
        started(process, workers)
        token = process.token()
        with ThreadPoolExecutor(1) as pool:
            slow: Future[Reply] = pool.submit(ask, process, token)
            upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
            assert process.process is not None
            process.process.send_signal(number)
            eventually(lambda: "Received shutdown signal" in process.text(), "the stop")
            process.process.send_signal(number)
            assert process.process.wait(20) == 0
        lines = stop_lines(process)
    assert slow.result().status == 200
    assert "Request completed" in lines
    assert lines.count("Received shutdown signal") == (2 if workers else 1)
    assert lines[-1].startswith("Graceful shutdown completed in ")


def test_a_second_signal_ends_workers_at_once(upstream: FakeUpstream) -> None:
    upstream.default = Silent()
    with ServiceProcess({"LITELLM_URL": upstream.url, **WORKERS, "LLM_TIMEOUT_S": "300"}) as process:
        started(process, WORKERS)
        caller = threading.Thread(target=_ask_and_lose, args=(process, process.token()))
        caller.start()
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
        assert process.process is not None
        process.process.send_signal(signal.SIGTERM)
        eventually(lambda: process.text().count("Received shutdown signal") == 2, "both workers to stop")
        time.sleep(SAME_SIGNAL_S)  # an earlier one would be the same signal
        begun = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(20) == 0
        assert time.monotonic() - begun < SHUTDOWN_TIMEOUT_S / 2
        caller.join()


OTHERS = [
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF),
    *(signal.SIGQUIT, signal.SIGIO, signal.SIGPWR, signal.SIGTTIN, signal.SIGTTOU),
]


@pytest.mark.parametrize("workers", [{}, WORKERS], ids=["one process", "workers"])
def test_other_signals_are_ignored_with_a_line_each(upstream: FakeUpstream, workers: dict[str, str]) -> None:
    with ServiceProcess({"LITELLM_URL": upstream.url, **workers}) as process:
        started(process, workers)
        assert process.process is not None
        pids = {process.process.pid, *(int(found) for found in STARTED.findall(process.text()))}
        assert len(pids) == (3 if workers else 1)
        for pid in pids:
            for number in OTHERS:
                os.kill(pid, number)
        expected = sorted(f"Ignored {number.name}" for number in OTHERS) * len(pids)
        eventually(lambda: process.text().count('"Ignored SIG') == len(expected), "a line each")
        assert ask(process, process.token()).status == 200
        assert process.stop() == 0
        lines = process.lines()
    assert sorted(line["message"] for line in lines if line["message"].startswith("Ignored")) == sorted(
        expected
    )
    assert not [line for line in lines if line["level"] in {"ERROR", "CRITICAL"}]
    assert len(set(STARTED.findall(process_text(lines)))) == (2 if workers else 1), "no worker came or went"


STARTED = re.compile(r"Started server process \[(\d+)\]")


def started(process: ServiceProcess, workers: dict[str, str]) -> None:
    """Wait until every process serves."""
    process.wait_ready()
    count = int(workers.get("WORKERS", "1"))
    eventually(lambda: process.text().count("Application startup complete") == count, "the processes")


def process_text(lines: list[dict[str, Any]]) -> str:
    return "\n".join(line["message"] for line in lines)


def test_two_workers_stop_as_one(upstream: FakeUpstream) -> None:
    upstream.default = Answer(delay_s=0.7)
    variables = {"LITELLM_URL": upstream.url, "WORKERS": "2", "QDRANT_URL": "http://127.0.0.1:9"}
    with ServiceProcess(variables) as process:
        process.wait_ready()
        eventually(lambda: process.text().count("Application startup complete") == 2, "both workers")
        token = process.token()
        with ThreadPoolExecutor(10) as pool:
            calls = [pool.submit(ask, process, token) for _ in range(10)]
            upstream.wait_for(lambda fake: len(fake.chat_requests) == 10)
            assert process.stop() == 0
        lines = stop_lines(process)
    assert {call.result().status for call in calls} == {200}
    assert lines.count("Received shutdown signal") == 2


def _until_draining(process: ServiceProcess) -> None:
    end = time.monotonic() + 5
    while process.call("GET", "/health/detailed").json["status"] != "draining":
        assert time.monotonic() < end
        time.sleep(0.02)


def _ask_and_lose(process: ServiceProcess, token: str) -> None:
    try:
        ask(process, token)
    except OSError:
        return
