"""The table as a product: every fault on every route, whole and, where there are streams, streamed."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.fakes.upstream import Behaviour
from tests.faults.own import Given
from tests.faults.routes import ROUTES, Route
from tests.faults.table import FAULTS, Fault
from tests.harness import Answer


@dataclass(frozen=True, eq=False)
class Case:
    """One fault on one route.

    Args:
        fault: The fault.
        route: The route.
        streamed: Whether the call asks for a stream.
    """

    fault: Fault
    route: Route = field(default_factory=lambda: ROUTES["generate"])
    streamed: bool = False

    @property
    def behaviours(self) -> list[Behaviour]:
        """What the upstream does."""
        given = Given(self.route, self.streamed)
        return [one(given) if callable(one) else one for one in self.fault.behaviours]

    @property
    def given(self) -> Given:
        """What the upstream would answer."""
        return Given(self.route, self.streamed)

    @property
    def seen(self) -> int:
        """Requests that the upstream must really see."""
        repeats = self.fault.repeated and self.route.row.method != "POST"
        return self.fault.seen * (2 if repeats else 1)

    @property
    def body(self) -> tuple[bytes, str]:
        """What the caller sends, and its content type."""
        return self.route.body(streamed=self.streamed)

    @property
    def group(self) -> str:
        """The name of all cases of a route that ask for a stream, or of those that do not."""
        return f"{self.route.name}, streamed" if self.streamed else self.route.name

    def __str__(self) -> str:
        return f"{self.group}: {self.fault.name}"


@dataclass(frozen=True)
class Outcome:
    """What came of one case: the answer, the requests that the upstream saw, the request's log lines.

    ``left`` says whether the upstream was still at it when the service went away, ``parents`` holds the span
    ids in the requests' headers, ``complete`` whether the answer's body ended in order.
    """

    answer: Answer
    seen: int
    messages: list[str]
    left: bool = False
    parents: frozenset[str] = frozenset()
    complete: bool = True


def product(faults: Iterable[Fault] = FAULTS, routes: Iterable[Route] = tuple(ROUTES.values())) -> list[Case]:
    """All cases of these faults on these routes, in the order of the routes."""
    rows = list(faults)
    return [
        Case(fault, route, streamed)
        for route in routes
        for streamed in ((False, True) if route.events else (False,))
        for fault in rows
        if Given(route, streamed).kind in fault.calls
    ]
