"""What the recorder costs the caller, with MLflow fast, frozen and dead: `python -m tests.bench.recorder`.

Four processes of the service side by side, asked in turns: one without a recorder, and three whose MLflow
takes everything at once, is stopped in the middle of its work, or is gone. Upstream and MLflow are processes
of their own. What is printed are ratios to the process without a recorder, taken round by round, so that the
machine's noise hits all alike, of the median latency of one caller, of the calls a second of several, and of
the processor time of a call, which other processes hardly touch; then the memory of the service whose MLflow
is gone, over many calls.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.bench.overhead import serve_upstream
from tests.fakes.mlflow import FakeMlflow
from tests.harness import ServiceProcess

FORK = multiprocessing.get_context("fork")
BODY = json.dumps({"prompt": "What does it cost?"}).encode()
SIDES = ("off", "fast", "frozen", "dead")
LIMIT_S = 60.0
WARM_UP_CALLS = 300
SLICES = 10
"""In so many parts the long run's memory is read."""


@dataclass
class Side:
    """A process of the service, and what was measured of it, round by round."""

    name: str
    process: ServiceProcess
    spool: Path
    token: str = ""
    medians_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def call(self, connection: HTTPConnection) -> None:
        """Make one call; it must succeed."""
        fields = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        connection.request("POST", "/llm/generate", BODY, fields)
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"answered with {answer.status}")

    def calls(self, count: int) -> list[float]:
        """Make calls one after the other; the seconds of each."""
        connection = HTTPConnection("127.0.0.1", self.process.port, timeout=30)
        times = []
        for _ in range(count):
            started = time.perf_counter()
            self.call(connection)
            times.append(time.perf_counter() - started)
        connection.close()
        return times

    def many_calls(self, count: int, callers: int) -> float:
        """Make calls from several threads; how many a second."""
        threads = [threading.Thread(target=self.calls, args=(count // callers,)) for _ in range(callers)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count // callers * callers / (time.perf_counter() - started)

    @property
    def rss_mib(self) -> float:
        """The memory that the process holds."""
        assert self.process.process is not None
        pages = int(Path(f"/proc/{self.process.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def used_s(self) -> float:
        """The processor time that the process has used, all its threads together."""
        assert self.process.process is not None
        stat = Path(f"/proc/{self.process.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def settle(self) -> None:
        """Wait until a recorder that can has sent everything: its work belongs to its own turn."""
        if self.name == "fast":
            until(self.has_sent_all)

    def has_sent_all(self) -> bool:
        """Whether nothing waits in its spool."""
        return not list(self.spool.glob("*.jsonl"))


def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the recorder does not get on")
        time.sleep(0.02)


class UnreadMlflow(FakeMlflow):
    """Takes spans without reading them: a real server's work is done on other cores than the service's."""

    def take_spans(self, headers: Mapping[str, str], body: bytes) -> int:
        """Answer 200."""
        del headers, body
        return 200


def serve_mlflow(ports: Connection) -> None:
    """Run an MLflow that takes everything, until the process is ended."""
    with UnreadMlflow() as fake:
        ports.send(fake.port)
        signal.pause()


@contextmanager
def ended(process: BaseProcess) -> Iterator[BaseProcess]:
    """Run a process until the block ends."""
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def start_sides(stack: ExitStack, folder: Path) -> list[Side]:
    """Start the processes, and let each of them have its MLflow's state in the middle of its work."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    stack.enter_context(ended(FORK.Process(target=serve_upstream, args=(listener,))))
    sides = []
    for name in SIDES:
        given = {
            "LITELLM_URL": f"http://127.0.0.1:{listener.getsockname()[1]}",
            "RATE_LIMIT": "10000000/minute",
            "QDRANT_PATH": ":memory:",
            "SPOOL_PATH": str(folder / name),
        }
        mlflow = None
        if name != "off":
            here, there = FORK.Pipe()
            mlflow = stack.enter_context(ended(FORK.Process(target=serve_mlflow, args=(there,))))
            given["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{here.recv()}"
        side = Side(name, stack.enter_context(ServiceProcess(given)).wait_ready(), folder / name)
        side.token = side.process.token()
        side.calls(WARM_UP_CALLS)
        if mlflow is not None and mlflow.pid is not None:
            until(side.has_sent_all)
            if name == "frozen":
                os.kill(mlflow.pid, signal.SIGSTOP)
            if name == "dead":
                mlflow.kill()
        sides.append(side)
    return sides


def measure(sides: list[Side], rounds: int, calls: int, callers: int) -> None:
    """Ask them in turns; who begins changes from round to round."""
    for number in range(rounds):
        first = number % len(sides)
        for side in (*sides[first:], *sides[:first]):
            before_s = side.used_s
            side.medians_s.append(statistics.median(side.calls(calls // 2)))
            side.rates.append(side.many_calls(calls, callers))
            side.settle()
            side.cpu_s.append((side.used_s - before_s) / (calls // 2 + calls // callers * callers))


def ratios(values: list[float], others: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third of the rounds' ratios."""
    low, middle, high = statistics.quantiles(
        [value / other for value, other in zip(values, others, strict=True)], n=4
    )
    return low, middle, high


def report(sides: list[Side]) -> Iterator[str]:
    """The lines of the table."""
    off = sides[0]
    yield "ratio to no recorder (middle half of the rounds):"
    for side in sides[1:]:
        for what, values, others in (
            ("p50", side.medians_s, off.medians_s),
            ("throughput", side.rates, off.rates),
            ("CPU", side.cpu_s, off.cpu_s),
        ):
            low, middle, high = ratios(values, others)
            yield f"  MLflow {side.name:<7} {what:<10} {middle:.3f} ({low:.3f} to {high:.3f})"
    for side in sides:
        p50_ms, rate, cpu_ms = (
            statistics.median(side.medians_s) * 1_000,
            statistics.median(side.rates),
            statistics.median(side.cpu_s) * 1_000,
        )
        yield f"  {side.name:<14} p50 {p50_ms:.2f} ms, {rate:.0f} calls/s, {cpu_ms:.2f} ms of CPU a call"


def long_run(side: Side, calls: int, callers: int) -> Iterator[str]:
    """The lines about the memory of a process over many calls."""
    before = side.rss_mib
    seen = []
    for _ in range(SLICES):
        side.many_calls(calls // SLICES, callers)
        seen.append(side.rss_mib)
    on_disk = sum(path.stat().st_size for path in side.spool.glob("*.jsonl")) / 2**20
    yield f"memory with MLflow {side.name}, over {calls} calls: {before:.1f} MiB before, {seen[-1]:.1f} after"
    yield f"  on the way: {', '.join(f'{mib:.1f}' for mib in seen)}; in the spool {on_disk:.1f} MiB"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--calls", type=int, default=240, help="calls per side and round")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--long", type=int, default=20_000, help="calls of the long run with MLflow dead")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = start_sides(stack, Path(folder))
        measure(sides, asked.rounds, asked.calls, asked.callers)
        for line in (*report(sides), *long_run(sides[-1], asked.long, asked.callers)):
            print(line, flush=True)  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
