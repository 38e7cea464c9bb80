"""Records what the real LiteLLM makes of a scripted provider: ``python -m tests.fakes.recordings.record``.

``LITELLM_BIN`` names its executable. One provider speaks chat completions and one Messages; the proxy
translates each into both protocols.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, IncompleteRead
from pathlib import Path
from typing import Any

from deploy.ports import unused_port
from tests.fakes.operations import named
from tests.fakes.recordings import FOLDER, PROTOCOLS, write
from tests.fakes.streams import DONE, RawStream, chunk, text, usage
from tests.fakes.upstream import FakeUpstream, Status

TOOL = {
    "name": "weather",
    "description": "The weather at a place",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}
ODD = 'Ein "Pfad" \\ 🙂 \u2028 \u202e العربية \x7f\ttab'
CACHED = {
    "prompt_tokens": 50,
    "completion_tokens": 20,
    "total_tokens": 70,
    "prompt_tokens_details": {"cached_tokens": 40},
    "completion_tokens_details": {"reasoning_tokens": 7},
}


@dataclass(frozen=True)
class Take:
    """What the provider says, and how the stream then ends."""

    name: str
    end: str
    says: RawStream | Status
    asked: dict[str, Any] = field(default_factory=dict)


def _called(index: int, pieces: Sequence[str]) -> list[bytes]:
    first = {"index": index, "id": f"call_{index}", "type": "function"}
    calls = [{**first, "function": {"name": "weather", "arguments": ""}}]
    calls += [{"index": index, "function": {"arguments": piece}} for piece in pieces]
    return [chunk({"tool_calls": [call]}) for call in calls]


def _ended(*events: bytes, reason: str = "stop", counts: bytes | None = None) -> RawStream:
    return RawStream((*events, chunk(reason=reason), counts or usage(), DONE))


def _thought(thought: str) -> bytes:
    return chunk({"reasoning_content": thought})


BUSY = b'data: {"error": {"message": "slow down", "type": "rate_limit_error", "code": "429"}}\n\n'
WITH_TOOL = {"tools": True}
OF_CHAT = (
    Take("text", "complete", _ended(text("A trace "), text("is a path."))),
    Take("one-piece", "complete", _ended(text("A trace is a path."))),
    Take("many-pieces", "complete", _ended(*(text(f"{number} ") for number in range(40)))),
    Take("long-event", "complete", _ended(text("long " * 1_000))),
    Take("unicode", "complete", _ended(text(ODD), text("👩‍👩‍👧"))),
    Take("surrogates", "complete", _ended(b"".join((text("\ud83d\ude42"), text("Zoë"))))),
    Take("white-space", "complete", _ended(text("\n\n"), text("data: x\r\n"), text("\r\n"))),
    Take("max-tokens", "complete", _ended(text("A tra"), reason="length")),
    Take("filtered", "complete", _ended(text("I can"), reason="content_filter")),
    Take("tool", "complete", _ended(*_called(0, ['{"at":', '"Kiel"}']), reason="tool_calls"), WITH_TOOL),
    Take(
        "tool-in-small-pieces",
        "complete",
        _ended(*_called(0, list('{"at":"Kiel"}')), reason="tool_calls"),
        WITH_TOOL,
    ),
    Take(
        "text-and-tool",
        "complete",
        _ended(text("Let me look."), *_called(0, ['{"at":"Kiel"}']), reason="tool_calls"),
        WITH_TOOL,
    ),
    Take(
        "parallel-tools",
        "complete",
        _ended(*_called(0, ['{"at":"Kiel"}']), *_called(1, ['{"at":', '"Köln"}']), reason="tool_calls"),
        WITH_TOOL,
    ),
    Take("tool-without-arguments", "complete", _ended(*_called(0, ["{}"]), reason="tool_calls"), WITH_TOOL),
    Take("reasoning", "complete", _ended(_thought("Hm. "), _thought("A path."), text("A path."))),
    Take("cached-tokens", "complete", _ended(text("A path."), counts=chunk(usage=CACHED))),
    Take("no-counts", "complete", RawStream((text("A path."), chunk(reason="stop"), DONE))),
    Take("empty", "complete", _ended(text(""))),
    Take(
        "busy-in-the-middle",
        "failed-UpstreamError",
        RawStream((text("A trace "), text("is "), BUSY)),
    ),
    Take("cut-off", "failed-UpstreamError", RawStream((text("A trace "), text("is ")), "cut", 0.05)),
)


Block = tuple[dict[str, Any], list[dict[str, Any]]]


def _message(*blocks: Block, reason: str = "end_turn", sequence: str | None = None) -> RawStream:
    counts = {"input_tokens": 11, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 3}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "scripted", "content": []}
    start = {**head, "stop_reason": None, "stop_sequence": None, "usage": {**counts, "output_tokens": 1}}
    events = [named("message_start", message=start)]
    for index, (block, deltas) in enumerate(blocks):
        events.append(named("content_block_start", index=index, content_block=block))
        events += [named("content_block_delta", index=index, delta=delta) for delta in deltas]
        events.append(named("content_block_stop", index=index))
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    events += [named("message_delta", delta=delta, usage={"output_tokens": 22}), named("message_stop")]
    return RawStream(events)


def _text(*pieces: str) -> Block:
    return {"type": "text", "text": ""}, [{"type": "text_delta", "text": piece} for piece in pieces]


THINKING = (
    {"type": "thinking", "thinking": "", "signature": ""},
    [
        {"type": "thinking_delta", "thinking": "Hm. "},
        {"type": "thinking_delta", "thinking": "A path."},
        {"type": "signature_delta", "signature": "c2lnbmF0dXJl" * 8},
    ],
)
REDACTED: Block = (
    {"type": "redacted_thinking", "data": "cmVkYWN0ZWQ="},
    [],
)
LOOK: Block = (
    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
    [{"type": "input_json_delta", "partial_json": piece} for piece in ("", '{"at":', '"Kiel"}')],
)
OF_MESSAGES = (
    Take("claude-text", "complete", _message(_text("A trace ", "is a path."))),
    Take("claude-thinking", "complete", _message(THINKING, _text("A path."))),
    Take("claude-redacted-thinking", "complete", _message(REDACTED, _text("A path."))),
    Take("claude-tool", "complete", _message(_text("Let me look."), LOOK, reason="tool_use"), WITH_TOOL),
    Take("claude-max-tokens", "complete", _message(_text("A tra"), reason="max_tokens")),
    Take("claude-stop-sequence", "complete", _message(_text("A "), reason="stop_sequence", sequence="trace")),
    Take("claude-refusal", "complete", _message(_text("I can"), reason="refusal")),
)


@contextmanager
def proxy(provider: FakeUpstream) -> Iterator[tuple[int, str]]:
    """A running LiteLLM; its port and its key."""
    key, port = f"sk-{secrets.token_hex(24)}", unused_port()
    rows = (
        # Of each of these, LiteLLM speaks chat completions only.
        ("chat-for-messages", {"model": "hosted_vllm/scripted", "api_base": f"{provider.url}/v1"}),
        ("chat-for-responses", {"model": "deepseek/scripted", "api_base": f"{provider.url}/v1"}),
        ("claude", {"model": "anthropic/scripted", "api_base": provider.url}),
    )
    config = {
        "model_list": [
            {"model_name": name, "litellm_params": {**row, "api_key": "none", "max_retries": 0}}
            for name, row in rows
        ],
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
    }
    with tempfile.TemporaryDirectory() as folder, Path(folder, "output").open("wb") as output:
        Path(folder, "config.yaml").write_text(json.dumps(config))
        process = subprocess.Popen(
            [
                os.environ["LITELLM_BIN"],
                "--config",
                "config.yaml",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            cwd=folder,
            env={
                "PATH": os.environ["PATH"],
                "HOME": folder,
                "LITELLM_MASTER_KEY": key,
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "LITELLM_MODE": "PRODUCTION",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(lambda: _ask(port, "GET", "/health/readiness", key, None)[0] == 200, process)
            yield port, key
        finally:
            process.terminate()
            process.wait(20)


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float = 120.0) -> None:
    end_s = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < end_s:
        try:
            if ready():
                return
        except (OSError, HTTPException):
            pass
        time.sleep(0.2)
    raise TimeoutError("LiteLLM did not get ready")


def _ask(port: int, method: str, path: str, key: str, body: Any) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    except IncompleteRead as error:
        return response.status, error.partial
    finally:
        connection.close()


def request(protocol: str, model: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The body of a request."""
    if protocol == "responses":
        tools = [{"type": "function", **TOOL}]
        body: dict[str, Any] = {"input": "What is a trace?"}
    else:
        tools = [{"name": TOOL["name"], "input_schema": TOOL["parameters"]}]
        body = {"max_tokens": 100, "messages": [{"role": "user", "content": "What is a trace?"}]}
    return {**body, "model": model, "stream": True, **({"tools": tools} if asked.get("tools") else {})}


def main() -> int:
    """Record everything anew."""
    for protocol in PROTOCOLS:
        for old in (FOLDER / protocol).glob("litellm-*.sse"):
            old.unlink()
    with FakeUpstream() as provider:
        provider.unknown_model_error = False
        with proxy(provider) as (port, key):
            for protocol in PROTOCOLS:
                for model, takes in (("chat", OF_CHAT), ("claude", OF_MESSAGES)):
                    for take in takes:
                        provider.clear()
                        provider.script(take.says)
                        named_model = f"chat-for-{protocol}" if model == "chat" else model
                        body = request(protocol, named_model, take.asked)
                        status, content = _ask(port, "POST", f"/v1/{protocol}", key, body)
                        paths = [seen.path for seen in provider.requests]
                        sys.stdout.write(f"{protocol} {take.name}: {status}, {len(content)} bytes, {paths}\n")
                        write(protocol, f"litellm-{take.name}.{take.end}", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
