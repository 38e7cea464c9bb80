"""A rolling restart behind a small balancer that obeys readiness: nobody is lost."""

import http.client
import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import pytest

from tests.fakes.upstream import Answer, FakeUpstream
from tests.harness import ServiceProcess, new_secrets, request

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

CALLS = 2_000
PROBE_S = 0.05
GRACE_S = 0.5
"""Longer than the balancer takes to see that a process is not ready any more."""


class Balancer:
    """Sends each request to a process that its last probe found ready, on a connection of its own."""

    def __init__(self) -> None:
        self.backends: set[int] = set()
        self._ready: list[int] = []
        self._next = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        balancer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout: ClassVar[float] = 30

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = balancer.forward(self.path, body, dict(self.headers))
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._threads = [
            threading.Thread(target=self._server.serve_forever),
            threading.Thread(target=self._probe),
        ]

    def forward(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """Send one request on; 599 when there is nobody to send it to."""
        with self._lock:
            self._next += 1
            ready = self._ready
            if not ready:
                return 599, b"nobody is ready"
            port = ready[self._next % len(ready)]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError as error:
            return 598, repr(error).encode()
        finally:
            connection.close()

    def _probe(self) -> None:
        while not self._stop.wait(PROBE_S):
            with self._lock:
                backends = sorted(self.backends)
            ready = [port for port in backends if _is_ready(port)]
            with self._lock:
                self._ready = ready

    @contextmanager
    def running(self) -> Iterator["Balancer"]:
        """Balance until the block ends."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._server.shutdown()
            self._server.server_close()
            for thread in self._threads:
                thread.join()


def _is_ready(port: int) -> bool:
    try:
        return request(port, "GET", "/health/detailed", timeout_s=2).status == 200
    except OSError:
        return False


class Fleet:
    """The processes behind the balancer."""

    def __init__(self, variables: dict[str, str], balancer: Balancer, stack: ExitStack) -> None:
        self._variables = variables
        self._balancer = balancer
        self._stack = stack

    def start(self) -> ServiceProcess:
        """Start one, and let it join when it is ready."""
        process = self._stack.enter_context(ServiceProcess(self._variables)).wait_ready()
        end = time.monotonic() + 20
        while not _is_ready(process.port):
            assert time.monotonic() < end
            time.sleep(0.05)
        self._balancer.backends |= {process.port}
        return process

    def replace(self, old: ServiceProcess) -> None:
        """Start a new one, then stop the old one; the balancer finds out by its probes alone."""
        self.start()
        assert old.stop() == 0
        self._balancer.backends -= {old.port}


def test_a_rolling_restart_fails_no_request(upstream: FakeUpstream) -> None:
    upstream.default = Answer(delay_s=0.02)
    variables = {
        **{name.upper(): value for name, value in new_secrets().items()},
        "LITELLM_URL": upstream.url,
        "HEALTH_INTERVAL_S": "0.5",
        "HEALTH_TIMEOUT_S": "0.5",
        "HEALTH_REQUIRED": "qdrant,litellm",
        "SHUTDOWN_GRACE_S": str(GRACE_S),
        "RATE_LIMIT": "1000000/minute",
    }
    with ExitStack() as stack:
        balancer = stack.enter_context(Balancer().running())
        fleet = Fleet(variables, balancer, stack)
        olds = [fleet.start(), fleet.start()]
        token = olds[0].token()
        time.sleep(4 * PROBE_S)

        def call(_number: int) -> int:
            body = {"prompt": "x"}
            return request(balancer.port, "POST", "/llm/generate", body=body, token=token).status

        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(call, number) for number in range(CALLS)]
            for old in olds:
                fleet.replace(old)
            during = sum(call.done() for call in calls)
            statuses = Counter(call.result() for call in calls)
    assert statuses == {200: CALLS}
    # The restart happened under load, not after it.
    assert 0 < during < CALLS
