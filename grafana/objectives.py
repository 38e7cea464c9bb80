"""The service level objectives: what counts, how much of it, over which time.

The rules in `otel/rules/` and the collector's tail sampling have the same numbers; tests hold them together.
"""

from dataclasses import dataclass
from typing import Final

WINDOW: Final = "30d"
SLOW_S: Final = 10
"""Seconds within which a model call should be answered; a bucket bound of `http.server.request.duration`."""

NOT_SERVED: Final = "/|/docs.*|/openapi.json|/health.*"
"""Routes that are no part of the objective: probes and documentation."""

CALLS: Final = "/llm/generate|/v1/chat/completions|/v1/embeddings"
"""Routes on which a model is asked."""


@dataclass(frozen=True)
class Objective:
    """One objective; its recorded ratio of failures is ``llmops:<name>:error_ratio_rate<window>``."""

    name: str
    target: float

    @property
    def budget(self) -> float:
        """The share that may fail."""
        return round(1 - self.target, 6)

    def ratio(self, window: str) -> str:
        """The recorded share that failed over a window."""
        return f"llmops:{self.name}:error_ratio_rate{window}"


AVAILABILITY: Final = Objective("availability", 0.995)
LATENCY: Final = Objective("latency", 0.95)
OBJECTIVES: Final = (AVAILABILITY, LATENCY)
