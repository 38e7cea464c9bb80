"""The path of one request: which functions and files of the service it enters.

    python -m tests.bench.path           the counts for a miss, a hit and a streamed call
    python -m tests.bench.path --list    and each function, in the order in which it is first entered

The app runs in this process with the cache and all telemetry on, and asks a fake upstream. Counted is what
runs in the request's own context, and in tasks that were started from it; comprehensions count as part of
their function.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Final

from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import service
from service.app import create_app
from service.config.lifespan import lifespan_of
from service.config.logging import configure_logging
from service.telemetry.providers import Exporters, build_telemetry
from tests.fakes.upstream import FakeUpstream
from tests.harness import make_settings, memory_log_exporter

ROOT: Final = str(Path(service.__file__).parent) + "/"
INLINE: Final = frozenset({"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"})
WARM_UP: Final = 3

on_path: ContextVar[bool] = ContextVar("on_path", default=False)

Function = tuple[str, str]


class _Discard:
    """A stream that takes log lines and keeps none."""

    def write(self, text: str) -> None:
        """Take it."""

    def flush(self) -> None:
        """Nothing is held."""


async def entered(app: Any, state: Mapping[str, Any], token: str, body: Mapping[str, Any]) -> list[Function]:
    """Make one call; the functions of the service that it entered, in order."""
    seen: dict[Function, None] = {}
    content = json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]
    status = 0

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        ours = event == "call" and code.co_filename.startswith(ROOT) and on_path.get()
        if ours and code.co_name not in INLINE:
            seen[code.co_filename.removeprefix(ROOT), code.co_qualname] = None

    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"authorization", f"Bearer {token}".encode()),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/llm/generate",
        "raw_path": b"/llm/generate",
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "state": dict(state),
    }

    async def call() -> None:
        on_path.set(True)
        await app(scope, receive, send)

    sys.setprofile(note)
    try:
        await asyncio.create_task(call())
    finally:
        sys.setprofile(None)
    if status != 200:
        raise RuntimeError(f"answered with {status}")
    return list(seen)


async def paths(url: str) -> dict[str, list[Function]]:
    """The path of each kind of call."""
    settings = make_settings(litellm_url=url, cache_enabled=True, rate_limit="1000000/minute")
    exporters = Exporters(InMemorySpanExporter(), InMemoryMetricReader(), memory_log_exporter())
    telemetry = build_telemetry(settings, exporters)
    discard: Any = _Discard()
    configure_logging("INFO", telemetry.logger_provider, discard)
    app = create_app(settings, telemetry)
    async with lifespan_of(settings, telemetry)(app) as state:
        auth = state["services"].auth
        token = (await auth.login("user", settings.auth_user_password.get_secret_value(), "bench")).token
        for number in range(WARM_UP):
            await entered(app, state, token, {"prompt": f"warm-up {number}"})
        return {
            "miss": await entered(app, state, token, {"prompt": "path"}),
            "hit": await entered(app, state, token, {"prompt": "path"}),
            "stream": await entered(app, state, token, {"prompt": "another path", "stream": True}),
        }


def main() -> None:
    """Print the counts, and the functions where they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print each function")
    arguments = parser.parse_args()
    with FakeUpstream() as upstream:
        found = asyncio.run(paths(upstream.url))
    for kind, functions in found.items():
        files = {file for file, _ in functions}
        lines = [f"{kind}: {len(functions)} functions of {len(files)} files"]
        if arguments.list:
            lines += [f"    {file}: {name}" for file, name in functions]
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
