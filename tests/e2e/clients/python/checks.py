"""What the libraries' scripts share: their checks run one by one, and each says that it has passed.

The scripts run with the libraries' own Python, so this imports nothing that is not in its standard library.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

QUESTION: Final = "What is a trace?"
TEXT: Final = "A trace is the path of one request."
AGAIN: Final = f"As I said: {TEXT}"
PICTURE: Final = "I see a picture."
THOUGHT: Final = "They want a definition."
TOOL_SAYS: Final = "The tool says: 21"
PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
LOCATION: Final = {
    "type": "object",
    "properties": {"location": {"type": "string"}},
    "required": ["location"],
    "additionalProperties": False,
}

Check = tuple[str, "Callable[[], Any]"]


class Checks:
    """The checks of a script, in the order in which they stand there."""

    def __init__(self) -> None:
        self._checks: list[Check] = []

    def __call__(self, name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """Mark a function, which may be asynchronous, as the check of this name."""

        def marked(function: Callable[[], Any]) -> Callable[[], Any]:
            self._checks.append((name, function))
            return function

        return marked

    def run(self) -> None:
        """Run all of them, one line of JSON for each that passes; the exit status tells whether all did."""
        # One loop for all: a library's connections belong to the loop that they were opened in.
        with asyncio.Runner() as runner:
            failed = [name for name, function in self._checks if not _passes(name, function, runner)]
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")


def _passes(name: str, function: Callable[[], Any], runner: asyncio.Runner) -> bool:
    try:
        if inspect.iscoroutinefunction(function):
            runner.run(function())
        else:
            function()
    except Exception:  # noqa: BLE001 - the next check is run all the same
        print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)  # noqa: T201 - the test shows it
        return False
    print(json.dumps({"check": name}), flush=True)  # noqa: T201 - read by the test
    return True


def fails(kind: type[BaseException], call: Callable[[], Any]) -> Any:
    """The error of this kind that the call raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"it should have raised {kind.__name__}")
