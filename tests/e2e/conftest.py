"""Fixtures of the end-to-end tests, and in the last lines of a run what they left out."""

from collections.abc import Iterator

import pytest

from tests.e2e.clients.programs import QUICK
from tests.e2e.clients.runtimes import left_out
from tests.fakes.mlflow import FakeMlflow


@pytest.fixture
def mlflow() -> Iterator[FakeMlflow]:
    """A scriptable server in MLflow's place."""
    with FakeMlflow() as fake:
        yield fake


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each client library without its runtime."""
    for script in left_out():
        terminalreporter.write_line(f"Left out: {script.name}; it needs {script.needs}.")
    for program in QUICK:
        if program.missing:
            terminalreporter.write_line(
                f"Left out: {program.name}; it needs {' and '.join(program.missing)}."
            )
