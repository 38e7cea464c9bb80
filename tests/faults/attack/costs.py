"""Processor time of single requests, and the search for the request that takes most of it."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any, Final

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.attack.target import Target

LIMIT_S: Final = 0.05
"""Processor time for which one request may keep the event loop."""

AGAIN: Final = 3
"""A cost over the limit is measured so often again, and the lowest counts: others share the caches."""

BATCH: Final = 20
SHOWN_BYTES: Final = 120


@dataclass(frozen=True)
class Cost:
    """What a request cost the thread of the event loop.

    ``total_s`` is all of its processor time; ``held_s`` the most of it in which another request had to wait.
    The latter is looked for only where the former is over the limit.
    """

    what: str
    status: int
    total_s: float
    held_s: float


class Costs:
    """Measures requests one by one, while nobody else has any."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def of(self, path: str, body: bytes, what: str) -> Cost:
        """Send one request, again where it seems to cost too much."""
        cost = self._total(path, body, what)
        again = [self._total(path, body, what) for _ in range(AGAIN * (cost.total_s > LIMIT_S))]
        cost = min([cost, *again], key=lambda one: one.total_s)
        if cost.total_s <= LIMIT_S:
            return cost
        held_s = min(self._held(path, body) for _ in range(AGAIN))
        return Cost(what, cost.status, cost.total_s, min(held_s, cost.total_s))

    def _total(self, path: str, body: bytes, what: str) -> Cost:
        target = self._target
        with target.second.paused():
            before_s = target.gauges.loop_s()
            answer = target.call("POST", path, body=body, timeout_s=60)
            # The log line, the span and the record of the call come after its answer, in the same turn.
            target.process.call("GET", "/health")
            total_s = target.gauges.loop_s() - before_s
        return Cost(what, answer.status, total_s, total_s)

    def _held(self, path: str, body: bytes) -> float:
        target = self._target
        with target.second.paused():
            call = threading.Thread(
                target=target.call,
                args=("POST", path),
                kwargs={"body": body, "timeout_s": 60},
            )
            call.start()
            held_s = self.held_while(call.is_alive)
            call.join()
        return held_s

    def held_while(self, under_way: Callable[[], bool]) -> float:
        """The most processor time of the loop in which a request for ``/health`` waited."""
        connection = HTTPConnection("127.0.0.1", self._target.port, timeout=60)
        longest_s = 0.0
        try:
            while under_way():
                before_s = self._target.gauges.loop_s()
                connection.request("GET", "/health")
                connection.getresponse().read()
                longest_s = max(longest_s, self._target.gauges.loop_s() - before_s)
        finally:
            connection.close()
        return longest_s


@dataclass
class Searched:
    """What the search found."""

    requests: int = 0
    seeds: int = 0
    worst: Cost = field(default_factory=lambda: Cost("nothing", 0, 0.0, 0.0))
    over: list[Cost] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, cost: Cost) -> None:
        """Keep what is worst, what is over the limit, and what is no deliberate answer."""
        self.requests += 1
        if cost.held_s > self.worst.held_s:
            self.worst = cost
        if cost.held_s > LIMIT_S:
            self.over.append(cost)
        if cost.status == 500:
            self.errors.append(cost.what)


@dataclass(frozen=True)
class Recipe:
    """How a body is made: a value again and again, nested, in a place of a request."""

    path: str
    before: str
    unit: str
    between: str
    after: str
    depth: int
    size: int

    @property
    def body(self) -> bytes:
        """The body."""
        unit = self.unit.encode()
        nested = b"[" * self.depth + unit + b"]" * self.depth
        before, between, after = self.before.encode(), self.between.encode(), self.after.encode()
        number = max(1, (self.size - len(before) - len(after)) // (len(nested) + len(between)))
        if "%" in self.unit:
            units = [nested.replace(b"%", b"%x" % at) for at in range(number)]
            return (before + between.join(units))[: self.size] + after
        return before + between.join([nested] * number) + after

    @property
    def what(self) -> str:
        """The recipe in a few words."""
        unit = self.unit if len(self.unit) < SHOWN_BYTES else f"{self.unit[:SHOWN_BYTES]}..."
        body = f"{self.before}{unit}{self.between}...{self.after}"
        return f"POST {self.path} {body} ({len(self.body):,} bytes, each value {self.depth} deep)"


CHAT: Final = '"messages":[{"role":"user","content":"h"}]'
PLACES: Final[Sequence[tuple[str, str, str]]] = (
    ("/auth/login", '{"username":"u","password":"', '"}'),
    ("/auth/login", "{", "}"),
    ("/auth/login", '{"username":[', "]}"),
    ("/llm/generate", '{"prompt":"', '"}'),
    ("/llm/generate", '{"prompt":"h","stream":true,"system_prompt":"', '"}'),
    ("/llm/generate", '{"prompt":"h","response_format":{"x":[', "]}}"),
    ("/llm/generate", '{"prompt":"h","response_format":{', "}}"),
    ("/llm/generate", '{"prompt":"h","x":[', "]}"),
    ("/llm/generate", "[", "]"),
    ("/v1/chat/completions", '{"messages":[{"role":"user","content":"', '"}]}'),
    ("/v1/chat/completions", '{"stream":true,"messages":[', "]}"),
    ("/v1/chat/completions", '{"messages":[{"role":"user","content":[', "]}]}"),
    ("/v1/chat/completions", "{" + CHAT + ',"logit_bias":{', "}}"),
    ("/v1/chat/completions", "{" + CHAT + ',"tools":[', "]}"),
    ("/v1/chat/completions", '{"model":"refusing","messages":[{"role":"user","content":"', '"}]}'),
    ("/v1/chat/completions", '{"model":"refusing",' + CHAT + ',"stop":[', "]}"),
    ("/v1/chat/completions", '{"model":"refusing","messages":[', "]}"),
    ("/v1/embeddings", '{"model":"demo","input":[[', "]]}"),
    ("/v1/embeddings", '{"model":"demo","input":"', '"}'),
)
"""Where a value can stand: a path, and what is before and after it. In a text, a value is broken JSON or a
part of it; both are tried."""

UNITS: Final = (
    *(
        "[]",
        "{}",
        "1",
        "-0.5e-7",
        "1e400",
        '""',
        "null",
        "true",
        "[[]]",
        '{"":[]}',
        '{"a":1,"b":[2]}',
        "9" * 4_000,
    ),
    *(
        '"%":1',
        '"%":"%"',
        '"a":1',
        '"a":1,"a":2',
        '"\\u00e9%":[]',
        "%",
        "%%%",
        "a",
        "é",
        "\\u00e9",
        "\\n",
        "\\\\",
    ),
    *(
        "\\ud83d\\ude00",
        "\\ud800",
        "𝄞",
        "001é002é",
        "é001",
        "000é",
        '"é"',
        '"001"',
        '"%"',
        " ",
        "\\t",
        "a,b.c:d/",
    ),
    *('{"role":"user","content":"h"}', '{"type":"text","text":"é001"}', '{"role":"user","content":"%"}'),
    *('{"type":"function","function":{"name":"f","parameters":{"a":{"b":[1]}}}}', "http://a.b/c ", "sk-"),
)
SIZES: Final = (8_000, 60_000, 300_000, 1_048_000)


@st.composite
def recipes(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Recipe:
    """Draw a body within the limits of a route."""
    path, before, after = draw(st.sampled_from(PLACES))
    unit = draw(
        st.sampled_from(UNITS) | st.text(min_size=1, max_size=8).map(lambda text: json.dumps(text)[1:-1])
    )
    between = "" if before.endswith('"') else ","
    size = 8_100 if path == "/auth/login" else draw(st.sampled_from(SIZES))
    return Recipe(path, before, unit, between, after, draw(st.sampled_from((0, 0, 0, 1, 5, 98))), size)


def search(target: Target, limit_s: float, first_seed: int = 0) -> Searched:
    """Look for the request that keeps the loop longest, until the time is over; seeds as in ``fuzz``."""
    found = Searched()
    costs = Costs(target)
    end_s = time.monotonic() + limit_s
    for seed in itertools.count(first_seed):
        found.seeds += 1

        @hypothesis.seed(seed)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.target],
            suppress_health_check=list(HealthCheck),
        )
        @given(recipe=recipes())
        def one(recipe: Recipe) -> None:
            if time.monotonic() < end_s:
                cost = costs.of(recipe.path, recipe.body, recipe.what)
                hypothesis.target(cost.held_s * 1_000)
                found.add(cost)

        one()
        target.upstream.clear()
        if time.monotonic() > end_s:
            return found
    raise AssertionError
