"""What the processes of the request matrix exported, and wrote to stdout."""

from dataclasses import dataclass, field
from typing import Any

from tests.fakes.otlp_records import Log, Point, Span


@dataclass(frozen=True)
class Capture:
    """All of it, as flat records."""

    spans: list[Span] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def resources(self) -> list[dict[str, Any]]:
        """The resources of all signals, each once."""
        found = {repr(sorted(record.resource.items())): record.resource for record in self._records}
        return list(found.values())

    @property
    def _records(self) -> list[Span | Log | Point]:
        return [*self.spans, *self.logs, *self.points]

    def of(self, service: str) -> "Capture":
        """What the processes of one ``service.name`` exported."""

        def own(record: Span | Log | Point) -> bool:
            return bool(record.resource.get("service.name") == service)

        return Capture(
            [span for span in self.spans if own(span)],
            [log for log in self.logs if own(log)],
            [point for point in self.points if own(point)],
            self.lines,
        )
