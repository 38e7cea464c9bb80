"""Budgets, teams, users and usage at the routes."""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.fakes.behaviours import Answer as Reply
from tests.fakes.behaviours import Status, Stream
from tests.fakes.operations import SAMPLES
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest
from tests.http.support import attributes, completed_line, eventually, module_app, server_span

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
COST = 0.00042
"""What a call of the fake upstream costs in US dollars; it has 30 tokens."""

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=fake.url, retry_max=0) as served:
        yield served


@pytest.fixture(scope="module")
def admin(app: AppUnderTest) -> str:
    return app.token("admin")


@pytest.fixture
def owner() -> str:
    """A user whom no other test has."""
    return f"app-{next(numbers)}"


@pytest.fixture
def team() -> str:
    return f"team-{next(numbers)}"


def put(app: AppUnderTest, admin: str, path: str, **fields: Any) -> dict[str, Any]:
    """Set a user or a team."""
    answer = app.call("PUT", path, body=fields, token=admin)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


def make(app: AppUnderTest, admin: str, owner: str, **fields: Any) -> dict[str, Any]:
    """Make a key for a user."""
    answer = app.call("POST", "/keys", body={"name": "app", "owner": owner, **fields}, token=admin)
    assert answer.status == 201, answer.body
    found: dict[str, Any] = answer.json
    return found


def chat(app: AppUnderTest, key: str, **fields: Any) -> Answer:
    return app.call("POST", "/v1/chat/completions", body={**CHAT, **fields}, token=key)


def usd(amount: float, period: str = "day") -> dict[str, Any]:
    return {"amount": amount, "unit": "usd", "period": period}


def usage(app: AppUnderTest, token: str, query: str = "", accept: str = "*/*") -> Answer:
    return app.call("GET", f"/usage{query}", token=token, headers={"Accept": accept})


def test_a_spent_budget_answers_429_until_its_renewal(
    app: AppUnderTest, admin: str, owner: str, fake: FakeUpstream
) -> None:
    made = make(app, admin, owner, budget=usd(2 * COST))
    assert made["budget"] == usd(2 * COST)
    assert [chat(app, made["key"]).status for _ in range(2)] == [200, 200]
    fake.clear()
    refused = chat(app, made["key"])
    assert (refused.status, refused.json["error"]["type"]) == (429, "BudgetExceededError")
    assert refused.json["error"]["code"] == "insufficient_quota"
    assert "renewed at" in refused.json["error"]["message"]
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0) + timedelta(days=1)
    assert abs(int(refused.headers["retry-after"]) - (midnight - datetime.now(UTC)).total_seconds()) < 60
    assert refused.headers["x-should-retry"] == "false"
    assert fake.chat_requests == []
    assert attributes(server_span(app, refused.request_id))["error.type"] == "BudgetExceededError"
    assert completed_line(app, refused.request_id)["error"] == "BudgetExceededError"
    assert app.value("llmops.budget.exceeded", scope="key") == 1
    me = app.call("GET", "/auth/me", token=made["key"]).json["budget"]
    assert (me["limit"], me["unit"], me["period"], me["left"]) == (2 * COST, "usd", "day", 0)
    assert me["spent"] == pytest.approx(2 * COST)
    assert me["renews_at"][:10] == midnight.strftime("%Y-%m-%d")


def test_a_budget_near_its_limit_is_an_event_of_the_call(app: AppUnderTest, admin: str, owner: str) -> None:
    key = make(app, admin, owner, budget=usd(5 * COST))["key"]
    answers = [chat(app, key, seed=number) for number in range(4)]
    assert all(answer.status == 200 for answer in answers)

    def events(answer: Answer) -> list[str]:
        return [event.name for span in app.spans(answer.request_id) for event in span.events]

    assert eventually(lambda: "llmops.budget.near_limit" in events(answers[3]), "the event")
    assert not any("llmops.budget.near_limit" in events(answer) for answer in answers[:3])
    lines = [line["message"] for line in app.lines(answers[3].request_id)]
    assert "The budget of the key is near its limit" in lines


def test_the_budgets_of_user_and_team_hold_too(app: AppUnderTest, admin: str, owner: str, team: str) -> None:
    put(app, admin, f"/teams/{team}", budget={"amount": 90, "unit": "tokens", "period": "month"})
    put(app, admin, f"/users/{owner}", team=team, budget=usd(2 * COST))
    keys = [make(app, admin, owner)["key"] for _ in range(2)]
    assert [chat(app, key).status for key in keys] == [200, 200]
    assert "budget of the user" in chat(app, keys[0]).json["error"]["message"]
    colleague = make(app, admin, f"{owner}-colleague", team=team)["key"]
    assert chat(app, colleague).status == 200
    assert "budget of the team" in chat(app, colleague).json["error"]["message"]
    (found,) = [
        row for row in app.call("GET", "/teams?limit=1000", token=admin).json["teams"] if row["name"] == team
    ]
    assert (found["spent"], found["left"]) == (90, 0)
    assert found["renews_at"][8:10] == "01"
    # More, at once.
    put(app, admin, f"/teams/{team}", budget={"amount": 1_000, "unit": "tokens", "period": "month"})
    assert chat(app, colleague).status == 200


def test_the_order_of_refusals(app: AppUnderTest, admin: str, owner: str) -> None:
    def fresh(**fields: Any) -> str:
        key: str = make(app, admin, owner, **fields)["key"]
        return key

    def refusal(answer: Answer) -> str:
        name: str = answer.json["error"]["type"]
        return name

    spent = {"budget": usd(0)}
    used_up = fresh(models=["demo"], rate="1/day", **spent)
    # Counts against the rate although the budget refuses it.
    assert refusal(chat(app, used_up)) == "BudgetExceededError"
    bad_body = {"messages": 1}
    assert refusal(chat(app, used_up, model="other", **bad_body)) == "PermissionDeniedError"
    assert refusal(chat(app, used_up, **bad_body)) == "RateLimitError"
    assert refusal(chat(app, fresh(**spent), **bad_body)) == "BudgetExceededError"
    assert refusal(chat(app, fresh(), **bad_body)) == "ValidationError"
    assert refusal(chat(app, used_up + "x", model="other")) == "AuthenticationError"
    put(app, admin, f"/users/{owner}", disabled=True)
    assert refusal(chat(app, used_up, model="other")) == "AuthenticationError"
    # Under /llm the order is the same.
    put(app, admin, f"/users/{owner}")
    answer = app.call("POST", "/llm/generate", body={"prompt": 1, "model": "other"}, token=used_up)
    assert (answer.status, answer.json["error"]) == (403, "PermissionDeniedError")


def test_a_disabled_users_tokens_and_keys_end_at_once(app: AppUnderTest, admin: str) -> None:
    token, key = app.token("user"), make(app, admin, "user")["key"]
    assert [chat(app, secret).status for secret in (token, key)] == [200, 200]
    assert put(app, admin, "/users/user", disabled=True)["disabled"] is True
    try:
        for secret in (token, key):
            answer = chat(app, secret)
            assert (answer.status, answer.json["error"]["type"]) == (401, "AuthenticationError")
        login = {"username": "user", "password": app.passwords["user"]}
        assert app.call("POST", "/auth/login", body=login).status == 401
    finally:
        put(app, admin, "/users/user")
    assert [chat(app, secret).status for secret in (token, key)] == [200, 200]
    assert app.call("PUT", "/users/admin", body={"disabled": True}, token=admin).status == 422


def test_a_users_rate_replaces_the_services(app: AppUnderTest, admin: str, owner: str, team: str) -> None:
    put(app, admin, f"/users/{owner}", rate="7000/minute", team=team)
    put(app, admin, f"/teams/{team}", rate="2/hour")
    key = make(app, admin, owner, rate="100/hour")["key"]
    assert app.call("GET", "/auth/me", token=key).json["rate"]["limit"] == "2/hour"
    first = chat(app, key)
    assert first.headers["ratelimit-policy"] == '"per-team";q=2;w=3600'
    assert first.headers["ratelimit"].startswith('"per-team";r=1;')
    other = make(app, admin, f"{owner}-colleague", team=team)["key"]
    assert chat(app, other).status == 200
    refused = chat(app, key)
    assert (refused.status, refused.json["error"]["type"]) == (429, "RateLimitError")
    put(app, admin, f"/teams/{team}")
    assert chat(app, key).headers["ratelimit-policy"].startswith('"per-key";q=100')


def test_only_an_administrator_grants_more(app: AppUnderTest, admin: str) -> None:
    token = app.token("user")
    put(app, admin, "/users/user", rate="100/minute", budget=usd(5, "month"), models=["demo", "m2"])
    try:
        for fields, param in (
            ({"rate": "101/minute", "models": ["demo"]}, "rate"),
            ({"rate": "2/second", "models": ["demo"]}, "rate"),
            ({"budget": usd(5.01, "month"), "models": ["demo"]}, "budget"),
            ({"budget": usd(5.01, "day"), "models": ["demo"]}, "budget"),
            ({"models": ["m3"]}, "models"),
            ({}, "models"),
        ):
            answer = app.call("POST", "/keys", body={"name": "x", **fields}, token=token)
            assert (answer.status, answer.json["error"]) == (403, "PermissionDeniedError"), fields
            assert app.call("POST", "/keys", body={"name": "x", **fields}, token=admin).status == 201, param
        fields = {"rate": "1/second", "budget": usd(5, "month"), "models": ["demo"]}
        made = app.call("POST", "/keys", body={"name": "x", **fields}, token=token)
        assert made.status == 201
        # It would give itself the limits once more.
        body = {"name": "y", "models": ["demo"]}
        assert app.call("POST", "/keys", body=body, token=made.json["key"]).status == 403
        other = app.call("POST", "/keys", body={"name": "z", "models": ["demo"]}, token=token).json
        path = f"/keys/{other['id']}/rotate"
        assert app.call("POST", path, token=made.json["key"]).status == 403
        assert app.call("POST", f"/keys/{made.json['id']}/rotate", token=made.json["key"]).status == 201
    finally:
        put(app, admin, "/users/user")


def test_a_key_keeps_the_team_of_the_key_that_made_it(
    app: AppUnderTest, admin: str, owner: str, team: str
) -> None:
    parent = make(app, admin, owner, team=team)
    child = app.call("POST", "/keys", body={"name": "child"}, token=parent["key"]).json
    assert child["team"] == team
    # The team of a user is that of the moment.
    other = make(app, admin, f"{owner}-2")
    put(app, admin, f"/users/{owner}-2", team=team)
    assert app.call("GET", "/auth/me", token=other["key"]).json["team"] == team
    put(app, admin, f"/users/{owner}-2")
    assert app.call("GET", "/auth/me", token=other["key"]).json["team"] is None


def test_a_key_that_expires_makes_none_that_lives_longer(app: AppUnderTest, admin: str, owner: str) -> None:
    ends = (datetime.now(UTC) + timedelta(days=2)).isoformat(timespec="seconds")
    parent = make(app, admin, owner, expires_at=ends)
    child = app.call("POST", "/keys", body={"name": "child"}, token=parent["key"])
    assert child.json["expires_at"] == parent["expires_at"]
    later = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    child = app.call("POST", "/keys", body={"name": "child", "expires_at": later}, token=parent["key"])
    assert child.json["expires_at"] == parent["expires_at"]


@pytest.mark.parametrize("method", ["PUT", "GET"])
@pytest.mark.parametrize("path", ["/teams", "/users"])
def test_teams_and_users_are_an_administrators(app: AppUnderTest, method: str, path: str) -> None:
    target = f"{path}/x" if method == "PUT" else path
    answer = app.call(method, target, body={} if method == "PUT" else None, token=app.token("user"))
    assert (answer.status, answer.json["error"]) == (403, "PermissionDeniedError")
    assert app.call(method, target, body={} if method == "PUT" else None).status == 401


@pytest.mark.parametrize(
    "wrong",
    [
        b'{"rate":"fast"}',
        b'{"rate":"0/minute"}',
        b'{"budget":{"amount":NaN,"unit":"usd","period":"day"}}',
        b'{"budget":{"amount":1e400,"unit":"usd","period":"day"}}',
        b'{"budget":{"amount":-1,"unit":"usd","period":"day"}}',
        b'{"budget":{"amount":1,"unit":"usd","period":"week"}}',
        b'{"models":[]}',
        b'{"models":"demo"}',
        b'{"disabled":"yes"}',
        b'{"unknown":1}',
        b"[]",
    ],
)
def test_limits_that_can_be_none_are_refused(app: AppUnderTest, admin: str, wrong: bytes) -> None:
    for path in ("/teams/x", "/users/x"):
        assert app.call("PUT", path, body=wrong, token=admin).status == 422


@pytest.mark.parametrize("name", ["a%00b", "a%0Ab", "x" * 257, "a%E2%80%8Db"])
def test_names_that_can_be_none_are_refused(app: AppUnderTest, admin: str, name: str) -> None:
    for path in ("teams", "users"):
        assert app.call("PUT", f"/{path}/{name}", body={}, token=admin).status in {404, 422}


def test_a_users_name_may_be_an_identity_providers(app: AppUnderTest, admin: str) -> None:
    name = "https://idp.example/realms/a#alice"
    put(app, admin, "/users/https%3A%2F%2Fidp.example%2Frealms%2Fa%23alice", rate="1/minute")
    listed = app.call("GET", "/users?limit=1000", token=admin).json["users"]
    assert [row["rate"] for row in listed if row["name"] == name] == ["1/minute"]
    assert {"admin", "user"} <= {row["name"] for row in listed}
    page = app.call("GET", "/users?limit=1&after=adm", token=admin).json["users"]
    assert [(row["name"], row["role"]) for row in page] == [("admin", "admin")]


def test_every_change_is_in_the_audit_log(app: AppUnderTest, admin: str, owner: str, team: str) -> None:
    made = make(app, admin, owner, team=team)
    app.call("POST", f"/keys/{made['id']}/rotate", token=admin)
    app.call("DELETE", f"/keys/{made['id']}", token=admin)
    put(app, admin, f"/users/{owner}", disabled=True)
    put(app, admin, f"/teams/{team}", rate="5/minute")
    found = [
        line
        for line in app.lines()
        if line.get("event") == "llmops.identity.changed" and line["target"] in {made["id"], owner, team}
    ]
    assert [(line["message"], line["actor"], line["target"]) for line in found] == [
        ("key_created", "admin", made["id"]),
        ("key_rotated", "admin", made["id"]),
        ("key_revoked", "admin", made["id"]),
        ("user_set", "admin", owner),
        ("team_set", "admin", team),
    ]
    assert found[0]["owner"] == owner
    assert json.loads(found[4]["limits"])["rate"] == "5/minute"
    assert made["key"] not in app.stdout.getvalue()


def test_usage_shows_ones_own_calls_at_once(
    app: AppUnderTest, admin: str, owner: str, team: str, fake: FakeUpstream
) -> None:
    keys = [make(app, admin, owner, team=team) for _ in range(2)]
    for key in keys:
        assert chat(app, key["key"]).status == 200
    stored = {"prompt": f"for {owner}"}
    for _ in range(2):
        assert app.call("POST", "/llm/generate", body=stored, token=keys[0]["key"]).status == 200
    fake.script(Status(500))
    assert chat(app, keys[1]["key"]).status == 502
    fake.script(Reply(cost=None))
    assert chat(app, keys[1]["key"]).status == 200
    body = usage(app, keys[0]["key"], "?by=key,day").json
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    assert (body["from"], body["to"]) == (f"{today[:8]}01", today)
    rows = {row["key"]: row for row in body["rows"]}
    assert set(rows) == {key["id"] for key in keys}
    assert {row["day"] for row in body["rows"]} == {today}
    names = ("calls", "cached", "errors", "unpriced", "prompt_tokens", "completion_tokens")
    first, second = (rows[key["id"]] for key in keys)
    assert first["calls"] - first["cached"] + second["calls"] - second["errors"] == 4 - first["cached"] + 1
    assert [second[name] for name in names] == [3, 0, 1, 1, 20, 40]
    assert second["cost"] == pytest.approx(COST)
    assert body["total"]["calls"] == 6
    assert usage(app, keys[0]["key"], "?by=team,user").json["rows"][0]["team"] == team
    # Those of others are an administrator's.
    assert usage(app, keys[0]["key"], "?user=admin").status == 403
    assert usage(app, admin, f"?user={owner}").json["total"]["calls"] == 6
    assert usage(app, admin).json["total"]["calls"] > 6
    assert usage(app, app.token("user"), "?from=2020-01-01&to=2020-12-31&by=").json["total"]["calls"] == 0


def test_usage_as_csv(app: AppUnderTest, admin: str) -> None:
    owner = '=cmd|"x",y'
    key = make(app, admin, owner)["key"]
    assert chat(app, key).status == 200
    answer = usage(app, key, "?by=user,model", accept="text/csv")
    assert answer.headers["content-type"].startswith("text/csv")
    head, row = csv.reader(io.StringIO(answer.body.decode()))
    assert head[:3] == ["user", "model", "calls"]
    # A spreadsheet must not take a name for a formula.
    assert row[:3] == [f"'{owner}", "demo", "1"]
    assert row[head.index("cost")] == "0.00042"


@pytest.mark.parametrize(
    "query",
    ["?from=x", "?from=2026-02-02&to=2026-02-01", "?by=week", "?by=day&by=user", "?days=1", "?to=2026-13-01"],
)
def test_a_question_about_usage_that_makes_no_sense_is_refused(
    app: AppUnderTest, admin: str, query: str
) -> None:
    assert usage(app, admin, query).status == 422


def test_a_record_says_who_has_called(app: AppUnderTest, admin: str, owner: str, team: str) -> None:
    made = make(app, admin, owner, team=team)
    answer = chat(app, made["key"])
    line = completed_line(app, answer.request_id)
    shown = [line[name] for name in ("user", "enduser.id", "llmops.team", "llmops.key.id")]
    assert shown == [owner, owner, team, made["id"]]
    span = attributes(server_span(app, answer.request_id))
    named = [span[name] for name in ("enduser.id", "llmops.team", "llmops.key.id")]
    assert named == [owner, team, made["id"]]
    for point in app.points("llmops.auth.attempts"):
        assert set(point.attributes or {}) == {"method", "outcome"}
    assert app.value("llmops.auth.attempts", method="key", outcome="success") >= 1
    chat(app, made["key"][:-1])
    assert app.value("llmops.auth.attempts", method="key", outcome="invalid") >= 1


@pytest.mark.parametrize(
    "expires_at", ["9999-12-31T23:59:59-14:00", "9999-12-31T23:59:59Z", "1970-01-01T00:00:00Z"]
)
def test_a_key_expires_at_a_time_that_can_be_shown(app: AppUnderTest, expires_at: str) -> None:
    """One of the year 10000 was kept, and no list that had it could be shown any more."""
    token = app.token("user")
    answer = app.call("POST", "/keys", body={"name": "x", "expires_at": expires_at}, token=token)
    assert answer.status == 422
    assert app.call("GET", "/keys", token=token).status == 200


def test_a_key_with_limits_is_no_administrators(app: AppUnderTest, admin: str) -> None:
    limited = make(app, admin, "admin", models=["demo"])["key"]
    assert app.call("GET", "/auth/me", token=limited).json["role"] == "user"
    assert app.call("PUT", "/users/admin", body={}, token=limited).status == 403
    assert app.call("GET", "/users", token=make(app, admin, "admin")["key"]).status == 200


def test_a_replaced_secret_only_makes_calls(app: AppUnderTest, admin: str, owner: str) -> None:
    made = make(app, admin, owner)
    path = f"/keys/{made['id']}"
    new = app.call("POST", f"{path}/rotate", body={"overlap_s": 600}, token=made["key"]).json["key"]
    assert [chat(app, key).status for key in (made["key"], new)] == [200, 200]
    for method, target, body in (
        ("POST", f"{path}/rotate", {}),
        ("POST", "/keys", {"name": "mine"}),
        ("DELETE", path, None),
    ):
        assert app.call(method, target, body=body, token=made["key"]).status == 403
    assert app.call("POST", f"{path}/rotate", body={}, token=new).status == 201


def test_a_stream_that_is_left_has_no_price_and_says_so(
    app: AppUnderTest, admin: str, owner: str, fake: FakeUpstream
) -> None:
    key = make(app, admin, owner, budget=usd(1))["key"]
    before = app.value("llmops.budget.unpriced", scope="key")
    fake.script(Stream(chunks=("a ", "b ", "c"), usage=False))
    assert chat(app, key, stream=True).status == 200
    total = eventually(
        lambda: (found := usage(app, key).json["total"])["calls"] and found, "the call in the ledger"
    )
    assert (total["calls"], total["unpriced"], total["cost"]) == (1, 1, 0.0)
    assert app.value("llmops.budget.unpriced", scope="key") == before + 1


def test_what_costs_nothing_is_possible_with_a_spent_budget(
    app: AppUnderTest, admin: str, owner: str
) -> None:
    key = make(app, admin, owner, budget=usd(0))["key"]
    body = SAMPLES["count_tokens"].request
    assert app.call("POST", "/v1/messages/count_tokens", body=body, token=key).status == 200
    assert app.call("POST", "/v1/responses/resp_x/cancel", token=key).status == 404
    assert app.call("GET", "/v1/responses/resp_x", token=key).status == 404
    # What could not be counted is not possible with a budget.
    other = make(app, admin, owner, budget=usd(1))["key"]
    body = {**SAMPLES["responses"].request, "background": True}
    assert app.call("POST", "/v1/responses", body=body, token=other).status == 422


def test_a_key_in_a_path_is_in_no_telemetry(app: AppUnderTest, admin: str, owner: str) -> None:
    key = make(app, admin, owner)["key"]
    answer = app.call("DELETE", f"/keys/{key}", token=admin)
    assert answer.status == 422
    assert key not in str(attributes(server_span(app, answer.request_id)))
    assert key not in app.stdout.getvalue()


def test_a_disabled_users_sign_in_is_a_failed_one(app: AppUnderTest, admin: str) -> None:
    before = app.value("llmops.auth.attempts", method="password", outcome="success")
    put(app, admin, "/users/user", disabled=True)
    try:
        login = {"username": "user", "password": app.passwords["user"]}
        answer = app.call("POST", "/auth/login", body=login)
    finally:
        put(app, admin, "/users/user")
    assert answer.status == 401
    assert app.value("llmops.auth.attempts", method="password", outcome="success") == before
    assert "login_succeeded" not in [line["message"] for line in app.lines(answer.request_id)]


@pytest.mark.parametrize(
    ("accept", "is_csv"),
    [
        ("text/csv", True),
        ("text/*", True),
        ("text/csv;q=0", False),
        ("text/csv, application/json;q=0.1", True),
        ("application/json, text/csv;q=0.5", False),
        ("*/*", False),
        ("text/csv;q=x", True),
    ],
)
def test_usage_comes_as_it_is_preferred(app: AppUnderTest, admin: str, accept: str, is_csv: bool) -> None:  # noqa: FBT001
    answer = usage(app, admin, accept=accept)
    assert answer.headers["content-type"].startswith("text/csv" if is_csv else "application/json")
    assert "Accept" in answer.headers["vary"]
