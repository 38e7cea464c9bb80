"""What the tests of the recorder share: load that knows what was answered, and what lies in the spool."""

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from tests.e2e.support import decoded
from tests.fakes.mlflow import FakeMlflow
from tests.harness import ServiceProcess

LIMIT_S = 40.0

QUICK = {
    "RATE_LIMIT": "1000000/minute",
    "MLFLOW_TIMEOUT_S": "2",
    "HEALTH_INTERVAL_S": "0.3",
    "HEALTH_TIMEOUT_S": "0.3",
    "HEALTH_REQUIRED": "qdrant,litellm",
    "QDRANT_PATH": ":memory:",
    "RETRY_MAX": "0",
}


def until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


def variables(litellm_url: str, mlflow_url: str, spool: Path) -> dict[str, str]:
    """The variables of a service that records, in a spool that outlives it."""
    return {
        **QUICK,
        "LITELLM_URL": litellm_url,
        "MLFLOW_TRACKING_URI": mlflow_url,
        "SPOOL_PATH": str(spool),
    }


def kill(process: ServiceProcess) -> None:
    """End the process as nobody would wish."""
    assert process.process is not None
    process.process.kill()
    process.process.wait()


def in_spool(folder: Path) -> list[dict[str, Any]]:
    """The records on disk, oldest process first; a line that is cut off is passed over."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found.append(record)
    return found


def ids_in_spool(folder: Path) -> set[str]:
    """The trace ids of the records on disk; no id may be there twice."""
    ids = [record["trace_id"] for record in in_spool(folder)]
    assert len(ids) == len(set(ids))
    return set(ids)


def left_in(folder: Path) -> list[str]:
    """The files of the spool, but for locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def new_trace() -> tuple[str, dict[str, str]]:
    """A trace id that the caller chooses, so that it is known without an answer; and its header."""
    trace_id = secrets.token_hex(16)
    return trace_id, {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}


class Load:
    """Calls without a pause from several threads, each on one connection, and what became of them.

    Args:
        process: Who is asked.
        threads: How many callers there are.
        prompt: What they ask.
    """

    def __init__(self, process: ServiceProcess, threads: int = 8, prompt: str = "x") -> None:
        self._process = process
        self._token = process.token()
        self._body = json.dumps({"prompt": prompt}).encode()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call_on, name="caller") for _ in range(threads)]
        self.answered: set[str] = set()
        """Trace ids of the calls whose whole answer was read."""
        self.unanswered: set[str] = set()
        """Trace ids of those whose connection broke."""
        self.statuses: set[int] = set()

    def _call_on(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._process.port, timeout=30)
        fields = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        while not self._stop.is_set():
            trace_id, header = new_trace()
            try:
                connection.request("POST", "/llm/generate", self._body, {**fields, **header})
                answer = connection.getresponse()
                answer.read()
            except (OSError, HTTPException):
                with self._lock:
                    self.unanswered.add(trace_id)
                break
            with self._lock:
                self.statuses.add(answer.status)
                self.answered.add(trace_id)
        connection.close()

    def wait_for(self, calls: int) -> None:
        """Wait until so many more calls have been answered."""
        goal = len(self.answered) + calls
        until(lambda: len(self.answered) >= goal, f"{goal} answers")

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """Call until the block ends, or the process does."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()


def show(table: Mapping[str, object]) -> None:
    """Print a table for whoever runs the tests with ``-s``."""
    width = max(map(len, table))
    lines = [f"  {name:<{width}}  {value}" for name, value in table.items()]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


def start_replay(process: ServiceProcess) -> subprocess.Popen[str]:
    """Start ``python -m service replay`` with the process's environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "service", "replay"],
        cwd=process.folder,
        env=process.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_of(replaying: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    """Wait for its end: exit status, and its lines, each of which must be JSON."""
    text, _ = replaying.communicate(timeout=60)
    return replaying.returncode, decoded(text)


def assert_each_once(fake: FakeMlflow, load: Load) -> None:
    """MLflow has every call that was answered, once, and no more than those whose answer got lost."""
    ids = [kept.request_id for kept in fake.kept]
    assert len(ids) == len(set(ids))
    assert load.answered <= set(ids), f"{len(load.answered - set(ids))} answered calls are missing"
    assert set(ids) <= load.answered | load.unanswered
