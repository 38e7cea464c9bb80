"""People who call the service, and write down what they get."""

import json
import socket
import time
from http.client import HTTPConnection
from typing import Any

from tests.fakes.upstream import Answer as Completion
from tests.harness import Answer, ServiceProcess
from tests.stack.ledger import Entry, Ledger, entry_of

GENERATE = "/llm/generate"
PRICE = float(Completion().cost or 0)
"""What the fake upstream says that a call costs; under /v1, callers are not told."""


class Caller:
    """Calls one process.

    Args:
        process: Whom.
        ledger: Where everything is written down.
        upstream: Which upstream stands behind it, a word.
    """

    def __init__(self, process: ServiceProcess, ledger: Ledger, upstream: str) -> None:
        self._process = process
        self._ledger = ledger
        self._upstream = upstream
        self._prompts = iter(range(1_000_000))
        self.token = self.sign_in(process.passwords["user"])

    def sign_in(self, password: str, user: str = "user") -> str:
        """Sign in; the token, or nothing."""
        answer = self.send("POST", "/auth/login", body={"username": user, "password": password})
        return str(answer.json.get("access_token", ""))

    def send(self, method: str, path: str, route: str | None = None, **options: Any) -> Answer:
        """Send any request that is no model call."""
        answer = self._process.call(method, path, **options)
        self._ledger.add(entry_of(path if route is None else route, answer))
        return answer

    def generate(self, model: str = "demo", query: str = "", fields: Any = None, **options: Any) -> Answer:
        """Make a model call; each asks something else, unless the fields of the body say otherwise."""
        prompt = f"What is {next(self._prompts)} of {self._upstream}?"
        body = {"prompt": prompt, "model": model, **(fields or {})}
        answer = self._process.call("POST", GENERATE + query, body=body, **{"token": self.token, **options})
        cached = answer.headers.get("x-cache") == "HIT"
        said = answer.json
        found = "cached" if cached else "success"
        self._ledger.add(
            entry_of(
                GENERATE,
                answer,
                model=model,
                outcome=found if answer.status == 200 else "error",
                attempts=int(answer.headers.get("x-llm-attempts", 0)),
                cache=answer.headers.get("x-cache", "").lower(),
                input_tokens=said.get("prompt_tokens") or 0,
                output_tokens=said.get("completion_tokens") or 0,
                cost=said.get("cost") or 0.0,
                upstream=self._upstream,
            )
        )
        return answer

    def openai(self, path: str, fields: Any) -> Answer:
        """Make a model call in OpenAI's words."""
        body = {"model": "demo", **fields}
        route = f"/v1/{path}"
        answer = self._process.call("POST", route, body=body, token=self.token)
        usage = answer.json["usage"]
        self._ledger.add(
            entry_of(
                route,
                answer,
                model="demo",
                outcome="cached" if answer.headers["x-cache"] == "HIT" else "success",
                attempts=int(answer.headers.get("x-llm-attempts", 0)),
                cache=answer.headers["x-cache"].lower(),
                operation="embeddings" if path == "embeddings" else "chat",
                input_tokens=usage["prompt_tokens"],
                output_tokens=usage.get("completion_tokens") or 0,
                cost=0.0 if path == "embeddings" else PRICE,
                upstream=self._upstream,
            )
        )
        return answer

    def refused(self, **options: Any) -> Answer:
        """Ask for a model call that never becomes one."""
        body = options.pop("body", {"prompt": "x"})
        return self.send("POST", GENERATE, body=body, **{"token": self.token, **options})

    def stream(self, model: str = "demo", *, leave_after: int | None = None) -> str:
        """Read a streamed answer, or leave after so many events; its trace id."""
        connection = HTTPConnection("127.0.0.1", self._process.port, timeout=30)
        fields = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        body = {"prompt": f"Stream {next(self._prompts)} of {self._upstream}", "stream": True, "model": model}
        started = time.perf_counter()
        connection.request("POST", GENERATE, json.dumps(body), fields)
        answer = connection.getresponse()
        events: list[Any] = []
        first: float | None = None
        while line := answer.readline():
            if line.startswith(b"data: "):
                first = first or time.perf_counter() - started
                events.append(line)
            if leave_after is not None and len(events) >= leave_after:
                break
        left = leave_after is not None
        last = {} if left else _last_with_usage(events)
        self._ledger.add(
            Entry(
                GENERATE,
                answer.status,
                "CallerLeftError" if left else "",
                time.perf_counter() - started,
                answer.headers["X-Request-ID"],
                model=model,
                outcome="cancelled" if left else "success",
                attempts=1,
                cache=(answer.headers["X-Cache"] or "").lower(),
                streamed=True,
                input_tokens=last.get("prompt_tokens") or 0,
                output_tokens=last.get("completion_tokens") or 0,
                cost=last.get("cost") or 0.0,
                first_piece_s=first,
                upstream=self._upstream,
            )
        )
        answer.close()
        connection.close()
        return str(answer.headers["X-Request-ID"])

    def leave(self, after_s: float, trace_id: str) -> None:
        """Ask, and leave before there is an answer."""
        body = json.dumps({"prompt": f"Leave {next(self._prompts)}"}).encode()
        head = (
            f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.token}\r\n"
            f"traceparent: 00-{trace_id}-00f067aa0ba902b7-01\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self._process.port)) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(after_s)
        self._ledger.add(
            Entry(
                GENERATE,
                499,
                "CallerLeftError",
                after_s,
                trace_id,
                model="demo",
                outcome="cancelled",
                attempts=1,
                cache="miss",
                upstream=self._upstream,
            )
        )

    def promise_a_body(self) -> None:
        """Announce a body and send none of it."""
        head = (
            f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.token}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        started = time.perf_counter()
        with socket.create_connection(("127.0.0.1", self._process.port), timeout=30) as connection:
            connection.sendall(head.encode())
            read = b""
            while piece := connection.recv(65_536):
                read += piece
        fields, _, body = read.partition(b"\r\n\r\n")
        found = json.loads(body)
        self._ledger.add(
            Entry(
                GENERATE,
                int(fields.split()[1]),
                found["error"],
                time.perf_counter() - started,
                found["request_id"],
            )
        )


def _last_with_usage(events: list[bytes]) -> dict[str, Any]:
    for event in reversed(events):
        try:
            found = json.loads(event.removeprefix(b"data: "))
        except ValueError:
            continue
        if isinstance(found, dict) and "completion_tokens" in found:
            return dict(found)
    raise LookupError(f"no event with a count of tokens among {events}")
