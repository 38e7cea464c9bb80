"""A scriptable MLflow tracking server on a real TCP port: runs, their totals, and traces sent by OTLP."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.fakes.http_server import EndingHttpServer
from tests.fakes.otlp_records import Span, spans_in
from tests.fakes.waiting import Watched

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FakeMlflow", "Kept", "KeptRun"]

API = "/api/2.0/mlflow/"
TRACES = "/v1/traces"


@dataclass(frozen=True)
class Kept:
    """A span that was taken, with the run and the experiment that its request named."""

    span: Span
    run_id: str
    experiment_id: str

    @property
    def request_id(self) -> str:
        """The id of the request that the span is a record of."""
        return str(self.span.attributes["mlflow.traceTag.request_id"])


@dataclass
class KeptRun:
    """A run; times are Unix milliseconds, and a metric is its last value."""

    run_id: str
    experiment_id: str
    name: str
    started_ms: int
    status: str = "RUNNING"
    ended_ms: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    lifecycle_stage: str = "active"

    def as_json(self) -> dict[str, Any]:
        """The run in the shape of the REST API."""
        info = {
            "run_id": self.run_id,
            "run_uuid": self.run_id,
            "run_name": self.name,
            "experiment_id": self.experiment_id,
            "user_id": "",
            "status": self.status,
            "start_time": self.started_ms,
            "lifecycle_stage": self.lifecycle_stage,
            "artifact_uri": "file:///nowhere",
        }
        params = [{"key": key, "value": value} for key, value in self.params.items()]
        metrics = [
            {"key": key, "value": value, "timestamp": self.started_ms, "step": 0}
            for key, value in self.metrics.items()
        ]
        ended = {} if self.ended_ms is None else {"end_time": self.ended_ms}
        return {
            "info": {**info, **ended},
            "data": {"params": params, "metrics": metrics, "tags": []},
            "inputs": {},
        }


class FakeMlflow(Watched):
    """A server that keeps what it has taken, and does as its modes say; they may change at any time.

    Attributes:
        hang: Take requests and never answer, nor keep anything.
        answer_status: Answer this to everything; anything but 200 keeps nothing.
        refuses: Answers 422 to an export of spans of which this holds for one.
        wrong_body: Answer 200 to everything with a page that is no API's, and keep nothing.
        delay_s: Wait so long before each answer.
        lose_answers: So many of the next exports are kept, and their connections broken before the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hang = False
        self.answer_status = 200
        self.refuses: Callable[[Span], bool] = lambda _span: False
        self.wrong_body = False
        self.delay_s = 0.0
        self.lose_answers = 0
        self.port = 0
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, KeptRun] = {}
        self._kept: dict[tuple[str, str], Kept] = {}
        self._below: dict[str, dict[str, Span]] = {}
        self._sent: Counter[tuple[str, str]] = Counter()
        self._requests: list[str] = []
        self._raw: list[bytes] = []
        self._http: _HttpServer | None = None

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.down()

    def __repr__(self) -> str:
        with self._changed:
            runs = [(run.name, run.status) for run in self._runs.values()]
            return f"<FakeMlflow spans={len(self._kept)} {runs=} last={self._requests[-5:]}>"

    def up(self) -> None:
        """Listen, on the port of before where there was one."""
        self._http = _HttpServer(self, self.port)
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, name="fake-mlflow", args=(0.01,))
        self._thread.start()

    def down(self) -> None:
        """End all connections and refuse new ones; what was kept stays."""
        if self._http is None:
            return
        self._http.shutdown()
        self._thread.join()
        self._http.drop_connections()
        self._http.server_close()
        self._http = None

    def wait_for(self, predicate: Callable[[Self], bool], timeout_s: float = 40.0) -> None:
        """Block until the predicate holds for this fake; raise TimeoutError when it never does."""
        # A service on a busy machine takes its time to load MLflow's client.
        super().wait_for(predicate, timeout_s)

    @property
    def url(self) -> str:
        """What MLFLOW_TRACKING_URI says."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[str]:
        """Method and path of each request that arrived."""
        with self._changed:
            return list(self._requests)

    @property
    def raw(self) -> list[bytes]:
        """The bodies of all requests that arrived, for finding a string wherever it may hide."""
        with self._changed:
            return list(self._raw)

    @property
    def kept(self) -> list[Kept]:
        """The roots that were taken, each once, in the order of their arrival: one for each record."""
        with self._changed:
            return list(self._kept.values())

    @property
    def request_ids(self) -> set[str]:
        """Of the records that were taken."""
        return {kept.request_id for kept in self.kept}

    @property
    def repeats(self) -> int:
        """How many of the roots taken had been taken before."""
        with self._changed:
            return self._sent.total() - len(self._sent)

    @property
    def runs(self) -> list[KeptRun]:
        """The runs, in the order in which their processes began.

        Not in that of their making: a process that was killed early has its run from whoever came next.
        """
        with self._changed:
            return sorted(self._runs.values(), key=lambda run: run.started_ms)

    def delete_run(self, run_id: str) -> None:
        """Delete a run as its page does: it stays, and changes to it are refused."""
        with self._changed:
            self._runs[run_id].lifecycle_stage = "deleted"

    def span(self, request_id: str) -> Span:
        """The one record of a request."""
        (found,) = [kept.span for kept in self.kept if kept.request_id == request_id]
        return found

    def tree(self, request_id: str) -> list[Span]:
        """The spans below the one record of a request, by their start."""
        with self._changed:
            below = list(self._below.get(self.span(request_id).trace_id, {}).values())
        return sorted(below, key=lambda span: (span.start_ns, -span.end_ns))

    def arrived(self, method: str, path: str, body: bytes) -> None:
        """Note a request, whatever becomes of it."""
        with self._changed:
            self._requests.append(f"{method} {path}")
            self._raw.append(body)
            self._changed.notify_all()

    def take_spans(self, headers: Mapping[str, str], body: bytes) -> int:
        """Keep the spans of an export, all or none; the status of the answer."""
        spans = spans_in(body)
        experiment_id = headers.get("x-mlflow-experiment-id", "")
        run_id = headers.get("x-mlflow-run-id", "")
        with self._changed:
            if not spans or experiment_id not in self._experiments.values():
                return 400
            roots = [span for span in spans if not span.parent_id]
            if any(self.refuses(span) for span in roots):
                return 422
            for span in spans:
                if span.parent_id:
                    self._below.setdefault(span.trace_id, {})[span.span_id] = span
            for span in roots:
                key = span.trace_id, span.span_id
                self._sent[key] += 1
                self._kept.setdefault(key, Kept(span, run_id, experiment_id))
            self._changed.notify_all()
        return 200

    def call(self, method: str, path: str, asked: Mapping[str, Any]) -> tuple[int, Any]:
        """Do what the REST API is asked; status and body of the answer."""
        calls: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "GET experiments/get-by-name": self._experiment,
            "POST experiments/create": self._create_experiment,
            "GET experiments/search": lambda _asked: {"experiments": []},
            "POST runs/search": self._search_runs,
            "POST runs/create": self._create_run,
            "GET runs/get": lambda asked: {"run": self._runs[asked["run_id"]].as_json()},
            "POST runs/log-batch": self._log_batch,
            "POST runs/update": self._update_run,
        }
        work = calls.get(f"{method} {path.removeprefix(API)}")
        if work is None:
            return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}
        with self._changed:
            try:
                done = work(asked)
            except _DeletedError as error:
                return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": str(error)}
            except KeyError as error:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": repr(error)}
            self._changed.notify_all()
        return 200, done

    def _experiment(self, asked: Mapping[str, Any]) -> Any:
        name = asked["experiment_name"]
        found = {"experiment_id": self._experiments[name], "name": name, "lifecycle_stage": "active"}
        return {"experiment": found}

    def _create_experiment(self, asked: Mapping[str, Any]) -> Any:
        identifier = str(len(self._experiments) + 1)
        self._experiments[asked["name"]] = identifier
        return {"experiment_id": identifier}

    def _search_runs(self, asked: Mapping[str, Any]) -> Any:
        # The one question that the recorder asks: attributes.run_name = '<name>'.
        name = asked["filter"].split("'")[1]
        found = [run for run in self._runs.values() if run.name == name and run.lifecycle_stage == "active"]
        return {"runs": [run.as_json() for run in found]}

    def _create_run(self, asked: Mapping[str, Any]) -> Any:
        run_id = f"{len(self._runs) + 1:032x}"
        run = KeptRun(run_id, asked["experiment_id"], asked["run_name"], int(asked["start_time"]))
        self._runs[run_id] = run
        return {"run": run.as_json()}

    def _active_run(self, run_id: str) -> KeptRun:
        run = self._runs[run_id]
        if run.lifecycle_stage != "active":
            raise _DeletedError("The run must be in the 'active' state.")
        return run

    def _log_batch(self, asked: Mapping[str, Any]) -> Any:
        run = self._active_run(asked["run_id"])
        run.params |= {entry["key"]: entry["value"] for entry in asked.get("params", [])}
        run.metrics |= {entry["key"]: entry["value"] for entry in asked.get("metrics", [])}
        return {}

    def _update_run(self, asked: Mapping[str, Any]) -> Any:
        run = self._active_run(asked["run_id"])
        run.status = asked.get("status", run.status)
        run.ended_ms = int(asked["end_time"]) if "end_time" in asked else run.ended_ms
        return {"run_info": run.as_json()["info"]}


class _DeletedError(Exception):
    """A change was asked of a deleted run."""


class _HttpServer(EndingHttpServer):
    """The listener."""

    def __init__(self, fake: FakeMlflow, port: int) -> None:
        self.fake = fake
        self.stopping = threading.Event()
        super().__init__(port, _HttpHandler)

    def drop_connections(self) -> None:
        """Wake the threads that wait for something."""
        self.stopping.set()
        super().drop_connections()


class _HttpHandler(BaseHTTPRequestHandler):
    """One connection."""

    server: _HttpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Take a question."""
        self._serve()

    def do_POST(self) -> None:
        """Take an order."""
        self._serve()

    def _serve(self) -> None:
        fake = self.server.fake
        target = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        fake.arrived(self.command, target.path, body)
        if fake.hang:
            # Nothing more is to come, so this ends when the client or the fake ends the connection.
            self.rfile.read(1)
            self.close_connection = True
            return
        if fake.delay_s:
            self.server.stopping.wait(fake.delay_s)
        if fake.wrong_body:
            self._answer(200, b"<html>a login page</html>", "text/html")
            return
        if fake.answer_status != 200:
            self._answer(fake.answer_status, b'{"error_code":"INTERNAL_ERROR","message":"as told"}')
            return
        if target.path == TRACES:
            status = fake.take_spans({name.lower(): value for name, value in self.headers.items()}, body)
            if status == 200 and fake.lose_answers:
                fake.lose_answers -= 1
                self.close_connection = True
                return
            self._answer(status, b"", "application/x-protobuf")
            return
        query = {name: values[0] for name, values in parse_qs(target.query).items()}
        status, answer = fake.call(self.command, target.path, json.loads(body) if body else query)
        self._answer(status, json.dumps(answer).encode())

    def _answer(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object, **_kwargs: object) -> None:
        """Keep the test's output clean."""
