"""What the processes of one service tell each other, and what each makes of it.

A token that is signed out in one process is refused by all, what is cleared through one is forgotten by all,
and a circuit that opens in one is open in all. Nobody waits for that. Without a Valkey server each process
goes on by what it has seen itself.
"""

from collections.abc import Mapping
from typing import Final

from service.cache.response_cache import CacheAdmin, NoCacheAdmin
from service.identity.callers import Callers
from service.identity.principal import Method, SignedOut
from service.services.circuit_breaker import State
from service.services.generation import BREAKER, Generation
from service.shared.news import Facts, News
from service.telemetry.names import MODEL_BREAKER

METHODS: Final[Mapping[str, Method]] = {"token": "token", "oidc": "oidc"}
STATES: Final[Mapping[str, State]] = {"open": "open", "closed": "closed"}


def connect_replicas(
    news: News, callers: Callers, cache: CacheAdmin | NoCacheAdmin, generation: Generation
) -> None:
    """Let this process tell the others what it sees, and take what they tell."""
    _connect_sign_outs(news, callers)
    _connect_cache(news, cache)
    _connect_circuits(news, generation)


def _connect_sign_outs(news: News, callers: Callers) -> None:
    def tell(signed_out: SignedOut) -> None:
        facts = {
            "method": signed_out.method,
            "user": signed_out.user,
            "token": signed_out.token,
            "until_s": f"{signed_out.until_s}",
        }
        news.tell("signed_out", facts)

    def take(facts: Facts) -> None:
        method = METHODS[facts["method"]]
        callers.refuse(SignedOut(method, facts["user"], facts["token"], float(facts["until_s"])))

    callers.on_signed_out = tell
    # A process that starts learns of those that have not expired.
    news.on("signed_out", take, kept=True)


def _connect_cache(news: News, cache: CacheAdmin | NoCacheAdmin) -> None:
    def tell(tenant: str | None, model: str | None) -> None:
        news.tell("cache_cleared", {"tenant": tenant or "", "model": model or ""})

    cache.on_cleared = tell
    news.on("cache_cleared", lambda facts: cache.forget(facts["tenant"] or None, facts["model"] or None))


def _connect_circuits(news: News, generation: Generation) -> None:
    def tell(model: str, caller: str | None, state: State) -> None:
        # The names of models and of callers are never empty.
        news.tell(
            "circuit", {"breaker": MODEL_BREAKER, "model": model, "caller": caller or "", "state": state}
        )

    def take(facts: Facts) -> None:
        state = STATES[facts["state"]]
        if facts["breaker"] == BREAKER:
            generation.connections.hear(state)
        elif facts["breaker"] == MODEL_BREAKER:
            generation.circuits.hear(facts["model"], facts["caller"] or None, state)

    generation.connections.on_change = lambda state: news.tell(
        "circuit", {"breaker": BREAKER, "state": state}
    )
    generation.circuits.on_change = tell
    news.on("circuit", take)
