"""What several unit tests need: a configuration, the lines that the process writes, databases."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import argon2
import pytest
from opentelemetry.sdk._logs import LoggerProvider

from service.config.env_validator import Report, read_settings
from service.config.logging import configure_logging
from tests.harness import new_secrets
from tests.postgresql import PostgreSql
from tests.unit.resilience import Readable, readable

Read = Callable[..., Report]


@pytest.fixture
def metrics() -> Iterator[Readable]:
    """Instruments whose values can be read."""
    with readable() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that no ``.env`` of the machine is read."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Read the configuration from the required variables and these; None takes a variable away."""
    assert not (folder / ".env").exists()
    required = {name.upper(): value for name, value in new_secrets().items()}

    def from_variables(**variables: str | None) -> Report:
        for name, value in (required | variables).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        return read_settings()

    return from_variables


class Lines:
    """What ``configure_logging`` makes of the process's lines."""

    def __init__(self) -> None:
        self._stream = io.StringIO()

    def configure(self, level: str = "DEBUG", provider: LoggerProvider | None = None) -> None:
        """Route the lines here."""
        configure_logging(level, provider, self._stream)

    @property
    def text(self) -> str:
        """The lines as they are."""
        return self._stream.getvalue()

    @property
    def all(self) -> list[dict[str, Any]]:
        """The lines, each of which must be one JSON object."""
        return [_strict(line) for line in self.text.splitlines()]

    @property
    def one(self) -> dict[str, Any]:
        """The only line."""
        (line,) = self.all
        return line


def _strict(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    decoded = json.loads(line, parse_constant=refuse)
    assert isinstance(decoded, dict)
    return decoded


@pytest.fixture
def lines() -> Lines:
    """The process's lines from now on, at level DEBUG."""
    found = Lines()
    found.configure()
    return found


@pytest.fixture(scope="session")
def cheap_hash() -> Callable[[str], str]:
    """Make an argon2 hash that is quick to verify: a hash brings its own parameters."""
    return argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSql]:
    """A PostgreSQL server."""
    with PostgreSql() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each of the two kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data/own.db"
    server: PostgreSql = request.getfixturevalue("postgresql")
    server.empty()
    return server.url
