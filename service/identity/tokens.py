"""Who is calling: two built-in users, their passwords, tokens and roles."""

import hashlib
import hmac
import logging
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import anyio.to_thread
import argon2
import cachetools
import jwt
from anyio import CapacityLimiter
from limits import parse as parse_limit
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from service.config.settings import Settings
from service.context import current_request
from service.errors import AuthenticationError, RateLimitError
from service.telemetry.instruments import Instruments

ALGORITHM = "HS256"
REQUIRED_CLAIMS = ["exp", "iat", "iss", "aud", "sub", "jti"]
MAX_TOKEN_CHARS = 4_096
HASHING_THREADS = 2
"""Passwords hashed at the same time: each takes a core and 19 MiB."""

COUNTER_SLOTS = 4_096
"""Names and addresses share so many counters, whatever number of them is tried: memory stays bounded."""

KNOWN_TOKENS = 4_096
"""Tokens found good are remembered, so many at most, by their hash and until they expire."""

Role = Literal["admin", "user"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class User:
    """Somebody who may sign in."""

    username: str
    role: Role


@dataclass(frozen=True)
class Session:
    """What a sign-in gives: a token, and the seconds that it is good for."""

    token: str
    expires_in_s: int
    user: User


class Authenticator:
    """Checks passwords, and issues and checks tokens.

    Hashes are argon2id with OWASP's first recommended parameters (19 MiB, 2 passes, 1 lane); a password given
    in plain is hashed when the process starts.

    Args:
        settings: The users' passwords, the token's secret and life, the limits on failed sign-ins.
        instruments: Where sign-ins are counted.
        now: Unix time in seconds.
    """

    def __init__(
        self, settings: Settings, instruments: Instruments, now: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._attempts = instruments.auth_attempts
        self._now = now
        self._key = settings.jwt_secret_key.get_secret_value()
        self._hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
        self._users = {
            user.username: (user, self._as_hash(password.get_secret_value()))
            for user, password in (
                (User("admin", "admin"), settings.auth_admin_password),
                (User("user", "user"), settings.auth_user_password),
            )
        }
        self._known: cachetools.LRUCache[bytes, tuple[float, User]] = cachetools.LRUCache(KNOWN_TOKENS)
        self._threads = CapacityLimiter(HASHING_THREADS)
        self._failures = _Failures(settings)

    def _as_hash(self, password: str) -> str:
        return password if password.startswith("$argon2") else self._hasher.hash(password)

    async def login(self, username: str, password: str, address: str) -> Session:
        """Sign in.

        The work is the same for any name and password: each password tried is hashed against every user's
        hash, and only then compared with the name. Only failures are counted against the limits.

        Args:
            username: The name as given.
            password: The password as given.
            address: Where the attempt comes from.

        Raises:
            AuthenticationError: Wrong name or wrong password, without saying which.
            RateLimitError: Too many failures for this name or from this address.
        """
        # Looked at with a hashing place in hand: any number of attempts at once adds at most one each place.
        async with self._threads:
            wait_s = await self._failures.wait_s(username, address)
            if wait_s is not None:
                self._attempts.add(1, {"outcome": "rate_limited"})
                logger.warning("login_rate_limited")
                raise RateLimitError(
                    "Too many failed sign-ins. Wait for the seconds in Retry-After, then try again.",
                    retry_after_s=wait_s,
                )
            user = await anyio.to_thread.run_sync(self._matching_user, username, password)
            if user is None:
                await self._failures.count(username, address)
        if user is None:
            self._attempts.add(1, {"outcome": "wrong_credentials"})
            # The name stays out of the log: people type passwords into the wrong field.
            logger.warning("login_failed")
            raise AuthenticationError("The user name or the password is wrong.")
        self._attempts.add(1, {"outcome": "success"})
        request = current_request.get()
        if request is not None:
            request.user = user.username
        logger.info("login_succeeded", extra={"user": user.username})
        return self._session(user)

    def _matching_user(self, username: str, password: str) -> User | None:
        found = None
        for user, expected in self._users.values():
            right_password = self._verifies(expected, password)
            right_name = hmac.compare_digest(user.username.encode(), username.encode())
            if right_password and right_name:
                found = user
        return found

    def _verifies(self, expected: str, password: str) -> bool:
        try:
            return self._hasher.verify(expected, password)
        except argon2.exceptions.VerificationError:
            return False

    def _session(self, user: User) -> Session:
        issued = int(self._now())
        token = jwt.encode(
            {
                "sub": user.username,
                "role": user.role,
                "iat": issued,
                "exp": issued + self._settings.jwt_ttl_s,
                "iss": self._settings.jwt_issuer,
                "aud": self._settings.jwt_audience,
                "jti": uuid.uuid4().hex,
            },
            self._key,
            algorithm=ALGORITHM,
        )
        return Session(token, self._settings.jwt_ttl_s, user)

    def identify(self, token: str) -> User:
        """The user whom a token belongs to.

        The role is the one that the user has now, whatever the token says. A token that was found good is
        looked at again when it has expired: nothing else about it can change in a process's life.

        Raises:
            AuthenticationError: The token is none of ours, or not valid now.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise AuthenticationError("The token is not valid. Sign in at POST /auth/login.")
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        until_s, user = self._known.get(digest, (0.0, None))
        # By the clock that the check itself goes by.
        if user is not None and time.time() < until_s:
            return user
        until_s, user = self._checked(token)
        self._known[digest] = until_s, user
        return user

    def _checked(self, token: str) -> tuple[float, User]:
        """The moment until when a token is good, and its user."""
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[ALGORITHM],
                audience=self._settings.jwt_audience,
                issuer=self._settings.jwt_issuer,
                leeway=self._settings.jwt_leeway_s,
                options={"require": REQUIRED_CLAIMS},
            )
        except jwt.ExpiredSignatureError:
            raise AuthenticationError("The token has expired. Sign in again at POST /auth/login.") from None
        except jwt.PyJWTError:
            raise AuthenticationError("The token is not valid. Sign in at POST /auth/login.") from None
        entry = self._users.get(claims["sub"])
        if entry is None:
            raise AuthenticationError("The token's user does not exist. Sign in at POST /auth/login.")
        return int(claims["exp"]) + self._settings.jwt_leeway_s, entry[0]


class _Failures:
    """Counts failed sign-ins per name and per address in a fixed number of counters.

    Two names that share a counter share its limit; which ones do is keyed by a secret of the process, so
    nobody can choose a name to lock another one.
    """

    def __init__(self, settings: Settings) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_name = parse_limit(settings.login_failures_per_name)
        self._per_address = parse_limit(settings.login_failures_per_address)
        self._salt = secrets.token_bytes(16)

    def _slot(self, value: str) -> str:
        digest = hashlib.blake2b(value.encode(), key=self._salt, digest_size=8).digest()
        return str(int.from_bytes(digest) % COUNTER_SLOTS)

    async def wait_s(self, username: str, address: str) -> float | None:
        """Seconds until another attempt is allowed; None when it is now."""
        waits = []
        for limit, kind, value in (
            (self._per_name, "name", username),
            (self._per_address, "address", address),
        ):
            if not await self._limiter.test(limit, kind, self._slot(value)):
                stats = await self._limiter.get_window_stats(limit, kind, self._slot(value))
                waits.append(max(1.0, stats.reset_time - time.time()))
        return max(waits, default=None)

    async def count(self, username: str, address: str) -> None:
        """Count one failure."""
        await self._limiter.hit(self._per_name, "name", self._slot(username))
        await self._limiter.hit(self._per_address, "address", self._slot(address))
