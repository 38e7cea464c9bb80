"""One service process, one upstream that misbehaves, and what came of each fault."""

import asyncio
import json
import re
import secrets
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from http.client import HTTPConnection, IncompleteRead
from typing import Any, Self

from tests.e2e.support import to_collector
from tests.fakes.operations import RESPONSE
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import AcceptOnly, Behaviour, FakeUpstream, SeenRequest, Status
from tests.fakes.wire import Exchange, Head
from tests.faults.cases import Case, Outcome
from tests.faults.routes import CHAT_ANSWER, ROUTES
from tests.faults.table import DEADLINE_S, Place
from tests.faults.traces import Counts
from tests.harness import Answer, ServiceProcess

SLACK_S = 0.5
LATE = "the answer came after the deadline"
OFTEN = {
    "OTEL_METRIC_EXPORT_INTERVAL": "100",
    "OTEL_BSP_SCHEDULE_DELAY": "50",
    "OTEL_BLRP_SCHEDULE_DELAY": "50",
}
INCIDENT_ID = re.compile(r"inc_[0-9a-f]{16}")
FIRST_LINE, LAST_LINE = "llm_request_started", "http_request_completed"
AT_ONCE = 12
"""Calls at the same time; most of them wait for the deadline."""


def until(condition: Callable[[], object], what: str, limit_s: float = 5.0) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s} s for {what}")
        time.sleep(0.005)


def trace_of(request: Head | SeenRequest) -> str:
    """The trace that a request belongs to; every attempt of a call belongs to the caller's."""
    return request.headers.get("traceparent", "--").split("-")[1]


class UpstreamAt(FakeUpstream):
    """The fake upstream at a port known beforehand: it can stop, and come back where it was.

    It can also do something else for each trace, so that calls at the same time do not disturb each other.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self._plays: dict[str, list[Behaviour]] = {}
        self._left: set[str] = set()

    def play_for(self, trace_id: str, behaviours: Sequence[Behaviour]) -> None:
        """Do these for the requests of a trace, one after the other, and the last one for all that follow."""
        with self._changed:
            self._plays[trace_id] = list(behaviours)

    def requests_of(self, trace_id: str) -> list[SeenRequest]:
        """The requests of a trace."""
        return [request for request in self.requests if trace_of(request) == trace_id]

    def was_left(self, trace_id: str) -> bool:
        """Whether the client went away before the answer to a request of this trace was complete."""
        with self._changed:
            return trace_id in self._left

    def _leaves_unread(self, head: Head) -> bool:
        plays = self._plays.get(trace_of(head))
        return super()._leaves_unread(head) if plays is None else isinstance(plays[0], AcceptOnly)

    def _choose(self, request: SeenRequest) -> Behaviour:
        plays = self._plays.get(trace_of(request))
        if plays is None:
            return super()._choose(request)
        return plays.pop(0) if len(plays) > 1 else plays[0]

    async def _play(self, behaviour: Behaviour, exchange: Exchange, gone: asyncio.Event) -> bool:
        keeps = await super()._play(behaviour, exchange, gone)
        if not exchange.complete:
            with self._changed:
                self._left.add(trace_of(exchange.request))
                self._changed.notify_all()
        return keeps

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
        self._stored: dict[Case, str] = {}

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

    def prepare(self, cases: Sequence[Case]) -> None:
        """Make the stored responses that the cases are about, each of them another one."""
        for case in cases:
            if case.route.row.stored:
                trace_id, response_id = secrets.token_hex(16), f"resp_{secrets.token_hex(8)}"
                self.upstream.play_for(trace_id, [Status(200, {**RESPONSE, "id": response_id})])
                answer, _ = self._call(Case(case.fault, ROUTES["responses"]), trace_id)
                assert answer.status == 200, answer.body
                self._stored[case] = response_id

    def play_all(self, cases: Sequence[Case]) -> list[Outcome]:
        """Play cases at the same time; they are all about the same place."""
        (place,) = {case.fault.place for case in cases}
        self.upstream.clear()
        ids = [secrets.token_hex(16) for _ in cases]
        for case, trace_id in zip(cases, ids, strict=True):
            self.upstream.play_for(trace_id, case.behaviours)
        with (
            nullcontext() if place == "answering" else self.stopped(place),
            ThreadPoolExecutor(AT_ONCE) as callers,
        ):
            answers = list(callers.map(self._call, cases, ids))
        lines = self._messages_of(ids)
        return [
            self._outcome(case, answer, lines[trace_id])
            for case, trace_id, answer in zip(cases, ids, answers, strict=True)
        ]

    def _call(self, case: Case, trace_id: str) -> tuple[Answer, bool]:
        """Make the call; its answer as far as it came, and whether it was whole."""
        content, content_type = case.body
        sent = {
            "traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01",
            "Authorization": f"Bearer {self.token}",
            "Content-Type": content_type,
        }
        path = case.route.path.format(response_id=self._stored.get(case))
        connection = HTTPConnection("127.0.0.1", self.process.port, timeout=30)
        started_s, complete = time.perf_counter(), True
        try:
            connection.request(case.route.row.method, path, content or None, sent)
            response = connection.getresponse()
            try:
                body = response.read()
            except IncompleteRead as error:
                body, complete = error.partial, False
        finally:
            connection.close()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, body, time.perf_counter() - started_s), complete

    def _outcome(self, case: Case, came: tuple[Answer, bool], messages: list[str]) -> Outcome:
        answer, complete = came
        trace_id = answer.request_id
        if case.fault.waits and answer.headers["x-llm-attempts"] != "0":
            with suppress(TimeoutError):
                self.upstream.wait_for(lambda _: self.upstream.was_left(trace_id))
        seen = self.upstream.requests_of(trace_id)
        parents = frozenset(request.headers["traceparent"].split("-")[2] for request in seen)
        return Outcome(answer, len(seen), messages, self.upstream.was_left(trace_id), parents, complete)

    def messages(self, request_id: str) -> list[str]:
        """The messages of a request's log lines, all of them: the last one comes after the answer."""
        return self._messages_of([request_id])[request_id]

    def _messages_of(self, request_ids: Sequence[str]) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)

        def complete() -> bool:
            found.clear()
            for line in self.process.lines():
                found[line.get("request_id", "")].append(line["message"])
            return all(LAST_LINE in found[request_id] for request_id in request_ids)

        until(complete, f"the last lines of {request_ids}", 10.0)
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


def differences(case: Case, outcome: Outcome) -> list[str]:
    """What is otherwise than the table says, one line each."""
    answer, fault = outcome.answer, case.fault
    timings = timings_ms(answer)
    pairs: list[tuple[str, object, object]] = [
        ("status", answer.status, fault.status),
        ("requests seen upstream", outcome.seen, case.seen),
        ("X-LLM-Attempts", answer.headers.get("x-llm-attempts"), f"{fault.attempts}"),
        ("Retry-After", answer.headers.get("retry-after"), fault.retry_after),
        (
            "Server-Timing",
            timings.keys() - {"auth"},
            {"llm", "total", *(["retry"] if fault.delays_s else [])},
        ),
        # Bytes have no place for an error: the connection breaks.
        ("complete", outcome.complete, not (fault.begins and case.given.kind == "bytes")),
        # What nobody waits for any more is not left running on the model's side.
        ("left alone", outcome.left or not fault.waits, True),
    ]
    found = differences_of_the_body(case, answer)
    found += [f"{what}: {got!r}, not {wanted!r}" for what, got, wanted in pairs if got != wanted]
    if answer.seconds > DEADLINE_S + SLACK_S:
        found.append(LATE)
    wanted_lines = fault.messages
    same = len(outcome.messages) == len(wanted_lines) and all(
        map(fnmatchcase, outcome.messages, wanted_lines)
    )
    if not same:
        found.append(f"log lines: {outcome.messages}, not {wanted_lines}")
    return found


def differences_of_the_body(case: Case, answer: Answer) -> list[str]:
    """What is otherwise than the table says in the answer's body."""
    if case.fault.status == answer.status:
        try:
            if case.fault.begins and case.given.kind == "bytes":
                right = answer.body.startswith(case.given.begun[0][:1]) and b'"error"' not in answer.body
                return [] if right else [f"the bytes before the error: {answer.body[:500]!r}"]
            if case.fault.begins:
                return differences_of_a_broken_stream(case, answer)
            if case.fault.error:
                return differences_of_an_error(case, answer.json, answer.request_id)
            return differences_of_an_answer(case, answer)
        except (ValueError, LookupError) as error:
            return [f"the answer cannot be read: {error!r}: {answer.body[:500]!r}"]
    return [f"the answer: {answer.body[:500]!r}"]


def differences_of_an_error(case: Case, body: Mapping[str, Any], request_id: str) -> list[str]:
    """What is otherwise than wanted in an error's body, or in the data of the event of one."""
    said = case.route.error_in(body)
    pairs: list[tuple[str, object, object]] = [
        ("error", said.get("name"), case.fault.error),
        ("request id", said.get("request_id"), request_id),
        ("incident id", bool(INCIDENT_ID.fullmatch(said.get("incident_id", ""))), True),
    ]
    return [f"{what}: {got!r}, not {wanted!r}" for what, got, wanted in pairs if got != wanted]


def differences_of_a_broken_stream(case: Case, answer: Answer) -> list[str]:
    """What is otherwise than wanted in a stream that failed: its first events, and one with the error."""
    pieces = [piece + b"\n\n" for piece in answer.body.split(b"\n\n")]
    # Clients ignore comments.
    *before, last, rest = (piece for piece in pieces if not piece.startswith(b":"))
    begun = case.given.begun
    found = [] if rest == b"\n\n" else [f"the end of the stream: {rest!r}"]
    if case.route.protocol == "own":
        right = {piece.partition(b"\n")[0] for piece in before} == {b"event: token"}
    else:
        right = before[: len(begun)] == list(begun) and set(before[len(begun) :]) <= {begun[-1]}
    if not right:
        found.append(f"the events before the error: {before[: len(begun) + 2]}")
    if b"[DONE]" in answer.body:
        found.append("a stream that failed ends with [DONE]")
    said = json.loads(last.rpartition(b"data: ")[2])
    found += case.route.problems_of_last_event(last, before)
    return found + differences_of_an_error(case, said, answer.request_id)


def differences_of_an_answer(case: Case, answer: Answer) -> list[str]:
    """What is otherwise than wanted in a correct answer: the upstream's bytes, except in our own protocol."""
    if case.route.protocol != "own":
        right = answer.body == case.given.content
    elif case.streamed:
        right = answer.body.split(b"\n\n")[-2].startswith(b"event: done\n")
    else:
        said = CHAT_ANSWER["choices"][0]["message"]["content"]
        right = (answer.json["response"], answer.json["request_id"]) == (said, answer.request_id)
    return [] if right else [f"the answer: {answer.body[:500]!r}"]
