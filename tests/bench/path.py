"""The path of one request: the functions and files of ours that it enters: `python -m tests.bench.path`.

The app runs in this process with the cache, the recorder and all telemetry on. After a warm-up it is called
over ASGI with questions that are not in the cache (a miss), with one that is (a hit), and with new ones whose
answers are streamed. What counts is what runs in the event loop's thread on behalf of each call of a kind;
background tasks and exporters do not. A comprehension belongs to the function that it stands in.

`--tree OTHER` measures another checkout of this service, with its own fakes, under its own `.venv` if it has
one.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TextIO

from fastapi import FastAPI
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import service
from service.app import create_app
from service.config.lifespan import lifespan_of
from service.config.logging import configure_logging
from service.config.settings import prepare_environment
from service.telemetry.providers import Exporters, build_telemetry
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.upstream import FakeUpstream
from tests.harness import make_settings, memory_log_exporter

KINDS = ("miss", "hit", "streamed")
WARM_UP = 3
CALLS = 5
PACKAGE = Path(service.__file__).parent

calling: ContextVar[bool] = ContextVar("calling", default=False)
"""True in the context of a call, and so in each task and callback that the call starts."""


class RequestPath:
    """The functions of ours that a request entered, in order of their first entry."""

    def __init__(self) -> None:
        self.entered: dict[CodeType, None] = {}

    def profile(self, frame: FrameType, event: str, _argument: object) -> None:
        """Take what ``sys.setprofile`` reports."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{PACKAGE}{os.sep}") and calling.get():
            self.entered.setdefault(code)

    @property
    def functions(self) -> list[tuple[str, str]]:
        """The file and the qualified name of each function."""
        return [
            (str(Path(code.co_filename).relative_to(PACKAGE.parent)), code.co_qualname)
            for code in self.entered
            if not code.co_name.endswith(("comp>", "genexpr>"))
        ]

    @property
    def files(self) -> set[str]:
        """The files of these functions."""
        return {file for file, _ in self.functions}

    def keep_common(self, other: "RequestPath") -> None:
        """Leave out what the other call did not enter: a new connection, a window of time that began."""
        self.entered = {code: None for code in self.entered if code in other.entered}


async def call(app: FastAPI, state: Mapping[str, object], path: str, body: object, token: str = "") -> bytes:
    """Send one POST over ASGI; the body of its answer, which must be 200."""
    sent = json.dumps(body).encode()
    status, answer = 0, b""
    unread = [{"type": "http.request", "body": sent, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        if not unread:
            await asyncio.Event().wait()
        return unread.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(sent)).encode()),
            *([(b"authorization", f"Bearer {token}".encode())] if token else []),
        ],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "state": dict(state),
    }
    await app(scope, receive, send)
    if status != 200:
        raise RuntimeError(f"{path} was answered with {status}: {answer!r}")
    return answer


async def measure(upstream_url: str, mlflow_url: str, folder: str, stdout: TextIO) -> dict[str, RequestPath]:
    """The path of a call of each kind."""
    settings = make_settings(
        litellm_url=upstream_url, mlflow_tracking_uri=mlflow_url, spool_path=folder, cache_enabled=True
    )
    exporters = Exporters(InMemorySpanExporter(), InMemoryMetricReader(), memory_log_exporter())
    telemetry = build_telemetry(settings, exporters)
    configure_logging("INFO", telemetry.logger_provider, stdout)
    app = create_app(settings, telemetry)
    async with lifespan_of(settings, telemetry)(app) as state:
        account = {"username": "user", "password": settings.auth_user_password.get_secret_value()}
        token = json.loads(await call(app, state, "/auth/login", account))["access_token"]
        calling.set(True)

        async def generate(kind: str, number: int) -> None:
            prompt = "the same" if kind == "hit" else f"{kind} {number}"
            body = {"prompt": prompt, "stream": kind == "streamed"}
            await call(app, state, "/llm/generate", body, token)

        paths: dict[str, RequestPath] = {}
        for kind in KINDS:
            for number in range(WARM_UP):
                await generate(kind, number)
            for number in range(WARM_UP, WARM_UP + CALLS):
                path = RequestPath()
                sys.setprofile(path.profile)
                try:
                    await generate(kind, number)
                finally:
                    sys.setprofile(None)
                paths.setdefault(kind, path).keep_common(path)
        return paths


def report(paths: dict[str, RequestPath], *, with_list: bool) -> None:
    """Print a table, and each function if asked for."""
    write = sys.stdout.write
    write("| POST /llm/generate | functions | files |\n|---|---|---|\n")
    for kind, path in paths.items():
        write(f"| {kind} | {len(path.functions)} | {len(path.files)} |\n")
    for kind, path in paths.items() if with_list else ():
        write(f"\n{kind}:\n")
        for number, (file, function) in enumerate(path.functions, 1):
            write(f"{number:4} {file} {function}\n")


def other_tree(tree: Path, *arguments: str) -> int:
    """Run this file for another tree: its ``service`` and its ``tests``, not those beside this file."""
    python = tree / ".venv/bin/python"
    return subprocess.run(
        [str(python) if python.exists() else sys.executable, "-P", __file__, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=False,
    ).returncode


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print each function in order of its first entry")
    parser.add_argument("--tree", type=Path, help="a checkout to measure instead of this one")
    asked = parser.parse_args()
    if asked.tree:
        sys.exit(other_tree(asked.tree.resolve(), *(["--list"] if asked.list else [])))
    prepare_environment()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stdout = stack.enter_context(Path(os.devnull).open("w"))
        upstream, mlflow = stack.enter_context(FakeUpstream()), stack.enter_context(FakeMlflow())
        paths = asyncio.run(measure(upstream.url, mlflow.url, folder, stdout))
    report(paths, with_list=asked.list)


if __name__ == "__main__":
    main()
