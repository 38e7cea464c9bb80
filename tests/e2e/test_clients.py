"""Clients that people use, against the running service, with nothing changed but base URL and key."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.clients.llm_program import ask_llm
from tests.e2e.clients.model import MODELS, CapableModel
from tests.e2e.clients.runtimes import Script, runnable
from tests.e2e.support import stopped
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess

pytestmark = pytest.mark.e2e

BASIC = {"chat", "stream", "tools", "schema", "embeddings"}
ERRORS = {"BadRequestError", "InternalServerError", "AuthenticationError"}
SDK_ERRORS = {
    *ERRORS,
    *("RateLimitError", "UnprocessableEntityError", "NotFoundError", "Retry-After", "error within a stream"),
}
CHECKS = {
    "openai-python": {
        *(*BASIC, "models", *SDK_ERRORS),
        *("async chat", "async stream", "async streamed tools", "async many"),
    },
    "openai-node": {*BASIC, "models", *SDK_ERRORS},
    "langchain-openai": {*BASIC, *ERRORS},
}


@pytest.fixture(scope="module")
def model() -> CapableModel:
    return CapableModel()


@pytest.fixture(autouse=True)
def _as_new(model: CapableModel) -> None:
    model.forget()


@pytest.fixture(scope="module")
def process(model: CapableModel) -> Iterator[ServiceProcess]:
    with FakeUpstream() as upstream:
        upstream.models, upstream.default = MODELS, model
        # The clients' own retries are looked at, so the service makes none.
        variables = {"LITELLM_URL": upstream.url, "RETRY_MAX": "0", "BREAKER_FAILURE_THRESHOLD": "1000"}
        with ServiceProcess(variables) as service:
            yield service.wait_ready()
            stopped(service)


def _environment(process: ServiceProcess, folder: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "OPENAI_BASE_URL": f"http://127.0.0.1:{process.port}/v1",
        "OPENAI_API_KEY": process.api_key(),
    }


@pytest.mark.parametrize("script", runnable(), ids=lambda script: script.name)
def test_a_library_works_unchanged(process: ServiceProcess, tmp_path: Path, script: Script) -> None:
    assert script.command, f"{script.name} needs {script.needs}"
    ended = subprocess.run(
        script.command,
        cwd=tmp_path,
        env=_environment(process, tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {json.loads(line)["check"] for line in ended.stdout.splitlines()} == CHECKS[script.name]


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
    process: ServiceProcess, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    ended = _llm(process, tmp_path, "demo", *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.strip() == expected


def test_a_command_line_shows_what_went_wrong(process: ServiceProcess, tmp_path: Path) -> None:
    ended = _llm(process, tmp_path, "nope")
    assert ended.returncode != 0
    assert "Model 'nope' not found" in ended.stderr


def _llm(
    process: ServiceProcess, folder: Path, model: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    base_url = f"http://127.0.0.1:{process.port}/v1"
    return ask_llm(base_url, process.api_key(), folder, model, *arguments)
