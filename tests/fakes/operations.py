"""What a provider answers for each operation, whole and streamed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DONE: Final = b"data: [DONE]\n\n"
MODEL: Final = {"model": "demo"}


@dataclass(frozen=True)
class Sample:
    """A request of one operation, and what a provider answers.

    Args:
        path: Below ``/v1``.
        request: The body.
        answer: The whole answer; bytes where it is not JSON.
        stream: The answer as events; None where there are no streams.
        counts: The tokens of the input and of the output; None where the answer has none.
        reasons: Why the answer ended, as the answer says.
        genai: The GenAI operation.
        media: What the whole answer is.
        file: The content of the file, where the request is a form with one.
    """

    path: str
    request: Mapping[str, Any]
    answer: Mapping[str, Any] | bytes
    stream: Sequence[bytes] | None = None
    counts: tuple[int, int] | None = None
    reasons: tuple[str, ...] = ()
    genai: str = "chat"
    media: str = "application/json"
    file: bytes | None = None

    def encoded(self, **fields: Any) -> tuple[bytes, str]:
        """The request's body with these fields too, and its content type."""
        given = {**self.request, **fields}
        if self.file is None:
            return json.dumps(given, ensure_ascii=False, indent=2).encode(), "application/json"
        return form({**given, "file": self.file}), FORM

    @property
    def required(self) -> list[str]:
        """The fields without which the request is none; the model has a default, or is required too."""
        default = {"model", "input"} if self.path == "/responses" else {"model", "voice"}
        return [name for name in self.request if name not in default]

    @property
    def content(self) -> bytes:
        """The whole answer's bytes, which are not written as this service would write them."""
        if isinstance(self.answer, bytes):
            return self.answer
        return json.dumps(self.answer, indent=1, ensure_ascii=False).encode()


BOUNDARY: Final = "----limit-0123456789"
FORM: Final = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, value: Any) -> bytes:
    """One part of a form; bytes are a file's content."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'.encode()
    if isinstance(value, bytes):
        return head + b'; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n' + value + b"\r\n"
    text = value if isinstance(value, str) else json.dumps(value)
    return head + b"\r\n\r\n" + text.encode() + b"\r\n"


def form(fields: Mapping[str, Any]) -> bytes:
    """A form with these fields, in their order."""
    return b"".join(part(name, value) for name, value in fields.items()) + f"--{BOUNDARY}--\r\n".encode()


def named(name: str, **fields: Any) -> bytes:
    """One event whose type is its name too."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields}, ensure_ascii=False)}\n\n".encode()


def data(**fields: Any) -> bytes:
    """One event without a name."""
    return f"data: {json.dumps(fields)}\n\n".encode()


RESPONSE: Final = {
    "id": "resp_1",
    "object": "response",
    "status": "completed",
    "error": None,
    "model": "demo-1",
    "output": [
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Ein Pfad 🙂", "annotations": []}],
        },
    ],
    "usage": {
        "input_tokens": 11,
        "output_tokens": 22,
        "total_tokens": 33,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens_details": {"reasoning_tokens": 5},
    },
}
STARTED: Final = {**RESPONSE, "status": "in_progress", "output": [], "usage": None}
ITEM: Final = {"type": "message", "id": "msg_1", "role": "assistant", "status": "in_progress", "content": []}
PART: Final = {"type": "output_text", "text": "", "annotations": []}
IN_PART: Final = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
RESPONSE_STREAM: Final = (
    named("response.created", response=STARTED, sequence_number=0),
    named("response.output_item.added", item=ITEM, output_index=0, sequence_number=1),
    named("response.content_part.added", part=PART, **IN_PART, sequence_number=2),
    named("response.output_text.delta", delta="Ein ", logprobs=[], **IN_PART, sequence_number=3),
    named("response.output_text.delta", delta="Pfad 🙂", logprobs=[], **IN_PART, sequence_number=4),
    named("response.output_text.done", text="Ein Pfad 🙂", logprobs=[], **IN_PART, sequence_number=5),
    named("response.completed", response=RESPONSE, sequence_number=6),
)
STARTED_USAGE: Final = {
    "input_tokens": 5,
    "cache_read_input_tokens": 4,
    "cache_creation_input_tokens": 2,
    "output_tokens": 1,
}
MESSAGE: Final = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "demo-1",
    "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
        {"type": "text", "text": "Ein Pfad 🙂"},
        {"type": "tool_use", "id": "tu_1", "name": "look", "input": {"at": "it"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {**STARTED_USAGE, "output_tokens": 22},
}
MESSAGE_STREAM: Final = (
    named("message_start", message={**MESSAGE, "content": [], "stop_reason": None, "usage": STARTED_USAGE}),
    named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    named("ping"),
    named("content_block_delta", index=0, delta={"type": "text_delta", "text": "Ein Pfad 🙂"}),
    named("content_block_stop", index=0),
    named("message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 22}),
    named("message_stop"),
)
COMPLETION: Final = {
    "id": "cmpl-1",
    "object": "text_completion",
    "model": "demo-1",
    "choices": [{"index": 0, "text": " a path", "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33},
}
HEAD: Final = {"id": "cmpl-1", "object": "text_completion", "model": "demo-1"}
COMPLETION_STREAM: Final = (
    data(**HEAD, choices=[{"index": 0, "text": " a ", "finish_reason": None}]),
    data(**HEAD, choices=[{"index": 0, "text": "path", "finish_reason": "stop"}]),
    data(**HEAD, choices=[], usage=COMPLETION["usage"]),
    DONE,
)
ASKED: Final = {"role": "user", "content": "What is a trace?"}

SAMPLES: Final[Mapping[str, Sample]] = {
    "responses": Sample(
        "/responses",
        {**MODEL, "input": "What is a trace?"},
        RESPONSE,
        RESPONSE_STREAM,
        (11, 22),
        ("completed",),
    ),
    "messages": Sample(
        "/messages",
        {**MODEL, "max_tokens": 100, "messages": [ASKED]},
        MESSAGE,
        MESSAGE_STREAM,
        (11, 22),
        ("tool_use",),
    ),
    "completions": Sample(
        "/completions",
        {**MODEL, "prompt": "A trace is"},
        COMPLETION,
        COMPLETION_STREAM,
        (11, 22),
        ("stop",),
        "text_completion",
    ),
    "count_tokens": Sample(
        "/messages/count_tokens",
        {**MODEL, "messages": [ASKED]},
        {"input_tokens": 14},
        genai="count_tokens",
    ),
    "moderations": Sample(
        "/moderations",
        {**MODEL, "input": "What is a trace?"},
        {"id": "modr-1", "model": "demo-1", "results": [{"flagged": False}]},
        genai="moderation",
    ),
    "images": Sample(
        "/images/generations",
        {**MODEL, "prompt": "A trace"},
        {
            "created": 1_700_000_000,
            "data": [{"b64_json": "AAAA"}],
            "usage": {"input_tokens": 11, "output_tokens": 22, "total_tokens": 33},
        },
        (
            named("image_generation.partial_image", b64_json="AA==", partial_image_index=0),
            named("image_generation.partial_image", b64_json="AAA=", partial_image_index=1),
            named(
                "image_generation.completed",
                b64_json="AAAA",
                usage={"input_tokens": 11, "output_tokens": 22, "total_tokens": 33},
            ),
        ),
        counts=(11, 22),
        genai="image_generation",
    ),
    "rerank": Sample(
        "/rerank",
        {**MODEL, "query": "What is a trace?", "documents": ["A path.", "A cat."]},
        {"id": "rr-1", "results": [{"index": 0, "relevance_score": 0.9}]},
        genai="rerank",
    ),
    "speech": Sample(
        "/audio/speech",
        {**MODEL, "input": "A trace is a path.", "voice": "alloy"},
        b"ID3\x00\xff" + bytes(range(256)) * 40,
        genai="speech",
        media="audio/mpeg",
    ),
    "transcriptions": Sample(
        "/audio/transcriptions",
        {**MODEL, "language": "de"},
        {"text": "Ein Pfad 🙂", "usage": {"input_tokens": 11, "output_tokens": 22, "total_tokens": 33}},
        counts=(11, 22),
        genai="transcription",
        file=b"RIFF\r\n--" + bytes(range(256)) * 40,
    ),
}


@dataclass(frozen=True)
class StoredSample:
    """What a provider answers to a request about a stored response.

    Args:
        method: The request's method.
        below: What follows the id in the path.
        answer: The answer.
    """

    method: str
    below: str
    answer: Mapping[str, Any]

    @property
    def content(self) -> bytes:
        """The answer's bytes, which are not written as this service would write them."""
        return json.dumps(self.answer, indent=1, ensure_ascii=False).encode()


STORED: Final[Mapping[str, StoredSample]] = {
    "get_response": StoredSample("GET", "", RESPONSE),
    "delete_response": StoredSample("DELETE", "", {"id": "resp_1", "object": "response", "deleted": True}),
    "cancel_response": StoredSample("POST", "/cancel", {**RESPONSE, "status": "cancelled"}),
    "list_input_items": StoredSample(
        "GET",
        "/input_items",
        {"object": "list", "data": [ITEM], "first_id": "msg_1", "last_id": "msg_1", "has_more": False},
    ),
}
