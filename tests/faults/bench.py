"""One service process, one upstream that misbehaves, and what came of each fault."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from tests.e2e.support import to_collector
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Answer as Fine
from tests.fakes.upstream import FakeUpstream
from tests.faults.table import DEADLINE_S, Fault, Place
from tests.harness import Answer, ServiceProcess

SLACK_S = 0.5
OFTEN = {
    "OTEL_METRIC_EXPORT_INTERVAL": "100",
    "OTEL_BSP_SCHEDULE_DELAY": "50",
    "OTEL_BLRP_SCHEDULE_DELAY": "50",
}
INCIDENT_ID = re.compile(r"inc_[0-9a-f]{16}")
FIRST_LINE, LAST_LINE = "llm_request_started", "http_request_completed"

Counts = dict[tuple[str, frozenset[tuple[str, Any]]], float]


def until(condition: Callable[[], object], what: str, limit_s: float = 5.0) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s} s for {what}")
        time.sleep(0.005)


class UpstreamAt(FakeUpstream):
    """The fake upstream at a port known beforehand: it can stop, and come back where it was."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name="fake-upstream")
        self._thread.start()
        return self


@contextmanager
def nobody_at(port: int, place: Place) -> Iterator[None]:
    """Hold the port: connections to it are refused, or (on Linux) get no answer at all."""
    with ExitStack() as stack:
        bound = stack.enter_context(socket.socket())
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
        if place == "unreachable":
            # The kernel drops what comes once the queue of connections that nobody accepts is full.
            bound.listen(0)
            for _ in range(2):
                filler = stack.enter_context(socket.socket())
                filler.settimeout(0)
                filler.connect_ex(("127.0.0.1", port))
        yield


@dataclass(frozen=True)
class Outcome:
    """What came of one fault: the answer, the requests that the upstream saw, the request's log lines."""

    answer: Answer
    seen: int
    messages: list[str]


class Bench:
    """A real process between a caller and the upstream; everything is stopped at the end.

    Args:
        variables: The service's settings.
        receiver: Where its telemetry goes; nowhere without one.
    """

    def __init__(self, variables: Mapping[str, str], receiver: OtlpReceiver | None = None) -> None:
        self._variables = {**variables, **({**to_collector(receiver), **OFTEN} if receiver else {})}
        self._receiver = receiver
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.upstream = UpstreamAt(0).__enter__()
        self._stack.callback(self._stop_upstream)
        try:
            process = ServiceProcess({"LITELLM_URL": self.upstream.url, **self._variables})
            self.process = self._stack.enter_context(process).wait_ready()
            self.token = self.process.token()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def _stop_upstream(self) -> None:
        # Not the one of the start: it may have been replaced meanwhile.
        self.upstream.__exit__()

    @property
    def receiver(self) -> OtlpReceiver:
        """Where the telemetry goes."""
        assert self._receiver is not None
        return self._receiver

    def generate(self, model: str | None = None, **options: Any) -> Answer:
        """Ask a model; the default one, unless named."""
        body = {"prompt": "What is a trace?", **({"model": model} if model else {})}
        return self.process.call("POST", "/llm/generate", **{"body": body, "token": self.token, **options})

    def generate_often(self, number: int, **options: Any) -> list[Answer]:
        """Ask from so many callers at the same time."""
        with ThreadPoolExecutor(number) as callers:
            return [
                call.result() for call in [callers.submit(self.generate, **options) for _ in range(number)]
            ]

    def play(self, fault: Fault) -> Outcome:
        """Let the upstream do what the fault says while one call is made."""
        self.upstream.clear()
        self.upstream.script(*fault.behaviours[:-1])
        self.upstream.default = fault.behaviours[-1]
        with self.stopped(fault.place) if fault.place != "answering" else ExitStack():
            answer = self.generate("demo")
            # While nobody listens, there is nobody to see a request.
            seen = 0
        if fault.place == "answering":
            seen = len(self.upstream.chat_requests)
        self.upstream.default = Fine()
        return Outcome(answer, seen, self.messages(answer.request_id))

    def messages(self, request_id: str) -> list[str]:
        """The messages of a request's log lines, all of them: the last one comes after the answer."""
        found: list[str] = []

        def complete() -> bool:
            found[:] = [line["message"] for line in self.process.lines(request_id)]
            return LAST_LINE in found

        until(complete, f"the last line of {request_id}")
        return found

    @contextmanager
    def stopped(self, place: Place) -> Iterator[None]:
        """Take the upstream away for the time of a block; a new one comes back to the same port."""
        self._stop_upstream()
        with nobody_at(self.upstream.port, place):
            yield
        self.upstream = UpstreamAt(self.upstream.port).__enter__()

    def counts(self, *metrics: str) -> Counts:
        """The metrics' values from now on, by name and attributes."""
        now_ns = time.time_ns()
        self.receiver.wait_for(lambda it: any(point.time_ns > now_ns for point in it.points(metrics[0])))
        return {
            (point.name, frozenset(point.attributes.items())): point.value
            for metric in metrics
            for point in self.receiver.latest(metric)
        }

    def value(self, metric: str, **attributes: str) -> float:
        """One metric's value from now on, summed over the points with these attributes (``__`` is a dot)."""
        wanted = {(name.replace("__", "."), value) for name, value in attributes.items()}
        return sum(value for (_, having), value in self.counts(metric).items() if wanted <= having)


def changed(before: Counts, after: Counts) -> Counts:
    """What was added, where anything was."""
    added = {key: value - before.get(key, 0.0) for key, value in after.items()}
    return {key: value for key, value in added.items() if value}


def timings_ms(answer: Answer) -> dict[str, float]:
    """The parts of ``Server-Timing``, in milliseconds."""
    parts = (part.partition(";dur=") for part in answer.headers.get("server-timing", "").split(", "))
    return {name: float(duration) for name, _, duration in parts if name}


def differences(fault: Fault, outcome: Outcome) -> list[str]:
    """What is otherwise than the table says, one line each."""
    answer = outcome.answer
    timings = timings_ms(answer)
    pairs: list[tuple[str, object, object]] = [
        ("status", answer.status, fault.status),
        ("error", answer.json.get("error", ""), fault.error),
        ("requests seen upstream", outcome.seen, fault.seen),
        ("X-LLM-Attempts", answer.headers.get("x-llm-attempts"), f"{fault.attempts}"),
        ("Retry-After", answer.headers.get("retry-after"), fault.retry_after),
        (
            "Server-Timing",
            timings.keys() - {"auth"},
            {"llm", "total", *(["retry"] if fault.delays_s else [])},
        ),
        ("within the deadline", answer.seconds <= DEADLINE_S + SLACK_S, True),
        ("request id", answer.json["request_id"], answer.request_id),
    ]
    if fault.error:
        pairs.append(("incident id", bool(INCIDENT_ID.fullmatch(answer.json["incident_id"])), True))
    found = [f"{what}: {got!r}, not {wanted!r}" for what, got, wanted in pairs if got != wanted]
    wanted_lines = fault.messages
    same = len(outcome.messages) == len(wanted_lines) and all(
        map(fnmatchcase, outcome.messages, wanted_lines)
    )
    if not same:
        found.append(f"log lines: {outcome.messages}, not {wanted_lines}")
    return found
