"""The service beside what people would use instead, and what its layers cost: `python -m tests.bench`.

All programs run at the same time and are asked in turns, one load generator for all, so that the machine's
noise hits them alike; what counts are ratios of one round, and their spread over the rounds. `--write` puts
the tables into RESULTS.md and the numbers into results.json, beside this file. It keeps what RESULTS.md has
below the marker: the output of the other commands of this folder.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from random import Random

from tests.bench import sides as make
from tests.bench.http_load import Load, Measured
from tests.bench.sides import Side
from tests.bench.upstream import upstream
from tests.harness import ROOT

CONNECTIONS = (1, 16, 64)
SERVICE = "this service"
BEFORE = "the tree before"
HERE = Path(__file__).parent
BY_HAND = "<!-- by hand -->\n"
PIECES = 200
STREAM = json.dumps({**json.loads(make.CHAT), "stream": True, "max_tokens": PIECES})
STREAMING = ("the upstream itself", "LiteLLM proxy", f"{SERVICE}, /v1")
LAYERS = {
    "telemetry off": (("OTEL_EXPORTER_OTLP_ENDPOINT",), {}),
    "log lines and log records off": ((), {"LOG_LEVEL": "ERROR"}),
    "recorder off": (("MLFLOW_TRACKING_URI",), {}),
    "all three off": (("OTEL_EXPORTER_OTLP_ENDPOINT", "MLFLOW_TRACKING_URI"), {"LOG_LEVEL": "ERROR"}),
}


@dataclass
class Row:
    """What was measured of one side at one number of connections, round by round."""

    side: str
    connections: int
    rates: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    def add(self, measured: Measured, used_s: float) -> None:
        """Keep one round's."""
        self.rates.append(measured.rate)
        self.p50_ms.append(measured.p50_s * 1e3)
        self.p99_ms.append(measured.p99_s * 1e3)
        self.first_ms.append(measured.first_s * 1e3)
        self.cpu_us.append(used_s / measured.calls * 1e6)


def in_turns(load: Load, all_sides: list[Side], connections: int, rounds: int, seconds: float) -> list[Row]:
    """Ask each side so many times, in another order in each round; what it does afterwards is its cost."""
    rows = {side.name: Row(side.name, connections) for side in all_sides}
    order = Random(connections)  # noqa: S311 - no secret
    for _ in range(rounds):
        for side in order.sample(all_sides, len(all_sides)):
            before_s = side.cpu_s if side.pid else 0.0
            measured = side.ask(load, connections, seconds)
            side.settle()
            rows[side.name].add(measured, (side.cpu_s if side.pid else 0.0) - before_s)
    return list(rows.values())


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and the smallest and largest."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [value / other for value, other in zip(values, others, strict=True)]


def peers(  # noqa: PLR0913, PLR0917 - the programs to compare, and what they have in common
    stack: ExitStack, port: int, folder: Path, on: dict[str, str], litellm: Path | None, before: Path | None
) -> list[Side]:
    """Everybody who answers the same question."""
    found = [Side("the upstream itself", port), *make.bare(stack, port, folder)]
    if litellm:
        found += make.litellm(stack, litellm, port, folder)
    if make.PORTKEY.exists():
        found.append(make.portkey(stack, port, folder))
    off = {**on, "CACHE_ENABLED": "false"}
    plain = make.service(stack, SERVICE, off)
    v1 = Side(f"{SERVICE}, /v1", plain.port, plain.pid, headers=plain.headers)
    by_key = make.service(stack, f"{SERVICE}, by key", off, secret_of=make.limited_key)
    # The embedded store's files belong to one process.
    several = make.without(off, "QDRANT_PATH", QDRANT_URL=f"http://127.0.0.1:{port}", WORKERS="2")
    workers = make.service(stack, f"{SERVICE}, WORKERS=2", several)
    cached = {**on, "CACHE_ENABLED": "true"}
    same = make.ALWAYS_THE_SAME
    hit = make.service(stack, f"{SERVICE}, exact hit", cached, body=same)
    ours = [plain, v1, by_key, workers, hit]
    if before:
        ours.append(make.service(stack, BEFORE, off, tree=before))
        ours.append(make.service(stack, f"{BEFORE}, exact hit", cached, body=same, tree=before))
    return [*found, *ours]


def throughput(rows: list[Row]) -> Iterator[str]:
    """The table of one number of connections."""
    by_name = {row.side: row for row in rows}
    ours, direct = by_name[SERVICE], by_name["the upstream itself"]
    yield f"### {rows[0].connections} connection(s)\n"
    yield "| | requests/s | this service over it | p50 ms | p50 added ms | p99 ms | CPU us a request |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        added = [mine - its for mine, its in zip(row.p50_ms, direct.p50_ms, strict=True)]
        yield (
            f"| {row.side} | {spread(row.rates, 0)} | {spread(ratios(ours.rates, row.rates))} "
            f"| {spread(row.p50_ms)} | {spread(added)} | {statistics.median(row.p99_ms):.1f} "
            f"| {f'{statistics.median(row.cpu_us):.0f}' if any(row.cpu_us) else ''} |"
        )


def layers(rows: list[Row]) -> Iterator[str]:
    """The table of what is saved by leaving a layer out."""
    everything = rows[0]
    yield "| | requests/s | everything on over it | CPU us a request | everything on over it |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.side} | {spread(row.rates, 0)} | {spread(ratios(everything.rates, row.rates))} "
            f"| {spread(row.cpu_us, 0)} | {spread(ratios(everything.cpu_us, row.cpu_us))} |"
        )


def streams(rows: list[Row]) -> Iterator[str]:
    """The table of streamed answers."""
    direct = rows[0]
    yield "| | streams/s | time to first piece ms | over the upstream's | pieces/s | CPU us a piece |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        each = statistics.median(row.cpu_us) / PIECES
        pieces = [rate * PIECES for rate in row.rates]
        yield (
            f"| {row.side} | {spread(row.rates, 1)} | {spread(row.first_ms)} "
            f"| {spread(ratios(row.first_ms, direct.first_ms))} | {spread(pieces, 0)} "
            f"| {each:.0f} |"
        )


def cold_starts(on: dict[str, str], times: int, tree: Path) -> list[float]:
    """Seconds from the process's start to the first answer of /health, each time."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        with ExitStack() as stack:
            process = make.started(stack, on, tree)
            process.wait_ready()
            taken.append(time.perf_counter() - began)
            process.stop()
    return taken


def long_run(load: Load, side: Side, calls: int) -> list[float]:
    """The memory in MiB before, and after each tenth of so many calls."""
    seen = [side.rss_mib]
    for _ in range(10):
        side.ask(load, 16, 600.0, calls // 10)
        seen.append(side.rss_mib)
    return seen


def machine() -> str:
    """What this ran on, in one line."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("fastapi", "uvicorn", "openai", "opentelemetry-sdk")
    )
    return (
        f"{os.cpu_count()} cores of {model}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {packages}; one worker process each; "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


def measure(asked: argparse.Namespace) -> tuple[list[str], dict[str, object]]:
    """All of it: the lines of RESULTS.md, and the numbers."""
    lines = [f"{machine()}.", ""]
    numbers: dict[str, object] = {"machine": machine(), "rounds": asked.rounds, "seconds": asked.seconds}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        port, load = stack.enter_context(upstream()), stack.enter_context(Load())
        on = make.everything_on(stack, port, folder)

        def turns(what: str, who: list[Side], connections: int) -> list[Row]:
            for side in who:
                side.ask(load, connections, 1.0)
            rows = in_turns(load, who, connections, asked.rounds, asked.seconds)
            numbers[f"{what}, {connections}"] = [vars(row) for row in rows]
            return rows

        with ExitStack() as inner:
            who = peers(inner, port, folder, on, asked.litellm, asked.before)
            lines += ["## Beside others", ""]
            for connections in CONNECTIONS:
                lines += [*throughput(turns("beside others", who, connections)), ""]
            # The bare app does not stream; Portkey's gateway answered 500 to every stream (Node 20.20).
            streaming = [side for side in who if side.name in STREAMING]
            for side in streaming:
                side.body, side.events = STREAM, PIECES
            lines += [f"## Streams of {PIECES} pieces, 4 at a time", ""]
            lines += [*streams(turns("streams", streaming, 4)), ""]
        with ExitStack() as inner:
            plain = {**on, "CACHE_ENABLED": "false"}
            who = [make.service(inner, "everything on", plain)]
            for layer, (left_out, more) in LAYERS.items():
                who.append(make.service(inner, layer, make.without(plain, *left_out, **more)))
            lines += ["## What each layer costs, 16 connections", ""]
            lines += [*layers(turns("layers", who, 16)), ""]
        lines += ["## Memory and start", ""]
        for tree, name in ((ROOT, SERVICE), (asked.before, BEFORE)):
            if tree is None:
                continue
            with ExitStack() as inner:
                # With the cache, whose memory counts too; each question is another one.
                side = make.service(inner, "memory", {**on, "CACHE_ENABLED": "true"}, tree=tree)
                memory = long_run(load, side, asked.long) if asked.long else []
            starts = cold_starts(on, asked.rounds, tree)
            numbers[f"memory_mib, {name}"], numbers[f"cold_start_s, {name}"] = memory, starts
            if memory:
                grown = ", ".join(f"{mib:.0f}" for mib in memory)
                held = f"MiB held at first, and after each tenth of {asked.long} calls"
                lines.append(f"- {name.capitalize()}: {held}: {grown}.")
            lines.append(f"- {name.capitalize()}: start to ready, in seconds: {spread(starts)}.")
    return lines, numbers


def main() -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side's turn")
    parser.add_argument("--long", type=int, default=20_000, help="calls of the long run; 0 leaves it out")
    parser.add_argument("--litellm", type=Path, help="the proxy's program, in an environment of its own")
    parser.add_argument("--before", type=Path, help="another checkout, with .venv, measured beside this one")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md and results.json")
    asked = parser.parse_args()
    lines, numbers = measure(asked)
    print("\n".join(lines))  # noqa: T201 - what the command is for
    if asked.write:
        results = HERE / "RESULTS.md"
        by_hand = results.read_text().partition(BY_HAND)[2]
        tables = "\n".join(lines)
        results.write_text(f"# Measured with `make bench`\n\n{tables}\n\n{BY_HAND}{by_hand}")
        (HERE / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
