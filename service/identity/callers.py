"""Who is calling: one answer for every way to prove it."""

from typing import TYPE_CHECKING, Final

import cachetools
from opentelemetry.metrics import Counter

from service.errors import AuthenticationError, DependencyUnavailableError, ServiceError
from service.identity.accounts import Accounts
from service.identity.keys import MAX_KNOWN, PREFIX, ApiKey, ApiKeys
from service.identity.oidc import NoOidc, OidcProviders
from service.identity.principal import NO_LIMITS, Limited, Method, Principal, SignedOut
from service.identity.tokens import Authenticator

if TYPE_CHECKING:
    from collections.abc import Callable


KEY_START: Final = f"{PREFIX}_"


class Callers:
    """Tells who a caller is by what they send: an API key, or a token of ours or of an identity provider.

    Args:
        tokens: Checks the tokens of built-in users.
        keys: Finds API keys.
        oidc: Checks the tokens of OpenID Connect providers.
        accounts: Knows users and teams, and whether what is known may still be used.
        attempts: Counts the attempts by their method and outcome.
    """

    def __init__(
        self,
        tokens: Authenticator,
        keys: ApiKeys,
        oidc: OidcProviders | NoOidc,
        accounts: Accounts,
        attempts: Counter,
    ) -> None:
        self.on_signed_out: Callable[[SignedOut], None] = lambda _signed_out: None
        """Called with each token that was signed out here."""
        self._tokens = tokens
        self._keys = keys
        self._accounts = accounts
        self._oidc = oidc
        self._attempts = attempts
        # What was made of a key, as long as the key and the accounts are the same.
        self._made: cachetools.LRUCache[str, tuple[ApiKey, int, Principal]] = cachetools.LRUCache(MAX_KNOWN)

    async def identify(self, secret: str) -> Principal:
        """The caller who sent this.

        Raises:
            AuthenticationError: It proves nothing, or the user is disabled.
            OverloadedError: Too many unknown keys are looked up.
            DependencyUnavailableError: It is not known, because the database or the issuer does not answer.
        """
        method: Method = "token"
        if secret.startswith(KEY_START):
            method = "key"
        elif self._oidc.reads(secret):
            method = "oidc"
        outcome = "unavailable"
        try:
            if self._accounts.are_stale:
                raise DependencyUnavailableError
            if method == "key":
                found = await self._by_key(secret)
            elif method == "oidc":
                bearer = await self._oidc.identify(secret)
                found = self.admitted(Principal(bearer.username, bearer.role, "oidc", bearer.team))
            else:
                found = self.admitted(self._tokens.identify(secret))
            outcome = "success"
        except ServiceError as error:
            if isinstance(error, AuthenticationError):
                outcome = "invalid"
            raise
        finally:
            self._attempts.add(1, {"method": method, "outcome": outcome})
        return found

    async def _by_key(self, text: str) -> Principal:
        key = await self._keys.identify(text)
        made = self._made.get(key.id)
        if made is not None and made[0] is key and made[1] == self._accounts.version:
            return made[2]
        # Both must say so: a key of an administrator may be made for less.
        is_admin = key.role == "admin" and self._tokens.role_of(key.owner) == "admin"
        limits = (Limited("key", key.id, key.limits),)
        found = self.admitted(
            Principal(key.owner, "admin" if is_admin else "user", "key", key.team, key.id, limits)
        )
        self._made[key.id] = key, self._accounts.version, found
        return found

    def admitted(self, proven: Principal) -> Principal:
        """A caller who has proved who they are, with the limits of their user and team.

        Raises:
            AuthenticationError: The user is disabled.
        """
        user = self._accounts.user(proven.username)
        if user.disabled:
            raise AuthenticationError("The user is disabled. Ask an administrator.")
        # A key's team is the administrator's choice for that key; a provider's is replaced by the user's.
        team = (user.team or proven.team) if proven.method == "oidc" else (proven.team or user.team)
        if team is None and user.limits is NO_LIMITS:
            return proven
        limits = list(proven.limits)
        if user.limits != NO_LIMITS:
            limits.append(Limited("user", user.name, user.limits))
        if team is not None and (of_team := self._accounts.team(team).limits) != NO_LIMITS:
            limits.append(Limited("team", team, of_team))
        return proven.limited_by(team, tuple(limits))

    async def sign_out(self, token: str) -> None:
        """Refuse a token from now on.

        Raises:
            AuthenticationError: The token is not valid.
            OverloadedError: Too many signed-out tokens are remembered.
            DependencyUnavailableError: As ``identify``.
        """
        if self._oidc.reads(token):
            self.on_signed_out(await self._oidc.sign_out(token))
        else:
            self.on_signed_out(self._tokens.logout(token))

    def refuse(self, signed_out: SignedOut) -> None:
        """Refuse a token that was signed out in another process.

        Raises:
            OverloadedError: As ``sign_out``.
        """
        if signed_out.method == "oidc":
            self._oidc.refuse(signed_out)
        else:
            self._tokens.refuse(signed_out)
