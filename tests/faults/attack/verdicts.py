"""What is wrong with a whole run: the log, the memory, and the second user's calls."""

import json
from collections.abc import Sequence
from typing import Any, Final

from tests.faults.attack.grammar import MARK

DELIBERATE: Final = "Giving up after attempt"
"""How the message begins of the only ERROR that a broken upstream causes."""

MAX_GROWTH: Final = 2.0
"""Memory after the run in memories before it: the allocator keeps some of what large answers took."""

MIN_CALLS: Final = 100
MAX_SHOWN: Final = 3


def decoded(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of a log, and those that are no JSON object."""
    lines, wrong = [], []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            lines.append(value)
        else:
            wrong.append(line)
    return lines, wrong


def of_log(text: str, answered: frozenset[str] = frozenset()) -> list[str]:
    """Say what is wrong with what the service wrote.

    Args:
        text: All of it.
        answered: Trace ids from bodies that became requests, as the bytes around them were damaged.
    """
    lines, wrong = decoded(text)
    errors = [
        line
        for line in lines
        if line.get("level") in {"ERROR", "CRITICAL"} and not str(line.get("message")).startswith(DELIBERATE)
    ]
    stacks = [line for line in lines if "exception.stacktrace" in line]
    traps = {str(line.get("request_id", "")) for line in lines}
    traps = {trap for trap in traps if trap.startswith(MARK)} - answered
    problems = [f"a line that is not JSON: {line[:200]}" for line in wrong[:MAX_SHOWN]]
    problems += [f"an ERROR: {json.dumps(line)[:500]}" for line in errors[:MAX_SHOWN]]
    problems += [f"a stack trace: {json.dumps(line)[:500]}" for line in stacks[:MAX_SHOWN]]
    return problems + [f"bytes of a body became the request {trap}" for trap in sorted(traps)[:MAX_SHOWN]]


def of_memory(before: int, after: int) -> list[str]:
    """Say whether the memory has grown too much."""
    return [f"memory grew {after / before:.2f} times"] if after > MAX_GROWTH * before else []


def of_second_user(made: int, failures: Sequence[str]) -> list[str]:
    """Say which of the second user's calls failed; too few calls prove nothing."""
    problems = [f"the second user: {failure}" for failure in failures[:MAX_SHOWN]]
    if len(failures) > MAX_SHOWN:
        problems.append(f"... and {len(failures) - MAX_SHOWN} more")
    if made < MIN_CALLS:
        problems.append(f"the second user made {made} calls, fewer than {MIN_CALLS}")
    return problems
