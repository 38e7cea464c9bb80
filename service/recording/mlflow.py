"""The client of the MLflow server: runs, their metrics, and traces; the only importer of ``mlflow``.

Everything except ``ping`` and ``in_thread`` blocks, and runs in daemon threads, so that a server that does
not answer cannot delay the exit of the process.
"""

import asyncio
import hashlib
import importlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from operator import attrgetter
from typing import Any, TypeVar

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv._incubating.attributes.enduser_attributes import ENDUSER_ID
from opentelemetry.semconv._incubating.attributes.user_attributes import USER_ID
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_ROUTE

from service.config.settings import Settings
from service.errors import UpstreamError
from service.recording.record import AttemptRecord, CallRecord
from service.telemetry import names
from service.telemetry.slices import Slices

# The names that MLflow's server reads from a root span (mlflow/tracing/constant.py).
SPAN_TYPE = "mlflow.spanType"
INPUTS = "mlflow.spanInputs"
OUTPUTS = "mlflow.spanOutputs"
COST = "mlflow.llm.cost"
TAG = "mlflow.traceTag."
CHAIN = "CHAIN"
MEMORY = "MEMORY"
"""Of the cache look-up. Not ``RETRIEVER``: MLflow's judges of retrieval take those for documents."""

SPAN_TYPES = {"chat": "CHAT_MODEL", "embeddings": "EMBEDDING"}
"""By the operation, of the spans in which a model was asked; of all others ``LLM``."""

TAG_REQUEST_ID = f"{TAG}request_id"
TAG_RECORD_ID = f"{TAG}record_id"
TAG_SPAN_ID = f"{TAG}span_id"
TAG_INCIDENT_ID = f"{TAG}incident_id"
TAG_CACHED_TOKENS = f"{TAG}cached_tokens"
TAG_REASONING_TOKENS = f"{TAG}reasoning_tokens"
TAG_COST = f"{TAG}cost"

SPAN_ATTEMPT = "attempt {}"
SPAN_FIRST_CHUNK = "first chunk"

MAX_INT = 2**63 - 1


def encode(records: Sequence[CallRecord], resource: Mapping[str, str]) -> bytes:
    """The body of one export: a tree of spans for each record.

    The root is the call. Below it are the cache look-up and the attempts, and below the attempt that was
    streamed the time to its first chunk.

    MLflow stores a root as the trace ``tr-<trace id>``, and writes a span that it has over with the same one,
    so sending a record twice is harmless: all ids are made from those of the record. Two roots of one trace
    would be one record there, so each has its own ``record_id``. The root has no parent: MLflow would wait
    for it and keep the trace in progress. Every record can be encoded, whatever it holds, as one that could
    not would block all others.
    """
    request = ExportTraceServiceRequest()
    resource_spans = request.resource_spans.add()
    _put(resource_spans.resource.attributes, {_text(name): value for name, value in resource.items()})
    # Each span is made where it stays: to copy one takes as long as to make it.
    templates = _Templates(resource_spans.scope_spans.add())
    for record in Slices(records):
        _add_tree(record, templates)
    return bytes(request.SerializeToString())


class _Templates:
    """Spans without ids and times, each encoded once: most records of an export are alike.

    A span that is parsed takes a tenth of the time of one that is built from its attributes.

    Args:
        scope: Where the spans go.
    """

    def __init__(self, scope: ScopeSpans) -> None:
        self._spans = scope.spans
        self._encoded: dict[str, bytes] = {}

    def add(self, name: str, said: tuple[object, ...], make: Callable[[], Span]) -> Span:
        """Add a span like the one that ``make`` returns for a name and what it says."""
        # Its text, as that tells True from 1, and a record from disk may hold what has no hash.
        key = f"{name} {said!r}"
        encoded = self._encoded.get(key)
        if encoded is None:
            encoded = self._encoded[key] = make().SerializeToString()
        span: Span = self._spans.add()
        span.MergeFromString(encoded)
        return span


def _add_tree(record: CallRecord, templates: _Templates) -> None:
    """Add the spans of a record, the root first."""
    # In records of earlier versions the attempts are counted, and not described.
    told = len(record.tries) > 0 or not record.attempts
    root = templates.add("", (told, *_SHARED(record)), partial(_root_of, record, told=told))
    _put(root.attributes, _own_attributes(record))
    root.trace_id, root.span_id = bytes.fromhex(record.record_id), bytes.fromhex(record.span_id)
    root.start_time_unix_nano = _at(record, 0.0)
    root.end_time_unix_nano = _at(record, record.duration_s)
    if record.lookup_s is not None:
        said = "error" if record.lookup_failed else record.cache, record.cache_kind, record.shared
        lookup = templates.add(names.SPAN_CACHE_LOOKUP, said, partial(_lookup_of, *said))
        how = {names.ATTR_CACHE_SIMILARITY: record.similarity, names.ATTR_CACHE_AGE: record.age_s}
        _put(lookup.attributes, how)
        _place(lookup, record, root, 0.0, record.lookup_s)
    for number, attempt in enumerate(record.tries, 1):
        asked = record.operation, record.model
        became = attempt.error, attempt.cause, attempt.status
        name = SPAN_ATTEMPT.format(number)
        span = templates.add(name, (*asked, *became), partial(_attempt_of, name, *asked, attempt))
        _put(span.attributes, {names.ATTR_RETRY_DELAY: attempt.wait_s or None})
        end_s = min(attempt.started_s, MAX_INT) + min(attempt.duration_s, MAX_INT)
        _place(span, record, root, attempt.started_s, end_s)
        if number == len(record.tries) and record.first_chunk_s is not None:
            first = templates.add(SPAN_FIRST_CHUNK, (), partial(_span, SPAN_FIRST_CHUNK, {}))
            _place(first, record, span, attempt.started_s, record.first_chunk_s)


def _place(span: Span, record: CallRecord, parent: Span, begin_s: object, end_s: object) -> None:
    """Set ids and times of a span; they are the same each time that the record is sent.

    Args:
        span: Its name is unlike that of any other span of the record.
        record: The record.
        parent: The span above it.
        begin_s: When it began, in seconds from the start of the call.
        end_s: When it ended.
    """
    latest = _at(record, record.duration_s)
    began, ended = min(_at(record, begin_s), latest), min(_at(record, end_s), latest)
    span.trace_id, span.parent_span_id = parent.trace_id, parent.span_id
    span.span_id = hashlib.blake2b(
        span.name.encode(), digest_size=8, key=bytes.fromhex(record.span_id)
    ).digest()
    span.start_time_unix_nano, span.end_time_unix_nano = began, max(began, ended)


def _at(record: CallRecord, moment_s: object) -> int:
    """A moment of a call in Unix nanoseconds; what is no number stands for the start of the call."""
    seconds = moment_s if isinstance(moment_s, (int, float)) else 0.0
    return _clamp(record.started_ns + _clamp(min(seconds, MAX_INT) * 1e9))


def _span(name: str, attributes: Mapping[str, object], error: str = "") -> Span:
    """A span without ids and times; ``error`` is empty where there is none."""
    code = Status.STATUS_CODE_ERROR if error else Status.STATUS_CODE_OK
    span = Span(name=name, kind=Span.SPAN_KIND_INTERNAL, status=Status(code=code, message=error))
    _put(span.attributes, attributes)
    return span


_SHARED = attrgetter(
    *("operation", "model", "response_model", "user", "team", "key_id", "route", "outcome", "error"),
    *("error_reason", "attempts", "retry_ended", "upstream_status", "upstream_code", "streamed"),
    *("estimated", "cache"),
)
"""What the root says that it may have in common with those of other records."""


def _root_of(record: CallRecord, *, told: bool) -> Span:
    error = ""
    if record.error is not None or record.outcome == "cancelled":
        error = _text(record.error or record.outcome)
        if record.error_reason not in (None, record.error):
            error = f"{error}: {_text(record.error_reason)}"
    attributes = {
        SPAN_TYPE: CHAIN if told else SPAN_TYPES.get(record.operation, "LLM"),
        gen_ai.GEN_AI_OPERATION_NAME: record.operation,
        gen_ai.GEN_AI_PROVIDER_NAME: names.LLM_PROVIDER,
        gen_ai.GEN_AI_REQUEST_MODEL: record.model,
        gen_ai.GEN_AI_RESPONSE_MODEL: record.response_model,
        USER_ID: record.user,
        ENDUSER_ID: record.user,
        names.ATTR_TEAM: record.team,
        names.ATTR_KEY_ID: record.key_id,
        HTTP_ROUTE: record.route,
        ERROR_TYPE: record.error,
        names.ATTR_LLM_OUTCOME: record.outcome,
        names.ATTR_LLM_ATTEMPTS: record.attempts,
        names.ATTR_RETRY_OUTCOME: record.retry_ended,
        names.ATTR_UPSTREAM_STATUS: record.upstream_status,
        names.ATTR_UPSTREAM_CODE: record.upstream_code,
        names.ATTR_LLM_STREAMED: record.streamed or None,
        names.ATTR_LLM_ESTIMATED: record.estimated or None,
        names.ATTR_CACHE_RESULT: record.cache,
        # Tags can be searched for on MLflow's page.
        f"{TAG}user": record.user,
        f"{TAG}team": record.team,
        f"{TAG}key_id": record.key_id,
        f"{TAG}model": record.model,
        f"{TAG}outcome": record.outcome,
        f"{TAG}error": record.error,
    }
    return _span(_text(f"{record.operation} {record.model}"), attributes, error)


def _own_attributes(record: CallRecord) -> dict[str, object]:
    """What only this record says."""
    return {
        # On the root only: MLflow adds up what is on the spans below it otherwise.
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: record.prompt_tokens,
        gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: record.completion_tokens,
        gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: record.cached_tokens,
        gen_ai.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS: record.reasoning_tokens,
        # Always set: without it the server computes a cost from its own price list.
        COST: {"total_cost": record.cost or 0.0},
        names.ATTR_LLM_FIRST_CHUNK: record.first_chunk_s,
        names.ATTR_CACHE_SAVED_COST: record.saved_cost,
        INPUTS: record.prompt,
        OUTPUTS: record.answer,
        TAG_REQUEST_ID: record.trace_id,
        # The server looks each tag up before it writes it: there is none that others make needless.
        TAG_RECORD_ID: record.record_id if record.continued else None,
        TAG_SPAN_ID: record.span_id,
        TAG_INCIDENT_ID: record.incident_id,
        TAG_CACHED_TOKENS: record.cached_tokens,
        TAG_REASONING_TOKENS: record.reasoning_tokens,
        TAG_COST: _decimal(record.cost) if record.cost else None,
    }


def _lookup_of(result: str, kind: str | None, shared: object) -> Span:
    attributes = {
        SPAN_TYPE: MEMORY,
        names.ATTR_CACHE_RESULT: result,
        names.ATTR_CACHE_KIND: kind,
        names.ATTR_CACHE_SHARED: shared or None,
    }
    return _span(names.SPAN_CACHE_LOOKUP, attributes)


def _attempt_of(name: str, operation: str, model: str, attempt: AttemptRecord) -> Span:
    attributes = {
        SPAN_TYPE: SPAN_TYPES.get(operation, "LLM"),
        gen_ai.GEN_AI_OPERATION_NAME: operation,
        gen_ai.GEN_AI_PROVIDER_NAME: names.LLM_PROVIDER,
        gen_ai.GEN_AI_REQUEST_MODEL: model,
        ERROR_TYPE: attempt.error,
        names.ATTR_UPSTREAM_CAUSE: attempt.cause,
        names.ATTR_UPSTREAM_STATUS: attempt.status,
    }
    return _span(name, attributes, "" if attempt.error is None else _text(attempt.error))


def _decimal(number: object) -> object:
    """A number as people write it when they search for it, without an exponent."""
    return f"{number:.12f}".rstrip("0").rstrip(".") if isinstance(number, float) else number


def _put(target: Any, attributes: Mapping[str, object]) -> None:  # noqa: ANN401 - of protobuf's own type
    """Add the attributes that are not None to a list of ``KeyValue``."""
    for name, value in attributes.items():
        if value is not None:
            _set(target.add(key=name).value, value)


def _set(target: AnyValue, value: object) -> None:
    match value:
        case str():
            target.string_value = _text(value)
        case bool():
            target.bool_value = value
        case int() if abs(value) <= MAX_INT:
            target.int_value = value
        case float():
            target.double_value = value
        case dict():
            # An empty one is a value too.
            target.kvlist_value.SetInParent()
            for name, inner in value.items():
                _set(target.kvlist_value.values.add(key=_text(name)).value, inner)
        case _:
            target.string_value = _text(value)


def _text(value: object) -> str:
    """Text that protobuf and MLflow's databases accept: without lone surrogates and NUL characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _clamp(value: float) -> int:
    return int(max(0, min(value, MAX_INT)))


T = TypeVar("T")

_importing = threading.Lock()

API_PING = "/api/2.0/mlflow/experiments/search"
TRACES = "/v1/traces"
EXPERIMENT = "/api/2.0/mlflow/experiments/get-by-name"
SEARCH_TRACES = "/api/3.0/mlflow/traces/search"
GET_TRACES = "/api/3.0/mlflow/traces/batchGet"
TRACES_AT_ONCE = 10
"""How many traces are fetched at once: with captured content they are large."""

EXPERIMENT_HEADER = "x-mlflow-experiment-id"
RUN_HEADER = "x-mlflow-run-id"
MAX_TRACES = 100
"""The most records of one export: the server links at most so many traces to a run at once."""

JSON = "application/json"
PROTOBUF = "application/x-protobuf"

NOT_MLFLOW = "not MLflow's answer"
UNKNOWN_USER = "unknown"
"""The user of a run, as ``MlflowClient`` has it; the field is deprecated."""

SDK_MODULES = ("mlflow.utils.rest_utils", "mlflow.entities", "mlflow.store.tracking.rest_store")
MAX_PARAM_CHARS = 500
REFUSED_STATUSES = frozenset(
    {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
)


class TrackerError(Exception):
    """A request to the server failed; ``reason`` is a short text for people.

    It is not part of the service's error tree: no caller is answered with it.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class RefusedError(TrackerError):
    """The server refuses these records; it may accept others."""


class GoneError(TrackerError):
    """The run or its experiment does not exist any more."""


class _InvalidParameterError(TrackerError):
    """The server refuses what a call of the SDK sent, or the state of the run it names."""


@dataclass(frozen=True)
class Run:
    """The ids of a run on the server."""

    run_id: str
    experiment_id: str


class NoTracker:
    """Stands for MLflow where no server is configured: it takes everything, and keeps nothing."""

    def start_run(self, name: str, started_ms: int) -> Run:
        """Return a run without ids, so that a process with a server creates it there."""
        del name, started_ms
        return Run("", "")

    def log_params(self, run: Run, params: Mapping[str, str]) -> None:
        """Do nothing."""

    def log_totals(self, run: Run, totals: Mapping[str, float], at_ms: int) -> None:
        """Do nothing."""

    def end_run(self, run: Run, status: str, at_ms: int) -> None:
        """Do nothing."""

    def send(self, records: Sequence[CallRecord], run: Run) -> None:
        """Do nothing."""

    def check(self) -> None:
        """Do nothing."""


class Tracker:
    """An MLflow server; requests have a time limit and are not retried.

    Args:
        settings: The server's address, the experiment's name, and the time limit of a request.
        resource: The resource attributes of every trace.
    """

    def __init__(self, settings: Settings, resource: Mapping[str, str]) -> None:
        self._uri = settings.mlflow_tracking_uri.rstrip("/")
        self._experiment = settings.mlflow_experiment_name
        self._timeout_s = settings.mlflow_timeout_s
        self._resource = dict(resource)
        self._sdk_store: Any = None

    def start_run(self, name: str, started_ms: int) -> Run:
        """Return the run of this name in the experiment, and create both where they do not exist.

        Args:
            name: The run's name; unique.
            started_ms: Unix time in milliseconds.

        Raises:
            TrackerError: The server refused, could not be reached, or did not answer in time.
        """
        _import_sdk()
        from mlflow.entities import ViewType  # noqa: PLC0415 - see _import_sdk

        def start() -> Run:
            found = self._store.get_experiment_by_name(self._experiment)
            identifier = found.experiment_id if found else self._store.create_experiment(self._experiment)
            # An earlier attempt may have created it without getting the answer.
            query = f"attributes.run_name = '{name}'"
            runs = self._store.search_runs([identifier], query, ViewType.ACTIVE_ONLY, max_results=1)
            run = runs[0] if runs else self._store.create_run(identifier, UNKNOWN_USER, started_ms, [], name)
            return Run(run.info.run_id, identifier)

        run = _translate_errors(start)
        if not run.run_id or not run.experiment_id:
            # The SDK accepts every JSON object as an answer.
            raise TrackerError(NOT_MLFLOW)
        return run

    def log_params(self, run: Run, params: Mapping[str, str]) -> None:
        """Set the run's parameters, cut to the length that the server accepts.

        Raises:
            GoneError: The run was deleted.
            TrackerError: As for ``start_run``.
        """
        _import_sdk()
        from mlflow.entities import Param  # noqa: PLC0415 - see _import_sdk

        entries = [Param(key, value[:MAX_PARAM_CHARS]) for key, value in params.items()]
        self._change_run(run, lambda: self._store.log_batch(run.run_id, [], entries, []))

    def log_totals(self, run: Run, totals: Mapping[str, float], at_ms: int) -> None:
        """Set the run's metrics; raises as ``log_params`` does."""
        _import_sdk()
        from mlflow.entities import Metric  # noqa: PLC0415 - see _import_sdk

        metrics = [Metric(name, value, at_ms, 0) for name, value in totals.items()]
        self._change_run(run, lambda: self._store.log_batch(run.run_id, metrics, [], []))

    def end_run(self, run: Run, status: str, at_ms: int) -> None:
        """End the run as ``FINISHED`` or ``FAILED``; raises as ``log_params`` does."""
        _import_sdk()
        from mlflow.entities import RunStatus  # noqa: PLC0415 - see _import_sdk

        code = RunStatus.from_string(status)
        self._change_run(run, lambda: self._store.update_run_info(run.run_id, code, at_ms, None))

    def _change_run(self, run: Run, work: Callable[[], object]) -> None:
        try:
            _translate_errors(work)
        except _InvalidParameterError as error:
            # For a run that was deleted on its page the server has no error code of its own.
            _import_sdk()
            from mlflow.entities import LifecycleStage  # noqa: PLC0415 - see _import_sdk

            found = _translate_errors(lambda: self._store.get_run(run.run_id))
            if found.info.lifecycle_stage == LifecycleStage.DELETED:
                raise GoneError(error.reason) from None
            raise

    def send(self, records: Sequence[CallRecord], run: Run) -> None:
        """Store each record as a trace of the run; at most ``MAX_TRACES`` of them.

        Raises:
            RefusedError: The server refuses at least one of them, and has stored none.
            GoneError: The run or its experiment does not exist.
            TrackerError: The server failed, could not be reached, or did not answer in time.
        """
        headers = {
            "Content-Type": PROTOBUF,
            EXPERIMENT_HEADER: run.experiment_id,
            RUN_HEADER: run.run_id,
        }
        body = encode(records, self._resource)
        self._request("POST", TRACES, PROTOBUF, extra_headers=headers, data=body)

    def experiment_id(self) -> str:
        """The experiment's id.

        Raises:
            GoneError: There is no such experiment yet.
            TrackerError: As for ``start_run``.
        """
        response = self._request("GET", EXPERIMENT, JSON, params={"experiment_name": self._experiment})
        found = _member(_decoded(response), "experiment", "experiment_id")
        if not isinstance(found, str):
            raise TrackerError(NOT_MLFLOW)
        return found

    def traces(self, trace_id: str | None, query: str, limit: int) -> list[Any]:
        """The traces of the experiment that are asked for, as the server has them in JSON.

        Args:
            trace_id: The id of the one that is wanted; None for those that the query finds.
            query: A filter of MLflow's.
            limit: The most that are wanted; the latest ones are.

        Raises:
            GoneError: There is no such experiment, or no such trace.
            TrackerError: As for ``send``.
        """
        experiment = self.experiment_id()
        ids = [trace_id]
        if trace_id is None:
            place = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
            asked = {
                "locations": [place],
                "filter": query,
                "max_results": limit,
                "order_by": ["timestamp_ms DESC"],
            }
            found = _listed(self._request("POST", SEARCH_TRACES, JSON, json=asked), "traces")
            ids = [_member(trace, "trace_id") for trace in found]
        traces: list[Any] = []
        for at in range(0, len(ids), TRACES_AT_ONCE):
            part = ids[at : at + TRACES_AT_ONCE]
            traces += _listed(self._request("GET", GET_TRACES, JSON, params={"trace_ids": part}), "traces")
        inside = "trace_info", "trace_location", "mlflow_experiment", "experiment_id"
        return [trace for trace in traces if _member(trace, *inside) == experiment]

    def check(self) -> None:
        """Call the server's API, which queries its database; raises as ``send`` does."""
        self._request("GET", API_PING, JSON, params={"max_results": 1})

    async def ping(self) -> None:
        """Check the server without blocking the event loop; raises ``UpstreamError``."""
        try:
            await in_thread(self.check, "mlflow ping")
        except TrackerError as error:
            raise UpstreamError(label=error.reason) from None

    def _request(self, method: str, path: str, content_type: str, **options: Any) -> Any:  # noqa: ANN401 - of requests
        _import_sdk()
        from mlflow.utils.credentials import get_default_host_creds  # noqa: PLC0415 - see _import_sdk
        from mlflow.utils.rest_utils import http_request  # noqa: PLC0415 - see _import_sdk

        response = _translate_errors(
            lambda: http_request(  # type: ignore[no-untyped-call]  # the SDK left both untyped
                get_default_host_creds(self._uri),  # type: ignore[no-untyped-call]  # as above
                path,
                method,
                max_retries=0,
                timeout=self._timeout_s,
                raise_on_status=False,
                # A redirected POST becomes a GET, and a login page's 200 would pass for success.
                allow_redirects=False,
                **options,
            )
        )
        status = int(response.status_code)
        if status in REFUSED_STATUSES:
            raise RefusedError(f"HTTP {status}")
        if status == HTTPStatus.NOT_FOUND:
            raise GoneError(f"HTTP {status}")
        if status != HTTPStatus.OK:
            raise TrackerError(f"HTTP {status}")
        if not response.headers.get("Content-Type", "").startswith(content_type):
            # Another server, like a proxy's login page, may answer 200 to everything.
            raise TrackerError(NOT_MLFLOW)
        return response

    @property
    def _store(self) -> Any:  # noqa: ANN401 - a RestStore, which the SDK left untyped
        """The SDK's requests about runs; its ``MlflowClient`` adds nothing to them but 10 MB of modules."""
        if self._sdk_store is None:
            from mlflow.store.tracking.rest_store import RestStore  # noqa: PLC0415 - see _import_sdk
            from mlflow.utils.credentials import get_default_host_creds  # noqa: PLC0415 - see _import_sdk

            self._sdk_store = RestStore(  # type: ignore[no-untyped-call]  # as above
                partial(get_default_host_creds, self._uri)
            )
        return self._sdk_store


def _listed(response: Any, name: str) -> list[Any]:  # noqa: ANN401 - an answer of requests
    """The list of this name in an answer of JSON; empty where there is none."""
    found = _member(_decoded(response), name)
    return found if isinstance(found, list) else []


def _decoded(response: Any) -> Any:  # noqa: ANN401 - an answer of requests
    try:
        return response.json()
    except ValueError:
        raise TrackerError(NOT_MLFLOW) from None


def _member(value: Any, *path: str) -> Any:  # noqa: ANN401 - JSON
    """What is at a path of an object; None where there is nothing."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _import_sdk() -> None:
    """Import what is used of the SDK when it is first needed, in a thread.

    One thread at a time: its modules import each other in cycles, and two threads that import them at once
    can get a partly initialized module.
    """
    with _importing:
        for name in SDK_MODULES:
            importlib.import_module(name)


def _translate_errors(work: Callable[[], T]) -> T:
    """Call ``work``; every error of the SDK becomes a ``TrackerError`` without the SDK's text."""
    _import_sdk()
    from mlflow.exceptions import MlflowException, RestException  # noqa: PLC0415 - see _import_sdk

    try:
        return work()
    except RestException as error:
        raise ERRORS_BY_CODE.get(code := str(error.error_code), TrackerError)(code) from None
    except MlflowException as error:
        # The SDK raises this one class whenever there was no answer.
        raise TrackerError("Timeout" if is_timeout(error) else "Connection error") from None
    except Exception as error:  # noqa: BLE001 - see below
        # An answer of another server can make the SDK raise anything.
        raise TrackerError(type(error).__name__) from None


ERRORS_BY_CODE: Mapping[str, type[TrackerError]] = {
    "RESOURCE_DOES_NOT_EXIST": GoneError,
    "INVALID_PARAMETER_VALUE": _InvalidParameterError,
}


def is_timeout(error: BaseException | None) -> bool:
    """Whether the error was raised because of a timeout of the socket."""
    while error is not None:
        if isinstance(error, TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


async def in_thread(work: Callable[[], None], name: str) -> None:
    """Run blocking work in a daemon thread; when the caller is cancelled, the thread is abandoned."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except Exception as raised:  # noqa: BLE001 - raised again by the awaiting task
            error = raised
        # The loop may be closed by now, when nothing awaits the result.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    await done
