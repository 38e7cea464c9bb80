"""API keys over a real SQLite file and a real PostgreSQL server."""

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from service.errors import AuthenticationError, DependencyUnavailableError, NotFoundError, OverloadedError
from service.identity.accounts import Accounts
from service.identity.callers import Callers
from service.identity.changes import ChangeFeed
from service.identity.database import Database, DatabaseFailedError, open_database
from service.identity.keys import (
    ENDED_KEPT_S,
    KEYS,
    MAX_LOOKUPS,
    MAX_SECRETS,
    SECRETS,
    ApiKey,
    ApiKeys,
    id_in,
    new_id,
    new_key,
)
from service.identity.oidc import NoOidc
from service.identity.principal import Budget, Limits
from service.identity.tokens import Authenticator
from tests.fakes.clock import FakeClock
from tests.harness import make_settings
from tests.unit.databases import run
from tests.unit.test_response_owners import Measured

SECRET = b"s" * 32
STALE_S = 300.0
NOW_S = 1_800_000_000


class Process:
    """The keys of one process, and its clocks."""

    def __init__(self, database: Database, measured: Measured, secret: bytes = SECRET) -> None:
        self.database, self.measured = database, measured
        self.clock, self.time = FakeClock(), FakeClock(NOW_S)
        self.feed = ChangeFeed(database, STALE_S, self.clock)
        self.keys = ApiKeys(database, secret, self.feed, now=self.time, clock=self.clock)
        self.accounts = Accounts(database, self.feed, self.time)

    async def make(self, **fields: Any) -> tuple[ApiKey, str]:
        """Make a key."""
        given: dict[str, Any] = {"name": "app", "owner": "alice", "role": "user", "team": None}
        given |= {"limits": Limits(), "created_at": NOW_S, **fields}
        key = ApiKey(new_id(), **given)
        return key, await self.keys.create(key)

    @property
    def look_ups(self) -> int:
        """How many keys the database was asked for."""
        return self.measured.count("find", "success") + self.measured.count("find", "error")


@asynccontextmanager
async def process(url: str, **options: Any) -> Any:
    measured = Measured()
    async with open_database(make_settings(database_url=url), measured.instruments) as database:
        yield Process(database, measured, **options)


@given(text=st.text(max_size=80), place=st.integers(0, 67), letter=st.sampled_from("0aZ_"))
def test_a_key_is_seen_to_be_one(text: str, place: int, letter: str) -> None:
    key_id = new_id()
    key = new_key(key_id)
    assert id_in(key) == key_id
    assert id_in(text) is None
    changed = key[:place] + letter + key[place + 1 :]
    assert changed == key or id_in(changed) is None


def test_a_key_identifies_its_owner_in_every_process(url: str) -> None:
    limits = Limits(("demo",), "60/minute", Budget(2.5, "usd", "day"))

    async def scenario() -> None:
        async with process(url) as first, process(url) as second:
            key, text = await first.make(team="blue", limits=limits, expires_at=NOW_S + 10)
            assert await first.keys.identify(text) == key
            for _ in range(3):
                assert await second.keys.identify(text) == key
            assert second.look_ups == 1

    run(scenario)


def test_the_database_holds_no_key(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one, process(url, secret=b"other" * 8) as other:
            _, text = await one.make()
            for table in (KEYS, SECRETS):
                rows = await one.database.run(
                    "find", lambda connection, t=table: connection.execute(sa.select(t)).all(), writes=False
                )
                assert text not in repr(rows)
                assert text.split("_")[2][:10] not in repr(rows)
            # The hash says nothing without the deployment's secret.
            with pytest.raises(AuthenticationError):
                await other.keys.identify(text)

    run(scenario)


def test_what_is_no_key_costs_no_look_up(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            _, text = await one.make()
            for wrong in (
                "",
                "llmops_",
                text[:-1],
                text + "0",
                text[:-1] + "\u0660",
                text.swapcase(),
                "\ud800",
            ):
                with pytest.raises(AuthenticationError):
                    await one.keys.identify(wrong)
            assert one.look_ups == 0

    run(scenario)


def test_guesses_are_no_load_on_the_database(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            _, text = await one.make()
            guesses = [new_key(new_id()) for _ in range(MAX_LOOKUPS + 10)]
            kinds = []
            for guess in guesses:
                with pytest.raises((AuthenticationError, OverloadedError)) as raised:
                    await one.keys.identify(guess)
                kinds.append(raised.type)
            assert kinds == [AuthenticationError] * MAX_LOOKUPS + [OverloadedError] * 10
            one.clock.advance(2)
            assert (await one.keys.identify(text)).owner == "alice"
            for guess in guesses[:MAX_LOOKUPS]:
                with pytest.raises(AuthenticationError):
                    await one.keys.identify(guess)
            assert one.look_ups == MAX_LOOKUPS + 1

    run(scenario)


def test_a_revoked_key_ends_at_once_and_elsewhere_with_the_next_poll(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one, process(url) as two:
            key, text = await one.make()
            await two.feed.poll()
            assert await two.keys.identify(text) == key
            revoked = await one.keys.revoke(key.id)
            assert revoked.revoked_at == NOW_S
            assert await one.keys.revoke(key.id) == revoked
            with pytest.raises(AuthenticationError, match="revoked"):
                await one.keys.identify(text)
            assert await two.keys.identify(text) == key
            await two.feed.poll()
            with pytest.raises(AuthenticationError, match="revoked"):
                await two.keys.identify(text)
            with pytest.raises(NotFoundError):
                await one.keys.revoke(new_id())
            with pytest.raises(NotFoundError):
                await one.keys.rotate(key.id, 0)

    run(scenario)


def test_a_rotated_key_works_for_its_overlap(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            key, first = await one.make()
            assert await one.keys.identify(first) == key
            _, second = await one.keys.rotate(key.id, 60)
            _, third = await one.keys.rotate(key.id, 10)
            for text in (first, second, third):
                assert (await one.keys.identify(text)).id == key.id
            one.time.advance(10)
            for text in (first, second):
                with pytest.raises(AuthenticationError, match="replaced"):
                    await one.keys.identify(text)
            _, fourth = await one.keys.rotate(key.id, 0)
            with pytest.raises(AuthenticationError, match="replaced"):
                await one.keys.identify(third)
            assert (await one.keys.identify(fourth)).id == key.id

    run(scenario)


def test_two_rotations_at_once_leave_one_secret(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one, process(url) as two:
            key, _ = await one.make()
            turned = await asyncio.gather(one.keys.rotate(key.id, 0), two.keys.rotate(key.id, 0))
            good = []
            for _, text in turned:
                try:
                    await one.keys.identify(text)
                except AuthenticationError:
                    continue
                good.append(text)
            assert len(good) == 1

    run(scenario)


def test_a_key_expires(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            _, text = await one.make(expires_at=NOW_S + 5)
            await one.keys.identify(text)
            one.time.advance(5)
            with pytest.raises(AuthenticationError, match="expired"):
                await one.keys.identify(text)

    run(scenario)


def test_known_keys_work_for_a_while_without_the_database(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            key, text = await one.make()
            _, unknown = await one.make()
            await one.feed.poll()
            assert await one.keys.identify(text) == key
            await one.database.run("purge", _break, writes=True)
            with pytest.raises(DatabaseFailedError):
                await one.feed.poll()
            assert await one.keys.identify(text) == key
            with pytest.raises(DependencyUnavailableError):
                await one.keys.identify(unknown)
            assert not one.feed.is_stale
            one.clock.advance(STALE_S + 1)
            assert one.feed.is_stale

    run(scenario)


def _break(connection: sa.Connection) -> None:
    for name in ("api_key_secrets", "api_keys", "identity_changes"):
        connection.exec_driver_sql(f"ALTER TABLE {name} RENAME TO {name}_gone")


def test_keys_are_listed_in_pages_and_their_use_is_noted(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one, process(url) as two:
            made = [await one.make(owner=owner, team=team) for owner, team in [("a", "x"), ("b", "x")] * 3]
            keys = sorted((key for key, _ in made), key=lambda key: key.id)
            listed = list(await one.keys.page(limit=4))
            listed += await one.keys.page(limit=4, after=listed[-1].id)
            assert listed == keys
            assert {key.owner for key in await one.keys.page(owner="a", team="x")} == {"a"}
            await one.keys.identify(made[0][1])
            for other in (one, two):
                await one.keys.write_used()
                found = await other.keys.get(made[0][0].id)
                assert found is not None
                assert found.last_used_at == NOW_S

    run(scenario)


def test_a_hundred_keys_can_be_made_at_once(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            made = await asyncio.gather(*(one.make(name="é\u0000"[:1]) for _ in range(100)))
            assert len({text for _, text in made}) == 100
            assert len(await one.keys.page(limit=1_000)) == 100

    run(scenario)


def test_guesses_are_not_in_the_way_of_keys_that_exist(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one, process(url) as two:
            _, text = await one.make()
            await two.feed.poll()
            for _ in range(2 * MAX_LOOKUPS):
                with pytest.raises((AuthenticationError, OverloadedError)):
                    await two.keys.identify(new_key(new_id()))
            with pytest.raises(OverloadedError):
                await two.keys.identify(new_key(new_id()))
            await two.keys.identify(text)

    run(scenario)


def test_a_key_has_only_so_many_secrets(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            key, first = await one.make()
            texts = [first]
            for number in range(MAX_SECRETS):
                _, text = await one.keys.rotate(key.id, 1_000 + number)
                texts.append(text)
            with pytest.raises(AuthenticationError):
                await one.keys.identify(texts[0])
            good = [text for text in texts[1:] if (await one.keys.identify(text)).id == key.id]
            assert len(good) == MAX_SECRETS

    run(scenario)


def test_keys_that_ended_long_ago_are_deleted(url: str) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            revoked, _ = await one.make()
            await one.keys.revoke(revoked.id)
            await one.make(expires_at=NOW_S + 5)
            kept, text = await one.make()
            assert await one.keys.number_of("alice") == 3
            one.time.advance(ENDED_KEPT_S + 6)
            await one.keys.purge()
            assert [key.id for key in await one.keys.page()] == [kept.id]
            await one.keys.identify(text)

    run(scenario)


@pytest.mark.parametrize(
    ("role", "owner", "expected"),
    [
        ("admin", "admin", "admin"),
        ("user", "admin", "user"),
        ("admin", "alice", "user"),
        ("admin", "user", "user"),
    ],
)
def test_a_key_is_an_administrators_if_its_owner_is_one_too(
    url: str, role: str, owner: str, expected: str
) -> None:
    async def scenario() -> None:
        async with process(url) as one:
            instruments = one.measured.instruments
            tokens = Authenticator(make_settings(), instruments)
            callers = Callers(tokens, one.keys, NoOidc(), one.accounts, instruments.auth_attempts)
            await one.feed.poll()
            _, text = await one.make(owner=owner, role=role)
            assert (await callers.identify(text)).role == expected

    run(scenario)
