"""The calls of `python -m tests.bench.money`: what is asked, how the upstream answers, what callers see."""

import asyncio
import json
import secrets
import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from random import Random
from typing import Any, Final

from service.identity.budgets import NANO
from tests.fakes.behaviours import Status
from tests.fakes.wire import Exchange
from tests.harness import ServiceProcess

KINDS: Final = {
    "plain": 18,
    "generated": 12,
    "streamed": 20,
    "cached": 20,
    "failed": 8,
    "retried": 10,
    "left": 6,
    "left in a stream": 6,
}
"""The kinds of calls, and their weights. ``plain`` and ``generated`` are whole answers under ``/v1`` and of
``/llm/generate``; a caller leaves a ``left`` call before its answer, or after the stream's first event."""

PROMPT_NANO: Final = 30_017
COMPLETION_NANO: Final = 60_029
"""What a token costs in billionths of a US dollar; odd, so that a sum that is rounded is wrong."""

BUDGET_EXCEEDED: Final = "BudgetExceededError"
ANSWER_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.02


def price(prompt_tokens: int, completion_tokens: int) -> int:
    """What a call costs, in billionths of a US dollar."""
    return prompt_tokens * PROMPT_NANO + completion_tokens * COMPLETION_NANO


@dataclass(frozen=True)
class Call:
    """One call, as it is asked."""

    kind: str
    question: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def cost_nano(self) -> int:
        """What it costs where the upstream answers it."""
        return price(self.prompt_tokens, self.completion_tokens)

    @property
    def answered(self) -> bool:
        """Whether the upstream is asked, and answers."""
        return self.kind in {"plain", "generated", "streamed", "retried"}

    @property
    def content(self) -> str:
        """The prompt: it tells the upstream what to do."""
        tokens = [self.prompt_tokens, self.completion_tokens]
        return json.dumps({"question": self.question, "kind": self.kind, "tokens": tokens})


def plan(random: Random, user: str, calls: int) -> deque[Call]:
    """The calls of a key. Those for the cache are some questions that all keys of a user have in common."""
    questions = max(1, calls // 20)
    made: deque[Call] = deque()
    kinds = random.choices(list(KINDS), list(KINDS.values()), k=calls)
    for kind in kinds:
        prompt, completion = random.randint(5, 90), random.randint(10, 300)
        question = secrets.token_hex(8)
        if kind == "cached":
            number = random.randrange(questions)
            question, prompt, completion = f"{user} {number}", 40 + number, 150
        made.append(Call(kind, question, prompt, completion))
    return made


class PricedUpstream:
    """Does with a call what its prompt says: it answers with a price, fails, fails once, or is silent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[str, threading.Event] = {}
        self._failed: set[str] = set()

    def asked(self, question: str) -> threading.Event:
        """Set when a question that is not answered has arrived."""
        with self._lock:
            return self._asked.setdefault(question, threading.Event())

    def _fails_now(self, question: str) -> bool:
        with self._lock:
            first = question not in self._failed
            self._failed.add(question)
            return first

    async def play(self, exchange: Exchange) -> None:
        """Answer one request."""
        asked = exchange.request.json
        call = json.loads(asked["messages"][-1]["content"])
        kind, question = call["kind"], call["question"]
        prompt, completion = call["tokens"]
        if kind == "failed":
            # The parity of what it would cost decides who is to blame: the request, or the upstream.
            await Status(400 if prompt % 2 else 503).play(exchange)
        elif kind == "retried" and self._fails_now(question):
            await Status(503).play(exchange)
        elif kind == "left":
            self.asked(question).set()
            await asyncio.Event().wait()
        elif asked.get("stream"):
            await self._stream(exchange, prompt, completion, ends=kind != "left in a stream")
        else:
            await self._whole(exchange, prompt, completion)

    async def _whole(self, exchange: Exchange, prompt: int, completion: int) -> None:
        message = {"role": "assistant", "content": "An answer."}
        body = {
            **_head(exchange, "chat.completion"),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": _usage(prompt, completion),
        }
        cost = f"{price(prompt, completion) / NANO:.9f}"
        headers = {"Content-Type": "application/json", "x-litellm-response-cost": cost}
        await exchange.respond(200, headers, json.dumps(body).encode())

    async def _stream(self, exchange: Exchange, prompt: int, completion: int, *, ends: bool) -> None:
        await exchange.send_head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        for text in ("An ", "answer."):
            choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
            await self._event(exchange, [choice])
            if not ends:
                await asyncio.Event().wait()
        await self._event(exchange, [{"index": 0, "delta": {}, "finish_reason": "stop"}])
        usage = {**_usage(prompt, completion), "cost": price(prompt, completion) / NANO}
        await self._event(exchange, [], usage=usage)
        await exchange.send_last_chunk(b"data: [DONE]\n\n")

    async def _event(self, exchange: Exchange, choices: list[Any], **more: Any) -> None:
        event = {**_head(exchange, "chat.completion.chunk"), "choices": choices, **more}
        await exchange.send_chunk(b"data: " + json.dumps(event).encode() + b"\n\n")


def _head(exchange: Exchange, kind: str) -> dict[str, Any]:
    model = exchange.request.json["model"]
    return {"id": "chatcmpl-priced", "object": kind, "created": 1_700_000_000, "model": model}


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


@dataclass
class Seen:
    """What a caller has seen of a call.

    Args:
        call: The call.
        trace_id: Chosen by the caller.
        end: ``answered``, ``refused`` for the budget, ``left`` by the caller, or ``cut`` with the process.
        status: Of the answer; 0 without one.
        error: Its name in the answer.
        cached: Whether the answer says that it comes from the cache.
        attempts: How often the upstream was asked, as the answer says.
        tokens: Paid for.
        cost_nano: Paid, in billionths of a US dollar.
    """

    call: Call
    trace_id: str
    end: str = "cut"
    status: int = 0
    error: str = ""
    cached: bool = False
    attempts: int = 0
    tokens: tuple[int, int] = (0, 0)
    cost_nano: int = 0

    def pay(self, usage: dict[str, Any], cost: float | None) -> None:
        """Note what the answer says; an answer under ``/v1`` has no price, so the price list says it."""
        if not self.cached:
            self.tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            self.cost_nano = price(*self.tokens) if cost is None else round(cost * NANO)


@dataclass
class Key:
    """A key, its budget, its calls, and what came of them."""

    name: str
    owner: str
    team: str
    calls: deque[Call]
    budget: dict[str, Any] | None = None
    id: str = ""
    secret: str = ""
    seen: list[Seen] = field(default_factory=list)


class Service:
    """The process of the service that runs now; each start has the same database, spool and cache."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._changed = threading.Condition()
        self._process: ServiceProcess | None = None
        self._ended = False
        self.starts = 0

    @property
    def process(self) -> ServiceProcess:
        """The process."""
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start it, and tell the callers when it is ready."""
        process = ServiceProcess(self._environment).__enter__()
        try:
            process.wait_ready()
        except BaseException:
            process.__exit__()
            raise
        with self._changed:
            self._process = process
            self.starts += 1
            self._changed.notify_all()

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        with self._changed:
            process, self._process = self.process, None
        process.__exit__()

    def stop(self) -> str:
        """End it in order; what is wrong with that, or nothing."""
        with self._changed:
            process, self._process = self.process, None
        try:
            status = process.stop()
            return f"the service ended with status {status}" if status else ""
        finally:
            process.__exit__()

    def end(self) -> None:
        """End it, whatever it does, and let no caller wait for another one."""
        with self._changed:
            process, self._process = self._process, None
            self._ended = True
            self._changed.notify_all()
        if process is not None:
            process.__exit__()

    def wait_for_one(self) -> ServiceProcess | None:
        """The process that runs, when one does; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._process is not None or self._ended)
            return None if self._ended else self._process


class Callers:
    """Some threads for each key, each with one call at a time.

    Args:
        service: Who is asked.
        upstream: Tells when a call that is to be left has arrived.
        keys: The keys with their calls.
        each: Threads for each key.
    """

    def __init__(self, service: Service, upstream: PricedUpstream, keys: list[Key], each: int) -> None:
        self._service = service
        self._upstream = upstream
        self._changed = threading.Condition()
        self._made = 0
        self.errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._call_all, args=(key,), name=key.name)
            for key in keys
            for _ in range(each)
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Call until everything has been asked; if the block raises, until the calls in flight have ended."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        except BaseException:
            self._service.end()
            raise
        finally:
            for thread in self._threads:
                thread.join()

    def wait_for_more(self, calls: int, limit_s: float) -> None:
        """Wait until so many more calls have come to an end."""
        self.wait_for(self._made + calls, limit_s)

    def wait_for(self, calls: int, limit_s: float) -> None:
        """Wait until so many calls in all have come to an end."""
        end = time.monotonic() + limit_s
        with self._changed:
            while self._made < calls:
                if self.errors:
                    raise self.errors[0]
                if not self._changed.wait(end - time.monotonic()):
                    raise TimeoutError(f"{self._made} of {calls} calls after {limit_s:g} s")

    def _call_all(self, key: Key) -> None:
        connection: HTTPConnection | None = None
        asked: ServiceProcess | None = None
        try:
            while (process := self._service.wait_for_one()) is not None:
                try:
                    call = key.calls.popleft()
                except IndexError:
                    return
                if connection is None or process is not asked:
                    connection, asked = self._connected(process, connection), process
                if connection is None:
                    key.calls.appendleft(call)
                    continue
                if self._make(connection, key, call).end in {"left", "cut"}:
                    connection.close()
                    connection = None
                with self._changed:
                    self._made += 1
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again where somebody waits
            with self._changed:
                self.errors.append(error)
                self._changed.notify_all()
        finally:
            if connection is not None:
                connection.close()

    @staticmethod
    def _connected(process: ServiceProcess, before: HTTPConnection | None) -> HTTPConnection | None:
        """A connection; None where the process has just been killed."""
        if before is not None:
            before.close()
        connection = HTTPConnection("127.0.0.1", process.port, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.connect()
        except OSError:
            time.sleep(POLL_S)  # not to ask without a pause until the kill is known
            return None
        return connection

    def _make(self, connection: HTTPConnection, key: Key, call: Call) -> Seen:
        trace_id = secrets.token_hex(16)
        seen = Seen(call, trace_id)
        # Noted before it is asked: a call that nobody has made must not be recorded.
        key.seen.append(seen)
        headers = {
            "Authorization": f"Bearer {key.secret}",
            "Content-Type": "application/json",
            "traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01",
        }
        path, body = _request(call)
        try:
            connection.request("POST", path, json.dumps(body).encode(), headers)
            if call.kind == "left" and self._arrived(connection, call):
                seen.end = "left"
                return seen
            answer = connection.getresponse()
            seen.status = answer.status
            if answer.status == 200 and call.kind == "left in a stream":
                if answer.readline():
                    seen.end = "left"
                return seen
            _read(answer, seen)
        except (OSError, HTTPException):
            pass  # cut, unless the whole answer had been read before
        return seen

    def _arrived(self, connection: HTTPConnection, call: Call) -> bool:
        """Wait until the upstream has the call; False when an answer, or the end, comes first."""
        arrived = self._upstream.asked(call.question)
        end = time.monotonic() + ANSWER_TIMEOUT_S
        while not arrived.is_set():
            if select.select([connection.sock], [], [], POLL_S)[0]:
                return False
            if time.monotonic() > end:
                raise TimeoutError("a call did not reach the upstream")
        return True


def _request(call: Call) -> tuple[str, dict[str, Any]]:
    if call.kind == "generated":
        return "/llm/generate", {"prompt": call.content}
    body: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": call.content}]}
    if call.kind in {"streamed", "left in a stream"}:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if call.kind == "cached":
        body["temperature"] = 0
    return "/v1/chat/completions", body


def _read(answer: HTTPResponse, seen: Seen) -> None:
    """Read an answer to its end."""
    seen.cached = answer.getheader("X-Cache") == "HIT"
    seen.attempts = int(answer.getheader("X-LLM-Attempts") or 0)
    if answer.status == 200 and seen.call.kind == "streamed":
        _read_stream(answer, seen)
        return
    body = json.loads(answer.read())
    error = body.get("error")
    # A text in the service's own protocol, an object in OpenAI's.
    if error is not None:
        seen.error = error if isinstance(error, str) else error["type"]
    if answer.status == 429 and seen.error == BUDGET_EXCEEDED:
        seen.end = "refused"
        return
    if answer.status == 200:
        own = seen.call.kind == "generated"
        seen.pay(body if own else body["usage"], body["cost"] if own else None)
    seen.end = "answered"


def _read_stream(answer: HTTPResponse, seen: Seen) -> None:
    while line := answer.readline():
        if line == b"data: [DONE]\n":
            # Here it is complete for OpenAI's clients, even if the connection breaks before the body ends.
            seen.end = "answered"
            answer.read()
            return
        if line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            if event.get("usage"):
                seen.pay(event["usage"], event["usage"]["cost"])
