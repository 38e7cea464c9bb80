"""What a caller wants of the cache, and what came of it for one call."""

import re
from dataclasses import dataclass
from typing import Literal

Result = Literal["hit", "miss", "bypass", "error"]
Kind = Literal["exact", "semantic"]

MAX_AGE = re.compile(r'max-age\s*=\s*"?(\d{1,10})"?', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CacheWish:
    """What a request's ``Cache-Control`` asks for (RFC 9111, section 5.2.1).

    Args:
        read: Whether a stored answer may be given.
        store: Whether the answer may be stored.
        max_age_s: The oldest stored answer that will do, in seconds; None for any that is good.
    """

    read: bool = True
    store: bool = True
    max_age_s: int | None = None

    def permits(self, age_s: float) -> bool:
        """Whether a stored answer of this age will do."""
        return self.max_age_s is None or age_s <= self.max_age_s


ANY = CacheWish()


def wish_of(cache_control: str) -> CacheWish:
    """The wish in a header field; what is not known in it is passed over, as the RFC asks."""
    if not cache_control:
        return ANY
    directives = [part.strip() for part in cache_control.split(",")]
    given = {directive.lower() for directive in directives}
    ages = [int(match[1]) for directive in directives if (match := MAX_AGE.fullmatch(directive))]
    max_age_s = min(ages) if ages else None
    return CacheWish("no-cache" not in given and max_age_s != 0, "no-store" not in given, max_age_s)


@dataclass(slots=True)
class CacheUse:
    """What came of the cache for one call.

    Args:
        result: How the look-up ended.
        kind: The look-up that ended it.
        shared: Whether the answer is that of a call which was under way.
        age_s: How old the stored answer is, in seconds.
        similarity: How like the stored question is; of a semantic hit only.
        lookup_s: Seconds that looking took.
        saved_tokens: Tokens that this call did not cost.
        saved_cost: US dollars that it did not cost.
    """

    result: Result = "bypass"
    kind: Kind = "exact"
    shared: bool = False
    age_s: float = 0.0
    similarity: float | None = None
    lookup_s: float = 0.0
    saved_tokens: int = 0
    saved_cost: float | None = None

    @property
    def seen(self) -> Literal["hit", "miss", "bypass"]:
        """The result as callers and records have it: a cache that failed is one that had nothing."""
        return "miss" if self.result == "error" else self.result
