"""Readiness beside real servers, LiteLLM's and MLflow's, and a scriptable Qdrant: killed, frozen, slowed."""

import json
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest

from deploy.ports import unused_port
from tests.e2e.recording import QUICK, show, until
from tests.e2e.servers import MlflowServer, Server, litellm_server
from tests.e2e.slow_link import SlowLink
from tests.e2e.support import to_collector
from tests.e2e.test_health import qdrant
from tests.fakes.otlp import OtlpReceiver
from tests.harness import ServiceProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

INTERVAL_S = 0.5
TIMEOUT_S = 1.0
SEEN_WITHIN_S = 10 * (INTERVAL_S + TIMEOUT_S)
"""One interval and one time limit, and much more for a machine that has other things to do."""

PROBE_S = 0.02
ALL = {"qdrant", "litellm", "mlflow"}

GIVEN = {
    **QUICK,
    "HEALTH_INTERVAL_S": str(INTERVAL_S),
    "HEALTH_TIMEOUT_S": str(TIMEOUT_S),
    "HEALTH_TTL_S": "5",
    "HEALTH_REQUIRED": ",".join(sorted(ALL)),
    "MLFLOW_TIMEOUT_S": "5",
}


class Probes:
    """Asks /health and /health/detailed all the time, on one connection, and keeps what it was told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._probe, name="probes")
        self.seconds: list[float] = []
        self.alive: set[int] = set()
        self.last: tuple[int, Any] = (0, {})
        self.failed: list[OSError] = []

    def _probe(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            while not self._stop.wait(PROBE_S):
                self.alive.add(self._ask(connection, "/health")[0])
                started = time.perf_counter()
                answer = self._ask(connection, "/health/detailed")
                self.seconds.append(time.perf_counter() - started)
                self.last = answer
        except OSError as error:
            self.failed.append(error)
        finally:
            connection.close()

    @staticmethod
    def _ask(connection: HTTPConnection, path: str) -> tuple[int, Any]:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    @contextmanager
    def running(self) -> Iterator["Probes"]:
        """Ask until the block ends."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()

    @property
    def down(self) -> set[str]:
        """The dependencies that were down at the last look, which must fit the status."""
        status, body = self.last
        found = {name for name, up in body.get("checks", {}).items() if not up}
        if body:
            assert (status, body["status"]) == ((503, "degraded") if found else (200, "healthy"))
        return found


class Watch:
    """One service under watch: its answers, its gauge, its events and its lines must say the same."""

    def __init__(self, process: ServiceProcess, probes: Probes, receiver: OtlpReceiver) -> None:
        self.process = process
        self.probes = probes
        self.receiver = receiver
        self.took: dict[str, object] = {}

    def sees(self, down: set[str], after: str, *, limit_s: float = SEEN_WITHIN_S) -> None:
        """Wait until exactly these are down, everywhere."""
        before = len(self.probes.seconds)
        started = time.monotonic()
        until(
            lambda: len(self.probes.seconds) > before + 1 and self.probes.down == down,
            f"{down or 'nothing'} to be down after: {after}; last {self.probes.last}",
            limit_s,
        )
        self.took[after] = f"seen after {time.monotonic() - started:.2f} s"
        for name in ALL:
            up = name not in down
            self.receiver.wait_for(
                lambda it, name=name, up=up: (  # type: ignore[misc]  # mypy sees no type for defaults
                    it.value("llmops.health.status", {"dependency": name}) == up
                )
            )
            last = [line for line in self.events() if line["dependency"] == name][-1]
            assert last["message"] == (f"{name} is up" if up else f"{name} is down: {last['error']}")
            assert last["level"] == ("INFO" if up else "WARNING")
            if not up:
                assert self.probes.last[1]["details"][name]["error"]

    def events(self) -> list[dict[str, Any]]:
        """The lines about changes."""
        return [line for line in self.process.lines() if line.get("event") == "llmops.health.changed"]


@contextmanager
def watched(given: dict[str, str], receiver: OtlpReceiver) -> Iterator[Watch]:
    """A service that is asked about its health all the time, and has to be quick about it."""
    with ServiceProcess({**GIVEN, **to_collector(receiver), **given}) as process:
        with Probes(process.wait_ready().port).running() as probes:
            watch = Watch(process, probes, receiver)
            yield watch
        assert process.stop() == 0
        lines = len(watch.events())
    told = [log for log in receiver.logs() if log.event_name == "llmops.health.changed"]
    assert len(told) == lines
    assert not probes.failed
    assert probes.alive == {200}
    cuts = statistics.quantiles(probes.seconds, n=100)
    times = {"probes": len(probes.seconds), "p50": cuts[49], "p99": cuts[98], "max": max(probes.seconds)}
    show({**watch.took, **{name: f"{value:.4g}" for name, value in times.items()}})
    # Most answers wait for no check. Those that find a result older than a second wait for one, for no longer
    # than its time limit.
    assert cuts[49] < TIMEOUT_S / 20
    assert cuts[98] < TIMEOUT_S * 1.5


Servers = tuple[Server, MlflowServer, dict[str, str]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    proxy, given = litellm_server(tmp_path_factory.mktemp("litellm"))
    tracker = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    proxy.start()
    with tracker, ExitStack() as stack:
        stack.push(proxy.__exit__)
        proxy.wait_ready()
        yield proxy, tracker, given


def test_killed_and_frozen(servers: Servers, receiver: OtlpReceiver) -> None:
    proxy, tracker, given = servers
    port = unused_port()
    urls = {"QDRANT_URL": f"http://127.0.0.1:{port}", "MLFLOW_TRACKING_URI": tracker.url}
    with ExitStack() as stack:
        store = stack.enter_context(qdrant(port))
        watch = stack.enter_context(watched({**given, **urls}, receiver))
        watch.sees(set(), "start")
        freezing: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "litellm": (proxy.freeze, proxy.thaw),
            "mlflow": (tracker.freeze, tracker.thaw),
            "qdrant": (
                lambda: store.send_signal(signal.SIGSTOP),
                lambda: store.send_signal(signal.SIGCONT),
            ),
        }
        for name, (freeze, thaw) in freezing.items():
            freeze()
            watch.sees({name}, f"{name} frozen")
            thaw()
            watch.sees(set(), f"{name} thawed")
        store.kill()
        store.wait()
        watch.sees({"qdrant"}, "qdrant killed")
        with qdrant(port):
            watch.sees(set(), "qdrant started again")
            proxy.kill()
            watch.sees({"litellm"}, "litellm killed")
            tracker.kill()
            watch.sees({"litellm", "mlflow"}, "mlflow killed, too")
            proxy.start()
            tracker.start()
            tracker.wait_ready()
            proxy.wait_ready()
            watch.sees(set(), "both started again")


def test_slow(servers: Servers, receiver: OtlpReceiver) -> None:
    proxy, tracker, given = servers
    port = unused_port()
    with ExitStack() as stack:
        stack.enter_context(qdrant(port))
        links = {
            "litellm": stack.enter_context(SlowLink(proxy.port)),
            "mlflow": stack.enter_context(SlowLink(tracker.port)),
            "qdrant": stack.enter_context(SlowLink(port)),
        }
        urls = {
            "LITELLM_URL": links["litellm"].url,
            "MLFLOW_TRACKING_URI": links["mlflow"].url,
            "QDRANT_URL": links["qdrant"].url,
        }
        watch = stack.enter_context(watched({**given, **urls}, receiver))
        watch.sees(set(), "start")
        for name, link in links.items():
            link.delay_s = TIMEOUT_S / 5
            until(
                lambda name=name: (  # type: ignore[misc]  # mypy sees no type for defaults
                    watch.probes.last[1]["details"][name]["latency_ms"] >= 1_000 * TIMEOUT_S / 5
                ),
                f"{name}'s slowness to be shown",
            )
            assert watch.probes.down == set()
            link.delay_s = 3 * TIMEOUT_S
            watch.sees({name}, f"{name} too slow")
            assert watch.probes.last[1]["details"][name]["error"] == f"no answer within {TIMEOUT_S:g} s"
            link.delay_s = 0.0
            watch.sees(set(), f"{name} quick again")
