"""The run that the proof is about: made once, then looked at from all sides."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.stack.proof import Row, table
from tests.stack.traffic import Mix
from tests.stack.world import World

SETTLED_S = 35
"""Until rules are evaluated, traces decided on, and each series is long enough."""

_ROWS = pytest.StashKey[list[Row]]()


@dataclass
class Run:
    """The world after the mix, and the moment at which it is looked at."""

    world: World
    mix: Mix
    at: float
    rows: list[Row] = field(default_factory=list)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Run]:
    with World(tmp_path_factory.mktemp("stack")) as world:
        mix = Mix(world)
        mix.play()
        time.sleep(SETTLED_S)
        found = Run(world, mix, time.time())
        request.config.stash[_ROWS] = found.rows
        yield found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of the proof."""
    rows = terminalreporter.config.stash.get(_ROWS, [])
    if rows:
        terminalreporter.write_line(table(rows))
        agreed = sum(not row.differences for row in rows)
        terminalreporter.write_line(f"{agreed} of {len(rows)} queries agree with what callers saw")
