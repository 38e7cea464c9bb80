"""What a collector receives: one trace, its logs and the metrics, under one id, over both protocols."""

import secrets
from collections import Counter
from itertools import pairwise

import pytest

from tests.e2e.support import decoded, generate, stopped, to_collector
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import FakeUpstream, Garbage, Silent, Status
from tests.harness import ServiceProcess
from tests.http.support import as_json, http_request, raw

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_one_call_is_one_trace_everywhere(
    upstream: FakeUpstream, receiver: OtlpReceiver, protocol: str
) -> None:
    variables = {
        "LITELLM_URL": upstream.url,
        "ENVIRONMENT": "staging",
        "OTEL_SERVICE_NAME": "renamed",
        "OTEL_RESOURCE_ATTRIBUTES": "team=blue,service.namespace=theirs",
        **to_collector(receiver, protocol),
    }
    with ServiceProcess(variables) as process:
        process.wait_ready()
        answer = generate(process, process.token())
        trace_id = answer.request_id
        receiver.wait_for(lambda it: len(it.spans(trace_id)) >= 4 and len(it.logs(trace_id)) >= 3)
        receiver.wait_for(lambda it: bool(it.points("gen_ai.client.token.usage")))
        lines = stopped(process)

    assert answer.json["request_id"] == trace_id
    assert_one_tree(receiver, trace_id)
    (sent,) = upstream.chat_requests
    assert sent.headers["traceparent"].split("-")[1] == trace_id
    (post,) = receiver.spans(trace_id, "POST")
    assert sent.headers["traceparent"].split("-")[2] == post.span_id

    own = [line for line in lines if line.get("request_id") == trace_id]
    seen = [(log.body, log.span_id) for log in receiver.logs(trace_id)]
    assert Counter(seen) == Counter((line["message"], line["span_id"]) for line in own)
    assert {log.attributes["request_id"] for log in receiver.logs(trace_id)} == {trace_id}
    assert {line["trace_id"] for line in own} == {trace_id}
    assert_resource(receiver)
    assert_metrics(receiver, trace_id)


def assert_one_tree(receiver: OtlpReceiver, trace_id: str) -> None:
    spans = {span.name: span for span in receiver.spans(trace_id)}
    assert set(spans) == {"POST /llm/generate", "llm call", "chat demo", "POST"}
    assert len(receiver.spans(trace_id)) == len(spans)
    names = ["POST /llm/generate", "llm call", "chat demo", "POST"]
    for parent, child in pairwise(names):
        assert spans[child].parent_id == spans[parent].span_id
    assert spans["POST /llm/generate"].kind == "SERVER"
    assert spans["POST /llm/generate"].parent_id == ""
    counted = Counter(span.span_id for span in receiver.spans())
    assert set(counted.values()) == {1}, "each span is exported once"


def assert_resource(receiver: OtlpReceiver) -> None:
    resources = [span.resource for span in receiver.spans()]
    resources += [log.resource for log in receiver.logs()]
    resources += [point.resource for point in receiver.points()]
    first = resources[0]
    assert all(resource == first for resource in resources), "one process is one resource in all signals"
    expected = {
        "service.name": "renamed",
        "service.namespace": "theirs",
        "team": "blue",
        "deployment.environment.name": "staging",
        "telemetry.sdk.language": "python",
    }
    assert expected.items() <= first.items()
    assert {"service.version", "service.instance.id", "process.pid", "process.runtime.version"} <= set(first)


def assert_metrics(receiver: OtlpReceiver, trace_id: str) -> None:
    assert receiver.value("llmops.llm.calls", {"model": "demo", "outcome": "success"}) == 1
    assert receiver.value("llmops.llm.calls", {"model": "demo", "outcome": "cancelled"}) == 0
    for outcome in ("wrong_credentials", "rate_limited"):
        assert receiver.value("llmops.auth.attempts", {"method": "password", "outcome": outcome}) == 0
    (duration,) = receiver.latest("http.server.request.duration", {"http.route": "/llm/generate"})
    assert duration.unit == "s"
    assert duration.count == 1
    assert max(duration.bounds) >= 60
    exemplars = receiver.points("http.server.request.duration", **{"http.route": "/llm/generate"})
    assert trace_id in {exemplar for point in exemplars for exemplar in point.exemplars}
    names = {point.name for point in receiver.points()}
    assert {name for name in names if name.startswith("otel.sdk.")} >= {
        "otel.sdk.processor.span.queue.size",
        "otel.sdk.exporter.span.exported",
    }
    assert {"http.server.active_requests", "http.client.request.duration", "llmops.event_loop.lag"} <= names
    assert "http.server.response.body.size" not in names


def test_signals_can_be_turned_off_one_by_one(upstream: FakeUpstream, receiver: OtlpReceiver) -> None:
    variables = {**to_collector(receiver), "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
    with ServiceProcess({"LITELLM_URL": upstream.url, **variables}) as process:
        process.wait_ready()
        answer = generate(process, process.token())
        stopped(process)

    assert len(receiver.spans(answer.request_id)) == 4
    assert not receiver.logs()
    assert not receiver.points()


def test_what_is_done_last_is_exported_before_the_end(upstream: FakeUpstream, receiver: OtlpReceiver) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_url, "LITELLM_URL": upstream.url}
    with ServiceProcess(variables) as process:
        process.wait_ready()
        answer = generate(process, process.token())
        stopped(process)

    assert len(receiver.spans(answer.request_id)) == 4
    said = [log.body for log in receiver.logs(answer.request_id)]
    # The stop may find the request at its last step, and then says that it was completed.
    assert sorted(str(body) for body in said if body != "Request completed") == [
        "http_request_completed",
        "llm_request_completed",
        "llm_request_started",
    ]
    assert receiver.value("llmops.llm.calls", {"model": "demo", "outcome": "success"}) == 1
    assert any(str(log.body).startswith("Graceful shutdown completed") for log in receiver.logs())


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_no_canary_is_on_the_wire(upstream: FakeUpstream, receiver: OtlpReceiver, protocol: str) -> None:
    canary = {
        name: f"canary-{name}-{secrets.token_hex(8)}"
        for name in ("key", "prompt", "system", "password", "header", "cookie", "basic", "query")
    }
    variables = {
        "LITELLM_URL": upstream.url,
        "LITELLM_API_KEY": canary["key"],
        "LLM_TIMEOUT_S": "0.3",
        "LLM_CONNECT_TIMEOUT_S": "0.2",
        "LOG_LEVEL": "DEBUG",
        **to_collector(receiver, protocol),
    }
    with ServiceProcess(variables) as process:
        process.wait_ready()
        token = process.token()
        headers = {"X-Custom": canary["header"], "Cookie": f"session={canary['cookie']}"}
        body = as_json({"prompt": canary["prompt"], "system_prompt": canary["system"]})
        echo = {"error": {"message": " ".join(canary.values()), "type": canary["key"]}}
        upstream.script(Status(400, echo), Status(401, echo), Status(500, echo), Garbage(), Silent())
        signed_in = {"Authorization": f"Bearer {token}"}
        wrong = as_json({"username": "user", "password": canary["password"]})
        sent = [
            *[("/llm/generate", body, signed_in)] * 6,
            ("/llm/generate", body, {"Authorization": f"Basic {canary['basic']}"}),
            ("/llm/generate", body[:-1], signed_in),
            ("/auth/login", wrong, signed_in),
            ("/nowhere", body, signed_in),
        ]
        answers = []
        for path, data, authorization in sent:
            fields = {name: value.encode() for name, value in {**headers, **authorization}.items()}
            target = f"{path}?q={canary['query']}".encode()
            answers.append(raw(process.port, http_request("POST", target, fields, data)).answer)
        decoded(process.text())
        stopped(process)
        written = process.text()

    assert [answer.status for answer in answers] == [400, 502, 502, 502, 504, 200, 401, 422, 401, 404]
    for answer in answers:
        assert receiver.spans(answer.request_id)
        assert receiver.logs(answer.request_id)
    hidden = {**canary, **process.passwords, "jwt": process.environment["JWT_SECRET_KEY"], "token": token}
    bodies = b"".join(answer.body for answer in answers if answer.status != 200)
    places = [*receiver.raw, written.encode(), bodies]
    assert not [name for name, value in hidden.items() if any(value.encode() in place for place in places)]


def test_odd_bytes_of_a_caller_do_not_cost_a_batch(upstream: FakeUpstream, receiver: OtlpReceiver) -> None:
    """A span that cannot be encoded would take down all spans that are exported with it."""
    odd = [
        (b"/auth/me?\xff", {"User-Agent": b"\xff\\u"}),
        (b"/auth/me?%ff", {"User-Agent": b"\xed\xa0\x80"}),
        (b"/%ed%a0%80", {"Host": b"\xff"}),
        (b"/auth/me", {"baggage": b"a=\xff", "tracestate": b"\xff=\xff", "X-Forwarded-For": b"\xff"}),
    ]
    with ServiceProcess({"LITELLM_URL": upstream.url, **to_collector(receiver)}) as process:
        process.wait_ready()
        answers = [raw(process.port, http_request("GET", path, fields)).answer for path, fields in odd]
        lines = stopped(process)

    for answer in answers:
        assert len(receiver.spans(answer.request_id)) == 1
        assert receiver.logs(answer.request_id)
    assert not [line for line in lines if line["level"] == "ERROR"]
