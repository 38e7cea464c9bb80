"""The service level objectives: their targets, window and routes.

The rules in `otel/rules/` and the collector's tail sampling repeat these numbers; tests compare them.
"""

from dataclasses import dataclass
from typing import Final

WINDOW: Final = "30d"
SLOW_S: Final = 10
"""Seconds within which a model call should be answered; a bucket bound of `http.server.request.duration`."""

NOT_SERVED: Final = "/|/docs.*|/openapi.json|/health.*"
"""Routes outside the objectives: probes and documentation."""

CALLS: Final = "/llm/generate|/v1/chat/completions|/v1/embeddings"
"""Routes that call a model."""


@dataclass(frozen=True)
class Objective:
    """One objective; ``llmops:<name>:error_ratio_rate<window>`` is its recorded ratio of failures."""

    name: str
    target: float

    @property
    def budget(self) -> float:
        """The share of requests that may fail."""
        return round(1 - self.target, 6)

    def ratio(self, window: str) -> str:
        """Return the name of the recorded share of failures over a window."""
        return f"llmops:{self.name}:error_ratio_rate{window}"


AVAILABILITY: Final = Objective("availability", 0.995)
LATENCY: Final = Objective("latency", 0.95)
OBJECTIVES: Final = (AVAILABILITY, LATENCY)
