"""Starts the collector and Prometheus on this machine, with the files of `otel/`.

`make stack-test` and `make demo-stack` use it. The files are those that docker-compose.yml mounts; only the
addresses and folders of the containers are replaced.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from deploy.child import Child

ROOT: Final = Path(__file__).resolve().parents[1]
OTEL: Final = ROOT / "otel"
BINARIES: Final = ROOT / ".stack/bin"
HOST: Final = "127.0.0.1"

_STOP_TIMEOUT_S: Final = 10
_SCRAPED: Final = ("collector:8888", "localhost:9090", "tempo:3200", "loki:3100", "grafana:3000")


@dataclass(frozen=True)
class Ports:
    """The ports of the two programs on the loopback address."""

    grpc: int
    http: int
    health: int
    metrics: int
    prometheus: int

    @property
    def otlp(self) -> str:
        """The collector's endpoint for OTLP/HTTP."""
        return f"http://{HOST}:{self.http}"

    @property
    def prometheus_url(self) -> str:
        """The base URL of Prometheus's API."""
        return f"http://{HOST}:{self.prometheus}"


def with_addresses(text: str, addresses: Mapping[str, str]) -> str:
    """Return a configuration with addresses replaced and nothing else changed.

    Raises:
        LookupError: One of the addresses is not in the text: it was renamed.
    """
    for address in addresses:
        if address not in text:
            raise LookupError(f"{address} is not in the configuration")
    # The longest first, because one address may be a prefix of another.
    for address in sorted(addresses, key=len, reverse=True):
        text = text.replace(address, addresses[address])
    return text


def compose_command(service: str) -> list[str]:
    """Return the arguments with which docker-compose.yml starts a service."""
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return [str(argument) for argument in compose["services"][service]["command"]]


def collector(
    ports: Ports, folder: Path, backends: Mapping[str, str], *, overlays: tuple[Path, ...] = ()
) -> Child:
    """Start the collector.

    Args:
        ports: The ports that it listens on.
        folder: The folder of its queues and its log.
        backends: The variables of `otel/collector.yaml` that name Tempo, Loki and Prometheus.
        overlays: Configurations that are merged over it.
    """
    return Child(
        "The collector",
        [str(BINARIES / "otelcol"), *(f"--config={path}" for path in (OTEL / "collector.yaml", *overlays))],
        env={
            "COLLECTOR_GRPC": f"{HOST}:{ports.grpc}",
            "COLLECTOR_HTTP": f"{HOST}:{ports.http}",
            "COLLECTOR_HEALTH": f"{HOST}:{ports.health}",
            "COLLECTOR_METRICS_HOST": HOST,
            "COLLECTOR_METRICS_PORT": str(ports.metrics),
            "COLLECTOR_QUEUES": str(folder / "queues"),
            "PROMETHEUS_ENDPOINT": f"{ports.prometheus_url}/api/v1/otlp",
            **backends,
        },
        log=folder / "collector.log",
        stop_timeout_s=_STOP_TIMEOUT_S,
    )


def prometheus(ports: Ports, folder: Path) -> Child:
    """Start Prometheus with the rules; its data, configuration and log are in the folder."""
    scraped = {
        "collector:8888": f"{HOST}:{ports.metrics}",
        "localhost:9090": f"{HOST}:{ports.prometheus}",
        # Services that do not run here: scraping them fails, as it does while they are down.
        **dict.fromkeys(_SCRAPED[2:], f"{HOST}:9"),
    }
    configuration = with_addresses((OTEL / "prometheus.yaml").read_text(encoding="utf-8"), scraped)
    (folder / "prometheus.yaml").write_text(configuration, encoding="utf-8")
    shutil.copytree(OTEL / "rules", folder / "rules", dirs_exist_ok=True)
    inside = {"/etc/prometheus": str(folder), "/prometheus": str(folder / "prometheus")}
    return Child(
        "Prometheus",
        [
            str(BINARIES / "prometheus"),
            *(_moved(argument, inside) for argument in compose_command("prometheus")),
            f"--web.listen-address={HOST}:{ports.prometheus}",
        ],
        env={},
        log=folder / "prometheus.log",
        stop_timeout_s=_STOP_TIMEOUT_S,
    )


def _moved(argument: str, folders: Mapping[str, str]) -> str:
    name, equals, value = argument.partition("=")
    for inside, outside in folders.items():
        if value == inside or value.startswith(f"{inside}/"):
            return f"{name}{equals}{outside}{value.removeprefix(inside)}"
    return argument
