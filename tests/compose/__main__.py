"""docker-compose.yml in containers, without Docker: `python -m tests.compose` (`make compose-test`).

Prints a table of what held; `--write` puts it into tests/compose/RESULTS.md. The exit status is 1 when
anything did not, and 2 when the machine cannot run it.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import yaml

from deploy.backends import ROOT
from deploy.child import DemoError
from tests.compose import checks
from tests.compose.engine import PODMAN_COMPOSE, Engine, EngineError, missing
from tests.compose.images import PACKAGED, STAND_INS, WRAPPED, Images
from tests.compose.stack import Stack, new_settings

FAILURES = (
    *(AssertionError, EngineError, DemoError, OSError, HTTPException),
    *(LookupError, ValueError, subprocess.TimeoutExpired),
)
RESULTS = ROOT / "tests/compose/RESULTS.md"


@dataclass
class Table:
    """What was checked, row by row, printed as it comes."""

    rows: list[tuple[str, str, bool, str]] = field(default_factory=list)

    def check(self, profile: str, what: str, ask: Callable[[], str]) -> bool:
        """Ask, and keep what was said."""
        try:
            said, held = ask(), True
        except FAILURES as error:
            said, held = f"{error}" or type(error).__name__, False
        said = re.sub(r"\s+", " ", said).replace("|", "/")[:400]
        self.rows.append((profile, what, held, said))
        print(f"{'ok   ' if held else 'FAILS'} {profile}: {what}: {said}", flush=True)
        return held

    def markdown(self) -> str:
        """All of it."""
        lines = ["| profile | what | | seen |", "|---|---|---|---|"]
        lines += [
            f"| {profile} | {what} | {'ok' if held else 'FAILS'} | {said} |"
            for profile, what, held, said in self.rows
        ]
        return "\n".join(lines)

    @property
    def held(self) -> bool:
        """Whether everything did."""
        return all(held for _, _, held, _ in self.rows)


def prove(table: Table, stack: Stack, asked: dict[str, checks.Check]) -> None:
    """Bring one profile up and ask everything of it."""
    profile = stack.profile
    if not table.check(profile, "created", stack.create):
        return
    good: set[str] = set()
    for service in stack.order():
        if table.check(profile, f"{service} comes up", partial(stack.start, service, good)):
            good.add(service)
    for what, ask in asked.items():
        table.check(profile, what, partial(ask, stack))


def described(engine: Engine, python: str, sizes: dict[str, int], took_s: float) -> str:
    """On what it ran."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown"
        )
    compose = subprocess.run(
        [str(PODMAN_COMPOSE), "version"], capture_output=True, text=True, check=False
    ).stdout
    version = re.search(r"podman-compose version:? (\S+)", compose)
    stands = ", ".join(sorted(STAND_INS.keys() - PACKAGED.keys()))
    packaged = ", ".join(sorted(PACKAGED))
    wrapped = ", ".join(sorted(WRAPPED))
    mb = ", ".join(f"{image} {size / 1e6:.0f} MB" for image, size in sizes.items())
    about = [
        f"{datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores of {model}, Linux {platform.release()};",
        f"{engine.version()}, podman-compose {version[1] if version else '?'}; {took_s / 60:.0f} minutes.",
        "",
        f"- Base: Debian trixie by debootstrap with Python {python}, tagged as the Dockerfiles name it. The",
        "  published base has a Python of its own, of the patch version that its tag says.",
        f"- Built from this tree, on that base: {mb}.",
        f"- Real programs, built from source, in images with the published users and folders: {wrapped}.",
        f"- Real programs from a package, begun by a script of ours as the published one does: {packaged}.",
        f"- Stand-ins, with the published users, folders and ports: {stands}. They write to their volumes",
        "  and answer their health checks; what the real ones do beyond that is not shown here.",
        "- Not shown: Docker, its own compose, its timers for health checks. A check runs as the file says.",
    ]
    return "\n".join(about) + "\n"


def main() -> int:
    """Make the images, prove both profiles, say what held."""
    parser = argparse.ArgumentParser(prog="python -m tests.compose", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write tests/compose/RESULTS.md")
    parser.add_argument(
        "--file", type=Path, default=ROOT / "docker-compose.yml", help="another file than the project's"
    )
    parser.add_argument("--only", choices=("full", "lite"), help="one profile")
    parser.add_argument("--can", action="store_true", help="only say whether this machine can run it")
    given = parser.parse_args()
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    if given.can:
        return 0
    begun = time.monotonic()
    composed: dict[str, Any] = yaml.safe_load(given.file.read_text(encoding="utf-8"))
    engine = Engine()
    table = Table()
    try:
        images = Images(engine, composed["services"])
        python = images.make()
        profiles: dict[str, tuple[dict[str, checks.Check], dict[str, str]]] = {
            "full": (checks.FULL, {"OTEL_METRIC_EXPORT_INTERVAL": "5000"}),
            "lite": (checks.LITE, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}),
        }
        for profile, (asked, settings) in profiles.items():
            if given.only in {None, profile}:
                with Stack(engine, composed, profile, new_settings(**settings)) as stack:
                    prove(table, stack, asked)
        head = described(engine, python, images.sizes(), time.monotonic() - begun)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{head}\n{table.markdown()}")
    if given.write:
        RESULTS.write_text(
            f"# docker-compose.yml in containers, by `make compose-test`\n\n{head}\n{table.markdown()}\n"
        )
    return 0 if table.held else 1


if __name__ == "__main__":
    sys.exit(main())
