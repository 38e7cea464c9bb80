"""An upstream with a certificate of a private authority, which SSL_CERT_FILE or SSL_CERT_DIR names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import generate, stopped
from tests.fakes.tls import PrivateAuthority
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, ServiceProcess
from tests.http.support import eventually

pytestmark = pytest.mark.e2e

CAUSE = "llmops.upstream.cause"


@pytest.fixture
def authority(tmp_path: Path) -> PrivateAuthority:
    return PrivateAuthority(tmp_path)


@pytest.fixture
def upstream(authority: PrivateAuthority) -> Iterator[FakeUpstream]:
    with FakeUpstream(authority.server()) as upstream:
        yield upstream


def ask(process: ServiceProcess) -> Answer:
    return generate(process.wait_ready(), process.token())


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_an_authority_that_the_environment_names_is_trusted(
    upstream: FakeUpstream, authority: PrivateAuthority, variable: str
) -> None:
    place = authority.file if variable == "SSL_CERT_FILE" else authority.directory
    with ServiceProcess({"LITELLM_URL": upstream.url, variable: str(place)}) as process:
        answer = ask(process)
        assert answer.status == 200, process.text()
        stopped(process)


def test_an_authority_that_nobody_names_is_not_and_every_surface_says_so(upstream: FakeUpstream) -> None:
    variables = {"LITELLM_URL": upstream.url, "RETRY_BASE_DELAY_S": "0.01"}
    with ServiceProcess(variables) as process:
        answer = ask(process)
        assert (answer.status, answer.json["error"]) == (504, "UpstreamTimeoutError")
        # No connection was made, so nothing was paid for.
        assert "x-should-retry" not in answer.headers
        (failed,) = eventually(lambda: said(process, answer, "llm_request_failed"), "the call's last line")
        told = [*said(process, answer, "Attempt "), failed]
        assert {line[CAUSE] for line in told} == {"tls"}
        assert len(told) == 5
        health = eventually(lambda: _litellm(process), "the first check")
        assert health == "Connection error (tls)"
        stopped(process)
    assert not upstream.requests


def said(process: ServiceProcess, answer: Answer, start: str) -> list[dict[str, Any]]:
    return [line for line in process.lines(answer.request_id) if line["message"].startswith(start)]


def _litellm(process: ServiceProcess) -> str | None:
    error: str = process.call("GET", "/health/detailed").json["details"]["litellm"]["error"]
    return None if error == "not checked yet" else error
