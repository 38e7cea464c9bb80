"""The span that MLflow gets for a record."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.recording.mlflow import encode
from service.recording.record import CallRecord
from tests.unit.recording import make_record


def decode(body: bytes) -> list[Span]:
    found = ExportTraceServiceRequest.FromString(body)
    return [span for about in found.resource_spans for scope in about.scope_spans for span in scope.spans]


def plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "kvlist_value":
        return {entry.key: plain(entry.value) for entry in value.kvlist_value.values}
    return getattr(value, kind) if kind else None


def span_of(record: CallRecord) -> Span:
    (span,) = decode(encode([record], {}))
    return span


def attributes_of(record: CallRecord) -> dict[str, Any]:
    return {entry.key: plain(entry.value) for entry in span_of(record).attributes}


def test_a_successful_call() -> None:
    record = make_record(
        1,
        response_model="demo-2",
        attempts=2,
        prompt_tokens=11,
        completion_tokens=7,
        cost=0.0125,
        duration_s=1.5,
        cache="miss",
    )
    span = span_of(record)
    assert span.trace_id.hex() == record.trace_id
    assert span.span_id.hex() == record.span_id
    # No parent, or MLflow would wait for it for ever.
    assert span.parent_span_id == b""
    assert span.name == "chat demo"
    assert span.end_time_unix_nano - span.start_time_unix_nano == 1_500_000_000
    assert span.start_time_unix_nano == record.started_ns
    assert span.status.code == Status.STATUS_CODE_OK
    assert attributes_of(record) == {
        "mlflow.spanType": "CHAT_MODEL",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "litellm",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo-2",
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "mlflow.llm.cost": {"total_cost": 0.0125},
        "user.id": "user",
        "enduser.id": "user",
        "llmops.llm.outcome": "success",
        "llmops.llm.attempts": 2,
        "llmops.cache.result": "miss",
        "mlflow.traceTag.request_id": record.trace_id,
        "mlflow.traceTag.span_id": record.span_id,
        "mlflow.traceTag.outcome": "success",
    }


def test_a_call_without_a_price_has_a_cost_of_zero() -> None:
    assert attributes_of(make_record())["mlflow.llm.cost"] == {"total_cost": 0.0}


def test_lone_surrogates_and_nul_are_replaced() -> None:
    shown = attributes_of(make_record(user="a\ud800b", answer="a\0b"))
    assert (shown["user.id"], shown["mlflow.spanOutputs"]) == ("a?b", "a\ufffdb")
    assert "\0" not in span_of(make_record(model="a\0b")).name


def test_numbers_beyond_64_bits() -> None:
    assert attributes_of(make_record(prompt_tokens=2**80))["gen_ai.usage.input_tokens"] == str(2**80)
    assert span_of(make_record(started_ns=2**80)).start_time_unix_nano == 2**63 - 1
    assert span_of(make_record(duration_s=10**400)).end_time_unix_nano == 2**63 - 1


ODD = (
    st.text(st.sampled_from("a\u00e9\U0001f600\ud800\udc00\0\n"), max_size=8)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.sampled_from(["a", "\ud800"]), st.integers(), max_size=2)
)


@given(changes=st.fixed_dictionaries({}, optional=dict.fromkeys(("user", "error", "answer", "cost"), ODD)))
def test_every_record_can_be_encoded(changes: dict[str, Any]) -> None:
    (span,) = decode(encode([make_record(model=str(changes), **changes)], {}))
    assert span.name


@given(started_ns=st.integers(0), duration_s=st.floats(0) | st.integers(0))
def test_every_time_can_be_encoded(started_ns: int, duration_s: float) -> None:
    span = span_of(make_record(started_ns=started_ns, duration_s=duration_s))
    assert span.start_time_unix_nano <= span.end_time_unix_nano
