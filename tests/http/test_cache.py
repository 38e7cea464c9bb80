"""What a caller, a trace, a metric and a record say of a cached answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import SpanKind

from service.recording.record import CallRecord
from tests.fakes.upstream import Answer as Reply
from tests.fakes.upstream import FakeUpstream, Status, refusing_port
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import attributes, eventually, trace_of

QUESTION = {"prompt": "What is a trace?"}


@pytest.fixture
def app(upstream: FakeUpstream) -> Any:
    with running_app(litellm_url=upstream.url, cache_enabled=True) as served:
        yield served


def ask(app: AppUnderTest, token: str, headers: dict[str, str] | None = None, **more: Any) -> Answer:
    answer = app.call("POST", "/llm/generate", body=QUESTION | more, token=token, headers=headers or {})
    assert answer.status == 200, answer.body
    return answer


def test_a_repeated_question_is_answered_without_the_model(app: AppUnderTest, upstream: FakeUpstream) -> None:
    token = app.token()
    first, second = ask(app, token), ask(app, token)

    assert (first.headers["x-cache"], second.headers["x-cache"]) == ("MISS", "HIT")
    assert "age" not in first.headers
    assert second.headers["age"] == "0"
    assert "cache" in second.headers["server-timing"]
    assert first.json["cache"] == "miss"
    assert "cache_kind" not in first.json
    assert second.json == {
        **first.json,
        "cache": "hit",
        "cache_kind": "exact",
        "cost": 0.0,
        "request_id": second.request_id,
    }
    assert len(upstream.chat_requests) == 1


def test_a_hit_is_seen_on_every_surface(app: AppUnderTest) -> None:
    token = app.token()
    missed, hit = ask(app, token), ask(app, token)

    spans = trace_of(app, hit.request_id)
    assert [(span.name, span.kind) for span in spans] == [
        ("POST /llm/generate", SpanKind.SERVER),
        ("cache lookup", SpanKind.INTERNAL),
        ("llm call", SpanKind.INTERNAL),
    ]
    assert [span.parent for span in spans[1:]] == [spans[0].context] * 2
    assert attributes(spans[1])["llmops.cache.kind"] == "exact"
    assert attributes(spans[1])["llmops.cache.result"] == "hit"
    assert attributes(spans[1])["llmops.cache.age"] >= 0
    assert attributes(spans[2])["llmops.llm.outcome"] == "cached"
    assert spans[2].status.is_ok
    line = app.lines(hit.request_id)[1]
    assert (line["message"], line["outcome"], line["cache"]) == ("llm_request_completed", "cached", "hit")
    assert (line["cost"], line["saved_cost"]) == (0.0, 0.00042)
    assert app.value("llmops.llm.calls", outcome="cached") == 1
    assert app.value("llmops.llm.calls", outcome="success") == 1
    assert app.value("llmops.llm.cost") == 0.00042, "money is counted once"
    assert app.value("llmops.cache.lookups", kind="exact", result="hit") == 1
    assert app.value("llmops.cache.lookups", kind="exact", result="miss") == 1
    assert app.value("llmops.cache.saved_tokens", kind="exact") == 30
    assert app.value("llmops.cache.saved_cost", kind="exact") == 0.00042
    assert app.value("llmops.cache.lookup.duration", kind="exact") == 2
    (lookup,) = [span for span in trace_of(app, missed.request_id) if span.name.startswith("retrieve")]
    assert lookup.kind is SpanKind.CLIENT
    assert attributes(lookup)["db.system.name"] == "qdrant"


def test_a_write_is_a_root_of_its_own_linked_with_its_call(app: AppUnderTest) -> None:
    answer = ask(app, app.token())
    write = eventually(
        lambda: [span for span in app.spans() if span.name == "cache write" and span.links], "the write"
    )[0]

    assert write.parent is None
    (call,) = [span for span in trace_of(app, answer.request_id) if span.name == "llm call"]
    assert [link.context.span_id for link in write.links] == [call.context.span_id]
    assert app.value("llmops.cache.writes", outcome="stored") == 1


def test_the_record_of_a_hit_says_cached_costs_nothing_and_names_what_was_saved(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    # Nobody listens there: the records stay in the spool.
    with (
        refusing_port() as port,
        running_app(
            litellm_url=upstream.url,
            cache_enabled=True,
            mlflow_tracking_uri=f"http://127.0.0.1:{port}",
            spool_path=str(tmp_path),
        ) as app,
    ):
        token = app.token()
        ask(app, token)
        ask(app, token)
        lines = [line for path in tmp_path.glob("*.jsonl") for line in path.read_bytes().splitlines()]

    paid, cached = (CallRecord.from_line(line) for line in lines)
    assert (paid.outcome, paid.cache, paid.cost, paid.saved_cost) == ("success", "miss", 0.00042, None)
    assert (cached.outcome, cached.cache, cached.cost, cached.saved_cost) == ("cached", "hit", 0.0, 0.00042)
    assert (paid.total_tokens, cached.total_tokens, cached.attempts) == (30, None, 0)


def test_another_user_gets_an_answer_of_their_own(app: AppUnderTest, upstream: FakeUpstream) -> None:
    ask(app, app.token())
    other = ask(app, app.token("admin"))

    assert other.headers["x-cache"] == "MISS"
    assert len(upstream.chat_requests) == 2


def test_users_share_where_the_scope_says_so(upstream: FakeUpstream) -> None:
    with running_app(litellm_url=upstream.url, cache_enabled=True, cache_scope="shared") as app:
        ask(app, app.token())
        admin = app.token("admin")
        assert ask(app, admin).headers["x-cache"] == "HIT"
        refused = app.call("DELETE", "/llm/cache?user=user", token=admin)
        assert (refused.status, refused.json["error"]) == (422, "ValidationError")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "no-cache", ("BYPASS", 2)),
        ("", "max-age=0", ("BYPASS", 2)),
        ("", "max-age=60", ("HIT", 1)),
        ("no-store", "", ("MISS", 2)),
        ("", "no-store", ("HIT", 1)),
        ("no-cache", "", ("HIT", 1)),
        ("No-Cache , NO-STORE", "", ("MISS", 2)),
        ("", "something-else=1", ("HIT", 1)),
    ],
)
def test_the_caller_says_what_the_cache_may_do(
    app: AppUnderTest, upstream: FakeUpstream, first: str, second: str, expected: tuple[str, int]
) -> None:
    token = app.token()
    ask(app, token, {"Cache-Control": first})
    answer = ask(app, token, {"Cache-Control": second})

    assert (answer.headers["x-cache"], len(upstream.chat_requests)) == expected
    assert answer.json["cache"] == expected[0].lower()


@pytest.mark.parametrize("reason", ["length", "content_filter", None, "something"])
def test_an_answer_that_is_not_whole_is_not_stored(
    app: AppUnderTest, upstream: FakeUpstream, reason: str | None
) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "cut"}, "finish_reason": reason}
    upstream.default = Reply(extra={"choices": [choice]})
    token = app.token()

    assert [ask(app, token).headers["x-cache"] for _ in range(2)] == ["MISS", "MISS"]


def test_a_refusal_is_not_stored(app: AppUnderTest, upstream: FakeUpstream) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I would rather not."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    upstream.default = Reply(extra={"choices": [choice]})
    token = app.token()

    assert [ask(app, token).headers["x-cache"] for _ in range(2)] == ["MISS", "MISS"]


def test_an_error_is_not_stored(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Status(400))
    token = app.token()
    failed = app.call("POST", "/llm/generate", body=QUESTION, token=token)

    assert (failed.status, failed.headers["x-cache"]) == (400, "MISS")
    assert ask(app, token).headers["x-cache"] == "MISS"


def test_the_same_question_in_both_protocols_is_one_question(
    app: AppUnderTest, upstream: FakeUpstream
) -> None:
    token = app.token()
    ask(app, token, temperature=0)
    body = {
        "messages": [{"content": QUESTION["prompt"], "role": "user"}],
        "temperature": 0.0,
        "model": "demo",
    }
    answer = app.call("POST", "/v1/chat/completions", body=body, token=token)

    assert answer.headers["x-cache"] == "HIT"
    assert answer.json["choices"][0]["message"]["content"] == "Hello from the fake."
    assert len(upstream.chat_requests) == 1


def test_what_is_stored_passes_as_it_came(app: AppUnderTest) -> None:
    token = app.token()
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    first, second = (app.call("POST", "/v1/chat/completions", body=body, token=token) for _ in range(2))

    assert (first.headers["x-cache"], second.headers["x-cache"]) == ("MISS", "HIT")
    assert first.body == second.body


def test_an_unknown_field_makes_another_question(app: AppUnderTest, upstream: FakeUpstream) -> None:
    token = app.token()
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    for more in ({}, {"seed": 1}, {"seed": 2}, {"new_thing": {"a": [1]}}, {"user": "somebody"}):
        assert app.call("POST", "/v1/chat/completions", body=body | more, token=token).status == 200

    assert len(upstream.chat_requests) == 5


def test_stats_and_clearing(app: AppUnderTest, upstream: FakeUpstream) -> None:
    token, admin = app.token(), app.token("admin")
    ask(app, token)
    ask(app, token)
    ask(app, admin)
    stats = app.call("GET", "/llm/cache/stats", token=token).json

    assert (stats["entries"], stats["hits"], stats["misses"], stats["ratio"]) == (2, 1, 2, 0.3333)
    assert (stats["enabled"], stats["ttl_s"], stats["scope"]) == (True, 3600, "user")
    assert app.call("GET", "/llm/cache/stats").status == 401
    assert app.call("DELETE", "/llm/cache", token=token).status == 403
    assert app.call("DELETE", "/llm/cache?user=user", token=admin).json == {"cleared": 1}
    assert ask(app, admin).headers["x-cache"] == "HIT", "another user's answers stay"
    assert ask(app, token).headers["x-cache"] == "MISS"
    assert app.call("DELETE", "/llm/cache?model=other", token=admin).json == {"cleared": 0}
    assert app.call("DELETE", "/llm/cache?model=demo", token=admin).json == {"cleared": 2}
    ask(app, token)
    assert app.call("DELETE", "/llm/cache", token=admin).json == {"cleared": 1}
    assert app.call("GET", "/llm/cache/stats", token=token).json["entries"] == 0
    assert ask(app, token).headers["x-cache"] == "MISS"
    assert len(upstream.chat_requests) == 5


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("USER=user", "query.USER: is not known"),
        ("user =user", "query.?: is not known"),
        ("%75ser=user&Model=demo", "query.Model: is not known"),
        ("users=user", "query.users: is not known"),
        ("x=1", "query.x: is not known"),
        ("=user", "query.?: is not known"),
        ("user=user&user=admin", "query.user: is given twice"),
        ("model=demo&model=demo", "query.model: is given twice"),
        ("user%5B%5D=user", "query.?: is not known"),
        ("user;model=demo", "query.?: is not known"),
    ],
)
def test_a_parameter_that_is_not_understood_clears_nothing(app: AppUnderTest, query: str, named: str) -> None:
    token, admin = app.token(), app.token("admin")
    ask(app, token)
    path = f"/llm/cache?{query.replace(' ', '%20')}"
    refused = app.call("DELETE", path, token=admin)
    assert (refused.status, refused.json["error"]) == (422, "ValidationError")
    assert named in refused.json["message"]
    assert ask(app, token).headers["x-cache"] == "HIT"
    # A stranger, or a user, learns nothing about parameters.
    assert app.call("DELETE", path).status == 401
    assert app.call("DELETE", path, token=token).status == 403


def test_an_empty_user_is_a_user_without_answers(app: AppUnderTest) -> None:
    token, admin = app.token(), app.token("admin")
    ask(app, token)
    for query in ("user=", "user"):
        assert app.call("DELETE", f"/llm/cache?{query}", token=admin).json == {"cleared": 0}
    assert ask(app, token).headers["x-cache"] == "HIT"


def test_statistics_take_no_parameter(app: AppUnderTest) -> None:
    refused = app.call("GET", "/llm/cache/stats?user=user", token=app.token())
    assert refused.status == 422
    assert "query.user" in refused.json["message"]


def test_every_route_with_parameters_refuses_unknown_ones(app: AppUnderTest) -> None:
    described = app.call("GET", "/openapi.json").json
    admin = app.token("admin")
    taking = [
        (method.upper(), path)
        for path, methods in described["paths"].items()
        for method, route in methods.items()
        if any(parameter["in"] == "query" for parameter in route.get("parameters", ()))
    ]
    assert ("DELETE", "/llm/cache") in taking
    for method, path in taking:
        assert app.call(method, f"{path}?unknown_one=1", token=admin).status == 422, (method, path)


def test_embeddings_count_as_no_look_up(app: AppUnderTest) -> None:
    token = app.token()
    before = app.value("llmops.cache.lookups")
    body = {"model": "demo", "input": "What is a trace?"}
    answer = app.call("POST", "/v1/embeddings", body=body, token=token)
    assert (answer.status, answer.headers["x-cache"]) == (200, "BYPASS")
    assert app.value("llmops.cache.lookups") == before
    assert app.call("GET", "/llm/cache/stats", token=token).json["bypassed"] == 0


def test_where_the_cache_is_off_nothing_is_looked_up(service: AppUnderTest, upstream: FakeUpstream) -> None:
    token = service.token()
    answers = [ask(service, token) for _ in range(2)]

    assert [answer.headers["x-cache"] for answer in answers] == ["BYPASS"] * 2
    assert service.value("llmops.cache.lookups") == 0
    assert service.call("GET", "/llm/cache/stats", token=token).json["enabled"] is False
    assert service.call("DELETE", "/llm/cache", token=service.token("admin")).json == {"cleared": 0}
    assert len(upstream.chat_requests) == 2


def test_nothing_of_the_question_is_in_the_store(tmp_path: Path, upstream: FakeUpstream) -> None:
    canary = "canary-in-the-question"
    folder = tmp_path / "qdrant"
    with running_app(litellm_url=upstream.url, cache_enabled=True, qdrant_path=str(folder)) as app:
        ask(app, app.token(), prompt=canary, system_prompt=f"system {canary}")
    stored = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())

    assert b"Hello from the fake." in stored
    assert canary.encode() not in stored
    assert canary not in json.dumps(app.lines())
