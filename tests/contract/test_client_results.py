"""The table of clients names the versions that are locked."""

import re
from pathlib import Path

import pytest

from tests.e2e.clients.programs import BUILT, QUICK, Program, Python
from tests.harness import ROOT

CLIENTS = ROOT / "tests/e2e/clients"
LOCKS = (
    ROOT / "requirements-dev.lock",
    CLIENTS / "requirements.lock",
    CLIENTS / "requirements-openai2.lock",
    ROOT / "deploy/litellm/requirements.lock",
)
ROW = re.compile(r"^\| [^|]+ \| `([a-z0-9-]+)` \| ([0-9][^ |]*) \|", re.MULTILINE)
ROWS = sorted(set(ROW.findall((CLIENTS / "RESULTS.md").read_text())))


def test_the_table_has_every_client_that_is_asked_for() -> None:
    asked = {
        name
        for file in ("requirements.in", "requirements-openai2.in")
        for name in re.findall(r"^([a-z][a-z0-9-]*)", (CLIENTS / file).read_text(), re.MULTILINE)
    }
    assert asked <= {name for name, _ in ROWS}


@pytest.mark.parametrize(("package", "version"), ROWS)
def test_a_clients_version_is_a_locked_one(package: str, version: str) -> None:
    assert any(f"\n{package}=={version} " in f"\n{lock.read_text()}" for lock in LOCKS)


@pytest.mark.parametrize(
    "program",
    [one for one in (*QUICK, *BUILT) if not isinstance(one, Python)],
    ids=lambda program: program.source,
)
def test_a_played_client_is_the_pinned_one_with_all_of_its_checks(program: Program, tmp_path: Path) -> None:
    checks = f"{len(program.checks)}: {', '.join(program.checks)}"
    row = f"| {program.name} | {program.version(tmp_path)} | {checks} |"
    assert row in (CLIENTS / "RESULTS.md").read_text()
