"""What retry, breaker, deadline and limits cost a call that succeeds: `python -m tests.bench.overhead`.

Two apps in one process, asked in turns over ASGI without a socket of their own, so that what differs is the
layers only: one as it is served, one with attempt loop, breaker, limits and rate put aside. The upstream is
a process of its own that answers at once. Ratios of the rounds' medians are printed; the machine's noise hits
both alike.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from service.app import create_app
from service.config.lifespan import lifespan_of
from service.config.logging import configure_logging
from service.config.settings import prepare_environment
from service.dependencies import current_user, model_caller
from service.middleware.request_limits import RequestLimitsMiddleware
from service.services.generation import Generation
from service.telemetry.providers import build_telemetry
from tests.harness import make_settings

BODY = json.dumps({"prompt": "What does it cost?"}).encode()
ANSWER = json.dumps(
    {
        "id": "bench",
        "model": "demo",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
).encode()


async def upstream(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer every request at once."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body", False):
        pass
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": ANSWER})


def serve_upstream(listener: socket.socket) -> None:
    """Run the upstream until the process is ended."""
    server = uvicorn.Server(uvicorn.Config(upstream, log_level="critical", lifespan="off", ws="none"))
    server.run(sockets=[listener])


async def one_call(app: FastAPI, state: MutableMapping[str, Any], token: str) -> None:
    """Make one call; it must succeed."""
    status = 0
    waiting = asyncio.Event()
    messages = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        if not messages:
            await waiting.wait()
        return messages.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {token}".encode())]
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
        "headers": [*headers, (b"content-length", str(len(BODY)).encode())],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "state": dict(state),
    }
    await app(scope, receive, send)
    if status != 200:
        raise RuntimeError(f"answered with {status}")


def without_layers(app: FastAPI, generation: Generation) -> None:
    """Put attempt loop, breaker, limits and rate aside."""

    async def straight(progress: Any, deadline: Any, /, call: Any) -> Any:
        progress.attempts = 1
        return await generation._llm.ask(call.spec.request, deadline)  # noqa: SLF001 - the bench takes it apart

    generation._whole["chat"] = straight  # noqa: SLF001 - the bench takes it apart
    limits = RequestLimitsMiddleware.__name__
    app.user_middleware = [
        entry for entry in app.user_middleware if getattr(entry.cls, "__name__", "") != limits
    ]
    app.dependency_overrides[model_caller] = current_user


async def measure(url: str, rounds: int, calls: int) -> list[float]:
    """The ratio of each round: with the layers over without them."""
    settings = make_settings(
        litellm_url=url, retry_max=3, breaker_failure_threshold=5, rate_limit="10000000/minute"
    )
    async with AsyncExitStack() as stack:
        sides: list[Callable[[], Awaitable[None]]] = []
        for layers in (True, False):
            telemetry = build_telemetry(settings)
            app = create_app(settings, telemetry)
            state = await stack.enter_async_context(lifespan_of(settings, telemetry)(app))
            if not layers:
                without_layers(app, state["services"].generation)
            password = settings.auth_user_password.get_secret_value()
            token = (await state["services"].auth.login("user", password, "bench")).token

            def call(app: FastAPI = app, state: Any = state, token: str = token) -> Awaitable[None]:
                return one_call(app, state, token)

            sides.append(call)
        ratios = []
        for number in range(rounds + 1):
            medians = {}
            # Which side goes first changes from round to round.
            for side in sorted((0, 1), reverse=bool(number % 2)):
                times = []
                for _ in range(calls):
                    started = time.perf_counter()
                    await sides[side]()
                    times.append(time.perf_counter() - started)
                medians[side] = statistics.median(times)
            ratios.append(medians[0] / medians[1])
        return ratios[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=100, help="calls per side and round")
    arguments = parser.parse_args()
    prepare_environment()
    configure_logging("ERROR")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=serve_upstream, args=(listener,))
        process.start()
        try:
            port = listener.getsockname()[1]
            ratios = asyncio.run(measure(f"http://127.0.0.1:{port}", arguments.rounds, arguments.calls))
        finally:
            process.terminate()
            process.join()
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(  # noqa: T201 - what the command is for
        f"with / without: {middle:.3f} (middle half {low:.3f} to {high:.3f}; "
        f"{arguments.rounds} rounds of {arguments.calls} calls a side)"
    )


if __name__ == "__main__":
    main()
