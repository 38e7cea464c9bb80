"""The service in front of a real LiteLLM proxy, with the configuration that the demo runs."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.client_library import assembled, read
from tests.e2e.servers import LITELLM_CONFIG, litellm_server
from tests.e2e.support import generate, stopped
from tests.e2e.tap import Tap
from tests.fakes.streams import DONE, RawStream, chunk, usage
from tests.fakes.upstream import Answer as Completion
from tests.fakes.upstream import FakeUpstream, Status, Stream
from tests.harness import Answer, ServiceProcess
from tests.http.streaming import data, events
from tests.http.support import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.covered]


@dataclass(frozen=True)
class LiteLlm:
    """A running proxy; its model ``scripted`` asks the provider."""

    port: int
    key: str
    provider: FakeUpstream

    def variables(self, port: int | None = None, key: str | None = None) -> dict[str, str]:
        """What the service must know to use it."""
        return {"LITELLM_URL": f"http://127.0.0.1:{port or self.port}", "LITELLM_API_KEY": key or self.key}


@pytest.fixture(scope="session")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteLlm]:
    folder = tmp_path_factory.mktemp("litellm")
    with FakeUpstream() as provider:
        provider.unknown_model_error = False
        server, variables = litellm_server(folder, _with_scripted(folder, provider))
        with server:
            yield LiteLlm(server.port, variables["LITELLM_API_KEY"], provider)


def _with_scripted(folder: Path, provider: FakeUpstream) -> Path:
    """The demo's configuration with one more model, which asks the provider."""
    config = folder / "config.yaml"
    model = {"model": "openai/scripted", "api_key": "none", "api_base": f"{provider.url}/v1"}
    scripted = json.dumps({"model_name": "scripted", "litellm_params": {**model, "max_retries": 0}})
    # No cool-down: the failures of one test are no other's.
    config.write_text(
        LITELLM_CONFIG.read_text().replace("model_list:", f"model_list:\n  - {scripted}\n")
        + "\nrouter_settings: {num_retries: 0, disable_cooldowns: true}\n"
    )
    return config


def new_key() -> str:
    """A master key that LiteLLM takes for a strong one."""
    return f"sk-{secrets.token_hex(24)}"


@pytest.fixture(scope="module")
def service_and_tap(litellm: LiteLlm) -> Iterator[tuple[ServiceProcess, Tap]]:
    with Tap(litellm.port) as tap, ServiceProcess(litellm.variables(tap.port)) as process:
        yield process.wait_ready(), tap
        stopped(process)


def test_a_call_through_both_is_answered_counted_and_priced(
    service_and_tap: tuple[ServiceProcess, Tap],
) -> None:
    process, _ = service_and_tap
    answer = generate(process, process.token())

    assert answer.status == 200, answer.body
    body = answer.json
    assert body["response"].startswith("Hello from the demo model!")
    assert body["model"]
    assert min(body["prompt_tokens"], body["completion_tokens"]) > 0
    assert body["total_tokens"] == body["prompt_tokens"] + body["completion_tokens"]
    assert body["cost"] > 0
    assert body["request_id"] == answer.request_id


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/llm/generate"])
def test_a_stream_through_both_is_counted_and_priced(
    service_and_tap: tuple[ServiceProcess, Tap], path: str
) -> None:
    process, tap = service_and_tap
    body = {"prompt": "hi"} if path == "/llm/generate" else {"messages": [{"role": "user", "content": "hi"}]}
    answer = process.call("POST", path, body={**body, "stream": True}, token=process.token())

    assert answer.status == 200, answer.body
    assert len(events(answer.body)) > 3
    assert f"traceparent: 00-{answer.request_id}-".encode() in tap.sent.lower()

    def completed() -> list[dict[str, Any]]:
        lines = process.lines(answer.request_id)
        return [line for line in lines if line["message"] == "llm_request_completed"]

    (line,) = eventually(completed, "the call's last line")
    assert line["streamed"]
    assert line["total_tokens"] == line["prompt_tokens"] + line["completion_tokens"] > 0
    assert line["cost"] > 0
    last = events(answer.body)[-1]
    if path == "/llm/generate":
        assert data(last)["cost"] == line["cost"]
    else:
        assert last == b"data: [DONE]\n\n"
        assert b'"prompt_tokens"' not in answer.body


def test_openais_library_speaks_through_both(service_and_tap: tuple[ServiceProcess, Tap]) -> None:
    process, _ = service_and_tap
    base_url = f"http://127.0.0.1:{process.port}/v1"
    with OpenAI(base_url=base_url, api_key=process.token(), max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        whole = client.chat.completions.create(model="demo", messages=messages).choices[0].message.content
        pieces = client.chat.completions.create(model="demo", messages=messages, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
        found = client.embeddings.create(model="demo-embedding", input="x", encoding_format="float")
        assert found.data[0].embedding
        assert {"demo", "demo-embedding"} <= {model.id for model in client.models.list()}
        with pytest.raises(NotFoundError):
            client.models.retrieve("nope")
        with pytest.raises(BadRequestError, match="Model 'nope' not found"):
            client.chat.completions.create(model="nope", messages=messages, stream=True)


@pytest.mark.parametrize(
    "odd", [{"extra_body": 5}, {"extra_body": ["x"]}, {"timeout": "x"}, {"timeout": 0.001}]
)
def test_what_litellm_fails_on_because_of_the_request_is_the_callers(
    own_fields: ServiceProcess, litellm: LiteLlm, odd: dict[str, Any]
) -> None:
    # LiteLLM answers these with 500 and 408. Six of them would open a circuit.
    litellm.provider.default = Completion(delay_s=0.5)
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
    token = own_fields.token()
    for _ in range(6):
        answer = own_fields.call("POST", "/v1/chat/completions", body={**body, **odd}, token=token)
        assert answer.status == 400, answer.body
        assert answer.headers["x-llm-attempts"] == "1"
    litellm.provider.default = Completion()
    assert own_fields.call("POST", "/v1/chat/completions", body=body, token=token).status == 200


UNPAID = "You exceeded your current quota, please check your plan and billing details."
PROVIDER_SAYS: dict[str, tuple[int, dict[str, str], int, str | None, bool]] = {
    "context": (
        *(
            400,
            {
                "message": "The maximum context length is 8192 tokens.",
                "code": "context_length_exceeded",
            },
        ),
        *(400, "context_length_exceeded", True),
    ),
    "policy": (
        *(400, {"message": "Your request was rejected by us.", "code": "content_policy_violation"}),
        *(400, "content_policy_violation", True),
    ),
    "parameter": (
        *(400, {"message": "Unsupported parameter: 'max_tokens' is not supported.", "param": "max_tokens"}),
        *(400, "unsupported_parameter", True),
    ),
    "no such model": (
        *(404, {"message": "There is nothing here", "code": "model_not_found"}),
        *(400, "model_not_found", True),
    ),
    "quota": (*(429, {"message": UNPAID, "code": "insufficient_quota"}), *(429, "insufficient_quota", True)),
    "rate": (
        *(429, {"message": "Rate limit reached", "code": "rate_limit_exceeded"}),
        *(429, "rate_limit_exceeded", False),
    ),
    "key": (
        *(401, {"message": "Incorrect API key provided: x.", "code": "invalid_api_key"}),
        *(502, None, True),
    ),
    "failure": (*(500, {"message": "The server had an error"}), *(502, None, False)),
}


@pytest.mark.parametrize("case", PROVIDER_SAYS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_provider_says_keeps_its_reason_and_code_through_both(
    service_and_tap: tuple[ServiceProcess, Tap],
    litellm: LiteLlm,
    case: str,
    stream: bool,  # noqa: FBT001 - pytest passes it by name
) -> None:
    process, _ = service_and_tap
    status, said, answered, code, final = PROVIDER_SAYS[case]
    kind = {"type": "server_error" if status >= 500 else "invalid_request_error", "param": None}
    litellm.provider.default = Status(status, {"error": {**kind, **said}}, headers={"retry-after": "40"})
    if case == "quota":
        litellm.provider.default = Status(status, {"error": {**kind, **said}})
    # `hi` is in many a reason.
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    answer = process.call("POST", "/v1/chat/completions", body=body, token=process.token())
    litellm.provider.default = Completion()

    assert (answer.status, answer.json["error"]["code"]) == (answered, code), answer.body
    assert (answer.headers.get("x-should-retry") == "false") is final
    # LiteLLM hands the provider's wish on, under another name.
    assert answer.headers.get("retry-after") == (None if final else "40")
    if answered == 400:
        assert answer.json["error"]["message"] == f"The model refused the request: {said['message']}"
        assert answer.json["error"]["param"] == said.get("param")

    def failed() -> list[dict[str, Any]]:
        lines = process.lines(answer.request_id)
        return [line for line in lines if line["message"] == "llm_request_failed"]

    (line,) = eventually(failed, "the call's last line")
    assert line["llmops.upstream.status_code"] == status
    assert line.get("llmops.upstream.code") == (code or said.get("code"))


@pytest.fixture(scope="module")
def own_fields(litellm: LiteLlm) -> Iterator[ServiceProcess]:
    """A service whose callers may send two of LiteLLM's own fields."""
    variables = {"PASS_LITELLM_FIELDS": "extra_body,timeout", **litellm.variables()}
    with ServiceProcess(variables) as process:
        yield process.wait_ready()
        stopped(process)


def test_the_proxy_gets_our_trace(service_and_tap: tuple[ServiceProcess, Tap], litellm: LiteLlm) -> None:
    process, tap = service_and_tap
    answer = generate(process, process.token())

    assert answer.status == 200
    sent = tap.sent.lower()
    assert f"traceparent: 00-{answer.request_id}-".encode() in sent
    assert f"authorization: bearer {litellm.key}".encode() in sent


def test_an_unknown_model_is_the_callers_error(service_and_tap: tuple[ServiceProcess, Tap]) -> None:
    process, _ = service_and_tap
    answer = generate(process, process.token(), body={"prompt": "hi", "model": "invalid"})

    assert answer.status == 400
    assert answer.json["error"] == "BadRequestError"
    assert answer.json["message"] == "Model 'invalid' not found"


def test_the_models_of_the_configuration_are_offered(service_and_tap: tuple[ServiceProcess, Tap]) -> None:
    process, _ = service_and_tap
    answer = process.call("GET", "/llm/models", token=process.token())

    assert answer.status == 200
    assert "demo" in answer.json["models"]
    assert answer.json["default_model"] == "demo"


def test_a_model_without_its_providers_key_blames_nobody_outside(
    service_and_tap: tuple[ServiceProcess, Tap],
) -> None:
    process, _ = service_and_tap
    body = {"prompt": "hi", "model": "gpt-5.4-mini"}
    answer = generate(process, process.token(), body=body)

    assert answer.status == 502
    assert answer.json["error"] == "UpstreamError"
    assert b"api_key" not in answer.body


@pytest.mark.parametrize("path", ["/llm/generate", "/llm/models"])
def test_a_wrong_key_is_our_fault_and_not_the_callers(litellm: LiteLlm, path: str) -> None:
    with ServiceProcess(litellm.variables(key=new_key())) as process:
        process.wait_ready()
        token = process.token()
        answer = (
            generate(process, token) if path == "/llm/generate" else process.call("GET", path, token=token)
        )
        stopped(process)

    assert answer.status == 502
    assert answer.json["error"] == "UpstreamError"
    assert "credentials" in answer.json["message"]


@pytest.fixture(scope="module")
def cached(litellm: LiteLlm) -> Iterator[ServiceProcess]:
    variables = {**litellm.variables(), "CACHE_ENABLED": "true", "QDRANT_PATH": ":memory:"}
    with ServiceProcess(variables) as process:
        yield process.wait_ready()
        stopped(process)


ROLE = chunk({"role": "assistant", "content": ""})
STOP = chunk({}, "stop")
MORE: dict[str, Any] = {
    "citations": ["https://example.org/a"],
    "provider": "Somebody",
    "service_tier": "default",
    "system_fingerprint": "fp_1",
    "x_groq": {"id": "req_1"},
}


def asked(process: ServiceProcess, provider: FakeUpstream, question: str, *pieces: bytes) -> list[Answer]:
    """What a caller gets of a provider's stream, and then of the cache, as a stream and whole."""
    provider.script(RawStream((*pieces, usage(), DONE)))
    messages = [{"role": "user", "content": question}]
    body = {"model": "scripted", "messages": messages, "temperature": 0}
    token = process.token()
    first = process.call("POST", "/v1/chat/completions", body=body | {"stream": True}, token=token)
    assert (first.status, first.headers["x-cache"]) == (200, "MISS"), first.body
    # What is not stored fails when it is asked again.
    provider.default = provider.default_stream = Status(400)
    bodies = (body | {"stream": True}, body)
    again = [process.call("POST", "/v1/chat/completions", body=each, token=token) for each in bodies]
    provider.default, provider.default_stream = Completion(), Stream()
    return [first, *again]


def piece(**call: Any) -> bytes:
    return chunk({"tool_calls": [call]})


STORED: dict[str, tuple[bytes, ...]] = {
    "text": (ROLE, chunk({"content": "It "}), chunk({"content": "is."}), STOP),
    "further fields": (
        chunk({"role": "assistant", "content": ""}, **MORE),
        chunk({"content": "It is."}, **MORE),
        chunk({}, "stop", **MORE),
    ),
    "two calls": (
        chunk({"role": "assistant", "content": None}),
        piece(index=0, id="a", type="function", function={"name": "f", "arguments": ""}),
        piece(index=0, function={"arguments": '{"x":1}'}),
        piece(index=1, id="b", type="function", function={"name": "g", "arguments": '{"y":2}'}),
        chunk({}, "tool_calls"),
    ),
    "a repeated name": (
        chunk({"role": "assistant", "content": None}),
        piece(index=0, id="a", type="function", function={"name": "f", "arguments": '{"x"'}),
        piece(index=0, id="a", type="function", function={"name": "f", "arguments": ":1}"}),
        chunk({}, "tool_calls"),
    ),
    "thoughts": (ROLE, chunk({"reasoning_content": "Hm"}), chunk({"content": "It is."}), STOP),
}


@pytest.mark.parametrize("pieces", STORED.values(), ids=STORED)
def test_a_replay_is_the_first_answer(
    cached: ServiceProcess, litellm: LiteLlm, pieces: tuple[bytes, ...]
) -> None:
    first, streamed, whole = asked(cached, litellm.provider, repr(pieces), *pieces)

    assert (streamed.headers["x-cache"], whole.headers["x-cache"]) == ("HIT", "HIT")
    assert assembled(streamed.body) == assembled(first.body)
    assert read(whole.body)["choices"] == assembled(first.body)["choices"]


def test_further_fields_reach_every_caller(cached: ServiceProcess, litellm: LiteLlm) -> None:
    _, streamed, whole = asked(cached, litellm.provider, "And more?", *STORED["further fields"])

    assert MORE.items() <= whole.json.items()
    assert MORE.items() <= assembled(streamed.body).items()


@pytest.mark.parametrize(
    "pieces",
    [
        (
            piece(id="a", type="function", function={"name": "f", "arguments": "{}"}),
            piece(id="b", type="function", function={"name": "g", "arguments": "{}"}),
            chunk({}, "tool_calls"),
        ),
        (STOP,),
    ],
    ids=["calls without an index", "nothing"],
)
def test_what_cannot_be_given_back_is_not_stored(
    cached: ServiceProcess, litellm: LiteLlm, pieces: tuple[bytes, ...]
) -> None:
    _, streamed, whole = asked(cached, litellm.provider, repr(pieces), ROLE, *pieces)

    assert [(answer.status, answer.headers["x-cache"]) for answer in (streamed, whole)] == [(400, "MISS")] * 2
