"""The clients' programs are all tried, and a check that is not run is a failure."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.clients.programs import BUILT, QUICK, FailedError, Python
from tests.harness import ROOT

ALL = (*QUICK, *BUILT)
PROGRAM = """\
check = lambda name: lambda function: print('{"check": "%s"}' % name)


@check("first")
def _first(): ...


"""
SECOND = """\
@check("second")
def _second(): ...
"""


def test_every_program_has_checks_with_names_of_their_own() -> None:
    for program in ALL:
        assert program.checks, program.name
        assert max(Counter(program.checks).values()) == 1, program.name


def test_every_program_is_listed() -> None:
    folder = ROOT / "tests/e2e/clients"
    shared = {"__init__.py", "checks.py", "checks.mjs", "run.py", "sdk.mjs"}
    found = {
        str(path.relative_to(folder))
        for pattern in ("python/*.py", "node/*.mjs", "agents/*.py")
        for path in folder.glob(pattern)
        if path.name not in shared
    }
    listed = {program.source for program in ALL}
    assert found == {source for source in listed if source.startswith(("python/", "node/", "agents/"))}


def test_a_check_that_is_not_run_is_a_failure(tmp_path: Path) -> None:
    program = Python("one", str(tmp_path / "program.py"), "", ())
    program.path.write_text(PROGRAM + SECOND)
    assert program.play(tmp_path, tmp_path, {}) == ["first", "second"]
    program.path.write_text(PROGRAM + "raise SystemExit\n" + SECOND)
    with pytest.raises(FailedError, match="second"):
        program.play(tmp_path, tmp_path, {})
    program.path.write_text(PROGRAM + "raise SystemExit('it broke')\n")
    with pytest.raises(FailedError, match="it broke"):
        program.play(tmp_path, tmp_path, {})


@pytest.mark.parametrize(("in_ci", "status"), [("", 0), ("true", 1)])
def test_what_cannot_be_built_here_is_named_and_fails_in_ci(tmp_path: Path, in_ci: str, status: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.e2e.clients", "--folder", str(tmp_path), "openai-java"],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "CI": in_ci},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    assert "Left out: openai-java; it needs java and javac and mvn." in ended.stdout
