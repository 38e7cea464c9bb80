"""What the agents' programs share: they run an agent as a script does, and say what came of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TEXT = "A trace is the path of one request."
QUESTION = "What is a trace?"
LIMIT_S = 100


def passed(check: str) -> None:
    """Say that a check is done."""
    print(json.dumps({"check": check}), flush=True)  # noqa: T201 - read by the test


def run_agent(
    command: list[str], *arguments: str, environment: dict[str, str] | None = None, fails: bool = False
) -> str:
    """Run the agent in the working directory; what it wrote to stdout.

    Args:
        command: What starts it.
        arguments: Its arguments.
        environment: Variables over those of this process.
        fails: Whether it is expected to end with another exit status than 0.
    """
    ended = subprocess.run(
        [*command, *arguments],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (ended.returncode != 0) == fails, f"exit status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def events_of(output: str) -> list[dict[str, Any]]:
    """The lines of an agent that writes JSON."""
    return [json.loads(line) for line in output.splitlines()]


def installed(script: str) -> list[str]:
    """The command of an agent from npm; the first argument of the program is where the packages are."""
    return ["node", str(Path(sys.argv[1], "node_modules", script))]
