"""Hostile values against the real process: its metrics go on, and its key is its own."""

import pytest

from tests.e2e.support import generate, stopped, to_collector
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import Answer as Completion
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess

pytestmark = pytest.mark.e2e


def test_an_absurd_count_does_not_stop_the_metrics(upstream: FakeUpstream, receiver: OtlpReceiver) -> None:
    with ServiceProcess({"LITELLM_URL": upstream.url, **to_collector(receiver)}) as process:
        process.wait_ready()
        upstream.script(Completion(prompt_tokens=10**30))
        answer = generate(process, process.token())
        stopped(process)
    assert answer.status == 200
    assert receiver.points("llmops.llm.calls")


@pytest.mark.parametrize("key", ["k\n", "k ", "kéy"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with ServiceProcess({"LITELLM_API_KEY": key}, arguments=("-m", "service", "check")) as process:
        assert process.process is not None
        assert process.process.wait(20) == 1
        assert process.lines()[0]["message"].startswith("Error: LITELLM_API_KEY ")


@pytest.mark.parametrize(
    "variable",
    [
        {"OPENAI_ORG_ID": "other"},
        {"OPENAI_PROJECT_ID": "other"},
        {"OPENAI_CUSTOM_HEADERS": "X-Other: other"},
        {"OPENAI_CUSTOM_HEADERS": "Authorization: Bearer other"},
    ],
)
def test_the_sdks_own_variables_change_nothing(upstream: FakeUpstream, variable: dict[str, str]) -> None:
    settings = {"LITELLM_URL": upstream.url, "LITELLM_API_KEY": "ours", **variable}
    with ServiceProcess(settings) as process:
        process.wait_ready()
        generate(process, process.token())
        stopped(process)
    assert "other" not in str(upstream.chat_requests[0].headers)
