"""Look-ups among many entries, embedded and over HTTP: `python -m tests.bench.cache_size --entries 100000`.

The server is the tests' fake in a process of its own: what it says about a real Qdrant is the transport and
this service's side only.
"""

import argparse
import asyncio
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from service.cache.keys import key_of, tenant_of
from service.cache.response_cache import open_store
from service.cache.semantic import collection_of
from service.cache.store import COLLECTION, Point, VectorStore, equal_to, expired_at
from tests.fakes.qdrant import FakeQdrant
from tests.harness import make_settings

LOOKUPS = 500
SEARCHES = 20
DIMENSION = 384
USERS = 100
BODY_BYTES = 900
LIFE_S = 3_600
SEMANTIC = collection_of("bench", DIMENSION)


def serve(pipe: Connection) -> None:
    """Run the fake until the process is ended."""
    with FakeQdrant().serving() as fake:
        pipe.send(fake.url)
        pipe.recv()


def points(entries: int) -> Iterator[Point]:
    """Answers of a usual size."""
    for number in range(entries):
        tenant = tenant_of(f"user-{number % USERS}")
        key = key_of(tenant, "demo", {"messages": [{"role": "user", "content": str(number)}]})
        payload = {
            "key": key.digest,
            "tenant": tenant,
            "model": "demo",
            "created": float(number),
            "expires": time.time() + LIFE_S,
            "cost": 0.001,
            "body": "x" * BODY_BYTES,
        }
        yield Point(key.point_id, payload)


def questions(entries: int) -> Iterator[Point]:
    """Questions with their vectors."""
    draw = random.Random(1)  # noqa: S311 - no secret
    for point in points(entries):
        scope = str(draw.randrange(50))
        payload = {**{n: v for n, v in point.payload.items() if n not in {"body", "cost"}}, "scope": scope}
        yield Point(point.id, payload, [draw.gauss(0, 1) for _ in range(DIMENSION)])


def rss_mb() -> float:
    """This process's memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


async def timed(times: int, work: Callable[[], Awaitable[object]]) -> str:
    """Median and 99th percentile of so many runs."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        await work()
        taken.append((time.perf_counter() - started) * 1_000)
    return f"{statistics.median(taken):.2f} / {statistics.quantiles(taken, n=100)[98]:.2f} ms"


async def fill(store: VectorStore, collection: str, dimension: int | None, made: Iterator[Point]) -> float:
    """Write points; seconds."""
    started = time.perf_counter()
    await store.ensure(collection, dimension)
    batch: list[Point] = []
    for point in made:
        batch.append(point)
        if len(batch) == 256:
            await store.write(collection, batch)
            batch = []
    if batch:
        await store.write(collection, batch)
    return time.perf_counter() - started


async def measure(name: str, entries: int, semantic: int, **more: str) -> None:
    """Fill a store and print one row."""
    draw = random.Random(2)  # noqa: S311 - no secret
    settings = make_settings(**more)
    ids = [point.id for point in points(entries)]
    async with open_store(settings) as store:
        before = rss_mb()
        filled_s = await fill(store, COLLECTION, None, points(entries))
        memory = rss_mb() - before
        hit = await timed(LOOKUPS, lambda: store.read(COLLECTION, draw.choice(ids)))
        expired = await timed(3, lambda: store.ids(COLLECTION, 1_000, expired_at(time.time())))
        await fill(store, SEMANTIC, DIMENSION, questions(semantic))
        vector = [draw.gauss(0, 1) for _ in range(DIMENSION)]
        equal = equal_to({"tenant": tenant_of("user-1"), "scope": "1"})
        near = await timed(SEARCHES, lambda: store.search(SEMANTIC, vector, equal, 0.9, 3))
    opened_s = 0.0
    if "qdrant_path" in more:
        started = time.perf_counter()
        async with open_store(settings):
            opened_s = time.perf_counter() - started
    print(  # noqa: T201 - what it is for
        f"| {name} | {entries:,} | {filled_s / entries * 1e6:.0f} us | {hit} | {near} ({semantic:,}) "
        f"| {expired} | {memory:.0f} MB | {opened_s:.1f} s |",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--semantic", type=int, default=10_000, help="questions with vectors, at most")
    arguments = parser.parse_args()
    print("| store | entries | write | look-up p50 / p99 | search p50 / p99 (of) | sweep | memory | open |")  # noqa: T201
    print("|---|---|---|---|---|---|---|---|")  # noqa: T201
    for entries in arguments.entries:
        semantic = min(entries, arguments.semantic)
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(measure("embedded", entries, semantic, qdrant_path=folder))
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,))
        process.start()
        # The fake searches in plain Python: what that takes is not the transport's.
        asyncio.run(measure("server-like", entries, min(100, semantic), qdrant_url=ours.recv()))
        ours.send(None)
        process.join()


if __name__ == "__main__":
    main()
