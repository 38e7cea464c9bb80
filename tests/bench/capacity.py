"""What a replica takes and costs, and what so many would: `python -m tests.bench.capacity`.

WORKERS=1, 2 and 4 are measured here, with everything on but the cache, a real Valkey and a real PostgreSQL;
the upstream, MLflow and the collector take all and do nothing. The calls come with a key whose rate, user,
team and budgets are limited. What more replicas would ask of the servers that they share is calculated from
that; the assumptions stand beside the table. `--write` puts both into REPLICAS.md.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from service.identity.database import make_engine
from tests.bench import sides as make
from tests.bench.http_load import Load
from tests.bench.report import write_section
from tests.bench.upstream import upstream
from tests.harness import make_settings, running_app
from tests.postgresql import PostgreSql
from tests.valkey import Valkey

WORKERS: Final = (1, 2, 4)
REPLICAS: Final = (1, 10, 100, 1_000)
CONNECTIONS: Final = 16
USED_SHARE: Final = 0.7
"""Of the core of a replica; the autoscaler adds one at 70 %."""

BOOKINGS_A_SECOND: Final = 1.0
READS_A_SECOND: Final = 0.5
"""Of the ledger by each process: it writes what has come, and reads every 2 s what others spent."""

SMALLEST_WORKER_MIB: Final = 50.0
"""Below it, a child is Python's own, and no worker."""

DATABASE: Final = (
    "SELECT xact_commit, tup_inserted, tup_updated FROM pg_stat_database WHERE datname = 'postgres'"
)
CONNECTED: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid()"
)


@dataclass(frozen=True)
class Row:
    """What was measured with so many workers; of rounds, the medians.

    What Valkey does for a call is by call: scripts, commands (those of scripts, too), processor time, bytes.
    """

    workers: int
    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    rss_mib: float
    pss_mib: float
    scripts: float
    commands: float
    valkey_cpu_us: float
    valkey_in: float
    valkey_out: float
    commits: float
    rows: float
    connections: int


def info(valkey: Valkey) -> Mapping[str, float]:
    """Numbers of the server: processor time, bytes, commands, and the calls of each."""
    text = valkey.ask("INFO", "stats", "cpu", "commandstats").decode()
    found = {
        name: float(value) for name, value in re.findall(r"^(\w+):(\d+(?:\.\d+)?)\r?$", text, re.MULTILINE)
    }
    found |= {
        name: float(calls) for name, calls in re.findall(r"^(cmdstat_\w+):calls=(\d+)", text, re.MULTILINE)
    }
    found["cpu_us"] = 1e6 * (found["used_cpu_user"] + found["used_cpu_sys"])
    return found


def memory(pid: int) -> list[tuple[float, float]]:
    """Of each worker MiB held, and held when what is shared is shared out."""
    found = []
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in children or [str(pid)]:
        text = Path(f"/proc/{one}/smaps_rollup").read_text()
        values = {name: int(kb) / 1024 for name, kb in re.findall(r"^(Rss|Pss): +(\d+)", text, re.MULTILINE)}
        if values["Rss"] > SMALLEST_WORKER_MIB:
            found.append((values["Rss"], values["Pss"]))
    return found


def measure(workers: int, asked: argparse.Namespace) -> Row:
    """Measure one number of workers."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        port, load = stack.enter_context(upstream()), stack.enter_context(Load())
        valkey, postgresql = stack.enter_context(Valkey()), stack.enter_context(PostgreSql())
        variables = make.without(
            make.everything_on(stack, port, Path(name)),
            "QDRANT_PATH",
            CACHE_ENABLED="false",
            QDRANT_URL=f"http://127.0.0.1:{port}",
            VALKEY_URL=valkey.url,
            DATABASE_URL=postgresql.url,
            WORKERS=f"{workers}",
        )
        side = make.service(stack, f"WORKERS={workers}", variables, secret_of=make.limited_key)
        side.path, side.body = "/v1/chat/completions", make.CHAT
        engine = make_engine(make_settings(database_url=postgresql.url))
        stack.callback(engine.dispose)

        def in_database(statement: str) -> Sequence[Any]:
            with engine.connect() as connection:
                return tuple(connection.execute(sa.text(statement)).one())

        side.ask(load, CONNECTIONS, asked.seconds)
        side.settle()
        valkey_before, database_before, used_before = info(valkey), in_database(DATABASE), side.cpu_s
        rounds = [side.ask(load, CONNECTIONS, asked.seconds) for _ in range(asked.rounds)]
        side.settle()
        valkey_after, database_after, used = info(valkey), in_database(DATABASE), side.cpu_s
        calls = sum(one.calls for one in rounds)
        grown = {name: (value - valkey_before.get(name, 0.0)) / calls for name, value in valkey_after.items()}
        commits, inserted, updated = (
            (after - before) / calls for after, before in zip(database_after, database_before, strict=True)
        )
        held = memory(side.pid)
        return Row(
            workers,
            statistics.median(one.rate for one in rounds),
            statistics.median(one.p50_s for one in rounds) * 1e3,
            statistics.median(one.p99_s for one in rounds) * 1e3,
            (used - used_before) / calls * 1e6,
            statistics.median(rss for rss, _ in held),
            statistics.median(pss for _, pss in held),
            grown["cmdstat_evalsha"],
            grown["total_commands_processed"],
            grown["cpu_us"],
            grown["total_net_input_bytes"],
            grown["total_net_output_bytes"],
            commits,
            inserted + updated,
            int(in_database(CONNECTED)[0]),
        )


def told() -> tuple[int, int]:
    """Spans and log records of one call."""
    with ExitStack() as stack:
        port = stack.enter_context(upstream())
        app = stack.enter_context(running_app(litellm_url=f"http://127.0.0.1:{port}"))
        answer = app.call("POST", "/v1/chat/completions", body=json.loads(make.CHAT), token=app.token())
        spans = app.spans(answer.request_id)
        records = [one for one in app.records() if f"{one.log_record.trace_id:032x}" == answer.request_id]
        return len(spans), len(records)


def measured(rows: Sequence[Row]) -> Iterator[str]:
    """The table of what was measured."""
    yield (
        "| workers | requests/s | p50 ms | p99 ms | CPU us | RSS, PSS of a worker, MiB "
        "| Valkey: scripts, commands | CPU us | bytes in, out | PostgreSQL: commits, rows | connections |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.workers} | {row.rate:.0f} | {row.p50_ms:.0f} | {row.p99_ms:.0f} | {row.cpu_us:.0f} "
            f"| {row.rss_mib:.0f}, {row.pss_mib:.0f} | {row.scripts:.2f}, {row.commands:.1f} "
            f"| {row.valkey_cpu_us:.0f} | {row.valkey_in:.0f}, {row.valkey_out:.0f} "
            f"| {row.commits:.2f}, {row.rows:.1f} | {row.connections} |"
        )


def extrapolated(rows: Sequence[Row], spans: int, records: int) -> Iterator[str]:
    """The table of what so many replicas would ask of the servers that they share."""
    first, last = rows[0], rows[-1]

    def grown(of: Callable[[Row], float], number: int) -> float:
        """By call, with so many processes: each one hears of the calls of all that count for a budget."""
        each = (of(last) - of(first)) / (last.workers - first.workers)
        return of(first) + each * (number - first.workers)

    yield (
        "| replicas | requests/s | Valkey, calls with a budget: cores, MB/s out | Valkey, others: cores "
        "| PostgreSQL: commits/s, rows/s, connections | MLflow: records/s "
        "| collector: spans/s, log records/s |"
    )
    yield "|---|---|---|---|---|---|---|"
    for number in REPLICAS:
        # By the processor's time, which depends less on what else runs here than the rate does.
        rate = number * USED_SHARE * 1e6 / first.cpu_us
        cores = rate * grown(lambda row: row.valkey_cpu_us, number) / 1e6
        megabytes = rate * grown(lambda row: row.valkey_out, number) / 1e6
        others = rate * first.valkey_cpu_us / 1e6
        # A process commits by the second, however many calls there were.
        commits = number * (BOOKINGS_A_SECOND + READS_A_SECOND)
        yield (
            f"| {number:,} | {rate:,.0f} | {cores:,.2f}, {megabytes:,.1f} | {others:,.2f} "
            f"| {commits:,.0f}, {rate * first.rows:,.0f}, {number * first.connections:,} | {rate:,.0f} "
            f"| {rate * spans:,.0f}, {rate * records:,.0f} |"
        )


def report(rows: Sequence[Row], spans: int, records: int) -> list[str]:
    """Both tables, and what they rest on."""
    about = (
        f"Per request where nothing else is said; {CONNECTIONS} connections. The service, the load, Valkey, "
        "PostgreSQL and the upstream share two cores here: more workers than one get no more cores."
    )
    assumed = (
        f"Calculated, and not run: each replica is one worker that uses {USED_SHARE:.0%} of a core; a call "
        f"has {spans} spans and {records} log records, and none comes from the cache; each replica commits "
        f"{BOOKINGS_A_SECOND + READS_A_SECOND:g} times a second. Each process is told of each call with a "
        "budget, so that what Valkey does for one grows with the processes: by a straight line through the "
        "first and the last row. For a call without one it does at most what the first row says."
    )
    return [about, "", *measured(rows), "", assumed, "", *extrapolated(rows, spans, records)]


def main() -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.capacity", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument("--write", action="store_true", help="write the tables to REPLICAS.md")
    asked = parser.parse_args()
    rows = []
    for workers in WORKERS:
        rows.append(measure(workers, asked))
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    lines = report(rows, *told())
    sys.stdout.write("\n".join([*lines, ""]))
    if asked.write:
        write_section("Capacity", lines)


if __name__ == "__main__":
    main()
