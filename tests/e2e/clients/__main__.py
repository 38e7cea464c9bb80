"""``make clients``: builds the clients' programs and plays them against the service and a real LiteLLM.

``--write`` puts the table into RESULTS.md, beside this file, below the marker. The exit status is 1 when a
program could not be built or a check did not pass, and in CI also when something was left out.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tests.e2e.clients.programs import BUILT, FOLDER, QUICK, FailedError, Program, in_ci
from tests.e2e.clients.world import running_world

RESULTS: Final = FOLDER / "RESULTS.md"
MARKER: Final = "<!-- written by make clients -->\n"


@dataclass(frozen=True)
class Row:
    """What came of one program.

    Args:
        client: Its name.
        version: The client's.
        checks: Those that passed.
        seconds: How long they took, without the build.
        failure: Why it failed; empty when it did not.
    """

    client: str
    version: str = ""
    checks: Sequence[str] = ()
    seconds: float = 0.0
    failure: str = ""


def built(program: Program, folder: Path) -> Row | None:
    """Build a program; a row where that failed."""
    try:
        program.build(folder)
    except FailedError as error:
        return Row(program.name, failure=f"cannot be built: {error}")
    return None


def played(program: Program, folder: Path, environment: Mapping[str, str]) -> Row:
    """Play a program that is built."""
    told = program.version(folder)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        try:
            checks = program.play(folder, Path(home), environment)
        except FailedError as error:
            return Row(program.name, told, failure=str(error))
    return Row(program.name, told, checks, time.monotonic() - started)


def results(rows: Sequence[Row], left_out: Sequence[Program], litellm: str) -> str:
    """What RESULTS.md has below the marker."""
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    lines = [
        "",
        "## Played with `make clients`",
        "",
        f"In front of LiteLLM {litellm}; {machine}; {day}. A check is something that a user of the client",
        "does; the programs are beside this file.",
        "",
        "| client | version | checks that passed | seconds |",
        "|---|---|---|---|",
    ]
    for row in rows:
        passed = f"{len(row.checks)}: {', '.join(row.checks)}"
        lines.append(f"| {row.client} | {row.version} | {passed} | {row.seconds:.1f} |")
    for program in left_out:
        lines += ["", program.excuse]
    return "\n".join(lines) + "\n"


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Build, play and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.clients", description=__doc__)
    parser.add_argument("parts", nargs="*", help="parts of names: only the clients whose name contains one")
    parser.add_argument("--folder", type=Path, help="where builds are kept", required=True)
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    arguments = parser.parse_args()
    if arguments.write and arguments.parts:
        parser.error("--write is for a run of all clients")
    chosen = [
        program
        for program in (*QUICK, *BUILT)
        if not arguments.parts or any(part.lower() in program.name.lower() for part in arguments.parts)
    ]
    if not chosen:
        parser.error(f"no client has any of {arguments.parts} in its name")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    left_out = [program for program in chosen if program.missing]
    rows = play_all([program for program in chosen if not program.missing], arguments.folder.resolve())
    for program in left_out:
        say(program.excuse)
    failed = [row for row in rows if row.failure]
    say(f"{len(rows) - len(failed)} clients passed, {len(failed)} failed, {len(left_out)} left out")
    if arguments.write and not failed:
        litellm = next(row.version for row in rows if row.client == "LiteLLM's SDK")
        by_hand, marker, _ = RESULTS.read_text().partition(MARKER)
        RESULTS.write_text(by_hand + marker + results(rows, left_out, litellm))
    return int(bool(failed) or (in_ci() and bool(left_out)))


def play_all(programs: Sequence[Program], folder: Path) -> list[Row]:
    """Build the programs, one after the other, and play those that could be built."""
    rows: list[Row] = []
    ready: list[Program] = []
    for program in programs:
        started = time.monotonic()
        failed = built(program, folder)
        if failed is not None:
            rows.append(failed)
            say(f"{program.name}: {failed.failure}")
            continue
        ready.append(program)
        if program in BUILT:
            say(f"{program.name}: built in {time.monotonic() - started:.0f} s")
    if not ready:
        return rows
    with tempfile.TemporaryDirectory() as litellm, running_world(Path(litellm)) as world:
        for program in ready:
            row = played(program, folder, world.environment())
            rows.append(row)
            outcome = row.failure or f"{len(row.checks)} checks passed in {row.seconds:.1f} s"
            say(f"{row.client} {row.version}: {outcome}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
