"""Chat completions, the older completions and Anthropic's messages, as their providers write them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from tests.fakes.thinker import TEXT, Conversation, Tool, Turn, think

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CREATED: Final = 1_700_000_000
DONE: Final = b"data: [DONE]\n\n"
SIGNATURE: Final = "c2lnbmF0dXJlLW9mLXRoZS10aG91Z2h0"
COUNTS: Final = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
CACHED: Final = 4


def named(name: str, /, **fields: Any) -> bytes:
    """One event whose type is its name too."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()


def unnamed(fields: Mapping[str, Any]) -> bytes:
    """One event without a name."""
    return f"data: {json.dumps(fields)}\n\n".encode()


def text_in(content: object) -> str:
    """The text of a message, whose content is a text or parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and "text" in part)


def pictures_in(content: object) -> int:
    """The number of pictures in a message."""
    parts = content if isinstance(content, list) else []
    return sum(part.get("type") in {"image_url", "input_image", "image"} for part in parts)


def choice_of(value: object) -> str:
    """A ``tool_choice`` of any protocol, as ``Conversation`` names it."""
    if isinstance(value, str):
        return {"required": "any"}.get(value, value)
    if not isinstance(value, dict):
        return "auto"
    name = value.get("name") or value.get("function", {}).get("name")
    return str(name) if name else {"any": "any", "none": "none"}.get(value.get("type", ""), "auto")


def last_question(messages: Sequence[Mapping[str, Any]]) -> tuple[int, Any]:
    """The place of the last message of a user that is no tool's result, and its content."""
    for place in range(len(messages) - 1, -1, -1):
        content = messages[place].get("content")
        parts = content if isinstance(content, list) else []
        answers = any(isinstance(part, dict) and part.get("type") == "tool_result" for part in parts)
        if messages[place].get("role") == "user" and not answers:
            return place, content
    return -1, ""


# ---- Chat completions ----------------------------------------------------------------------------------


def _chat_turn(asked: Mapping[str, Any]) -> Turn:
    messages = asked["messages"]
    place, question = last_question(messages)
    since = messages[place + 1 :]
    shape = asked.get("response_format") or {}
    schema = shape.get("json_schema", {}).get("schema") if shape.get("type") == "json_schema" else None
    calls = [call for message in since for call in message.get("tool_calls") or ()]
    return think(
        Conversation(
            prompt=text_in(question),
            tools=[
                Tool(tool["function"]["name"], tool["function"].get("parameters") or {})
                for tool in asked.get("tools") or ()
                if tool.get("type") == "function"
            ],
            choice=choice_of(asked.get("tool_choice")),
            called=[call["function"]["name"] for call in calls],
            results=[text_in(message.get("content")) for message in since if message["role"] == "tool"],
            schema={} if shape.get("type") == "json_object" else schema,
            pictures=pictures_in(question),
            again=any(message["role"] == "assistant" for message in messages[: max(place, 0)]),
        )
    )


def _chat_usage(asked: Mapping[str, Any]) -> dict[str, Any]:
    reasoning = 5 if asked.get("reasoning_effort") else 0
    return {
        **COUNTS,
        "prompt_tokens_details": {"cached_tokens": CACHED, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning, "audio_tokens": 0},
    }


def chat(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion."""
    turn = _chat_turn(asked)
    message: dict[str, Any] = {"role": "assistant", "content": turn.text, "refusal": None, "annotations": []}
    if turn.call:
        name, arguments = turn.call
        function = {"name": name, "arguments": arguments}
        message |= {
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        }
    reason = "tool_calls" if turn.call else "stop"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": CREATED,
        "model": asked["model"],
        "choices": [choice],
        "usage": _chat_usage(asked),
        "service_tier": "default",
    }


def chat_stream(asked: Mapping[str, Any]) -> Iterator[bytes]:
    """A chat completion as events."""
    turn = _chat_turn(asked)
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": asked["model"],
    }

    def chunk(delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        return unnamed({**head, "choices": choices})

    if turn.call:
        name, arguments = turn.call
        opening = {
            "index": 0,
            "id": "call_1",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        yield chunk({"role": "assistant", "content": None, "tool_calls": [opening]})
        for half in (arguments[:7], arguments[7:]):
            yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": half}}]})
    else:
        yield chunk({"role": "assistant", "content": "", "refusal": None})
        yield from (chunk({"content": piece}) for piece in turn.pieces)
    yield chunk({}, "tool_calls" if turn.call else "stop")
    if (asked.get("stream_options") or {}).get("include_usage"):
        yield unnamed({**head, "choices": [], "usage": _chat_usage(asked)})
    yield DONE


# ---- Completions ---------------------------------------------------------------------------------------


def completion(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A completion of the older protocol."""
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": CREATED,
        "model": asked["model"],
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
        "usage": COUNTS,
    }


def completion_stream(asked: Mapping[str, Any]) -> Iterator[bytes]:
    """The same as events."""
    head = {name: value for name, value in completion(asked).items() if name not in {"choices", "usage"}}
    for piece in Turn(TEXT).pieces:
        choice = {"index": 0, "text": piece, "logprobs": None, "finish_reason": None}
        yield unnamed({**head, "choices": [choice]})
    yield unnamed({**head, "choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]})
    if (asked.get("stream_options") or {}).get("include_usage"):
        yield unnamed({**head, "choices": [], "usage": COUNTS})
    yield DONE


# ---- Anthropic's messages ------------------------------------------------------------------------------


def _message_turn(asked: Mapping[str, Any]) -> Turn:
    messages = asked["messages"]
    place, question = last_question(messages)
    blocks = [
        block
        for message in messages[place + 1 :]
        for block in (message["content"] if isinstance(message["content"], list) else ())
    ]
    shape = (asked.get("output_config") or {}).get("format") or asked.get("output_format") or {}
    thinking = (asked.get("thinking") or {}).get("type")
    return think(
        Conversation(
            prompt=text_in(question),
            tools=[
                Tool(tool["name"], tool["input_schema"])
                for tool in asked.get("tools") or ()
                if "input_schema" in tool
            ],
            choice=choice_of(asked.get("tool_choice")),
            called=[block["name"] for block in blocks if block["type"] == "tool_use"],
            results=[text_in(block.get("content")) for block in blocks if block["type"] == "tool_result"],
            schema=shape.get("schema"),
            pictures=pictures_in(question),
            again=any(message["role"] == "assistant" for message in messages[: max(place, 0)]),
            thinks=thinking in {"enabled", "adaptive"},
        )
    )


def _message_usage(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The counts; a request that marks what to cache has read it from there."""
    cached = CACHED if '"cache_control"' in json.dumps(asked) else 0
    return {
        "input_tokens": 10 - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": 20,
        "service_tier": "standard",
    }


def _message_blocks(turn: Turn) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if turn.thought:
        blocks.append({"type": "thinking", "thinking": turn.thought, "signature": SIGNATURE})
    if turn.call:
        name, arguments = turn.call
        blocks.append({"type": "tool_use", "id": "toolu_1", "name": name, "input": json.loads(arguments)})
    else:
        blocks.append({"type": "text", "text": turn.text})
    return blocks


def message(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A message of Anthropic's."""
    turn = _message_turn(asked)
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": asked["model"],
        "content": _message_blocks(turn),
        "stop_reason": "tool_use" if turn.call else "end_turn",
        "stop_sequence": None,
        "usage": _message_usage(asked),
    }


def message_stream(asked: Mapping[str, Any]) -> Iterator[bytes]:
    """The same as events."""
    turn, whole = _message_turn(asked), message(asked)
    start = {**whole, "content": [], "stop_reason": None, "usage": {**whole["usage"], "output_tokens": 1}}
    yield named("message_start", message=start)
    yield named("ping")
    for index, block in enumerate(whole["content"]):
        empty, deltas = _as_deltas(block, turn)
        yield named("content_block_start", index=index, content_block=empty)
        for delta in deltas:
            yield named("content_block_delta", index=index, delta=delta)
        yield named("content_block_stop", index=index)
    end = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    yield named("message_delta", delta=end, usage=whole["usage"])
    yield named("message_stop")


def _as_deltas(block: dict[str, Any], turn: Turn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    match block["type"]:
        case "thinking":
            return {**block, "thinking": "", "signature": ""}, [
                {"type": "thinking_delta", "thinking": block["thinking"]},
                {"type": "signature_delta", "signature": block["signature"]},
            ]
        case "tool_use":
            given = json.dumps(block["input"])
            halves = ["", given[:7], given[7:]]
            return {**block, "input": {}}, [
                {"type": "input_json_delta", "partial_json": half} for half in halves
            ]
        case _:
            return {**block, "text": ""}, [{"type": "text_delta", "text": piece} for piece in turn.pieces]


def token_count(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The number of tokens of a message's request: its words."""
    return {"input_tokens": len(json.dumps(asked["messages"]).split())}
