"""Each call is counted once in every book: by its caller, as a metric, as a span, and as a record."""

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.e2e.recording import QUICK, in_spool, new_trace, show, variables
from tests.e2e.support import to_collector
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Answer, FakeUpstream, Garbage, NotJson, Reset, Silent, Status
from tests.harness import ServiceProcess, request

pytestmark = pytest.mark.e2e

CALLS = 400
CALLERS = 8
LEAVERS = 10
PATIENCE_S = 0.15
LEFT = "left"

GIVEN = {
    **QUICK,
    "RETRY_MAX": "1",
    "RETRY_BASE_DELAY_S": "0.01",
    "RETRY_BUDGET_FLOOR": "1000",
    "BREAKER_FAILURE_THRESHOLD": "4",
    "BREAKER_TIMEOUT_S": "0.2",
    "LLM_TIMEOUT_S": "0.6",
    "OTEL_BSP_MAX_QUEUE_SIZE": "20000",
}


def mixture(seed: int) -> list[object]:
    """What the upstream does, in an order that looks like chance and is always the same."""
    kinds = [
        *[Answer()] * 50,
        *[Answer(delay_s=0.3)] * 10,
        *[Status(400), Status(401), Status(429), Status(500), Status(503)] * 4,
        *[Reset(), Reset("body"), Garbage(), NotJson(), Silent()] * 2,
    ]
    return random.Random(seed).choices(kinds, k=2 * CALLS)  # noqa: S311 - a test's order is no secret


class Callers:
    """People who call, some of whom leave, and what each of them saw."""

    def __init__(self, process: ServiceProcess) -> None:
        self._process = process
        self._token = process.token()
        self.outcomes: dict[str, str] = {}

    def call(self, number: int) -> None:
        """Call once; each tenth caller has no patience."""
        trace_id, header = new_trace()
        if number % 10:
            body = {"prompt": "x"}
            answer = request(
                self._process.port, "POST", "/llm/generate", body=body, token=self._token, headers=header
            )
            assert answer.request_id == trace_id
            self.outcomes[trace_id] = outcome_of(answer.status)
        else:
            self.outcomes[trace_id] = self._with_little_patience(header)

    def _with_little_patience(self, header: dict[str, str]) -> str:
        connection = self._asking(header, PATIENCE_S)
        with closing(connection), suppress(TimeoutError):
            return outcome_of(connection.getresponse().status)
        return LEFT

    def leave_while_waiting(self, upstream: FakeUpstream) -> None:
        """Call, and leave once the upstream has been asked."""
        trace_id, header = new_trace()
        before = len(upstream.chat_requests)
        with closing(self._asking(header, timeout_s=10)):
            upstream.wait_for(lambda fake: len(fake.chat_requests) > before)
        self.outcomes[trace_id] = LEFT

    def _asking(self, header: dict[str, str], timeout_s: float) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self._process.port, timeout=timeout_s)
        fields = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json", **header}
        connection.request("POST", "/llm/generate", b'{"prompt": "x"}', fields)
        return connection


def outcome_of(status: int) -> str:
    return "success" if status == 200 else "error"


def test_all_books_agree_over_a_mixed_run(
    upstream: FakeUpstream, receiver: OtlpReceiver, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    all_books_agree(upstream, receiver, mlflow, tmp_path, lambda: None)


def test_all_books_agree_when_mlflow_dies_on_the_way(
    upstream: FakeUpstream, receiver: OtlpReceiver, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    all_books_agree(upstream, receiver, mlflow, tmp_path, mlflow.down)
    assert in_spool(tmp_path / "spool")
    assert mlflow.kept


def all_books_agree(
    upstream: FakeUpstream,
    receiver: OtlpReceiver,
    mlflow: FakeMlflow,
    tmp_path: Path,
    half_way: Callable[[], None],
) -> None:
    spool = tmp_path / "spool"
    given = {**variables(upstream.url, mlflow.url, spool), **GIVEN, **to_collector(receiver)}
    with ServiceProcess(given) as process:
        process.wait_ready()
        callers = Callers(process)
        upstream.script(*mixture(7))  # type: ignore[arg-type]  # a list of behaviours
        with ThreadPoolExecutor(CALLERS) as pool:
            first = [pool.submit(callers.call, number) for number in range(CALLS // 2)]
            for call in first:
                call.result()
            mlflow.wait_for(lambda fake: bool(fake.kept))
            half_way()
            second = [pool.submit(callers.call, number) for number in range(CALLS // 2)]
            for call in second:
                call.result()
        upstream.clear()
        upstream.default = Silent()
        for _ in range(LEAVERS):
            callers.leave_while_waiting(upstream)
        assert process.stop() == 0

    spans = [
        (span.trace_id, str(span.attributes["llmops.llm.outcome"]))
        for span in receiver.spans(name="llm call")
    ]
    records = [
        *((kept.request_id, str(kept.span.attributes["llmops.llm.outcome"])) for kept in mlflow.kept),
        *((record["trace_id"], record["outcome"]) for record in in_spool(spool)),
    ]
    counted: Counter[str] = Counter()
    for point in receiver.latest("llmops.llm.calls"):
        counted[point.attributes["outcome"]] += int(point.value or 0)
    books = {
        "callers": Counter(callers.outcomes.values()),
        "llmops.llm.calls": +counted,
        "`llm call` spans": Counter(outcome for _, outcome in spans),
        "MLflow + spool": Counter(outcome for _, outcome in records),
    }
    lost = receiver.value("llmops.recorder.lost")
    in_mlflow = len(mlflow.kept)
    show(
        {
            **{name: f"{book.total():4}  {dict(sorted(book.items()))}" for name, book in books.items()},
            "of these": f"{in_mlflow} in MLflow, {len(records) - in_mlflow} in the spool, {lost:g} lost",
        }
    )
    assert lost == 0
    assert sorted(spans) == sorted(records)
    assert books["llmops.llm.calls"] == books["MLflow + spool"]
    ended = dict(records)
    assert len(ended) == len(records) == CALLS + LEAVERS
    # Who left cannot say how the call ended; who was answered can.
    known = {trace_id: outcome for trace_id, outcome in callers.outcomes.items() if outcome != LEFT}
    assert ended.keys() == callers.outcomes.keys()
    assert {trace_id: ended[trace_id] for trace_id in known} == known
    assert set(ended.values()) == {"success", "error", "cancelled"}
