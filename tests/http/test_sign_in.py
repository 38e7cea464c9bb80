"""Signing in, brute force, and every kind of token that is not ours."""

import hmac
import json
import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jwt
import pytest

from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest
from tests.http.support import assert_error_body, completed_line, eventually, module_app, trace_of, value_of

GENERATE = {"prompt": "What is a trace?"}


@pytest.fixture(scope="module")
def upstream_of_module() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def app(upstream_of_module: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=upstream_of_module.url) as served:
        yield served


def sign_in(app: AppUnderTest, username: str, password: str) -> Answer:
    return app.call("POST", "/auth/login", body={"username": username, "password": password})


@pytest.mark.parametrize("user", ["user", "admin"])
def test_a_sign_in_gives_a_token_that_works(app: AppUnderTest, user: str) -> None:
    answer = sign_in(app, user, app.passwords[user])

    assert answer.status == 200
    token = answer.json["access_token"]
    assert answer.json == {
        "access_token": token,
        "token_type": "bearer",
        "expires_in": 3_600,
        "user": {"username": user, "role": user},
    }
    me = app.call("GET", "/auth/me", token=token)
    assert me.status == 200
    assert {**me.json, "rate": None} == {
        "username": user,
        "role": user,
        "team": None,
        "key": None,
        "models": None,
        "rate": None,
        "budget": None,
    }
    assert me.json["rate"]["limit"] == app.settings.rate_limit
    assert completed_line(app, me.request_id)["user"] == user


def test_a_wrong_name_and_a_wrong_password_look_the_same(app: AppUnderTest) -> None:
    wrong_password = sign_in(app, "user", "not the password")
    wrong_name = sign_in(app, "nobody-at-all", app.passwords["user"])
    others_password = sign_in(app, "user", app.passwords["admin"])

    for answer in (wrong_password, wrong_name, others_password):
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert_error_body(app, answer, "AuthenticationError")
    bodies = [answer.json for answer in (wrong_password, wrong_name, others_password)]
    for body in bodies:
        for name in ("incident_id", "request_id", "timestamp"):
            del body[name]
    assert bodies[0] == bodies[1] == bodies[2]


@pytest.mark.alone
def test_a_wrong_name_takes_as_long_as_a_wrong_password(app: AppUnderTest) -> None:
    def fastest(name: str) -> float:
        return min(sign_in(app, name, "not the password").seconds for _ in range(4))

    wrong_password, wrong_name = fastest("admin"), fastest("nobody-else")

    assert 0.4 < wrong_name / wrong_password < 2.5


def test_brute_force_is_limited_and_counted() -> None:
    limits = {"login_failures_per_name": "3/minute", "login_failures_per_address": "8/minute"}
    with module_app(**limits) as app:
        outcomes = ("success", "wrong_credentials", "rate_limited")
        assert {outcome: _attempts(app, outcome) for outcome in outcomes} == dict.fromkeys(outcomes, 0)
        assert len(app.points("llmops.auth.attempts")) > len(outcomes), "at 0 from the start"

        assert sign_in(app, "user", app.passwords["user"]).status == 200
        assert [sign_in(app, "admin", "wrong").status for _ in range(4)] == [401, 401, 401, 429]
        refused = sign_in(app, "admin", app.passwords["admin"])
        assert refused.status == 429, "the right password too, or the limit would tell"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert_error_body(app, refused, "RateLimitError")
        assert sign_in(app, "user", app.passwords["user"]).status == 200, "another name is not shut out"
        names = [sign_in(app, f"name-{number}", "wrong").status for number in range(3)]
        assert names == [401, 401, 429], "the address has a limit of its own"
        known = sign_in(app, "user", app.passwords["user"])
        assert known.status == 200, "the address has signed in to this name before"

        expected = {"success": 3, "wrong_credentials": 5, "rate_limited": 3}
        assert {outcome: _attempts(app, outcome) for outcome in outcomes} == expected


def _attempts(app: AppUnderTest, outcome: str) -> float:
    return value_of(app, "llmops.auth.attempts", {"method": "password", "outcome": outcome})


def claims(app: AppUnderTest, **changes: Any) -> dict[str, Any]:
    now = int(time.time())
    settings = app.settings
    standard = {"sub": "user", "role": "user", "iat": now, "exp": now + 600, "jti": secrets.token_hex(16)}
    scope = {"iss": settings.jwt_issuer, "aud": settings.jwt_audience}
    return {key: value for key, value in {**standard, **scope, **changes}.items() if value is not None}


def signed(app: AppUnderTest, key: str | None = None, algorithm: str = "HS256", **changes: Any) -> str:
    secret = app.settings.jwt_secret_key.get_secret_value() if key is None else key
    return jwt.encode(claims(app, **changes), secret, algorithm=algorithm)


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def _by_hand(app: AppUnderTest, algorithm: str, sign: Callable[[bytes], bytes]) -> str:
    parts = ({"alg": algorithm, "typ": "JWT"}, claims(app))
    content = ".".join(_encoded(json.dumps(part).encode()) for part in parts)
    return f"{content}.{_encoded(sign(content.encode()))}"


def _unsigned(app: AppUnderTest, algorithm: str = "none") -> str:
    return _by_hand(app, algorithm, lambda _content: b"")


def _confused(app: AppUnderTest, algorithm: str) -> str:
    """Signed with the very key of the service, and named as something else."""
    key = app.settings.jwt_secret_key.get_secret_value().encode()
    return _by_hand(app, algorithm, lambda content: hmac.digest(key, content, "sha256"))


def _tampered(app: AppUnderTest) -> str:
    head, body, signature = signed(app).split(".")
    other = signed(app, sub="admin", role="admin").split(".")[1]
    assert body != other
    return f"{head}.{other}.{signature}"


FORGED: Mapping[str, Callable[[AppUnderTest], str | None]] = {
    "no header": lambda _app: None,
    "empty": lambda _app: "Bearer ",
    "basic": lambda _app: "Basic dXNlcjp1c2Vy",
    "bare token": signed,
    "two tokens": lambda app: f"Bearer {signed(app)} {signed(app)}",
    "not a jwt": lambda _app: "Bearer not-a-jwt",
    "three dots": lambda _app: "Bearer ...",
    "none": lambda app: f"Bearer {_unsigned(app)}",
    "None": lambda app: f"Bearer {_unsigned(app, 'None')}",
    "hs256 without a signature": lambda app: f"Bearer {_unsigned(app, 'HS256')}",
    "rs256": lambda app: f"Bearer {_confused(app, 'RS256')}",
    "no such algorithm": lambda app: f"Bearer {_confused(app, 'HS255')}",
    "hs512": lambda app: f"Bearer {signed(app, algorithm='HS512')}",
    "wrong key": lambda app: f"Bearer {signed(app, key=secrets.token_hex(32))}",
    "other claims": lambda app: f"Bearer {_tampered(app)}",
    "expired": lambda app: f"Bearer {signed(app, exp=int(time.time()) - 60)}",
    "not yet": lambda app: f"Bearer {signed(app, nbf=int(time.time()) + 600)}",
    "from the future": lambda app: f"Bearer {signed(app, iat=int(time.time()) + 600)}",
    "other audience": lambda app: f"Bearer {signed(app, aud='somebody-else')}",
    "other issuer": lambda app: f"Bearer {signed(app, iss='somebody-else')}",
    "no expiry": lambda app: f"Bearer {signed(app, exp=None)}",
    "no audience": lambda app: f"Bearer {signed(app, aud=None)}",
    "unknown user": lambda app: f"Bearer {signed(app, sub='root')}",
    "no text as user": lambda app: f"Bearer {signed(app, sub=7)}",
    "10 kB": lambda app: f"Bearer {signed(app, padding='x' * 10_240)}",
}


@pytest.mark.parametrize("forgery", FORGED)
@pytest.mark.parametrize(("method", "path"), [("GET", "/auth/me"), ("POST", "/llm/generate")])
def test_a_forged_token_opens_nothing(
    app: AppUnderTest, upstream_of_module: FakeUpstream, method: str, path: str, forgery: str
) -> None:
    authorization = FORGED[forgery](app)
    answer = app.call(
        method,
        path,
        body=GENERATE if method == "POST" else None,
        headers={} if authorization is None else {"Authorization": authorization},
    )

    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert_error_body(app, answer, "AuthenticationError")
    trace_of(app, answer.request_id)
    assert all("user" not in line for line in app.lines(answer.request_id))
    assert not upstream_of_module.chat_requests


def test_a_true_token_opens_both(app: AppUnderTest) -> None:
    """The forgeries above fail for what is forged about them, not for how they are made."""
    header = {"Authorization": f"Bearer {signed(app)}"}

    assert app.call("GET", "/auth/me", headers=header).status == 200
    assert app.call("GET", "/llm/models", headers=header).status == 200
    by_hand = {"Authorization": f"Bearer {_confused(app, 'HS256')}"}
    assert app.call("GET", "/auth/me", headers=by_hand).status == 200
    lower_case = {"authorization": f"bearer {signed(app)}"}
    assert app.call("GET", "/auth/me", headers=lower_case).status == 200, "RFC 9110: schemes have no case"


def test_the_role_in_a_token_is_not_believed(app: AppUnderTest) -> None:
    answer = app.call("GET", "/auth/me", headers={"Authorization": f"Bearer {signed(app, role='admin')}"})

    assert (answer.json["username"], answer.json["role"]) == ("user", "user")


def test_user_names_are_on_spans_and_on_no_metric() -> None:
    with FakeUpstream() as upstream, module_app(litellm_url=upstream.url) as app:
        token = app.token("admin")
        answer = app.call("POST", "/llm/generate", body=GENERATE, token=token)
        assert answer.status == 200
        (server,) = [span for span in trace_of(app, answer.request_id) if span.name == "POST /llm/generate"]
        assert (server.attributes or {})["user.roles"] == ("admin",)
        eventually(
            lambda: app.value("http.server.request.duration", http__route="/llm/generate"), "the metric"
        )
        data = app.metrics_out.get_metrics_data()
        text = data.to_json() if data else ""
        assert "gen_ai.client.operation.duration" in text
        assert '"admin"' not in text
