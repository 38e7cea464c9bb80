"""API keys at the routes: who may make which, what they open, and when they end."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.fakes.operations import SAMPLES
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest
from tests.http.support import attributes, completed_line, module_app, server_span

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=fake.url) as served:
        yield served


@pytest.fixture(scope="module")
def user(app: AppUnderTest) -> str:
    return app.token("user")


@pytest.fixture(scope="module")
def admin(app: AppUnderTest) -> str:
    return app.token("admin")


def make(app: AppUnderTest, token: str, **fields: Any) -> dict[str, Any]:
    """Make a key."""
    answer = app.call("POST", "/keys", body={"name": "app", **fields}, token=token)
    assert answer.status == 201, answer.body
    found: dict[str, Any] = answer.json
    return found


def chat(app: AppUnderTest, key: str, **fields: Any) -> Answer:
    """Ask with a key."""
    return app.call("POST", "/v1/chat/completions", body={**CHAT, **fields}, token=key)


def test_a_key_is_shown_once_and_opens_every_route(app: AppUnderTest, user: str) -> None:
    made = make(app, user, team=None, models=["demo"], rate="60/minute")
    assert made["owner"] == "user"
    assert made["models"] == ["demo"]
    assert (made["rate"], made["budget"], made["revoked_at"], made["expires_at"]) == (
        "60/minute",
        None,
        None,
        None,
    )
    answer = chat(app, made["key"])
    assert answer.status == 200
    span = attributes(server_span(app, answer.request_id))
    assert (span["enduser.id"], span["llmops.key.id"]) == ("user", made["id"])
    assert completed_line(app, answer.request_id)["user"] == "user"
    assert app.call("GET", "/auth/me", token=made["key"]).json["username"] == "user"
    listed = app.call("GET", "/keys", token=user).json["keys"]
    assert made["id"] in {key["id"] for key in listed}
    assert all("key" not in key for key in listed)
    assert made["key"] not in app.stdout.getvalue()


@pytest.mark.parametrize("field", ["Authorization", "x-api-key", "api-key"])
def test_a_key_may_come_in_any_clients_field(app: AppUnderTest, user: str, field: str) -> None:
    key = make(app, user)["key"]
    value = f"Bearer {key}" if field == "Authorization" else key
    body = SAMPLES["messages"].request
    assert app.call("POST", "/v1/messages", body=body, headers={field: value}).status == 200


def test_openais_library_takes_a_key(app: AppUnderTest, user: str) -> None:
    key = make(app, user)["key"]
    url = f"http://127.0.0.1:{app.port}/v1"
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        assert client.chat.completions.create(model="demo", messages=CHAT["messages"]).choices  # type: ignore[arg-type]
    cut = openai.OpenAI(base_url=url, api_key=key[:-1], max_retries=0)
    with cut, pytest.raises(openai.AuthenticationError):
        cut.models.list()


def test_a_key_asks_only_the_models_that_it_may(app: AppUnderTest, fake: FakeUpstream, user: str) -> None:
    key = make(app, user, models=["other-model"])["key"]
    fake.clear()
    answer = chat(app, key)
    assert (answer.status, answer.json["error"]["type"]) == (403, "PermissionDeniedError")
    assert answer.json["error"]["param"] == "model"
    assert fake.chat_requests == []
    assert chat(app, key, model="other-model").status == 200


def test_a_key_sees_only_the_models_that_it_may_ask(app: AppUnderTest, user: str) -> None:
    listed = [entry["id"] for entry in app.call("GET", "/v1/models", token=user).json["data"]]
    assert len(listed) > 1
    key = make(app, user, models=[listed[1], "not-there"])["key"]
    assert [entry["id"] for entry in app.call("GET", "/v1/models", token=key).json["data"]] == [listed[1]]
    assert app.call("GET", "/llm/models", token=key).json["models"] == [listed[1]]
    assert app.call("GET", f"/v1/models/{listed[1]}", token=key).status == 200
    assert app.call("GET", f"/v1/models/{listed[0]}", token=key).status == 404


def test_the_nearest_limit_holds_and_is_told(app: AppUnderTest, user: str) -> None:
    key = make(app, user, rate="2/hour")["key"]
    first = chat(app, key)
    assert first.status == 200
    assert "r=1" in first.headers["ratelimit"]
    assert chat(app, key).status == 200
    third = chat(app, key)
    assert (third.status, third.json["error"]["type"]) == (429, "RateLimitError")
    # The user's own limit is another one.
    assert chat(app, user).status == 200
    other = make(app, user, rate="2/hour")["key"]
    assert chat(app, other).status == 200


def test_a_revoked_key_is_refused_at_once(app: AppUnderTest, user: str) -> None:
    made = make(app, user)
    assert chat(app, made["key"]).status == 200
    for _ in range(2):
        assert app.call("DELETE", f"/keys/{made['id']}", token=user).status == 204
    answer = chat(app, made["key"])
    assert (answer.status, answer.json["error"]["type"]) == (401, "AuthenticationError")
    assert app.call("POST", f"/keys/{made['id']}/rotate", body={}, token=user).status == 404


def test_a_rotated_key_has_a_new_secret(app: AppUnderTest, user: str) -> None:
    made = make(app, user)
    turned = app.call("POST", f"/keys/{made['id']}/rotate", body={"overlap_s": 60}, token=user)
    assert (turned.status, turned.json["id"]) == (201, made["id"])
    again = app.call("POST", f"/keys/{made['id']}/rotate", token=user)
    assert again.status == 201
    statuses = [chat(app, key).status for key in (made["key"], turned.json["key"], again.json["key"])]
    assert statuses == [401, 401, 200]


def test_others_keys_are_an_administrators(app: AppUnderTest, user: str, admin: str) -> None:
    mine, theirs = make(app, user), make(app, admin, team="blue")
    for path, method in ((f"/keys/{theirs['id']}", "DELETE"), (f"/keys/{theirs['id']}/rotate", "POST")):
        answer = app.call(method, path, token=user)
        assert (answer.status, answer.json["error"]) == (404, "NotFoundError")
    assert app.call("GET", "/keys?owner=admin", token=user).status == 403
    assert {key["owner"] for key in app.call("GET", "/keys", token=user).json["keys"]} == {"user"}
    for fields in ({"owner": "admin"}, {"team": "blue"}):
        answer = app.call("POST", "/keys", body={"name": "x", **fields}, token=user)
        assert (answer.status, answer.json["error"]) == (403, "PermissionDeniedError")
    made = make(app, admin, owner="app-17", team="blue")
    me = app.call("GET", "/auth/me", token=made["key"]).json
    assert me.pop("rate")["limit"] == "6000/minute"
    assert me == {
        "username": "app-17",
        "role": "user",
        "team": "blue",
        "key": made["id"],
        "models": None,
        "budget": None,
    }
    assert app.call("DELETE", f"/keys/{mine['id']}", token=admin).status == 204


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"name": ""},
        {"name": "x" * 257},
        {"name": "x" * 900_000},
        {"name": "a\u0000b"},
        {"name": "\ud800"},
        {"name": "x", "rate": "0/minute"},
        {"name": "x", "rate": "many"},
        {"name": "x", "models": []},
        {"name": "x", "models": ["a\nb"]},
        {"name": "x", "budget": {"amount": -1, "unit": "usd", "period": "day"}},
        {"name": "x", "budget": {"amount": 1e13, "unit": "usd", "period": "day"}},
        {"name": "x", "budget": {"amount": 1, "unit": "eur", "period": "day"}},
        {"name": "x", "expires_at": "2020-01-01T00:00:00Z"},
        {"name": "x", "expires_at": "soon"},
        {"name": "x", "unknown": 1},
    ],
    ids=lambda wrong: f"{repr(wrong)[:60]} {len(repr(wrong))}",
)
def test_what_no_key_can_be_is_refused(app: AppUnderTest, user: str, wrong: dict[str, Any]) -> None:
    answer = app.call("POST", "/keys", body=wrong, token=user)
    assert answer.status == 422, answer.body


@pytest.mark.parametrize("amount", [b"NaN", b"1e400", b"-1", b"true"])
def test_a_budget_is_a_number(app: AppUnderTest, user: str, amount: bytes) -> None:
    body = b'{"name":"x","budget":{"amount":' + amount + b',"unit":"usd","period":"day"}}'
    assert app.call("POST", "/keys", body=body, token=user).status == 422
