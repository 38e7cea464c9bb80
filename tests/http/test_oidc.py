"""Tokens of OpenID Connect issuers at the routes: what they open, how they end, an issuer that is down."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.issuer import AUDIENCE, JWKS, FakeIssuer, SigningKey
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest
from tests.http.support import (
    assert_error_body,
    attributes,
    completed_line,
    eventually,
    module_app,
    server_span,
    value_of,
)

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
CLAIMS = {
    "oidc_audience": (AUDIENCE,),
    "oidc_team_claim": "team",
    "oidc_admin_claim": "groups",
    "oidc_admin_values": ("llm-admins",),
}
OFTEN = {"health_interval_s": 0.2, "health_ttl_s": 5.0}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer() as fake:
        yield fake


@pytest.fixture(scope="module")
def app(upstream: FakeUpstream, issuer: FakeIssuer) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=upstream.url, oidc_issuers=(issuer.url,), **CLAIMS) as served:
        yield served


def me(app: AppUnderTest, token: str) -> Answer:
    return app.call("GET", "/auth/me", token=token)


def health(app: AppUnderTest) -> Any:
    return app.call("GET", "/health/detailed").json


def test_a_token_of_the_issuer_opens_the_routes_of_a_user(app: AppUnderTest, issuer: FakeIssuer) -> None:
    token, name = issuer.token(team="red", groups=["staff"]), f"{issuer.url}#alice"
    answer = app.call("POST", "/v1/chat/completions", body=CHAT, token=token)
    assert answer.status == 200
    span = attributes(server_span(app, answer.request_id))
    assert (span["enduser.id"], span["user.roles"], span["llmops.team"]) == (name, ("user",), "red")
    assert span["enduser.role"] == "user"
    assert completed_line(app, answer.request_id)["user"] == name
    assert me(app, token).json["username"] == name
    assert me(app, token).json["role"] == "user"
    assert app.call("DELETE", "/llm/cache", token=token).status == 403
    assert token.rpartition(".")[2] not in app.stdout.getvalue()


def test_the_configured_claim_makes_an_administrator(app: AppUnderTest, issuer: FakeIssuer) -> None:
    token = issuer.token(sub="boss", groups=["staff", "llm-admins"])
    assert me(app, token).json["role"] == "admin"
    answer = app.call("DELETE", "/llm/cache", token=token)
    assert answer.status == 200
    assert attributes(server_span(app, answer.request_id))["user.roles"] == ("admin",)


@pytest.mark.parametrize("field", ["x-api-key", "api-key"])
def test_a_token_may_come_where_clients_send_a_key(app: AppUnderTest, issuer: FakeIssuer, field: str) -> None:
    assert app.call("GET", "/auth/me", headers={field: issuer.token()}).status == 200


def test_a_subject_with_a_built_in_name_is_not_that_user(app: AppUnderTest, issuer: FakeIssuer) -> None:
    body = me(app, issuer.token(sub="admin", role="admin")).json
    assert (body["username"], body["role"]) == (f"{issuer.url}#admin", "user")


def test_what_is_not_the_issuers_is_refused(app: AppUnderTest, issuer: FakeIssuer) -> None:
    thief = SigningKey("RS256", kid=issuer.key.kid)
    for token in (
        thief.sign(issuer.claims()),
        issuer.token(aud="another-service"),
        issuer.token(exp=1),
        issuer.token(sub="\ud800"),
        issuer.token(header={"alg": "none"}),
        issuer.token(iss="https://evil.example"),
        issuer.token()[:-5],
    ):
        answer = me(app, token)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert_error_body(app, answer, "AuthenticationError")
    assert "another audience" in me(app, issuer.token(aud="another-service")).json["message"]
    assert app.call("POST", "/v1/chat/completions", body=CHAT, token=issuer.token(exp=1)).status == 401


def test_built_in_users_sign_in_as_before(app: AppUnderTest) -> None:
    token = app.token("user")
    assert me(app, token).json["username"] == "user"
    assert app.call("POST", "/auth/logout", token=token).status == 204
    assert me(app, token).status == 401


def test_a_token_that_was_signed_out_is_refused_from_then_on(app: AppUnderTest, issuer: FakeIssuer) -> None:
    token, other = issuer.token(sub="leaver"), issuer.token(sub="leaver", jti="2")
    assert me(app, token).status == 200
    assert app.call("POST", "/auth/logout", token=token).status == 204
    answer = me(app, token)
    assert answer.status == 401
    assert "signed out" in answer.json["message"]
    assert app.call("POST", "/auth/logout", token=token).status == 401
    assert me(app, other).status == 200


def test_unknown_keys_are_one_question_to_the_issuer(upstream: FakeUpstream) -> None:
    with (
        FakeIssuer() as issuer,
        module_app(litellm_url=upstream.url, oidc_issuers=(issuer.url,), **CLAIMS) as app,
        ThreadPoolExecutor(8) as threads,
    ):
        assert me(app, issuer.token()).status == 200
        assert issuer.requests[JWKS] == 1
        unknown = [SigningKey().sign(issuer.claims()) for _ in range(40)]
        assert {answer.status for answer in threads.map(lambda token: me(app, token), unknown)} == {401}
        assert issuer.requests[JWKS] == 2


def test_a_rotated_key_is_taken_at_once(upstream: FakeUpstream) -> None:
    with (
        FakeIssuer() as issuer,
        module_app(litellm_url=upstream.url, oidc_issuers=(issuer.url,), **CLAIMS) as app,
    ):
        old = issuer.token()
        assert me(app, old).status == 200
        issuer.rotate()
        assert me(app, issuer.token(sub="bob")).status == 200
        assert me(app, old).status == 401


def test_the_issuer_is_a_dependency_that_need_not_be_up(app: AppUnderTest, issuer: FakeIssuer) -> None:
    body = health(app)
    assert body["checks"]["oidc"] is True
    assert body["details"]["oidc"]["required"] is False
    assert value_of(app, "llmops.health.status", {"dependency": "oidc"}) == 1
    assert issuer.requests


def test_a_service_starts_while_its_issuer_is_down(upstream: FakeUpstream) -> None:
    with FakeIssuer() as issuer:
        pass
    values = {"oidc_issuers": (issuer.url,), "oidc_jwks_max_stale_s": 1.0, **CLAIMS, **OFTEN}
    with module_app(litellm_url=upstream.url, **values) as app:
        answer = me(app, issuer.token())
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert_error_body(app, answer, "DependencyUnavailableError")
        assert issuer.url not in answer.json["message"]
        assert me(app, app.token("user")).status == 200
        eventually(lambda: health(app)["checks"]["litellm"], "the model's side to be up")
        # It is not required, and says why it is down.
        body = health(app)
        assert (body["status"], body["checks"]["oidc"]) == ("healthy", False)
        assert body["details"]["oidc"]["error"] == "refused; no usable keys"
        issuer.start()
        try:
            eventually(lambda: me(app, issuer.token()).status == 200, "the issuer's tokens to be accepted")
            eventually(lambda: health(app)["checks"]["oidc"], "the issuer to be up")
        finally:
            issuer.stop()
        told = [line for line in app.lines() if str(line.get("event")).startswith("llmops.identity.issuer")]
        assert [line["event"].rpartition(".")[2] for line in told[:2]] == ["failed", "recovered"]
        assert told[0]["issuer"] == issuer.url
        assert told[0]["reason"] == "refused"


def test_known_keys_outlast_the_issuer_for_a_while(upstream: FakeUpstream) -> None:
    values = {"oidc_jwks_max_stale_s": 2.0, "health_required": ("oidc",), **CLAIMS, **OFTEN}
    with (
        FakeIssuer() as issuer,
        module_app(litellm_url=upstream.url, oidc_issuers=(issuer.url,), **values) as app,
    ):
        known, other = issuer.token(), issuer.token(sub="bob")
        assert me(app, known).status == 200
        eventually(lambda: health(app)["status"] == "healthy", "the issuer to be up")
        issuer.stop()
        assert {me(app, token).status for token in (known, other)} == {200}
        eventually(lambda: me(app, known).status == 503, "the keys to be too old")
        assert me(app, other).status == 503
        body = eventually(
            lambda: (found := health(app))["status"] == "degraded" and found, "the issuer to be down"
        )
        assert (body["checks"]["oidc"], body["details"]["oidc"]["required"]) == (False, True)
        issuer.start()
        eventually(lambda: me(app, known).status == 200, "the keys to be confirmed")


def test_of_several_issuers_each_is_a_dependency(upstream: FakeUpstream) -> None:
    with (
        FakeIssuer() as first,
        FakeIssuer(number=1) as second,
        module_app(
            litellm_url=upstream.url,
            oidc_issuers=(first.url, second.url),
            oidc_jwks_max_stale_s=2.0,
            health_required=("oidc",),
            **CLAIMS,
            **OFTEN,
        ) as app,
    ):
        users = {me(app, issuer.token()).json["username"] for issuer in (first, second)}
        assert users == {f"{first.url}#alice", f"{second.url}#alice"}
        assert me(app, first.key.sign(second.claims())).status == 401
        names = {"oidc_127_0_0_1", "oidc_127_0_0_1_2"}
        body = eventually(lambda: (found := health(app))["status"] == "healthy" and found, "both to be up")
        assert {name for name in body["checks"] if name.startswith("oidc")} == names
        assert all(body["details"][name]["required"] for name in names)
        second.stop()
        eventually(lambda: health(app)["checks"]["oidc_127_0_0_1_2"] is False, "the second to be down")
        body = health(app)
        assert (body["status"], body["checks"]["oidc_127_0_0_1"]) == ("degraded", True)


def test_a_user_of_an_issuer_makes_keys_of_their_own(app: AppUnderTest, issuer: FakeIssuer) -> None:
    made = app.call("POST", "/keys", body={"name": "app"}, token=issuer.token(sub="maker"))
    assert (made.status, made.json["owner"]) == (201, f"{issuer.url}#maker")
    body = me(app, made.json["key"]).json
    assert (body["username"], body["role"]) == (f"{issuer.url}#maker", "user")
