"""What the end-to-end tests share."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fakes.otlp import OtlpReceiver
from tests.harness import Answer, Client, ServiceProcess

GENERATE = {"prompt": "What is a trace?"}
FIELDS = {"timestamp", "level", "message", "logger"}


def run(folder: Path, environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end in a folder, with this environment and nothing else."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def decoded(text: str) -> list[dict[str, Any]]:
    """The lines of a process, each of which must be a JSON object with the required fields."""
    lines = []
    for text_line in text.splitlines():
        line = json.loads(text_line)
        assert line.keys() >= FIELDS, text_line
        time.strptime(line["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")
        assert line["timestamp"].endswith("Z"), text_line
        assert line["level"] in {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}, text_line
        lines.append(line)
    return lines


def listens(port: int) -> bool:
    """Whether anybody accepts connections on the port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except ConnectionRefusedError:
        return False
    return True


def to_collector(receiver: OtlpReceiver, protocol: str = "http/protobuf") -> dict[str, str]:
    """The variables of a process that exports to this receiver, often."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_url if protocol == "grpc" else receiver.http_url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        **OFTEN,
    }


OFTEN = {
    "OTEL_BSP_SCHEDULE_DELAY": "100",
    "OTEL_BLRP_SCHEDULE_DELAY": "100",
    "OTEL_METRIC_EXPORT_INTERVAL": "500",
}


def generate(client: Client, token: str, **options: Any) -> Answer:
    """Ask the default model, unless a body says otherwise."""
    return client.call("POST", "/llm/generate", token=token, **{"body": GENERATE, **options})


def stopped(process: ServiceProcess) -> list[dict[str, Any]]:
    """Stop the process, which must end with status 0; all its lines."""
    assert process.stop() == 0, process.text()
    return decoded(process.text())
