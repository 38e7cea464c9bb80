"""Real servers beside the service, which die, freeze and come back as a test wants."""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from deploy.ports import unused_port
from tests.harness import request

START_LIMIT_S = 120.0
NO_EXPERIMENT = "none"
LITELLM_CONFIG = Path(__file__).parents[2] / "deploy/litellm/config.yaml"


class Server:
    """A server in a process group of its own.

    Args:
        name: Of its executable's variable, without ``_BIN``.
        arguments: Of its executable.
        ready: The path that answers 200 when it serves.
        port: Where it listens.
        folder: Its working directory, which outlives it.
        environment: What it finds there, beside PATH and HOME.
    """

    def __init__(  # noqa: PLR0913 - a process has so many parts
        self,
        name: str,
        arguments: Sequence[str],
        *,
        ready: str,
        port: int,
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        binary = os.environ.get(f"{name}_BIN")
        if not binary:
            pytest.fail(f"{name}_BIN must name an executable; `make test` installs it and sets the variable")
        self._name = name
        self._command = [binary, *arguments]
        self._ready = ready
        self.port = port
        self._folder = folder
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the same port as before."""
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until it serves."""
        assert self._process is not None
        end = time.monotonic() + START_LIMIT_S
        while True:
            with suppress(OSError):
                if request(self.port, "GET", self._ready, timeout_s=5).status == 200:
                    return
            if self._process.poll() is not None or time.monotonic() > end:
                tail = (self._folder / "output").read_text(errors="replace")[-2_000:]
                pytest.fail(f"{self._name} does not serve; the end of its output:\n{tail}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End it, and all its processes, at once."""
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def freeze(self) -> None:
        """Let it do nothing, and hold its connections."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def litellm_server(
    folder: Path, config: Path = LITELLM_CONFIG, environment: Mapping[str, str] | None = None
) -> tuple[Server, dict[str, str]]:
    """A LiteLLM proxy with the demo's configuration, or another; and what the service must know to use it."""
    key = f"sk-{secrets.token_hex(24)}"
    port = unused_port()
    proxy = Server(
        "LITELLM",
        ["--config", str(config), "--host", "127.0.0.1", "--port", str(port)],
        ready="/health/readiness",
        port=port,
        folder=folder,
        environment={
            "LITELLM_API_KEY": key,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MODE": "PRODUCTION",
            **(environment or {}),
        },
    )
    return proxy, {"LITELLM_URL": proxy.url, "LITELLM_API_KEY": key}


@dataclass(frozen=True)
class StoredSpan:
    """A span as MLflow returns it; the parent's id is empty on a root."""

    name: str
    span_id: str
    parent: str
    start_ns: int
    end_ns: int
    status: str
    attributes: dict[str, Any]


class MlflowServer(Server):
    """A real MLflow server on a database of its own, and what its API says."""

    def __init__(self, folder: Path) -> None:
        port = unused_port()
        arguments = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        stores = [
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--default-artifact-root",
            str(folder),
        ]
        super().__init__(
            "MLFLOW",
            [*arguments, *stores],
            ready="/api/2.0/mlflow/experiments/search?max_results=1",
            port=port,
            folder=folder,
            environment={"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the REST API; the decoded answer."""
        answer = request(self.port, method, f"/api/{path}", body=body)
        assert answer.status == 200, answer.body
        return answer.json

    def experiment_id(self, name: str) -> str:
        """The experiment of this name; one that nobody has made yet has no runs."""
        found = self.api("POST", "2.0/mlflow/experiments/search", {"max_results": 100})["experiments"]
        return next((str(one["experiment_id"]) for one in found if one["name"] == name), NO_EXPERIMENT)

    def runs(self, experiment: str) -> list[Any]:
        """The runs of an experiment, oldest first."""
        identifier = self.experiment_id(experiment)
        if identifier == NO_EXPERIMENT:
            return []
        asked = {"experiment_ids": [identifier], "order_by": ["attributes.start_time"]}
        found: list[Any] = self.api("POST", "2.0/mlflow/runs/search", asked).get("runs", [])
        return found

    def statuses(self, experiment: str) -> list[str]:
        """How the runs of an experiment stand, oldest first."""
        return [run["info"]["status"] for run in self.runs(experiment)]

    def traces(self, experiment: str, query: str = "") -> list[Any]:
        """The traces of an experiment, as MLflow's page asks for them."""
        place = {"type": "MLFLOW_EXPERIMENT"}
        if (identifier := self.experiment_id(experiment)) == NO_EXPERIMENT:
            return []
        place["mlflow_experiment"] = {"experiment_id": identifier}  # type: ignore[assignment]  # nested
        asked: dict[str, Any] = {"locations": [place], "max_results": 500, "filter": query}
        found: list[Any] = []
        while True:
            page = self.api("POST", "3.0/mlflow/traces/search", asked)
            found += page.get("traces", [])
            if not page.get("next_page_token"):
                return found
            asked["page_token"] = page["next_page_token"]

    def tree(self, record_id: str) -> list[StoredSpan]:
        """The spans of a record, by their start; the root is the first one."""
        found = self.api("GET", f"3.0/mlflow/traces/get?trace_id=tr-{record_id}")["trace"]["spans"]
        spans = [
            StoredSpan(
                span["name"],
                span["span_id"],
                span.get("parent_span_id", ""),
                int(span["start_time_unix_nano"]),
                int(span["end_time_unix_nano"]),
                span["status"]["code"],
                {entry["key"]: _plain(entry["value"]) for entry in span["attributes"]},
            )
            for span in found
        ]
        return sorted(spans, key=lambda span: (bool(span.parent), span.start_ns, -span.end_ns))


def _plain(value: dict[str, Any]) -> Any:
    (found,) = value.values()
    return found
