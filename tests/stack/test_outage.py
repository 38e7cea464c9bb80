"""The collector killed, frozen and started again under load, and its backends away."""

import json
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.recording import show
from tests.fakes.upstream import Answer, FakeUpstream
from tests.harness import ServiceProcess, request
from tests.stack.api import until
from tests.stack.queries import of_rules
from tests.stack.world import World

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

CALLERS = 8
SERVICE = {
    "RATE_LIMIT": "1000000/minute",
    "QDRANT_PATH": ":memory:",
    "OTEL_BSP_MAX_QUEUE_SIZE": "1024",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "2",
}
AT_QUEUE = 'sum(otel_sdk_processor_span_processed_total{error_type="queue_full"})'
AT_EXPORT = 'sum(otel_sdk_exporter_span_exported_total{error_type!=""})'
SCRAPED_S = 18
"""Longer than Prometheus's scrape interval."""

HUNG_S = 6
SHUTDOWN_TIMEOUT_S = 30
"""The time limit of a stop by default."""


class Load:
    """Calls without a pause; what each took, and what it was answered."""

    def __init__(self, process: ServiceProcess) -> None:
        self._process = process
        self._token = process.token()
        self._stop = threading.Event()
        self.calls: list[tuple[float, float, int]] = []

    def _call_on(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._process.port, timeout=30)
        fields = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        number = 0
        while not self._stop.is_set():
            number += 1
            body = json.dumps({"prompt": f"{threading.get_ident()} {number}"})
            started = time.perf_counter()
            connection.request("POST", "/llm/generate", body, fields)
            answer = connection.getresponse()
            answer.read()
            self.calls.append((time.time(), time.perf_counter() - started, answer.status))
        connection.close()

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """Call until the block ends."""
        threads = [threading.Thread(target=self._call_on) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def between(self, start: float, end: float) -> list[float]:
        """What the calls took that ended in this time."""
        return [seconds for at, seconds, _ in self.calls if start <= at < end]


def p99(seconds: list[float]) -> float:
    """Their 99th percentile."""
    return statistics.quantiles(seconds, n=100)[-1]


def rss_bytes(process: ServiceProcess) -> int:
    """A process's resident memory."""
    assert process.process is not None
    status = Path(f"/proc/{process.process.pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("outage"), with_models=False) as found:
        yield found


@pytest.fixture
def process(world: World, upstream: FakeUpstream) -> Iterator[ServiceProcess]:
    upstream.default = Answer(delay_s=0.05)
    with world.service({**SERVICE, "LITELLM_URL": upstream.url}) as found:
        yield found.wait_ready()


def alert(name: str) -> str:
    """An alert's expression."""
    return next(rule.expr for rule in of_rules("alert") if rule.where == name)


def value(world: World, expr: str) -> float:
    """The one value of a query; 0 where there is none."""
    return sum(world.api.query(expr, time.time()).values())


def flows(world: World, process: ServiceProcess) -> None:
    """Wait until a call that is made now is seen behind the collector, and counted in Prometheus."""
    found = request(process.port, "GET", "/no-such-route")
    until(lambda: world.loki.logs(found.request_id), "its log records")
    until(lambda: world.tempo.spans(found.request_id), "its trace")


def test_a_collector_that_dies_and_comes_back_costs_no_call(world: World, process: ServiceProcess) -> None:
    load = Load(process)
    alive: list[float] = []
    dead: list[float] = []
    halves: list[float] = []
    with load.running():
        time.sleep(3)
        before = rss_bytes(process)
        for _ in range(4):
            with_it = time.time()
            time.sleep(3)
            world.kill_collector()
            without = time.time()
            time.sleep(3)
            back = time.time()
            world.start_collector()
            alive += load.between(with_it, without)
            dead += load.between(without, back)
            halves.append(p99(load.between(with_it, without)))
        # For long enough that Prometheus sees it, and the process has to drop.
        world.kill_collector()
        gone = time.time()
        time.sleep(SCRAPED_S)
        after = rss_bytes(process)
        world.start_collector()
        back = time.time()
        time.sleep(3)

    assert {status for _, _, status in load.calls} == {200}
    # What the machine does to the number by itself, without any difference in what is measured.
    noise = max(halves) / min(halves)
    ratio = p99(dead) / p99(alive)
    show(
        {
            "p99 without / with the collector": f"{ratio:.3f} ({len(dead)} and {len(alive)} calls)",
            "the same of rounds with it, greatest / least": f"{noise:.3f}",
        }
    )
    assert ratio <= 1.05 * noise
    # A thousand spans and as many records wait at most; all else of an outage is dropped.
    assert after - before < 60_000_000, (before, after)
    flows(world, process)
    until(lambda: world.api.query(alert("TelemetryDropped"), time.time()), "the drops to be counted")
    assert world.api.over(alert("CollectorDown"), gone, time.time())
    until(lambda: not world.api.query(alert("CollectorDown"), time.time()), "the collector to be seen again")
    show(
        {
            "spans dropped at the queue": f"{value(world, AT_QUEUE):.0f}",
            "spans dropped at the export": f"{value(world, AT_EXPORT):.0f}",
            "memory meanwhile": f"{after - before:+,} bytes",
        }
    )


def test_a_collector_that_hangs_costs_no_call(world: World, process: ServiceProcess) -> None:
    load = Load(process)
    with load.running():
        time.sleep(2)
        world.collector.send(signal.SIGSTOP)
        time.sleep(HUNG_S)
        world.collector.send(signal.SIGCONT)
        time.sleep(2)
    assert {status for _, _, status in load.calls} == {200}
    assert max(seconds for _, seconds, _ in load.calls) < HUNG_S
    flows(world, process)


def test_a_stop_does_not_wait_for_a_dead_collector(world: World, upstream: FakeUpstream) -> None:
    # An export that is not ended by the stop would outlast it.
    given = {**SERVICE, "LITELLM_URL": upstream.url, "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
    with world.service(given) as process:
        process.wait_ready().token()
        world.collector.send(signal.SIGSTOP)
        started = time.monotonic()
        try:
            assert process.stop() == 0
        finally:
            world.collector.send(signal.SIGCONT)
    assert time.monotonic() - started < SHUTDOWN_TIMEOUT_S


def test_what_a_backend_does_not_take_waits_on_disk_through_a_restart(
    world: World, process: ServiceProcess
) -> None:
    flows(world, process)
    world.loki.answer_status = 503
    asked = [request(process.port, "GET", "/no-such-route").request_id for _ in range(20)]
    time.sleep(3)
    assert not any(world.loki.logs(trace_id) for trace_id in asked)
    world.kill_collector()
    world.start_collector()
    world.loki.answer_status = 200
    until(lambda: all(world.loki.logs(trace_id) for trace_id in asked), "what had waited")
    assert [len(world.loki.logs(trace_id)) for trace_id in asked] == [1] * len(asked)


def test_what_a_backend_refuses_is_counted(world: World, process: ServiceProcess) -> None:
    flows(world, process)
    world.loki.answer_status = 400
    for _ in range(5):
        request(process.port, "GET", "/no-such-route")
    lost = "otelcol_exporter_send_failed_log_records_total"
    try:
        until(lambda: value(world, lost) > 0, "the loss to be counted")
    finally:
        world.loki.answer_status = 200
    time.sleep(SCRAPED_S)
    for _ in range(5):
        request(process.port, "GET", "/no-such-route")
    assert value(world, lost) >= 5


def test_the_collector_hides_what_somebody_else_lets_slip(world: World) -> None:
    secret = {
        "authorization": "Bearer abcdefgh12345678",
        "http.request.header.authorization": "canary-1",
        "db.password": "canary-2",
        "gen_ai.input.messages": "canary-3",
        "gen_ai.system_instructions": "canary-4",
        "note": "the key is sk-abcdefgh12345678",
        "url.full": "http://name:canary-5@example.org/",
        "gen_ai.prompt.0.content": "canary-6",
    }
    kept = {"gen_ai.usage.input_tokens": "12", "gen_ai.token.type": "input", "enduser.id": "user"}
    attributes = [{"key": name, "value": {"stringValue": text}} for name, text in (secret | kept).items()]
    trace_id = "0" * 31 + "a"
    now = time.time_ns()
    span = {
        "traceId": trace_id,
        "spanId": "00f067aa0ba902b7",
        "name": "careless",
        "startTimeUnixNano": str(now),
        "endTimeUnixNano": str(now + 1),
        "attributes": attributes,
        "status": {"code": 2},
        "events": [{"timeUnixNano": str(now), "name": "e", "attributes": attributes}],
    }
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"  # noqa: S105 - nobody's
    record = {
        "timeUnixNano": str(now),
        "traceId": trace_id,
        "spanId": "00f067aa0ba902b7",
        "body": {"stringValue": f"signed in with {token}"},
        "attributes": attributes,
    }
    _send(world, "traces", {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})
    _send(world, "logs", {"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]})
    until(lambda: world.tempo.spans(trace_id) and world.loki.logs(trace_id), "both", 90)

    (seen,) = world.tempo.spans(trace_id)
    for found in (seen.attributes, seen.events[0].attributes, world.loki.logs(trace_id)[0].attributes):
        assert {name: found[name] for name in kept} == kept
    out = b"".join(world.left())
    assert not [word for word in ("canary-", "abcdefgh12345678", token) if word.encode() in out]


def _send(world: World, signal_: str, body: Any) -> None:
    answer = request(world.ports.http, "POST", f"/v1/{signal_}", body=body)
    assert answer.status == 200, answer.body
