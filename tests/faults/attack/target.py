"""The service under attack, the second user who calls it all the while, and what both are measured by."""

import json
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final, Self

from tests.fakes.mlflow import FakeMlflow
from tests.fakes.otlp import OtlpReceiver
from tests.faults.attack.upstream import AttackedUpstream
from tests.faults.attack.wire import Conversation, NotHttpError, converse, head
from tests.harness import Answer, ServiceProcess

MIB: Final = 2**20
SECOND_ADDRESS: Final = "127.0.0.2"
"""The second user's address; attackers have any other of 127.0.0.0/8."""

SECOND_USER_PAUSE_S: Final = 0.02
SIGN_IN_EVERY: Final = 20
"""One of so many calls of the second user is a sign-in, which costs as much as a hundred others."""

VARIABLES: Final[Mapping[str, str]] = {
    "RATE_LIMIT": "10000000/minute",
    "CACHE_ENABLED": "true",
    "QDRANT_PATH": ":memory:",
    "CACHE_MAX_ENTRIES": "300",
    "STREAM_WRITE_TIMEOUT_S": "2",
    "RETRY_BASE_DELAY_S": "0.05",
    "OTEL_TRACES_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
    "OTEL_METRIC_EXPORT_INTERVAL": "1000",
    "OTEL_TRACES_SAMPLER": "traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": "0.5",
}
"""Settings of the attacked process. Limits between callers are the defaults; the rate is not, as the run is
faster than any."""


@dataclass
class Tally:
    """Counts inputs and answers, from several threads."""

    inputs: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, inputs: int, statuses: Sequence[int | str]) -> None:
        """Count inputs and the answers to them."""
        with self._lock:
            self.inputs += inputs
            self.statuses.update(str(status) for status in statuses)


class Gauges:
    """Memory and processor time of a process, as Linux counts them."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        # The first thread of the service runs its event loop.
        self._loop = self._proc / "task" / str(pid) / "schedstat"

    def loop_s(self) -> float:
        """Processor time that the event loop's thread has used."""
        return int(self._loop.read_text("ascii").split()[0]) / 1e9

    def resident_bytes(self) -> int:
        """Memory that the process holds."""
        return self._status("VmRSS")

    def peak_bytes(self) -> int:
        """The most memory that the process has held."""
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", (self._proc / "status").read_text("ascii"))
        assert found is not None
        return int(found[1]) * 1_024


class SecondUser:
    """Calls the service without a pause, as an ordinary user does, and keeps what went wrong.

    Args:
        process: The service.
        token: The user's token.
        user: The user's name, who also signs in again and again.
    """

    def __init__(self, process: ServiceProcess, token: str, user: str = "admin") -> None:
        self._process = process
        self._token = token
        self._credentials = {"username": user, "password": process.passwords[user]}
        self._stop = threading.Event()
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._call_on, name="second user")
        self.calls: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest_s = 0.0

    def __enter__(self) -> Self:
        # An address is trusted with sign-ins once it has signed in.
        self._sign_in(0)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def made(self) -> int:
        """How many calls were made."""
        return sum(self.calls.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Make no call while the block runs, which measures one of the attacker's."""
        with self._turn:
            yield

    def _call_on(self) -> None:
        kinds = (self._plain, self._streamed, self._openai, self._me, self._models, self._health)
        number = 0
        while not self._stop.is_set():
            number += 1
            with self._turn:
                call = self._sign_in if number % SIGN_IN_EVERY == 0 else kinds[number % len(kinds)]
                started_s = time.monotonic()
                try:
                    problem = call(number)
                except (OSError, HTTPException, ValueError, KeyError) as error:
                    problem = f"{type(error).__name__}: {error}"
                self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
                self.calls[call.__name__.strip("_")] += 1
                if problem:
                    self.failures.append(f"{time.strftime('%H:%M:%S')} {call.__name__.strip('_')}: {problem}")
            self._stop.wait(SECOND_USER_PAUSE_S)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes, bool]:
        """Send a request on a connection of its own; status, body, and whether the answer is this one's."""
        trace_id = secrets.token_hex(16)
        fields = {"Content-Type": "application/json", "traceparent": f"00-{trace_id}-{'1' * 16}-01"}
        if path != "/auth/login":
            fields["Authorization"] = f"Bearer {self._token}"
        connection = HTTPConnection(
            "127.0.0.1", self._process.port, timeout=20, source_address=(SECOND_ADDRESS, 0)
        )
        try:
            connection.request(method, path, None if body is None else json.dumps(body), fields)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers["X-Request-ID"] == trace_id
        finally:
            connection.close()

    def _wanted(self, asked: tuple[int, bytes, bool], contains: bytes) -> str:
        status, body, own = asked
        return "" if status == 200 and contains in body and own else f"{status} {own=} {body[:300]!r}"

    def _plain(self, number: int) -> str:
        return self._wanted(self._ask("POST", "/llm/generate", {"prompt": f"{number}"}), b"Hello from")

    def _streamed(self, number: int) -> str:
        body = {"prompt": f"streamed {number}", "stream": True}
        return self._wanted(self._ask("POST", "/llm/generate", body), b"event: done")

    def _openai(self, number: int) -> str:
        messages = [{"role": "user", "content": f"{number}"}]
        body = {"model": "demo", "messages": messages, "stream": True}
        return self._wanted(self._ask("POST", "/v1/chat/completions", body), b"data: [DONE]")

    def _me(self, _number: int) -> str:
        return self._wanted(self._ask("GET", "/auth/me"), b'"admin"')

    def _models(self, _number: int) -> str:
        return self._wanted(self._ask("GET", "/llm/models"), b"demo")

    def _health(self, _number: int) -> str:
        return self._wanted(self._ask("GET", "/health"), b"alive")

    def _sign_in(self, _number: int) -> str:
        return self._wanted(self._ask("POST", "/auth/login", self._credentials), b"access_token")


class Target:
    """A real service process with an upstream and a tracker in front of the attacker.

    Args:
        variables: Settings over those of ``VARIABLES``.
        arguments: What Python runs in place of the service.
    """

    def __init__(
        self,
        variables: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = ("-m", "service"),
    ) -> None:
        self._variables = dict(variables or {})
        self._arguments = arguments
        self._stack = ExitStack()
        self.tally = Tally()

    def __enter__(self) -> Self:
        try:
            self.upstream = self._stack.enter_context(AttackedUpstream())
            self.mlflow = self._stack.enter_context(FakeMlflow())
            self.receiver = self._stack.enter_context(OtlpReceiver())
            given = {
                **VARIABLES,
                "OTEL_EXPORTER_OTLP_ENDPOINT": self.receiver.http_url,
                "LITELLM_URL": self.upstream.url,
                "MLFLOW_TRACKING_URI": self.mlflow.url,
                **self._variables,
            }
            self.process = self._stack.enter_context(ServiceProcess(given, self._arguments)).wait_ready()
            assert self.process.process is not None
            self.gauges = Gauges(self.process.process.pid)
            self.token = self.process.token()
            self.admin = self.process.token("admin")
            self.second = self._stack.enter_context(SecondUser(self.process, self.admin))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    @property
    def port(self) -> int:
        """The service's port."""
        return self.process.port

    def call(self, method: str, path: str, **options: Any) -> Answer:
        """Send one request as the attacking user, unless a token is given."""
        answer = self.process.call(method, path, **{"token": self.token, **options})
        self.tally.add(1, [answer.status])
        return answer

    def talk(self, *packets: bytes, inputs: int = 1, **options: Any) -> Conversation:
        """Have one conversation by hand."""
        try:
            found = converse(self.port, packets, **options)
        except NotHttpError:
            self.tally.add(inputs, ["not HTTP"])
            raise
        self.tally.add(inputs, found.statuses or ["closed" if found.closed else "none"])
        return found

    def last(self) -> bytes:
        """Return a request whose answer is the last one of its connection."""
        return head("GET", "/auth/me", self.token, close=True)


def wait_for(condition: Callable[[], object], limit_s: float = 5.0) -> bool:
    """Wait until the condition holds; whether it does within the limit."""
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True
