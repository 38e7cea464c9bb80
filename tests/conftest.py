"""Fixtures that every layer of tests uses."""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import settings as hypothesis_settings

from service.config.settings import PASSED_THROUGH, Settings, prepare_environment
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import FakeUpstream
from tests.harness import AppUnderTest, cover_processes, running_app

# How long an example takes depends on the machine.
hypothesis_settings.register_profile("tests", deadline=None)
hypothesis_settings.load_profile("tests")

MAX_RERUN = 5
"""Tests of a run that may pass at a second try; more of them are a fault, and not the machine's."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in which many tests passed only at their second try."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    rerun = reporter.stats.get("rerun", [])
    if len(rerun) > MAX_RERUN and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"\n{len(rerun)} tests were run twice; at most {MAX_RERUN} may be.")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the processes of tests marked ``covered`` measure coverage, and those of other e2e tests not."""
    e2e, covered = (item.get_closest_marker(name) is not None for name in ("e2e", "covered"))
    cover_processes(covers=covered or not e2e)


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> None:
    """No variable of the machine reaches a test, and the OpenTelemetry packages read what they would."""
    ours = {name.upper() for name in Settings.model_fields} | set(PASSED_THROUGH)
    for name in [name for name in os.environ if name.upper() in ours or name.startswith("OTEL_")]:
        del os.environ[name]
    prepare_environment()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Put back what ``configure_logging`` changes for the whole process."""
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    yield
    root.handlers[:], logging.raiseExceptions = handlers, raising
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = True
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    """A scriptable upstream in LiteLLM's place."""
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """A receiver in the collector's place."""
    with OtlpReceiver() as fake:
        yield fake


@pytest.fixture
def service(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    """The whole app on a real socket, its telemetry in memory."""
    with running_app(litellm_url=upstream.url) as app:
        yield app
