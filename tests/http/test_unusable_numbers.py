"""A cost or a token count that cannot be true: unknown everywhere, and logged once."""

import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.upstream.messages import MAX_UNUSABLE, UNUSABLE_INTERVAL_S, UnusableNumbers
from tests.fakes.clock import FakeClock
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.streams import RawStream
from tests.fakes.upstream import Answer, FakeUpstream
from tests.harness import Answer as Reply
from tests.harness import AppUnderTest, running_app
from tests.http.support import trace_of
from tests.unit.conftest import Lines

COST = "llmops.llm.cost"
TOKENS = "gen_ai.client.token.usage"
WARNING = "The upstream's answer has a number that cannot be true, which counts as unknown"
COUNTS = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
COSTS: dict[str, tuple[Any, str]] = {
    "huge": (1e9, "too large"),
    "just too large": (1_000.01, "too large"),
    "negative": (-0.01, "negative"),
    "nan": (math.nan, "not a number"),
    "inf": (math.inf, "too large"),
    "minus inf": (-math.inf, "negative"),
    "larger than a float": (10**400, "too large"),
    "text": ("free", "not a number"),
    "bool": (True, "not a number"),
    "list": ([0.5], "not a number"),
}


@pytest.fixture
def model(upstream: FakeUpstream) -> str:
    """A model that nothing was logged about, as the process logs each of them once."""
    upstream.unknown_model_error = False
    return f"model-{secrets.token_hex(4)}"


@pytest.fixture
def mlflow() -> Iterator[FakeMlflow]:
    with FakeMlflow() as fake:
        yield fake


@pytest.fixture
def lines() -> Lines:
    found = Lines()
    found.configure()
    return found


def ask(app: AppUnderTest, token: str, model: str, **fields: Any) -> Reply:
    body = {"prompt": "x", "model": model, **fields}
    return app.call("POST", "/llm/generate", body=body, token=token)


def counted(app: AppUnderTest, kind: str) -> float:
    """How many answers had a token count of this kind."""
    return app.value(TOKENS, gen_ai__token__type=kind)


def warnings(app: AppUnderTest) -> list[tuple[str, str, str]]:
    found = [line for line in app.lines() if line["message"] == WARNING]
    assert {line["level"] for line in found} <= {"WARNING"}
    return [(line["model"], line["place"], line["problem"]) for line in found]


@pytest.mark.parametrize("name", COSTS)
def test_a_cost_in_the_body(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path, model: str, name: str
) -> None:
    cost, problem = COSTS[name]
    upstream.default = Answer(cost=None, extra={"usage": {**COUNTS, "cost": cost}})
    values: dict[str, Any] = {"mlflow_tracking_uri": mlflow.url, "spool_path": str(tmp_path / "spool")}
    with running_app(litellm_url=upstream.url, **values) as app:
        token = app.token()
        answers = [ask(app, token, model) for _call in range(3)]
        for answer in answers:
            assert (answer.status, answer.json["cost"], answer.json["total_tokens"]) == (200, None, 30)
            assert not [span for span in trace_of(app, answer.request_id) if COST in (span.attributes or {})]
        assert app.value(COST) == 0
        assert app.value(TOKENS) == 6
        assert warnings(app) == [(model, "usage.cost", problem)]
        ended = [line for line in app.lines() if line["message"] == "llm_request_completed"]
        assert not [line for line in ended if "cost" in line]
    assert [kept.span.attributes["mlflow.llm.cost"] for kept in mlflow.kept] == [{"total_cost": 0.0}] * 3
    assert mlflow.runs[0].metrics["cost_usd"] == 0


@pytest.mark.parametrize(
    ("cost", "problem"),
    [
        ("1e9", "too large"),
        ("-1", "negative"),
        ("nan", "not a number"),
        ("inf", "too large"),
        ("x", "not a number"),
    ],
)
def test_a_cost_in_the_head(upstream: FakeUpstream, model: str, cost: str, problem: str) -> None:
    upstream.default = Answer(cost=cost)
    with running_app(litellm_url=upstream.url) as app:
        token = app.token()
        for _call in range(2):
            answer = ask(app, token, model)
            assert (answer.status, answer.json["cost"]) == (200, None)
        assert app.value(COST) == 0
        assert warnings(app) == [(model, "x-litellm-response-cost", problem)]


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (-1, "negative"),
        (10**18, "too large"),
        (100_000_001, "too large"),
        (True, "not a whole number"),
        ("12", "not a whole number"),
        (1.5, "not a whole number"),
        (math.nan, "not a whole number"),
    ],
)
def test_a_token_count(upstream: FakeUpstream, model: str, tokens: Any, problem: str) -> None:
    upstream.default = Answer(extra={"usage": {**COUNTS, "prompt_tokens": tokens}})
    with running_app(litellm_url=upstream.url) as app:
        token = app.token()
        for _call in range(2):
            answer = ask(app, token, model)
            assert (answer.status, answer.json["prompt_tokens"]) == (200, None)
            assert (answer.json["completion_tokens"], answer.json["cost"]) == (20, 0.00042)
        assert counted(app, "input") == 0
        assert counted(app, "output") == 2
        assert warnings(app) == [(model, "usage.prompt_tokens", problem)]


def test_a_stream(upstream: FakeUpstream, model: str) -> None:
    upstream.default = RawStream(
        [
            b'data: {"id":"1","model":"demo","choices":[{"index":0,"delta":{"content":"Hello"}}]}\n\n',
            b'data: {"choices":[],"usage":{"prompt_tokens":-5,"completion_tokens":3,"cost":NaN}}\n\n',
            b"data: [DONE]\n\n",
        ]
    )
    with running_app(litellm_url=upstream.url) as app:
        token = app.token()
        for _call in range(2):
            answer = ask(app, token, model, stream=True)
            assert answer.status == 200
            assert b'"prompt_tokens":null' in answer.body.replace(b" ", b"")
            assert b'"cost":null' in answer.body.replace(b" ", b"")
        assert app.value(COST) == 0
        assert counted(app, "input") == 0
        assert warnings(app) == [
            (model, "usage.prompt_tokens", "negative"),
            (model, "usage.cost", "not a number"),
        ]


@pytest.mark.parametrize("cost", [0, 0.5, 1_000, "0.25"])
def test_a_number_that_can_be_true_counts_and_is_not_logged(
    upstream: FakeUpstream, model: str, cost: Any
) -> None:
    upstream.default = Answer(cost=None, extra={"usage": {**COUNTS, "cost": cost, "total_tokens": None}})
    with running_app(litellm_url=upstream.url) as app:
        answer = ask(app, app.token(), model)
        assert answer.json["cost"] == float(cost)
        assert app.value(COST) == float(cost)
        assert warnings(app) == []


def test_each_model_is_logged_once_an_hour_and_many_models_do_not_fill_the_log(lines: Lines) -> None:
    clock = FakeClock(0.0)
    numbers = UnusableNumbers(clock)
    for _round in range(3):
        for model in range(2 * MAX_UNUSABLE):
            numbers.log(f"model-{model}", {}, {"cost": -1})
    assert len(lines.all) == MAX_UNUSABLE
    clock.advance(UNUSABLE_INTERVAL_S)
    numbers.log("model-0", {}, {"cost": -1})
    numbers.log("model-0", {}, {"cost": -2})
    assert len(lines.all) == MAX_UNUSABLE + 1
