"""Where the service's processor time goes: `python -m tests.bench.profile --py-spy PATH`.

py-spy (a program of its own, from the package index) samples the process with everything on under load. Each
sample goes to one cost: the first of ``COSTS`` that has a frame on the stack, looked for from the innermost
frame outwards. Shares are of the samples that held the interpreter's lock, of all threads.
"""

import argparse
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench import sides as make
from tests.bench.http_load import Load
from tests.bench.upstream import upstream

COSTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "OTLP export: encoding and sending",
        ("opentelemetry/exporter/", "sdk/_shared_internal", "sdk/metrics/_internal/export"),
    ),
    ("spans: the SDK", ("opentelemetry/sdk/trace",)),
    ("metrics: the SDK", ("opentelemetry/sdk/metrics",)),
    ("log records: the bridge and the SDK", ("opentelemetry/sdk/_logs", "instrumentation/logging")),
    (
        "log lines: format and write",
        ("service/config/logging", "/logging/__init__"),
    ),
    (
        "server span: contrib ASGI and FastAPI",
        ("instrumentation/asgi", "instrumentation/fastapi", "service/telemetry/server"),
    ),
    (
        "client span: contrib httpx",
        ("instrumentation/httpx", "opentelemetry/util/http", "opentelemetry/propagat"),
    ),
    ("GenAI span: util-genai", ("opentelemetry/util/genai", "service/upstream/spans")),
    ("other OpenTelemetry", ("opentelemetry/",)),
    (
        "recorder: record, spool, send to MLflow",
        ("mlflow", "service/recording/"),
    ),
    (
        "transport: sockets and HTTP to the upstream",
        (
            *("httpcore2/", "h11/", "anyio/_backends", "anyio/abc", "aiohttp/", "yarl/", "multidict/"),
            *("bounded_transport", "upstream_transport"),
        ),
    ),
    ("HTTP client: httpx2", ("httpx2/",)),
    ("OpenAI's SDK", ("/openai/", "pydantic/")),
    ("sign-in: token", ("/jwt/", "service/identity")),
    ("rate limit", ("/limits/", "services/rate_limit")),
    ("retry: tenacity and the judge", ("tenacity/", "utils/retry")),
    ("breaker: purgatory", ("purgatory/", "circuit_breaker")),
    ("our middleware", ("service/middleware/",)),
    ("the rest of this service", ("/service/",)),
    ("FastAPI and Starlette", ("fastapi/", "starlette/", "anyio/")),
    ("uvicorn", ("uvicorn/",)),
    ("event loop", ("asyncio/", "uvloop")),
)


def shares(raw: str) -> Iterator[tuple[str, float]]:
    """Each cost and its share, from py-spy's raw format: frames with semicolons between, then a count."""
    found: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        found[_cost(stack.split(";"))] += int(count)
    total = found.total()
    for cost, samples in found.most_common():
        yield cost, samples / total


def _cost(frames: list[str]) -> str:
    for frame in reversed(frames):
        for cost, marks in COSTS:
            if any(mark in frame for mark in marks):
                return cost
    return "other"


def record(py_spy: str, seconds: int) -> str:
    """Sample the service under load; py-spy's output."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        port, load = stack.enter_context(upstream()), stack.enter_context(Load())
        on = {**make.everything_on(stack, port, folder), "CACHE_ENABLED": "false"}
        side = make.service(stack, "everything on", on)
        side.ask(load, 16, 3)
        output = folder / "raw"
        command = [py_spy, "record", "--pid", str(side.pid), "--rate", "250", "--gil", "--full-filenames"]
        command += ["--duration", str(seconds), "--format", "raw", "--output", str(output)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as sampling:
            side.ask(load, 16, seconds + 2)
            sampling.wait(30)
        return output.read_text()


def main() -> None:
    """Record and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--py-spy", default="py-spy")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="write the samples there, too")
    asked = parser.parse_args()
    raw = record(asked.py_spy, asked.seconds)
    if asked.keep:
        asked.keep.write_text(raw)
    for cost, share in shares(raw):
        print(f"{share:6.1%}  {cost}")  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
