"""Tokens: only ours, only now, and only for what the user may do today."""

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest

from service.errors import AuthenticationError
from service.identity.tokens import Authenticator, Clock
from service.telemetry.providers import build_telemetry
from tests.harness import make_settings, new_secrets

LEEWAY_S = 20
REQUIRED = ["exp", "iat", "iss", "aud", "sub", "jti"]


class Issuer:
    """An authenticator, and somebody who knows its key."""

    def __init__(self, hashed: Callable[[str], str]) -> None:
        made = new_secrets()
        self.key = made["jwt_secret_key"]
        self.password = made["auth_user_password"]
        made |= {name: hashed(made[name]) for name in ("auth_admin_password", "auth_user_password")}
        self.settings = make_settings(**made, jwt_leeway_s=LEEWAY_S)
        self.instruments = build_telemetry(self.settings).instruments
        self.auth = Authenticator(self.settings, self.instruments)

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Valid claims, but for these; None leaves one out."""
        now = int(time.time())
        claims = {
            "sub": "user",
            "role": "user",
            "iat": now,
            "exp": now + 600,
            "iss": self.settings.jwt_issuer,
            "aud": self.settings.jwt_audience,
            "jti": secrets.token_hex(8),
            **changed,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, *, header: dict[str, Any] | None = None, key: str | None = None, **changed: Any) -> str:
        """A token by hand, so that it can be one that no library would make."""
        parts = (header or {"alg": "HS256", "typ": "JWT"}, self.claims(**changed))
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in parts)
        digest = hmac.new((self.key if key is None else key).encode(), signed.encode(), hashlib.sha256)
        return f"{signed}.{_encoded(digest.digest())}"

    def refuses(self, token: str) -> str:
        """The words with which it is refused."""
        with pytest.raises(AuthenticationError) as caught:
            self.auth.identify(token)
        assert caught.value.status == 401
        assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
        return caught.value.message


def _encoded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


@pytest.fixture
def issuer(cheap_hash: Callable[[str], str]) -> Issuer:
    return Issuer(cheap_hash)


def test_the_hand_made_token_is_valid_when_nothing_is_changed(issuer: Issuer) -> None:
    assert issuer.auth.identify(issuer.token()).username == "user"


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "NONE", "", "RS256", "ES256", "HS384", "HS512", "PS256"]
)
def test_another_algorithm_is_refused(issuer: Issuer, algorithm: str) -> None:
    header = {"alg": algorithm, "typ": "JWT"}
    issuer.refuses(issuer.token(header=header))
    unsigned = issuer.token(header=header).rpartition(".")[0]
    issuer.refuses(f"{unsigned}.")
    issuer.refuses(unsigned)


def test_the_librarys_own_unsigned_token_is_refused(issuer: Issuer) -> None:
    issuer.refuses(jwt.encode(issuer.claims(), "", algorithm="none"))


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_a_stronger_algorithm_with_the_right_key_is_refused(issuer: Issuer, algorithm: str) -> None:
    issuer.refuses(jwt.encode(issuer.claims(), issuer.key, algorithm=algorithm))


@pytest.mark.parametrize(
    "header",
    [
        {"typ": "JWT"},
        {"alg": None},
        {"alg": 1},
        {"alg": ["HS256"]},
        {"alg": "HS256", "crit": ["unknown"]},
        {"alg": "HS256", "b64": False, "crit": ["b64"]},
        {"alg": "HS256", "kid": 5},
    ],
)
def test_an_odd_header_is_refused(issuer: Issuer, header: dict[str, Any]) -> None:
    issuer.refuses(issuer.token(header=header))


def test_another_key_or_a_changed_part_is_refused(issuer: Issuer) -> None:
    issuer.refuses(issuer.token(key=secrets.token_hex(32)))
    issuer.refuses(issuer.token(key=""))
    head, claims, signature = issuer.token().split(".")
    other = issuer.token(sub="admin").split(".")[1]
    issuer.refuses(f"{head}.{other}.{signature}")
    issuer.refuses(f"{head}.{claims}.{signature[:-2]}")
    issuer.refuses(f"{head}.{claims}.")
    issuer.refuses(f"{head}.{claims}")


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "not a token",
        "\x00",
        "é.ü.ß",
        "e30.e30.e30",
        "x" * 10_000,
        "W10.W10.W10",
    ],
)
def test_what_is_no_token_is_refused(issuer: Issuer, token: str) -> None:
    assert issuer.refuses(token) == "The token is not valid. Sign in at POST /auth/login."


def test_a_deeply_nested_header_is_refused(issuer: Issuer) -> None:
    issuer.refuses(f"{_encoded(b'[' * 3_000)}.e30.x")


def test_a_token_of_ten_kilobytes_is_refused_unread(issuer: Issuer) -> None:
    token = issuer.token(filler="x" * 7_500)
    assert len(token) > 10_000
    issuer.refuses(token)
    assert issuer.auth.identify(issuer.token(filler="x" * 2_000)).username == "user"


@pytest.mark.parametrize("claim", REQUIRED)
def test_a_missing_claim_is_refused(issuer: Issuer, claim: str) -> None:
    issuer.refuses(issuer.token(**{claim: None}))


@pytest.mark.parametrize(
    "changed",
    [
        {"aud": "another"},
        {"aud": ["another"]},
        {"aud": ""},
        {"aud": 5},
        {"iss": "another"},
        {"iss": ""},
        {"iss": 5},
        {"sub": 5},
        {"sub": ["user"]},
        {"sub": {"user": 1}},
        {"jti": 5},
        {"exp": "later"},
        {"exp": []},
        {"iat": "now"},
        {"nbf": "now"},
    ],
    ids=str,
)
def test_a_wrong_claim_is_refused(issuer: Issuer, changed: dict[str, Any]) -> None:
    assert issuer.refuses(issuer.token(**changed)) == "The token is not valid. Sign in at POST /auth/login."


@pytest.mark.parametrize("name", ["nobody", "", "Admin", "user ", "__class__"])
def test_a_user_who_does_not_exist_is_refused(issuer: Issuer, name: str) -> None:
    assert issuer.refuses(issuer.token(sub=name)).startswith("The token's user does not exist.")


def test_an_expired_token_says_so(issuer: Issuer) -> None:
    now = int(time.time())
    message = issuer.refuses(issuer.token(iat=now - 1_000, exp=now - LEEWAY_S - 5))
    assert message == "The token has expired. Sign in again at POST /auth/login."


def test_a_token_of_the_future_is_refused(issuer: Issuer) -> None:
    now = int(time.time())
    issuer.refuses(issuer.token(iat=now + LEEWAY_S + 30))
    issuer.refuses(issuer.token(nbf=now + LEEWAY_S + 30))


def test_clocks_may_differ_by_the_leeway(issuer: Issuer) -> None:
    now = int(time.time())
    allowed: tuple[dict[str, Any], ...] = (
        {"iat": now - 100, "exp": now - LEEWAY_S // 2},
        {"iat": now + LEEWAY_S // 2},
        {"nbf": now + LEEWAY_S // 2},
    )
    for changed in allowed:
        assert issuer.auth.identify(issuer.token(**changed)).username == "user"


def test_the_role_is_the_users_own_whatever_the_token_says(issuer: Issuer) -> None:
    assert issuer.auth.identify(issuer.token(role="admin")).role == "user"
    assert issuer.auth.identify(issuer.token(sub="admin", role="user")).role == "admin"
    assert issuer.auth.identify(issuer.token(sub="admin", role=None)).role == "admin"


@pytest.mark.parametrize(("ago_s", "valid"), [(0, True), (500, True), (700, False)])
def test_a_token_is_good_for_its_time_and_no_longer(issuer: Issuer, ago_s: float, valid: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    settings = issuer.settings.model_copy(update={"jwt_ttl_s": 600})
    then = Authenticator(settings, issuer.instruments, Clock(lambda: time.time() - ago_s))
    token = asyncio.run(then.login("user", issuer.password, "192.0.2.1")).token
    if valid:
        assert then.identify(token).username == "user"
    else:
        issuer.refuses(token)


def test_a_token_that_was_good_is_refused_when_its_time_is_over(issuer: Issuer) -> None:
    over_s = int(time.time()) + 2
    token = issuer.token(exp=over_s - LEEWAY_S)
    while time.time() < over_s - 0.05:
        assert issuer.auth.identify(token).username == "user"
    while time.time() < over_s:
        time.sleep(0.01)
    assert "expired" in issuer.refuses(token)


def test_a_remembered_token_helps_no_other_one(issuer: Issuer) -> None:
    token = issuer.token()
    assert issuer.auth.identify(token).username == "user"
    head, claims, signature = token.split(".")
    issuer.refuses(f"{head}.{claims}.{_encoded(secrets.token_bytes(32))}")
    issuer.refuses(f"{head}.{issuer.token(sub='admin').split('.')[1]}.{signature}")
    assert issuer.auth.identify(token).username == "user"
