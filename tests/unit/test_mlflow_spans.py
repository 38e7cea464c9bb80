"""The tree of spans that MLflow gets for a record."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.recording.mlflow import encode
from service.recording.record import AttemptRecord, CallRecord
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
    """The root."""
    return decode(encode([record], {}))[0]


def below(record: CallRecord) -> list[Span]:
    """All others."""
    return decode(encode([record], {}))[1:]


def said_by(span: Span) -> dict[str, Any]:
    return {entry.key: plain(entry.value) for entry in span.attributes}


def attributes_of(record: CallRecord) -> dict[str, Any]:
    return said_by(span_of(record))


def times_s(record: CallRecord, span: Span) -> tuple[float, float]:
    """Begin and end of a span, from the start of the call."""
    moments = span.start_time_unix_nano, span.end_time_unix_nano
    begin_s, end_s = (round((moment - record.started_ns) / 1e9, 6) for moment in moments)
    return begin_s, end_s


FAILED = AttemptRecord(started_s=0.01, duration_s=0.5, error="UpstreamError", status=503, wait_s=0.25)
RESET = AttemptRecord(started_s=0.76, duration_s=0.25, error="UpstreamError", cause="reset", wait_s=0.5)
ANSWERED = AttemptRecord(started_s=1.51, duration_s=1.0)
RETRIED = make_record(
    1, duration_s=2.52, attempts=3, tries=(FAILED, RESET, ANSWERED), lookup_s=0.008, cache="miss"
)


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
        # Its two attempts are not described, as in a record of an earlier version.
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
        "mlflow.traceTag.user": "user",
        "mlflow.traceTag.model": "demo",
        "mlflow.traceTag.outcome": "success",
        "mlflow.traceTag.cost": "0.0125",
    }
    assert below(record) == []


def test_the_look_up_and_each_attempt_are_below_the_call() -> None:
    lookup, *attempts = below(RETRIED)
    assert said_by(span_of(RETRIED))["mlflow.spanType"] == "CHAIN"
    for span in (lookup, *attempts):
        assert span.trace_id.hex() == RETRIED.record_id
        assert span.parent_span_id.hex() == RETRIED.span_id
    assert (lookup.name, times_s(RETRIED, lookup)) == ("cache lookup", (0.0, 0.008))
    assert said_by(lookup) == {"mlflow.spanType": "MEMORY", "llmops.cache.result": "miss"}
    model = {
        "mlflow.spanType": "CHAT_MODEL",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "litellm",
        "gen_ai.request.model": "demo",
    }
    failed = {"error.type": "UpstreamError"}
    ok, error = Status.STATUS_CODE_OK, Status.STATUS_CODE_ERROR
    assert [
        (span.name, times_s(RETRIED, span), span.status.code, span.status.message, said_by(span))
        for span in attempts
    ] == [
        (
            "attempt 1",
            (0.01, 0.51),
            error,
            "UpstreamError",
            {**model, **failed, "llmops.upstream.status_code": 503, "llmops.retry.delay": 0.25},
        ),
        (
            "attempt 2",
            (0.76, 1.01),
            error,
            "UpstreamError",
            {**model, **failed, "llmops.upstream.cause": "reset", "llmops.retry.delay": 0.5},
        ),
        ("attempt 3", (1.51, 2.51), ok, "", model),
    ]


def test_the_first_chunk_is_below_the_attempt_that_was_streamed() -> None:
    record = replace(RETRIED, streamed=True, first_chunk_s=1.75)
    *_, last, first_chunk = below(record)
    assert (first_chunk.name, times_s(record, first_chunk)) == ("first chunk", (1.51, 1.75))
    assert first_chunk.parent_span_id == last.span_id


def test_a_hit_says_how_its_answer_was_found() -> None:
    record = make_record(
        outcome="cached",
        cache="hit",
        lookup_s=0.02,
        cache_kind="semantic",
        similarity=0.97,
        age_s=12.5,
        streamed=True,
        first_chunk_s=0.1,
    )
    (lookup,) = below(record)
    assert said_by(span_of(record))["mlflow.spanType"] == "CHAIN"
    assert said_by(lookup) == {
        "mlflow.spanType": "MEMORY",
        "llmops.cache.result": "hit",
        "llmops.cache.kind": "semantic",
        "llmops.cache.similarity": 0.97,
        "llmops.cache.age": 12.5,
    }
    shared = make_record(outcome="cached", cache="hit", lookup_s=0.02, shared=True)
    assert said_by(below(shared)[0])["llmops.cache.shared"] is True
    failed = make_record(cache="miss", lookup_s=0.02, lookup_failed=True)
    assert said_by(below(failed)[0])["llmops.cache.result"] == "error"


def test_what_is_searched_for_is_a_tag() -> None:
    record = make_record(
        continued=True,
        incident_id="inc_0000000000000001",
        team="search",
        key_id="key-1",
        outcome="error",
        error="UpstreamError",
        error_reason="HTTP 503",
        retry_ended="exhausted",
        upstream_status=503,
        upstream_code="other",
        route="/v1/chat/completions",
        cached_tokens=64,
        reasoning_tokens=32,
        cost=0.000042,
    )
    said = attributes_of(record)
    tags = {
        name.removeprefix("mlflow.traceTag."): value
        for name, value in said.items()
        if name.startswith("mlflow.traceTag.")
    }
    assert tags == {
        "request_id": record.trace_id,
        "record_id": record.record_id,
        "span_id": record.span_id,
        "incident_id": "inc_0000000000000001",
        "user": "user",
        "team": "search",
        "key_id": "key-1",
        "model": "demo",
        "outcome": "error",
        "error": "UpstreamError",
        "cached_tokens": 64,
        "reasoning_tokens": 32,
        "cost": "0.000042",
    }
    assert said["gen_ai.usage.cache_read.input_tokens"] == 64
    assert said["gen_ai.usage.reasoning.output_tokens"] == 32
    assert said["llmops.retry.outcome"] == "exhausted"
    assert (said["llmops.upstream.status_code"], said["llmops.upstream.code"]) == (503, "other")
    assert said["http.route"] == "/v1/chat/completions"
    assert span_of(record).status.message == "UpstreamError: HTTP 503"


def test_a_record_that_is_sent_again_makes_the_same_tree() -> None:
    record = replace(RETRIED, streamed=True, first_chunk_s=1.75)
    again = CallRecord.from_line(record.as_line())
    assert encode([again], {}) == encode([record], {})
    ids = {span.span_id for span in decode(encode([record], {}))}
    assert len(ids) == 6
    assert all(ids)
    # Calls of one trace, and the calls of one process, have spans of their own.
    others = [replace(record, span_id=f"{number:016x}") for number in range(3, 51)]
    assert len({span.span_id for span in decode(encode([record, *others], {}))}) == 6 * 49


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


WITHOUT_CHECK = (
    *("user", "error", "answer", "cost", "route", "lookup_s", "first_chunk_s", "similarity", "age_s"),
    *("cached_tokens", "error_reason", "upstream_status", "shared"),
)


@given(
    changes=st.fixed_dictionaries({}, optional=dict.fromkeys(WITHOUT_CHECK, ODD)),
    error=ODD,
    duration_s=st.floats(0) | st.integers(0) | st.just(10**400),
)
def test_every_record_can_be_encoded(changes: dict[str, Any], error: Any, duration_s: float) -> None:
    attempt = AttemptRecord(
        started_s=duration_s, duration_s=0.5, error=error, cause=error, status=error, wait_s=duration_s
    )
    record = make_record(model=str(changes), tries=(attempt,), attempts=1, **changes)
    for span in decode(encode([record], {})):
        assert span.name
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= record.started_ns + 250_000_000


@given(started_ns=st.integers(0), duration_s=st.floats(0) | st.integers(0))
def test_every_time_can_be_encoded(started_ns: int, duration_s: float) -> None:
    span = span_of(make_record(started_ns=started_ns, duration_s=duration_s))
    assert span.start_time_unix_nano <= span.end_time_unix_nano
