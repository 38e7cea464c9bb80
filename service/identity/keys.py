"""API keys: what they look like, where they are kept, and whom they stand for.

A key is ``llmops_<id>_<secret><checksum>``: a prefix and a checksum for scanners of secrets, which need not
ask anybody, an id that may be shown, and 256 random bits. The database has a keyed hash of the whole key, so
neither its rows nor the deployment's secret alone are of use to anybody.

A key that is known costs one hash and one dictionary access. ``changes`` tells what other processes change.
"""

import asyncio
import hmac
import logging
import re
import secrets
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar

import cachetools
import sqlalchemy as sa

from service.config.settings import Settings
from service.errors import AuthenticationError, DependencyUnavailableError, NotFoundError, OverloadedError
from service.identity.changes import ChangeFeed, note_change
from service.identity.database import Database, DatabaseFailedError, metadata
from service.identity.principal import MAX_NAME_CHARS, Limits
from service.utils.rates import Rate

PREFIX: Final = "llmops"
ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_CHARS: Final = 12
SECRET_CHARS: Final = 43
"""Digits to the base of 62 that hold 256 bits."""
CHECKSUM_CHARS: Final = 6
KEY: Final = re.compile(
    rf"{PREFIX}_([0-9A-Za-z]{{{ID_CHARS}}})_[0-9A-Za-z]{{{SECRET_CHARS}}}([0-9A-Za-z]{{{CHECKSUM_CHARS}}})"
)

MAX_KNOWN: Final = 20_000
"""How many keys a process remembers."""

MAX_UNKNOWN: Final = 20_000
UNKNOWN_S: Final = 60.0
"""How many keys that do not exist are remembered, and for how long."""

MAX_LOOKUPS: Final = 50
"""How many secrets are looked up in a second that do not exist as far as the process knows, so that guessing
is no load on the database. A guess needs the right checksum to get that far."""

MAX_STORED: Final = 200_000
"""Of how many secrets a process knows that they exist."""

MAX_SECRETS: Final = 10
"""How many secrets of a key work at the same time; a further rotation ends the oldest."""

ENDED_KEPT_S: Final = 90 * 86_400
"""How long keys stay in the list that were revoked or have expired."""

PURGE_INTERVAL_S: Final = 3_600.0

LAST_WRITE_S: Final = 0.5
USED_INTERVAL_S: Final = 10.0
"""How often it is written when keys were used."""

KIND: Final = "key"
"""Of a change: one key, by its id."""

NEW: Final = "new key"
"""Of a change: one key that was made; what is known of it stays right."""

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEYS: Final = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(ID_CHARS), primary_key=True),
    sa.Column("name", sa.String(MAX_NAME_CHARS), nullable=False),
    sa.Column("owner", sa.String(MAX_NAME_CHARS), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("team", sa.String(MAX_NAME_CHARS), nullable=True),
    sa.Column("limits", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=True),
    sa.Column("last_used_at", sa.BigInteger, nullable=True),
    sa.Column("revoked_at", sa.BigInteger, nullable=True),
    sa.Index("api_keys_owner", "owner", "id"),
    sa.Index("api_keys_team", "team", "id"),
)
SECRETS: Final = sa.Table(
    "api_key_secrets",
    metadata,
    sa.Column("hash", sa.LargeBinary(32), primary_key=True),
    sa.Column("key_id", sa.String(ID_CHARS), sa.ForeignKey("api_keys.id"), nullable=False, index=True),
    # The end of an overlap after a rotation; without one it is the current secret.
    sa.Column("valid_until", sa.BigInteger, nullable=True),
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret; times are Unix seconds."""

    id: str
    name: str
    owner: str
    role: str
    team: str | None
    limits: Limits
    created_at: int
    expires_at: int | None = None
    last_used_at: int | None = None
    revoked_at: int | None = None


NOT_VALID: Final = "The API key is not valid: it may be cut off or mistyped."


def new_id() -> str:
    """A new key's id."""
    return "".join(secrets.choice(ALPHABET) for _ in range(ID_CHARS))


def new_key(key_id: str) -> str:
    """A new secret for a key, as the caller gets it."""
    said = f"{PREFIX}_{key_id}_{_base62(secrets.randbits(256), SECRET_CHARS)}"
    return said + _checksum(said)


def id_in(text: str) -> str | None:
    """The id in a key; None where the text is no key, or was mistyped."""
    found = KEY.fullmatch(text)
    if found is None or not hmac.compare_digest(_checksum(text[:-CHECKSUM_CHARS]), found[2]):
        return None
    return found[1]


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), CHECKSUM_CHARS)


def _base62(number: int, chars: int) -> str:
    digits: list[str] = []
    for _ in range(chars):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def key_secret(settings: Settings) -> bytes:
    """The secret of the deployment's hashes.

    It is made of the signing key, which signs nothing else with this word. With another signing key all keys
    end, as all tokens do.
    """
    return hmac.digest(settings.jwt_secret_key.get_secret_value().encode(), b"api keys", "sha256")


@dataclass(frozen=True, slots=True)
class _Known:
    key: ApiKey
    valid_until: int | None


NONE_KNOWN: Final[Mapping[bytes, _Known]] = {}


class ApiKeys:
    """Makes, finds, revokes and rotates keys.

    Args:
        database: Where they are kept.
        secret: The deployment's; without it the hashes in the database belong to no key.
        feed: Tells which keys other processes change.
        now: Unix time in seconds.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        database: Database,
        secret: bytes,
        feed: ChangeFeed,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._secret = secret
        self._now = now
        self._clock = clock
        # By the key's id, so that a change of a key is found at once: its secrets that were seen.
        self._known: cachetools.LRUCache[str, dict[bytes, _Known]] = cachetools.LRUCache(MAX_KNOWN)
        self._unknown: cachetools.TTLCache[bytes, bool] = cachetools.TTLCache(MAX_UNKNOWN, UNKNOWN_S, clock)
        self._lookups = Rate(f"{MAX_LOOKUPS}/second", clock)
        # Of all secrets, so that a guess cannot be in the way of one that exists.
        self._stored: set[bytes] = set()
        self._changes = 0
        # By the id of each key: when it was used, until that is written.
        self._used: dict[str, int] = {}
        feed.subscribe(KIND, self._take_changes)
        feed.subscribe(NEW, self._take_new)

    # ---- Who is calling ------------------------------------------------------------------------------------

    async def identify(self, text: str) -> ApiKey:
        """The key that a caller has sent.

        Raises:
            AuthenticationError: It is none, or does not exist, has expired or was revoked.
            OverloadedError: Too many unknown keys are looked up.
            DependencyUnavailableError: The key is not known, and the database does not answer.
        """
        shaped = KEY.fullmatch(text)
        if shaped is None:
            raise AuthenticationError(NOT_VALID)
        hashed = self._hash(text)
        known = self._known.get(shaped[1], NONE_KNOWN).get(hashed)
        if known is None:
            # The checksum of one that is known was right.
            key_id = id_in(text)
            if key_id is None:
                raise AuthenticationError(NOT_VALID)
            known = await self._look_up(key_id, hashed)
        now = int(self._now())
        key = known.key
        if key.revoked_at is not None:
            raise AuthenticationError("The API key was revoked.")
        if known.valid_until is not None and known.valid_until <= now:
            raise AuthenticationError("The API key was replaced.")
        if key.expires_at is not None and key.expires_at <= now:
            raise AuthenticationError("The API key has expired.")
        self._used[key.id] = now
        return key

    async def _look_up(self, key_id: str, hashed: bytes) -> _Known:
        if hashed in self._unknown:
            raise AuthenticationError("The API key does not exist, or was replaced.")
        if hashed not in self._stored and not await self._lookups.hit("guesses"):
            raise OverloadedError("Too many unknown API keys are looked up. Try again later.")
        changes = self._changes
        found = await self._read(partial(_select_by_hash, hashed))
        if found is None:
            self._unknown[hashed] = True
            raise AuthenticationError("The API key does not exist, or was replaced.")
        if changes == self._changes:
            # Else it may be what was read before the change.
            self._known.setdefault(key_id, {})[hashed] = found
        return found

    def is_replaced(self, text: str) -> bool:
        """Whether a secret that was identified works only until the end of its overlap."""
        known = self._known.get(id_in(text) or "", NONE_KNOWN).get(self._hash(text))
        return known is not None and known.valid_until is not None

    def _hash(self, text: str) -> bytes:
        return hmac.digest(self._secret, text.encode(), "sha256")

    # ---- Changes -------------------------------------------------------------------------------------------

    async def create(self, key: ApiKey) -> str:
        """Store a new key; its text, which is kept nowhere. Raises ``DependencyUnavailableError``."""
        text = new_key(key.id)

        def insert(connection: sa.Connection) -> None:
            connection.execute(sa.insert(KEYS).values(**_row_of(key)))
            connection.execute(sa.insert(SECRETS).values(hash=self._hash(text), key_id=key.id))
            note_change(connection, NEW, key.id, int(self._now()))

        await self._write(insert)
        self._remember(self._hash(text))
        return text

    async def get(self, key_id: str) -> ApiKey | None:
        """A key by its id; None where there is none."""
        found = await self._read(partial(_select, key_id))
        return None if found is None else self._with_last_use(found)

    async def page(
        self, *, owner: str | None = None, team: str | None = None, after: str = "", limit: int = 100
    ) -> Sequence[ApiKey]:
        """Keys in the order of their ids, behind ``after``."""
        query = sa.select(KEYS).where(KEYS.c.id > after).order_by(KEYS.c.id).limit(limit)
        if owner is not None:
            query = query.where(KEYS.c.owner == owner)
        if team is not None:
            query = query.where(KEYS.c.team == team)
        found = await self._read(lambda connection: [_key_of(row) for row in connection.execute(query)])
        return [self._with_last_use(key) for key in found]

    async def owners(self, after: str, limit: int) -> Sequence[str]:
        """The names of owners of keys, in their order, behind ``after``."""
        owner = KEYS.c.owner.collate(self._database.binary)
        query = sa.select(owner).where(owner > after).distinct().order_by(owner)
        return await self._read(lambda connection: connection.execute(query.limit(limit)).scalars().all())

    def _with_last_use(self, key: ApiKey) -> ApiKey:
        """The key with its last use by this process, which may not have been written."""
        used_at = max(self._used.get(key.id, 0), key.last_used_at or 0)
        return replace(key, last_used_at=used_at or None)

    async def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key, at once in this process; a key that is revoked already stays so.

        Raises:
            NotFoundError: There is no such key.
            DependencyUnavailableError: The database does not answer.
        """
        now = int(self._now())

        def update(connection: sa.Connection) -> ApiKey | None:
            unrevoked = sa.and_(KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None))
            changed = connection.execute(sa.update(KEYS).where(unrevoked).values(revoked_at=now))
            if changed.rowcount:
                note_change(connection, KIND, key_id, now)
            return _select(key_id, connection)

        found = await self._write(update)
        self._forget(key_id)
        if found is None:
            raise NotFoundError("There is no such key.")
        return found

    async def rotate(self, key_id: str, overlap_s: int) -> tuple[ApiKey, str]:
        """Give a key a new secret; the old ones work for ``overlap_s`` more seconds, not longer than before.

        Raises:
            NotFoundError: There is no such key, or it was revoked.
            DependencyUnavailableError: The database does not answer.
        """
        now, text = int(self._now()), new_key(key_id)

        def replace_secret(connection: sa.Connection) -> ApiKey | None:
            key = _select(key_id, connection, locked=True)
            if key is None or key.revoked_at is not None:
                return None
            secrets_of = SECRETS.c.key_id == key_id
            connection.execute(sa.delete(SECRETS).where(secrets_of, SECRETS.c.valid_until <= now))
            later = sa.or_(SECRETS.c.valid_until.is_(None), SECRETS.c.valid_until > now + overlap_s)
            connection.execute(
                sa.update(SECRETS).where(secrets_of, later).values(valid_until=now + overlap_s)
            )
            newest = sa.select(SECRETS.c.hash).where(secrets_of).order_by(SECRETS.c.valid_until.desc())
            kept = list(connection.execute(newest.limit(MAX_SECRETS - 1)).scalars())
            connection.execute(sa.delete(SECRETS).where(secrets_of, SECRETS.c.hash.not_in(kept)))
            connection.execute(sa.insert(SECRETS).values(hash=self._hash(text), key_id=key_id))
            note_change(connection, KIND, key_id, now)
            return key

        key = await self._write(replace_secret)
        self._forget(key_id)
        if key is None:
            raise NotFoundError("There is no such key.")
        self._remember(self._hash(text))
        return key, text

    def _remember(self, *hashes: bytes) -> None:
        """Remember that secrets exist. Those that were replaced stay, so there is a limit."""
        if len(self._stored) < MAX_STORED:
            self._stored.update(hashes)

    def _forget(self, key_id: str) -> None:
        self._changes += 1
        self._known.pop(key_id, None)

    # ---- In the background ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write when keys were used, and delete those that ended long ago, until cancelled."""
        purge_at = self._clock()
        while True:
            try:
                await asyncio.sleep(USED_INTERVAL_S)
                await self.write_used()
                if self._clock() >= purge_at:
                    await self.purge()
                    purge_at = self._clock() + PURGE_INTERVAL_S
            except asyncio.CancelledError:
                with suppress(DatabaseFailedError, TimeoutError):
                    async with asyncio.timeout(LAST_WRITE_S):
                        await self.write_used()
                raise
            except DatabaseFailedError:
                pass  # it has been logged
            except Exception:
                # A bug here must not take the lifespan down with it, and the requests in flight.
                logger.exception("The last use of API keys could not be written")

    async def write_used(self) -> None:
        """Write when keys were used; raises ``DatabaseFailedError``, and then they are written next time."""
        if not self._used:
            return
        used, self._used = self._used, {}

        def update(connection: sa.Connection) -> None:
            for key_id, at in sorted(used.items()):
                earlier = sa.or_(KEYS.c.last_used_at.is_(None), KEYS.c.last_used_at < at)
                unused = sa.update(KEYS).where(KEYS.c.id == key_id, earlier)
                connection.execute(unused.values(last_used_at=at))

        try:
            await self._database.run("keep", update, writes=True)
        except DatabaseFailedError:
            self._used = {**used, **self._used}
            raise

    async def purge(self) -> None:
        """Delete the keys that ended long ago; raises ``DatabaseFailedError``."""
        before = int(self._now()) - ENDED_KEPT_S
        ended = sa.select(KEYS.c.id).where(sa.or_(KEYS.c.revoked_at < before, KEYS.c.expires_at < before))

        def delete(connection: sa.Connection) -> None:
            connection.execute(sa.delete(SECRETS).where(SECRETS.c.key_id.in_(ended)))
            connection.execute(sa.delete(KEYS).where(KEYS.c.id.in_(ended)))

        await self._database.run("purge", delete, writes=True)

    async def number_of(self, owner: str) -> int:
        """How many keys a user has; raises ``DependencyUnavailableError``."""
        query = sa.select(sa.func.count()).select_from(KEYS).where(KEYS.c.owner == owner)
        return await self._read(lambda connection: int(connection.execute(query).scalar_one()))

    async def _take_changes(self, key_ids: Collection[str] | None) -> None:
        """Forget keys that were changed; None forgets all. Raises ``DatabaseFailedError``."""
        stored = await self._hashes(key_ids)
        if key_ids is None:
            self._changes += 1
            self._known.clear()
            self._unknown.clear()
            self._stored = stored
            return
        self._remember(*stored)
        for key_id in key_ids:
            self._forget(key_id)

    async def _take_new(self, key_ids: Collection[str] | None) -> None:
        """Remember that keys exist; raises ``DatabaseFailedError``."""
        if key_ids is not None:
            self._remember(*await self._hashes(key_ids))

    async def _hashes(self, key_ids: Collection[str] | None) -> set[bytes]:
        """The hashes of the secrets of keys; None stands for all."""
        query = sa.select(SECRETS.c.hash).limit(MAX_STORED)
        if key_ids is not None:
            query = query.where(SECRETS.c.key_id.in_(key_ids))
        return await self._database.run(
            "find", lambda connection: set(connection.execute(query).scalars()), writes=False
        )

    async def _write(self, work: Callable[[sa.Connection], T]) -> T:
        try:
            return await self._database.run("keep", work, writes=True)
        except DatabaseFailedError:
            raise DependencyUnavailableError from None

    async def _read(self, work: Callable[[sa.Connection], T]) -> T:
        try:
            return await self._database.run("find", work, writes=False)
        except DatabaseFailedError:
            raise DependencyUnavailableError from None


def _select(key_id: str, connection: sa.Connection, *, locked: bool = False) -> ApiKey | None:
    query = sa.select(KEYS).where(KEYS.c.id == key_id)
    row = connection.execute(query.with_for_update() if locked else query).one_or_none()
    return None if row is None else _key_of(row)


def _select_by_hash(hashed: bytes, connection: sa.Connection) -> _Known | None:
    query = sa.select(KEYS, SECRETS.c.valid_until).join(SECRETS, SECRETS.c.key_id == KEYS.c.id)
    row = connection.execute(query.where(SECRETS.c.hash == hashed)).one_or_none()
    return None if row is None else _Known(_key_of(row), row.valid_until)


def _key_of(row: Any) -> ApiKey:  # noqa: ANN401 - a row
    names = ("id", "name", "owner", "role", "team", "created_at", "expires_at", "last_used_at", "revoked_at")
    return ApiKey(limits=Limits.from_json(row.limits), **{name: getattr(row, name) for name in names})


def _row_of(key: ApiKey) -> dict[str, Any]:
    names = ("id", "name", "owner", "role", "team", "created_at", "expires_at", "last_used_at", "revoked_at")
    return {"limits": key.limits.to_json(), **{name: getattr(key, name) for name in names}}
