"""A slice of ``make attack``, and proofs that its verdicts can be otherwise."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tests.fakes.upstream import FakeUpstream
from tests.faults.attack import verdicts
from tests.faults.attack.costs import Costs, Recipe
from tests.faults.attack.fuzz import cut_everywhere, fuzz
from tests.faults.attack.grammar import MARK
from tests.faults.attack.reference import Meant, problems_of, read
from tests.faults.attack.rows import Finding, Row, Rows
from tests.faults.attack.target import Tally, Target
from tests.faults.attack.wire import Conversation, NotHttpError, RawAnswer, answers_in, chunked, head
from tests.harness import running_app

if TYPE_CHECKING:
    from service.protocol import Protocol

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

UVICORNS = cast("type[Protocol]", HttpToolsProtocol)
ONE, OTHER, TRAP = "1" * 32, "2" * 32, MARK + "3" * 24
CONVERSATIONS = 80


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with Target() as target:
        yield target
        assert verdicts.of_log(target.process.text()) == []
        assert target.second.failures == []


def test_each_request_has_one_answer_whatever_stands_around_it(target: Target) -> None:
    fuzzed = fuzz(target, 60, most=CONVERSATIONS)
    assert fuzzed.problems == []
    assert fuzzed.conversations == CONVERSATIONS


def test_a_conversation_is_the_same_wherever_it_is_cut(target: Target) -> None:
    assert [problems for _, problems in cut_everywhere(target, step=61) if problems] == []


PLAIN = Recipe(
    "/v1/chat/completions", '{"messages":[{"role":"user","content":"', "a", "", '"}]}', 0, 1_000_000
)


@pytest.mark.parametrize("unit", ["[]", "1", '"a":1', '{"role":"user","content":"h"}'])
def test_a_megabyte_of_values_costs_no_more_than_one_of_text(target: Target, unit: str) -> None:
    place = ('{"messages":[{}],"x":{', "}}") if ":1" in unit else ('{"messages":[', "]}")
    values = replace(PLAIN, before=place[0], unit=unit, between=",", after=place[1])
    costs = Costs(target)

    def least_s(recipe: Recipe) -> float:
        return min(costs.of(recipe.path, recipe.body, recipe.what).total_s for _ in range(3))

    assert least_s(values) < 2 * least_s(PLAIN)


def test_a_refusal_costs_the_same_for_half_a_surrogate_pair_as_for_a_letter(target: Target) -> None:
    refused = replace(PLAIN, before=PLAIN.before.replace("{", '{"model":"refusing",', 1))
    costs = Costs(target)

    def least_s(unit: str) -> float:
        recipe = replace(refused, unit=unit)
        return min(costs.of(recipe.path, recipe.body, recipe.what).total_s for _ in range(3))

    assert least_s("\\ud800") < 2 * least_s("\\u00e9")


@dataclass
class Other:
    """Another server, with which the same conversations are had."""

    port: int
    token: str
    admin: str
    tally: Tally = field(default_factory=Tally)


def test_the_fuzzer_finds_what_uvicorn_makes_of_an_offer_to_upgrade() -> None:
    with FakeUpstream() as upstream, running_app(protocol=UVICORNS, litellm_url=upstream.url) as app:
        other = Other(app.port, app.token(), app.token("admin"))
        assert any(problems for _, problems in cut_everywhere(other, step=400))
        assert fuzz(other, 60, most=CONVERSATIONS).problems


def answer(request_id: str, status: int = 200, *, close: bool = False) -> RawAnswer:
    return RawAnswer(status, {"x-request-id": request_id, **({"connection": "close"} if close else {})}, b"")


def traced(trace_id: str, method: str = "GET", *fields: str) -> bytes:
    return head(method, "/auth/me", "", (f"traceparent: 00-{trace_id}-{'1' * 16}-01", *fields))


TWO = traced(ONE) + traced(OTHER)


@pytest.mark.parametrize(
    ("data", "answers", "closed", "problem"),
    [
        (TWO, [answer(ONE), answer(OTHER)], False, None),
        (TWO, [answer(ONE)], False, "1 answers to 2 requests"),
        (TWO, [answer(ONE, close=True)], False, "it stays open"),
        (TWO, [answer(OTHER), answer(ONE)], False, "has the id"),
        (TWO, [answer(ONE), answer(OTHER), answer(TRAP)], False, "to a request in a body"),
        (TWO, [answer(ONE), answer(OTHER), answer("4" * 32)], False, "one too many"),
        (TWO, [answer(ONE, 500), answer(OTHER)], False, "answer 1 (500)"),
        (TWO, [answer("4" * 32, 400), answer(OTHER)], True, "does not end the connection"),
        (TWO, [answer("4" * 32, 400, close=True)], True, None),
        (traced(ONE) + b"\0\r\n\r\n", [answer(ONE), answer("4" * 32, 400)], True, None),
        (
            traced(ONE) + b"\0\r\n\r\n",
            [answer(ONE), answer("4" * 32, 400)],
            False,
            "leaves the connection open",
        ),
        (traced(ONE) + b"\0\r\n\r\n", [answer(ONE), answer(ONE, 400)], True, "one too many"),
        (traced(ONE) + traced(OTHER, "POST", "Content-Length: 5"), [answer(ONE)], False, None),
    ],
)
def test_wrong_answers_are_seen(
    data: bytes,
    answers: list[RawAnswer],
    closed: bool,  # noqa: FBT001 - pytest passes it by name
    problem: str | None,
) -> None:
    found = problems_of(read(data), Conversation(answers, b"", closed), {TRAP})
    assert bool(found) is (problem is not None)
    assert problem is None or problem in "; ".join(found)


def test_bytes_after_the_last_answer_are_seen() -> None:
    assert problems_of(read(traced(ONE)), Conversation([answer(ONE)], b"HTTP/1.1 2", closed=False))


def test_the_reference_reads_what_is_a_request_and_what_is_a_body() -> None:
    body = traced(TRAP)
    data = traced(ONE, "POST", f"Content-Length: {len(body)}") + body + b"\r\n"
    data += traced(OTHER, "POST", "Transfer-Encoding: chunked", "Upgrade: h2c", "Connection: Upgrade")
    reading = read(data + chunked(body) + traced("5" * 32)[:-2])
    assert reading.requests == (Meant("POST", ONE, complete=True), Meant("POST", OTHER, complete=True))
    assert not reading.malformed
    assert read(data + b"0\r\n\r\n\0\r\n\r\n").malformed


def test_what_is_no_answer_is_not_taken_for_one() -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab"
    assert [found.body for found in answers_in(whole * 2)[0]] == [b"ab", b"ab"]
    assert answers_in(whole[:-1])[0] == []
    for wrong in (
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"abc" + whole,
        b"HTTP/1.1 200 OK\r\nContent-Length 2\r\n\r\nab",
    ):
        with pytest.raises(NotHttpError):
            answers_in(wrong)


def line(**fields: str) -> str:
    return json.dumps({"level": "INFO", "message": "m", **fields}) + "\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (line(), None),
        (line(level="ERROR", message="Giving up after attempt 4: no retries left"), None),
        (line(level="ERROR"), "an ERROR"),
        (line(**{"exception.stacktrace": "Traceback"}), "a stack trace"),
        ("Traceback (most recent call last):\n", "not JSON"),
        ("[1]\n", "not JSON"),
        (line(request_id=TRAP), "became the request"),
    ],
)
def test_a_line_that_should_not_be_is_seen(text: str, problem: str | None) -> None:
    found = verdicts.of_log(line() + text)
    assert bool(found) is (problem is not None)
    assert problem is None or problem in found[0]


def test_a_damaged_request_may_let_bytes_of_its_body_be_one() -> None:
    assert verdicts.of_log(line(request_id=TRAP), frozenset({TRAP})) == []


def test_memory_that_grows_is_seen() -> None:
    assert verdicts.of_memory(100, 150) == []
    assert verdicts.of_memory(100, 201)


def test_failed_and_missing_calls_of_the_second_user_are_seen() -> None:
    assert verdicts.of_second_user(verdicts.MIN_CALLS, []) == []
    assert verdicts.of_second_user(verdicts.MIN_CALLS, ["plain: 503"])
    assert verdicts.of_second_user(verdicts.MIN_CALLS - 1, [])


def test_a_row_that_fails_and_one_that_raises_are_wrong() -> None:
    def raises(_target: None, _found: Finding) -> None:
        raise ConnectionError("refused")

    assert Row("name", "sent", "wanted", raises).verdict(None).problems == ["ConnectionError: refused"]
    rows: Rows[int] = Rows()

    @rows.row("name", "sent", "wanted")
    def _(number: int, found: Finding) -> None:
        found.say(f"{number}")
        found.expect(number == 1, "another number")

    assert [row.verdict(1) for row in rows.all] == [Finding("1", [])]
    assert [row.verdict(2) for row in rows.all] == [Finding("2", ["another number"])]
