"""Clients that people use, unchanged but for base URL and key, against the service and the real LiteLLM.

The models behind LiteLLM answer by themselves. `tests/e2e/clients/RESULTS.md` says what was tried.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.clients.llm_program import ask_llm
from tests.e2e.clients.world import CHAT, World, running_world
from tests.e2e.support import stopped
from tests.harness import ROOT

pytestmark = pytest.mark.e2e

SCRIPTS = Path(__file__).parent / "clients/python"
LIMIT_S = 100


@dataclass(frozen=True)
class Library:
    """A library's script, and the variable that names the Python that runs it.

    Args:
        script: The script's name.
        variable: Names the Python, or a program beside it; empty for the tests' own.
    """

    script: str
    variable: str

    @property
    def python(self) -> str:
        """The Python that has the library."""
        if not self.variable:
            return sys.executable
        named = os.environ.get(self.variable)
        assert named, f"{self.variable} is not set; `make test` installs what it names and sets it"
        return str(Path(named).with_name("python"))


LIBRARIES = (
    Library("openai_sdk", ""),
    Library("azure_sdk", ""),
    Library("agents_sdk", "CLIENTS_PYTHON"),
    Library("anthropic_sdk", "CLIENTS_PYTHON"),
    Library("langchain_libraries", "CLIENTS_PYTHON"),
    Library("pydantic_ai_library", "CLIENTS_PYTHON"),
    Library("llama_index_library", "CLIENTS_OPENAI2_PYTHON"),
    Library("instructor_library", "CLIENTS_OPENAI2_PYTHON"),
    Library("litellm_sdk", "LITELLM_BIN"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("litellm")) as running:
        yield running
        stopped(running.service)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.script)
def test_a_library_works_unchanged(world: World, tmp_path: Path, library: Library) -> None:
    script = SCRIPTS / f"{library.script}.py"
    ended = subprocess.run(
        [library.python, str(script)],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            # Of LiteLLM's library: no table of prices from the network.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            **world.environment(),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    # Libraries may print what they like beside it.
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"check": ')]
    passed = [json.loads(line)["check"] for line in lines]
    assert passed == re.findall(r'^@check\("(.+)"\)$', script.read_text(), re.MULTILINE)
    assert passed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--no-stream",), "A trace is the path of one request."),
        ((), "A trace is the path of one request."),
        (("--schema", "name, age int"), '{"name": "Ada", "age": 36}'),
    ],
    ids=["chat", "stream", "schema"],
)
def test_a_command_line_works_unchanged(
    world: World, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    ended = ask_llm(f"{world.url}/v1", world.token, tmp_path, CHAT, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.strip() == expected
