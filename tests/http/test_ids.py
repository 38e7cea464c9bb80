"""Whatever the answer and whatever the caller sends: one id, one server span, one error name everywhere."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry.trace import SpanKind

from service.dependencies import AdminUser
from tests.fakes.upstream import FakeUpstream, Silent, Status
from tests.harness import Answer, AppUnderTest
from tests.http.support import (
    Counts,
    TraceParent,
    assert_error_body,
    attribute_sets,
    chunked,
    completed_line,
    eventually,
    module_app,
    trace_of,
)

MAX_BODY_BYTES = 2_048
CANARY = "canary-in-an-exception"
NOBODY = {"username": "nobody", "password": "nothing at all"}
DURATION = "http.server.request.duration"


def add_routes(app: FastAPI) -> None:
    @app.get("/test/admin")
    async def admin(_user: AdminUser) -> str:
        return "welcome"

    @app.get("/test/bug")
    async def bug() -> str:
        raise LookupError(CANARY)


@dataclass(frozen=True)
class Served:
    """The app with its upstream, and a user who has signed in."""

    app: AppUnderTest
    upstream: FakeUpstream
    token: str

    def call(self, method: str, path: str, headers: Mapping[str, str], **options: Any) -> Answer:
        return self.app.call(method, path, headers=headers, **options)

    def generate(self, headers: Mapping[str, str], **body: Any) -> Answer:
        sent = {"prompt": "What is a trace?", **body}
        return self.call("POST", "/llm/generate", headers, body=sent, token=self.token)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with FakeUpstream() as upstream:
        values = {
            "litellm_url": upstream.url,
            "max_body_bytes": MAX_BODY_BYTES,
            "llm_timeout_s": 0.3,
            "llm_connect_timeout_s": 0.2,
            "login_failures_per_name": "1/hour",
        }
        with module_app(add_routes, **values) as app:
            token = app.token()
            # Uses the limit up; from here on each further attempt is refused.
            used_up = app.call("POST", "/auth/login", body=NOBODY)
            assert used_up.status == 401
            trace_of(app, used_up.request_id)
            yield Served(app, upstream, token)


Headers = Mapping[str, str]
Case = Callable[[Served, Headers], Answer]


def _scripted(served: Served, headers: Headers, behaviour: Any) -> Answer:
    served.upstream.script(behaviour)
    return served.generate(headers)


def _login_limit(served: Served, headers: Headers) -> Answer:
    return served.call("POST", "/auth/login", headers, body=NOBODY)


def _too_large_chunked(served: Served, headers: Headers) -> Answer:
    body = chunked(b'{"prompt": "' + b"x" * 2 * MAX_BODY_BYTES + b'"}')
    sent = {**headers, "Transfer-Encoding": "chunked"}
    return served.call("POST", "/llm/generate", sent, body=body, token=served.token)


CASES: Mapping[str, tuple[int, str | None, Case]] = {
    "200": (200, None, lambda served, headers: served.generate(headers)),
    "307": (307, None, lambda served, headers: served.call("GET", "/", headers)),
    "400": (400, "BadRequestError", lambda served, headers: served.generate(headers, model="invalid")),
    "401": (401, "AuthenticationError", lambda served, headers: served.call("GET", "/auth/me", headers)),
    "403": (
        403,
        "PermissionDeniedError",
        lambda served, headers: served.call("GET", "/test/admin", headers, token=served.token),
    ),
    "404": (404, "NotFoundError", lambda served, headers: served.call("GET", "/nowhere", headers)),
    "405": (405, "MethodNotAllowedError", lambda served, headers: served.call("PUT", "/auth/login", headers)),
    "413 declared": (
        413,
        "PayloadTooLargeError",
        lambda served, headers: served.generate(headers, system_prompt="x" * 2 * MAX_BODY_BYTES),
    ),
    "413 chunked": (413, "PayloadTooLargeError", _too_large_chunked),
    "422": (422, "ValidationError", lambda served, headers: served.generate(headers, temperature=9)),
    "429 ours": (429, "RateLimitError", _login_limit),
    "429 upstream's": (
        429,
        "RateLimitError",
        lambda served, headers: _scripted(served, headers, Status(429, headers={"Retry-After": "7"})),
    ),
    "500": (500, "InternalError", lambda served, headers: served.call("GET", "/test/bug", headers)),
    "502": (502, "UpstreamError", lambda served, headers: _scripted(served, headers, Status(500))),
    "504": (504, "UpstreamTimeoutError", lambda served, headers: _scripted(served, headers, Silent())),
}
PARENTS: Mapping[str, Callable[[], TraceParent | None]] = {
    "no traceparent": lambda: None,
    "sampled": lambda: TraceParent.new("01"),
    "not sampled": lambda: TraceParent.new("00"),
    "malformed": lambda: TraceParent("00-" + "0" * 32 + "-zz-01"),
}


@pytest.mark.parametrize("sends", PARENTS)
@pytest.mark.parametrize("case", CASES)
def test_every_answer_carries_its_trace(served: Served, case: str, sends: str) -> None:
    status, error, act = CASES[case]
    parent = PARENTS[sends]()
    before = attribute_sets(served.app, DURATION)
    answer = act(served, {"traceparent": parent.header} if parent else {})

    assert answer.status == status
    assert_id_is_the_trace_id(answer, parent)
    assert_one_connected_trace(served.app, answer, parent)
    assert_one_error_name(served.app, answer, error, before)


def assert_id_is_the_trace_id(answer: Answer, parent: TraceParent | None) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", answer.request_id)
    assert answer.request_id != "0" * 32
    if parent is not None and parent.trace_id is not None:
        assert answer.request_id == parent.trace_id
    version, trace_id, _span_id, flags = answer.headers["traceresponse"].split("-")
    assert (version, trace_id) == ("00", answer.request_id)
    assert int(flags, 16) & 1, "recorded, whatever the caller's flag says"


def assert_one_connected_trace(app: AppUnderTest, answer: Answer, parent: TraceParent | None) -> None:
    spans = trace_of(app, answer.request_id)
    (server,) = [span for span in spans if span.kind is SpanKind.SERVER]
    assert answer.headers["traceresponse"].split("-")[2] == f"{server.context.span_id:016x}"
    inbound = parent.span_id if parent else None
    assert (f"{server.parent.span_id:016x}" if server.parent else None) == inbound
    ids = [span.context.span_id for span in spans]
    assert len(ids) == len(set(ids))
    assert all(span.parent and span.parent.span_id in ids for span in spans if span is not server)
    assert all(first.start_time <= second.start_time for first, second in pairwise(spans))  # type: ignore[operator]  # ended


def assert_one_error_name(app: AppUnderTest, answer: Answer, error: str | None, before: Counts) -> None:
    (server,) = [span for span in trace_of(app, answer.request_id) if span.kind is SpanKind.SERVER]
    line = completed_line(app, answer.request_id)
    # The instrumentation records the duration after the span has ended.
    eventually(lambda: attribute_sets(app, DURATION) != before, "the duration to be recorded")
    after = attribute_sets(app, DURATION)
    changed = {key: amount - before.get(key, 0) for key, amount in after.items() if before.get(key) != amount}
    ((attributes, grown),) = changed.items()

    assert grown == 1
    assert (server.attributes or {}).get("error.type") == error
    assert dict(attributes).get("error.type") == error
    assert dict(attributes)["http.response.status_code"] == answer.status
    assert line.get("error") == error
    assert line["http.response.status_code"] == answer.status
    assert line["trace_id"] == answer.request_id
    assert line["span_id"] == answer.headers["traceresponse"].split("-")[2]
    if error is not None:
        assert_error_body(app, answer, error)


def test_every_line_of_a_failed_request_has_its_incident_id_and_no_other_requests(served: Served) -> None:
    trace_id = "7" * 32
    headers = {"traceparent": f"00-{trace_id}-{'8' * 16}-01"}
    served.upstream.script(Status(500), Status(400))
    answers = [served.generate(headers) for _call in range(2)] + [served.call("GET", "/test/bug", headers)]
    assert [answer.status for answer in answers] == [502, 400, 500]
    incidents = [answer.json["incident_id"] for answer in answers]
    assert len(set(incidents)) == 3

    def lines() -> list[dict[str, Any]]:
        return [line for line in served.app.lines() if line.get("trace_id") == trace_id]

    ended = "http_request_completed"
    eventually(lambda: [line["message"] for line in lines()].count(ended) == 3, "the lines of three requests")
    assert {line.get("incident_id") for line in lines()} == set(incidents)
    messages = [
        [line["message"] for line in lines() if line["incident_id"] == incident] for incident in incidents
    ]
    assert messages == [
        [
            "llm_request_started",
            "Attempt 1: HTTP 500",
            "Giving up after attempt 1: no retries left",
            "llm_request_failed",
            ended,
        ],
        ["llm_request_started", "llm_request_failed", ended],
        ["Unhandled exception", ended],
    ]
    sent = [record.log_record for record in served.app.records()]
    exported = [dict(record.attributes or {}) for record in sent if record.trace_id == int(trace_id, 16)]
    assert [each.get("incident_id") for each in exported] == [line["incident_id"] for line in lines()]
