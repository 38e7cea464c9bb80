"""A request's ``Cache-Control``, and the words for how a look-up ended."""

import re
from dataclasses import dataclass
from typing import Final, Literal

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

    def permits(self, age_s: float) -> bool:
        """Whether a stored answer of this age may be returned."""
        return self.max_age_s is None or age_s <= self.max_age_s


NO_DIRECTIVES: Final = CacheControl()


def parse_cache_control(header: str) -> CacheControl:
    """Parse a ``Cache-Control`` header field; unknown directives are ignored, as the RFC requires."""
    if not header:
        return NO_DIRECTIVES
    directives = [part.strip() for part in header.split(",")]
    names = {directive.lower() for directive in directives}
    ages = [int(match[1]) for directive in directives if (match := MAX_AGE.fullmatch(directive))]
    max_age_s = min(ages) if ages else None
    return CacheControl("no-cache" not in names and max_age_s != 0, "no-store" not in names, max_age_s)
