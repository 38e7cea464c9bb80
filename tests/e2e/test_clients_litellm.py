"""Clients that people use, unchanged but for base URL and key, against the service and the real LiteLLM.

The models behind LiteLLM answer by themselves. `make clients` plays these and those that take minutes to
build; `tests/e2e/clients/RESULTS.md` says what was tried.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.clients.programs import QUICK, Program, in_ci
from tests.e2e.clients.world import World, running_world
from tests.e2e.support import stopped

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("litellm")) as running:
        yield running
        stopped(running.service)


# In CI none may be left out: there, what is missing fails.
@pytest.mark.parametrize(
    "program", [one for one in QUICK if in_ci() or not one.missing], ids=lambda program: program.source
)
def test_a_client_works_unchanged(world: World, tmp_path: Path, program: Program) -> None:
    assert not program.missing
    program.build(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    assert program.play(tmp_path, home, world.environment())
