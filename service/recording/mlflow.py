"""The client of the MLflow server: runs, their metrics, and traces; the only importer of ``mlflow``.

Everything except ``ping`` and ``in_thread`` blocks, and runs in daemon threads, so that a server that does
not answer cannot delay the exit of the process.
"""

import asyncio
import hashlib
import importlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue, KeyValueList
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv._incubating.attributes.enduser_attributes import ENDUSER_ID
from opentelemetry.semconv._incubating.attributes.user_attributes import USER_ID
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_ROUTE

from service.config.settings import Settings
from service.errors import UpstreamError
from service.recording.record import CallRecord
from service.telemetry import names
from service.telemetry.slices import Slices

if TYPE_CHECKING:
    from mlflow import MlflowClient

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

SPAN_ATTEMPT = "attempt {}"
SPAN_FIRST_CHUNK = "first chunk"

MAX_INT = 2**63 - 1

KeyValues = dict[tuple[str, type, object], KeyValue]


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
    # Many attributes are the same in all records, and each is encoded once.
    cache: KeyValues = {}
    spans = [span for record in Slices(records) for span in _tree(record, cache)]
    attributes = [_attribute(name, value) for name, value in resource.items()]
    resource_spans = ResourceSpans(
        resource=Resource(attributes=attributes), scope_spans=[ScopeSpans(spans=spans)]
    )
    return bytes(ExportTraceServiceRequest(resource_spans=[resource_spans]).SerializeToString())


def _tree(record: CallRecord, cache: KeyValues) -> Iterator[Span]:
    """The spans of a record, the root first."""
    succeeded = record.error is None and record.outcome != "cancelled"
    reason = "" if record.error_reason in (None, record.error) else f": {_text(record.error_reason)}"
    tree = _Tree(record, cache)
    yield tree.root(
        _text(f"{record.operation} {record.model}"),
        _attributes(record),
        "" if succeeded else _text(record.error or record.outcome) + reason,
    )
    if record.lookup_s is not None:
        result = "error" if record.lookup_failed else record.cache
        yield tree.child(
            names.SPAN_CACHE_LOOKUP,
            (0.0, record.lookup_s),
            {
                SPAN_TYPE: MEMORY,
                names.ATTR_CACHE_RESULT: result,
                names.ATTR_CACHE_KIND: record.cache_kind,
                names.ATTR_CACHE_SIMILARITY: record.similarity,
                names.ATTR_CACHE_AGE: record.age_s,
                names.ATTR_CACHE_SHARED: record.shared or None,
            },
        )
    span_type = SPAN_TYPES.get(record.operation, "LLM")
    for number, attempt in enumerate(record.tries, 1):
        span = tree.child(
            SPAN_ATTEMPT.format(number),
            (attempt.started_s, min(attempt.started_s, MAX_INT) + min(attempt.duration_s, MAX_INT)),
            {
                SPAN_TYPE: span_type,
                gen_ai.GEN_AI_OPERATION_NAME: record.operation,
                gen_ai.GEN_AI_PROVIDER_NAME: names.LLM_PROVIDER,
                gen_ai.GEN_AI_REQUEST_MODEL: record.model,
                ERROR_TYPE: attempt.error,
                names.ATTR_UPSTREAM_CAUSE: attempt.cause,
                names.ATTR_UPSTREAM_STATUS: attempt.status,
                names.ATTR_RETRY_DELAY: attempt.wait_s or None,
            },
            attempt.error,
        )
        yield span
        if number == len(record.tries) and record.first_chunk_s is not None:
            yield tree.child(
                SPAN_FIRST_CHUNK, (attempt.started_s, record.first_chunk_s), {}, parent_id=span.span_id
            )


class _Tree:
    """Makes the spans of one record."""

    def __init__(self, record: CallRecord, cache: KeyValues) -> None:
        self._trace_id = bytes.fromhex(record.record_id)
        self._root_id = bytes.fromhex(record.span_id)
        self._started_ns = record.started_ns
        self._duration_s = record.duration_s
        self._cache = cache

    def root(self, name: str, attributes: Mapping[str, object], error: str) -> Span:
        """The span of the call; ``error`` is empty where it succeeded."""
        return Span(
            trace_id=self._trace_id,
            span_id=self._root_id,
            name=name,
            kind=Span.SPAN_KIND_CLIENT,
            start_time_unix_nano=_clamp(self._started_ns),
            end_time_unix_nano=self._at(self._duration_s),
            attributes=self._encoded(attributes),
            status=Status(
                code=Status.STATUS_CODE_ERROR if error else Status.STATUS_CODE_OK,
                message=error,
            ),
        )

    def child(
        self,
        name: str,
        times_s: tuple[object, object],
        attributes: Mapping[str, object],
        error: str | None = None,
        *,
        parent_id: bytes | None = None,
    ) -> Span:
        """A span within the call; its id is the same each time.

        Args:
            name: Unlike that of any other span of the record.
            times_s: Begin and end, in seconds from the start of the call.
            attributes: Those that are None are left out.
            error: The error's name; None where there is none.
            parent_id: The span above it, where that is not the root.
        """
        end_ns = self._at(self._duration_s)
        began_ns, ended_ns = (min(self._at(moment), end_ns) for moment in times_s)
        return Span(
            trace_id=self._trace_id,
            span_id=hashlib.blake2b(name.encode(), digest_size=8, key=self._root_id).digest(),
            parent_span_id=self._root_id if parent_id is None else parent_id,
            name=name,
            kind=Span.SPAN_KIND_INTERNAL,
            start_time_unix_nano=began_ns,
            end_time_unix_nano=max(began_ns, ended_ns),
            attributes=self._encoded(attributes),
            status=Status(
                code=Status.STATUS_CODE_OK if error is None else Status.STATUS_CODE_ERROR,
                message="" if error is None else _text(error),
            ),
        )

    def _at(self, moment_s: object) -> int:
        """A moment of the call in Unix nanoseconds; what is no number stands for the start of the call."""
        seconds = moment_s if isinstance(moment_s, (int, float)) else 0.0
        return _clamp(self._started_ns + _clamp(min(seconds, MAX_INT) * 1e9))

    def _encoded(self, attributes: Mapping[str, object]) -> list[KeyValue]:
        return [_cached(name, value, self._cache) for name, value in attributes.items() if value is not None]


def _attributes(record: CallRecord) -> dict[str, object]:
    # In records of earlier versions the attempts are counted, and not described.
    told = len(record.tries) > 0 or not record.attempts
    return {
        SPAN_TYPE: CHAIN if told else SPAN_TYPES.get(record.operation, "LLM"),
        gen_ai.GEN_AI_OPERATION_NAME: record.operation,
        gen_ai.GEN_AI_PROVIDER_NAME: names.LLM_PROVIDER,
        gen_ai.GEN_AI_REQUEST_MODEL: record.model,
        gen_ai.GEN_AI_RESPONSE_MODEL: record.response_model,
        # On the root only: MLflow adds up what is on the spans below it otherwise.
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: record.prompt_tokens,
        gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: record.completion_tokens,
        gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: record.cached_tokens,
        gen_ai.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS: record.reasoning_tokens,
        # Always set: without it the server computes a cost from its own price list.
        COST: {"total_cost": record.cost or 0.0},
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
        names.ATTR_LLM_FIRST_CHUNK: record.first_chunk_s,
        names.ATTR_LLM_ESTIMATED: record.estimated or None,
        names.ATTR_CACHE_RESULT: record.cache,
        names.ATTR_CACHE_SAVED_COST: record.saved_cost,
        INPUTS: record.prompt,
        OUTPUTS: record.answer,
        # Tags can be searched for on MLflow's page.
        f"{TAG}request_id": record.trace_id,
        f"{TAG}record_id": record.record_id,
        f"{TAG}span_id": record.span_id,
        f"{TAG}incident_id": record.incident_id,
        f"{TAG}user": record.user,
        f"{TAG}team": record.team,
        f"{TAG}key_id": record.key_id,
        f"{TAG}model": record.model,
        f"{TAG}outcome": record.outcome,
        f"{TAG}error": record.error,
        f"{TAG}cache": record.cache,
        f"{TAG}cached_tokens": record.cached_tokens,
        f"{TAG}reasoning_tokens": record.reasoning_tokens,
        f"{TAG}cost": _decimal(record.cost),
    }


def _decimal(number: object) -> object:
    """A number as people write it when they search for it, without an exponent."""
    return f"{number:.12f}".rstrip("0").rstrip(".") if isinstance(number, float) else number


def _cached(name: str, value: object, cache: KeyValues) -> KeyValue:
    if not isinstance(value, (str, int)):
        return _attribute(name, value)
    # The type is part of the key, as True equals 1 in Python.
    key = name, type(value), value
    if key not in cache:
        cache[key] = _attribute(name, value)
    return cache[key]


def _attribute(name: str, value: object) -> KeyValue:
    return KeyValue(key=_text(name), value=_any_value(value))


def _any_value(value: object) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int() if abs(value) <= MAX_INT:
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case dict():
            return AnyValue(kvlist_value=KeyValueList(values=[_attribute(*entry) for entry in value.items()]))
        case _:
            return AnyValue(string_value=_text(value))


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
EXPERIMENT_HEADER = "x-mlflow-experiment-id"
RUN_HEADER = "x-mlflow-run-id"
MAX_TRACES = 100
"""The most records of one export: the server links at most so many traces to a run at once."""

JSON = "application/json"
PROTOBUF = "application/x-protobuf"

NOT_MLFLOW = "not MLflow's answer"
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
        self._sdk_client: MlflowClient | None = None

    def start_run(self, name: str, started_ms: int) -> Run:
        """Return the run of this name in the experiment, and create both where they do not exist.

        Args:
            name: The run's name; unique.
            started_ms: Unix time in milliseconds.

        Raises:
            TrackerError: The server refused, could not be reached, or did not answer in time.
        """

        def start() -> Run:
            found = self._client.get_experiment_by_name(self._experiment)
            identifier = found.experiment_id if found else self._client.create_experiment(self._experiment)
            # An earlier attempt may have created it without getting the answer.
            query = f"attributes.run_name = '{name}'"
            runs = self._client.search_runs([identifier], query, max_results=1)
            run = runs[0] if runs else self._client.create_run(identifier, started_ms, run_name=name)
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
        self._change_run(run, lambda: self._client.log_batch(run.run_id, params=entries))

    def log_totals(self, run: Run, totals: Mapping[str, float], at_ms: int) -> None:
        """Set the run's metrics; raises as ``log_params`` does."""
        _import_sdk()
        from mlflow.entities import Metric  # noqa: PLC0415 - see _import_sdk

        metrics = [Metric(name, value, at_ms, 0) for name, value in totals.items()]
        self._change_run(run, lambda: self._client.log_batch(run.run_id, metrics=metrics))

    def end_run(self, run: Run, status: str, at_ms: int) -> None:
        """End the run as ``FINISHED`` or ``FAILED``; raises as ``log_params`` does."""
        self._change_run(run, lambda: self._client.set_terminated(run.run_id, status, at_ms))

    def _change_run(self, run: Run, work: Callable[[], object]) -> None:
        try:
            _translate_errors(work)
        except _InvalidParameterError as error:
            # For a run that was deleted on its page the server has no error code of its own.
            _import_sdk()
            from mlflow.entities import LifecycleStage  # noqa: PLC0415 - see _import_sdk

            found = _translate_errors(lambda: self._client.get_run(run.run_id))
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

    def check(self) -> None:
        """Call the server's API, which queries its database; raises as ``send`` does."""
        self._request("GET", API_PING, JSON, params={"max_results": 1})

    async def ping(self) -> None:
        """Check the server without blocking the event loop; raises ``UpstreamError``."""
        try:
            await in_thread(self.check, "mlflow ping")
        except TrackerError as error:
            raise UpstreamError(label=error.reason) from None

    def _request(self, method: str, path: str, content_type: str, **options: Any) -> None:  # noqa: ANN401
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

    @property
    def _client(self) -> "MlflowClient":
        if self._sdk_client is None:
            from mlflow import MlflowClient  # noqa: PLC0415 - see _import_sdk

            self._sdk_client = MlflowClient(self._uri)
        return self._sdk_client


def _import_sdk() -> None:
    """Import the SDK when it is first needed, in a thread: it takes almost a second and 30 MB.

    One thread at a time: its modules import each other in cycles, and two threads that import them at once
    can get a partly initialized module.
    """
    with _importing:
        importlib.import_module("mlflow.utils.rest_utils")


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
