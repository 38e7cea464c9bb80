"""Counts calls against limits: in this process's memory, or in a Valkey server for several processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from service.shared.exchange import Exchange, Request, ServerFailedError, Waited
from service.utils.rates import Rate, Window

How = Literal["together", "alone", "look"]
"""How a limit counts a call: only if all limits that count it together have room, if it has room itself, or
not at all."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit that applies to a call.

    Args:
        rate: What is allowed; it also holds this process's own count.
        key: Whose events these are.
        how: How the call is counted.
    """

    rate: Rate
    key: str
    how: How = "together"


@dataclass(frozen=True, slots=True)
class Counted:
    """What came of a count.

    Args:
        allowed: Whether all limits that count the call together had room.
        windows: The state of each limit after the count, in the order of the limits.
    """

    allowed: bool
    windows: Sequence[Window]


@dataclass(frozen=True, slots=True)
class Count(Request[Counted]):
    """Asks the server to count one call against all limits.

    Args:
        limits: Those that apply.
    """

    limits: Sequence[Limit]

    @property
    def operation(self) -> Literal["count", "look"]:
        """Its name on the metrics."""
        return "look" if all(limit.how == "look" for limit in self.limits) else "count"


class Counts(Protocol):
    """Counts calls against limits."""

    async def count(self, limits: Sequence[Limit], waited: Waited | None = None) -> Counted:
        """Count one call against all limits, at the same moment; it always ends well.

        Args:
            limits: Those that apply.
            waited: What the request has waited before; what this count waits is added.
        """
        ...


class LocalCounts:
    """Counts in this process's memory."""

    async def count(self, limits: Sequence[Limit], waited: Waited | None = None) -> Counted:
        """Count one call against all limits."""
        del waited
        if len(limits) == 1 and limits[0].how != "look":
            # Nearly every call.
            allowed, window = limits[0].rate.count(limits[0].key)
            return Counted(allowed or limits[0].how == "alone", [window])
        together = [limit for limit in limits if limit.how == "together"]
        allowed = all(limit.rate.count(limit.key, takes=False)[0] for limit in together)
        taking = {"together": allowed, "alone": True, "look": False}
        return Counted(allowed, [limit.rate.count(limit.key, takes=taking[limit.how])[1] for limit in limits])


class SharedCounts:
    """Counts in the server, and in this process's memory while the server cannot be had.

    A call that the server allowed is counted in memory too, so that nobody begins with a whole window when
    the server fails.

    Args:
        exchange: Asks the server.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._local = LocalCounts()

    async def count(self, limits: Sequence[Limit], waited: Waited | None = None) -> Counted:
        """Count one call against all limits, in the server if it answers in time."""
        try:
            counted = await self._exchange.ask(Count(limits), waited or Waited())
        except ServerFailedError:
            return await self._local.count(limits)
        for limit in limits:
            if limit.how == "alone" or (limit.how == "together" and counted.allowed):
                await limit.rate.hit(limit.key)
        return counted
