"""Replicas of the service on one machine, with what they share, and who plays the model for them."""

import asyncio
import json
import multiprocessing
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from deploy.ports import unused_port
from tests.bench.balancer import PROBE, balancer
from tests.e2e.recording import until
from tests.fakes.behaviours import Answer, Status, Stream
from tests.fakes.qdrant import FakeQdrant
from tests.fakes.upstream import FakeUpstream
from tests.fakes.wire import Exchange
from tests.harness import Client, ServiceProcess, new_secrets, request
from tests.valkey import Valkey

READY_LIMIT_S: Final = 120.0
GRACE_S: Final = 3
"""Longer than the balancer takes to see that a replica is not ready any more, on a busy machine too."""

CALL_TOKENS: Final = 30
"""Of each answer."""

BROKEN_MODELS: Final = [f"broken-{number}" for number in range(100)]
"""Names of further models, for who wants to see them fail."""


@dataclass(frozen=True)
class Order:
    """What the upstream is to do with a call: the call's prompt says it.

    Args:
        delay_s: How long it takes to answer, or to fail.
        fails: Whether it fails.
        pieces: The pieces of a stream.
        every_s: The time between two of them.
        question: Makes the prompt another one.
    """

    delay_s: float = 0.0
    fails: bool = False
    pieces: int = 3
    every_s: float = 0.0
    question: str = ""

    @property
    def prompt(self) -> str:
        """The prompt."""
        return json.dumps(vars(self))

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        await asyncio.sleep(self.delay_s)
        if self.fails:
            await Status(500).play(exchange)
        elif exchange.request.json.get("stream"):
            pieces = tuple(f"{number} " for number in range(self.pieces))
            await Stream(pieces, self.every_s).play(exchange)
        else:
            # What it says tells each call of the upstream from the others.
            await Answer(secrets.token_hex(8)).play(exchange)


class Obedient:
    """Does with a call what its prompt says; an answer where it says nothing."""

    async def play(self, exchange: Exchange) -> None:
        """Do it."""
        prompt = exchange.request.json["messages"][-1]["content"]
        order = Order(**json.loads(prompt)) if prompt.startswith("{") else Order()
        await order.play(exchange)


@contextmanager
def _an_upstream() -> Iterator[str]:
    with FakeUpstream() as upstream:
        upstream.default = Obedient()
        upstream.models += BROKEN_MODELS
        yield upstream.url


@contextmanager
def _a_qdrant() -> Iterator[str]:
    with FakeQdrant().serving() as qdrant:
        yield qdrant.url


def _serve(server: Callable[[], AbstractContextManager[str]], urls: Connection) -> None:
    with server() as url:
        urls.send(url)
        signal.pause()


def in_a_process(stack: ExitStack, server: Callable[[], AbstractContextManager[str]]) -> str:
    """Run a server in a process of its own, until the stack closes; its URL."""
    # As a new interpreter: this one may have threads.
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    running = spawn.Process(target=_serve, args=(server, there))
    running.start()
    stack.callback(running.join)
    stack.callback(running.kill)
    return str(here.recv())


@dataclass
class Fleet(Client):
    """Replicas that share everything but their memory and their spools; talks to them through the balancer.

    Each replica keeps its port and its spool when it is restarted, as a pod of a StatefulSet does.
    """

    variables: Mapping[str, str]
    folder: Path
    valkey: Valkey
    replicas: list[ServiceProcess] = field(default_factory=list)
    port: int = 0
    passwords: Mapping[str, str] = field(default_factory=dict)

    def spool(self, number: int) -> Path:
        """The spool of a replica."""
        return self.folder / f"spool-{number}"

    def _process(self, number: int, port: int) -> ServiceProcess:
        own = {"PORT": f"{port}", "SPOOL_PATH": str(self.spool(number))}
        return ServiceProcess({**self.variables, **own}).__enter__()

    def start(self, number: int) -> None:
        """Start so many replicas, and wait until they are ready."""
        for at in range(number):
            self.replicas.append(self._process(at, unused_port()))
        for replica in self.replicas:
            wait_ready(replica)
        self.passwords = self.replicas[0].passwords

    def restart(self, number: int) -> int:
        """Stop a replica with SIGTERM, start it anew, wait until it is ready; the exit status."""
        old = self.replicas[number]
        status = old.stop(limit_s=READY_LIMIT_S)
        old.__exit__()
        self.replicas[number] = self._process(number, old.port)
        wait_ready(self.replicas[number])
        return status

    def end(self) -> None:
        """End all, whatever they do."""
        for replica in self.replicas:
            replica.__exit__()

    def served(self, route: str) -> list[int]:
        """How many requests to a route each replica has answered since its start."""
        return [
            sum(
                (line["message"], line.get("http.route")) == ("http_request_completed", route)
                for line in replica.lines()
            )
            for replica in self.replicas
        ]

    def key(self, owner: str, rate: str = "") -> str:
        """A key of a user, whose rate all replicas know."""
        admin = self.token("admin")
        if rate:
            changed = self.call("PUT", f"/users/{owner}", body={"rate": rate}, token=admin)
            assert changed.status == 200, changed.body
        made = self.call("POST", "/keys", body={"name": "client", "owner": owner}, token=admin)
        assert made.status == 201, made.body
        secret = str(made.json["key"])

        def known(replica: ServiceProcess) -> bool:
            answer = replica.call("GET", "/auth/me", token=secret)
            return answer.status == 200 and rate in {"", answer.json["rate"]["limit"]}

        for replica in self.replicas:
            until(lambda replica=replica: known(replica), "the key to be known")  # type: ignore[misc]
        return secret


def wait_ready(replica: ServiceProcess) -> None:
    """Wait until the readiness probe of a replica succeeds."""

    def is_ready() -> bool:
        assert replica.process is not None
        assert replica.process.poll() is None, replica.text()
        try:
            return request(replica.port, "GET", PROBE, timeout_s=5).status == 200
        except OSError:
            return False

    until(is_ready, "a replica to be ready", READY_LIMIT_S)


@contextmanager
def fleet(
    kind: str, number: int, folder: Path, database: str, more: Mapping[str, str] | None = None
) -> Iterator[Fleet]:
    """Replicas behind a balancer, with a Valkey server and fakes of LiteLLM and of Qdrant.

    Args:
        kind: Which balancer.
        number: How many replicas.
        folder: Holds their spools.
        database: Its URL.
        more: More variables of each.
    """
    with Valkey() as valkey, ExitStack() as stack:
        variables = {
            **{name.upper(): value for name, value in new_secrets().items()},
            "LITELLM_URL": in_a_process(stack, _an_upstream),
            "QDRANT_URL": in_a_process(stack, _a_qdrant),
            "VALKEY_URL": valkey.url,
            "DATABASE_URL": database,
            "CACHE_ENABLED": "true",
            "HEALTH_REQUIRED": "litellm",
            "HEALTH_INTERVAL_S": "1",
            "SHUTDOWN_GRACE_S": f"{GRACE_S}",
            "RATE_LIMIT": "1000000/minute",
            "RETRY_MAX": "0",
            "FORWARDED_ALLOW_IPS": "127.0.0.1",
            **(more or {}),
        }
        running = Fleet(variables, folder, valkey)
        stack.callback(running.end)
        running.start(number)
        running.port = stack.enter_context(balancer(kind, [replica.port for replica in running.replicas]))
        yield running
