"""How the cost of a request grows with what it is and with how many there are: `python -m tests.bench.scale`.

Everything is on, but the cache. Each row is one dimension at one size; the last column is how many times the
cost grew since the row above, over how many times the size did: 1 is linear, below it is less than that.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import jwt

from tests.bench import sides as make
from tests.bench.__main__ import in_turns
from tests.bench.http_load import Load
from tests.bench.sides import Side
from tests.bench.upstream import upstream
from tests.harness import ServiceProcess

CONNECTIONS = (1, 4, 16, 64, 128, 250, 500)
BODIES_KB = (1, 10, 100, 300, 900)
USERS = (1, 10, 100, 1_000)
TOKENS = (10, 100, 1_000, 4_000)


@dataclass(frozen=True)
class Point:
    """What was measured at one size; medians of the rounds."""

    size: float
    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


def at(load: Load, side: Side, size: float, connections: int, asked: argparse.Namespace) -> Point:
    """Measure one size."""
    side.ask(load, connections, asked.seconds / 2)
    (row,) = in_turns(load, [side], connections, asked.rounds, asked.seconds)
    return Point(size, *map(statistics.median, (row.rates, row.p50_ms, row.p99_ms, row.cpu_us)))


def table(what: str, points: Sequence[Point]) -> Iterator[str]:
    """The rows of one dimension."""
    yield f"| {what} | requests/s | p50 ms | p99 ms | CPU us a request | growth |"
    yield "|---|---|---|---|---|---|"
    last: Point | None = None
    for point in points:
        growth = "" if last is None else f"{point.cpu_us / last.cpu_us:.2f} over {point.size / last.size:.0f}"
        yield (
            f"| {point.size:,.0f} | {point.rate:.0f} | {point.p50_ms:.1f} | {point.p99_ms:.1f} "
            f"| {point.cpu_us:.0f} | {growth} |"
        )
        last = point
    yield ""


def knee(points: Sequence[Point]) -> str:
    """The smallest number of connections that gives nine tenths of the best throughput."""
    best = max(point.rate for point in points)
    size = next(point.size for point in points if point.rate >= 0.9 * best)
    return f"The knee: {size:.0f} connection(s) give nine tenths of the most, {best:.0f} requests/s.\n"


def of_so_many(process: ServiceProcess, count: int) -> list[dict[str, str]]:
    """Header fields with as many tokens, each of a session of its own."""
    key, first = process.environment["JWT_SECRET_KEY"], process.token()
    claims = jwt.decode(first, options={"verify_signature": False})
    tokens = (jwt.encode({**claims, "jti": uuid4().hex}, key, algorithm="HS256") for _ in range(count))
    return [{"Authorization": f"Bearer {token}"} for token in tokens]


def measure(asked: argparse.Namespace) -> Iterator[str]:
    """All tables, line by line."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        port, load = stack.enter_context(upstream()), stack.enter_context(Load())
        on = make.everything_on(stack, port, Path(name))
        on |= {"CACHE_ENABLED": "false", "QDRANT_URL": f"http://127.0.0.1:{port}"}
        on |= {"MAX_IN_FLIGHT": "600", "MAX_IN_FLIGHT_PER_USER": "600"}
        on |= {"LLM_TIMEOUT_S": "60"}

        for workers in (1, 2):
            with ExitStack() as inner:
                side = make.service(inner, f"{workers} workers", {**on, "WORKERS": f"{workers}"})
                found = [at(load, side, size, size, asked) for size in CONNECTIONS]
            yield from table(f"connections, {workers} worker(s)", found)
            yield knee(found)
        process = stack.enter_context(ServiceProcess(on)).wait_ready()
        assert process.process is not None
        chat = Side("service", process.port, process.process.pid, headers=of_so_many(process, 1))
        found = []
        for size in BODIES_KB:
            text = make.QUESTION + "word " * ((size * 1_000 - len(make.CHAT)) // 5)
            asking = {**json.loads(make.CHAT), "messages": [{"role": "user", "content": text}]}
            side = replace(chat, body=json.dumps(asking))
            found.append(at(load, side, size, 4, asked))
        yield from table("kB of body, 4 connections", found)
        found = []
        for size in USERS:
            side = replace(chat, headers=of_so_many(process, size))
            found.append(at(load, side, size, 16, asked))
        yield from table("sessions, 16 connections", found)
        found = []
        for size in TOKENS:
            asking = {**json.loads(make.CHAT), "stream": True, "max_tokens": size}
            side = replace(chat, body=json.dumps(asking), events=size)
            found.append(at(load, side, size, 4, asked))
        yield from table("tokens streamed, 4 connections", found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round")
    for line in measure(parser.parse_args()):
        print(line, flush=True)  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
