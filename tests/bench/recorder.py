"""What the recorder costs the caller, with MLflow fast, frozen and dead: `python -m tests.bench.recorder`.

Four processes of the service side by side, asked in turns: one without a recorder, and three whose MLflow
takes everything at once, is stopped in the middle of its work, or is gone. Printed are ratios to the process
without a recorder, round by round; then the memory of the service whose MLflow is gone, over many calls.
"""

import argparse
import os
import signal
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench import sides as make
from tests.bench.__main__ import Row, in_turns, long_run, ratios, spread
from tests.bench.http_load import Load
from tests.bench.sides import Side
from tests.bench.upstream import upstream

SIGNALS = {"fast": 0, "frozen": signal.SIGSTOP, "dead": signal.SIGKILL}
WARM_UP_S = 1.0


def start(stack: ExitStack, load: Load, folder: Path) -> list[Side]:
    """Start the processes; what happens to an MLflow happens after its first calls were recorded."""
    port = stack.enter_context(upstream())
    given = make.everything_on(stack, port, folder) | {"CACHE_ENABLED": "false"}
    given = make.without(given, "OTEL_EXPORTER_OTLP_ENDPOINT", "MLFLOW_TRACKING_URI")
    sides = [make.service(stack, "off", given)]
    for name, signal_ in SIGNALS.items():
        mlflow, url = make.mlflow(stack)
        sides.append(
            make.service(stack, name, {**given, "MLFLOW_TRACKING_URI": url, "SPOOL_PATH": str(folder / name)})
        )
        sides[-1].ask(load, 1, WARM_UP_S)
        sides[-1].settle()
        if signal_:
            assert mlflow.pid is not None
            os.kill(mlflow.pid, signal_)
    return sides


def table(connections: int, rows: list[Row]) -> Iterator[str]:
    """The rows of one number of connections."""
    off = rows[0]
    yield f"| MLflow, {connections} connection(s) | requests/s | over off | p50 over off | CPU over off |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.side} | {statistics.median(row.rates):.0f} | {spread(ratios(row.rates, off.rates))} "
            f"| {spread(ratios(row.p50_ms, off.p50_ms))} | {spread(ratios(row.cpu_us, off.cpu_us))} |"
        )
    yield ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each side's turn")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--long", type=int, default=20_000, help="calls of the long run with MLflow dead")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        load = stack.enter_context(Load())
        sides = start(stack, load, Path(name))
        for connections in asked.connections:
            rows = in_turns(load, sides, connections, asked.rounds, asked.seconds)
            print("\n".join(table(connections, rows)), flush=True)  # noqa: T201 - what the command is for
        memory = ", ".join(f"{mib:.1f}" for mib in long_run(load, sides[-1], asked.long))
        spooled = sum(path.stat().st_size for path in Path(name).glob("dead*/**/*.jsonl")) / 2**20
        print(  # noqa: T201 - what the command is for
            f"MiB held with MLflow dead, before and after each tenth of {asked.long} calls: {memory}; "
            f"in the spool: {spooled:.1f}"
        )


if __name__ == "__main__":
    main()
