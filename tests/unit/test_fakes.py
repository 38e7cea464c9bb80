"""Smoke tests of the fakes: what they play reaches a client, and what they receive can be read."""

from __future__ import annotations

import asyncio
import http.client
from contextlib import closing
from typing import TYPE_CHECKING

import openai
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from tests.fakes.clock import FakeClock
from tests.fakes.upstream import Answer, FakeUpstream, Reset, Silent, Status

if TYPE_CHECKING:
    from tests.fakes.otlp import OtlpReceiver


def test_the_upstream_plays_its_script_then_its_default(upstream: FakeUpstream) -> None:
    upstream.script(Answer("First."), Status(429), Reset("body"))
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="key", max_retries=0, timeout=5) as sdk:

        def ask() -> str | None:
            return sdk.chat.completions.create(model="demo", messages=[]).choices[0].message.content

        assert ask() == "First."
        with pytest.raises(openai.RateLimitError):
            ask()
        with pytest.raises(openai.APIConnectionError):
            ask()
        assert ask() == "Hello from the fake."
    assert [request.json["model"] for request in upstream.chat_requests] == ["demo"] * 4


def test_the_upstream_counts_a_client_that_leaves(upstream: FakeUpstream) -> None:
    upstream.script(Silent())
    with closing(http.client.HTTPConnection("127.0.0.1", upstream.port, timeout=5)) as connection:
        connection.request("POST", "/v1/chat/completions", b'{"model": "demo"}')
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
        assert upstream.disconnects == 0
    upstream.wait_for(lambda fake: fake.disconnects == 1)
    with pytest.raises(TimeoutError, match="<FakeUpstream"):
        upstream.wait_for(lambda fake: fake.disconnects == 2, timeout_s=0.01)


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_the_receiver_keeps_what_is_exported(receiver: OtlpReceiver, transport: str) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(
        SimpleSpanProcessor(
            GrpcSpans(receiver.grpc_url, insecure=True)
            if transport == "grpc"
            else HttpSpans(f"{receiver.http_url}/v1/traces")
        )
    )
    with provider.get_tracer("a-scope").start_as_current_span("one", attributes={"list": ["a", "b"]}):
        pass
    provider.shutdown()
    receiver.wait_for(lambda fake: bool(fake.spans()))
    (span,) = receiver.spans(name="one")
    assert (span.kind, span.scope, span.attributes) == ("INTERNAL", "a-scope", {"list": ["a", "b"]})


def test_the_clock_moves_only_when_told() -> None:
    clock = FakeClock(10.0)
    asyncio.run(clock.sleep(2.5))
    clock.advance(1)
    assert (clock(), clock.slept) == (13.5, [2.5])
