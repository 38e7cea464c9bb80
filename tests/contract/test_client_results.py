"""The table of clients names the versions that are locked."""

import re

import pytest

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
