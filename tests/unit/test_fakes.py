"""The fakes do what the tests built on them take for granted."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import math
import socket
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import openai
import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogs
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogs
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetrics
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from tests.fakes.clock import FakeClock
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import (
    AcceptOnly,
    Answer,
    Behaviour,
    Drip,
    Endless,
    FakeUpstream,
    Garbage,
    NotJson,
    Reset,
    Silent,
    Status,
    Stream,
    WrongLength,
    refusing_port,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk._logs.export import LogRecordExporter
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.trace.export import SpanExporter

_CHAT = json.dumps({"model": "demo", "messages": []}).encode()
_RESOURCE = Resource({"service.name": "self-test"})


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as fake:
        yield fake


@pytest.fixture
def sdk(upstream: FakeUpstream) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="key", max_retries=0, timeout=5) as client:
        yield client


def _ask(sdk: openai.OpenAI, model: str = "demo") -> Any:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    return sdk.chat.completions.with_raw_response.create(model=model, messages=messages)


def _connect(port: int) -> closing[http.client.HTTPConnection]:
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5))


def _post_chat(connection: http.client.HTTPConnection, body: Any = _CHAT) -> http.client.HTTPResponse:
    chunked = not isinstance(body, bytes)
    connection.request("POST", "/v1/chat/completions", body, encode_chunked=chunked)
    return connection.getresponse()


def test_answers_the_sdk_on_one_kept_connection(upstream: FakeUpstream, sdk: openai.OpenAI) -> None:
    upstream.script(Answer("First.", extra={"id": "mine"}))
    first = _ask(sdk)
    second = _ask(sdk).parse()
    assert first.headers["x-litellm-response-cost"] == "0.00042"
    assert (first.parse().id, first.parse().choices[0].message.content) == ("mine", "First.")
    assert (second.model, second.usage.total_tokens) == ("demo", 30)
    assert second.choices[0].message.content == "Hello from the fake."
    assert [request.json["model"] for request in upstream.chat_requests] == ["demo", "demo"]
    assert upstream.chat_requests[0].headers["authorization"] == "Bearer key"
    assert upstream.chat_requests[0].at <= upstream.chat_requests[1].at
    assert (upstream.connections, upstream.disconnects) == (1, 0)


def test_leaves_out_what_an_answer_is_told_to(upstream: FakeUpstream, sdk: openai.OpenAI) -> None:
    upstream.script(Answer(model="real", usage=False, choices=False, cost=None, headers={"x-mine": "1"}))
    response = _ask(sdk)
    completion = response.parse()
    assert (completion.model, completion.usage, completion.choices) == ("real", None, [])
    assert "x-litellm-response-cost" not in response.headers
    assert response.headers["x-mine"] == "1"


def test_knows_its_models(upstream: FakeUpstream, sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["demo", "other-model"]
    with pytest.raises(openai.BadRequestError, match="Invalid model name passed in model=nope"):
        _ask(sdk, "nope")
    upstream.script(Answer())
    assert _ask(sdk, "nope").parse().model == "nope"
    upstream.unknown_model_error = False
    assert _ask(sdk, "nope").parse().model == "nope"
    upstream.models_behaviour = Status(503)
    with pytest.raises(openai.InternalServerError):
        sdk.models.list()
    assert len(upstream.chat_requests) == 3
    assert len(upstream.requests) == 5
    upstream.clear()
    assert upstream.requests == []


def test_reports_its_health(upstream: FakeUpstream) -> None:
    with _connect(upstream.port) as connection:
        for path, health, status in [
            ("/health/liveliness", None, 200),
            ("/health/readiness?a=b", None, 200),
            ("/health/readiness", Status(500, b"no"), 500),
            ("/elsewhere", None, 404),
        ]:
            upstream.health_behaviour = health
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            assert response.status == status
    assert upstream.requests[1].query == "a=b"


def test_reads_a_chunked_request(upstream: FakeUpstream) -> None:
    with _connect(upstream.port) as connection:
        response = _post_chat(connection, iter([_CHAT[:7], _CHAT[7:]]))
        assert response.status == 200
        response.read()
    assert upstream.chat_requests[0].body == _CHAT


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Reset("before"), ConnectionResetError),
        (Reset("headers"), ConnectionResetError),
        (Reset("body"), ConnectionResetError),
        (Garbage(), http.client.BadStatusLine),
        (WrongLength(), http.client.IncompleteRead),
        (Stream(cut_after=1), http.client.IncompleteRead),
    ],
)
def test_misbehaves_on_the_wire(upstream: FakeUpstream, behaviour: Behaviour, error: type[Exception]) -> None:
    upstream.script(behaviour)
    with _connect(upstream.port) as connection, pytest.raises(error):
        _post_chat(connection).read()
    with _connect(upstream.port) as connection:
        assert _post_chat(connection).read()
    assert upstream.disconnects == 0


def test_says_what_is_not_json(upstream: FakeUpstream) -> None:
    upstream.script(NotJson())
    with _connect(upstream.port) as connection:
        response = _post_chat(connection)
        assert response.headers["content-type"] == "text/html"
        assert response.read() == b"<html>oops</html>"


def test_answers_with_a_status(upstream: FakeUpstream, sdk: openai.OpenAI) -> None:
    upstream.script(Status(429, headers={"retry-after": "7"}))
    with pytest.raises(openai.RateLimitError) as caught:
        _ask(sdk)
    assert caught.value.code == "429"
    assert caught.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("behaviour", [Silent(), AcceptOnly(), Drip(), Endless(0.001), Answer(delay_s=60)])
def test_notices_at_once_a_client_that_leaves(upstream: FakeUpstream, behaviour: Behaviour) -> None:
    upstream.script(behaviour)
    with _connect(upstream.port) as connection:
        connection.request("POST", "/v1/chat/completions", _CHAT)
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
        assert upstream.disconnects == 0
    upstream.wait_for(lambda fake: fake.disconnects == 1, timeout_s=0.5)


def test_notices_a_client_that_leaves_in_its_request(upstream: FakeUpstream) -> None:
    with socket.create_connection(("127.0.0.1", upstream.port)) as client:
        client.sendall(b"POST /chat/completions HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
    upstream.wait_for(lambda fake: fake.disconnects == 1)
    assert upstream.requests == []


@pytest.mark.parametrize("behaviour", [Silent(), AcceptOnly(), Endless(0.0)])
def test_stops_with_a_client_still_there(behaviour: Behaviour) -> None:
    before = threading.active_count()
    with FakeUpstream() as upstream:
        upstream.default = behaviour
        client = http.client.HTTPConnection("127.0.0.1", upstream.port)
        client.request("POST", "/chat/completions", _CHAT)
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
    client.close()
    assert upstream.disconnects == 0
    assert threading.active_count() == before


def test_takes_only_the_head_when_it_accepts_only(upstream: FakeUpstream) -> None:
    upstream.script(AcceptOnly())
    with socket.create_connection(("127.0.0.1", upstream.port), timeout=0.2) as client:
        client.sendall(b"POST /chat/completions HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n")
        upstream.wait_for(lambda fake: len(fake.chat_requests) == 1)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(100_000_000))


def test_drips_a_correct_answer(upstream: FakeUpstream, sdk: openai.OpenAI) -> None:
    upstream.script(Drip(interval_s=0.0, chunk=3))
    assert _ask(sdk).parse().usage.prompt_tokens == 10
    assert upstream.disconnects == 0


def test_streams_to_the_sdk(upstream: FakeUpstream, sdk: openai.OpenAI) -> None:
    upstream.script(Stream(("a", "b")))
    with sdk.chat.completions.create(model="demo", messages=[], stream=True) as stream:
        chunks = list(stream)
    assert [choice.delta.content for chunk in chunks for choice in chunk.choices] == ["a", "b", None]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 30
    assert _ask(sdk).parse().model == "demo"
    assert upstream.disconnects == 0


def test_tells_when_it_waits_in_vain(upstream: FakeUpstream) -> None:
    with pytest.raises(TimeoutError, match="<FakeUpstream"):
        upstream.wait_for(lambda fake: fake.disconnects == 1, timeout_s=0.01)


def test_refuses_on_a_held_port() -> None:
    with refusing_port() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def _export_span(exporter: SpanExporter) -> str:
    provider = TracerProvider(resource=_RESOURCE, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("a-scope")
    with tracer.start_as_current_span("outer", kind=trace.SpanKind.SERVER) as outer:
        link = trace.Link(outer.get_span_context(), {"why": "test"})
        with tracer.start_as_current_span("inner", links=[link], attributes={"list": ["a", "b"]}) as inner:
            inner.add_event("happened", {"n": 1})
            inner.set_status(trace.StatusCode.ERROR, "broken")
    provider.shutdown()
    return trace.format_trace_id(outer.get_span_context().trace_id)


def _export_log(exporter: LogRecordExporter) -> None:
    provider = LoggerProvider(resource=_RESOURCE, shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    provider.get_logger("a-scope").emit(body={"said": "canary"}, severity_text="WARN", event_name="an.event")
    provider.shutdown()


def _export_metrics(exporter: MetricExporter) -> None:
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)
    provider = MeterProvider([reader], resource=_RESOURCE, shutdown_on_exit=False)
    meter = provider.get_meter("a-scope")
    counter = meter.create_counter("requests", "1")
    counter.add(1, {"name": "x", "b": 1})
    provider.force_flush()
    counter.add(2, {"name": "x", "b": 1})
    counter.add(5, {"name": "y"})
    meter.create_histogram("duration", "s", explicit_bucket_boundaries_advisory=[1.0, 2.0]).record(1.5)
    provider.force_flush()
    provider.shutdown()


def _check_spans(receiver: OtlpReceiver, trace_id: str) -> None:
    receiver.wait_for(lambda fake: len(fake.spans(trace_id)) == 2)
    (outer,) = receiver.spans(name="outer")
    (inner,) = receiver.spans(trace_id, "inner")
    assert (outer.kind, outer.parent_id, outer.status, outer.scope) == ("SERVER", "", "UNSET", "a-scope")
    assert outer.resource == {"service.name": "self-test"}
    assert (inner.kind, inner.parent_id, inner.attributes) == (
        "INTERNAL",
        outer.span_id,
        {"list": ["a", "b"]},
    )
    assert (inner.status, inner.status_message) == ("ERROR", "broken")
    assert [(event.name, event.attributes) for event in inner.events] == [("happened", {"n": 1})]
    assert [(link.span_id, link.attributes) for link in inner.links] == [(outer.span_id, {"why": "test"})]
    assert outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns


def _check_logs(receiver: OtlpReceiver) -> None:
    receiver.wait_for(lambda fake: bool(fake.logs()))
    (log,) = receiver.logs(trace_id="")
    assert (log.body, log.severity, log.event_name) == ({"said": "canary"}, "WARN", "an.event")
    assert any(b"canary" in payload for payload in receiver.raw)


def _check_points(receiver: OtlpReceiver) -> None:
    receiver.wait_for(lambda fake: fake.value("requests", {"name": "x"}) == 3)
    assert [point.value for point in receiver.points("requests", b=1)] == [1, 3]
    assert sorted(point.value for point in receiver.latest("requests")) == [3, 5]
    assert receiver.value("requests", {"name": "z"}) is None
    with pytest.raises(LookupError, match="2 attribute sets"):
        receiver.value("requests")
    (duration,) = receiver.latest("duration", {})
    assert (duration.kind, duration.unit, duration.value, duration.count) == ("histogram", "s", 1.5, 1)
    assert (duration.bounds, duration.bucket_counts) == ([1.0, 2.0], [0, 1, 0])
    assert duration.temporality == "CUMULATIVE"


def test_receives_over_grpc(receiver: OtlpReceiver) -> None:
    url = receiver.grpc_url
    trace_id = _export_span(GrpcSpans(url, insecure=True))
    _export_log(GrpcLogs(url, insecure=True))
    _export_metrics(GrpcMetrics(url, insecure=True))
    _check_spans(receiver, trace_id)
    _check_logs(receiver)
    _check_points(receiver)


@pytest.mark.parametrize("compression", list(Compression))
def test_receives_over_http(receiver: OtlpReceiver, compression: Compression) -> None:
    url = receiver.http_url
    trace_id = _export_span(HttpSpans(f"{url}/v1/traces", compression=compression))
    _export_log(HttpLogs(f"{url}/v1/logs", compression=compression))
    _export_metrics(HttpMetrics(f"{url}/v1/metrics", compression=compression))
    _check_spans(receiver, trace_id)
    _check_logs(receiver)
    _check_points(receiver)
    receiver.clear()
    assert (receiver.spans(), receiver.logs(), receiver.points(), receiver.raw) == ([], [], [], [])


def test_keeps_only_what_it_acknowledges(receiver: OtlpReceiver) -> None:
    receiver.answer_status = 503
    port = int(receiver.http_url.rpartition(":")[2])
    with _connect(port) as connection:
        for status, stored in [(503, 0), (200, 1)]:
            receiver.answer_status = status
            connection.request("POST", "/v1/traces", gzip.compress(b""), {"Content-Encoding": "gzip"})
            response = connection.getresponse()
            response.read()
            assert (response.status, len(receiver.raw)) == (status, stored)
    assert receiver.exports == 2


def test_hangs_and_still_stops() -> None:
    before = threading.active_count()
    with OtlpReceiver() as receiver:
        receiver.hang = True
        with _connect(int(receiver.http_url.rpartition(":")[2])) as connection:
            connection.request("POST", "/v1/logs", b"")
            receiver.wait_for(lambda fake: fake.exports == 1)
        exporter = GrpcSpans(receiver.grpc_url, insecure=True, timeout=1)
        sender = threading.Thread(target=_export_span, args=(exporter,))
        sender.start()
        receiver.wait_for(lambda fake: fake.exports == 2)
        # Left open on purpose: the receiver has to end it.
        idle = http.client.HTTPConnection("127.0.0.1", int(receiver.http_url.rpartition(":")[2]))
        idle.connect()
    sender.join()
    idle.close()
    assert receiver.raw == []
    assert threading.active_count() == before


def test_moves_the_clock_only_when_told() -> None:
    clock = FakeClock(10.0)
    turns: list[float] = []

    async def other() -> None:
        turns.append(clock())

    async def main() -> None:
        task = asyncio.create_task(other())
        await clock.sleep(2.5)
        assert task.done()

    asyncio.run(main())
    clock.advance(1)
    assert (clock(), clock.slept, turns) == (13.5, [2.5], [12.5])
    with pytest.raises(ValueError, match="cannot move"):
        clock.advance(-1)
