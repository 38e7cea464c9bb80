"""The mix: everything that can happen to a request, made to happen, and written down by those who called."""

import secrets
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e import bad_service
from tests.fakes.streams import RawStream, text
from tests.fakes.upstream import Answer, FakeUpstream, NotJson, Reset, Silent, Status, Stream
from tests.faults.bench import UpstreamAt, nobody_at
from tests.harness import ServiceProcess
from tests.stack.api import until
from tests.stack.callers import GENERATE, Caller
from tests.stack.ledger import Ledger
from tests.stack.sampling import in_share
from tests.stack.world import World

SLOW_S = 10.6
"""Longer than the latency objective, shorter than the deadline below."""

BREAKER_FAILURES = 5
BREAKER_TIMEOUT_S = 8

CACHE = {"CACHE_ENABLED": "true", "QDRANT_PATH": ":memory:"}
FAULTY = {
    "LLM_TIMEOUT_S": "12",
    "RETRY_BASE_DELAY_S": "0.05",
    "RETRY_JITTER": "0",
    "BREAKER_FAILURE_THRESHOLD": str(BREAKER_FAILURES),
    "BREAKER_TIMEOUT_S": str(BREAKER_TIMEOUT_S),
    "MAX_IN_FLIGHT": "4",
    "MAX_IN_FLIGHT_PER_USER": "4",
    "REQUEST_BODY_TIMEOUT_S": "1",
    "LOGIN_FAILURES_PER_NAME": "3/minute",
    "HEALTH_INTERVAL_S": "1",
    **CACHE,
}
BRIEF = {
    "RATE_LIMIT": "3/minute",
    **CACHE,
    "RETRY_MAX": "0",
}
REAL = {
    "HEALTH_INTERVAL_S": "1",
    "HEALTH_TIMEOUT_S": "15",
    "MLFLOW_TIMEOUT_S": "10",
    **CACHE,
}


@dataclass
class Canaries:
    """Strings that must be nowhere outside, each at a place where somebody may be careless with it."""

    prompt: str = field(default_factory=lambda: f"canary-prompt-{secrets.token_hex(8)}")
    system: str = field(default_factory=lambda: f"canary-system-{secrets.token_hex(8)}")
    header: str = field(default_factory=lambda: f"canary-header-{secrets.token_hex(8)}")
    query: str = field(default_factory=lambda: f"canary-query-{secrets.token_hex(8)}")
    password: str = field(default_factory=lambda: f"canary-password-{secrets.token_hex(8)}")

    def all(self) -> list[str]:
        """All of them."""
        return [self.prompt, self.system, self.header, self.query, self.password]


def kept_by_share() -> str:
    """A trace id that the collector keeps whatever happens, as it belongs to the share."""
    while True:
        trace_id = secrets.token_hex(16)
        if in_share(trace_id):
            return trace_id


@dataclass
class Mix:
    """The run: three processes of the service, and what was seen.

    Args:
        world: The stack around them.
    """

    world: World
    ledger: Ledger = field(default_factory=Ledger)
    canaries: Canaries = field(default_factory=Canaries)
    secrets: list[str] = field(default_factory=list)
    lines: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    seen_upstream: int = 0
    real_call: str = ""
    """The trace id of one call through LiteLLM, of those that tail sampling keeps."""

    def play(self) -> None:
        """Make all of it happen, and wait until all of it has been written down outside."""
        self.ledger.mark("before")
        steps = (self._real, self._faulty, self._brief)
        with ThreadPoolExecutor(len(steps)) as together:
            for step in [together.submit(step) for step in steps]:
                step.result()
        self.ledger.mark("after")

    def _keep(self, process: ServiceProcess, token: str) -> None:
        self.secrets += [token, process.environment["JWT_SECRET_KEY"], *process.passwords.values()]

    def _read(self, process: ServiceProcess) -> None:
        """Keep the log lines by request; those outside of one come under nothing."""
        for line in process.lines():
            self.lines.setdefault(str(line.get("request_id", "")), []).append(line)

    def _real(self) -> None:
        """Through the real LiteLLM, recorded by the real MLflow, which goes away and comes back."""
        variables = {**REAL, **self.world.litellm_variables, "MLFLOW_TRACKING_URI": self.world.mlflow.url}
        with self.world.service(variables) as process:
            process.wait_ready()
            caller = Caller(process, self.ledger, "litellm")
            self._keep(process, caller.token)
            self.secrets.append(self.world.litellm_variables["LITELLM_API_KEY"])
            until(lambda: process.call("GET", "/health/detailed").status == 200, "the service to be ready")
            time.sleep(1.5)  # alone between two exports, so that its exemplar is not another's
            self.real_call = kept_by_share()
            caller.generate(headers={"traceparent": f"00-{self.real_call}-00f067aa0ba902b7-01"})
            time.sleep(1.5)
            for _ in range(11):
                caller.generate()
            for _ in range(3):
                caller.stream()
            for _ in range(2):
                caller.generate(model="no-such-model")
            caller.generate(
                query=f"?key={self.canaries.query}",
                fields={"prompt": self.canaries.prompt, "system_prompt": self.canaries.system},
                headers={"X-Canary": self.canaries.header, "User-Agent": self.canaries.header},
            )
            self._without_mlflow(process, caller)
            self.ledger.mark("real ends")
            process.stop()
            self._read(process)

    def _without_mlflow(self, process: ServiceProcess, caller: Caller) -> None:
        self.world.mlflow.kill()
        self.ledger.mark("mlflow down")
        until(lambda: not _check(process, "mlflow"), "mlflow to be seen down")
        for _ in range(4):
            caller.generate()
            self.ledger.facts["spooled"] += 1
        time.sleep(3)
        self.world.mlflow.start()
        self.world.mlflow.wait_ready()
        until(lambda: _check(process, "mlflow"), "mlflow to be seen up")
        self.ledger.mark("mlflow up")
        spool = Path(process.folder, "data/spool")
        until(lambda: not any(path.stat().st_size for path in spool.glob("*.jsonl")), "MLflow to have it all")

    def _faulty(self) -> None:
        """Through an upstream that does each thing that an upstream may do, and is gone for a while."""
        with ExitStack() as upstreams, ExitStack() as stack:
            upstream = upstreams.enter_context(UpstreamAt(0))
            process = stack.enter_context(self.world.service({**FAULTY, "LITELLM_URL": upstream.url}))
            process.wait_ready()
            caller = Caller(process, self.ledger, "fake")
            self._keep(process, caller.token)
            # Before the wrong passwords, after which this address has to wait.
            admin = caller.sign_in(process.passwords["admin"], user="admin")
            self.secrets.append(admin)
            self._callers_mistakes(caller)
            self._well(caller, upstream)
            self._budgets(caller, upstream)
            self._upstreams_faults(caller, upstream)
            self._too_many(caller, upstream)
            self._models_circuit(caller, admin, upstream)
            self._count_requests(upstream)
            upstreams.close()
            self._connection_breaker(caller, upstream.port)
            with UpstreamAt(upstream.port) as back:
                time.sleep(BREAKER_TIMEOUT_S + 1)
                self.ledger.touched.add(caller.generate().request_id)
                self.ledger.mark("breaker closed")
                for _ in range(5):
                    caller.generate()
                time.sleep(30)  # so that each series has points for long enough to be extrapolated fairly
                self._count_requests(back)
                self.ledger.mark("faulty ends")
                process.stop()
            self._read(process)

    def _count_requests(self, upstream: FakeUpstream) -> None:
        self.seen_upstream += sum(
            seen.path.endswith(("/chat/completions", "/embeddings")) for seen in upstream.requests
        )

    @staticmethod
    def _well(caller: Caller, upstream: FakeUpstream) -> None:
        for _ in range(10):
            caller.generate()
        again = {"prompt": "What is asked again?"}
        caller.generate(fields=again)
        time.sleep(1)  # entries are written after the answer
        for _ in range(4):
            caller.generate(fields=again)
        caller.generate(fields=again, headers={"Cache-Control": "no-cache"})
        caller.send("DELETE", "/llm/cache", token=caller.token)
        for number in range(2):
            messages = [{"role": "user", "content": f"Number {number} of fake?"}]
            caller.openai("chat/completions", {"messages": messages})
        caller.openai("embeddings", {"input": "A text of fake?"})
        for _ in range(3):
            upstream.script(Stream(interval_s=0.05))
            caller.stream("other-model")
        for _ in range(2):
            upstream.script(RawStream([text("Hello "), text("you ")], then="silence"))
            caller.stream("other-model", leave_after=2)
        upstream.script(Silent())
        caller.leave(0.5, secrets.token_hex(16))

    def _budgets(self, caller: Caller, upstream: FakeUpstream) -> None:
        """Spend a budget in tokens, and be refused; make a call without a price with a budget in dollars."""
        tokens = self._key(caller, {"amount": 1, "unit": "tokens", "period": "day"})
        caller.generate(token=tokens)
        until(lambda: _left(caller, tokens) == 0, "the budget to be spent")
        for _ in range(3):
            caller.refused(token=tokens)
        dollars = self._key(caller, {"amount": 100, "unit": "usd", "period": "month"})
        for _ in range(2):
            upstream.script(Answer(cost=None))
            caller.generate(token=dollars)
            self.ledger.facts["unpriced"] += 1
        caller.send("GET", "/auth/me", token=tokens[:-1] + ("0" if tokens[-1] != "0" else "1"))

    def _key(self, caller: Caller, budget: dict[str, object]) -> str:
        """Make an API key with a budget."""
        body = {"name": "with a budget", "budget": budget}
        key = str(caller.send("POST", "/keys", token=caller.token, body=body).json["key"])
        self.secrets.append(key)
        return key

    def _callers_mistakes(self, caller: Caller) -> None:
        caller.refused(token=None)
        caller.refused(token="a.b.c")  # noqa: S106 - no token at all
        caller.refused(body={"prompt": ""})
        caller.refused(body=b"{", headers={"Content-Type": "application/json"})
        caller.refused(body={"prompt": "x" * 1_200_000})
        caller.promise_a_body()
        caller.send("GET", "/no-such-route", route="")
        caller.send("DELETE", GENERATE, route=GENERATE)
        for _ in range(4):
            caller.sign_in(self.canaries.password, user="admin")

    @staticmethod
    def _upstreams_faults(caller: Caller, upstream: FakeUpstream) -> None:
        for fault in (Status(500), Reset(), Status(503)):
            upstream.script(fault)
            caller.generate()
        upstream.script(*[Status(500)] * 4)
        caller.generate()
        caller.generate()
        upstream.script(*[Status(429)] * 4)
        caller.generate()
        upstream.script(Status(401))
        caller.generate()
        upstream.script(Status(400))
        caller.generate()
        with ThreadPoolExecutor(3) as callers:
            upstream.script(Answer(delay_s=SLOW_S))
            slow = callers.submit(caller.generate)
            time.sleep(0.3)
            upstream.script(Silent())
            silent = callers.submit(caller.generate)
            for call in (slow, silent):
                call.result()
        caller.generate()

    @staticmethod
    def _too_many(caller: Caller, upstream: FakeUpstream) -> None:
        upstream.script(*[Answer(delay_s=2)] * 4)
        before = len(upstream.chat_requests)
        with ThreadPoolExecutor(4) as callers:
            inside = [callers.submit(caller.generate) for _ in range(4)]
            until(lambda: len(upstream.chat_requests) == before + 4, "four calls to be inside")
            for _ in range(2):
                caller.refused()
            for call in inside:
                call.result()

    def _models_circuit(self, caller: Caller, admin: str, upstream: FakeUpstream) -> None:
        """Fail for two callers, so that the model's circuit opens for everybody."""
        for token in (caller.token, admin):
            upstream.script(*[NotJson()] * BREAKER_FAILURES)
            for _ in range(BREAKER_FAILURES):
                caller.generate(token=token)
        for token in (caller.token, admin):
            caller.generate(token=token)
        time.sleep(BREAKER_TIMEOUT_S + 1)
        self.ledger.touched.add(caller.generate().request_id)

    def _connection_breaker(self, caller: Caller, port: int) -> None:
        """Refuse connections; the second call's first attempt is the fifth in a row."""
        with nobody_at(port, "refusing"):
            for _ in range(2):
                self.ledger.facts["unseen"] += int(caller.generate().headers["x-llm-attempts"])
            self.ledger.mark("breaker open")
            for _ in range(3):
                caller.generate()

    def _brief(self) -> None:
        """A process that is asked too often, has a bug, and is stopped while it is asked."""
        with FakeUpstream() as upstream:
            script = str(Path(bad_service.__file__))
            process = self.world.service({**BRIEF, "LITELLM_URL": upstream.url}, (script,))
            with process:
                process.wait_ready()
                caller = Caller(process, self.ledger, "brief")
                self._keep(process, caller.token)
                for _ in range(3):
                    caller.generate()
                for _ in range(2):
                    caller.refused(body={"prompt": "once more"})
                caller.send("GET", "/test/bug")
                time.sleep(45)  # so that its series have points for long enough to be extrapolated fairly
                self._stop(process, caller, upstream)
                self._read(process)

    def _stop(self, process: ServiceProcess, caller: Caller, upstream: FakeUpstream) -> None:
        """Stop it while a call is inside, which is served; who comes later is turned away."""
        admin = caller.sign_in(process.passwords["admin"], user="admin")
        self.secrets.append(admin)
        upstream.script(Answer(delay_s=3))
        inside = threading.Thread(target=caller.generate, kwargs={"token": admin})
        inside.start()
        until(lambda: len(upstream.chat_requests) == 4, "the last call to be inside")
        stopping = threading.Thread(target=process.stop, args=(signal.SIGTERM,))
        stopping.start()
        until(lambda: process.call("GET", "/health/detailed").json["status"] == "draining", "the stop")
        caller.send("GET", "/auth/me", token=caller.token)
        self.ledger.mark("brief ends")
        inside.join()
        stopping.join()


def _left(caller: Caller, key: str) -> float:
    return float(caller.send("GET", "/auth/me", token=key).json["budget"]["left"])


def _check(process: ServiceProcess, dependency: str) -> bool:
    return bool(process.call("GET", "/health/detailed").json["checks"][dependency])
