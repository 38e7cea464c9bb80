"""The rows of the attack: what is sent, what is wanted, and the check of both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Finding:
    """What came of a row: what was seen, and what is otherwise than wanted."""

    seen: str = ""
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: object, problem: str) -> None:
        """Note the problem unless the condition holds."""
        if not holds:
            self.problems.append(problem)

    def say(self, what: str) -> None:
        """Add to what was seen."""
        self.seen = f"{self.seen}; {what}" if self.seen else what


@dataclass(frozen=True)
class Row(Generic[T]):
    """One attack.

    Args:
        name: What it is about.
        sent: What is sent.
        wanted: What is to come of it.
        play: Sends it.
    """

    name: str
    sent: str
    wanted: str
    play: Callable[[T, Finding], None]

    def verdict(self, target: T) -> Finding:
        """Play the row; an exception is a problem too, as the service was not to be stopped by it."""
        finding = Finding()
        try:
            self.play(target, finding)
        except Exception as error:  # noqa: BLE001 - whatever it is, the row did not go as it should
            finding.problems.append(f"{type(error).__name__}: {error}")
        return finding


class Rows(Generic[T]):
    """The rows of one kind, in the order in which they are written."""

    def __init__(self) -> None:
        self.all: list[Row[T]] = []

    def row(
        self, name: str, sent: str, wanted: str
    ) -> Callable[[Callable[[T, Finding], None]], Callable[[T, Finding], None]]:
        """Make a row of a function."""

        def add(play: Callable[[T, Finding], None]) -> Callable[[T, Finding], None]:
            self.all.append(Row(name, sent, wanted, play))
            return play

        return add
