"""`make demo-stack`: the demo with the collector and Prometheus of `otel/`, without Docker.

Tempo, Loki and Grafana do not exist as packages; the collector writes to files what it would send to the
first two.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from deploy import backends, demo
from deploy.backends import HOST, Ports
from deploy.child import DemoError

FOLDER: Final = demo.LOGS / "stack"
OVERLAY: Final = """\
exporters:
  file/traces:
    path: {folder}/traces.jsonl
  file/logs:
    path: {folder}/logs.jsonl
service:
  pipelines:
    traces:
      exporters: [file/traces]
    logs:
      exporters: [file/logs]
"""
EXPORTS_S: Final = 15
"""Longer than the batch intervals of the service and the collector together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with its telemetry; return the same status as the demo."""
    parser = argparse.ArgumentParser(prog="make demo-stack", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the one call")
    parser.add_argument("--port", type=int, help="the service's port, when free (default: PORT, or 8000)")
    arguments = parser.parse_args(argv)
    demo.obey_signals()
    FOLDER.mkdir(parents=True, exist_ok=True)
    overlay = FOLDER / "files.yaml"
    overlay.write_text(OVERLAY.format(folder=FOLDER), encoding="utf-8")
    ports = Ports(*(demo.free_port(port) for port in (4317, 4318, 13133, 8888, 9090)))
    try:
        with ExitStack() as stack:
            stack.enter_context(backends.prometheus(ports, FOLDER))
            stack.enter_context(backends.collector(ports, FOLDER, {}, overlays=(overlay,)))
            demo.run(
                arguments.port,
                _telemetry(ports),
                lambda request_id: _show(ports, request_id),
                once=arguments.once,
            )
    except DemoError as error:
        sys.stderr.write(f"\nThe demo failed: {error}\nThe logs are in .demo/\n")
        return 1
    return 0


def _telemetry(ports: Ports) -> dict[str, str]:
    """Return the variables for the service and LiteLLM."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": ports.otlp,
        "OTEL_METRIC_EXPORT_INTERVAL": "5000",
        "LITELLM_CONFIG": str(backends.ROOT / "deploy/litellm/otel.yaml"),
    }


def _show(ports: Ports, request_id: str) -> None:
    """Print where the telemetry of the call is."""
    print("\nWaiting for the collector to export the log records", flush=True)
    end = time.monotonic() + EXPORTS_S
    while time.monotonic() < end and request_id not in _text(FOLDER / "logs.jsonl"):
        time.sleep(0.5)
    folder = FOLDER.relative_to(backends.ROOT)
    print(
        f"""
Where to look (Prometheus's pages are not part of its Go module; its API answers all the same):

  metrics         curl -s '{ports.prometheus_url}/api/v1/query?query=llmops_llm_calls_total' | jq
  alerts          curl -s '{ports.prometheus_url}/api/v1/rules?type=alert' | jq
  log records     grep {request_id} {folder}/logs.jsonl
  traces          {folder}/traces.jsonl (failed, slow or retried, and a fifth of the rest)
  the collector   http://{HOST}:{ports.metrics}/metrics""",
        flush=True,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
