"""Which models may be asked for: those of the upstream's list, as far as the list is known."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

from service.errors import ServiceError
from service.upstream.errors import unknown_model
from service.utils.deadline import Deadline

MIN_AGE_S: Final = 10.0
"""A list that is younger is not read again for a name that is not on it. So callers who ask for unknown names
cause at most one reading of the list in this time, whatever their number."""

READ_LIMIT_S: Final = 5.0
"""How long a call waits for the list to be read again."""

WILDCARD: Final = "*"
"""In a name of LiteLLM's, stands for any text."""


class OfferedModels:
    """The names of the models that the upstream offers.

    Where the list could not be read the last time, or is empty, every name passes: the upstream knows better.

    Args:
        read: Reads the list anew and calls ``learn``; raises a ``ServiceError`` where that fails.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self, read: Callable[[], Awaitable[None]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._clock = clock
        self._names: frozenset[str] = frozenset()
        self._patterns: tuple[re.Pattern[str], ...] = ()
        self._known = False
        self._read_at: float | None = None
        self._reading = asyncio.Lock()

    def learn(self, names: Collection[str], wildcards: Iterable[str] | None = None) -> None:
        """Take a list that was read; its wildcards are those of before where it does not show them."""
        self._names = frozenset(names)
        if wildcards is not None:
            # As LiteLLM reads them.
            parts = (map(re.escape, name.split(WILDCARD)) for name in wildcards)
            self._patterns = tuple(re.compile(".*".join(part), re.DOTALL) for part in parts)
        self._known = bool(self._names or self._patterns)
        self._read_at = self._clock()

    async def refresh(self) -> bool:
        """Read the list; whether that succeeded. It is read once at a time."""
        async with self._reading:
            return await self._refresh()

    async def check(self, model: str, deadline: Deadline) -> None:
        """Raise ``BadRequestError`` for a model that is not offered, after another look where that is due."""
        if self._offers(model):
            return
        try:
            async with asyncio.timeout(min(READ_LIMIT_S, deadline.left_s)), self._reading:
                if self._read_at is None or self._clock() - self._read_at >= MIN_AGE_S:
                    await self._refresh()
        except TimeoutError:
            # A call must not fail, or wait, because the list is slow.
            return
        if not self._offers(model):
            raise unknown_model(model)

    async def _refresh(self) -> bool:
        # Also where reading fails: it is not tried for every call.
        self._read_at = self._clock()
        try:
            await self._read()
        except ServiceError:
            self._known = False
            return False
        return True

    def _offers(self, model: str) -> bool:
        return (
            not self._known
            or model in self._names
            or any(pattern.fullmatch(model) for pattern in self._patterns)
        )
