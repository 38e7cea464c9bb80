"""Bodies that are too large, or promised and never sent: answered in time, and held in no memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fakes.otlp import OtlpReceiver
from tests.faults.bench import Bench
from tests.faults.bodies import promising
from tests.harness import Answer

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

TEN_MB = 10 * 1_024 * 1_024
TWO_MB = 2 * 1_024 * 1_024
BODY_TIMEOUT_S = 0.5
IN_FLIGHT = "llmops.requests.in_flight"
REJECTED = "llmops.requests.rejected"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    variables = {"REQUEST_BODY_TIMEOUT_S": f"{BODY_TIMEOUT_S}"}
    with OtlpReceiver() as receiver, Bench(variables, receiver) as bench:
        yield bench


@pytest.fixture
def headers(bench: Bench) -> dict[str, str]:
    return {"Authorization": f"Bearer {bench.token}"}


def test_ten_megabytes_in_chunks_are_refused_before_two_are_sent(
    bench: Bench, headers: dict[str, str]
) -> None:
    before = bench.value(REJECTED, reason="too_large")
    with promising(bench.process.port, {**headers, "Transfer-Encoding": "chunked"}) as sender:
        sender.send_chunked(TEN_MB)
        answer = sender.answer()
        assert (answer.status, answer.json["error"]) == (413, "PayloadTooLargeError")
        assert answer.headers["connection"] == "close"
        assert 1_024 * 1_024 < sender.sent < TWO_MB
        assert sender.closed()
    assert bench.value(REJECTED, reason="too_large") == before + 1


def test_ten_declared_megabytes_are_refused_before_one_byte_of_them_is_sent(
    bench: Bench, headers: dict[str, str]
) -> None:
    before = bench.value(REJECTED, reason="too_large")
    with promising(bench.process.port, {**headers, "Content-Length": f"{TEN_MB}"}) as sender:
        answer = sender.answer()
        assert (answer.status, answer.json["error"]) == (413, "PayloadTooLargeError")
        assert answer.headers["connection"] == "close"
        assert sender.closed()
        assert sender.sent == 0
    assert bench.value(REJECTED, reason="too_large") == before + 1


def test_a_caller_who_sends_ten_declared_megabytes_all_the_same_can_read_why_not(
    bench: Bench, headers: dict[str, str]
) -> None:
    with promising(bench.process.port, {**headers, "Content-Length": f"{TEN_MB}"}) as sender:
        while sender.sent < TEN_MB and not sender.answered(0.001):
            sender.send(b" " * 65_536)
        answer = sender.answer()
        assert (answer.status, answer.json["error"]) == (413, "PayloadTooLargeError")
        assert sender.sent < TWO_MB


def never_sent(bench: Bench, headers: dict[str, str], length: int = 1_000) -> Answer:
    with promising(bench.process.port, {**headers, "Content-Length": f"{length}"}) as sender:
        answer = sender.answer()
        assert sender.closed()
        return answer


def test_a_body_that_never_comes_is_not_waited_for(bench: Bench, headers: dict[str, str]) -> None:
    answer = never_sent(bench, headers)
    assert (answer.status, answer.json["error"]) == (408, "RequestTimeoutError")
    assert answer.headers["connection"] == "close"
    assert BODY_TIMEOUT_S - 0.05 <= answer.seconds <= BODY_TIMEOUT_S + 0.5


@pytest.mark.parametrize("framing", [{"Content-Length": "1000"}, {"Transfer-Encoding": "chunked"}], ids=str)
def test_a_body_that_comes_byte_by_byte_is_not_waited_for(
    bench: Bench, headers: dict[str, str], framing: dict[str, str]
) -> None:
    with promising(bench.process.port, {**headers, **framing}) as sender:
        if "Transfer-Encoding" in framing:
            sender.send(b"3e8\r\n")
        sender.drip(0.05, limit_s=5)
        answer = sender.answer()
        assert (answer.status, answer.json["error"]) == (408, "RequestTimeoutError")
        assert BODY_TIMEOUT_S - 0.05 <= answer.seconds <= BODY_TIMEOUT_S + 0.5


def rss_kb(pid: int) -> int:
    """The process's resident memory."""
    (line,) = [
        line for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines() if "VmRSS" in line
    ]
    return int(line.split()[1])


def test_a_thousand_promised_bodies_are_held_in_no_memory(bench: Bench, headers: dict[str, str]) -> None:
    assert bench.process.process
    pid = bench.process.process.pid
    rss_after: list[int] = []
    with ThreadPoolExecutor(100) as callers:
        for _ in range(10):
            wave = [callers.submit(never_sent, bench, headers, 1_000_000) for _ in range(100)]
            assert {caller.result().status for caller in wave} == {408}
            rss_after.append(rss_kb(pid))
    assert rss_after[-1] / rss_after[1] <= 1.15, rss_after
    assert bench.value(IN_FLIGHT) == 0
    assert bench.generate().status == 200
