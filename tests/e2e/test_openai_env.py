"""Variables that the OpenAI SDK and the HTTP clients read by themselves change nothing."""

import secrets

import pytest

from tests.e2e.support import generate, stopped
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("log_level", ["INFO", "DEBUG"])
def test_variables_meant_for_other_programs_change_nothing(upstream: FakeUpstream, log_level: str) -> None:
    prompt, key = f"canary-prompt-{secrets.token_hex(8)}", f"canary-key-{secrets.token_hex(8)}"
    with FakeUpstream() as elsewhere:
        proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        variables = {
            "LITELLM_URL": upstream.url,
            "LITELLM_API_KEY": key,
            "LOG_LEVEL": log_level,
            "OPENAI_LOG": "debug",
            "OPENAI_BASE_URL": f"{elsewhere.url}/v1",
            "OPENAI_API_KEY": "for-another-program",
            **dict.fromkeys(proxies, elsewhere.url),
        }
        with ServiceProcess(variables) as process:
            process.wait_ready()
            token = process.token()
            answer = generate(process, token, body={"prompt": prompt})
            models = process.call("GET", "/llm/models", token=token)
            stopped(process)
            written = process.text()
        assert elsewhere.connections == 0

    assert (answer.status, models.status) == (200, 200)
    (sent,) = upstream.chat_requests
    assert sent.headers["authorization"] == f"Bearer {key}"
    assert "for-another-program" not in str(sent.headers)
    for secret in (prompt, key, token):
        assert secret not in written
