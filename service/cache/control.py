"""Which calls use the cache, by their ``Cache-Control`` and more, and the words for how a look-up ended."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Sampled = Literal["never", "ask", "generate", "always"]
Result = Literal["hit", "miss", "bypass", "error"]
Kind = Literal["exact", "semantic"]

MAX_AGE = re.compile(r'max-age\s*=\s*"?(\d{1,10})"?', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CacheControl:
    """The directives of a request's ``Cache-Control`` (RFC 9111, section 5.2.1).

    Args:
        read: Whether a stored answer may be returned; False after ``no-cache``.
        store: Whether the answer may be stored; False after ``no-store``.
        max_age_s: The largest acceptable age of a stored answer, in seconds; None for any age.
    """

    read: bool = True
    store: bool = True
    max_age_s: int | None = None

    @property
    def shares(self) -> bool:
        """Whether the caller takes the answer of an equal call under way, which is as new as one can be."""
        return self.read and self.store

    def permits(self, age_s: float) -> bool:
        """Whether a stored answer of this age may be returned."""
        return self.max_age_s is None or age_s <= self.max_age_s


NO_DIRECTIVES: Final = CacheControl()
BYPASS: Final = CacheControl(read=False, store=False)


def parse_cache_control(header: str) -> CacheControl:
    """Parse a ``Cache-Control`` header field; unknown directives are ignored, as the RFC requires."""
    if not header:
        return NO_DIRECTIVES
    directives = [part.strip() for part in header.split(",")]
    names = {directive.lower() for directive in directives}
    ages = [int(match[1]) for directive in directives if (match := MAX_AGE.fullmatch(directive))]
    max_age_s = min(ages) if ages else None
    return CacheControl("no-cache" not in names and max_age_s != 0, "no-store" not in names, max_age_s)


def applied(
    control: CacheControl, body: Mapping[str, Any], sampled: Sampled, *, own_protocol: bool
) -> CacheControl:
    """The directives for a call: its own, or ``BYPASS`` where the cache is not for such calls.

    A sampled answer is not the answer: who asks again under OpenAI's protocol wants another one, unless the
    call says that a stored one will do.

    Args:
        control: The request's ``Cache-Control``.
        body: The request in OpenAI's shape.
        sampled: Which calls with a sampled answer use the cache.
        own_protocol: Whether the call came in this service's own protocol, whose answers say where they
            come from.
    """
    if sampled == "always" or (sampled == "generate" and own_protocol) or is_deterministic(body):
        return control
    # Who asks for an answer of a certain age also leaves one for others who ask.
    asks = sampled != "never" and control.max_age_s is not None
    return control if asks else BYPASS


def is_deterministic(body: Mapping[str, Any]) -> bool:
    """Whether a request is for the one most likely answer, or names a seed."""
    temperature, seed = body.get("temperature"), body.get("seed")
    return (type(temperature) in {int, float} and temperature == 0) or type(seed) is int
