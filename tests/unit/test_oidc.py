"""Tokens of OpenID Connect issuers: only of trusted ones, signed by their own keys, for this service."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import AuthenticationError, DependencyUnavailableError, OverloadedError
from service.identity.oidc import (
    ASK_AGAIN_S,
    CONFIRM_S,
    MAX_KEYS,
    MAX_SIGNED_OUT,
    MAX_WAITING,
    NoOidc,
    OidcIdentity,
    OidcProviders,
    open_oidc,
)
from service.identity.tokens import MAX_TOKEN_CHARS
from service.upstream.documents import DocumentError, open_documents
from tests.fakes.clock import FakeClock
from tests.fakes.issuer import AUDIENCE, DISCOVERY, JWKS, FakeIssuer, SigningKey, encoded
from tests.harness import make_settings

LEEWAY_S = 20
STALE_S = 1_000.0
FAILED, RECOVERED = "llmops.identity.issuer.failed", "llmops.identity.issuer.recovered"
DOWN = DocumentError("refused")
ORDER_P256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

Scenario = Callable[[OidcProviders], Awaitable[None]]


def providers_of(
    *issuers: FakeIssuer, clock: FakeClock | None = None, max_signed_out: int = MAX_SIGNED_OUT, **values: Any
) -> OidcProviders:
    """The providers of one process that trusts these issuers."""

    async def fetch(url: str) -> object:
        for issuer in issuers:
            if url.startswith(f"{issuer.url}/"):
                return await issuer.fetch(url)
        # Any other place has the keys too.
        return {"keys": issuers[0].keys}

    given: dict[str, Any] = {
        "oidc_issuers": tuple(one.url for one in issuers),
        "oidc_audience": (AUDIENCE,),
        "oidc_jwks_max_stale_s": STALE_S,
        "jwt_leeway_s": LEEWAY_S,
        **values,
    }
    return OidcProviders(make_settings(**given), fetch, clock or FakeClock(), max_signed_out)


@asynccontextmanager
async def running(providers: OidcProviders) -> AsyncIterator[None]:
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        task = group.create_task(providers.run())
        yield
        task.cancel()


def play(providers: OidcProviders, scenario: Scenario) -> None:
    """Run a scenario beside the providers' own work."""

    async def main() -> None:
        async with running(providers):
            await scenario(providers)

    asyncio.run(main())


def identified(issuer: FakeIssuer, token: str, **values: Any) -> OidcIdentity:
    """Whose a token is."""
    found: list[OidcIdentity] = []

    async def scenario(providers: OidcProviders) -> None:
        found.append(await providers.identify(token))

    play(providers_of(issuer, **values), scenario)
    return found[0]


def refusal(issuer: FakeIssuer, token: str, **values: Any) -> str:
    """The words with which a token is refused."""
    with pytest.raises(ExceptionGroup) as caught:
        identified(issuer, token, **values)
    (error,) = caught.value.exceptions
    assert isinstance(error, AuthenticationError)
    assert error.headers == {"WWW-Authenticate": "Bearer"}
    return error.message


async def always(work: Callable[[str], Awaitable[object]], token: str) -> None:
    """Repeat until it fails."""
    while True:
        await work(token)
        await asyncio.sleep(0.01)


@pytest.fixture
def issuer() -> FakeIssuer:
    return FakeIssuer()


# ---- Signatures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
)
def test_a_token_of_each_kind_of_key_is_accepted(issuer: FakeIssuer, algorithm: str) -> None:
    issuer.key = SigningKey(algorithm)
    issuer.keys = [issuer.key.jwk()]
    assert identified(issuer, issuer.token()) == OidcIdentity(f"{issuer.url}#alice", "user", None)


def test_a_key_that_does_not_name_its_algorithm_is_used_by_its_kind(issuer: FakeIssuer) -> None:
    issuer.keys = [issuer.key.jwk(alg=None, use=None)]
    for algorithm in ("RS256", "PS512"):
        token = issuer.key.sign(issuer.claims(), {"alg": algorithm}, algorithm)
        assert identified(issuer, token).username.endswith("#alice")


def _unsigned(issuer: FakeIssuer) -> str:
    parts = ({"alg": "none", "typ": "JWT", "kid": issuer.key.kid}, issuer.claims())
    return ".".join(encoded(json.dumps(part).encode()) for part in parts) + "."


def _hmac(issuer: FakeIssuer, secret: bytes) -> str:
    parts = ({"alg": "HS256", "typ": "JWT", "kid": issuer.key.kid}, issuer.claims())
    signed = ".".join(encoded(json.dumps(part).encode()) for part in parts)
    return f"{signed}.{encoded(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


def _forged(issuer: FakeIssuer, **header: Any) -> str:
    thief = SigningKey("RS256", kid=issuer.key.kid)
    return thief.sign(issuer.claims(), {name: value(thief) for name, value in header.items()})


FORGED: dict[str, Callable[[FakeIssuer], str]] = {
    "without a signature": _unsigned,
    "an empty signature": lambda issuer: issuer.token().rpartition(".")[0] + ".",
    "HMAC with the public key as secret": lambda issuer: _hmac(issuer, issuer.key.pem),
    "HMAC with the modulus as secret": lambda issuer: _hmac(issuer, issuer.key.jwk()["n"].encode()),
    "HMAC with an empty secret": lambda issuer: _hmac(issuer, b""),
    "another key under the same id": _forged,
    "a key in the header": lambda issuer: _forged(issuer, jwk=lambda thief: thief.jwk()),
    "a certificate in the header": lambda issuer: _forged(
        issuer, x5c=lambda thief: [base64.b64encode(thief.pem).decode()]
    ),
    "a URL of keys in the header": lambda issuer: _forged(
        issuer, kid=lambda _: "new", jku=lambda _: "https://evil.example/keys"
    ),
    "a URL of a certificate in the header": lambda issuer: _forged(
        issuer, kid=lambda _: None, x5u=lambda _: "https://evil.example/c"
    ),
    "another algorithm of the same key": lambda issuer: issuer.key.sign(
        issuer.claims(), {"alg": "PS256"}, "PS256"
    ),
    "an algorithm that the signature is not of": lambda issuer: issuer.token(header={"alg": "RS512"}),
    "an algorithm of another kind of key": lambda issuer: issuer.token(header={"alg": "ES256"}),
    "an unknown algorithm": lambda issuer: issuer.token(header={"alg": "RS257"}),
    "a list of algorithms": lambda issuer: issuer.token(header={"alg": ["RS256"]}),
    "no algorithm": lambda issuer: issuer.token(header={"alg": None}),
    "a number as the key's id": lambda issuer: issuer.token(header={"kid": 1}),
    "a critical extension": lambda issuer: issuer.token(header={"crit": ["exp"], "exp": 1}),
    "an unencoded payload": lambda issuer: issuer.token(header={"crit": ["b64"], "b64": False}),
    "b64 as critical, and true": lambda issuer: issuer.token(header={"crit": ["b64"], "b64": True}),
    "a notice of a logout": lambda issuer: issuer.token(header={"typ": "logout+jwt"}),
    "a proof of possession": lambda issuer: issuer.token(header={"typ": "dpop+jwt"}),
    "a type that is no text": lambda issuer: issuer.token(header={"typ": 7}),
    "four parts": lambda issuer: issuer.token() + ".x",
    "a longer token": lambda issuer: issuer.token(more="x" * MAX_TOKEN_CHARS),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_token_is_refused(issuer: FakeIssuer, name: str) -> None:
    refusal(issuer, FORGED[name](issuer))
    # Nothing that the token names was asked.
    assert set(issuer.requests) <= {DISCOVERY, JWKS}


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "application/at+jwt", None])
def test_types_of_tokens_that_tell_who_somebody_is_are_accepted(issuer: FakeIssuer, kind: str | None) -> None:
    assert identified(issuer, issuer.token(header={"typ": kind})).username.endswith("#alice")


def test_a_secret_in_the_key_set_verifies_nothing(issuer: FakeIssuer) -> None:
    secret = b"a secret that was published by mistake"
    shared = {"kty": "oct", "k": encoded(secret), "kid": issuer.key.kid, "alg": "HS256", "use": "sig"}
    issuer.keys = [shared, SigningKey().jwk()]
    refusal(issuer, _hmac(issuer, secret))


@pytest.mark.parametrize(
    "changed",
    [
        {"use": "enc"},
        {"key_ops": ["encrypt"]},
        {"key_ops": "verify"},
        {"kid": 7},
        {"alg": "RSA-OAEP"},
        {"alg": 7},
        {"kty": "EC"},
        {"n": 7},
        {"n": "AQAB"},
        {"e": ""},
        {"e": "=="},
        {"crv": "P-256"},
    ],
)
def test_a_key_for_something_else_verifies_no_token(issuer: FakeIssuer, changed: dict[str, Any]) -> None:
    issuer.keys = [{**issuer.key.jwk(), **changed}, "no key", None, SigningKey().jwk()]
    refusal(issuer, issuer.token())


def test_a_short_rsa_key_verifies_no_token(issuer: FakeIssuer) -> None:
    issuer.key = SigningKey("RS256", private=rsa.generate_private_key(65_537, 1_024))  # noqa: S505 - refused
    issuer.keys = [issuer.key.jwk(), SigningKey().jwk()]
    refusal(issuer, issuer.token())


def test_a_private_key_that_was_published_is_taken_for_the_public_one(issuer: FakeIssuer) -> None:
    private = jwt.get_algorithm_by_name("RS256").to_jwk(issuer.key.private, as_dict=True)
    issuer.keys = [{**issuer.key.jwk(), "d": private["d"], "p": private["p"], "q": private["q"]}]
    assert identified(issuer, issuer.token()).username.endswith("#alice")


def test_only_the_single_key_may_stay_unnamed(issuer: FakeIssuer) -> None:
    token = issuer.token(header={"kid": None})
    assert identified(issuer, token).username.endswith("#alice")
    issuer.keys += [SigningKey("RS256").jwk()]
    assert "a key that its issuer does not have" in refusal(issuer, token)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_token_with_a_changed_character_proves_nothing_else(data: st.DataObject) -> None:
    issuer = FakeIssuer()
    token = issuer.token()
    place = data.draw(st.integers(0, len(token) - 1))
    changed = token[:place] + data.draw(st.characters(max_codepoint=255)) + token[place + 1 :]

    async def scenario(providers: OidcProviders) -> None:
        try:
            found = await providers.identify(changed)
        except AuthenticationError:
            return
        assert changed == token
        assert found.username == f"{issuer.url}#alice"

    play(providers_of(issuer), scenario)


# ---- Claims --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"aud": "another-service"}, "for another audience"),
        ({"aud": ["a", "b"]}, "for another audience"),
        ({"aud": None}, "lacks the claim aud"),
        ({"aud": ""}, "lacks the claim aud"),
        ({"aud": []}, "lacks the claim aud"),
        ({"aud": {AUDIENCE: 1}}, "for another audience"),
        ({"aud": [AUDIENCE, 7]}, "for another audience"),
        ({"exp": None}, "lacks the claim exp"),
        ({"exp": 1}, "has expired"),
        ({"exp": float("nan")}, "is not valid"),
        ({"exp": float("inf")}, "is not valid"),
        ({"exp": "soon"}, "is not valid"),
        ({"exp": []}, "is not valid"),
        ({"nbf": 4_000_000_000}, "is not valid yet"),
        ({"iat": 4_000_000_000}, "is not valid yet"),
        ({"nbf": "x"}, "is not valid"),
        ({"sub": None}, "no usable value in the claim sub"),
        ({"sub": ""}, "no usable value in the claim sub"),
        ({"sub": 7}, "is not valid"),
        ({"sub": "a\0"}, "no usable value in the claim sub"),
        ({"sub": "a\nb"}, "no usable value in the claim sub"),
        ({"sub": "a\u2028b"}, "no usable value in the claim sub"),
        ({"sub": "\ud800"}, "no usable value in the claim sub"),
        ({"sub": "a" * 250}, "no usable value in the claim sub"),
        ({"team": "\x1b[31m"}, "no usable value in the claim team"),
        ({"team": "t" * 257}, "no usable value in the claim team"),
        ({"team": ["a", "b"]}, "no usable value in the claim team"),
        ({"team": [7]}, "no usable value in the claim team"),
        ({"team": {"a": 1}}, "no usable value in the claim team"),
    ],
)
def test_a_token_whose_claims_do_not_fit_is_refused(
    issuer: FakeIssuer, changed: dict[str, Any], said: str
) -> None:
    assert said in refusal(issuer, issuer.token(**changed), oidc_team_claim="team")


def test_the_clocks_may_differ_by_the_leeway(issuer: FakeIssuer) -> None:
    now = int(time.time())
    within: list[dict[str, Any]] = [
        {"exp": now - LEEWAY_S + 10},
        {"nbf": now + LEEWAY_S - 5},
        {"iat": now + LEEWAY_S - 5},
    ]
    for claims in within:
        assert identified(issuer, issuer.token(**claims)).username.endswith("#alice")
    beyond: list[dict[str, Any]] = [
        {"exp": now - LEEWAY_S - 1},
        {"nbf": now + LEEWAY_S + 60},
        {"iat": now + LEEWAY_S + 60},
    ]
    for claims in beyond:
        refusal(issuer, issuer.token(**claims))


def test_any_of_the_configured_audiences_will_do(issuer: FakeIssuer) -> None:
    for audience in ("second", ["x", "second"], AUDIENCE):
        token = issuer.token(aud=audience)
        assert identified(issuer, token, oidc_audience=(AUDIENCE, "second")).username.endswith("#alice")


@pytest.mark.parametrize(
    ("claims", "team", "role"),
    [
        ({}, None, "user"),
        ({"team": "red", "roles": ["staff", "llm-admin"]}, "red", "admin"),
        ({"team": ["red"], "roles": "llm-admin"}, "red", "admin"),
        ({"team": [], "roles": "llm-admins"}, None, "user"),
        ({"team": "", "roles": ["LLM-ADMIN", " llm-admin", 1, None, ["llm-admin"]]}, None, "user"),
        ({"team": None, "roles": {"llm-admin": True}}, None, "user"),
        ({"": "llm-admin", "roles": True}, None, "user"),
    ],
)
def test_team_and_role_are_what_the_claims_say(
    issuer: FakeIssuer, claims: dict[str, Any], team: str | None, role: str
) -> None:
    values = {
        "oidc_team_claim": "team",
        "oidc_admin_claim": "roles",
        "oidc_admin_values": ("owner", "llm-admin"),
    }
    assert identified(issuer, issuer.token(**claims), **values) == OidcIdentity(
        f"{issuer.url}#alice",
        role,  # type: ignore[arg-type]
        team,
    )


def test_without_a_claim_for_administrators_nobody_is_one(issuer: FakeIssuer) -> None:
    token = issuer.key.sign({**issuer.claims(), "": "x", "role": "admin", "team": "red"})
    assert identified(issuer, token) == OidcIdentity(f"{issuer.url}#alice", "user", None)


def test_an_inner_claim_is_named_by_its_path(issuer: FakeIssuer) -> None:
    claims: dict[str, Any] = {"https://x.example/mail": "a@x.example", "realm_access": {"roles": ["admin"]}}
    token = issuer.token(**claims)
    values = {"oidc_user_claim": "https://x.example/mail", "oidc_admin_values": ("admin",)}
    found = identified(issuer, token, oidc_admin_claim="realm_access.roles", **values)
    assert found == OidcIdentity(f"{issuer.url}#a@x.example", "admin", None)


# ---- Issuers -------------------------------------------------------------------------------------------


def test_the_same_subject_of_two_issuers_is_two_users() -> None:
    first, second = FakeIssuer("https://a.example"), FakeIssuer("https://b.example", 1)

    async def scenario(providers: OidcProviders) -> None:
        users = {(await providers.identify(one.token(sub="admin"))).username for one in (first, second)}
        assert users == {"https://a.example#admin", "https://b.example#admin"}

    play(providers_of(first, second), scenario)


def test_an_issuers_key_signs_for_no_other_issuer() -> None:
    first, second = FakeIssuer("https://a.example"), FakeIssuer("https://b.example", 1)

    async def scenario(providers: OidcProviders) -> None:
        for header in (None, {"kid": second.key.kid}, {"kid": None}):
            with pytest.raises(AuthenticationError):
                await providers.identify(first.key.sign(second.claims(), header))
        # Not even when both keys have one id.
        twin = SigningKey("RS256", kid=second.key.kid, private=first.key.private)
        with pytest.raises(AuthenticationError):
            await providers.identify(twin.sign(second.claims()))

    play(providers_of(first, second), scenario)


@pytest.mark.parametrize(
    "named", ["https://login.example.org/", "https://LOGIN.example.org", "https://evil.example", "", None, 7]
)
def test_a_token_of_another_issuer_is_not_read(issuer: FakeIssuer, named: Any) -> None:
    providers = providers_of(issuer)
    token = issuer.token(iss=named)
    assert not providers.reads(token)
    assert providers.reads(issuer.token())
    refusal(issuer, token)


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a.b.c", "a.!.c", "a.W10.c", "é.é.é", "\ud800.e30.x", "x" * 9_999]
)
def test_what_is_no_token_is_not_read(issuer: FakeIssuer, text: str) -> None:
    assert not providers_of(issuer).reads(text)
    assert refusal(issuer, text)


def test_deep_json_is_not_read(issuer: FakeIssuer) -> None:
    deep = encoded(b"[" * 1_400)
    assert not providers_of(issuer).reads(f"e30.{deep}.x")
    token = issuer.token().split(".")
    refusal(issuer, f"{deep}.{token[1]}.{token[2]}")


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"named": "https://evil.example"}, "other_issuer"),
        ({"named": "https://login.example.org/"}, "other_issuer"),
        ({"named": ["https://login.example.org"]}, "other_issuer"),
        ({"jwks_uri": "http://login.example.org/keys"}, "no_jwks_uri"),
        ({"jwks_uri": "http://127.0.0.1/keys"}, "no_jwks_uri"),
        ({"jwks_uri": "file:///etc/passwd"}, "no_jwks_uri"),
        ({"jwks_uri": "https:///keys"}, "no_jwks_uri"),
        ({"jwks_uri": "https://user:word@login.example.org/keys"}, "no_jwks_uri"),
        ({"jwks_uri": "https://login.example.org/ keys"}, "no_jwks_uri"),
        ({"jwks_uri": "https://[/keys"}, "no_jwks_uri"),
        ({"jwks_uri": 7}, "no_jwks_uri"),
        ({"keys": []}, "no_keys"),
        ({"keys": "none"}, "no_keys"),
        ({"keys": [{"kty": "oct", "k": "AAAA", "kid": "key-0"}]}, "no_keys"),
        ({"keys": [SigningKey().jwk() for _ in range(MAX_KEYS + 1)]}, "too_many_keys"),
    ],
)
def test_a_configuration_that_is_wrong_opens_nothing(
    issuer: FakeIssuer, lie: dict[str, Any], reason: str
) -> None:
    for name, value in lie.items():
        setattr(issuer, name, value)
    token = issuer.token()

    async def scenario(providers: OidcProviders) -> None:
        with pytest.raises(DependencyUnavailableError):
            await providers.identify(token)
        with pytest.raises(DependencyUnavailableError) as caught:
            await providers.pings["oidc"]()
        assert caught.value.label == f"{reason}; no usable keys"

    play(providers_of(issuer), scenario)


def test_the_keys_may_be_elsewhere_over_https(issuer: FakeIssuer) -> None:
    issuer.jwks_uri = "https://keys.example.net/main?version=2"
    assert identified(issuer, issuer.token()).username.endswith("#alice")


# ---- Keys that come and go -----------------------------------------------------------------------------


def test_many_tokens_with_unknown_keys_are_one_question_a_minute(issuer: FakeIssuer) -> None:
    clock = FakeClock()

    async def storm(providers: OidcProviders) -> None:
        tokens = [SigningKey().sign(issuer.claims()) for _ in range(50)]
        found = await asyncio.gather(*map(providers.identify, tokens), return_exceptions=True)
        assert all(isinstance(one, AuthenticationError) for one in found)

    async def scenario(providers: OidcProviders) -> None:
        await providers.identify(issuer.token())
        assert issuer.requests[JWKS] == 1
        for questions in (2, 3):
            await storm(providers)
            assert issuer.requests[JWKS] == questions
            clock.advance(ASK_AGAIN_S - 1)
            await storm(providers)
            assert issuer.requests[JWKS] == questions
            clock.advance(1)
        assert (await providers.identify(issuer.token(sub="bob"))).username.endswith("#bob")

    play(providers_of(issuer, clock=clock), scenario)


def test_a_caller_who_leaves_does_not_end_the_question_for_others(issuer: FakeIssuer) -> None:
    async def scenario(providers: OidcProviders) -> None:
        await providers.identify(issuer.token())
        issuer.rotate(keep=True)
        first, second = (asyncio.ensure_future(providers.identify(issuer.token(sub=name))) for name in "ab")
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).username.endswith("#b")
        assert issuer.requests[JWKS] == 2

    play(providers_of(issuer), scenario)


def test_a_new_key_is_found_at_once_and_a_withdrawn_one_ends_its_tokens(issuer: FakeIssuer) -> None:
    old = issuer.token()

    async def scenario(providers: OidcProviders) -> None:
        assert (await providers.identify(old)).username.endswith("#alice")
        issuer.rotate(keep=True)
        assert (await providers.identify(issuer.token(sub="bob"))).username.endswith("#bob")
        assert (await providers.identify(old)).username.endswith("#alice")
        clock.advance(ASK_AGAIN_S)
        issuer.rotate()
        assert (await providers.identify(issuer.token(sub="carol"))).username.endswith("#carol")
        # It was known and would be valid for ten minutes more.
        with pytest.raises(AuthenticationError):
            await providers.identify(old)

    clock = FakeClock()
    play(providers_of(issuer, clock=clock), scenario)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
def test_a_new_key_without_a_name_is_found_at_once(issuer: FakeIssuer, algorithm: str) -> None:
    clock = FakeClock()
    unnamed = {"kid": None}
    old = issuer.token(header=unnamed)

    async def scenario(providers: OidcProviders) -> None:
        assert (await providers.identify(old)).username.endswith("#alice")
        issuer.key = SigningKey(algorithm)
        issuer.keys = [issuer.key.jwk(kid=None)]
        assert (await providers.identify(issuer.token(header=unnamed, sub="bob"))).username.endswith("#bob")
        with pytest.raises(AuthenticationError):
            await providers.identify(old)
        clock.advance(ASK_AGAIN_S - 1)
        for _ in range(3):
            with pytest.raises(AuthenticationError):
                await providers.identify(SigningKey(algorithm).sign(issuer.claims(), unnamed))
        assert issuer.requests[JWKS] == 2

    play(providers_of(issuer, clock=clock), scenario)


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str | None]]:
    """The events about issuers, with their reasons."""
    found = [record for record in caplog.records if hasattr(record, "otel.event.name")]
    return [(getattr(one, "otel.event.name"), getattr(one, "reason", None)) for one in found]


def test_known_keys_work_while_the_issuer_is_down_but_not_for_ever(
    issuer: FakeIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    known, other = issuer.token(), issuer.token(sub="bob")

    async def scenario(providers: OidcProviders) -> None:
        ping = providers.pings["oidc"]
        await providers.identify(known)
        await ping()
        issuer.down = DOWN
        clock.advance(CONFIRM_S)
        for _ in range(3):
            with pytest.raises(DependencyUnavailableError) as caught:
                await ping()
            assert caught.value.label == "refused; using the keys that are known"
        assert (await providers.identify(known)).username.endswith("#alice")
        assert (await providers.identify(other)).username.endswith("#bob")
        # Whether the issuer has such a key cannot be said now.
        with pytest.raises(DependencyUnavailableError):
            await providers.identify(SigningKey().sign(issuer.claims()))
        clock.advance(STALE_S - CONFIRM_S)
        assert (await providers.identify(known)).username.endswith("#alice")
        clock.advance(1)
        for token in (known, other):
            with pytest.raises(DependencyUnavailableError):
                await providers.identify(token)
        with pytest.raises(DependencyUnavailableError) as caught:
            await ping()
        assert caught.value.label == "refused; no usable keys"
        issuer.down = None
        # It is asked because of the unknown key, a minute after the last time.
        clock.advance(ASK_AGAIN_S)
        with pytest.raises(DependencyUnavailableError):
            await providers.identify(SigningKey().sign(issuer.claims()))

    play(providers_of(issuer, clock=clock), scenario)
    assert events(caplog) == [(FAILED, "refused")]


def test_an_issuer_that_comes_back_is_told_once(issuer: FakeIssuer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    issuer.down = DOWN

    async def scenario(providers: OidcProviders) -> None:
        with pytest.raises(DependencyUnavailableError):
            await providers.identify(issuer.token())
        with pytest.raises(DependencyUnavailableError):
            await providers.pings["oidc"]()
        issuer.down = None
        # Keys that may be used for a second are asked for again after half of it.
        while True:
            try:
                await providers.pings["oidc"]()
            except DependencyUnavailableError:
                await asyncio.sleep(0.01)
            else:
                break
        assert (await providers.identify(issuer.token())).username.endswith("#alice")

    play(providers_of(issuer, oidc_jwks_max_stale_s=1), scenario)
    assert events(caplog) == [(FAILED, "refused"), (RECOVERED, None)]


def test_the_first_callers_wait_for_the_first_answer(issuer: FakeIssuer) -> None:
    async def scenario(providers: OidcProviders) -> None:
        found = await asyncio.gather(*(providers.identify(issuer.token(sub=name)) for name in "abc"))
        assert [one.username[-2:] for one in found] == ["#a", "#b", "#c"]
        assert issuer.requests == {DISCOVERY: 1, JWKS: 1}

    play(providers_of(issuer), scenario)


def test_callers_beyond_a_limit_do_not_wait(issuer: FakeIssuer) -> None:
    answered = asyncio.Event()

    async def fetch(url: str) -> object:
        await answered.wait()
        return await issuer.fetch(url)

    async def main() -> None:
        values = {"oidc_issuers": (issuer.url,), "oidc_audience": (AUDIENCE,)}
        providers = OidcProviders(make_settings(**values), fetch)
        token = issuer.token()
        async with running(providers):
            callers = [asyncio.create_task(providers.identify(token)) for _ in range(MAX_WAITING + 1)]
            done, _ = await asyncio.wait(callers, return_when=asyncio.FIRST_COMPLETED)
            assert [type(one.exception()) for one in done] == [OverloadedError]
            answered.set()
            names = {(await one).username for one in callers if one not in done}
            assert names == {f"{issuer.url}#alice"}

    asyncio.run(main())


def test_a_bug_in_a_fetch_ends_neither_the_fetching_nor_the_process(
    issuer: FakeIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.down = LookupError("a bug")

    async def scenario(providers: OidcProviders) -> None:
        with pytest.raises(DependencyUnavailableError):
            await providers.identify(issuer.token())
        issuer.down = None
        while True:
            try:
                await providers.identify(issuer.token())
            except DependencyUnavailableError:
                await asyncio.sleep(0.01)
            else:
                break

    play(providers_of(issuer, oidc_jwks_max_stale_s=1), scenario)
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]


def test_an_issuer_that_is_down_is_no_matter_of_another() -> None:
    up, down = FakeIssuer("https://up.example"), FakeIssuer("https://down.example", 1)
    down.down = DOWN

    async def scenario(providers: OidcProviders) -> None:
        assert (await providers.identify(up.token())).username.endswith("#alice")
        with pytest.raises(DependencyUnavailableError):
            await providers.identify(down.token())
        await providers.pings["oidc_up_example"]()
        with pytest.raises(DependencyUnavailableError):
            await providers.pings["oidc_down_example"]()

    play(providers_of(up, down), scenario)


def test_a_token_that_was_known_expires(issuer: FakeIssuer) -> None:
    async def scenario(providers: OidcProviders) -> None:
        token = issuer.token(exp=int(time.time()) - LEEWAY_S + 2)
        await providers.identify(token)
        with pytest.raises(AuthenticationError, match="expired"):
            await always(providers.identify, token)

    play(providers_of(issuer), scenario)


def test_each_dependency_has_a_name_of_its_own() -> None:
    urls = ["https://a.example/x", "https://a.example/y", "http://[::1]:9/", f"https://{'b' * 60}.example"]
    assert list(providers_of(*map(FakeIssuer, urls)).pings) == [
        "oidc_a_example",
        "oidc_a_example_2",
        "oidc_1",
        f"oidc_{'b' * 40}",
    ]
    assert list(providers_of(FakeIssuer()).pings) == ["oidc"]


# ---- Signing out ---------------------------------------------------------------------------------------


def _with_other_signature(token: str) -> str:
    """A second valid signature, which anybody can make of an ECDSA signature: (r, n - s)."""
    signed, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    r, s = int.from_bytes(raw[:32]), int.from_bytes(raw[32:])
    return f"{signed}.{encoded(r.to_bytes(32) + (ORDER_P256 - s).to_bytes(32))}"


def test_a_token_that_was_signed_out_stays_out_in_any_spelling(issuer: FakeIssuer) -> None:
    issuer.rotate()
    token, other = issuer.token(), issuer.token(sub="bob")
    spellings = [token, _with_other_signature(token), f"{token}=="]

    async def scenario(providers: OidcProviders) -> None:
        assert {(await providers.identify(one)).username for one in spellings} == {f"{issuer.url}#alice"}
        await providers.sign_out(token)
        for one in spellings:
            assert providers.reads(one)
            with pytest.raises(AuthenticationError, match="signed out"):
                await providers.identify(one)
        with pytest.raises(AuthenticationError):
            await providers.sign_out(token)
        assert (await providers.identify(other)).username.endswith("#bob")

    play(providers_of(issuer), scenario)


def test_a_forged_token_cannot_be_signed_out(issuer: FakeIssuer) -> None:
    async def scenario(providers: OidcProviders) -> None:
        with pytest.raises(AuthenticationError):
            await providers.sign_out(issuer.token()[:-8] + "AAAAAAAA")

    play(providers_of(issuer), scenario)


def test_a_sign_out_that_cannot_be_remembered_is_refused(issuer: FakeIssuer) -> None:
    async def scenario(providers: OidcProviders) -> None:
        soon = issuer.token(exp=int(time.time()) - LEEWAY_S + 2)
        await providers.sign_out(soon)
        last = issuer.token()
        while True:
            try:
                await providers.sign_out(last)
            except OverloadedError:
                assert (await providers.identify(last)).username.endswith("#alice")
                await asyncio.sleep(0.01)
            else:
                break
        with pytest.raises(AuthenticationError, match="signed out"):
            await providers.identify(last)

    play(providers_of(issuer, max_signed_out=1), scenario)


# ---- Documents -----------------------------------------------------------------------------------------


def fails(url: str, **limits: Any) -> str:
    """Why a document cannot be had."""

    async def main() -> None:
        async with asyncio.timeout(20), open_documents(**limits) as documents:
            await documents.get(url)

    with pytest.raises(DocumentError) as caught:
        asyncio.run(main())
    return caught.value.reason


@pytest.mark.parametrize(
    ("modes", "reason"),
    [
        ({"status": 500}, "status 500"),
        ({"status": 302, "headers": {"Location": "/keys"}}, "status 302"),
        ({"status": 201}, "status 201"),
        ({"body": b"<html>"}, "not_json"),
        ({"body": b"\xff"}, "not_json"),
        ({"body": b"[" * 100_000}, "not_json"),
        ({"body": b'"' + b"x" * 300_000 + b'"'}, "too_large"),
        ({"status": 503, "body": b"x" * 1_000_000}, "status 503"),
        ({"headers": {"Content-Encoding": "gzip"}, "body": b"\x1f\x8b"}, "not_json"),
        ({"hang": True}, "timeout"),
    ],
)
def test_a_document_that_is_wrong_says_how(modes: dict[str, Any], reason: str) -> None:
    with FakeIssuer() as issuer:
        for name, value in modes.items():
            setattr(issuer, name, value)
        limits = {"timeout_s": 0.3} if "hang" in modes else {}
        assert fails(f"{issuer.url}{DISCOVERY}", **limits) == reason
        assert issuer.requests == {DISCOVERY: 1}


def test_a_server_that_is_not_there_says_so() -> None:
    with FakeIssuer() as issuer:
        url = issuer.url
    assert fails(f"{url}{DISCOVERY}") == "refused"


def test_a_document_is_decoded() -> None:
    async def main(url: str) -> object:
        async with open_documents() as documents:
            return await documents.get(url)

    with FakeIssuer() as issuer:
        found = asyncio.run(main(f"{issuer.url}{JWKS}"))
    assert found == {"keys": issuer.keys}


# ---- Without an issuer ---------------------------------------------------------------------------------


def test_without_an_issuer_no_token_is_read(issuer: FakeIssuer) -> None:
    async def main() -> None:
        async with open_oidc(make_settings()) as none:
            assert isinstance(none, NoOidc)
            assert not none.reads(issuer.token())
            assert not none.pings
            await none.run()
            for refuse in (none.identify, none.sign_out):
                with pytest.raises(AuthenticationError):
                    await refuse(issuer.token())

    asyncio.run(main())
