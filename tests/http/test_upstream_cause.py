"""Why an attempt failed below HTTP: the same word on its span, on its log line and in the health."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.streams import RawStream, text
from tests.fakes.upstream import Behaviour, FakeUpstream, Garbage, Reset, Silent, Status, refusing_port
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import attributes, eventually, trace_of

CAUSE = "llmops.upstream.cause"
SETTINGS: dict[str, Any] = {
    "retry_max": 1,
    "retry_base_delay_s": 0.01,
    "llm_timeout_s": 0.5,
    "llm_connect_timeout_s": 0.25,
    "stream_chunk_timeout_s": 0.2,
    "breaker_failure_threshold": 1_000,
}


@pytest.fixture
def app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    with running_app(litellm_url=upstream.url, **SETTINGS) as app:
        yield app


def ask(app: AppUnderTest, *, stream: bool = False) -> Answer:
    return app.call("POST", "/llm/generate", body={"prompt": "Why?", "stream": stream}, token=app.token())


def on_spans(app: AppUnderTest, answer: Answer) -> list[object]:
    """The cause on each attempt's span."""
    spans = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
    return [attributes(span).get(CAUSE) for span in spans]


def on_lines(app: AppUnderTest, answer: Answer) -> list[object]:
    """The cause on each line that tells of a failed attempt."""
    lines = app.lines(answer.request_id)
    return [line.get(CAUSE) for line in lines if line["message"].startswith("Attempt ")]


@pytest.mark.parametrize(
    ("behaviour", "cause"), [(Reset("body"), "reset"), (Garbage(), "protocol"), (Status(503), None)]
)
def test_each_attempt_says_why_it_failed(
    app: AppUnderTest, upstream: FakeUpstream, behaviour: Behaviour, cause: str | None
) -> None:
    upstream.script(behaviour, behaviour)
    answer = ask(app)
    assert answer.status == 502
    assert on_spans(app, answer) == on_lines(app, answer) == [cause, cause]
    assert str(cause) not in answer.json["message"]


def test_an_upstream_that_is_silent_is_a_read_timeout(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Silent())
    answer = ask(app)
    assert answer.status == 504
    assert on_spans(app, answer) == on_lines(app, answer) == ["read_timeout"]


@pytest.mark.parametrize(("end", "cause"), [("silence", "read_timeout"), ("reset", "reset"), ("end", None)])
def test_a_stream_that_breaks_says_why_on_its_span(
    app: AppUnderTest, upstream: FakeUpstream, end: str, cause: str | None
) -> None:
    upstream.script(RawStream((text("a "),), end))  # type: ignore[arg-type]
    answer = ask(app, stream=True)
    assert on_spans(app, answer) == [cause]


def test_a_connection_that_cannot_be_made_says_why_on_every_surface() -> None:
    # A resolver may take its time.
    settings = {**SETTINGS, "llm_timeout_s": 60.0, "llm_connect_timeout_s": 60.0}
    with refusing_port() as port:
        for host, cause in ((f"127.0.0.1:{port}", "refused"), ("no-such-host.invalid", "dns")):
            with running_app(litellm_url=f"http://{host}", **settings) as app:
                answer = ask(app)
                assert answer.status == 504
                assert set(on_spans(app, answer)) == set(on_lines(app, answer)) == {cause}
                health = eventually(lambda app=app: _litellm(app), "the first check")  # type: ignore[misc]
                assert health == f"Connection error ({cause})"


def _litellm(app: AppUnderTest) -> str | None:
    error: str = app.call("GET", "/health/detailed").json["details"]["litellm"]["error"]
    return None if error == "not checked yet" else error
