"""Authenticates the two built-in users: verifies passwords, and issues and verifies tokens."""

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import argon2
import cachetools
import jwt
from anyio import CapacityLimiter

from service.config.settings import Settings
from service.context import current_request
from service.errors import AuthenticationError, OverloadedError, RateLimitError
from service.identity.principal import Principal, Role, SignedOut
from service.shared.counts import Counts, How, Limit, LocalCounts
from service.shared.exchange import Waited
from service.telemetry.instruments import Instruments
from service.utils.rates import Rate, Window

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """The result of a sign-in: a token and its lifetime."""

    token: str
    expires_in_s: int
    user: Principal


@dataclass(frozen=True)
class Clock:
    """Tells the time, and waits.

    Args:
        now: Unix time in seconds.
        sleep: Waits for a number of seconds.
    """

    now: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Authenticator:
    """Verifies passwords, and issues and verifies tokens.

    Hashes are argon2id with OWASP's first recommended parameters (19 MiB, 2 passes, 1 lane). A plain password
    in the settings is hashed when the process starts.

    A token is bound to its user's password: after a change, tokens that were issued before are refused. A
    token that was signed out is refused by this process until it expires.

    Args:
        settings: The users' passwords, the signing key, the lifetime of tokens, the limits on sign-ins.
        instruments: Counts sign-ins.
        clock: Tells the time, and waits.
        counts: Where failures are counted; without, in this process's memory.
        is_disabled: Whether a user may not sign in, whatever the password.
    """

    def __init__(
        self,
        settings: Settings,
        instruments: Instruments,
        clock: Clock | None = None,
        *,
        counts: Counts | None = None,
        is_disabled: Callable[[str], bool] = lambda _username: False,
    ) -> None:
        self._settings = settings
        self._attempts = instruments.auth_attempts
        self._rejected = instruments.requests_rejected
        clock = clock or Clock()
        self._now = clock.now
        self._key = settings.jwt_secret_key.get_secret_value()
        self._hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
        passwords = (
            (Principal("admin", "admin"), settings.auth_admin_password.get_secret_value()),
            (Principal("user", "user"), settings.auth_user_password.get_secret_value()),
        )
        self._users = {user.username: (user, self._hash(password)) for user, password in passwords}
        # Of the configured value: the hash of a plain password is another one in each process.
        self._fingerprints = {
            user.username: self._fingerprint(user, password) for user, password in passwords
        }
        self._verified: cachetools.LRUCache[bytes, tuple[float, Principal]] = cachetools.LRUCache(
            MAX_CACHED_TOKENS
        )
        self._strangers = _Queue(HASHING_THREADS)
        self._proven = _Queue(1)
        self._sleep = clock.sleep
        self._is_disabled = is_disabled
        self._limits = _SignInLimits(settings, counts or LocalCounts())
        self._revoked: dict[str, dict[str, float]] = {}
        self._valid_from: dict[str, int] = {}

    def _fingerprint(self, user: Principal, password: str) -> str:
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
        waited = Waited()
        arrival = await self._limits.arrive(username, address, waited)
        self._refuse_beyond(arrival.wait_s)
        if arrival.is_attacked:
            await self._sleep(DELAY_S)
        queue = self._proven if self._limits.is_proven(username, address) else self._strangers
        if not queue.enter(address):
            self._rejected.add(1, {"reason": "overloaded"})
            raise OverloadedError("Too many sign-ins are waiting. Try again later.")
        try:
            async with queue.threads:
                # Again, so that parallel attempts can exceed the limit by at most one per thread.
                self._refuse_beyond(await self._limits.wait_s(username, address, waited))
                user = await anyio.to_thread.run_sync(self._matching_user, username, password)
                if user is not None and self._is_disabled(username):
                    user = None
                if user is None:
                    await self._limits.failed(username, address, waited)
        finally:
            queue.leave(address)
        if user is None:
            self._attempts.add(1, {"method": "password", "outcome": "wrong_credentials"})
            # The name is not logged: users sometimes type the password into the wrong field.
            logger.warning("login_failed")
            raise AuthenticationError("The user name or the password is wrong.")
        self._limits.succeeded(username, address)
        self._attempts.add(1, {"method": "password", "outcome": "success"})
        request = current_request.get()
        if request is not None:
            request.user = user.username
        logger.info("login_succeeded", extra={"user": user.username})
        return self._session(user)

    @property
    def usernames(self) -> Sequence[str]:
        """The names of the built-in users."""
        return list(self._users)

    def role_of(self, username: str) -> Role | None:
        """The role of a built-in user; None for any other name."""
        found = self._users.get(username)
        return None if found is None else found[0].role

    def has_signed_in(self, address: str) -> bool:
        """Whether anybody has signed in from an address since the process started."""
        return self._limits.is_known(address)

    def _refuse_beyond(self, wait_s: float | None) -> None:
        if wait_s is not None:
            self._attempts.add(1, {"method": "password", "outcome": "rate_limited"})
            logger.warning("login_rate_limited")
            raise RateLimitError(
                "Too many sign-ins. Wait for the seconds in Retry-After, then try again.",
                retry_after_s=wait_s,
            )

    def logout(self, token: str) -> SignedOut:
        """Refuse a token from now on; other tokens of the user stay valid.

        Raises:
            AuthenticationError: The token is not valid.
        """
        until_s, user, claims = self._verify(token)
        signed_out = SignedOut("token", user.username, claims["jti"], until_s)
        self.refuse(signed_out)
        logger.info("logout_succeeded", extra={"user": user.username})
        return signed_out

    def refuse(self, signed_out: SignedOut) -> None:
        """Refuse a token that was signed out, here or in another process."""
        if signed_out.user not in self._users:
            return
        now_s = self._now()
        revoked = self._revoked.setdefault(signed_out.user, {})
        for jti in [jti for jti, ended_s in revoked.items() if ended_s < now_s]:
            del revoked[jti]
        if len(revoked) >= MAX_REVOKED:
            # What cannot be remembered one by one is refused as a whole.
            self._valid_from[signed_out.user] = int(now_s) + 1
            revoked.clear()
        revoked[signed_out.token] = signed_out.until_s
        self._verified.clear()

    def _matching_user(self, username: str, password: str) -> Principal | None:
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

    def _session(self, user: Principal) -> Session:
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

    def identify(self, token: str) -> Principal:
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

    def _verify(self, token: str) -> tuple[float, Principal, dict[str, Any]]:
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


@dataclass(frozen=True)
class _Arrival:
    """What the limits say about an attempt: the seconds to wait, None for none, and whether to delay it."""

    wait_s: float | None
    is_attacked: bool = False


class _SignInLimits:
    """Limits sign-ins so that a stranger slows down their own address, and not the owner of a name.

    Every attempt counts for its address, and failures for the name and the address together; beyond either
    limit the address waits. An address that has signed in to a name has, for this name, a limit of its own on
    failures instead of both. Failures for a name from all addresses together only delay the next attempts
    from addresses that have not signed in to it. Which addresses have is known by each process for itself.

    The number of counters is fixed. Keys that share a counter share its limit; the mapping depends on the
    signing key, which the replicas share, so that an attacker cannot choose one that blocks another.
    """

    def __init__(self, settings: Settings, counts: Counts) -> None:
        self._counts = counts
        self._addresses = Rate(settings.login_failures_per_address)
        self._proven_pairs = Rate(settings.login_failures_per_address)
        self._pairs = Rate(settings.login_failures_per_name)
        self._names = Rate(settings.login_failures_per_name)
        secret = settings.jwt_secret_key.get_secret_value().encode()
        self._key = hashlib.blake2b(secret, digest_size=32, person=b"sign-in limits").digest()
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

    def _pair(self, username: str, address: str, how: How) -> Limit:
        slot = self._slot(username, address)
        if self.is_proven(username, address):
            return Limit(self._proven_pairs, f"sign-in proven {slot}", how)
        return Limit(self._pairs, f"sign-in pair {slot}", how)

    def _name(self, username: str, how: How) -> Limit:
        return Limit(self._names, f"sign-in name {self._slot(username)}", how)

    async def arrive(self, username: str, address: str, waited: Waited | None = None) -> _Arrival:
        """Count an attempt; return whether it is allowed."""
        if self.is_proven(username, address):
            return _Arrival(await self.wait_s(username, address, waited))
        of_address = Limit(self._addresses, f"sign-in address {self._slot(address)}")
        limits = [of_address, self._pair(username, address, "look"), self._name(username, "look")]
        counted = await self._counts.count(limits, waited)
        address_window, pair_window, name_window = counted.windows
        wait_s = _wait_s(pair_window) if counted.allowed else max(1.0, address_window.reset_s)
        return _Arrival(wait_s, is_attacked=name_window.remaining == 0)

    async def wait_s(self, username: str, address: str, waited: Waited | None = None) -> float | None:
        """Return the seconds until the address is allowed to try the name again; None if it is now."""
        counted = await self._counts.count([self._pair(username, address, "look")], waited)
        return _wait_s(counted.windows[0])

    async def failed(self, username: str, address: str, waited: Waited | None = None) -> None:
        """Count a failed sign-in."""
        await self._counts.count(
            [self._pair(username, address, "alone"), self._name(username, "alone")], waited
        )

    def succeeded(self, username: str, address: str) -> None:
        """Remember that this address knows the password of this name."""
        self._proven[self._digest(username, address)] = True
        self._known[self._digest(address)] = True


def _wait_s(window: Window) -> float | None:
    return None if window.remaining else max(1.0, window.reset_s)
