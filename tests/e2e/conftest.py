"""Names what the end-to-end tests left out, in the last lines of a run."""

import pytest

from tests.e2e.clients.runtimes import left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each client library without its runtime."""
    for script in left_out():
        terminalreporter.write_line(f"Left out: {script.name}; it needs {script.needs}.")
