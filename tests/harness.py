"""The service as tests run it: the app in a thread with its telemetry in memory, or the real process."""

import asyncio
import atexit
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self

import argon2
import uvicorn
from fastapi import FastAPI
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_trace_id
from pydantic import SecretStr

from deploy.ports import unused_port
from service.app import create_app
from service.config.logging import configure_logging
from service.config.settings import Settings
from service.identity.database import prepare_database
from service.protocol import Protocol
from service.telemetry.providers import Exporters, Telemetry, build_telemetry

START_LIMIT_S = 30.0
ROOT = Path(__file__).resolve().parent.parent


def new_secrets() -> dict[str, str]:
    """The required settings, with values that nobody has seen before."""
    return {
        "jwt_secret_key": secrets.token_hex(32),
        "auth_admin_password": f"admin-{secrets.token_hex(8)}",
        "auth_user_password": f"user-{secrets.token_hex(8)}",
    }


def make_settings(**values: Any) -> Settings:
    """Settings from these values and the defaults; no ``.env`` is read.

    Retries, breaker and cache stay out of the way unless a test asks for them: most tests put one question
    again and again, and want the model to be asked.
    """
    quiet = {
        "retry_max": 0,
        "breaker_failure_threshold": 1_000,
        "qdrant_path": ":memory:",
        "database_url": "sqlite://",
        "cache_enabled": False,
    }
    return Settings(_env_file=None, **{**new_secrets(), **quiet, **values})


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)

    @property
    def request_id(self) -> str:
        """The header, which every answer has."""
        return self.headers["x-request-id"]


def request(  # noqa: PLR0913 - a request has so many parts
    port: int,
    method: str,
    path: str,
    *,
    body: Any = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 30,
) -> Answer:
    """Send one request on a connection of its own."""
    sent = dict(headers or {})
    if body is not None:
        sent.setdefault("Content-Type", "application/json")
        body = body if isinstance(body, (bytes, Iterator)) else json.dumps(body).encode()
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    started = time.perf_counter()
    try:
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        read = response.read()
    finally:
        connection.close()
    return Answer(
        response.status,
        {name.lower(): value for name, value in response.getheaders()},
        read,
        time.perf_counter() - started,
    )


class Client:
    """Talks to a service on a port of this machine."""

    port: int
    passwords: Mapping[str, str]

    def call(self, method: str, path: str, **options: Any) -> Answer:
        """Send one request; options as for ``request``."""
        return request(self.port, method, path, **options)

    def token(self, user: str = "user") -> str:
        """Sign in."""
        answer = self.call("POST", "/auth/login", body={"username": user, "password": self.passwords[user]})
        assert answer.status == 200, answer.body
        return str(answer.json["access_token"])

    def api_key(self, user: str = "user") -> str:
        """Make an API key, as people put it into their clients."""
        answer = self.call("POST", "/keys", body={"name": "client"}, token=self.token(user))
        assert answer.status == 201, answer.body
        return str(answer.json["key"])


@dataclass
class AppUnderTest(Client):
    """The app, served by a real uvicorn in a thread of this process."""

    app: FastAPI
    settings: Settings
    telemetry: Telemetry
    spans_out: InMemorySpanExporter
    metrics_out: InMemoryMetricReader
    logs_out: InMemoryLogRecordExporter
    stdout: io.StringIO
    port: int = 0
    passwords: Mapping[str, str] = field(default_factory=dict)

    def spans(self, trace_id: str | None = None) -> list[ReadableSpan]:
        """The finished spans, in the order of their start."""
        self.telemetry.tracer_provider.force_flush()
        found = [
            span
            for span in self.spans_out.get_finished_spans()
            if trace_id is None or format_trace_id(span.context.trace_id) == trace_id
        ]
        return sorted(found, key=lambda span: span.start_time or 0)

    def records(self) -> list[ReadableLogRecord]:
        """What went over the bridge."""
        assert self.telemetry.logger_provider is not None
        self.telemetry.logger_provider.force_flush()
        return list(self.logs_out.get_finished_logs())

    def lines(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """The lines on stdout, decoded."""
        lines = [json.loads(line) for line in self.stdout.getvalue().splitlines()]
        return [line for line in lines if request_id is None or line.get("request_id") == request_id]

    def points(self, name: str) -> list[NumberDataPoint | HistogramDataPoint]:
        """The metric's data points now."""
        data = self.metrics_out.get_metrics_data()
        return [
            point  # type: ignore[misc]  # exponential histograms are not in use
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def value(self, name: str, **attributes: str) -> float:
        """The sum of a counter (of a histogram: its count) over the points with these attributes."""
        total = 0.0
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        for point in self.points(name):
            if wanted.items() <= dict(point.attributes or {}).items():
                total += point.value if isinstance(point, NumberDataPoint) else point.count
        return total


def _with_cheap_hashes(settings: Settings) -> tuple[Settings, dict[str, str]]:
    """The settings with the passwords' hashes in their place, and the passwords.

    A hash brings its own parameters, and these cost nothing: with the service's own, an app spends more time
    on hashing than on all the rest of its start. `ServiceProcess` gives its passwords in plain.
    """
    passwords = {
        "admin": settings.auth_admin_password.get_secret_value(),
        "user": settings.auth_user_password.get_secret_value(),
    }
    hasher = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    hashes = {f"auth_{user}_password": SecretStr(hasher.hash(word)) for user, word in passwords.items()}
    return settings.model_copy(update=hashes), passwords


class _Server(uvicorn.Server):
    """uvicorn's server, which looks every 10 ms whether it is to stop, as thousands of tests wait for it."""

    async def main_loop(self) -> None:
        """Run until the server is to stop."""
        while not await self.on_tick(0):  # noqa: ASYNC110 - what uvicorn offers is a flag
            await asyncio.sleep(0.01)


@contextmanager
def running_app(
    app_setup: Any = None, protocol: type[Protocol] = Protocol, **values: Any
) -> Iterator[AppUnderTest]:
    """Serve the app in a thread until the block ends.

    Args:
        app_setup: Called with the app before it is served, for routes that only a test has.
        protocol: The HTTP protocol, where a test changes its time limit.
        values: Settings.
    """
    settings, passwords = _with_cheap_hashes(make_settings(**values))
    spans, metrics, logs = InMemorySpanExporter(), InMemoryMetricReader(), memory_log_exporter()
    telemetry = build_telemetry(settings, Exporters(spans, metrics, logs))
    stdout = io.StringIO()
    configure_logging(settings.log_level, telemetry.logger_provider, stdout)
    app = create_app(settings, telemetry)
    if app_setup is not None:
        app_setup(app)
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        reset_contextvars=True,
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, name="app under test")
    thread.start()
    try:
        _wait_until(lambda: server.started or not thread.is_alive(), "the app to start")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield AppUnderTest(
            app, settings, telemetry, spans, metrics, logs, stdout, port=port, passwords=passwords
        )
    finally:
        server.should_exit = True
        thread.join(START_LIMIT_S)


def memory_log_exporter() -> InMemoryLogRecordExporter:
    """An exporter that keeps log records."""
    return InMemoryLogRecordExporter()  # type: ignore[no-untyped-call]  # the SDK left it untyped


def _wait_until(condition: Any, what: str, limit_s: float = START_LIMIT_S, *, poll_s: float = 0.01) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s} s for {what}")
        time.sleep(poll_s)


def _migrated_database() -> Path:
    """A SQLite file with the tables: with a copy of it a process starts without Alembic, a fifth sooner."""
    # Processes may be started in several threads, and Alembic works in one at a time.
    with _migrating:
        return _migrate_once()


_migrating = threading.Lock()


@cache
def _migrate_once() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    file = Path(folder.name, "llmops.db")
    prepare_database(make_settings(database_url=f"sqlite:///{file}"))
    return file


def coverage_variables() -> Mapping[str, str]:
    """The variables that let a process measure coverage, for a test that asks for it.

    A process that does takes twice as long to start, and most tests of processes reach no line that others do
    not; those that do have the marker ``covered``.
    """
    asks = not _uncovered.is_set()
    return {name: os.environ[name] for name in os.environ if asks and name.startswith("COVERAGE")}


def cover_processes(*, covers: bool) -> None:
    """Whether the processes of the next test measure coverage."""
    _uncovered.clear() if covers else _uncovered.set()


_uncovered = threading.Event()


class ServiceProcess(Client):
    """``python -m service`` in a folder of its own, with nothing in its environment but what is given.

    Args:
        variables: Environment variables, over the required ones and a free port.
        arguments: Arguments after ``python``.
    """

    def __init__(
        self, variables: Mapping[str, str] | None = None, arguments: tuple[str, ...] = ("-m", "service")
    ) -> None:
        self.port = int((variables or {}).get("PORT") or unused_port())
        required = {name.upper(): value for name, value in new_secrets().items()}
        self.environment = {
            "PATH": os.environ["PATH"],
            # The package that these tests stand beside, whichever one is installed.
            "PYTHONPATH": str(ROOT),
            **coverage_variables(),
            **required,
            "PORT": str(self.port),
            # As in `make_settings`: a test of the cache switches it on.
            "CACHE_ENABLED": "false",
            **(variables or {}),
        }
        self.passwords = {
            "admin": self.environment["AUTH_ADMIN_PASSWORD"],
            "user": self.environment["AUTH_USER_PASSWORD"],
        }
        self._arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        self.folder = self._folder.name
        self._stdout = Path(self._folder.name, "stdout")
        self._stderr = Path(self._folder.name, "stderr")
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if "DATABASE_URL" not in self.environment:
            data = Path(self.folder, "data")
            data.mkdir(mode=0o700)
            shutil.copy(_migrated_database(), data / "llmops.db")
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *self._arguments],
                cwd=self._folder.name,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        return self

    def wait_ready(self, limit_s: float = START_LIMIT_S) -> Self:
        """Wait until ``/health`` answers."""
        # Asked more often, it would have less of the processor for its start.
        _wait_until(self._answers, "the service to answer /health", limit_s, poll_s=0.05)
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"exit status {self.process.returncode}: {self.text()}")
        try:
            return self.call("GET", "/health", timeout_s=2).status == 200
        except OSError:
            return False

    def stop(self, with_signal: signal.Signals = signal.SIGTERM, limit_s: float = 40) -> int:
        """Send the signal and wait for the end; the exit status."""
        assert self.process is not None
        self.process.send_signal(with_signal)
        return self.process.wait(limit_s)

    def text(self) -> str:
        """Everything written to stdout and stderr so far; of a running process, whole lines only."""
        return self._whole(self._stdout.read_text()) + self._whole(self._stderr.read_text())

    def _whole(self, text: str) -> str:
        # A line may be seen while it is being written; what a process leaves behind counts as it is.
        running = self.process is not None and self.process.poll() is None
        return text[: text.rfind("\n") + 1] if running else text

    def lines(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """The lines of stdout and stderr, each of which must be JSON."""
        lines = [json.loads(line) for line in self.text().splitlines()]
        return [line for line in lines if request_id is None or line.get("request_id") == request_id]

    def __exit__(self, *_exception: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()
