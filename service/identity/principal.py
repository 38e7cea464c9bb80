"""Who is calling, and what they may do."""

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

Role = Literal["admin", "user"]
Method = Literal["token", "key", "oidc"]
Scope = Literal["key", "user", "team"]
Unit = Literal["usd", "tokens"]
Period = Literal["day", "month"]

MAX_NAME_CHARS: Final = 256
"""Longest name of a user, a team or a key, in characters."""


RATE: Final = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour|day)")


def checked_name(text: str) -> str:
    """The name of a user, a team or a key; raises ``ValueError`` where it can be none."""
    if not 1 <= len(text) <= MAX_NAME_CHARS or not text.isprintable():
        raise ValueError(f"must be 1 to {MAX_NAME_CHARS} printable characters")
    return text


def checked_rate(text: str) -> str:
    """A rate; raises ``ValueError`` where it is none."""
    if RATE.fullmatch(text) is None:
        raise ValueError("must be a number and a period, such as 60/minute")
    return text


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent in a period.

    Args:
        amount: US dollars, or tokens.
        unit: Which of the two.
        period: A calendar day or month in UTC.
    """

    amount: float
    unit: Unit
    period: Period


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key, a user or a team may do; None where there is no limit of its own.

    Args:
        models: The models that may be asked.
        rate: A number and a period, for example ``60/minute``.
        budget: What may be spent.
    """

    models: tuple[str, ...] | None = None
    rate: str | None = None
    budget: Budget | None = None

    def to_json(self) -> str:
        """The limits as they are stored."""
        budget = None if self.budget is None else [self.budget.amount, self.budget.unit, self.budget.period]
        return json.dumps({"models": self.models, "rate": self.rate, "budget": budget})

    @classmethod
    def from_json(cls, text: str) -> "Limits":
        """Read what ``to_json`` has written."""
        read = json.loads(text)
        models, budget = read["models"], read["budget"]
        return cls(
            None if models is None else tuple(models),
            read["rate"],
            None if budget is None else Budget(*budget),
        )


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Limited:
    """Limits, and to whom they apply: ``name`` is a key's id, a user's or a team's name."""

    scope: Scope
    name: str
    limits: Limits


@dataclass(frozen=True)
class Principal:
    """A caller of the service, however they have proved who they are.

    Args:
        username: The user for whom the call is made.
        role: What the user may do.
        method: How the caller has proved it.
        team: The team that the call belongs to.
        key_id: The API key that was sent.
        limits: The limits of the key, the user and the team; all of them apply, beside those of the service.
    """

    username: str
    role: Role
    method: Method = "token"
    team: str | None = None
    key_id: str | None = None
    limits: tuple[Limited, ...] = ()

    @cached_property
    def models(self) -> frozenset[str] | None:
        """The models that all limits permit; None where none names models."""
        named = [frozenset(own.limits.models) for own in self.limits if own.limits.models is not None]
        return frozenset.intersection(*named) if named else None

    def may_ask(self, model: str) -> bool:
        """Whether all limits permit a model."""
        models = self.models
        return models is None or model in models

    def limited_by(self, team: str | None, limits: tuple[Limited, ...]) -> "Principal":
        """The same caller in a team and with limits."""
        return replace(self, team=team, limits=limits)


@dataclass(frozen=True, slots=True)
class SignedOut:
    """A token that is refused from now on.

    Args:
        method: How the token proves who its user is: ``token`` or ``oidc``.
        user: Whose it is.
        token: Tells it from all others, and is no secret.
        until_s: Unix time in seconds at which it expires.
    """

    method: Method
    user: str
    token: str
    until_s: float
