"""Signing in: who may, how often one may be wrong, and what a stranger can learn or use up."""

import asyncio
import logging
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import jwt
import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint
from pydantic import SecretStr

from service.errors import AuthenticationError, OverloadedError, RateLimitError
from service.identity.tokens import (
    COUNTER_SLOTS,
    HASHING_THREADS,
    MAX_WAITING,
    MAX_WAITING_EACH,
    Authenticator,
    Clock,
    _SignInLimits,
)
from service.shared.counts import LocalCounts
from service.telemetry.providers import Exporters, build_telemetry
from tests.harness import make_settings, new_secrets
from tests.unit.conftest import Lines

ADDRESS = "192.0.2.1"
WRONG = secrets.token_hex(8)

pytestmark = pytest.mark.alone


class Desk:
    """An authenticator, its users' passwords and its counters."""

    def __init__(self, hashed: Callable[[str], str] | None, **values: Any) -> None:
        made = new_secrets()
        self.passwords = {"admin": made["auth_admin_password"], "user": made["auth_user_password"]}
        if hashed is not None:
            made |= {f"auth_{name}_password": hashed(word) for name, word in self.passwords.items()}
        self.settings = make_settings(**{**made, **values})
        self._reader = InMemoryMetricReader()
        telemetry = build_telemetry(self.settings, Exporters(metrics=self._reader))
        self.delays: list[float] = []
        self.auth = Authenticator(self.settings, telemetry.instruments, Clock(sleep=self._sleep))

    async def _sleep(self, seconds: float) -> None:
        self.delays.append(seconds)

    async def fails(self, username: str = "user", address: str = ADDRESS) -> str | float:
        """Sign in with a wrong password: the name of the error, or the seconds to wait."""
        with pytest.raises((AuthenticationError, RateLimitError, OverloadedError)) as caught:
            await self.auth.login(username, WRONG, address)
        return caught.value.retry_after_s or caught.value.name

    def attempts(self) -> dict[object, float]:
        """The counter's values by outcome."""
        data = self._reader.get_metrics_data()
        assert data is not None
        return {
            (point.attributes or {})["outcome"]: point.value
            for scope in data.resource_metrics[0].scope_metrics
            for metric in scope.metrics
            if metric.name == "llmops.auth.attempts"
            for point in metric.data.data_points
            if isinstance(point, NumberDataPoint) and (point.attributes or {})["method"] == "password"
            if (point.attributes or {})["outcome"] not in {"invalid", "unavailable"}
        }


Open = Callable[..., Desk]


@pytest.fixture
def desk(cheap_hash: Callable[[str], str]) -> Open:
    """Open a desk with passwords that are quick to check."""

    def opened(**values: Any) -> Desk:
        return Desk(cheap_hash, **values)

    return opened


@pytest.mark.parametrize("name", ["admin", "user"])
def test_the_right_password_gives_a_token_that_says_who_one_is(desk: Open, name: str) -> None:
    here = desk(jwt_ttl_s=120)
    session = asyncio.run(here.auth.login(name, here.passwords[name], ADDRESS))
    assert session.expires_in_s == 120
    assert (session.user.username, session.user.role) == (name, name)
    assert here.auth.identify(session.token) == session.user


def test_a_password_in_plain_works_like_its_hash() -> None:
    here = Desk(hashed=None)
    session = asyncio.run(here.auth.login("admin", here.passwords["admin"], ADDRESS))
    assert session.user.role == "admin"


def test_a_token_holds_the_standard_claims_and_no_password(desk: Open) -> None:
    here = desk(jwt_ttl_s=120, jwt_issuer="us", jwt_audience="them")
    tokens = [asyncio.run(here.auth.login("user", here.passwords["user"], ADDRESS)).token for _ in range(2)]
    claims = [jwt.decode(token, options={"verify_signature": False}) for token in tokens]
    assert set(claims[0]) == {"sub", "role", "iat", "exp", "iss", "aud", "jti", "pwd"}
    assert (claims[0]["sub"], claims[0]["iss"], claims[0]["aud"]) == ("user", "us", "them")
    assert claims[0]["exp"] - claims[0]["iat"] == 120
    assert claims[0]["jti"] != claims[1]["jti"]


@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("user", "wrong"),
        ("user", ""),
        ("nobody", "user's"),
        ("", "user's"),
        ("User", "user's"),
        ("user ", "user's"),
        ("admin", "user's"),
        ("user", "admin's"),
        ("user", "user's and more"),
        ("ünïcode", "\x00"),
        ("x" * 100_000, "y" * 100_000),
    ],
)
def test_anything_else_is_refused_with_the_same_words(
    desk: Open, lines: Lines, name: str, password: str
) -> None:
    here = desk()
    given = {
        "user's": here.passwords["user"],
        "admin's": here.passwords["admin"],
        "user's and more": here.passwords["user"] + "x",
    }.get(password, password)
    with pytest.raises(AuthenticationError) as caught:
        asyncio.run(here.auth.login(name, given, ADDRESS))
    assert caught.value.message == "The user name or the password is wrong."
    assert here.attempts() == {"success": 0, "wrong_credentials": 1, "rate_limited": 0}
    ours = [line for line in lines.all if line["logger"] == "service.identity.tokens"]
    assert [line["message"] for line in ours] == ["login_failed"]
    assert "user" not in ours[0]


def test_a_hash_is_no_password(desk: Open) -> None:
    here = desk()
    with pytest.raises(AuthenticationError):
        asyncio.run(here.auth.login("user", here.settings.auth_user_password.get_secret_value(), ADDRESS))


def test_every_name_costs_the_same_work() -> None:
    """With the real hash; a name looked up first would cost nothing, and a user's own hash alone half."""
    here = Desk(hashed=None, login_failures_per_name="1000/minute", login_failures_per_address="1000/minute")

    async def cost(name: str) -> float:
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            await here.fails(name)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    async def main() -> tuple[float, float]:
        return await cost("user"), await cost("nobody-of-this-name")

    known, unknown = asyncio.run(main())
    assert known / 3 < unknown < known * 3
    assert unknown > 0.005


def _limited(
    main: Callable[[Desk], Awaitable[list[str | float]]], here: Desk
) -> tuple[list[str | float], list[float]]:
    """What the attempts came to, and the waits among it."""

    async def attempts() -> list[str | float]:
        return await main(here)

    outcomes = asyncio.run(attempts())
    return outcomes, [outcome for outcome in outcomes if isinstance(outcome, float)]


def test_a_stranger_slows_the_owner_of_a_name_down_and_does_not_lock_them_out(desk: Open) -> None:
    here = desk(login_failures_per_name="3/minute")

    async def main(here: Desk) -> list[str | float]:
        tried = [await here.fails(address=f"192.0.2.{number}") for number in range(5)]
        await here.auth.login("user", here.passwords["user"], "198.51.100.1")
        assert here.delays == [1.0] * 3, "the attempts after the third failure, the owner's too"
        await here.auth.login("user", here.passwords["user"], "198.51.100.1")
        return tried

    outcomes, _ = _limited(main, here)
    assert outcomes == ["AuthenticationError"] * 5
    assert here.delays == [1.0] * 3, "an address that has signed in is not delayed again"


def test_a_name_is_limited_for_each_address(desk: Open) -> None:
    here = desk(login_failures_per_name="3/minute")

    async def main(here: Desk) -> list[str | float]:
        return [await here.fails() for _ in range(5)]

    outcomes, waits = _limited(main, here)
    assert outcomes[:3] == ["AuthenticationError"] * 3
    assert len(waits) == 2
    assert all(1 <= wait <= 60 for wait in waits)
    assert here.attempts() == {"success": 0, "wrong_credentials": 3, "rate_limited": 2}


def test_an_address_that_has_signed_in_has_a_limit_of_its_own(desk: Open) -> None:
    here = desk(login_failures_per_name="2/minute", login_failures_per_address="4/minute")

    async def main(here: Desk) -> list[str | float]:
        await here.auth.login("user", here.passwords["user"], ADDRESS)
        return [await here.fails() for _ in range(6)]

    outcomes, waits = _limited(main, here)
    assert outcomes[:4] == ["AuthenticationError"] * 4
    assert len(waits) == 2


def test_a_token_that_was_signed_out_is_refused_and_others_are_not(desk: Open) -> None:
    here = desk()

    async def main() -> tuple[str, str]:
        first = await here.auth.login("user", here.passwords["user"], ADDRESS)
        second = await here.auth.login("user", here.passwords["user"], ADDRESS)
        return first.token, second.token

    first, second = asyncio.run(main())
    assert here.auth.identify(first).username == "user"
    here.auth.logout(first)
    with pytest.raises(AuthenticationError, match="signed out"):
        here.auth.identify(first)
    assert here.auth.identify(second).username == "user"


def test_a_token_ends_with_the_password_it_was_issued_for(cheap_hash: Callable[[str], str]) -> None:
    key = "x" * 8 + "another key of thirty-two bytes and more"
    before = Desk(cheap_hash, jwt_secret_key=key)
    token = asyncio.run(before.auth.login("user", before.passwords["user"], ADDRESS)).token
    same = Authenticator(before.settings, build_telemetry(before.settings).instruments)
    assert same.identify(token).username == "user", "a restart ends nothing"
    changed = before.settings.model_copy(update={"auth_user_password": SecretStr("quite another password 1")})
    with pytest.raises(AuthenticationError, match="password has changed"):
        Authenticator(changed, build_telemetry(changed).instruments).identify(token)


def test_an_address_is_limited_whatever_the_name(desk: Open) -> None:
    here = desk(login_failures_per_address="3/minute")

    async def main(here: Desk) -> list[str | float]:
        tried = [await here.fails(f"name {number}") for number in range(5)]
        return [*tried, await here.fails("user", "198.51.100.1")]

    outcomes, waits = _limited(main, here)
    assert outcomes[:3] == ["AuthenticationError"] * 3
    assert len(waits) == 2
    assert outcomes[5] == "AuthenticationError"


def test_who_is_limited_is_not_let_in_with_the_right_password(desk: Open, lines: Lines) -> None:
    here = desk(login_failures_per_name="1/minute")

    async def main() -> None:
        await here.fails()
        await here.auth.login("user", here.passwords["user"], ADDRESS)

    with pytest.raises(RateLimitError) as caught:
        asyncio.run(main())
    assert caught.value.status == 429
    assert "Retry-After" in caught.value.message
    assert "login_rate_limited" in {line["message"] for line in lines.all}


def test_a_limit_ends_when_it_was_said_to(desk: Open) -> None:
    here = desk(login_failures_per_name="1/second")

    async def main() -> None:
        await here.fails()
        wait_s = await here.fails()
        assert isinstance(wait_s, float)
        # The limiter reads the machine's clock; this is the wait that the caller is told, no guess.
        await asyncio.sleep(wait_s + 0.05)
        await here.auth.login("user", here.passwords["user"], ADDRESS)

    asyncio.run(main())


def test_success_is_never_counted_against_a_limit(desk: Open) -> None:
    here = desk(login_failures_per_name="1/minute", login_failures_per_address="1/minute")

    async def main() -> str | float:
        for _ in range(10):
            await here.auth.login("user", here.passwords["user"], ADDRESS)
        return await here.fails()

    assert asyncio.run(main()) == "AuthenticationError"
    assert here.attempts()["success"] == 10


def test_guesses_at_the_same_time_cannot_outrun_the_limit(desk: Open) -> None:
    here = desk(login_failures_per_name="3/minute")

    async def main(here: Desk) -> list[str | float]:
        return list(await asyncio.gather(*(here.fails() for _ in range(40))))

    outcomes, waits = _limited(main, here)
    tried = outcomes.count("AuthenticationError")
    assert 3 <= tried <= 3 + HASHING_THREADS - 1
    turned_away = outcomes.count("OverloadedError")
    assert turned_away == 40 - MAX_WAITING_EACH
    assert len(waits) == 40 - tried - turned_away


def test_strangers_who_wait_hold_up_nobody_at_a_known_address(desk: Open) -> None:
    here = desk(login_failures_per_name="1000/minute", login_failures_per_address="1000/minute")
    password = here.passwords["user"]

    async def main() -> list[str | float]:
        await here.auth.login("user", password, ADDRESS)
        others = [here.fails("user", f"198.51.100.{number}") for number in range(40)]
        waiting = asyncio.gather(*others)
        await asyncio.sleep(0)
        session = await here.auth.login("user", password, ADDRESS)
        assert session.user.username == "user"
        return list(await waiting)

    outcomes = asyncio.run(main())
    assert outcomes.count("OverloadedError") == 40 - MAX_WAITING
    assert outcomes.count("AuthenticationError") == MAX_WAITING


def test_one_address_leaves_half_of_the_places_for_waiting(desk: Open) -> None:
    here = desk(login_failures_per_name="1000/minute", login_failures_per_address="1000/minute")

    async def main() -> tuple[list[str | float], str | float]:
        flood = asyncio.gather(*(here.fails() for _ in range(40)))
        await asyncio.sleep(0)
        other = await here.fails("user", "198.51.100.1")
        return list(await flood), other

    flood, other = asyncio.run(main())
    assert flood.count("OverloadedError") == 40 - MAX_WAITING_EACH
    assert other == "AuthenticationError"


def test_an_address_is_known_once_somebody_has_signed_in_from_it(desk: Open) -> None:
    here = desk()
    assert not here.auth.has_signed_in(ADDRESS)
    asyncio.run(here.fails())
    assert not here.auth.has_signed_in(ADDRESS)
    asyncio.run(here.auth.login("user", here.passwords["user"], ADDRESS))
    assert here.auth.has_signed_in(ADDRESS)
    assert not here.auth.has_signed_in("198.51.100.1")


def test_any_number_of_names_shares_a_fixed_number_of_counters() -> None:
    """Memory is bounded: when all counters are used up, a name that was never tried has to wait too."""
    limits = _SignInLimits(make_settings(login_failures_per_name="1/hour"), LocalCounts())

    async def main() -> float | None:
        for number in range(12 * COUNTER_SLOTS):
            await limits.failed(f"name-{number}", ADDRESS)
        return await limits.wait_s("a name never tried", "an address never tried")

    assert asyncio.run(main())


def test_the_log_of_a_success_names_the_user(desk: Open, lines: Lines) -> None:
    here = desk()
    lines.configure(logging.getLevelName(logging.INFO))
    asyncio.run(here.auth.login("admin", here.passwords["admin"], ADDRESS))
    assert (lines.one["message"], lines.one["user"]) == ("login_succeeded", "admin")
