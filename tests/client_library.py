"""What OpenAI's own library makes of an answer's bytes, streamed or not, in a form that can be compared."""

from typing import Any

import httpx2
import openai

# The library appends what a stream repeats with each piece, also where it identifies something.
_IDENTIFIERS = {"role", "id", "name"}


def assembled(body: bytes) -> dict[str, Any]:
    """What ``client.chat.completions.stream`` assembles; raises whatever the library raises."""
    with _client(body, "text/event-stream") as client:
        messages: Any = [{"role": "user", "content": "Hi"}]
        with client.chat.completions.stream(model="demo", messages=messages) as stream:
            return _plain(stream.get_final_completion().model_dump(warnings=False))


def read(body: bytes) -> dict[str, Any]:
    """What ``client.chat.completions.create`` returns."""
    with _client(body, "application/json") as client:
        messages: Any = [{"role": "user", "content": "Hi"}]
        return _plain(
            client.chat.completions.create(model="demo", messages=messages).model_dump(warnings=False)
        )


def _client(body: bytes, content_type: str) -> openai.OpenAI:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"Content-Type": content_type}, content=body, request=request)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(api_key="none", base_url="http://upstream/v1", max_retries=0, http_client=http)


def _plain(completion: dict[str, Any]) -> dict[str, Any]:
    """The completion without what its two forms are allowed to differ in."""
    for choice in completion["choices"]:
        message = choice["message"]
        message["role"] = message.get("role") or "assistant"
        for call in message.get("tool_calls") or ():
            # A call's place in its list says it already.
            call.pop("index", None)
            # The library refuses an empty kind, unless it comes in one event with the call's beginning.
            call["type"] = call.get("type") or "function"
    found: dict[str, Any] = _simple(completion)
    return found


def _simple(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        fields = {name: _simple(inner, name) for name, inner in value.items()}
        return {name: inner for name, inner in fields.items() if inner not in (None, [], {}, "")}
    if isinstance(value, list):
        return [_simple(inner) for inner in value]
    if name in _IDENTIFIERS and isinstance(value, str):
        return _once(value)
    return value


def _once(text: str) -> str:
    """The shortest text that, repeated, is this one."""
    return text[: (text + text).find(text, 1)] if text else text
