"""Stored responses: what their owner can do with them, and nobody else."""

import json
import re
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest

from service.upstream.operations import OPERATIONS
from tests.fakes.operations import RESPONSE, RESPONSE_STREAM, STARTED, STORED, StoredSample, named
from tests.fakes.streams import RawStream
from tests.fakes.upstream import FakeUpstream, Reset, Silent, Status
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.streaming import calling, data
from tests.http.support import attributes, completed_line, eventually, module_app, server_span, trace_of

ASKED = {"model": "demo", "input": "What is a trace?"}
LIMITS: dict[str, Any] = {
    "llm_timeout_s": 1.5,
    "retry_max": 1,
    "retry_base_delay_s": 0.01,
    "retry_budget_floor": 10_000,
    "stream_chunk_timeout_s": 5.0,
    "stream_keep_alive_s": 1.0,
}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=fake.url, **LIMITS) as served:
        yield served


@pytest.fixture(scope="module")
def owner(app: AppUnderTest) -> str:
    return app.token("user")


@pytest.fixture(scope="module")
def other(app: AppUnderTest) -> str:
    """Another caller, who is an administrator."""
    return app.token("admin")


@pytest.fixture(autouse=True)
def _nothing_is_left(fake: FakeUpstream) -> Iterator[None]:
    yield
    fake.clear()


def new_id() -> str:
    """An id as LiteLLM makes it: Base64, with its padding."""
    return f"resp_{secrets.token_hex(40)}.a-b+c=="


def make(app: AppUnderTest, fake: FakeUpstream, token: str, **fields: Any) -> str:
    """Make a response, whole or streamed, and forget that the upstream was asked; its id."""
    made = new_id()
    whole = {**RESPONSE, "id": made}
    events = (
        named("response.created", response={**STARTED, "id": made}, sequence_number=0),
        *RESPONSE_STREAM[1:-1],
        named("response.completed", response=whole, sequence_number=6),
    )
    fake.script(RawStream(events) if fields.get("stream") else Status(200, whole))
    assert app.call("POST", "/v1/responses", body={**ASKED, **fields}, token=token).status == 200
    fake.clear()
    return made


def ask(app: AppUnderTest, name: str, made: str, token: str, query: str = "") -> Answer:
    """Ask something about a stored response."""
    sample = STORED[name]
    return app.call(sample.method, f"/v1/responses/{made}{sample.below}{query}", token=token)


def asked(fake: FakeUpstream) -> list[tuple[str, str]]:
    """What the upstream was asked about responses."""
    return [(seen.method, seen.path) for seen in fake.requests if "/responses" in seen.path]


def error_of(answer: Answer) -> dict[str, Any]:
    """The error, without what differs from one request to the next."""
    found = dict(answer.json["error"])
    assert found.pop("request_id") == answer.request_id
    del found["incident_id"], found["timestamp"]
    return found


NOT_FOUND = {
    "message": "There is no such response.",
    "type": "NotFoundError",
    "param": "response_id",
    "code": None,
}


def test_each_operation_has_a_sample() -> None:
    rows = {name: row for name, row in OPERATIONS.items() if row.stored}
    assert {name: (row.method, row.path) for name, row in rows.items()} == {
        name: (sample.method, f"/responses/{{response_id}}{sample.below}") for name, sample in STORED.items()
    }


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", STORED)
def test_only_the_owner_can_use_a_stored_response(  # noqa: PLR0913 - fixtures
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str, name: str, *, streamed: bool
) -> None:
    made = make(app, fake, owner, **({"stream": True} if streamed else {}))
    answer = ask(app, name, made, other)
    assert (answer.status, error_of(answer)) == (404, NOT_FOUND)
    assert answer.headers["x-should-retry"] == "false"
    assert asked(fake) == []
    answer = ask(app, name, made, owner)
    assert (answer.status, answer.body) == (200, STORED[name].content)
    assert answer.headers["content-type"] == "application/json"
    sample = STORED[name]
    assert asked(fake) == [(sample.method, f"/v1/responses/{made}{sample.below}")]
    (sent,) = [seen for seen in fake.requests if "/responses" in seen.path]
    assert sent.body == b""


def test_an_administrators_response_is_nobody_elses_either(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str
) -> None:
    made = make(app, fake, other)
    assert ask(app, "get_response", made, owner).status == 404
    assert ask(app, "get_response", made, other).status == 200


@pytest.mark.parametrize("name", STORED)
def test_another_callers_an_unknown_and_a_deleted_response_cannot_be_told_apart(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str, name: str
) -> None:
    made, deleted = make(app, fake, owner), make(app, fake, owner)
    assert ask(app, "delete_response", deleted, owner).status == 200
    fake.clear()
    answers = [
        ask(app, name, made, other),
        ask(app, name, new_id(), other),
        ask(app, name, deleted, other),
        ask(app, name, deleted, owner),
    ]
    unique = {"request_id", "incident_id", "timestamp"}
    bodies = {
        re.sub(rf'"({"|".join(unique)})":"[^"]*"', r'"\1":""', answer.body.decode()) for answer in answers
    }
    assert len(bodies) == 1
    assert {answer.status for answer in answers} == {404}
    own = ("x-request-id", "traceresponse", "date", "server-timing", "ratelimit")
    assert len({tuple((k, v) for k, v in one.headers.items() if k not in own) for one in answers}) == 1
    assert asked(fake) == []


HOSTILE = [
    *("..", "%2e%2e", "%2E%2E%2Fmodels", "..%2f..%2fkey%2fgenerate", "a%2Fb", "%2e", "."),
    *(
        "resp_1%3Fmodel=x",
        "resp_1%23x",
        "resp_1%20x",
        "resp_1%00",
        "resp_1%0d%0aX:%20y",
        "resp_1%5C..",
        "%25",
    ),
    *("resp_%C3%A9", "resp_%FF", "%ED%A0%80", "-x", "resp_1;x=y", "resp_1%2Fcancel", "x" * 5_000),
]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", STORED)
def test_an_id_never_changes_the_upstreams_path(
    app: AppUnderTest, fake: FakeUpstream, owner: str, name: str, hostile: str
) -> None:
    fake.clear()
    answer = ask(app, name, hostile, owner)
    assert answer.status in {404, 405}
    assert answer.json["error"]["type"] in {"NotFoundError", "MethodNotAllowedError"}
    unasked = {"/v1/models", "/health/liveliness", "/health/readiness"}
    assert [seen for seen in fake.requests if seen.path not in unasked] == []


def test_a_method_that_a_path_does_not_take_is_told_those_that_it_takes(app: AppUnderTest) -> None:
    for below, methods in (("", "DELETE, GET"), ("/cancel", "POST"), ("/input_items", "GET")):
        answer = app.call("PUT", f"/v1/responses/resp_1{below}")
        assert (answer.status, answer.headers["allow"]) == (405, methods)


def test_an_id_that_no_path_can_hold_is_kept_and_not_asked_for(
    app: AppUnderTest, fake: FakeUpstream, owner: str
) -> None:
    """It can be continued, where it stands in the body."""
    made = f"resp/../{secrets.token_hex(8)}?"
    fake.script(Status(200, {**RESPONSE, "id": made}))
    assert app.call("POST", "/v1/responses", body=ASKED, token=owner).status == 200
    fake.clear()
    assert ask(app, "get_response", made.replace("/", "%2F").replace("?", "%3F"), owner).status == 404
    assert asked(fake) == []
    body = {**ASKED, "previous_response_id": made}
    assert app.call("POST", "/v1/responses", body=body, token=owner).status == 200


def test_a_response_that_is_not_stored_is_not_kept(app: AppUnderTest, fake: FakeUpstream, owner: str) -> None:
    for streamed in (False, True):
        made = make(app, fake, owner, store=False, stream=streamed)
        assert ask(app, "get_response", made, owner).status == 404
    for store in (True, None):
        made = make(app, fake, owner, store=store)
        assert ask(app, "get_response", made, owner).status == 200


# ---- Streams -------------------------------------------------------------------------------------------


def test_the_owner_of_a_streamed_response_is_kept_before_its_first_event_is_told(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str
) -> None:
    made = new_id()
    created = named("response.created", response={**STARTED, "id": made}, sequence_number=0)
    fake.script(RawStream((created,), then="silence"))
    with calling(app, owner, {**ASKED, "stream": True}, "/v1/responses") as caller:
        assert data(caller.event())["response"]["id"] == made
        assert ask(app, "get_response", made, other).status == 404
        assert ask(app, "get_response", made, owner).status == 200


@pytest.mark.parametrize("then", ["cut", "reset"])
def test_a_response_whose_stream_broke_can_be_asked_for(
    app: AppUnderTest, fake: FakeUpstream, owner: str, then: Any
) -> None:
    made = new_id()
    created = named("response.created", response={**STARTED, "id": made}, sequence_number=0)
    fake.script(RawStream((created,), then=then))
    answer = app.call("POST", "/v1/responses", body={**ASKED, "stream": True}, token=owner)
    assert b"event: error" in answer.body
    assert ask(app, "get_response", made, owner).status == 200


def test_another_id_in_the_last_event_is_kept_too(app: AppUnderTest, fake: FakeUpstream, owner: str) -> None:
    first, last = new_id(), new_id()
    events = (
        named("response.created", response={**STARTED, "id": first}, sequence_number=0),
        named("response.completed", response={**RESPONSE, "id": last}, sequence_number=1),
    )
    fake.script(RawStream(events))
    answer = app.call("POST", "/v1/responses", body={**ASKED, "stream": True}, token=owner)
    assert answer.body == b"".join(events)
    assert [ask(app, "get_response", one, owner).status for one in (first, last)] == [200, 200]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_id_is_not_told_before_the_database_has_answered(
    fake: FakeUpstream, tmp_path: Path, *, streamed: bool
) -> None:
    """The database is locked, so that it answers late, and in vain."""
    path, made = tmp_path / "own.db", new_id()
    created = named("response.created", response={**STARTED, "id": made}, sequence_number=0)
    with (
        running_app(litellm_url=fake.url, database_url=f"sqlite:///{path}", **LIMITS) as app,
        closing(sqlite3.connect(path, isolation_level=None)) as locker,
    ):
        owner = app.token()
        locker.execute("BEGIN IMMEDIATE")
        whole = Status(200, {**RESPONSE, "id": made})
        fake.script(RawStream((created,), then="silence") if streamed else whole)
        with calling(app, owner, {**ASKED, "stream": streamed}, "/v1/responses") as caller:
            failed = [line for line in app.lines() if line.get("event") == "llmops.identity.store.failed"]
            assert [line["operation"] for line in failed] == ["keep"]
            assert made.encode() in (caller.event() if streamed else caller.rest())
        locker.execute("ROLLBACK")


# ---- Deleting, cancelling, polling ---------------------------------------------------------------------


def test_a_response_is_forgotten_when_the_upstream_has_deleted_it(
    app: AppUnderTest, fake: FakeUpstream, owner: str
) -> None:
    made = make(app, fake, owner)
    for failure in (
        Status(500),
        Status(200, {"id": made, "object": "response", "deleted": False}),
        Reset(),
    ):
        fake.script(*[failure] * 4)
        assert ask(app, "delete_response", made, owner).status == 502
        fake.clear()
        assert ask(app, "get_response", made, owner).status == 200
    assert ask(app, "delete_response", made, owner).status == 200
    fake.clear()
    assert ask(app, "delete_response", made, owner).status == 404
    assert asked(fake) == []


def test_a_response_that_the_upstream_does_not_have_is_not_there(
    app: AppUnderTest, fake: FakeUpstream, owner: str
) -> None:
    made = make(app, fake, owner)
    gone = {"error": {"message": f"Response with id '{made}' not found.", "type": "invalid_request_error"}}
    for name in ("get_response", "list_input_items", "cancel_response", "delete_response"):
        fake.script(Status(404, gone))
        answer = ask(app, name, made, owner)
        assert (answer.status, error_of(answer)) == (404, NOT_FOUND), name
        assert answer.headers["x-llm-attempts"] == "1"
    fake.clear()
    # Deleting it has made that certain.
    assert ask(app, "get_response", made, owner).status == 404
    assert asked(fake) == []


def test_a_response_in_the_background_is_polled_and_cancelled(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str
) -> None:
    made = new_id()
    queued = {**RESPONSE, "id": made, "status": "queued", "output": [], "usage": None}
    fake.script(Status(200, queued))
    answer = app.call("POST", "/v1/responses", body={**ASKED, "background": True}, token=owner)
    assert (answer.status, answer.json["status"]) == (200, "queued")
    states = [{**queued, "status": "in_progress"}, {**RESPONSE, "id": made}]
    for state in states:
        fake.script(Status(200, state))
        polled = ask(app, "get_response", made, owner)
        assert (polled.status, polled.json) == (200, state)
    assert ask(app, "cancel_response", made, other).status == 404
    assert ask(app, "cancel_response", made, owner).json["status"] == "cancelled"


@pytest.mark.parametrize("name", ["get_response", "cancel_response"])
def test_the_owner_can_go_on_with_the_id_that_an_answer_names(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str, name: str
) -> None:
    """LiteLLM gives the same response another id in each answer."""
    made, again = make(app, fake, owner), new_id()
    fake.script(Status(200, {**RESPONSE, "id": again}))
    assert ask(app, name, made, owner).json["id"] == again
    assert ask(app, "get_response", again, other).status == 404
    assert ask(app, "get_response", again, owner).status == 200
    assert ask(app, "get_response", made, owner).status == 200


def test_openais_client_makes_polls_lists_cancels_and_deletes(app: AppUnderTest, owner: str) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{app.port}/v1", api_key=owner, max_retries=0) as client:
        made = client.responses.create(model="demo", input="What is a trace?", background=True)
        assert client.responses.retrieve(made.id, include=["reasoning.encrypted_content"]).id == made.id
        assert client.responses.input_items.list(made.id, limit=5, order="asc").data[0].id == "msg_1"
        assert client.responses.cancel(made.id).status == "cancelled"
        client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.create(model="demo", input="And then?", previous_response_id=made.id)
        assert raised.value.code == "previous_response_not_found"


# ---- What is passed on, and what is refused ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("get_response", "include=a.b&include=c"),
        ("get_response", "include%5B%5D=a.b&include%5B%5D=%C3%A9%26x%3D1%23"),
        ("list_input_items", "after=msg_1&limit=5&order=asc&include=x"),
        ("list_input_items", "before=msg_9"),
    ],
)
def test_the_query_is_passed_on(
    app: AppUnderTest, fake: FakeUpstream, owner: str, name: str, query: str
) -> None:
    made = make(app, fake, owner)
    assert ask(app, name, made, owner, f"?{query}").status == 200
    (sent,) = [seen for seen in fake.requests if "/responses" in seen.path]
    assert sent.path == f"/v1/responses/{made}{STORED[name].below}"
    assert sent.query == query


@pytest.mark.parametrize(
    ("name", "query", "field"),
    [
        ("get_response", "model=x", "query.model"),
        ("get_response", "api_base=http://x", "query.api_base"),
        ("get_response", "limit=5", "query.limit"),
        ("get_response", "stream=true", "query.stream"),
        ("get_response", "stream=true&starting_after=4", "query.stream"),
        ("get_response", "starting_after=4", "query.stream"),
        ("get_response", "include=" + "x" * 1_025, "query.include"),
        ("list_input_items", "limit=5&limit=6", "query.limit"),
        ("list_input_items", "stream=true", "query.stream"),
        ("delete_response", "include=x", "query.include"),
        ("cancel_response", "include=x", "query.include"),
    ],
)
def test_another_query_is_refused(  # noqa: PLR0913, PLR0917 - fixtures
    app: AppUnderTest, fake: FakeUpstream, owner: str, name: str, query: str, field: str
) -> None:
    made = make(app, fake, owner)
    answer = ask(app, name, made, owner, f"?{query}")
    assert (answer.status, error_of(answer)["type"], error_of(answer)["param"]) == (
        422,
        "ValidationError",
        field,
    )
    assert asked(fake) == []


def test_a_stream_that_is_not_asked_for_is_no_mistake(
    app: AppUnderTest, fake: FakeUpstream, owner: str
) -> None:
    made = make(app, fake, owner)
    assert ask(app, "get_response", made, owner, "?stream=false").status == 200
    (sent,) = [seen for seen in fake.requests if "/responses" in seen.path]
    assert sent.query == ""


def test_cancelling_has_no_body(app: AppUnderTest, fake: FakeUpstream, owner: str) -> None:
    made = make(app, fake, owner)
    path = f"/v1/responses/{made}/cancel"
    assert app.call("POST", path, body={}, token=owner).status == 200
    fake.clear()
    for body in ({"model": "other-model"}, {"api_base": "http://x"}, [1]):
        answer = app.call("POST", path, body=body, token=owner)
        assert (answer.status, error_of(answer)["type"]) == (422, "ValidationError"), body
    assert asked(fake) == []


@pytest.mark.parametrize("name", STORED)
def test_nobody_who_is_not_signed_in_is_told_anything(app: AppUnderTest, name: str) -> None:
    sample = STORED[name]
    answer = app.call(sample.method, f"/v1/responses/{new_id()}{sample.below}")
    assert (answer.status, error_of(answer)["type"]) == (401, "AuthenticationError")


# ---- Continuing ----------------------------------------------------------------------------------------

PREVIOUS_NOT_FOUND = {
    "message": "The previous response was not found. It must be one of your own that is stored.",
    "type": "BadRequestError",
    "param": "previous_response_id",
    "code": "previous_response_not_found",
}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_of_ones_own_can_be_continued_and_no_other(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str, *, streamed: bool
) -> None:
    made = make(app, fake, owner)
    more = {"stream": True} if streamed else {}
    for token, previous in ((other, made), (owner, new_id()), (owner, ""), (owner, "\ud800")):
        body = {**ASKED, **more, "previous_response_id": previous}
        answer = app.call("POST", "/v1/responses", body=body, token=token)
        assert (answer.status, error_of(answer)) == (400, PREVIOUS_NOT_FOUND)
    assert asked(fake) == []
    content = json.dumps({**ASKED, **more, "previous_response_id": made}, indent=1).encode()
    answer = app.call("POST", "/v1/responses", body=content, token=owner)
    assert answer.status == 200
    (sent,) = [seen for seen in fake.requests if "/responses" in seen.path]
    assert sent.body == content


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/responses", {**ASKED, "previous_response_id": 7}),
        ("/responses", {**ASKED, "previous_response_id": ["resp_1"]}),
        ("/responses", {**ASKED, "conversation": "conv_1"}),
        ("/responses", {**ASKED, "conversation": {"id": "conv_1"}}),
        ("/chat/completions", {"messages": [{"role": "user", "content": "x"}], "previous_response_id": "r"}),
        ("/chat/completions", {"messages": [{"role": "user", "content": "x"}], "conversation": "c"}),
        ("/completions", {"prompt": "x", "previous_response_id": "r"}),
        ("/embeddings", {"model": "demo", "input": "x", "previous_response_id": "r"}),
        (
            "/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "previous_response_id": "r"},
        ),
    ],
)
def test_what_is_stored_cannot_be_read_in_another_way(
    app: AppUnderTest, fake: FakeUpstream, owner: str, path: str, body: dict[str, Any]
) -> None:
    fake.clear()
    answer = app.call("POST", f"/v1{path}", body=body, token=owner)
    assert answer.status == 422
    assert answer.json["error"]["param"] in {"previous_response_id", "conversation"}
    assert [seen for seen in fake.requests if seen.method == "POST"] == []


def test_nothing_to_continue_is_no_mistake(app: AppUnderTest, owner: str) -> None:
    body = {**ASKED, "previous_response_id": None, "conversation": None}
    assert app.call("POST", "/v1/responses", body=body, token=owner).status == 200


def test_an_id_that_the_upstream_gives_to_two_callers_stays_the_first_ones(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str
) -> None:
    made = new_id()
    for token in (owner, other):
        fake.script(Status(200, {**RESPONSE, "id": made}))
        answer = app.call("POST", "/v1/responses", body=ASKED, token=token)
        # The second one has been paid for, too.
        assert answer.status == 200
    (line,) = [one for one in app.lines(answer.request_id) if "belongs to another caller" in one["message"]]
    assert (line["level"], line["user"]) == ("WARNING", "admin")
    assert ask(app, "get_response", made, other).status == 404
    assert ask(app, "get_response", made, owner).status == 200


# ---- As any call ---------------------------------------------------------------------------------------

FAULTS = [
    pytest.param((Status(500), 502, "UpstreamError", 2), id="500"),
    pytest.param((Reset(), 502, "UpstreamError", 2), id="reset"),
    pytest.param((Status(429), 429, "RateLimitError", 2), id="429"),
    pytest.param((Status(401), 502, "UpstreamError", 1), id="401"),
    pytest.param((Status(400, {"error": {"message": "no"}}), 400, "BadRequestError", 1), id="400"),
    pytest.param((Status(200, b"oops"), 502, "UpstreamError", 1), id="garbage"),
    pytest.param((Status(200, b"{}"), 502, "UpstreamError", 1), id="no answer"),
    pytest.param((Silent(), 504, "UpstreamTimeoutError", 1), id="silence"),
]


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("name", STORED)
def test_a_fault_is_that_of_any_call(
    app: AppUnderTest, fake: FakeUpstream, owner: str, name: str, case: tuple[Any, int, str, int]
) -> None:
    fault, status, error, attempts = case
    made = make(app, fake, owner)
    # aiohttp itself repeats GET and DELETE once where a connection that had been idle turns out to be closed.
    fake.script(*[fault] * attempts * 2)
    answer = ask(app, name, made, owner)
    assert (answer.status, error_of(answer)["type"]) == (status, error)
    assert answer.headers["x-llm-attempts"] == str(attempts)
    assert attributes(server_span(app, answer.request_id))["error.type"] == error


@pytest.mark.parametrize("name", STORED)
def test_a_fault_that_passes_is_retried(app: AppUnderTest, fake: FakeUpstream, owner: str, name: str) -> None:
    made = make(app, fake, owner)
    fake.script(Status(503))
    answer = ask(app, name, made, owner)
    assert (answer.status, answer.body) == (200, STORED[name].content)
    assert answer.headers["x-llm-attempts"] == "2"
    assert app.value("llmops.retry.attempts", operation=name, outcome="retried") >= 1


@pytest.mark.parametrize("name", STORED)
def test_ids_facts_and_telemetry_are_those_of_any_call(
    app: AppUnderTest, fake: FakeUpstream, owner: str, name: str
) -> None:
    made, sample = make(app, fake, owner), STORED[name]
    answer = ask(app, name, made, owner)
    assert (answer.headers["x-llm-attempts"], answer.headers["x-cache"]) == ("1", "BYPASS")
    assert "llm;dur" in answer.headers["server-timing"]
    spans = {span.name: span for span in trace_of(app, answer.request_id)}
    server = attributes(server_span(app, answer.request_id))
    assert server["http.route"] == f"/v1/responses/{{response_id}}{sample.below}"
    assert "llm call" in spans
    attempt = attributes(spans[f"{name} demo"])
    assert (attempt["gen_ai.operation.name"], attempt["gen_ai.request.model"]) == (name, "demo")
    assert completed_line(app, answer.request_id)["user"] == "user"
    (line,) = [one for one in app.lines(answer.request_id) if one["message"] == "llm_request_completed"]
    assert (line["model"], line["user"]) == ("demo", "user")


@pytest.mark.parametrize("name", STORED)
def test_tokens_and_cost_are_counted_once(
    app: AppUnderTest, fake: FakeUpstream, owner: str, name: str
) -> None:
    sample: StoredSample = STORED[name]
    made = make(app, fake, owner)

    def counted() -> tuple[float, ...]:
        return tuple(map(app.value, ("gen_ai.client.token.usage", "llmops.llm.cost")))

    before, calls = counted(), app.value("llmops.llm.calls", outcome="success")
    fake.script(Status(200, sample.content, {"x-litellm-response-cost": "0.5"}))
    answer = ask(app, name, made, owner)
    assert answer.status == 200
    (line,) = [one for one in app.lines(answer.request_id) if one["message"] == "llm_request_completed"]
    assert not {"prompt_tokens", "completion_tokens", "total_tokens", "cost"} & line.keys()
    attempt = next(span for span in trace_of(app, answer.request_id) if span.name == f"{name} demo")
    assert not [key for key in attributes(attempt) if key.startswith("gen_ai.usage")]
    assert counted() == before
    assert app.value("llmops.llm.calls", outcome="success") == calls + 1


def test_a_response_outlives_its_model(app: AppUnderTest, fake: FakeUpstream, owner: str) -> None:
    fake.models.append("passing")
    assert app.call("GET", "/v1/models", token=owner).status == 200
    made = make(app, fake, owner, model="passing")
    fake.models.remove("passing")
    assert app.call("GET", "/v1/models", token=owner).status == 200
    assert ask(app, "get_response", made, owner).status == 200
    assert ask(app, "delete_response", made, owner).status == 200


# ---- The database --------------------------------------------------------------------------------------


def test_a_database_that_fails_fails_no_call(fake: FakeUpstream, tmp_path: Path) -> None:
    path = tmp_path / "own.db"
    with running_app(litellm_url=fake.url, database_url=f"sqlite:///{path}", **LIMITS) as app:
        owner, other = app.token("user"), app.token("admin")
        before = make(app, fake, owner)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("ALTER TABLE response_owners RENAME TO elsewhere")
        for streamed in (False, True, False):
            made = make(app, fake, owner, stream=streamed)
            assert ask(app, "get_response", made, owner).status == 200
            assert ask(app, "get_response", made, other).status == 404
        # What this process has made it knows; of others it cannot know.
        assert ask(app, "get_response", before, owner).status == 200
        answer = ask(app, "get_response", new_id(), owner)
        assert (answer.status, error_of(answer)["type"]) == (503, "DependencyUnavailableError")
        assert int(answer.headers["retry-after"]) >= 1
        assert attributes(server_span(app, answer.request_id))["error.type"] == "DependencyUnavailableError"
        body = {**ASKED, "previous_response_id": new_id()}
        assert app.call("POST", "/v1/responses", body=body, token=owner).status == 503
        failed = [line for line in app.lines() if line.get("event") == "llmops.identity.store.failed"]
        assert sorted((line["operation"], line["writes"]) for line in failed) == [
            ("find", False),
            ("keep", True),
        ]
        assert {line["level"] for line in failed} == {"WARNING"}
        assert app.value("llmops.identity.store.duration", operation="find", outcome="error") == 2

        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("ALTER TABLE elsewhere RENAME TO response_owners")
        eventually(
            lambda: any(line.get("event") == "llmops.identity.store.recovered" for line in app.lines()),
            "the event that it works again",
        )
    with running_app(litellm_url=fake.url, database_url=f"sqlite:///{path}", **LIMITS) as app:
        # Another process finds what was made in the meantime.
        assert ask(app, "get_response", made, app.token("user")).status == 200
        assert ask(app, "get_response", made, app.token("admin")).status == 404


def test_a_caller_who_leaves_during_the_answer_leaves_no_trace_of_an_error(
    app: AppUnderTest, fake: FakeUpstream, owner: str
) -> None:
    made = make(app, fake, owner)
    fake.script(Silent())
    connection = HTTPConnection("127.0.0.1", app.port, timeout=10)
    connection.request("GET", f"/v1/responses/{made}", headers={"Authorization": f"Bearer {owner}"})
    eventually(lambda: asked(fake), "the request")
    disconnects = fake.disconnects
    connection.close()
    eventually(lambda: fake.disconnects > disconnects, "the upstream to be left")
    assert ask(app, "get_response", made, owner).status == 200


# ---- Items ---------------------------------------------------------------------------------------------


def make_items(app: AppUnderTest, fake: FakeUpstream, token: str, **fields: Any) -> tuple[str, str]:
    """Make a response, whole or streamed; the ids of its reasoning and of its message."""
    reasoning, message = f"rs_{secrets.token_hex(8)}", f"msg_{secrets.token_hex(8)}"
    output = [
        {"type": "reasoning", "id": reasoning, "summary": []},
        {"type": "message", "id": message, "role": "assistant", "content": []},
    ]
    whole = {**RESPONSE, "id": new_id(), "output": output}
    events = (
        named("response.created", response={**STARTED, "id": whole["id"]}, sequence_number=0),
        named("response.output_item.added", item=output[0], output_index=0, sequence_number=1),
        *RESPONSE_STREAM[3:-1],
        named("response.completed", response=whole, sequence_number=6),
    )
    fake.script(RawStream(events) if fields.get("stream") else Status(200, whole))
    assert app.call("POST", "/v1/responses", body={**ASKED, **fields}, token=token).status == 200
    fake.clear()
    return reasoning, message


ITEM_NOT_FOUND = {
    "message": "An item of the input was not found. It must be one of your own that is stored.",
    "type": "BadRequestError",
    "param": "input",
    "code": None,
}


def send_items(app: AppUnderTest, token: str, *items: dict[str, Any]) -> Answer:
    """Ask with these items."""
    given = [{"role": "user", "content": "And?"}, *items]
    return app.call("POST", "/v1/responses", body={**ASKED, "input": given}, token=token)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_item_of_ones_own_can_be_referred_to_and_no_other(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str, *, streamed: bool
) -> None:
    for item_id in make_items(app, fake, owner, **({"stream": True} if streamed else {})):
        for item in (
            {"type": "item_reference", "id": item_id},
            {"id": item_id},
            {"type": None, "id": item_id},
        ):
            answer = send_items(app, other, item)
            assert (answer.status, error_of(answer)) == (400, ITEM_NOT_FOUND)
            assert asked(fake) == []
            assert send_items(app, owner, item).status == 200
            fake.clear()


def test_a_reference_to_nothing_that_is_known_is_refused(
    app: AppUnderTest, fake: FakeUpstream, owner: str
) -> None:
    unstored, _ = make_items(app, fake, owner, store=False)
    for item_id in (unstored, "msg_unknown", "x" * 2_000, "", 7, None):
        answer = send_items(app, owner, {"type": "item_reference", "id": item_id})
        assert (answer.status, error_of(answer)) == (400, ITEM_NOT_FOUND)
    assert asked(fake) == []
    many = [{"type": "item_reference", "id": f"msg_{number}"} for number in range(1_001)]
    assert send_items(app, owner, *many).status == 422


def test_another_callers_reasoning_cannot_be_continued(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str
) -> None:
    reasoning, _ = make_items(app, fake, owner)
    item = {"type": "reasoning", "id": reasoning, "summary": []}
    answer = send_items(app, other, item)
    assert (answer.status, error_of(answer)) == (400, ITEM_NOT_FOUND)
    assert send_items(app, owner, item).status == 200
    assert send_items(app, other, {**item, "encrypted_content": "x"}).status == 400
    # A model that stores nothing has reasonings too.
    assert send_items(app, other, {**item, "id": "rs_unknown"}).status == 200


@pytest.mark.parametrize(
    "item",
    [
        *({"type": kind} for kind in ("function_call", "code_interpreter_call", "compaction", "message")),
        *({"type": "image_generation_call", **more} for more in ({}, {"result": "AAAA"})),
        {"role": None},
        {"role": "assistant", "content": "x"},
    ],
    ids=str,
)
def test_no_item_of_another_callers_goes_on_whatever_it_is(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str, item: dict[str, Any]
) -> None:
    item_id, _ = make_items(app, fake, owner)
    many = [{"role": "user", "content": "x"}] * 1_100
    answer = send_items(app, other, *many, {**item, "id": item_id})
    assert (answer.status, error_of(answer)) == (400, ITEM_NOT_FOUND)
    assert asked(fake) == []
    assert send_items(app, owner, *many, {**item, "id": item_id}).status == 200


def test_a_stored_image_is_referred_to_by_its_id(app: AppUnderTest, owner: str) -> None:
    image = {"type": "image_generation_call", "id": "ig_unknown"}
    assert send_items(app, owner, image).status == 400
    assert send_items(app, owner, {**image, "result": "AAAA"}).status == 200


@pytest.mark.parametrize(
    "items", [[{"type": "reasoning", "id": "rs_1"}], [{"id": "rs_1", "encrypted_content": None}], "x", 7, [7]]
)
def test_a_chat_brings_the_content_of_its_reasonings(
    app: AppUnderTest, fake: FakeUpstream, owner: str, items: Any
) -> None:
    said = {"role": "assistant", "content": "", "reasoning_items": items}
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}, said]}
    answer = app.call("POST", "/v1/chat/completions", body=body, token=owner)
    assert (answer.status, answer.json["error"]["param"]) == (422, "messages.1.reasoning_items")
    assert fake.chat_requests == []
    said["reasoning_items"] = [{"type": "reasoning", "id": "rs_1", "encrypted_content": "x"}]
    assert app.call("POST", "/v1/chat/completions", body=body, token=owner).status == 200


@pytest.mark.parametrize("name", STORED)
def test_azures_client_sends_a_version_that_stays_here(
    app: AppUnderTest, fake: FakeUpstream, owner: str, name: str
) -> None:
    made = make(app, fake, owner)
    sample = STORED[name]
    path = f"/openai/v1/responses/{made}{sample.below}?api-version=preview"
    assert app.call(sample.method, path, headers={"api-key": owner}).status == 200
    (sent,) = [seen for seen in fake.requests if "/responses" in seen.path]
    assert sent.query == ""


def test_what_a_response_was_made_from_can_be_referred_to(
    app: AppUnderTest, fake: FakeUpstream, owner: str, other: str
) -> None:
    made, item_id = make(app, fake, owner), f"msg_{secrets.token_hex(8)}"
    listed = {"object": "list", "data": [{"type": "message", "id": item_id}], "has_more": False}
    fake.script(Status(200, listed))
    assert ask(app, "list_input_items", made, owner).status == 200
    assert send_items(app, owner, {"type": "item_reference", "id": item_id}).status == 200
    assert send_items(app, other, {"type": "item_reference", "id": item_id}).status == 400
