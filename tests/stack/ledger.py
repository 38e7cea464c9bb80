"""What the callers saw: the numbers that Prometheus must agree with, and that do not come from it."""

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.harness import Answer


@dataclass(frozen=True)
class Entry:
    """One request and its end, in the caller's eyes."""

    route: str
    status: int
    error: str
    seconds: float
    trace_id: str
    model: str = ""
    outcome: str = ""
    attempts: int = 0
    cache: str = ""
    operation: str = "chat"
    streamed: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    first_piece_s: float | None = None
    upstream: str = ""
    at: float = field(default_factory=time.time)

    @property
    def cached(self) -> bool:
        """Whether the cache had the answer."""
        return self.outcome == "cached"


@dataclass
class Ledger:
    """All requests of the run."""

    entries: list[Entry] = field(default_factory=list)
    facts: Counter[str] = field(default_factory=Counter)
    moments: dict[str, float] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    """Traces of calls that the breaker had a part in, however they ended."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, entry: Entry) -> None:
        """Write one down."""
        with self._lock:
            self.entries.append(entry)

    def mark(self, moment: str) -> None:
        """Remember when something happened."""
        with self._lock:
            self.moments[moment] = time.time()

    def calls(self) -> Iterable[Entry]:
        """The model calls among them."""
        return [entry for entry in self.entries if entry.outcome]

    def by(self, *names: str, only: Iterable[Entry] | None = None) -> Counter[tuple[str, ...]]:
        """Count by these fields."""
        chosen = self.entries if only is None else only
        return Counter(tuple(str(getattr(entry, name)) for name in names) for entry in chosen)


def entry_of(route: str, answer: Answer, **more: Any) -> Entry:
    """Write an answer down; errors by the name in the body."""
    error = ""
    if answer.status >= 400:
        error = str(answer.json["error"])
    return Entry(route, answer.status, error, answer.seconds, answer.request_id, **more)
