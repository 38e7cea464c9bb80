"""The services of one profile, brought up in the order that docker-compose.yml asks for."""

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final, Self

import yaml

from deploy import env_file
from deploy.backends import ROOT
from deploy.ports import unused_port
from tests.compose.engine import HERE, Engine, until

SLOW_S: Final = 5
_UNIT_S: Final = {"s": 1.0, "m": 60.0}
_SLOW_MODEL: Final = f"""\
  - model_name: slow
    litellm_params: {{model: openai/slow, api_key: none, mock_response: At last., mock_delay: {SLOW_S}}}
"""


def seconds(text: str) -> float:
    """A duration of the file, like 45s."""
    return float(text[:-1]) * _UNIT_S[text[-1]]


def new_settings(**settings: str) -> dict[str, str]:
    """A ``.env`` as ``make env`` writes it, with free ports."""
    made = {name: make() for name, make in env_file.COMPOSE.items()}
    ports = {name: str(unused_port()) for name in ("PORT", "MLFLOW_PORT", "GRAFANA_PORT")}
    return made | ports | settings


class Stack:
    """One profile under podman-compose; the context removes its containers and volumes.

    podman-compose 1.6 takes a dependency that is not in the profile for an error although it is not required,
    and does not wait for health with this Podman. So it gets a copy of the file without dependencies and
    builds, creates the containers, and they are started here, by the conditions of the file itself.
    """

    def __init__(
        self, engine: Engine, composed: Mapping[str, Any], profile: str, settings: Mapping[str, str]
    ) -> None:
        self.engine = engine
        self.profile = profile
        self.settings = settings
        self.project = f"compose-test-{profile}-{secrets.token_hex(3)}"
        self.services: dict[str, Any] = {
            name: service
            for name, service in composed["services"].items()
            if profile in service.get("profiles", [profile])
        }
        self._folder = HERE / self.project
        self.file = self._folder / "docker-compose.yml"
        self._write(composed)

    def _write(self, composed: Mapping[str, Any]) -> None:
        self._folder.mkdir()
        models = self._folder / "litellm"
        shutil.copytree(ROOT / "deploy/litellm", models)
        with_slow = (
            (models / "config.yaml").read_text().replace("model_list:\n", f"model_list:\n{_SLOW_MODEL}")
        )
        (models / "config.yaml").write_text(with_slow)
        sources = {"./deploy/litellm": str(models)}
        services = {}
        for name, service in self.services.items():
            kept = {
                key: value for key, value in service.items() if key not in {"build", "depends_on", "profiles"}
            }
            kept["volumes"] = [_absolute(volume, sources) for volume in service.get("volumes", ())]
            services[name] = kept
        everything = {"services": services, "networks": composed["networks"], "volumes": composed["volumes"]}
        self.file.write_text(yaml.safe_dump(everything))
        lines = [f"{name}={value}\n" for name, value in self.settings.items()]
        (self._folder / ".env").write_text("".join(lines))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.compose("down", "--volumes")
        shutil.rmtree(self._folder)

    def compose(self, *arguments: str) -> str:
        """Run podman-compose; its output, with the exit status in the last line."""
        done = self.engine.compose(self.file, self.project, {}, *arguments)
        return f"{done.stdout}\nexit status {done.returncode}"

    def container(self, service: str) -> str:
        """The container's name."""
        return f"{self.project}_{service}_1"

    def create(self) -> str:
        """Create the containers; what is to be said of it.

        Raises:
            AssertionError: podman-compose refused.
        """
        said = self.compose("up", "--no-start", "--no-build")
        assert said.endswith("exit status 0"), said[-1500:]
        return f"{len(self.services)} containers"

    def order(self) -> list[str]:
        """The services, each after those that it depends on."""
        found: list[str] = []

        def visit(name: str) -> None:
            for other in self.services[name].get("depends_on", {}):
                if other in self.services:
                    visit(other)
            if name not in found:
                found.append(name)

        for name in self.services:
            visit(name)
        return found

    def start(self, service: str, good: set[str]) -> str:
        """Start one and wait until it is what its dependants wait for; what is to be said of it.

        Raises:
            AssertionError: It is not, or one of those that it depends on is not.
        """
        absent = [
            name
            for name, how in self.services[service].get("depends_on", {}).items()
            if how.get("required", True) and name not in good
        ]
        assert not absent, f"not started: {', '.join(absent)} did not come up"
        begun = time.monotonic()
        self.engine.podman("start", self.container(service))
        if service == "check":
            status = self.engine.podman("wait", self.container(service)).strip()
            assert status == "0", f"exit status {status}: {self._last_lines(service)}"
            return f"ended with 0 after {time.monotonic() - begun:.1f} s"
        return self.wait_healthy(service)

    def wait_healthy(self, service: str) -> str:
        """Wait as long as its health check allows; what is to be said of it.

        Raises:
            AssertionError: It did not get healthy, or ended.
        """
        checked = self.services[service].get("healthcheck")
        limit_s = 60.0
        if checked:
            limit_s = seconds(checked["start_period"]) + seconds(checked["interval"]) * checked["retries"]

        def well() -> bool:
            state = self.engine.inspect(self.container(service))["State"]
            assert state["Running"], f"ended with {state['ExitCode']}: {self._last_lines(service)}"
            if checked:
                return self.engine.succeeds("healthcheck", "run", self.container(service))
            return "Everything is ready" in "\n".join(self.engine.logs(self.container(service)))

        took_s = until(well, f"{service} healthy", limit_s)
        return (
            f"after {took_s:.1f} s of {limit_s:.0f}"
            if checked
            else f"says that it is ready after {took_s:.1f} s"
        )

    def _last_lines(self, service: str) -> str:
        return " ".join(self.engine.logs(self.container(service))[-2:])[-300:]

    def child_pid(self, service: str) -> int:
        """The process that init started."""
        pid = self.engine.process(self.container(service)).pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def volume(self, name: str) -> Path:
        """Where a volume is on this machine."""
        return self.engine.volume(f"{self.project}_{name}")

    def port(self, name: str) -> int:
        """A published port."""
        return int(self.settings[name])


def _absolute(volume: str, sources: Mapping[str, str]) -> str:
    source, rest = volume.split(":", 1)
    if not source.startswith("./"):
        return volume
    return f"{sources.get(source, f'{ROOT}/{source[2:]}')}:{rest}"


def is_reachable(host: str, port: int) -> bool:
    """Whether anybody answers there."""
    connection = HTTPConnection(host, port, timeout=2)
    try:
        connection.connect()
    except OSError:
        return False
    connection.close()
    return True


def kill(pid: int) -> None:
    """End a process as a crash would."""
    os.kill(pid, 9)
