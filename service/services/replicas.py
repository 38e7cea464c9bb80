"""What the processes of one service tell each other, and what each makes of it.

A token that is signed out in one process is refused by all, what is cleared through one is forgotten by all,
a circuit that opens in one is open in all, and what a call has spent of a budget counts for all. Nobody waits
for that. Without a Valkey server each process goes on by what it has seen itself, and what the database has.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from service.cache.response_cache import CacheAdmin, NoCacheAdmin
from service.identity.budgets import (
    DAY_S,
    MAX_COST,
    MAX_TOKENS,
    NANO,
    Budgets,
    Spending,
    Spent,
    Subject,
    as_name,
)
from service.identity.callers import Callers
from service.identity.principal import Method, Scope, SignedOut
from service.services.circuit_breaker import State
from service.services.generation import BREAKER, Generation
from service.shared.news import Facts, News, NoNews
from service.telemetry.names import MODEL_BREAKER

METHODS: Final[Mapping[str, Method]] = {"token": "token", "oidc": "oidc"}
STATES: Final[Mapping[str, State]] = {"open": "open", "closed": "closed"}

RECORD_ID: Final = re.compile("[0-9a-f]{32}")
SCOPES: Final[tuple[Scope, ...]] = ("user", "key", "team")
SPENT_VERSION: Final = 1
"""Of the entries about what was spent: those of another version are left out."""


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


def connect_budgets(news: News, budgets: Budgets, now: Callable[[], float] = time.time) -> None:
    """Let this process tell the others what its calls spend of budgets, and count what they tell.

    Args:
        news: A stream for this alone, as there is an entry for each call.
        budgets: What was spent.
        now: Unix time in seconds.
    """
    if isinstance(news, NoNews):
        return

    def tell(spending: Spending) -> None:
        # Once the ledger has it, the others have it from there.
        news.tell("spent", {"call": _written(spending)}, lambda: spending.record_id in budgets.waiting)

    budgets.share(tell)
    # A process that starts counts what the ledger does not have yet.
    news.on("spent", lambda facts: budgets.hear(_read(facts["call"], now())), kept=True)


def _written(spending: Spending) -> str:
    """A call as one text: reading ten fields would take as long again."""
    names = dict(spending.subjects)
    spent = spending.spent
    return json.dumps(
        [
            *(SPENT_VERSION, spending.record_id, spending.ended_s, spent.cost_nano, spent.tokens),
            *(names.get(scope) for scope in SCOPES),
        ],
        ensure_ascii=False,
        separators=(",", ":"),
    )


def _read(text: str, now_s: float) -> Spending:
    """What another process has written; raises ``ValueError`` for what no call can have spent."""
    try:
        version, record_id, ended_s, cost_nano, tokens, *names = json.loads(text)
    except (TypeError, RecursionError) as error:
        raise ValueError("not a call") from error
    subjects = tuple(
        _subject(scope, name) for scope, name in zip(SCOPES, names, strict=True) if name is not None
    )
    if (
        version != SPENT_VERSION
        or not isinstance(record_id, str)
        or RECORD_ID.fullmatch(record_id) is None
        # A clock that is a day ahead would spend the budgets of the next one.
        or not _is_number(ended_s, now_s + DAY_S)
        or not _is_number(cost_nano, MAX_COST * NANO)
        or not _is_number(tokens, MAX_TOKENS)
        or not subjects
    ):
        raise ValueError("not a call")
    return Spending(record_id, ended_s, Spent(cost_nano, tokens), subjects)


def _subject(scope: Scope, name: Any) -> Subject:  # noqa: ANN401 - what somebody has written
    if not isinstance(name, str) or not name or as_name(name) != name:
        raise ValueError("not a name")
    return scope, name


def _is_number(value: Any, most: float) -> bool:  # noqa: ANN401 - what somebody has written
    return type(value) is int and 0 <= value <= most
