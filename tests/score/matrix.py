"""The request matrix: all that can happen to a request and beside it, on real processes that export OTLP.

Three processes play at the same time. ``_whole`` has every dependency, and loses them one after the other.
``_faulty`` has an upstream that fails in every way, and little room. ``_workers`` is two workers in a pod.
"""

import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tests.e2e import bad_service
from tests.e2e.support import to_collector
from tests.fakes.issuer import AUDIENCE, FakeIssuer
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.operations import SAMPLES, STORED
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.qdrant import FakeQdrant
from tests.fakes.streams import RawStream, text
from tests.fakes.upstream import Answer as Completion
from tests.fakes.upstream import FakeUpstream, NotJson, Reset, Silent, Status
from tests.faults.bench import UpstreamAt, nobody_at
from tests.faults.routes import ROUTES
from tests.harness import Answer, ServiceProcess
from tests.score.capture import Capture
from tests.valkey import Valkey

LIMIT_S: Final = 120.0
"""For each wait; it is long, as a busy machine starts two workers in half a minute."""

CALLER: Final = "caller"
"""The ``service.name`` of the caller, whose spans stand above those of the service."""

POD: Final = "k8s.namespace.name=llm,k8s.node.name=node-1,k8s.pod.name=llmops-api-0,k8s.pod.uid={uid}"
"""As the Helm chart writes it."""

IN_POD: Final = {
    "ENVIRONMENT": "production",
    "HEALTH_INTERVAL_S": "0.4",
    "HEALTH_TIMEOUT_S": "0.4",
    "OTEL_METRIC_EXPORT_INTERVAL": "3000",
}
WHOLE: Final = {
    **IN_POD,
    "CACHE_ENABLED": "true",
    "CACHE_SEMANTIC": "true",
    "CACHE_TIMEOUT_S": "2",
    "CACHE_EMBEDDING_TIMEOUT_S": "2",
    "EMBEDDING_MODEL": "demo",
    "QDRANT_TIMEOUT_S": "1",
    "MLFLOW_TIMEOUT_S": "1",
    "OIDC_AUDIENCE": AUDIENCE,
    "OIDC_TEAM_CLAIM": "team",
    "LOGIN_FAILURES_PER_NAME": "3/minute",
    "RETRY_BASE_DELAY_S": "0.01",
}
FAULTY: Final = {
    **IN_POD,
    "LLM_TIMEOUT_S": "1",
    "LLM_CONNECT_TIMEOUT_S": "0.3",
    "RETRY_BASE_DELAY_S": "0.01",
    "BREAKER_FAILURE_THRESHOLD": "6",
    "BREAKER_TIMEOUT_S": "1",
    "MAX_IN_FLIGHT": "2",
    "MAX_IN_FLIGHT_PER_USER": "2",
    "REQUEST_BODY_TIMEOUT_S": "0.3",
    "CACHE_ENABLED": "true",
    "QDRANT_PATH": ":memory:",
    # So few that each write brings the next sweep forward.
    "CACHE_MAX_ENTRIES": "2",
}


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {LIMIT_S} s for {what}")
        time.sleep(0.02)


def play() -> Capture:
    """Play the matrix; all that the processes exported and wrote."""
    lines: list[dict[str, Any]] = []
    with OtlpReceiver() as receiver:
        steps = (_whole, _faulty, _workers)
        with ThreadPoolExecutor(len(steps)) as together:
            for step in [together.submit(step, receiver) for step in steps]:
                lines += step.result()
        return Capture(receiver.spans(), receiver.logs(), receiver.points(), lines)


class Player:
    """Makes the requests of one process.

    Args:
        process: The process; it answers.
    """

    def __init__(self, process: ServiceProcess) -> None:
        self.process = process
        self.token = process.token()
        self._numbers = iter(range(1_000_000))

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """Send a request as the user."""
        return self.process.call(method, path, body=body, **{"token": self.token, **options})

    def generate(self, fields: Any = None, **options: Any) -> Answer:
        """Ask the model something new."""
        body = {"prompt": f"What is number {next(self._numbers)}?", "model": "demo", **(fields or {})}
        return self.call("POST", "/llm/generate", body, **options)

    def operations(self) -> None:
        """Call each operation of the upstream, whole and streamed."""
        for route in ROUTES.values():
            if route.row.stored:
                continue
            for streamed in {False, route.sample.stream is not None}:
                body, media = route.body(streamed=streamed)
                self.call("POST", route.path, body, headers={"Content-Type": media})
        asked = dict(SAMPLES["responses"].request)
        made = self.call("POST", "/v1/responses", asked).json["id"]
        more = {"previous_response_id": made, "reasoning": {"effort": "low"}}
        self.call("POST", "/v1/responses", {**asked, **more})
        self.generate({"temperature": 0.5, "max_tokens": 9})
        chat = {"model": "demo", "messages": [{"role": "user", "content": "With everything?"}]}
        numbers = {"n": 2, "seed": 1, "top_p": 0.5, "frequency_penalty": 0.5, "presence_penalty": 0.5}
        self.call("POST", "/v1/chat/completions", {**chat, **numbers, "top_k": 2, "stop": "."})
        for name in ("get_response", "list_input_items", "cancel_response", "delete_response"):
            stored = STORED[name]
            self.call(stored.method, f"/v1/responses/{made}{stored.below}")

    def leave(self, *, streamed: bool, ready: Callable[[], object]) -> None:
        """Ask, and leave once it is so far, or once the first piece is there."""
        connection = HTTPConnection("127.0.0.1", self.process.port, timeout=LIMIT_S)
        head = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        prompt = f"Leave {next(self._numbers)}"
        body = f'{{"prompt": "{prompt}", "model": "demo", "stream": {str(streamed).lower()}}}'
        connection.request("POST", "/llm/generate", body, head)
        if streamed:
            connection.getresponse().readline()
        else:
            until(ready, "the call to be inside")
        connection.close()

    def is_up(self, name: str) -> bool:
        """Whether the health route says that a dependency is up."""
        return bool(self.process.call("GET", "/health/detailed").json["checks"].get(name))


_starting = threading.Lock()
"""One process starts at a time: on a busy machine several at once would not be ready in time."""


@contextmanager
def _service(
    receiver: OtlpReceiver, variables: dict[str, str], arguments: tuple[str, ...] = ("-m", "service")
) -> Iterator[ServiceProcess]:
    pod = {"OTEL_RESOURCE_ATTRIBUTES": POD.format(uid=secrets.token_hex(16))}
    with ExitStack() as stack:
        with _starting:
            process = ServiceProcess({**pod, **to_collector(receiver), **variables}, arguments)
            stack.enter_context(process).wait_ready(LIMIT_S)
        yield process


def _whole(receiver: OtlpReceiver) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream())
        mlflow = stack.enter_context(FakeMlflow())
        valkey = stack.enter_context(Valkey())
        issuer = stack.enter_context(FakeIssuer())
        qdrant = stack.enter_context(FakeQdrant().serving())
        places = {
            "LITELLM_URL": upstream.url,
            "MLFLOW_TRACKING_URI": mlflow.url,
            "VALKEY_URL": valkey.url,
            "OIDC_ISSUERS": issuer.url,
            "QDRANT_URL": qdrant.url,
        }
        process = stack.enter_context(_service(receiver, {**WHOLE, **places}))
        player = Player(process)
        admin = process.token("admin")
        until(lambda: player.is_up("valkey"), "Valkey to be seen")
        player.operations()
        _routes(player, admin)
        _cache(player, admin, upstream)
        _keys(player, admin, upstream)
        player.call("GET", "/auth/me", token=issuer.token(team="red"))
        player.call("GET", "/auth/me", token=issuer.token(aud="another"))
        _under_a_caller(player, receiver)
        for _ in range(5):
            process.call("POST", "/auth/login", body={"username": "user", "password": "wrong"})
        _without_valkey(player, valkey)
        _without_mlflow(player, mlflow)
        _without(player, "qdrant", lambda: _mode(qdrant, "error"), lambda: _mode(qdrant, "ok"))
        _without_issuer(player, issuer)
        return _stopped(process)


def _routes(player: Player, admin: str) -> None:
    """Ask each route that is no model call."""
    for path in (
        *("/", "/docs", "/openapi.json", "/health", "/auth/me", "/llm/models", "/v1/models"),
        *("/v1/models/demo", "/v1/models/nobody", "/llm/cache/stats", "/keys", "/usage", "/no-such-route"),
    ):
        player.call("GET", path)
    for path in ("/teams", "/users", "/usage"):
        player.call("GET", path, token=admin)
    player.call("PUT", "/teams/red", {"models": ["demo"]}, token=admin)
    player.call("GET", "/teams", token=player.token)
    player.call("GET", "/auth/me", headers={"X-Request-ID": "mine-1", "User-Agent": "matrix"})
    player.call("GET", "/auth/me?page=1")
    player.call("POST", "/auth/logout", token=player.process.token())


def _cache(player: Player, admin: str, upstream: FakeUpstream) -> None:
    """A miss, a hit, a hit by meaning, a bypass, a shared call, and the clearing."""
    again = {"prompt": "What is asked again?"}
    player.generate(again)
    until(lambda: player.generate(again).headers.get("x-cache") == "HIT", "a hit")
    player.generate({"prompt": "What is the capital of France?"})
    until(
        lambda: "x-cache-similarity" in player.generate({"prompt": "What is France's capital?"}).headers,
        "a hit by meaning",
    )
    player.generate({**again, "stream": True})
    player.generate(again, headers={"Cache-Control": "no-cache"})
    upstream.default = Completion(delay_s=0.5)
    with ThreadPoolExecutor(2) as callers:
        same = {"prompt": "What do two ask at the same time?"}
        for call in [callers.submit(player.generate, same) for _ in range(2)]:
            call.result()
    upstream.default = Completion()
    player.call("DELETE", "/llm/cache", token=admin)


def _keys(player: Player, admin: str, upstream: FakeUpstream) -> None:
    """Keys, and the budgets of a user, a team and a key: near the limit, spent, and without a price."""
    player.call("PUT", "/teams/blue", {"budget": {"amount": 1, "unit": "usd", "period": "day"}}, token=admin)
    player.call("PUT", "/users/app-1", {"team": "blue"}, token=admin)
    made = player.call("POST", "/keys", {"name": "team", "owner": "app-1"}, token=admin).json
    player.generate(token=made["key"])
    dollars = {"amount": 100, "unit": "usd", "period": "month"}
    priced = player.call("POST", "/keys", {"name": "dollars", "budget": dollars}).json["key"]
    upstream.script(Completion(cost=None))
    player.generate(token=priced, headers={"Cache-Control": "no-cache"})
    budget = {"amount": 1, "unit": "tokens", "period": "day"}
    key = player.call("POST", "/keys", {"name": "small", "budget": budget}).json
    player.generate(token=key["key"])
    until(lambda: player.generate(token=key["key"]).status == 429, "the budget to be spent")
    player.call("GET", "/auth/me", token=key["key"][:-1] + ("0" if key["key"][-1] != "0" else "1"))
    player.call("POST", f"/keys/{key['id']}/rotate", {})
    player.call("DELETE", f"/keys/{key['id']}")


def _under_a_caller(player: Player, receiver: OtlpReceiver) -> None:
    """Call as an application that traces itself: its CLIENT span stands above the service's spans."""
    provider = TracerProvider(resource=Resource({"service.name": CALLER}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{receiver.http_url}/v1/traces")))
    with provider.get_tracer(CALLER).start_as_current_span("POST", kind=SpanKind.CLIENT):
        context: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(context)
        player.generate(headers=context)
    provider.shutdown()


def _said(process: ServiceProcess, event: str) -> bool:
    return any(line.get("event") == event for line in process.lines())


def _without(player: Player, name: str, down: Callable[[], object], up: Callable[[], object]) -> None:
    """Take a dependency away, call, and give it back."""
    down()
    for _ in range(2):
        player.generate()
    until(lambda: not player.is_up(name), f"{name} to be seen down")
    up()
    until(lambda: player.is_up(name), f"{name} to be seen up")
    player.generate()


def _without_valkey(player: Player, valkey: Valkey) -> None:
    """Take Valkey away until the process counts by itself, and give it back until it does not."""

    def counted(event: str) -> bool:
        player.generate()
        return _said(player.process, event)

    def down() -> None:
        valkey.kill()
        until(lambda: counted("llmops.shared.fallback.started"), "the process to count by itself")

    _without(player, "valkey", down, valkey.start)
    until(lambda: counted("llmops.shared.fallback.ended"), "the processes to count together")


def _without_mlflow(player: Player, mlflow: FakeMlflow) -> None:
    """Take MLflow away until records wait for it, and give it back until it has them."""

    def up() -> None:
        until(lambda: _said(player.process, "llmops.recorder.spooled"), "records to wait")
        mlflow.up()

    until(lambda: mlflow.request_ids, "MLflow to have records")
    _without(player, "mlflow", mlflow.down, up)
    until(lambda: _said(player.process, "llmops.recorder.replayed"), "the records to be replayed")


def _without_issuer(player: Player, issuer: FakeIssuer) -> None:
    """Take the issuer away when it signs with a key that nobody has seen, and give it back."""

    def down() -> None:
        issuer.stop()
        issuer.rotate()
        player.call("GET", "/auth/me", token=issuer.token())

    _without(player, "oidc", down, issuer.start)


def _mode(qdrant: FakeQdrant, mode: Any) -> None:
    qdrant.mode = mode


def _faulty(receiver: OtlpReceiver) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        upstream = stack.enter_context(UpstreamAt(0))
        script = (str(Path(bad_service.__file__)),)
        process = stack.enter_context(
            _service(receiver, {**FAULTY, "LITELLM_URL": upstream.url, "RATE_LIMIT": "100000/minute"}, script)
        )
        player = Player(process)
        _mistakes(player)
        _failures(player, upstream)
        _too_many(player, upstream)
        _circuits(player, upstream)
        _stop_while_asked(player, upstream)
        return process.lines()


def _mistakes(player: Player) -> None:
    """Everything that a caller does wrong."""
    player.generate(token=None)
    player.generate(token="a.b.c")  # noqa: S106 - no token at all
    player.call("POST", "/llm/generate", {"prompt": ""})
    player.call("POST", "/llm/generate", {"prompt": "x" * 1_200_000})
    player.call("POST", "/llm/generate", b"prompt", headers={"Content-Type": "text/plain"})
    player.call("DELETE", "/llm/generate")
    player.call("DELETE", "/llm/cache")
    connection = HTTPConnection("127.0.0.1", player.process.port, timeout=LIMIT_S)
    connection.putrequest("POST", "/llm/generate")
    for name, value in {"Authorization": f"Bearer {player.token}", "Content-Length": "9"}.items():
        connection.putheader(name, value)
    connection.putheader("Content-Type", "application/json")
    connection.endheaders()
    connection.getresponse().read()
    connection.close()
    player.call("GET", "/test/bug")
    player.call("GET", "/test/warning")


def _failures(player: Player, upstream: UpstreamAt) -> None:
    """Everything that an upstream does wrong, and callers who leave."""
    for faults in (
        (Status(500), Completion()),
        (Reset(), Status(503)),
        (Status(429), Completion()),
        (Status(401),),
        (Status(400),),
        (NotJson(),),
    ):
        upstream.script(*faults)
        player.generate()
    upstream.script(Silent())
    player.generate()
    for status in (500, 429):
        upstream.script(*[Status(status)] * 4)
        player.generate()
    upstream.script(RawStream([text("Hello "), text("you ")], then="silence"))
    player.leave(streamed=True, ready=bool)
    before = len(upstream.chat_requests)
    upstream.script(Silent())
    player.leave(streamed=False, ready=lambda: len(upstream.chat_requests) > before)
    player.generate({"model": "no-such-model"})


def _too_many(player: Player, upstream: UpstreamAt) -> None:
    """More calls at a time than there is room for."""
    before = len(upstream.chat_requests)
    upstream.script(*[Completion(delay_s=0.5)] * 2)
    with ThreadPoolExecutor(2) as callers:
        inside = [callers.submit(player.generate) for _ in range(2)]
        until(lambda: len(upstream.chat_requests) == before + 2, "two calls to be inside")
        player.generate()
        for call in inside:
            call.result()


def _circuits(player: Player, upstream: UpstreamAt) -> None:
    """Open the circuit of the model, and of the connection, and close them again."""
    for token in (player.token, player.process.token("admin")):
        upstream.script(*[NotJson()] * 6)
        for _ in range(7):
            player.generate(token=token)
        upstream.clear()
    port = upstream.port
    upstream.__exit__()
    with nobody_at(port, "refusing"):
        until(lambda: player.generate().json.get("error") == "CircuitOpenError", "the circuit to open")
    upstream.__init__(port)  # type: ignore[misc]  # another one, at the same place
    upstream.__enter__()
    until(lambda: player.generate().status == 200, "the circuit to close")


def _stop_while_asked(player: Player, upstream: UpstreamAt) -> None:
    """Stop while a call is inside, which is served; who comes later is turned away."""
    before = len(upstream.chat_requests)
    upstream.script(Completion(delay_s=0.8))
    inside = threading.Thread(target=player.generate)
    inside.start()
    until(lambda: len(upstream.chat_requests) > before, "the last call to be inside")
    stopping = threading.Thread(target=player.process.stop, args=(signal.SIGTERM,))
    stopping.start()
    until(lambda: player.process.call("GET", "/health/detailed").json["status"] == "draining", "the stop")
    player.generate()
    inside.join()
    stopping.join()


def _workers(receiver: OtlpReceiver) -> list[dict[str, Any]]:
    """Two workers whose records stay on disk, and a process after them that sends these."""
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream())
        qdrant = stack.enter_context(FakeQdrant().serving())
        mlflow = stack.enter_context(FakeMlflow())
        mlflow.down()
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory()), "spool")
        variables = {
            **IN_POD,
            "LITELLM_URL": upstream.url,
            "QDRANT_URL": qdrant.url,
            "MLFLOW_TRACKING_URI": mlflow.url,
            "MLFLOW_TIMEOUT_S": "1",
            "SPOOL_PATH": str(spool),
        }
        with _service(receiver, {**variables, "WORKERS": "2"}) as process:
            player = Player(process)
            for _ in range(4):
                player.generate()
            lines = _stopped(process)
        mlflow.up()
        with _service(receiver, variables) as process:
            until(lambda: len(mlflow.request_ids) >= 4, "the orphaned records to be sent")
            return lines + _stopped(process)


def _stopped(process: ServiceProcess) -> list[dict[str, Any]]:
    status = process.stop()
    assert status == 0, process.text()
    return process.lines()
