"""One request is one trace: the same id in header, body, log lines and spans, and on the upstream's wire."""

import logging

from opentelemetry.trace import SpanKind

from service.config.log_records import PlainRecord
from tests.fakes.upstream import FakeUpstream
from tests.harness import AppUnderTest
from tests.http.support import trace_of


def test_one_call_is_one_trace(service: AppUnderTest, upstream: FakeUpstream) -> None:
    token = service.token()
    service.call("GET", "/health")
    answer = service.call("POST", "/llm/generate", body={"prompt": "What is a trace?"}, token=token)

    assert answer.status == 200
    assert answer.json == {
        "response": "Hello from the fake.",
        "model": "demo",
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "total_tokens": 30,
        "cost": 0.00042,
        "cache": "bypass",
        "request_id": answer.request_id,
    }
    spans = trace_of(service, answer.request_id)
    assert [(span.name, span.kind) for span in spans] == [
        ("POST /llm/generate", SpanKind.SERVER),
        ("llm call", SpanKind.INTERNAL),
        ("chat demo", SpanKind.CLIENT),
        ("POST", SpanKind.CLIENT),
    ]
    parents = [span.parent.span_id if span.parent else None for span in spans]
    assert parents == [None, *(span.context.span_id for span in spans[:-1])]
    seen = upstream.chat_requests[0].headers["traceparent"]
    assert seen == f"00-{answer.request_id}-{spans[-1].context.span_id:016x}-03"
    assert [line["message"] for line in service.lines(answer.request_id)] == [
        "llm_request_started",
        "llm_request_completed",
        "http_request_completed",
    ]
    assert {line["trace_id"] for line in service.lines(answer.request_id)} == {answer.request_id}
    assert {line["user"] for line in service.lines(answer.request_id)} == {"user"}
    assert service.value("llmops.llm.calls", model="demo", outcome="success") == 1
    assert service.value("llmops.llm.cost", model="demo") == 0.00042
    assert service.value("gen_ai.client.operation.duration", gen_ai__request__model="demo") == 1


def test_the_lines_of_a_call_need_no_conversion(service: AppUnderTest) -> None:
    """Other records cost three times as much, and each call writes these."""
    kept = _Keeping()
    logging.getLogger("service").addHandler(kept)
    try:
        service.call("POST", "/llm/generate", body={"prompt": "What is a line?"}, token=service.token())
    finally:
        logging.getLogger("service").removeHandler(kept)
    assert {
        record.msg: type(record) for record in kept.records if record.msg.startswith(("llm_", "http_"))
    } == {
        "llm_request_started": PlainRecord,
        "llm_request_completed": PlainRecord,
        "http_request_completed": PlainRecord,
    }


class _Keeping(logging.Handler):
    """Keeps the records that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
