"""The tracker: runs, totals and traces on an MLflow server; the only importer of ``mlflow``.

Everything here blocks, and is called from a thread that may be left behind: a server that hangs must not hold
up the end of the process.
"""

import asyncio
import importlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue, KeyValueList
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv._incubating.attributes.user_attributes import USER_ID
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE

from service.config.settings import Settings
from service.errors import UpstreamError
from service.recording.record import CallRecord
from service.telemetry import names

if TYPE_CHECKING:
    from mlflow import MlflowClient

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


T = TypeVar("T")

_importing = threading.Lock()

API_PING = "/api/2.0/mlflow/experiments/search"
TRACES = "/v1/traces"
MAX_TRACES = 100
"""Most records of one export: the server links no more traces to a run at once."""

JSON = "application/json"
PROTOBUF = "application/x-protobuf"

NOT_MLFLOW = "not MLflow's answer"
MAX_PARAM_CHARS = 500
REFUSED = frozenset(
    {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
)


class TrackerError(Exception):
    """The server did not do what it was asked; ``reason`` says why, in two or three words.

    No part of the tree of errors: nobody is answered with it.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class RefusedError(TrackerError):
    """The server does not take these records; it may take others."""


class GoneError(TrackerError):
    """The run or its experiment is not there any more."""


@dataclass(frozen=True)
class Run:
    """A run on the server, in its experiment."""

    run_id: str
    experiment_id: str


class Tracker:
    """An MLflow server, asked with short time limits and no retries of the SDK's own.

    Args:
        settings: Where the server is, the experiment's name, and the time limit of a request.
        resource: What every trace says of this process.
    """

    def __init__(self, settings: Settings, resource: Mapping[str, str]) -> None:
        self._uri = settings.mlflow_tracking_uri.rstrip("/")
        self._experiment = settings.mlflow_experiment_name
        self._timeout_s = settings.mlflow_timeout_s
        self._resource = dict(resource)
        self._lazy: MlflowClient | None = None

    def start_run(self, name: str, started_ms: int) -> Run:
        """The run of this name in the experiment; both are made where they are not there.

        Args:
            name: The run's name; nobody else's.
            started_ms: Unix time in milliseconds.

        Raises:
            GoneError: The experiment was deleted.
            TrackerError: The server refused it, could not be reached, or did not answer in time.
        """

        def start() -> Run:
            found = self._client.get_experiment_by_name(self._experiment)
            identifier = found.experiment_id if found else self._client.create_experiment(self._experiment)
            # One that an earlier attempt made, whose answer never came.
            query = f"attributes.run_name = '{name}'"
            runs = self._client.search_runs([identifier], query, max_results=1)
            run = runs[0] if runs else self._client.create_run(identifier, started_ms, run_name=name)
            return Run(run.info.run_id, identifier)

        made = _translated(start)
        if not made.run_id or not made.experiment_id:
            # The SDK makes something of every object.
            raise TrackerError(NOT_MLFLOW)
        return made

    def log_params(self, run: Run, params: Mapping[str, str]) -> None:
        """Write the run's parameters, cut to a length that the server takes; raises as ``start_run`` does."""
        _import_sdk()
        from mlflow.entities import Param  # noqa: PLC0415 - see _import_sdk

        shown = [Param(key, value[:MAX_PARAM_CHARS]) for key, value in params.items()]
        _translated(lambda: self._client.log_batch(run.run_id, params=shown))

    def log_totals(self, run: Run, totals: Mapping[str, float], at_ms: int) -> None:
        """Write totals as the run's metrics; raises as ``start_run`` does."""
        _import_sdk()
        from mlflow.entities import Metric  # noqa: PLC0415 - see _import_sdk

        metrics = [Metric(name, value, at_ms, 0) for name, value in totals.items()]
        _translated(lambda: self._client.log_batch(run.run_id, metrics=metrics))

    def end_run(self, run: Run, status: str, at_ms: int) -> None:
        """End the run as ``FINISHED`` or ``FAILED``; raises as ``start_run`` does."""
        _translated(lambda: self._client.set_terminated(run.run_id, status, at_ms))

    def send(self, records: Iterable[CallRecord], run: Run) -> None:
        """Keep each record as a trace of the run; at most ``MAX_TRACES`` of them.

        Raises:
            RefusedError: The server does not take them, or not all of them; none is kept then.
            TrackerError: It failed, could not be reached, or did not answer in time.
        """
        headers = {
            "Content-Type": PROTOBUF,
            "x-mlflow-experiment-id": run.experiment_id,
            "x-mlflow-run-id": run.run_id,
        }
        body = encode(records, self._resource)
        self._request("POST", TRACES, PROTOBUF, extra_headers=headers, data=body)

    def look(self) -> None:
        """Ask the server's API, which reaches its database; raises as ``send`` does."""
        self._request("GET", API_PING, JSON, params={"max_results": 1})

    async def ping(self) -> None:
        """The same for the event loop; ``UpstreamError`` where it fails."""
        try:
            await in_thread(self.look, "mlflow ping")
        except TrackerError as error:
            raise UpstreamError(label=error.reason) from None

    def _request(self, method: str, path: str, answered_in: str, **options: Any) -> None:  # noqa: ANN401
        _import_sdk()
        from mlflow.utils.credentials import get_default_host_creds  # noqa: PLC0415 - see _import_sdk
        from mlflow.utils.rest_utils import http_request  # noqa: PLC0415 - see _import_sdk

        response = _translated(
            lambda: http_request(  # type: ignore[no-untyped-call]  # the SDK left both untyped
                get_default_host_creds(self._uri),  # type: ignore[no-untyped-call]  # as above
                path,
                method,
                max_retries=0,
                timeout=self._timeout_s,
                raise_on_status=False,
                # Followed, an order becomes a question, and a login page the proof that all is well.
                allow_redirects=False,
                **options,
            )
        )
        status = int(response.status_code)
        if status in REFUSED:
            raise RefusedError(f"HTTP {status}")
        if status == HTTPStatus.NOT_FOUND:
            raise GoneError(f"HTTP {status}")
        if status != HTTPStatus.OK:
            raise TrackerError(f"HTTP {status}")
        if not response.headers.get("Content-Type", "").startswith(answered_in):
            # Somebody who answers 200 to everything has kept nothing.
            raise TrackerError(NOT_MLFLOW)

    @property
    def _client(self) -> "MlflowClient":
        if self._lazy is None:
            from mlflow import MlflowClient  # noqa: PLC0415 - see _import_sdk

            self._lazy = MlflowClient(self._uri)
        return self._lazy


def _import_sdk() -> None:
    """Import it when it is needed, in a thread: it takes most of a second and 30 MB.

    By one thread at a time: its modules import each other in circles, and where two threads meet in one,
    Python hands out a module that is not whole.
    """
    with _importing:
        importlib.import_module("mlflow.utils.rest_utils")


def _translated(work: Callable[[], T]) -> T:
    """Do it; what the SDK raises comes out as ``TrackerError``, without its text."""
    _import_sdk()
    from mlflow.exceptions import MlflowException, RestException  # noqa: PLC0415 - see _import_sdk

    try:
        return work()
    except RestException as error:
        # What was deleted on MLflow's page stays for a while, and is said to be in the wrong state.
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" or "must be in the 'active' state" in str(error):
            raise GoneError(error.error_code) from None
        raise TrackerError(str(error.error_code)) from None
    except MlflowException as error:
        # Everything that kept an answer from coming has this one class, and tells itself apart by its text.
        text = str(error).lower()
        raise TrackerError("Timeout" if "timed out" in text else "Connection error") from None
    except Exception as error:  # noqa: BLE001 - see below
        # An answer that is not MLflow's: the SDK looks for things in it that are not there.
        raise TrackerError(type(error).__name__) from None


async def in_thread(work: Callable[[], None], name: str) -> None:
    """Do blocking work in a daemon thread, which is left behind when the caller is cancelled."""
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
        except Exception as raised:  # noqa: BLE001 - carried over to whoever awaits
            error = raised
        # The loop may have been closed by now: then nobody waits any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    await done
