"""Readiness tells the truth about real servers that die, freeze and come back, and costs nothing to ask."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from deploy.ports import unused_port
from service.services.health_checker import FRESH_S
from tests.e2e.support import to_collector
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import FakeUpstream, Silent, Status
from tests.harness import ServiceProcess

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

INTERVAL_S = 0.3
OFTEN = {
    "HEALTH_INTERVAL_S": str(INTERVAL_S),
    "HEALTH_TIMEOUT_S": "0.3",
    "HEALTH_TTL_S": "2",
    "HEALTH_REQUIRED": "qdrant,litellm",
}
LIMIT_S = 10.0

QDRANT = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = b'{"result":{"exists":false},"status":"ok","time":0.0}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@contextmanager
def qdrant(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers like a Qdrant server without collections."""
    process = subprocess.Popen([sys.executable, "-c", QDRANT, str(port)])
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def checks(process: ServiceProcess) -> dict[str, bool]:
    found: dict[str, bool] = process.call("GET", "/health/detailed").json["checks"]
    return found


def test_a_vector_store_that_dies_freezes_and_comes_back(
    upstream: FakeUpstream, receiver: OtlpReceiver
) -> None:
    port = unused_port()
    variables = {
        **OFTEN,
        **to_collector(receiver),
        "LITELLM_URL": upstream.url,
        "QDRANT_URL": f"http://127.0.0.1:{port}",
    }
    with ServiceProcess(variables) as process:
        process.wait_ready()
        with qdrant(port) as store:
            until(lambda: process.call("GET", "/health/detailed").status == 200, "ready")
            store.send_signal(signal.SIGSTOP)
            until(lambda: not checks(process)["qdrant"], "the frozen store to be seen")
            degraded = process.call("GET", "/health/detailed")
            assert degraded.status == 503
            assert degraded.json["status"] == "degraded"
            assert degraded.json["checks"] == {"qdrant": False, "litellm": True}
            assert process.call("GET", "/health").json == {"status": "alive"}
            store.send_signal(signal.SIGCONT)
            until(lambda: checks(process)["qdrant"], "the store to be back")
        until(lambda: not checks(process)["qdrant"], "the dead store to be seen")
        receiver.wait_for(lambda found: found.value("llmops.health.status", {"dependency": "qdrant"}) == 0)
        with qdrant(port):
            until(lambda: process.call("GET", "/health/detailed").status == 200, "ready again")
        process.stop()
        lines = [line for line in process.lines() if line.get("event") == "llmops.health.changed"]
    told = [line["message"].split(":")[0] for line in lines if line["dependency"] == "qdrant"]
    assert told[-4:] in (
        ["qdrant is up", "qdrant is down", "qdrant is up", "qdrant is down"],
        ["qdrant is down", "qdrant is up", "qdrant is down", "qdrant is up"],
    )


@pytest.mark.parametrize("behaviour", [Silent(), Status(503)])
def test_a_proxy_that_is_not_ready_is_not_ready(upstream: FakeUpstream, behaviour: Silent | Status) -> None:
    with ServiceProcess({**OFTEN, "LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        until(lambda: checks(process)["litellm"], "the proxy to be seen")
        upstream.health_behaviour = behaviour
        until(lambda: not checks(process)["litellm"], "its illness to be seen")
        upstream.health_behaviour = None
        until(lambda: checks(process)["litellm"], "its recovery to be seen")


def test_what_is_not_required_does_not_make_it_unready(upstream: FakeUpstream) -> None:
    upstream.health_behaviour = Status(503)
    variables = {**OFTEN, "LITELLM_URL": upstream.url, "HEALTH_REQUIRED": "qdrant"}
    with ServiceProcess(variables) as process:
        process.wait_ready()
        until(lambda: process.call("GET", "/health/detailed").status == 200, "ready")
        answer = process.call("GET", "/health/detailed").json
    assert answer["checks"]["litellm"] is False
    assert answer["details"]["litellm"]["error"] in {"HTTP 503", "not checked yet"}
    assert answer["details"]["litellm"]["required"] is False


def test_a_thousand_probes_cause_at_most_a_ping_a_second(upstream: FakeUpstream) -> None:
    variables = {**OFTEN, "LITELLM_URL": upstream.url, "HEALTH_INTERVAL_S": "30", "HEALTH_TTL_S": "60"}
    with ServiceProcess(variables) as process:
        process.wait_ready()
        until(lambda: checks(process)["litellm"], "the first check")
        before = pings(upstream)
        started = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: process.call("GET", "/health/detailed").status, range(1_000)))
        took_s = time.monotonic() - started
    assert set(answers) == {200}
    # A check of LiteLLM asks for two paths.
    assert pings(upstream) - before <= 2 * (took_s + 1)


def test_a_dependency_that_hangs_delays_who_asks_by_its_limit_at_most(upstream: FakeUpstream) -> None:
    variables = {
        **OFTEN,
        "LITELLM_URL": upstream.url,
        "HEALTH_INTERVAL_S": "60",
        "HEALTH_TIMEOUT_S": "1",
        "HEALTH_TTL_S": "90",
    }
    with ServiceProcess(variables) as process:
        process.wait_ready()
        until(lambda: checks(process)["litellm"], "the first check")
        upstream.health_behaviour = Silent()
        before, started = pings(upstream), time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            # Answered from memory for a second, then by the check that ran into its limit.
            until(lambda: not all(pool.map(lambda _: checks(process)["litellm"], range(16))), "the illness")
            took_s = time.monotonic() - started
            assert pings(upstream) - before <= took_s + 1
            assert process.call("GET", "/health").json == {"status": "alive"}


def test_who_asks_sees_a_dependency_that_has_just_died_long_before_the_next_check(
    upstream: FakeUpstream,
) -> None:
    port = unused_port()
    variables = {
        **OFTEN,
        "LITELLM_URL": upstream.url,
        "QDRANT_URL": f"http://127.0.0.1:{port}",
        "HEALTH_INTERVAL_S": "600",
        "HEALTH_TTL_S": "900",
    }
    with ServiceProcess(variables) as process, qdrant(port) as store:
        process.wait_ready()
        until(lambda: process.call("GET", "/health/detailed").status == 200, "ready")
        store.kill()
        store.wait()
        time.sleep(FRESH_S + 0.1)  # the last result must be older than what is served from memory
        degraded = process.call("GET", "/health/detailed")
    assert degraded.status == 503
    assert degraded.json["checks"] == {"qdrant": False, "litellm": True}


def pings(upstream: FakeUpstream) -> int:
    return len([seen for seen in upstream.requests if "/health/" in seen.path])


def test_a_refused_call_makes_it_look_at_once(upstream: FakeUpstream) -> None:
    port = unused_port()
    variables = {
        **OFTEN,
        "LITELLM_URL": f"http://127.0.0.1:{port}",
        "HEALTH_INTERVAL_S": "60",
        "HEALTH_TTL_S": "90",
        "RETRY_MAX": "0",
    }
    del upstream
    with ServiceProcess(variables) as process:
        process.wait_ready()
        until(lambda: "litellm is down: Connection error" in process.text(), "the first check")
        first = process.call("GET", "/health/detailed").json["details"]["litellm"]["age_s"]
        time.sleep(0.3)
        process.call("POST", "/llm/generate", body={"prompt": "x"}, token=process.token())
        until(
            lambda: process.call("GET", "/health/detailed").json["details"]["litellm"]["age_s"] <= first,
            "another look",
        )


def test_an_embedded_store_that_cannot_be_opened_is_down_and_no_more(
    upstream: FakeUpstream, tmp_path: os.PathLike[str]
) -> None:
    folder = os.path.join(tmp_path, "file")  # noqa: PTH118 - a path below a file
    with open(folder, "w", encoding="utf-8") as file:  # noqa: PTH123 - as above
        file.write("not a folder")
    variables = {**OFTEN, "LITELLM_URL": upstream.url, "QDRANT_PATH": os.path.join(folder, "store")}  # noqa: PTH118
    with ServiceProcess(variables) as process:
        process.wait_ready()
        until(lambda: checks(process)["litellm"], "the first check")
        assert checks(process)["qdrant"] is False
        answer = process.call("POST", "/llm/generate", body={"prompt": "x"}, token=process.token())
        assert answer.status == 200
        assert process.stop() == 0
