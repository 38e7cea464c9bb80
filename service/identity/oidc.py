"""Tokens of OpenID Connect providers: whose they are, by the keys that each provider publishes.

``OidcProviders`` verifies a token with the keys of the issuer that the token names, and of no other one. Keys
are fetched in the background; a token that is known costs one hash and one dictionary access. What a token's
header says about where to find a key (``jku``, ``x5u``, ``jwk``, ``x5c``) is never looked at.
"""

import asyncio
import base64
import hashlib
import json
import logging
import math
import re
import time
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import cachetools
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from service.config.settings import Settings
from service.errors import AuthenticationError, DependencyUnavailableError, OverloadedError
from service.identity.principal import MAX_NAME_CHARS, Role, SignedOut
from service.identity.tokens import MAX_CACHED_TOKENS, MAX_TOKEN_CHARS
from service.telemetry import names
from service.telemetry.events import emit
from service.upstream.documents import DocumentError, open_documents

DISCOVERY: Final = "/.well-known/openid-configuration"

REFRESH_S: Final = 300.0
"""How often an issuer is asked for its keys. A key that it has withdrawn is accepted for so long at most."""

RETRY_S: Final = 10.0
"""How often an issuer is asked that has failed."""

ASK_AGAIN_S: Final = 60.0
"""How often an issuer is asked because of keys that it has not named, at most."""

CONFIRM_S: Final = 10.0
"""How often a health check looks whether an issuer answers, at most; in between it tells what is known."""

WAIT_S: Final = 6.0
"""How long a caller waits for the issuer's answer; its two documents take at most 5 s."""

MAX_WAITING: Final = 1_000
"""How many callers wait for an issuer's answer; further ones are refused at once."""

MAX_KEYS: Final = 100
MIN_RSA_BITS: Final = 2_048
MAX_RSA_BITS: Final = 8_192
"""Verification takes quadratic time in the size of the key; with 8,192 bits it is under a millisecond."""

ALGORITHMS: Final[Mapping[tuple[str, str | None], frozenset[str]]] = {
    ("RSA", None): frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    ("EC", "P-256"): frozenset({"ES256"}),
    ("EC", "P-384"): frozenset({"ES384"}),
    ("EC", "P-521"): frozenset({"ES512"}),
    ("OKP", "Ed25519"): frozenset({"EdDSA"}),
}
"""What a key may verify, by its type and curve: signatures by a private key only, never ``none`` or HMAC."""

ACCEPTED: Final = frozenset().union(*ALGORITHMS.values())
PUBLIC_MEMBERS: Final = ("kty", "crv", "n", "e", "x", "y")

TYPES: Final = frozenset({"jwt", "application/jwt", "at+jwt", "application/at+jwt"})
"""The values of ``typ`` with which a token tells who its bearer is. Other kinds of the same issuer, like a
notice of a logout or a proof of possession, have types of their own (RFC 8725, section 3.11)."""

REQUIRED_CLAIMS: Final = ["exp", "iss", "aud"]
UNNAMEABLE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Categories of characters that no name has: control characters, lone surrogates, line ends."""

MAX_SIGNED_OUT: Final = 100_000
"""How many tokens that were signed out are remembered until they expire."""

URL: Final = re.compile(r"[\x21-\x7e]{1,2048}")
HOST_CHARS: Final = 40
"""How much of an issuer's host is in its name as a dependency."""

GET_NEW: Final = "Get a new one from your identity provider."

Fetch = Callable[[str], Awaitable[object]]
Ping = Callable[[], Awaitable[None]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OidcIdentity:
    """Who a token says that its bearer is.

    Args:
        username: The issuer and the user's claim, as ``<issuer>#<claim>``. An issuer's URL has no ``#``, so
            two issuers never share a name, and no name is a built-in user's.
        role: ``admin`` where the configured claim has one of the configured values.
        team: The team's claim; None where there is none.
    """

    username: str
    role: Role
    team: str | None = None


@asynccontextmanager
async def open_oidc(settings: Settings) -> AsyncIterator["OidcProviders | NoOidc"]:
    """The configured providers; ``run`` must run beside the block, and nothing is sent before."""
    if not settings.oidc_issuers:
        yield NoOidc()
        return
    async with open_documents() as documents:
        yield OidcProviders(settings, documents.get)


class NoOidc:
    """In the place of ``OidcProviders`` where no issuer is configured: it reads no token."""

    pings: Mapping[str, Ping] = {}

    def reads(self, _token: str) -> bool:
        """Whether a token names a configured issuer: none does."""
        return False

    async def identify(self, _token: str) -> OidcIdentity:
        """Refuse the token."""
        raise AuthenticationError

    async def sign_out(self, _token: str) -> SignedOut:
        """Refuse the token."""
        raise AuthenticationError

    def refuse(self, _signed_out: SignedOut) -> None:
        """Nothing is accepted anyway."""

    async def run(self) -> None:
        """Do nothing."""


# ---- Keys ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Key:
    """A published key; equal keys have the same public members."""

    kid: str | None
    algorithms: frozenset[str]
    members: tuple[tuple[str, str], ...]
    public: Any = field(compare=False)


def _keys_in(document: object) -> tuple[_Key, ...]:
    """The usable keys of a JWK Set, in an order of their own; others, like encryption keys, are left out."""
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise DocumentError("no_keys")
    if len(entries) > MAX_KEYS:
        raise DocumentError("too_many_keys")
    found = {key for entry in entries if (key := _key_of(entry)) is not None}
    if not found:
        raise DocumentError("no_keys")
    return tuple(sorted(found, key=lambda key: (key.kid or "", key.members)))


def _key_of(entry: object) -> _Key | None:
    """A key that verifies signatures by an accepted algorithm; None for any other entry."""
    if not isinstance(entry, dict) or not _is_for_signatures(entry):
        return None
    # A private key that was published by mistake is taken for the public one.
    members = {name: entry[name] for name in PUBLIC_MEMBERS if name in entry}
    kid, algorithm = entry.get("kid"), entry.get("alg")
    if not all(isinstance(value, str) for value in (*members.values(), kid or "", algorithm or "")):
        return None
    algorithms = ALGORITHMS.get((members.get("kty", ""), members.get("crv")), frozenset())
    if algorithm is not None:
        algorithms &= {algorithm}
    if not algorithms:
        return None
    try:
        public = jwt.PyJWK(members, algorithm=min(algorithms)).key
    except Exception:  # noqa: BLE001 - it may be wrong in any way, and must not cost the other keys
        return None
    if isinstance(public, RSAPublicKey) and not MIN_RSA_BITS <= public.key_size <= MAX_RSA_BITS:
        return None
    return _Key(kid, algorithms, tuple(sorted(members.items())), public)


def _is_for_signatures(entry: Mapping[str, object]) -> bool:
    operations = entry.get("key_ops", ["verify"])
    return entry.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations


def _has_candidate(keys: tuple[_Key, ...], kid: str | None, algorithm: str) -> bool:
    """Whether one of the keys is the named one, or could be the unnamed one."""
    return any(algorithm in key.algorithms if kid is None else key.kid == kid for key in keys)


class _Issuer:
    """One provider, its keys, and whether it answers.

    Every fetch is made by ``run``, one at a time, so that callers who ask at the same time share it, and one
    who leaves does not end it.

    Args:
        url: The issuer, exactly as its tokens and its configuration name it.
        fetch: Gets a document; raises ``DocumentError``.
        max_stale_s: How long keys are used that cannot be confirmed.
        clock: Monotonic, in seconds.
    """

    def __init__(self, url: str, fetch: Fetch, max_stale_s: float, clock: Callable[[], float]) -> None:
        self.url = url
        self._fetch = fetch
        self._max_stale_s = max_stale_s
        self._clock = clock
        self._keys: tuple[_Key, ...] = ()
        self._fetched_at = -math.inf
        self._confirmed_at = -math.inf
        self._asked_at = -math.inf
        self._failures = 0
        self._error: str | None = None
        self._requested = asyncio.Event()
        self._asked: asyncio.Event | None = asyncio.Event()
        """What callers wait for: the answer to the first fetch, later to one that they have asked for."""
        self._waiting = 0

    @property
    def keys(self) -> tuple[_Key, ...]:
        """The keys; the same object as long as the issuer publishes the same keys.

        Raises:
            DependencyUnavailableError: They were never fetched, or not for too long.
        """
        if self._clock() - self._fetched_at > self._max_stale_s:
            raise DependencyUnavailableError("The identity provider cannot be reached. Try again later.")
        return self._keys

    async def find(self, kid: str | None, algorithm: str) -> tuple[_Key, tuple[_Key, ...]]:
        """The key that a token's header names, and the keys that it is one of.

        Raises:
            AuthenticationError: The issuer has no such key.
            DependencyUnavailableError: The keys are not known, or it cannot be asked for a new one.
            OverloadedError: Too many callers wait for its answer.
        """
        if self._fetched_at == -math.inf:
            await self._wait()
        keys = self.keys
        if not _has_candidate(keys, kid, algorithm):
            await self.ask_again()
            keys = self.keys
            answered = self._error is None and self._asked is None
            if not answered and not _has_candidate(keys, kid, algorithm):
                raise DependencyUnavailableError("The identity provider cannot be reached. Try again later.")
        fitting = [key for key in keys if algorithm in key.algorithms and kid in {None, key.kid}]
        # Only a single key may stay unnamed (OpenID Connect Core, section 10.1).
        if not fitting or (kid is None and len(fitting) > 1):
            raise AuthenticationError(
                f"The token is signed with a key that its issuer does not have. {GET_NEW}"
            )
        return fitting[0], keys

    async def ask_again(self) -> None:
        """Wait until the keys were fetched again, unless that was done less than ``ASK_AGAIN_S`` ago."""
        now = self._clock()
        if self._asked is None and now - self._asked_at >= ASK_AGAIN_S:
            self._asked_at = now
            self._asked = asyncio.Event()
            self._requested.set()
        await self._wait()

    async def _wait(self) -> None:
        asked = self._asked
        if asked is None:
            return
        if self._waiting >= MAX_WAITING:
            raise OverloadedError("Too many requests wait for the identity provider. Try again later.")
        self._waiting += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await asked.wait()
        finally:
            self._waiting -= 1

    async def ping(self) -> None:
        """Raise when the issuer does not answer, or its keys are not usable."""
        await self._wait()
        if self._error is None and self._clock() - self._confirmed_at >= CONFIRM_S:
            try:
                await self._discover()
            except DocumentError as error:
                self._failed(error.reason)
                self._requested.set()
        if self._error is not None:
            stale = self._clock() - self._fetched_at > self._max_stale_s
            kept = "no usable keys" if stale else "using the keys that are known"
            raise DependencyUnavailableError(label=f"{self._error}; {kept}")
        _ = self.keys

    async def run(self) -> None:
        """Fetch the keys again and again, until cancelled."""
        while True:
            self._requested.clear()
            asked = self._asked
            try:
                self._succeeded(_keys_in(await self._fetch(await self._discover())))
            except DocumentError as error:
                self._failed(error.reason)
            except Exception:
                # A bug here must not take the lifespan down with it, and the requests in flight.
                logger.exception("The keys of an issuer could not be read")
                self._failed("bug")
            if asked is not None:
                self._asked = None
                asked.set()
            # Keys that may be used for a short time only are confirmed within it.
            interval_s = min(REFRESH_S if self._error is None else RETRY_S, self._max_stale_s / 2)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._requested.wait()

    async def _discover(self) -> str:
        """The URL of the keys, from the issuer's configuration, which must name this issuer."""
        document = await self._fetch(f"{self.url.rstrip('/')}{DISCOVERY}")
        if not isinstance(document, dict) or document.get("issuer") != self.url:
            raise DocumentError("other_issuer")
        url = document.get("jwks_uri")
        if not isinstance(url, str) or not _is_as_safe(url, self.url):
            raise DocumentError("no_jwks_uri")
        self._confirmed_at = self._clock()
        return url

    def _succeeded(self, keys: tuple[_Key, ...]) -> None:
        if keys != self._keys:
            self._keys = keys
        self._fetched_at = self._clock()
        self._error = None
        if self._failures:
            fields: dict[str, str | int] = {"issuer": self.url, "failures": self._failures}
            self._failures = 0
            emit(
                logger,
                names.EVENT_IDENTITY_ISSUER_RECOVERED,
                f"The issuer {self.url} gives its keys again",
                fields,
            )

    def _failed(self, reason: str) -> None:
        self._error = reason
        self._failures += 1
        if self._failures == 1:
            emit(
                logger,
                names.EVENT_IDENTITY_ISSUER_FAILED,
                f"The issuer {self.url} does not give its keys: {reason}",
                {"issuer": self.url, "reason": reason},
                level=logging.WARNING,
            )


def _is_as_safe(url: str, issuer: str) -> bool:
    """Whether a URL is https, or has the issuer's own origin, which is plain http on this machine only."""
    if URL.fullmatch(url) is None:
        return False
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        return False
    return valid and (parts.scheme == "https" or parts[:2] == urlsplit(issuer)[:2])


# ---- Tokens --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Verified:
    """A verified token; it is valid as long as its issuer publishes the same keys."""

    identity: OidcIdentity
    until_s: float
    issuer: _Issuer
    keys: tuple[_Key, ...]
    signed: bytes


class OidcProviders:
    """Verifies the tokens of the configured issuers.

    Args:
        settings: The issuers, the audience, and the claims that name user, team and role.
        fetch: Gets a document by its URL; raises ``DocumentError``.
        clock: Monotonic, in seconds.
        max_signed_out: How many signed-out tokens are remembered.
    """

    def __init__(
        self,
        settings: Settings,
        fetch: Fetch,
        clock: Callable[[], float] = time.monotonic,
        max_signed_out: int = MAX_SIGNED_OUT,
    ) -> None:
        self._settings = settings
        self._issuers = {
            url: _Issuer(url, fetch, settings.oidc_jwks_max_stale_s, clock) for url in settings.oidc_issuers
        }
        self._verified: cachetools.LRUCache[bytes, _Verified] = cachetools.LRUCache(MAX_CACHED_TOKENS)
        self._signed_out: dict[bytes, float] = {}
        self._max_signed_out = max_signed_out

    @property
    def pings(self) -> Mapping[str, Ping]:
        """By the name of the dependency, what the health checks call: ``oidc``, or one for each issuer."""
        issuers = list(self._issuers.values())
        return dict(
            zip(_dependency_names(self._settings.oidc_issuers), (one.ping for one in issuers), strict=True)
        )

    async def run(self) -> None:
        """Keep the keys of all issuers known, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for issuer in self._issuers.values():
                group.create_task(issuer.run(), name=f"keys of {issuer.url}")

    def reads(self, token: str) -> bool:
        """Whether a token names a configured issuer; nothing about it is verified."""
        return _digest(token) in self._verified or self._issuer_of(token) is not None

    async def identify(self, token: str) -> OidcIdentity:
        """Verify a token and tell whose it is.

        A verified token is cached until it expires, is signed out, or its issuer publishes other keys.

        Raises:
            AuthenticationError: The token is not valid.
            DependencyUnavailableError: Its issuer's keys are not known, or were not confirmed for too long.
            OverloadedError: Too many callers wait for an issuer's answer.
        """
        digest = _digest(token)
        known = self._verified.get(digest)
        # The JWT library compares with this clock too.
        if known is not None and time.time() < known.until_s and known.keys is known.issuer.keys:
            return known.identity
        verified = await self._verify(token)
        self._verified[digest] = verified
        return verified.identity

    async def sign_out(self, token: str) -> SignedOut:
        """Refuse a token from now on, until it expires.

        Raises:
            AuthenticationError: The token is not valid.
            DependencyUnavailableError: As ``identify``.
            OverloadedError: Too many signed-out tokens are remembered.
        """
        verified = await self._verify(token)
        user = verified.identity.username
        signed_out = SignedOut("oidc", user, verified.signed.hex(), verified.until_s)
        self.refuse(signed_out)
        logger.info("logout_succeeded", extra={"user": user})
        return signed_out

    def refuse(self, signed_out: SignedOut) -> None:
        """Refuse a token that was signed out, here or in another process.

        Raises:
            OverloadedError: Too many signed-out tokens are remembered.
        """
        if len(self._signed_out) >= self._max_signed_out:
            now = time.time()
            self._signed_out = {one: until_s for one, until_s in self._signed_out.items() if until_s > now}
        if len(self._signed_out) >= self._max_signed_out:
            raise OverloadedError("Too many tokens were signed out. Try again later.")
        signed = bytes.fromhex(signed_out.token)
        self._signed_out[signed] = signed_out.until_s
        for digest in [one for one, known in self._verified.items() if known.signed == signed]:
            del self._verified[digest]

    def _issuer_of(self, token: str) -> _Issuer | None:
        """The configured issuer that a token names."""
        parts = token.split(".") if len(token) <= MAX_TOKEN_CHARS else []
        if len(parts) != 3:  # noqa: PLR2004 - header, claims, signature
            return None
        try:
            # The library, which verifies the token, refuses what is ignored here: characters of no alphabet.
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        except (ValueError, RecursionError):
            return None
        named = claims.get("iss") if isinstance(claims, dict) else None
        return self._issuers.get(named) if isinstance(named, str) else None

    async def _verify(self, token: str) -> _Verified:
        issuer = self._issuer_of(token)
        if issuer is None:
            raise AuthenticationError(f"The token is of no issuer that is trusted here. {GET_NEW}")
        kid, algorithm = _named_in_header(token)
        key, keys = await issuer.find(kid, algorithm)
        try:
            try:
                claims = self._decode(token, key, algorithm, issuer)
            except jwt.InvalidSignatureError:
                # A new key that has no name looks like a wrong signature.
                if kid is not None:
                    raise
                await issuer.ask_again()
                if keys is issuer.keys:
                    raise
                key, keys = await issuer.find(kid, algorithm)
                claims = self._decode(token, key, algorithm, issuer)
        except jwt.PyJWTError as error:
            raise AuthenticationError(_sentence(error)) from None
        signed = _signed_part(token)
        if signed in self._signed_out:
            raise AuthenticationError(f"The token was signed out. {GET_NEW}")
        until_s = int(claims["exp"]) + self._settings.jwt_leeway_s
        return _Verified(self._identity(issuer.url, claims), until_s, issuer, keys, signed)

    def _decode(self, token: str, key: _Key, algorithm: str, issuer: _Issuer) -> dict[str, Any]:
        return jwt.decode(
            token,
            key.public,
            # It is one of the key's own: a token cannot choose another kind of key.
            algorithms=[algorithm],
            audience=self._settings.oidc_audience,
            issuer=issuer.url,
            leeway=self._settings.jwt_leeway_s,
            options={"require": REQUIRED_CLAIMS},
        )

    def _identity(self, issuer: str, claims: Mapping[str, Any]) -> OidcIdentity:
        settings = self._settings
        user = _claim(claims, settings.oidc_user_claim)
        team = _claim(claims, settings.oidc_team_claim)
        if isinstance(team, list) and len(team) <= 1:
            team = team[0] if team else None
        said = _claim(claims, settings.oidc_admin_claim)
        roles = said if isinstance(said, list) else [said]
        is_admin = any(isinstance(role, str) and role in settings.oidc_admin_values for role in roles)
        return OidcIdentity(
            _name(user, settings.oidc_user_claim, f"{issuer}#"),
            "admin" if is_admin else "user",
            # An empty one is none. Several are refused: they have no order, and a call belongs to one team.
            None if team is None or team == "" else _name(team, settings.oidc_team_claim),
        )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def _signed_part(token: str) -> bytes:
    """The hash of what is signed of a token: of the signature there may be several valid ones."""
    return _digest(token.rpartition(".")[0])


def _named_in_header(token: str) -> tuple[str | None, str]:
    """The key's id and the algorithm in a token's header, of which nothing else is used.

    Raises:
        AuthenticationError: It asks for something that is not accepted.
    """
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, UnicodeEncodeError):
        raise AuthenticationError(f"The token is not valid. {GET_NEW}") from None
    algorithm, kind = header.get("alg"), header.get("typ", "JWT")
    if not isinstance(algorithm, str) or algorithm not in ACCEPTED:
        raise AuthenticationError(f"The token is signed by an algorithm that is not accepted. {GET_NEW}")
    if "crit" in header or not isinstance(kind, str) or kind.lower() not in TYPES:
        raise AuthenticationError(f"The token is of a kind that is not accepted. {GET_NEW}")
    return header.get("kid"), algorithm


def _sentence(error: jwt.PyJWTError) -> str:
    match error:
        case jwt.ExpiredSignatureError():
            return f"The token has expired. {GET_NEW}"
        case jwt.ImmatureSignatureError():
            return "The token is not valid yet."
        case jwt.InvalidAudienceError():
            return "The token is for another audience than this service."
        case jwt.MissingRequiredClaimError():
            return f"The token lacks the claim {error.claim}. {GET_NEW}"
        case _:
            return f"The token is not valid. {GET_NEW}"


def _claim(claims: Mapping[str, Any], name: str) -> object:
    """A claim by its name, or by the path to it (``realm_access.roles``); None where there is none."""
    if not name:
        return None
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _name(value: object, claim: str, prefix: str = "") -> str:
    """A claim's value behind a prefix, as a name that can be stored, logged and compared."""
    if (
        not isinstance(value, str)
        or not value
        or len(prefix) + len(value) > MAX_NAME_CHARS
        or any(unicodedata.category(character) in UNNAMEABLE for character in value)
    ):
        raise AuthenticationError(f"The token has no usable value in the claim {claim}.")
    return prefix + value


def _dependency_names(issuers: Sequence[str]) -> list[str]:
    """A name for each issuer, fit for a metric's attribute."""
    if len(issuers) == 1:
        return ["oidc"]
    found: list[str] = []
    for issuer in issuers:
        host = re.sub(r"[^a-z0-9]+", "_", (urlsplit(issuer).hostname or "").lower())[:HOST_CHARS].strip("_")
        name, number = f"oidc_{host}", 2
        while name in found:
            name, number = f"oidc_{host}_{number}", number + 1
        found.append(name)
    return found
