"""The routes that the faults are played on: one for each operation, and this service's own protocol."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from service.upstream.operations import OPERATIONS, Operation
from tests.fakes.operations import SAMPLES, STORED, Sample, data, named
from tests.fakes.streams import DONE, chunk, text, usage
from tests.fakes.upstream import Answer

Protocol = Literal["own", "openai", "responses", "anthropic"]
"""Whose errors a route has; those of Responses differ from OpenAI's others in their streams only."""

ANTHROPIC_TYPES: Mapping[str, str] = {
    "BadRequestError": "invalid_request_error",
    "RateLimitError": "rate_limit_error",
    "UpstreamError": "api_error",
    "UpstreamTimeoutError": "timeout_error",
    "CircuitOpenError": "overloaded_error",
}
CHAT_ANSWER: Mapping[str, Any] = json.loads(Answer().body("demo"))
CHAT = Sample(
    "/chat/completions",
    {"model": "demo", "messages": [{"role": "user", "content": "What is a trace?"}]},
    CHAT_ANSWER,
    (text("Hello "), text("from "), text("the fake."), chunk(reason="stop"), usage(), DONE),
    (10, 20),
    ("stop",),
)
EMBEDDINGS = Sample(
    "/embeddings",
    {"model": "demo", "input": "What is a trace?"},
    {
        "object": "list",
        "model": "demo",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    },
    genai="embeddings",
)
USAGE = {"input_tokens": 11, "output_tokens": 22, "total_tokens": 33}
SPEECH_STREAM = (
    named("speech.audio.delta", audio="SUQz"),
    named("speech.audio.delta", audio="AP8="),
    named("speech.audio.done", usage=USAGE),
)
TRANSCRIPTION_STREAM = (
    named("transcript.text.delta", delta="Ein "),
    named("transcript.text.delta", delta="Pfad 🙂"),
    named("transcript.text.done", text="Ein Pfad 🙂", usage=USAGE),
)
ALL_SAMPLES: Mapping[str, Sample] = {
    "chat": CHAT,
    "embeddings": EMBEDDINGS,
    **SAMPLES,
    "speech": replace(SAMPLES["speech"], stream=SPEECH_STREAM),
    "transcriptions": replace(SAMPLES["transcriptions"], stream=TRANSCRIPTION_STREAM),
}


@dataclass(frozen=True)
class Route:
    """One route.

    Args:
        name: Names it in the table.
        path: Where it is.
        operation: The operation's name.
        protocol: Whose errors it has.
        sample: A request of the operation, and what a provider answers.
        request: What the caller sends, where it is not the sample's request.
    """

    name: str
    path: str
    operation: str
    protocol: Protocol
    sample: Sample
    request: Mapping[str, Any] | None = None

    def body(self, *, streamed: bool) -> tuple[bytes, str]:
        """What the caller sends, and its content type."""
        fields: dict[str, Any] = {}
        if streamed:
            fields = {"stream_format": "sse"} if self.operation == "speech" else {"stream": True}
            if self.row.asks_for_usage and self.protocol != "own":
                # So that the caller gets all that the upstream sends.
                fields["stream_options"] = {"include_usage": True}
        if self.row.stored:
            return b"", "application/json"
        if self.request is not None:
            return json.dumps({**self.request, **fields}).encode(), "application/json"
        return self.sample.encoded(**fields)

    @property
    def row(self) -> Operation:
        """The operation."""
        return OPERATIONS_BY_NAME[self.operation]

    @property
    def events(self) -> Sequence[bytes]:
        """The answer as events; none where the operation has no streams."""
        return self.sample.stream or ()

    @property
    def busy(self) -> bytes:
        """The upstream's own event in the middle of a stream that says that it has too much to do."""
        match self.protocol:
            case "responses":
                fields = {"code": "rate_limit_exceeded", "message": "slow down", "param": None}
                return named("error", **fields, sequence_number=2)
            case "anthropic":
                return named("error", error={"type": "rate_limit_error", "message": "slow down"})
            case _:
                return data(error={"message": "slow down", "code": "429"})

    def error_in(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The facts of an error's body, with this service's name of it as ``name``; in any other shape, none.

        Args:
            body: The whole body, or the data of the event that ends a stream.
        """
        said = body.get("error")
        if self.protocol == "own":
            return {**body, "name": said} if isinstance(said, str) else {}
        if not isinstance(said, dict):
            return {}
        if self.protocol != "anthropic":
            return {**said, "name": said.get("type")}
        kind = ANTHROPIC_TYPES[said["name"]]
        right = body.get("type") == "error" and said["type"] == kind and body["request_id"]
        return said if right else {}

    def problems_of_last_event(self, event: bytes, before: Sequence[bytes]) -> list[str]:
        """What is otherwise than the protocol wants of the event that ends a stream which failed."""
        name, _, content = event.rpartition(b"data: ")
        said = json.loads(content)
        pairs: list[tuple[str, object, object]] = [
            ("the error event's name", name, b"" if self.protocol == "openai" else b"event: error\n")
        ]
        if self.protocol == "responses":
            sent = [json.loads(one.rpartition(b"data: ")[2]) for one in before]
            # Where events have no numbers, as those of audio, they are counted.
            numbers = [one.get("sequence_number", place) for place, one in enumerate(sent)]
            code = said["error"]["code"] or said["error"]["type"]
            pairs += [
                ("the error event's type", said.get("type"), "error"),
                ("the error event's number", said.get("sequence_number"), numbers[-1] + 1),
                ("the error event's code", said.get("code"), code),
                ("the error event's message", said.get("message"), said["error"]["message"]),
            ]
        return [f"{what}: {got!r}, not {wanted!r}" for what, got, wanted in pairs if got != wanted]


OPERATIONS_BY_NAME: Mapping[str, Operation] = {str(name): row for name, row in OPERATIONS.items()}


def _route(name: str) -> Route:
    operation = OPERATIONS_BY_NAME[name]
    sample = ALL_SAMPLES.get(name)
    if operation.stored and name in STORED:
        sample = Sample(operation.path, {}, STORED[name].answer, genai=operation.genai)
    if sample is None:
        raise LookupError(f"tests/fakes/operations.py has no sample for the operation {name}")
    if (operation.read_event is None) is not (sample.stream is None):
        raise LookupError(f"the sample of {name} and its operation differ about streams")
    typed = operation.read_event is not None and not operation.ends_with_done
    protocol: Protocol = "responses" if typed and operation.shape == "openai" else operation.shape
    return Route(name, f"/v1{operation.path}", name, protocol, sample)


ROUTES: Mapping[str, Route] = {
    "generate": Route("generate", "/llm/generate", "chat", "own", CHAT, {"prompt": "What is a trace?"}),
    **{name: _route(name) for name in OPERATIONS},
}
