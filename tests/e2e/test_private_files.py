"""Prompts and answers on disk belong to the user of the process alone."""

import os
import stat
from pathlib import Path

import pytest

from deploy.ports import unused_port
from tests.e2e.recording import in_spool, until
from tests.e2e.support import decoded, generate, listens, run
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess, new_secrets

pytestmark = pytest.mark.e2e

WITHOUT_UMASK = (
    "import os, runpy; os.umask(0); runpy.run_module('service', run_name='__main__', alter_sys=True)"
)
MLFLOW = "http://127.0.0.1:9"


def test_no_file_can_be_read_by_others_whatever_the_umask(upstream: FakeUpstream) -> None:
    variables = {
        "LITELLM_URL": upstream.url,
        "MLFLOW_TRACKING_URI": MLFLOW,
        "CACHE_ENABLED": "true",
        "QDRANT_PATH": "data/qdrant",
        "SPOOL_PATH": "data/spool",
    }
    with ServiceProcess(variables, ("-c", WITHOUT_UMASK)) as process:
        process.wait_ready()
        assert generate(process, process.token()).status == 200
        data = Path(process.folder, "data")
        until(lambda: bool(in_spool(data / "spool")), "the record")
        until(lambda: any(path.is_file() for path in (data / "qdrant").rglob("*")), "the store")
        assert process.stop() == 0
        found = {path: stat.S_IMODE(path.stat().st_mode) for path in (data, *data.rglob("*"))}
        names = {path.relative_to(data).parts[0] for path in found if path != data}
        assert names == {"qdrant", "spool", "llmops.db"}
    assert {path: oct(mode) for path, mode in found.items() if mode & 0o077} == {}


@pytest.mark.parametrize("command", ["serve", "check", "replay"])
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777, 0o702])
def test_a_spool_that_others_can_write_to_is_refused(tmp_path: Path, command: str, mode: int) -> None:
    spool, port = tmp_path / "spool", unused_port()
    spool.mkdir()
    spool.chmod(mode)
    environment = {
        "PATH": os.environ["PATH"],
        **{name.upper(): value for name, value in new_secrets().items()},
        "MLFLOW_TRACKING_URI": MLFLOW,
        "SPOOL_PATH": str(spool),
        "PORT": str(port),
    }
    ended = run(tmp_path, environment, "-m", "service", command)
    assert ended.returncode == 1
    (line,) = decoded(ended.stdout)
    assert line["level"] == "ERROR"
    assert line["message"] == (
        f"Error: SPOOL_PATH can be written to by others (mode {mode:04o}): run chmod 700 on the folder."
    )
    assert not ended.stderr
    assert not listens(port)
    assert list(spool.iterdir()) == []


def test_a_spool_that_others_can_only_read_is_accepted(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    spool.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        **{name.upper(): value for name, value in new_secrets().items()},
        "MLFLOW_TRACKING_URI": MLFLOW,
        "SPOOL_PATH": str(spool),
    }
    assert run(tmp_path, environment, "-m", "service", "check").returncode == 0
