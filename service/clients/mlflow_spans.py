"""From records of calls to the OTLP spans that MLflow's server keeps as traces."""

import json
from collections.abc import Iterable, Mapping

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue, KeyValueList
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv._incubating.attributes.user_attributes import USER_ID
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE

from service.clients.call_record import CallRecord
from service.telemetry import names

PROVIDER = "litellm"

# MLflow's own names; its server reads them off a root span (mlflow/tracing/constant.py).
SPAN_TYPE = "mlflow.spanType"
INPUTS = "mlflow.spanInputs"
OUTPUTS = "mlflow.spanOutputs"
COST = "mlflow.llm.cost"
TAG = "mlflow.traceTag."
SPAN_TYPES = {"chat": "CHAT_MODEL", "embeddings": "EMBEDDING"}

MOST_INT = 2**63 - 1


def encode(records: Iterable[CallRecord], resource: Mapping[str, str]) -> bytes:
    """The body of one export: a root span for each record.

    MLflow keeps a span as the trace ``tr-<trace id>``, and one that it has already it keeps as it is: sending
    a record again changes nothing. The span has no parent there: one that never comes would leave the trace
    in progress for ever. Whatever a record holds, something can be sent: one that could not would be in the
    way of all others.
    """
    # Records of one time say much the same: what is equal in them is made once.
    made: dict[tuple[str, type, object], KeyValue] = {}
    spans = [_span(record, made) for record in records]
    attributes = [_attribute(name, value) for name, value in resource.items()]
    about = ResourceSpans(resource=Resource(attributes=attributes), scope_spans=[ScopeSpans(spans=spans)])
    return bytes(ExportTraceServiceRequest(resource_spans=[about]).SerializeToString())


def _span(record: CallRecord, made: dict[tuple[str, type, object], KeyValue]) -> Span:
    succeeded = record.error is None and record.outcome != "cancelled"
    return Span(
        trace_id=bytes.fromhex(record.trace_id),
        span_id=bytes.fromhex(record.span_id),
        name=_text(f"{record.operation} {record.model}"),
        kind=Span.SPAN_KIND_CLIENT,
        start_time_unix_nano=_whole(record.started_ns),
        end_time_unix_nano=_whole(record.started_ns + _whole(min(record.duration_s, MOST_INT) * 1e9)),
        attributes=[
            _known(name, value, made) for name, value in _attributes(record).items() if value is not None
        ],
        status=Status(
            code=Status.STATUS_CODE_OK if succeeded else Status.STATUS_CODE_ERROR,
            message="" if succeeded else _text(record.error or record.outcome),
        ),
    )


def _attributes(record: CallRecord) -> dict[str, object]:
    return {
        SPAN_TYPE: SPAN_TYPES.get(record.operation, "LLM"),
        gen_ai.GEN_AI_OPERATION_NAME: record.operation,
        gen_ai.GEN_AI_PROVIDER_NAME: PROVIDER,
        gen_ai.GEN_AI_REQUEST_MODEL: record.model,
        gen_ai.GEN_AI_RESPONSE_MODEL: record.response_model,
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: record.prompt_tokens,
        gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: record.completion_tokens,
        # Always there: without it the server puts a price of its own list in its place.
        COST: {"total_cost": record.cost or 0.0},
        USER_ID: record.user,
        ERROR_TYPE: record.error,
        names.ATTR_LLM_OUTCOME: record.outcome,
        names.ATTR_LLM_ATTEMPTS: record.attempts,
        names.ATTR_LLM_STREAMED: record.streamed or None,
        names.ATTR_LLM_FIRST_CHUNK: record.first_chunk_s,
        names.ATTR_LLM_ESTIMATED: record.estimated or None,
        names.ATTR_CACHE_RESULT: record.cache,
        names.ATTR_CACHE_SAVED_COST: record.saved_cost,
        INPUTS: record.prompt,
        OUTPUTS: record.answer,
        # What can be searched for in MLflow's page.
        f"{TAG}request_id": record.trace_id,
        f"{TAG}outcome": record.outcome,
    }


def _known(name: str, value: object, made: dict[tuple[str, type, object], KeyValue]) -> KeyValue:
    if not isinstance(value, (str, int)):
        return _attribute(name, value)
    # With its type: True equals 1 in Python.
    key = name, type(value), value
    if key not in made:
        made[key] = _attribute(name, value)
    return made[key]


def _attribute(name: str, value: object) -> KeyValue:
    return KeyValue(key=_text(name), value=_any_value(value))


def _any_value(value: object) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int() if abs(value) <= MOST_INT:
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case dict():
            return AnyValue(kvlist_value=KeyValueList(values=[_attribute(*entry) for entry in value.items()]))
        case _:
            return AnyValue(string_value=_text(value))


def _text(value: object) -> str:
    """Text that protobuf takes, and each database of MLflow's: no half characters, and no NUL."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _whole(value: float) -> int:
    return int(max(0, min(value, MOST_INT)))
