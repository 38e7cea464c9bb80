"""An upstream and callers that mean harm, against the real process."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Answer, Status
from tests.faults.bench import Bench
from tests.faults.bodies import promising
from tests.faults.table import MAX_ANSWER_BYTES, VARIABLES, Zipped
from tests.faults.traces import Trace

pytestmark = pytest.mark.e2e

LONE_SURROGATE = '"\\ud800"'


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with (
        OtlpReceiver() as receiver,
        Bench({**VARIABLES, "MAX_IN_FLIGHT": "50", "MAX_IN_FLIGHT_PER_USER": "50"}, receiver) as bench,
    ):
        yield bench


def test_a_compressed_answer_is_measured_by_what_it_holds(bench: Bench) -> None:
    bench.upstream.script(Zipped(Answer("x" * 100 * MAX_ANSWER_BYTES)))
    answer = bench.generate()
    assert (answer.status, answer.json["error"]) == (502, "UpstreamError")


def test_a_retry_after_with_an_absurd_zone_is_passed_over(bench: Bench) -> None:
    headers = {"Retry-After": "Mon, 01 Jan 2024 00:00:00 +999999999999999"}
    bench.upstream.script(Status(503, headers=headers))
    answer = bench.generate()
    assert (answer.status, answer.headers["x-llm-attempts"]) == (200, "2")


@pytest.mark.parametrize("member", ["model", "content"])
def test_a_lone_surrogate_in_an_answer_is_no_bug_of_ours(bench: Bench, member: str) -> None:
    message = {"content": '"fine"', "model": '"demo"', member: LONE_SURROGATE}
    body = '{{"model": {model}, "choices": [{{"message": {{"content": {content}}}}}]}}'.format_map(message)
    bench.upstream.script(Status(200, body))
    assert bench.generate().status in {200, 502}


def test_a_lone_surrogate_in_a_refusal_costs_nobody_a_trace(bench: Bench) -> None:
    bench.upstream.script(Status(400, f'{{"error": {{"message": {LONE_SURROGATE}}}}}'))
    answer = bench.generate()
    assert answer.status == 400
    Trace(bench.receiver, answer.request_id)


def test_a_token_count_beyond_64_bits_is_no_count(bench: Bench) -> None:
    bench.upstream.script(Answer(prompt_tokens=10**30))
    answer = bench.generate()
    assert (answer.status, answer.json["prompt_tokens"]) == (200, None)


def test_strangers_who_promise_bodies_take_no_callers_place(bench: Bench) -> None:
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(promising(bench.process.port, {"Content-Length": "10"}))
        answers = [bench.generate() for _ in range(20)]
    assert {answer.status for answer in answers} == {200}
