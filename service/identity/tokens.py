"""Authenticates the two built-in users: verifies passwords, and issues and verifies tokens."""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import anyio.to_thread
import argon2
import cachetools
import jwt
from anyio import CapacityLimiter

from service.config.settings import Settings
from service.context import current_request
from service.errors import AuthenticationError, OverloadedError, RateLimitError
from service.telemetry.instruments import Instruments
from service.utils.rates import Rate

ALGORITHM = "HS256"
REQUIRED_CLAIMS = ["exp", "iat", "iss", "aud", "sub", "jti"]
FINGERPRINT_CHARS = 32
MAX_TOKEN_CHARS = 4_096
HASHING_THREADS = 2
"""Maximum number of strangers' passwords that are hashed at the same time; each takes a core and 19 MiB. One
more thread hashes those from addresses that have signed in to the name before."""

MAX_WAITING = 16
"""Maximum number of sign-ins that wait for a thread; further ones are refused before any work is done."""

MAX_WAITING_EACH = 8
"""Maximum number of sign-ins from one address that wait for a thread."""

DELAY_S = 1.0
"""Delay of a sign-in to a name that had too many failures, from an address that has not signed in to it."""

MAX_REVOKED = 1_000
"""Maximum number of signed-out tokens that are remembered for each user; beyond it all of the user's are."""

COUNTER_SLOTS = 4_096
"""Number of counters that names and addresses are mapped to, so that memory is bounded."""

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

    A token is bound to its user's password: after a change, tokens that were issued before are refused. A
    token that was signed out is refused by this process until it expires.

    Args:
        settings: The users' passwords, the signing key, the lifetime of tokens, the limits on sign-ins.
        instruments: Counts sign-ins.
        now: Unix time in seconds.
        sleep: Waits for a number of seconds.
    """

    def __init__(
        self,
        settings: Settings,
        instruments: Instruments,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._attempts = instruments.auth_attempts
        self._rejected = instruments.requests_rejected
        self._now = now
        self._key = settings.jwt_secret_key.get_secret_value()
        self._hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
        passwords = (
            (User("admin", "admin"), settings.auth_admin_password.get_secret_value()),
            (User("user", "user"), settings.auth_user_password.get_secret_value()),
        )
        self._users = {user.username: (user, self._hash(password)) for user, password in passwords}
        # Of the configured value: the hash of a plain password is another one in each process.
        self._fingerprints = {
            user.username: self._fingerprint(user, password) for user, password in passwords
        }
        self._verified: cachetools.LRUCache[bytes, tuple[float, User]] = cachetools.LRUCache(
            MAX_CACHED_TOKENS
        )
        self._strangers = _Queue(HASHING_THREADS)
        self._proven = _Queue(1)
        self._sleep = sleep
        self._limits = _SignInLimits(settings)
        self._revoked: dict[str, dict[str, float]] = {}
        self._valid_from: dict[str, int] = {}

    def _fingerprint(self, user: User, password: str) -> str:
        said = f"{user.username}\0{password}".encode()
        return hmac.new(self._key.encode(), said, hashlib.sha256).hexdigest()[:FINGERPRINT_CHARS]

    def _hash(self, password: str) -> str:
        return password if password.startswith("$argon2") else self._hasher.hash(password)

    async def login(self, username: str, password: str, address: str) -> Session:
        """Sign in with a user name and a password.

        The time does not depend on the name: the password is always verified against every user's hash.

        Args:
            username: The name in the request.
            password: The password in the request.
            address: The client's address, or its network.

        Raises:
            AuthenticationError: The name or the password is wrong.
            OverloadedError: Too many sign-ins are waiting.
            RateLimitError: Too many attempts from this address, or failures for this name from it.
        """
        self._refuse_beyond(await self._limits.arrive(username, address))
        if await self._limits.is_attacked(username, address):
            await self._sleep(DELAY_S)
        queue = self._proven if self._limits.is_proven(username, address) else self._strangers
        if not queue.enter(address):
            self._rejected.add(1, {"reason": "overloaded"})
            raise OverloadedError("Too many sign-ins are waiting. Try again later.")
        try:
            async with queue.threads:
                # Again, so that parallel attempts can exceed the limit by at most one per thread.
                self._refuse_beyond(await self._limits.wait_s(username, address))
                user = await anyio.to_thread.run_sync(self._matching_user, username, password)
                if user is None:
                    await self._limits.failed(username, address)
        finally:
            queue.leave(address)
        if user is None:
            self._attempts.add(1, {"outcome": "wrong_credentials"})
            # The name is not logged: users sometimes type the password into the wrong field.
            logger.warning("login_failed")
            raise AuthenticationError("The user name or the password is wrong.")
        self._limits.succeeded(username, address)
        self._attempts.add(1, {"outcome": "success"})
        request = current_request.get()
        if request is not None:
            request.user = user.username
        logger.info("login_succeeded", extra={"user": user.username})
        return self._session(user)

    def has_signed_in(self, address: str) -> bool:
        """Whether anybody has signed in from an address since the process started."""
        return self._limits.is_known(address)

    def _refuse_beyond(self, wait_s: float | None) -> None:
        if wait_s is not None:
            self._attempts.add(1, {"outcome": "rate_limited"})
            logger.warning("login_rate_limited")
            raise RateLimitError(
                "Too many sign-ins. Wait for the seconds in Retry-After, then try again.",
                retry_after_s=wait_s,
            )

    def logout(self, token: str) -> None:
        """Refuse a token from now on; other tokens of the user stay valid.

        Raises:
            AuthenticationError: The token is not valid.
        """
        until_s, user, claims = self._verify(token)
        now_s = self._now()
        revoked = self._revoked.setdefault(user.username, {})
        for jti in [jti for jti, ended_s in revoked.items() if ended_s < now_s]:
            del revoked[jti]
        if len(revoked) >= MAX_REVOKED:
            # What cannot be remembered one by one is refused as a whole.
            self._valid_from[user.username] = int(now_s) + 1
            revoked.clear()
        revoked[claims["jti"]] = until_s
        self._verified.clear()
        logger.info("logout_succeeded", extra={"user": user.username})

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
                "pwd": self._fingerprints[user.username],
            },
            self._key,
            algorithm=ALGORITHM,
        )
        return Session(token, self._settings.jwt_ttl_s, user)

    def identify(self, token: str) -> User:
        """Verify a token and return its user.

        The role is the user's current one; the token's claim is not used. A verified token is cached until it
        expires or any token is signed out; nothing else about its validity can change while the process runs.

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
        until_s, user, _claims = self._verify(token)
        self._verified[digest] = until_s, user
        return user

    def _verify(self, token: str) -> tuple[float, User, dict[str, Any]]:
        """Return the time when a token expires, leeway included, its user and its claims."""
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
        user = entry[0]
        # Tokens that were issued before they had the claim end by themselves, within JWT_TTL_S.
        fingerprint = self._fingerprints[user.username]
        if not hmac.compare_digest(str(claims.get("pwd", fingerprint)).encode(), fingerprint.encode()):
            raise AuthenticationError("The password has changed. Sign in again at POST /auth/login.")
        signed_out = claims["jti"] in self._revoked.get(user.username, ())
        if signed_out or int(claims["iat"]) < self._valid_from.get(user.username, 0):
            raise AuthenticationError("The token was signed out. Sign in again at POST /auth/login.")
        return int(claims["exp"]) + self._settings.jwt_leeway_s, user, claims


class _Queue:
    """Sign-ins that wait for a thread, or have one; an address can have half of the places.

    Args:
        threads: Maximum number of passwords that are hashed at the same time.
    """

    def __init__(self, threads: int) -> None:
        self.threads = CapacityLimiter(threads)
        self._waiting: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """Take a place; False where none is left, for all or for this address."""
        if self._waiting.total() >= MAX_WAITING or self._waiting[address] >= MAX_WAITING_EACH:
            return False
        self._waiting[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Give a place back."""
        self._waiting[address] -= 1
        if not self._waiting[address]:
            del self._waiting[address]


class _SignInLimits:
    """Limits sign-ins so that a stranger slows down their own address, and not the owner of a name.

    Every attempt counts for its address, and failures for the name and the address together; beyond either
    limit the address waits. An address that has signed in to a name has, for this name, a limit of its own on
    failures instead of both. Failures for a name from all addresses together only delay the next attempts
    from addresses that have not signed in to it.

    The number of counters is fixed. Keys that share a counter share its limit; the mapping depends on a
    random key of the process, so that an attacker cannot choose one that blocks another.
    """

    def __init__(self, settings: Settings) -> None:
        self._addresses = Rate(settings.login_failures_per_address)
        self._proven_pairs = Rate(settings.login_failures_per_address)
        self._pairs = Rate(settings.login_failures_per_name)
        self._names = Rate(settings.login_failures_per_name)
        self._key = secrets.token_bytes(16)
        self._proven: cachetools.LRUCache[bytes, bool] = cachetools.LRUCache(COUNTER_SLOTS)
        self._known: cachetools.LRUCache[bytes, bool] = cachetools.LRUCache(COUNTER_SLOTS)

    def _digest(self, *values: str) -> bytes:
        return hashlib.blake2b("\0".join(values).encode(), key=self._key, digest_size=16).digest()

    def _slot(self, *values: str) -> str:
        return str(int.from_bytes(self._digest(*values)[:8]) % COUNTER_SLOTS)

    def is_proven(self, username: str, address: str) -> bool:
        """Whether this address knew the password of this name."""
        return self._digest(username, address) in self._proven

    def is_known(self, address: str) -> bool:
        """Whether this address knew the password of any name."""
        return self._digest(address) in self._known

    async def arrive(self, username: str, address: str) -> float | None:
        """Count an attempt; return the seconds until one is allowed, None where this one is."""
        if not self.is_proven(username, address):
            slot = self._slot(address)
            if not await self._addresses.hit(slot):
                return max(1.0, (await self._addresses.window(slot)).reset_s)
        return await self.wait_s(username, address)

    async def wait_s(self, username: str, address: str) -> float | None:
        """Return the seconds until the address is allowed to try the name again; None if it is now."""
        rate = self._proven_pairs if self.is_proven(username, address) else self._pairs
        slot = self._slot(username, address)
        return None if await rate.test(slot) else max(1.0, (await rate.window(slot)).reset_s)

    async def is_attacked(self, username: str, address: str) -> bool:
        """Whether the name had too many failures, and the address has not signed in to it."""
        return not self.is_proven(username, address) and not await self._names.test(self._slot(username))

    async def failed(self, username: str, address: str) -> None:
        """Count a failed sign-in."""
        slot = self._slot(username, address)
        await (self._proven_pairs if self.is_proven(username, address) else self._pairs).hit(slot)
        await self._names.hit(self._slot(username))

    def succeeded(self, username: str, address: str) -> None:
        """Remember that this address knows the password of this name."""
        self._proven[self._digest(username, address)] = True
        self._known[self._digest(address)] = True
