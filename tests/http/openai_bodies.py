"""Requests and answers in the shapes of OpenAI's public API reference, feature by feature.

They are the features' shapes, written for these tests; what matters is that every byte of them passes.
"""

import json
from typing import Any, Final

USER: Final = {"role": "user", "content": "What is a trace?"}
WEATHER: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
PERSON: Final = {
    "name": "person",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
        "$defs": {"unused": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/unused"}]}},
    },
}
CALLED: Final = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"location": "Zürich, \\"ZH\\""}'},
}


def _chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": list(messages) or [USER], **more}


CHATS: Final[dict[str, Any]] = {
    "plain": _chat(),
    "system": _chat({"role": "system", "content": "Be brief."}, USER),
    "developer": _chat({"role": "developer", "content": "Be brief.", "name": "ops"}, USER),
    "history": _chat(
        USER, {"role": "assistant", "content": "A path."}, {"role": "user", "content": "Of what?"}
    ),
    "sampling": _chat(temperature=0.7, top_p=0.9, presence_penalty=-0.5, frequency_penalty=1.5, seed=42),
    "choices": _chat(n=3, stop=["\n", "END"], max_completion_tokens=64),
    "old limit": _chat(max_tokens=64, user="user-1234"),
    "logprobs": _chat(logprobs=True, top_logprobs=5),
    "bias": _chat(logit_bias={"50256": -100, "1": 0.5}),
    "tools": _chat(tools=[WEATHER], tool_choice="auto", parallel_tool_calls=False),
    "one tool": _chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "get_weather"}}),
    "allowed tools": _chat(
        tools=[WEATHER],
        tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}},
    ),
    "custom tool": _chat(
        tools=[{"type": "custom", "custom": {"name": "sql", "format": {"type": "grammar", "grammar": {}}}}]
    ),
    "tool result": _chat(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 21.50}'},
        tools=[WEATHER],
    ),
    "functions": _chat(functions=[WEATHER["function"]], function_call={"name": "get_weather"}),
    "JSON object": _chat(response_format={"type": "json_object"}),
    "JSON schema": _chat(response_format={"type": "json_schema", "json_schema": PERSON}),
    "image": _chat(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is in this image?"},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64,iVBORw0K", "detail": "low"},
                },
            ],
        }
    ),
    "audio in": _chat(
        {
            "role": "user",
            "content": [{"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}],
        }
    ),
    "audio out": _chat(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"}),
    "file": _chat(
        {"role": "user", "content": [{"type": "file", "file": {"file_id": "file-abc", "filename": "a.pdf"}}]}
    ),
    "refusal in history": _chat(
        USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER
    ),
    "reasoning": _chat(reasoning_effort="high", verbosity="low"),
    "prediction": _chat(
        prediction={"type": "content", "content": [{"type": "text", "text": "class A: ..."}]}
    ),
    "stored": _chat(store=True),
    "service tier": _chat(service_tier="flex", safety_identifier="hash-1", prompt_cache_key="key-1"),
    "web search": _chat(
        web_search_options={
            "search_context_size": "low",
            "user_location": {"type": "approximate", "approximate": {"city": "Bern", "country": "CH"}},
        }
    ),
    "thinking": _chat(
        thinking={"type": "enabled", "budget_tokens": 1024},
        reasoning={"effort": "medium", "summary": "auto"},
    ),
    "from the future": _chat(
        quantum={"qubits": [[[1, 2], []], {}], "on": None}, x_1=False, **{"": 0, "é": "ü"}
    ),
    "beyond ASCII": _chat({"role": "user", "content": "Grüße, 世界 🌍 \u202e\u0000 \ud83d"}),
    "numbers": _chat(big=12345678901234567890, small=1e-300, negative=-0.0, exact=0.1),
    "nulls": _chat(temperature=None, stop=None, tools=None, stream=None, stream_options=None),
    "not streamed": _chat(stream=False),
}
RAW_CHATS: Final[dict[str, bytes]] = {
    "white space": b' \n{ "messages" :\t[ {"role":"user" , "content":"x"} ]\r\n, "model" :"demo" } \n',
    "numbers as written": b'{"model":"demo","messages":[{"content":"x"}],"a":1.10,"b":1E2,"c":-0}',
    "escapes as written": b'{"model":"d\\u0065mo","messages":[{"content":"\\/\\u00fc\\ud83d\\ude00"}]}',
    "unescaped": '{"model":"demo","messages":[{"role":"user","content":"ü🌍"}]}'.encode(),
}
REQUESTS: Final[dict[str, bytes]] = {
    **{name: json.dumps(body).encode() for name, body in CHATS.items()},
    **RAW_CHATS,
}


def _answer(message: dict[str, Any], reason: str = "stop", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "demo-2026-01-01",
        "choices": [choice],
        "usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21},
        **more,
    }


ANSWERS: Final[dict[str, bytes]] = {
    name: json.dumps(body, indent=1).encode()
    for name, body in {
        "plain": _answer({"content": "A path."}),
        "tool calls": _answer({"content": None, "tool_calls": [CALLED, CALLED]}, "tool_calls"),
        "refusal": _answer({"content": None, "refusal": "I can't."}),
        "audio": _answer({"content": None, "audio": {"id": "a", "data": "UklGRg==", "transcript": "Hi"}}),
        "annotations": _answer({"content": "x", "annotations": [{"type": "url_citation"}]}),
        "reasoning": _answer({"content": "x", "reasoning_content": "because", "thinking_blocks": [{}]}),
        "logprobs": _answer({"content": "x"}, logprobs={"content": [{"token": "x", "logprob": -0.25}]}),
        "parts": _answer({"content": [{"type": "text", "text": "from the future"}]}),
        "details": _answer(
            {"content": "x"}, usage={"prompt_tokens": 1, "prompt_tokens_details": {"cached": 0}}
        ),
        "no usage": _answer({"content": "x"}, usage=None, system_fingerprint="fp", service_tier="flex"),
        "half an emoji": _answer({"content": "\ud83d"}),
    }.items()
} | {"as written": b'{"choices" : [{"message":{"content":"\\u00fc \xc3\xbc"},"x":1.10}] ,"n":1e2}\n'}
