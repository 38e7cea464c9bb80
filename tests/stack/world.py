"""The stack: real collector, Prometheus, LiteLLM and MLflow; receivers in the places of Tempo and Loki."""

import json
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Self

from deploy import backends
from deploy.child import Child
from deploy.ports import unused_port
from tests.e2e.servers import MlflowServer, Server, litellm_server
from tests.fakes.otlp import OtlpReceiver
from tests.harness import ServiceProcess
from tests.stack.api import Api, until

LITELLM_OTEL = backends.ROOT / "deploy/litellm/otel.yaml"
OFTEN = {
    "OTEL_BSP_SCHEDULE_DELAY": "200",
    "OTEL_BLRP_SCHEDULE_DELAY": "200",
    "OTEL_METRIC_EXPORT_INTERVAL": "1000",
}
"""Shorter than in production, so that a test has enough points in minutes; nothing else depends on it."""


@dataclass
class World:
    """Everything that runs, in a folder; entered, it is ready.

    Args:
        folder: For queues, databases and logs.
        with_models: Whether LiteLLM and MLflow run, too.
    """

    folder: Path
    with_models: bool = True
    tempo: OtlpReceiver = field(init=False)
    loki: OtlpReceiver = field(init=False)
    litellm: Server = field(init=False)
    mlflow: MlflowServer = field(init=False)
    litellm_variables: dict[str, str] = field(init=False)
    collector: Child = field(init=False)

    def __post_init__(self) -> None:
        self.ports = backends.Ports(*(unused_port() for _ in range(5)))
        self.api = Api(self.ports.prometheus_url)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.tempo = self._stack.enter_context(OtlpReceiver())
        self.loki = self._stack.enter_context(OtlpReceiver())
        self._stack.enter_context(backends.prometheus(self.ports, self._place("prometheus")))
        self.start_collector()
        self._stack.callback(self._stop_collector)
        if self.with_models:
            self.mlflow = MlflowServer(self._place("mlflow"))
            otlp = {
                "LITELLM_OTEL_V2": "true",
                "OTEL_SERVICE_NAME": "litellm",
                "OTEL_EXPORTER_OTLP_ENDPOINT": self.ports.otlp,
            }
            self.litellm, self.litellm_variables = litellm_server(self._place("litellm"), LITELLM_OTEL, otlp)
            # Both take a while to start; they do so at the same time.
            for server in (self.mlflow, self.litellm):
                self._stack.push(server.__exit__)
                server.start()
            for server in (self.mlflow, self.litellm):
                server.wait_ready()
        self.api.wait_ready()

    def _place(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir(exist_ok=True)
        return place

    def start_collector(self) -> None:
        """Start the collector, with the queues that an earlier one left."""
        self.collector = backends.collector(
            self.ports,
            self._place("collector"),
            {
                "TEMPO_ENDPOINT": self.tempo.grpc_url.removeprefix("http://"),
                "LOKI_ENDPOINT": self.loki.http_url,
            },
        )
        until(self._collector_answers, "the collector to be ready")

    def kill_collector(self) -> None:
        """End the collector as nobody would wish; its queues stay."""
        self.collector.send(signal.SIGKILL)
        self.collector.wait(10)

    def _stop_collector(self) -> None:
        # Not the one of the start: it may have been replaced meanwhile.
        self.collector.stop()

    def _collector_answers(self) -> bool:
        self.collector.raise_if_ended()
        connection = HTTPConnection(backends.HOST, self.ports.health, timeout=2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def service(
        self, variables: Mapping[str, str], arguments: tuple[str, ...] = ("-m", "service")
    ) -> ServiceProcess:
        """A process of the service that exports to the collector; it is not started yet."""
        exporting = {"OTEL_EXPORTER_OTLP_ENDPOINT": self.ports.otlp, **OFTEN}
        return ServiceProcess({**exporting, **variables}, arguments)

    def left(self) -> list[bytes]:
        """All that left the collector for Tempo and Loki, as it was on the wire."""
        return self.tempo.raw + self.loki.raw

    def collector_log(self) -> list[dict[str, object]]:
        """What the collector said."""
        text = (self.folder / "collector/collector.log").read_text(encoding="utf-8", errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
