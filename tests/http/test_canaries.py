"""No secret and no prompt in any span, metric, log record, log line, error body or record of a call."""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import FastAPI

from service.dependencies import CurrentUser
from service.recording.mlflow import encode
from service.recording.record import read_records
from service.routers.schemas import GenerateRequest
from tests.fakes.streams import DONE, RawStream, chunk, usage
from tests.fakes.upstream import Answer as Completion
from tests.fakes.upstream import (
    Behaviour,
    Drip,
    FakeUpstream,
    Garbage,
    NotJson,
    Reset,
    Silent,
    Status,
    refusing_port,
)
from tests.harness import AppUnderTest
from tests.http.support import (
    RawAnswer,
    as_json,
    http_request,
    module_app,
    raw,
    trace_of,
)


def add_routes(app: FastAPI) -> None:
    @app.post("/test/bug")
    async def bug(body: GenerateRequest, _user: CurrentUser) -> str:
        raise LookupError(body.prompt + str(body.system_prompt))


@dataclass(frozen=True)
class Planted:
    """The app with a canary in each place where a secret or a prompt can be."""

    app: AppUnderTest
    upstream: FakeUpstream
    token: str
    key: str
    wrong_password: str = field(default_factory=lambda: new_canary("wrong-password"))
    prompt: str = field(default_factory=lambda: new_canary("prompt"))
    system: str = field(default_factory=lambda: new_canary("system-prompt"))
    tool: str = field(default_factory=lambda: new_canary("tool-prompt"))
    header: str = field(default_factory=lambda: new_canary("header"))
    cookie: str = field(default_factory=lambda: new_canary("cookie"))
    basic: str = field(default_factory=lambda: new_canary("basic"))
    query: str = field(default_factory=lambda: new_canary("query"))

    @property
    def canaries(self) -> Mapping[str, str]:
        """What may be found nowhere."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, str)}
        signature = self.token.rsplit(".", 1)[1]
        jwt_key = self.app.settings.jwt_secret_key.get_secret_value()
        return {**own, "signature": signature, "jwt key": jwt_key, **self.app.passwords}

    def send(self, path: str, body: object, authorization: str | None = None) -> RawAnswer:
        """Send a request with every canary in it."""
        headers = {
            "X-Custom": self.header,
            "X-Api-Key": self.header,
            "User-Agent": "tests",
            "Cookie": f"session={self.cookie}",
            "Authorization": f"Bearer {self.token}" if authorization is None else authorization,
        }
        encoded = {name: value.encode() for name, value in headers.items()}
        target = f"{path}?key={self.query}".encode()
        data = body if isinstance(body, bytes) else as_json(body)
        return raw(self.app.port, http_request("POST", target, encoded, data))

    def chat(self, path: str = "/llm/generate", **more: object) -> RawAnswer:
        """Send prompt and system prompt."""
        return self.send(path, {"prompt": self.prompt, "system_prompt": self.system, **more})

    def openai_chat(self, **more: object) -> RawAnswer:
        """Send both, and tools with their arguments, to the other family."""
        function = {"name": "look_up", "arguments": as_json({"what": self.tool}).decode()}
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": [{"type": "text", "text": self.prompt}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "1", "content": self.tool},
        ]
        parameters = {"description": self.tool, "enum": [self.tool]}
        tools = [{"type": "function", "function": {"name": "look_up", "parameters": parameters}}]
        body = {
            "model": "demo",
            "messages": messages,
            "tools": tools,
            "prediction": {"content": self.tool},
            **more,
        }
        return self.send("/v1/chat/completions", body)


def new_canary(name: str) -> str:
    """A text that stands nowhere else; it looks like no key and no path, so no pattern removes it by luck."""
    return (
        f"canary {name} {secrets.token_hex(8)}"
        if "prompt" in name
        else f"canary-{name}-{secrets.token_hex(8)}"
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    key = new_canary("key")
    values = {
        "litellm_api_key": key,
        "llm_timeout_s": 0.3,
        "llm_connect_timeout_s": 0.2,
        "log_level": "DEBUG",
        "spool_path": str(tmp_path_factory.mktemp("spool")),
    }
    # Nobody listens there: the records stay in the spool.
    with refusing_port() as port, FakeUpstream() as upstream:
        values["mlflow_tracking_uri"] = f"http://127.0.0.1:{port}"
        with module_app(add_routes, litellm_url=upstream.url, **values) as app:
            yield Planted(app, upstream, app.token(), key)


def _upstream(behaviour: Callable[[Planted], Behaviour]) -> Callable[[Planted], RawAnswer]:
    def act(planted: Planted) -> RawAnswer:
        planted.upstream.script(behaviour(planted))
        return planted.chat()

    return act


def _openai(
    behaviour: Callable[[Planted], Behaviour] | None = None, **more: object
) -> Callable[[Planted], RawAnswer]:
    def act(planted: Planted) -> RawAnswer:
        if behaviour is not None:
            planted.upstream.script(behaviour(planted))
        return planted.openai_chat(**more)

    return act


def _echoing_pieces(planted: Planted) -> tuple[bytes, ...]:
    call = {"index": 0, "id": planted.tool, "function": {"name": "x", "arguments": planted.tool}}
    said = {"content": planted.prompt + planted.system, "refusal": planted.prompt}
    return chunk(said), chunk({"tool_calls": [call], "reasoning_content": planted.system})


def _error_event(planted: Planted) -> bytes:
    return b"data: " + as_json({"error": {**_error_said(planted), "status": 400}}) + b"\n\n"


def _error_said(planted: Planted) -> dict[str, object]:
    message = f"cannot say {planted.prompt} and {planted.tool} with {planted.key}"
    return {"message": message, "type": message, "param": planted.tool, "code": "400"}


def _echo(status: int) -> Callable[[Planted], RawAnswer]:
    return _upstream(lambda planted: Status(status, _echoed(planted)))


def _echoed(planted: Planted) -> dict[str, object]:
    message = f"cannot say {planted.prompt} with {planted.system} for {planted.key}"
    return {"error": {"message": message, "type": message, "param": message, "code": message}}


ACTS: Mapping[str, tuple[int, Callable[[Planted], RawAnswer]]] = {
    "signed in": (200, lambda it: it.send("/auth/login", _login(it.app.passwords["user"]))),
    "wrong password": (401, lambda it: it.send("/auth/login", _login(it.wrong_password))),
    "password as name": (
        401,
        lambda it: it.send("/auth/login", {"username": it.wrong_password, "password": "x"}),
    ),
    "password of another type": (422, lambda it: it.send("/auth/login", {"password": [it.wrong_password]})),
    "bad scheme": (401, lambda it: it.send("/llm/generate", {"prompt": it.prompt}, f"Basic {it.basic}")),
    "bad token": (401, lambda it: it.send("/llm/generate", {"prompt": it.prompt}, f"Bearer {it.token}x")),
    "no field": (422, lambda it: it.send("/llm/generate", {"prompt": [it.prompt], "temperature": it.prompt})),
    "broken json": (422, lambda it: it.send("/llm/generate", f'{{"prompt": "{it.prompt}'.encode())),
    "no route": (404, lambda it: it.chat("/nowhere")),
    "bug": (500, lambda it: it.chat("/test/bug")),
    "too large": (413, lambda it: it.send("/llm/generate", {"prompt": it.prompt * 100_000})),
    "unknown model": (400, lambda it: it.chat(model="invalid")),
    "200": (200, lambda it: it.chat()),
    "200 that echoes": (200, _upstream(lambda it: Completion(content=it.prompt + it.system))),
    "200 without choices": (
        502,
        _upstream(lambda it: Completion(content=it.prompt, choices=False, extra={"x": it.prompt})),
    ),
    "400 that echoes": (400, _echo(400)),
    "401 that echoes": (502, _echo(401)),
    "404 that echoes": (400, _echo(404)),
    "422 that echoes": (400, _echo(422)),
    "429 that echoes": (429, _echo(429)),
    "500 that echoes": (502, _echo(500)),
    "echoes as text": (
        502,
        _upstream(lambda it: Status(500, json.dumps(_echoed(it)), content_type="text/plain")),
    ),
    "echoes in headers": (
        502,
        _upstream(lambda it: Status(500, headers={"x-echo": it.key, "Location": f"http://x/{it.key}"})),
    ),
    "silent": (504, _upstream(lambda _: Silent())),
    "drip": (504, _upstream(lambda it: Drip(0.1, answer=Completion(content=it.prompt)))),
    "not json": (502, _upstream(lambda it: NotJson(it.prompt.encode()))),
    "garbage": (502, _upstream(lambda _: Garbage())),
    "reset": (502, _upstream(lambda _: Reset("body"))),
    "/v1 200": (200, _openai()),
    "/v1 200 that echoes": (200, _openai(lambda it: Completion(content=it.prompt + it.tool))),
    "/v1 400 that echoes": (400, _openai(lambda it: Status(400, {"error": _error_said(it)}))),
    "/v1 422 that echoes": (400, _openai(lambda it: Status(422, _echoed(it)), stream=True)),
    "/v1 500 that echoes": (502, _openai(lambda it: Status(500, _echoed(it)))),
    "/v1 refused": (422, lambda it: it.openai_chat(stream=it.prompt)),
    "/v1 broken json": (422, lambda it: it.send("/v1/embeddings", f'{{"input": "{it.prompt}'.encode())),
    "/v1 embeddings": (200, lambda it: it.send("/v1/embeddings", {"model": "demo", "input": [it.prompt]})),
    "/v1 bad token": (401, lambda it: it.send("/v1/embeddings", {"input": it.prompt}, f"Bearer {it.token}x")),
    "/v1 no route": (404, lambda it: it.send("/v1/nope", {"input": it.prompt})),
    "/v1 stream": (200, _openai(lambda it: RawStream((*_echoing_pieces(it), usage(), DONE)), stream=True)),
    "/v1 stream that breaks": (200, _openai(lambda it: RawStream(_echoing_pieces(it), "cut"), stream=True)),
    "/v1 stream of garbage": (
        502,
        _openai(lambda it: RawStream((b"data: " + it.prompt.encode() + b"\n\n",)), stream=True),
    ),
    "/v1 stream that is refused": (400, _openai(lambda it: RawStream((_error_event(it),)), stream=True)),
    "stream": (200, lambda it: it.chat(stream=True)),
}


def _login(password: str) -> dict[str, str]:
    return {"username": "user", "password": password}


@pytest.mark.parametrize("act", ACTS)
def test_no_canary_comes_out(planted: Planted, act: str) -> None:
    status, run = ACTS[act]
    _forget(planted.app)
    answer = run(planted).answer
    assert answer.status == status, answer.body
    trace_of(planted.app, answer.request_id)

    said = answer.body.decode() if status >= 400 else ""
    places = {"the error's body and header": said + str(answer.headers), **_telemetry(planted.app)}
    leaks = [
        (name, place, text[max(0, text.index(canary) - 200) : text.index(canary) + 100])
        for name, canary in planted.canaries.items()
        for place, text in places.items()
        if canary in text
    ]
    assert not leaks


def test_the_search_would_find_a_canary(planted: Planted) -> None:
    """What is searched holds what it should: the traces, the lines, the records and the metrics."""
    planted.chat(model="invalid")
    places = _telemetry(planted.app)

    assert "gen_ai.request.model" in places["the spans"]
    assert "llm_request_failed" in places["stdout"]
    assert "llm_request_failed" in places["the records"]
    assert "llmops.llm.calls" in places["the metrics"]
    assert '"error_reason":"' in places["the spool"]
    assert "attempt 1" in places["MLflow"]
    assert "BadRequestError" in places["MLflow"]


def _forget(app: AppUnderTest) -> None:
    """Drop what earlier requests left, so that a leak is found with the request that caused it."""
    app.spans()
    app.records()
    app.spans_out.clear()
    app.logs_out.clear()
    app.stdout.seek(0)
    app.stdout.truncate()


def _telemetry(app: AppUnderTest) -> dict[str, str]:
    data = app.metrics_out.get_metrics_data()
    files = list(Path(app.settings.spool_path).glob("*.jsonl"))
    records = [record for path in files for record in read_records(path)[0]]
    return {
        "the spool": "\n".join(path.read_text() for path in files),
        "MLflow": encode(records, {}).decode(errors="replace"),
        "the spans": "\n".join(span.to_json() for span in app.spans()),
        "the metrics": data.to_json() if data else "",
        "the records": "\n".join(record.to_json() for record in app.records()),
        "stdout": app.stdout.getvalue(),
    }
