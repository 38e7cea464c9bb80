"""Reads a call's record back from its trace in MLflow, as far as it is there; the reverse of ``encode``."""

from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv._incubating.attributes.user_attributes import USER_ID
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_ROUTE

from service.recording.mlflow import COST, SPAN_ATTEMPT
from service.recording.record import MAX_TRIES, AttemptRecord, CallRecord
from service.telemetry import names


def record_in(trace: Any) -> CallRecord | None:  # noqa: ANN401 - JSON of another program
    """The record of a call; None where the trace is none of this service's, or cannot be read.

    Prompt and answer are not read.
    """
    try:
        return _record(trace)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError):
        return None


def _record(trace: Any) -> CallRecord:  # noqa: ANN401 - as above
    about, spans = trace["trace_info"], trace["spans"]
    tags: Mapping[str, str] = about["tags"]
    (root,) = [span for span in spans if not span.get("parent_span_id")]
    given = attributes_of(root)
    began_ns = int(root["start_time_unix_nano"])
    below = {span["name"]: span for span in spans if span is not root}
    lookup = below.get(names.SPAN_CACHE_LOOKUP)
    found = {} if lookup is None else attributes_of(lookup)
    cached = given[names.ATTR_LLM_OUTCOME] == "cached"
    status = root.get("status", {}).get("message", "")
    record = CallRecord(
        trace_id=tags["request_id"],
        span_id=tags["span_id"],
        continued=about["trace_id"] != f"tr-{tags['request_id']}",
        incident_id=tags.get("incident_id"),
        operation=str(given[gen_ai.GEN_AI_OPERATION_NAME]),
        started_ns=began_ns,
        duration_s=_length_s(root),
        user=str(given[USER_ID]),
        team=given.get(names.ATTR_TEAM),
        key_id=given.get(names.ATTR_KEY_ID),
        route=given.get(HTTP_ROUTE),
        model=str(given[gen_ai.GEN_AI_REQUEST_MODEL]),
        outcome=str(given[names.ATTR_LLM_OUTCOME]),
        response_model=given.get(gen_ai.GEN_AI_RESPONSE_MODEL),
        error=given.get(ERROR_TYPE),
        error_reason=status.partition(": ")[2] or given.get(ERROR_TYPE),
        attempts=given.get(names.ATTR_LLM_ATTEMPTS, 0),
        tries=tuple(_attempts(below, began_ns)),
        retry_ended=given.get(names.ATTR_RETRY_OUTCOME),
        upstream_status=given.get(names.ATTR_UPSTREAM_STATUS),
        upstream_code=given.get(names.ATTR_UPSTREAM_CODE),
        prompt_tokens=given.get(gen_ai.GEN_AI_USAGE_INPUT_TOKENS),
        completion_tokens=given.get(gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS),
        total_tokens=_sum(
            given.get(gen_ai.GEN_AI_USAGE_INPUT_TOKENS), given.get(gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS)
        ),
        cached_tokens=given.get(gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS),
        reasoning_tokens=given.get(gen_ai.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS),
        # The attribute is 0 where there is no price; the tag is not there then, and a hit has none either.
        cost=given[COST]["total_cost"] if "cost" in tags or cached else None,
        estimated=given.get(names.ATTR_LLM_ESTIMATED, False),
        streamed=given.get(names.ATTR_LLM_STREAMED, False),
        first_chunk_s=given.get(names.ATTR_LLM_FIRST_CHUNK),
        cache=given.get(names.ATTR_CACHE_RESULT, "bypass"),
        saved_cost=given.get(names.ATTR_CACHE_SAVED_COST),
        lookup_s=None if lookup is None else _length_s(lookup),
        lookup_failed=found.get(names.ATTR_CACHE_RESULT) == "error",
        cache_kind=found.get(names.ATTR_CACHE_KIND),
        similarity=found.get(names.ATTR_CACHE_SIMILARITY),
        age_s=found.get(names.ATTR_CACHE_AGE),
        shared=found.get(names.ATTR_CACHE_SHARED, False),
    )
    # Raises where a value is of no use, as for a line of the spool.
    return CallRecord.from_line(record.as_line())


def _attempts(below: Mapping[str, Any], began_ns: int) -> Iterator[AttemptRecord]:
    for number in range(1, MAX_TRIES + 1):
        if (span := below.get(SPAN_ATTEMPT.format(number))) is None:
            return
        given = attributes_of(span)
        yield AttemptRecord(
            started_s=(int(span["start_time_unix_nano"]) - began_ns) / 1e9,
            duration_s=_length_s(span),
            error=given.get(ERROR_TYPE),
            cause=given.get(names.ATTR_UPSTREAM_CAUSE),
            status=given.get(names.ATTR_UPSTREAM_STATUS),
            wait_s=given.get(names.ATTR_RETRY_DELAY, 0.0),
        )


def _length_s(span: Mapping[str, Any]) -> float:
    return round((int(span["end_time_unix_nano"]) - int(span["start_time_unix_nano"])) / 1e9, 6)


def _sum(prompt: int | None, completion: int | None) -> int | None:
    return None if prompt is None or completion is None else prompt + completion


def attributes_of(span: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a span in the JSON form of OTLP."""
    return {entry["key"]: _value(entry["value"]) for entry in span.get("attributes", [])}


def _value(value: Mapping[str, Any]) -> Any:  # noqa: ANN401 - as above
    for kind, given in value.items():
        match kind:
            case "int_value":
                return int(given)
            case "double_value":
                return float(given)
            case "kvlist_value":
                return {entry["key"]: _value(entry["value"]) for entry in given.get("values", [])}
            case "array_value":
                return [_value(entry) for entry in given.get("values", [])]
            case _:
                return given
    return None
