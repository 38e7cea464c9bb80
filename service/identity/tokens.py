"""Authenticates the two built-in users: verifies passwords, and issues and verifies tokens."""

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
"""Maximum number of passwords that are hashed at the same time; each takes a core and 19 MiB."""

COUNTER_SLOTS = 4_096
"""Number of counters that user names, and addresses, are mapped to, so that memory is bounded."""

MAX_CACHED_TOKENS = 4_096
"""Maximum number of verified tokens that are cached, by their hash, until they expire."""

Role = Literal["admin", "user"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class User:
    """A user of the service."""

    username: str
    role: Role


@dataclass(frozen=True)
class Session:
    """The result of a sign-in: a token and its lifetime."""

    token: str
    expires_in_s: int
    user: User


class Authenticator:
    """Verifies passwords, and issues and verifies tokens.

    Hashes are argon2id with OWASP's first recommended parameters (19 MiB, 2 passes, 1 lane). A plain password
    in the settings is hashed when the process starts.

    Args:
        settings: The users' passwords, the signing key, the lifetime of tokens, and the limits on
            failed sign-ins.
        instruments: Counts sign-ins.
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
            user.username: (user, self._hash(password.get_secret_value()))
            for user, password in (
                (User("admin", "admin"), settings.auth_admin_password),
                (User("user", "user"), settings.auth_user_password),
            )
        }
        self._verified: cachetools.LRUCache[bytes, tuple[float, User]] = cachetools.LRUCache(
            MAX_CACHED_TOKENS
        )
        self._threads = CapacityLimiter(HASHING_THREADS)
        self._failures = _FailureLimiter(settings)

    def _hash(self, password: str) -> str:
        return password if password.startswith("$argon2") else self._hasher.hash(password)

    async def login(self, username: str, password: str, address: str) -> Session:
        """Sign in with a user name and a password.

        The time does not depend on the name: the password is always verified against every user's hash. Only
        failures count towards the limits.

        Args:
            username: The name in the request.
            password: The password in the request.
            address: The client's address.

        Raises:
            AuthenticationError: The name or the password is wrong.
            RateLimitError: Too many failures for this name or from this address.
        """
        # The limits are checked after a thread has been acquired, so that parallel attempts can exceed them
        # by at most one per thread.
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
            # The name is not logged: users sometimes type the password into the wrong field.
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
            # Both are always checked, so that the time tells nothing about either.
            name_matches = hmac.compare_digest(user.username.encode(), username.encode())
            try:
                password_matches: bool = self._hasher.verify(expected, password)
            except argon2.exceptions.VerificationError:
                password_matches = False
            if name_matches and password_matches:
                found = user
        return found

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
        """Verify a token and return its user.

        The role is the user's current one; the token's claim is not used. A verified token is cached until it
        expires, because nothing else about its validity can change while the process runs.

        Raises:
            AuthenticationError: The token is not valid.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise AuthenticationError("The token is not valid. Sign in at POST /auth/login.")
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        until_s, user = self._verified.get(digest, (0.0, None))
        # The JWT library compares with this clock too.
        if user is not None and time.time() < until_s:
            return user
        until_s, user = self._verify(token)
        self._verified[digest] = until_s, user
        return user

    def _verify(self, token: str) -> tuple[float, User]:
        """Return the time when a token expires, leeway included, and its user."""
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


class _FailureLimiter:
    """Limits failed sign-ins per user name and per address, with a fixed number of counters.

    Names that share a counter share its limit. The mapping depends on a random key of the process, so that an
    attacker cannot choose a name that blocks another one.
    """

    def __init__(self, settings: Settings) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_name = parse_limit(settings.login_failures_per_name)
        self._per_address = parse_limit(settings.login_failures_per_address)
        self._key = secrets.token_bytes(16)

    def _slot(self, value: str) -> str:
        digest = hashlib.blake2b(value.encode(), key=self._key, digest_size=8).digest()
        return str(int.from_bytes(digest) % COUNTER_SLOTS)

    async def wait_s(self, username: str, address: str) -> float | None:
        """Return the seconds until another attempt is allowed; None if one is allowed now."""
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
        """Count a failed sign-in."""
        await self._limiter.hit(self._per_name, "name", self._slot(username))
        await self._limiter.hit(self._per_address, "address", self._slot(address))
