"""The collector is gone or hangs: no request waits, the process stops in time, and says so in JSON."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import pytest

from tests.e2e.support import OFTEN, decoded, generate, to_collector
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import FakeUpstream, refusing_port
from tests.harness import ServiceProcess

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

CALLS = 60
MARGIN = 3.0
SHUTDOWN_TIMEOUT_S = 30.0
"""The time limit of a stop by default; a collector that is down must not come near it."""
"""The telemetry contract: with the collector down, the process still stops in less."""


@contextmanager
def broken_collector(how: str, receiver: OtlpReceiver) -> Iterator[dict[str, str]]:
    """The variables of a process whose collector is broken in this way."""
    protocol = "grpc" if "grpc" in how else "http/protobuf"
    if "hangs" in how:
        receiver.hang = True
        yield to_collector(receiver, protocol)
        return
    with refusing_port() as port:
        endpoint = f"http://127.0.0.1:{port}"
        yield {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **OFTEN}


@pytest.mark.parametrize("how", ["nothing listens", "hangs", "nothing listens, grpc", "hangs, grpc"])
def test_a_broken_collector_costs_no_request_and_no_stop(
    upstream: FakeUpstream, receiver: OtlpReceiver, how: str
) -> None:
    with OtlpReceiver() as healthy, broken_collector(how, receiver) as broken:
        # An export that is not ended by the stop would outlast it.
        common = {"LITELLM_URL": upstream.url, "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
        with (
            ServiceProcess({**common, **to_collector(healthy)}) as one,
            ServiceProcess({**common, **broken}) as other,
        ):
            processes = {"healthy": one.wait_ready(), "broken": other.wait_ready()}
            tokens = {name: process.token() for name, process in processes.items()}
            taken: dict[str, list[float]] = {name: [] for name in processes}
            # In turns, so that both have the same machine at the same time.
            for _ in range(CALLS):
                for name, process in processes.items():
                    answer = generate(process, tokens[name])
                    assert answer.status == 200
                    taken[name].append(answer.seconds)
            if "hangs" in how:
                receiver.wait_for(lambda it: it.exports > 0)
            started = time.monotonic()
            assert other.stop() == 0
            stopping_s = time.monotonic() - started
            lines = decoded(other.text())

    assert median(taken["broken"]) < MARGIN * median(taken["healthy"])
    assert stopping_s < SHUTDOWN_TIMEOUT_S
    assert any(line["message"].startswith("Graceful shutdown completed") for line in lines)
    assert any("lost" in line["message"] for line in lines), "what could not be delivered is said"
