"""Who is measured: the service in several settings, the peers, and what both are built from."""

import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from deploy.ports import unused_port
from tests.bench.http_load import COUNTER, Load, Measured, Plan
from tests.fakes.mlflow import FakeMlflow
from tests.harness import ROOT, ServiceProcess, request

PORTKEY = ROOT / ".bench/node_modules/@portkey-ai/gateway/build/start-server.js"
START_LIMIT_S = 120.0
SETTLE_LIMIT_S = 8.0
SETTLE_STEP_S = 0.4
IDLE_SHARE = 0.1
QUESTION = f"What is a trace? {COUNTER}"
CHAT = json.dumps({"model": "demo", "messages": [{"role": "user", "content": QUESTION}]})
GENERATE = json.dumps({"prompt": QUESTION})
ALWAYS_THE_SAME = json.dumps({"prompt": "What is a trace?"})

LITELLM_CONFIG = """
model_list:
  - model_name: demo
    litellm_params: {model: openai/demo, api_base: %(upstream)s/v1, api_key: none}
litellm_settings: {num_retries: 0, request_timeout: 30, telemetry: false}
router_settings: {num_retries: 0}
general_settings: {master_key: os.environ/LITELLM_API_KEY}
"""

OBSERVED_LITELLM = "LiteLLM proxy, with telemetry"
OBSERVED_LITELLM_CONFIG = LITELLM_CONFIG.replace(
    "telemetry: false}", "telemetry: false, json_logs: true, callbacks: [otel, prometheus]}"
)
"""With its spans and metrics over OTLP, its Prometheus metrics, and its log lines as JSON."""


@dataclass
class Side:
    """A running process, and the request that it is sent.

    Args:
        name: What it is called in the tables.
        port: Where it listens.
        pid: Its process; 0 where its cost is nobody's business.
        path: Where the request goes.
        body: The request's body.
        headers: Its header fields; several sets are taken in turns.
        events: So many server-sent events an answer must have.
    """

    name: str
    port: int
    pid: int = 0
    path: str = "/v1/chat/completions"
    body: str = CHAT
    headers: list[dict[str, str]] = field(default_factory=lambda: [{}])
    events: int = 0
    number: int = 0

    def plan(self, connections: int, seconds: float, calls: int = 0) -> Plan:
        """So many connections for so long; no number stands in two requests."""
        self.number += 10_000_000 // 100
        return Plan(
            self.port,
            "POST",
            self.path,
            self.headers,
            self.body,
            connections,
            seconds,
            calls,
            self.number % 99_000_000,
        )

    def ask(self, load: Load, connections: int, seconds: float, calls: int = 0) -> Measured:
        """Send the request again and again.

        Raises:
            RuntimeError: Something was answered with another status than 200.
        """
        measured = load.measure(self.plan(connections, seconds, calls))
        if measured.failures or not measured.calls:
            raise RuntimeError(f"{self.name}: {measured.calls} answers, and {measured.failures}")
        if measured.events < self.events * measured.calls:
            raise RuntimeError(f"{self.name}: {measured.events} events in {measured.calls} answers")
        return measured

    def settle(self) -> None:
        """Wait until it has done what it left for after the answers: that belongs to its own turn."""
        if not self.pid:
            return
        end = time.monotonic() + SETTLE_LIMIT_S
        seen_s = self.cpu_s
        while time.monotonic() < end:
            time.sleep(SETTLE_STEP_S)
            before_s, seen_s = seen_s, self.cpu_s
            if seen_s - before_s <= IDLE_SHARE * SETTLE_STEP_S:
                return

    @property
    def cpu_s(self) -> float:
        """The processor time that the process and those below it have used so far."""
        ticks = 0
        for pid in _family(self.pid):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(stat[11]) + int(stat[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def rss_mib(self) -> float:
        """The memory that the process holds, without those below it."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _family(pid: int) -> Iterator[int]:
    yield pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        yield from _family(int(child))


def service(  # noqa: PLR0913 - what the rows of the tables differ in
    stack: ExitStack,
    name: str,
    variables: Mapping[str, str],
    *,
    body: str = GENERATE,
    secret_of: Callable[[ServiceProcess], str] = ServiceProcess.token,
    tree: Path = ROOT,
) -> Side:
    """The service of a tree, by its own interpreter, with these settings, ready and signed in."""
    process = started(stack, variables, tree)
    # Killed, as leaving it does, it would leave its workers behind.
    stack.callback(process.stop)
    process.wait_ready(START_LIMIT_S)
    assert process.process is not None
    side = Side(name, process.port, process.process.pid, "/llm/generate", body)
    side.headers = [{"Authorization": f"Bearer {secret_of(process)}"}]
    return side


def started(stack: ExitStack, variables: Mapping[str, str], tree: Path = ROOT) -> ServiceProcess:
    """The process of a tree's service. Another tree has an environment of its own in ``.venv``."""
    # Its own, as another tree may know another schema.
    own = secrets.token_hex(4)
    folder = Path(variables["SPOOL_PATH"])
    process = ServiceProcess({**variables, "SPOOL_PATH": f"{folder}-{own}"})
    process.environment["PYTHONPATH"] = str(tree)
    mine = sys.executable
    if tree != ROOT:
        process.environment["DATABASE_URL"] = f"sqlite:///{folder}-{own}.db"
        sys.executable = str(tree / ".venv/bin/python")
    try:
        return stack.enter_context(process)
    finally:
        sys.executable = mine


def limited_key(process: ServiceProcess) -> str:
    """An API key with a rate and a budget, of a user and a team that have theirs."""
    admin = process.token("admin")
    limits = {"rate": "1000000/second", "budget": {"amount": 1e6, "unit": "usd", "period": "month"}}
    key = {"name": "bench", "owner": "bench", "team": "bench", **limits}
    for method, path, body in (
        ("PUT", "/teams/bench", limits),
        ("PUT", "/users/bench", limits),
        ("POST", "/keys", key),
    ):
        answer = process.call(method, path, body=body, token=admin)
        if answer.status >= HTTPStatus.MULTIPLE_CHOICES:
            raise RuntimeError(f"{method} {path}: {answer.status} {answer.body!r}")
    return str(answer.json["key"])


class UnreadMlflow(FakeMlflow):
    """Takes spans without reading them: a real server's work is done on other cores than the service's."""

    def take_spans(self, headers: Mapping[str, str], body: bytes) -> int:
        """Answer 200."""
        del headers, body
        return 200


def _serve_mlflow(urls: Connection) -> None:
    with UnreadMlflow() as fake:
        urls.send(fake.url)
        signal.pause()


def mlflow(stack: ExitStack) -> tuple[BaseProcess, str]:
    """An MLflow that takes everything, in a process of its own: the process and its URL."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    running = fork.Process(target=_serve_mlflow, args=(there,))
    running.start()
    stack.callback(running.join)
    stack.callback(running.kill)
    return running, here.recv()


def everything_on(stack: ExitStack, upstream: int, folder: Path) -> dict[str, str]:
    """The settings of the service with all that it has; the recorder sends to an MLflow that takes all."""
    return {
        "LITELLM_URL": f"http://127.0.0.1:{upstream}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{upstream}",
        "MLFLOW_TRACKING_URI": mlflow(stack)[1],
        "SPOOL_PATH": str(folder / secrets.token_hex(4)),
        "RATE_LIMIT": "100000000/minute",
        # What waits for its turn is sent soon after the answers, so that it counts for the right turn.
        "OTEL_BSP_SCHEDULE_DELAY": "300",
        "OTEL_BLRP_SCHEDULE_DELAY": "300",
        "QDRANT_PATH": ":memory:",
    }


def without(variables: Mapping[str, str], *names: str, **more: str) -> dict[str, str]:
    """The settings without some, and with others."""
    return {name: value for name, value in variables.items() if name not in names} | more


@contextmanager
def process(
    command: list[str], folder: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a folder until the block ends, its output beside it."""
    with Path(folder, f"{Path(command[0]).name}-{secrets.token_hex(2)}.log").open("wb") as output:
        running = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def await_answer(port: int, method: str, path: str, running: subprocess.Popen[bytes]) -> None:
    """Wait until the program answers anything."""
    end = time.monotonic() + START_LIMIT_S
    while True:
        try:
            if request(port, method, path, timeout_s=5).status < 500:
                return
        except OSError:
            pass
        if running.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{running.args!r} does not answer")
        time.sleep(0.1)


def bare(stack: ExitStack, upstream: int, folder: Path) -> list[Side]:
    """FastAPI answering by itself, and FastAPI with the SDK and nothing else."""
    port = unused_port()
    command = [
        *(sys.executable, "-m", "uvicorn", "tests.bench.bare:app", "--port", str(port), "--no-access-log"),
        *("--log-level", "error", "--loop", "uvloop", "--http", "httptools"),
    ]
    variables = {"BENCH_UPSTREAM_URL": f"http://127.0.0.1:{upstream}", "PYTHONPATH": str(ROOT)}
    running = stack.enter_context(process(command, folder, variables))
    await_answer(port, "GET", "/", running)
    return [
        Side("FastAPI alone", port, running.pid, "/noop", "{}"),
        Side("FastAPI + AsyncOpenAI", port, running.pid),
        Side("FastAPI + the SDK's lowest layer", port, running.pid, "/lowest"),
    ]


def litellm(stack: ExitStack, binary: Path, upstream: int, folder: Path) -> list[Side]:
    """LiteLLM's proxy in front of the upstream, without telemetry and with what this service has."""
    address = f"http://127.0.0.1:{upstream}"
    quiet = {"LITELLM_LOG": "ERROR"}
    observed = {
        "LITELLM_LOG": "INFO",
        "LITELLM_OTEL_V2": "true",
        "LITELLM_OTEL_INTEGRATION_ENABLE_METRICS": "true",
        "OTEL_EXPORTER": "otlp_http",
        "OTEL_ENDPOINT": address,
        "OTEL_EXPORTER_OTLP_ENDPOINT": address,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    }
    return [
        _litellm(stack, "LiteLLM proxy", binary, folder, LITELLM_CONFIG % {"upstream": address}, quiet),
        _litellm(
            stack, OBSERVED_LITELLM, binary, folder, OBSERVED_LITELLM_CONFIG % {"upstream": address}, observed
        ),
    ]


def _litellm(  # noqa: PLR0913, PLR0917 - two rows that differ in these
    stack: ExitStack, name: str, binary: Path, folder: Path, settings: str, variables: Mapping[str, str]
) -> Side:
    port, key = unused_port(), f"sk-{secrets.token_hex(24)}"
    config = folder / f"litellm-{port}.yaml"
    config.write_text(settings)
    command = [str(binary.absolute()), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    common = {"LITELLM_API_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    running = stack.enter_context(process(command, folder, {**common, **variables}))
    await_answer(port, "GET", "/health/readiness", running)
    return Side(name, port, running.pid, headers=[{"Authorization": f"Bearer {key}"}])


def portkey(stack: ExitStack, upstream: int, folder: Path) -> Side:
    """Portkey's gateway in front of the upstream: no sign-in, no telemetry."""
    port = unused_port()
    command = ["node", str(PORTKEY), f"--port={port}", "--headless"]
    running = stack.enter_context(process(command, folder, {"TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}))
    await_answer(port, "GET", "/", running)
    headers = {
        "Authorization": "Bearer none",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"http://127.0.0.1:{upstream}/v1",
    }
    return Side("Portkey gateway", port, running.pid, headers=[headers])
