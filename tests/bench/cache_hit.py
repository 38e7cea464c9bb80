"""What a cache hit takes beside a route that does nothing: `python -m tests.bench.cache_hit`.

One app, as it is served, on a real socket, with two more routes behind the same middleware: one answers at
once; one signs the caller in and counts the call, like every model call. They are asked in turns over one
connection, from a process of its own; ratios of the rounds' medians are printed.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from http.client import HTTPConnection

from fastapi import FastAPI

from service.config.settings import prepare_environment
from service.dependencies import ModelCaller
from tests.fakes.upstream import FakeUpstream
from tests.harness import running_app

NOOPS = ("/noop", "/noop-signed-in")
HIT = "/llm/generate"
BODY = json.dumps({"prompt": "What does it cost?"})


def add_routes(app: FastAPI) -> None:
    """Two routes that do nothing."""

    async def noop() -> dict[str, bool]:
        return {"ok": True}

    async def noop_signed_in(_user: ModelCaller) -> dict[str, bool]:
        return {"ok": True}

    app.add_api_route("/noop", noop, methods=["POST"])
    app.add_api_route("/noop-signed-in", noop_signed_in, methods=["POST"])


def measure(port: int, token: str, rounds: int, calls: int) -> dict[str, list[float]]:
    """The medians of each round, by route, in seconds."""
    fields = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection = HTTPConnection("127.0.0.1", port)
    found: dict[str, list[float]] = {path: [] for path in (*NOOPS, HIT)}

    def ask(path: str) -> float:
        started = time.perf_counter()
        connection.request("POST", path, BODY, fields)
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        return time.perf_counter() - started

    for path in found:
        for _ in range(50):
            ask(path)
    for _ in range(rounds):
        times: dict[str, list[float]] = {path: [] for path in found}
        for _ in range(calls):
            for path, taken in times.items():
                taken.append(ask(path))
        for path, taken in times.items():
            found[path].append(statistics.median(taken))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=200)
    arguments = parser.parse_args()
    prepare_environment()
    with (
        FakeUpstream() as upstream,
        running_app(
            add_routes, litellm_url=upstream.url, cache_enabled=True, rate_limit="10000000/minute"
        ) as app,
    ):
        with multiprocessing.get_context("spawn").Pool(1) as client:
            found = client.apply(measure, (app.port, app.token(), arguments.rounds, arguments.calls))
        asked = len(upstream.chat_requests)
    for path, medians in found.items():
        print(f"{path:16} {statistics.median(medians) * 1_000:.3f} ms")  # noqa: T201 - what it is for
    for path in NOOPS:
        ratios = [hit / none for hit, none in zip(found[HIT], found[path], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(  # noqa: T201 - what it is for
            f"hit / {path}: {middle:.3f} ({low:.3f} to {high:.3f}); upstream asked {asked} time(s)"
        )


if __name__ == "__main__":
    main()
