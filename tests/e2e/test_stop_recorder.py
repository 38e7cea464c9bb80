"""The stop with everything wrong at once: who is inside is answered, in time, and nothing is forgotten."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.ports import unused_port
from tests.e2e.recording import in_spool, left_in, show, until, variables
from tests.e2e.support import generate, stopped, to_collector
from tests.e2e.test_stop import stop_lines
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Answer, FakeUpstream, Silent
from tests.harness import ServiceProcess

pytestmark = pytest.mark.e2e

SHUTDOWN_TIMEOUT_S = 1.5
SLACK_S = 5.0
"""What the stop may take beyond its time limit, whatever is wrong."""

ENDINGS: dict[str, Callable[[FakeMlflow], None]] = {
    "dead": FakeMlflow.down,
    "frozen": lambda fake: setattr(fake, "hang", True),
}

SILENT_STORE = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
kept = []
while True:
    kept.append(listener.accept())
"""


@contextmanager
def a_store_that_hangs() -> Iterator[str]:
    """Takes connections, never answers, and is never told that they end."""
    port = unused_port()
    store = subprocess.Popen([sys.executable, "-c", SILENT_STORE, str(port)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        store.kill()
        store.wait()


@pytest.mark.parametrize("name", ENDINGS)
def test_a_dead_collector_an_mlflow_that_fails_and_a_call_too_long_at_once(
    upstream: FakeUpstream, receiver: OtlpReceiver, mlflow: FakeMlflow, tmp_path: Path, name: str
) -> None:
    spool = tmp_path / "spool"
    receiver.hang = True
    given = {**variables(upstream.url, mlflow.url, spool), "MLFLOW_TIMEOUT_S": "5"}
    limits = {**to_collector(receiver), "SHUTDOWN_TIMEOUT_S": str(SHUTDOWN_TIMEOUT_S)}
    with a_store_that_hangs() as url, ServiceProcess({**given, **limits, "QDRANT_URL": url}) as process:
        token = process.wait_ready().token()
        first = generate(process, token)
        mlflow.wait_for(lambda fake: first.request_id in fake.request_ids)
        ENDINGS[name](mlflow)
        with ThreadPoolExecutor(2) as pool:
            calls = []
            for number, behaviour in enumerate((Silent(), Answer(delay_s=SHUTDOWN_TIMEOUT_S / 2))):
                upstream.script(behaviour)  # type: ignore[arg-type]  # one of either is a Behaviour
                calls.append(pool.submit(generate, process, token))
                upstream.wait_for(lambda fake, seen=number + 2: len(fake.chat_requests) == seen)  # type: ignore[misc]  # mypy sees no type for defaults
            started = time.monotonic()
            assert process.stop() == 0
            took_s = time.monotonic() - started
        endless, slow = (call.result() for call in calls)
        said = stop_lines(process)
        assert not [line for line in process.lines() if line["level"] == "ERROR"]
    assert slow.status == 200
    assert endless.status == 503
    assert endless.json["error"] == "ShuttingDownError"
    assert_in_order(said, took_s)
    assert [run.status for run in mlflow.runs] == ["RUNNING"]
    outcomes = {record["trace_id"]: record["outcome"] for record in in_spool(spool)}
    assert outcomes.keys() == {slow.request_id, endless.request_id}
    assert outcomes[slow.request_id] == "success"
    assert outcomes[endless.request_id] != "success"

    mlflow.hang = False
    mlflow.down()
    mlflow.up()
    with ServiceProcess(given) as process:
        process.wait_ready()
        until(lambda: bool(mlflow.runs) and mlflow.runs[0].status != "RUNNING", "the run of before to end")
        stopped(process)
    assert mlflow.request_ids == {first.request_id, *outcomes}
    # It stopped well, though nobody could be told at the time.
    assert [run.status for run in mlflow.runs] == ["FINISHED", "FINISHED"]
    assert mlflow.runs[0].metrics["calls"] == 3
    assert left_in(spool) == []


def assert_in_order(said: list[str], took_s: float) -> None:
    """The lines of the contract, and a time within its bound."""
    assert said[:-1] == [
        "Received shutdown signal",
        "Waiting for 2 in-flight request(s)...",
        "Request completed",
        "Request completed",
        "Closing Qdrant connections...",
        "Finalizing MLflow run...",
    ]
    said_s = float(said[-1].removeprefix("Graceful shutdown completed in ").removesuffix("s"))
    show({"stop": f"{took_s:.2f} s", "limit": f"{SHUTDOWN_TIMEOUT_S + SLACK_S:.2f} s"})
    assert SHUTDOWN_TIMEOUT_S <= said_s <= took_s + 0.1
    assert SHUTDOWN_TIMEOUT_S < took_s <= SHUTDOWN_TIMEOUT_S + SLACK_S
