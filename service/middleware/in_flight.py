"""How many requests may be in flight, and how many bodies on their way."""

from service.errors import OverloadedError
from service.telemetry.instruments import Instruments

ARRIVING_PER_PLACE = 4
"""Bodies that may be on their way for each place in flight. They are counted apart: a place is for a request
whose body is there, or strangers who promise bodies and send none would take the places of callers."""


class InFlight:
    """The places, and the bodies on their way to one."""

    def __init__(self, places: int, instruments: Instruments) -> None:
        self.places = places
        self.taken = 0
        self.arriving = 0
        self.gauge = instruments.requests_in_flight
        self.rejected = instruments.requests_rejected

    def refuse(self) -> OverloadedError:
        """Count a rejection, and make its error."""
        self.rejected.add(1, {"reason": "overloaded"})
        return OverloadedError()


class Place:
    """One request's claim: first as a body on its way, then, with ``take``, as a request in flight."""

    def __init__(self, all_places: InFlight) -> None:
        self._all = all_places
        if all_places.arriving >= ARRIVING_PER_PLACE * all_places.places:
            raise all_places.refuse()
        all_places.arriving += 1
        self._taken = False

    def take(self) -> None:
        """Go from arriving to in flight; ``OverloadedError`` when there is no place."""
        if self._taken:
            return
        if self._all.taken >= self._all.places:
            raise self._all.refuse()
        self._all.arriving -= 1
        self._all.taken += 1
        self._all.gauge.add(1)
        self._taken = True

    def give_back(self) -> None:
        """Count no more, whatever it was."""
        if self._taken:
            self._all.taken -= 1
            self._all.gauge.add(-1)
        else:
            self._all.arriving -= 1
