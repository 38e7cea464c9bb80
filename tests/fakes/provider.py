"""A provider whose models answer by themselves, on a real TCP port: OpenAI's API and Anthropic's.

It answers what LiteLLM asks of the providers ``openai``, ``text-completion-openai``, ``hosted_vllm`` and
``anthropic`` with its ``api_base``, by what it is asked; a script replaces the next answers.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from tests.fakes import provider_chat as chat
from tests.fakes.http_server import EndingHttpServer
from tests.fakes.provider_responses import Responses, UnknownResponseError, unknown
from tests.fakes.waiting import Watched
from tests.fakes.wire import SeenRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["PICTURE_BYTES", "SOUND", "VECTOR", "ModelProvider", "Reply"]

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
VECTOR: Final = (0.25, -0.5)
PICTURE_BYTES: Final = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SOUND: Final = b"ID3\x04" + bytes(range(256)) * 64
BROKEN: Final[Mapping[str, int]] = {"gpt-broken": 500, "claude-broken": 500, "gpt-busy": 429}
"""Models that always fail, and how."""


@dataclass(frozen=True)
class Reply:
    """An answer; of a stream, the events one by one."""

    status: int
    body: bytes | Iterable[bytes]
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


class ModelProvider(Watched):
    """Answers as capable models would, and keeps what it was asked.

    Args:
        port: Where it listens on loopback; 0 takes a free one.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        self._requests: list[SeenRequest] = []
        self._script: deque[Reply] = deque()
        self._responses = Responses()
        self._http = _Server(self, port)
        self._thread = threading.Thread(target=self._http.serve_forever, name="provider", args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.drop_connections()
        self._http.server_close()

    def __repr__(self) -> str:
        return f"<ModelProvider {[f'{seen.method} {seen.path}' for seen in self.requests]}>"

    @property
    def url(self) -> str:
        """The base URL, without /v1."""
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def requests(self) -> list[SeenRequest]:
        """A copy of the requests seen so far."""
        with self._changed:
            return list(self._requests)

    def script(self, *replies: Reply) -> None:
        """Queue replies for the next requests."""
        with self._changed:
            self._script.extend(replies)

    def answer(self, request: SeenRequest) -> Reply:
        """Keep the request, and answer it."""
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()
            if self._script:
                return self._script.popleft()
        return self._answer(request)

    def _answer(self, request: SeenRequest) -> Reply:
        path = request.path.removeprefix("/v1")
        stored = re.fullmatch(r"/responses/([^/]+)(/input_items|/cancel)?", path)
        if stored:
            return self._stored(request.method, stored[1], stored[2])
        if path in {"/audio/transcriptions", "/audio/translations"}:
            return _transcription(request)
        if request.method == "POST" and path in {"/responses", *_JSON_ROUTES}:
            asked = request.json
            status = BROKEN.get(asked.get("model", ""))
            if status is not None:
                return _failure(status, anthropic=path.startswith("/messages"))
            return self._response(asked) if path == "/responses" else _JSON_ROUTES[path](asked)
        return _error(404, f"there is no {request.method} {request.path}")

    def _response(self, asked: Mapping[str, Any]) -> Reply:
        try:
            if asked.get("stream"):
                return Reply(200, list(self._responses.stream(asked)), EVENTS)
            return _json(self._responses.create(asked))
        except UnknownResponseError as error:
            message = f"Previous response with id '{error.args[0]}' not found."
            return _error(400, message, param="previous_response_id", code="previous_response_not_found")

    def _stored(self, method: str, identifier: str, more: str | None) -> Reply:
        try:
            if more == "/input_items":
                return _json(self._responses.input_items(identifier))
            if more == "/cancel":
                return _json(self._responses.cancel(identifier))
            if method == "DELETE":
                return _json(self._responses.delete(identifier))
            return _json(self._responses.get(identifier))
        except UnknownResponseError:
            return Reply(404, unknown(identifier))


def _json(answer: Mapping[str, Any]) -> Reply:
    return Reply(200, json.dumps(answer).encode())


def _error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Reply:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Reply(status, json.dumps({"error": error}).encode())


def _failure(status: int, *, anthropic: bool) -> Reply:
    message = "The model was told to fail."
    if not anthropic:
        return _error(status, message)
    error = {"type": "rate_limit_error" if status == 429 else "api_error", "message": message}
    return Reply(status, json.dumps({"type": "error", "error": error}).encode())


def _streamable(
    whole: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    events: Callable[[Mapping[str, Any]], Iterable[bytes]],
) -> Callable[[Mapping[str, Any]], Reply]:
    def answer(asked: Mapping[str, Any]) -> Reply:
        if asked.get("stream"):
            # Made whole first: what cannot be answered is no stream that breaks off.
            return Reply(200, list(events(asked)), EVENTS)
        return _json(whole(asked))

    return answer


def _embeddings(asked: Mapping[str, Any]) -> Reply:
    given = asked["input"]
    several = isinstance(given, list) and not isinstance(given[0], int)
    number = len(given) if several else 1
    packed = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()
    vector = packed if asked.get("encoding_format") == "base64" else list(VECTOR)
    data = [{"object": "embedding", "index": at, "embedding": vector} for at in range(number)]
    usage = {"prompt_tokens": 3 * number, "total_tokens": 3 * number}
    return _json({"object": "list", "data": data, "model": asked["model"], "usage": usage})


MODERATED: Final = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent"),
    *("self-harm", "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors"),
    *("violence", "violence/graphic"),
)


def _moderation(asked: Mapping[str, Any]) -> Reply:
    """A text with the word ``kill`` is flagged."""
    given = asked["input"]
    results = []
    for text in given if isinstance(given, list) else [given]:
        flagged = "kill" in json.dumps(text)
        violent = {name: flagged and name == "violence" for name in MODERATED}
        results.append(
            {
                "flagged": flagged,
                "categories": violent,
                "category_scores": {name: 0.9 if found else 0.01 for name, found in violent.items()},
                "category_applied_input_types": {name: ["text"] for name in MODERATED},
            }
        )
    return _json({"id": "modr-1", "model": asked["model"], "results": results})


def _images(asked: Mapping[str, Any]) -> Reply:
    usage = {
        "input_tokens": 10,
        "input_tokens_details": {"text_tokens": 10, "image_tokens": 0},
        "output_tokens": 20,
        "total_tokens": 30,
    }
    picture = base64.b64encode(PICTURE_BYTES).decode()
    if asked.get("stream"):
        fields = {"b64_json": picture, "created_at": chat.CREATED, "size": "1024x1024", "quality": "low"}
        fields |= {"background": "opaque", "output_format": "png"}
        partial = chat.named("image_generation.partial_image", partial_image_index=0, **fields)
        return Reply(200, [partial, chat.named("image_generation.completed", usage=usage, **fields)], EVENTS)
    data = [{"b64_json": picture}] * (asked.get("n") or 1)
    return _json({"created": chat.CREATED, "data": data, "usage": usage})


def _speech(asked: Mapping[str, Any]) -> Reply:
    kind = {"wav": "audio/wav", "opus": "audio/opus", "flac": "audio/flac", "pcm": "audio/pcm"}
    return Reply(200, SOUND, kind.get(asked.get("response_format", ""), "audio/mpeg"))


def _transcription(request: SeenRequest) -> Reply:
    """Says how many bytes it has heard, so that a test sees that they arrived."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    parts: dict[str, bytes] = {}
    for part in BytesParser().parsebytes(head + request.body).get_payload():
        name = part.get_param("name", header="content-disposition")  # type: ignore[union-attr]  # a part is a message
        content = part.get_payload(decode=True)  # type: ignore[union-attr]  # as above
        parts[str(name)] = content if isinstance(content, bytes) else b""
    text = f"I heard {len(parts['file'])} bytes."
    counts = {"input_tokens": 10, "output_tokens": 20, "total_tokens": 30}
    usage = {"type": "tokens", **counts, "input_token_details": {"text_tokens": 0, "audio_tokens": 10}}
    if parts.get("stream") in {b"true", b"True"}:
        done = {"type": "transcript.text.done", "text": text, "usage": usage}
        deltas = ({"type": "transcript.text.delta", "delta": piece} for piece in text.split())
        return Reply(200, [*map(chat.unnamed, deltas), chat.unnamed(done), chat.DONE], EVENTS)
    match parts.get("response_format", b"json").decode():
        case "text":
            return Reply(200, f"{text}\n".encode(), "text/plain; charset=utf-8")
        case "srt":
            return Reply(200, f"1\n00:00:00,000 --> 00:00:01,000\n{text}\n".encode(), "text/plain")
        case "vtt":
            return Reply(200, f"WEBVTT\n\n00:00.000 --> 00:01.000\n{text}\n".encode(), "text/vtt")
        case "verbose_json":
            segment = {"id": 0, "start": 0.0, "end": 1.0, "text": text, "tokens": [1], "temperature": 0.0}
            segment |= {"seek": 0, "avg_logprob": -0.1, "compression_ratio": 1.0, "no_speech_prob": 0.01}
            more = {"task": "transcribe", "language": "english", "duration": 1.0, "segments": [segment]}
            return _json({**more, "text": text, "usage": {"type": "duration", "seconds": 1}})
        case _:
            return _json({"text": text, "usage": usage})


def _rerank(asked: Mapping[str, Any]) -> Reply:
    """A document's score is the share of the question's words that it holds."""
    words = set(asked["query"].lower().split())
    results: list[dict[str, Any]] = []
    for index, document in enumerate(asked["documents"]):
        text = document if isinstance(document, str) else document["text"]
        score = len(words & set(text.lower().split())) / len(words)
        results.append({"index": index, "document": {"text": text}, "relevance_score": score})
    results.sort(key=lambda result: -result["relevance_score"])
    usage = {"total_tokens": 10}
    return _json(
        {"id": "rr-1", "model": asked["model"], "usage": usage, "results": results[: asked.get("top_n")]}
    )


_JSON_ROUTES: Final[Mapping[str, Callable[[Mapping[str, Any]], Reply]]] = {
    "/chat/completions": _streamable(chat.chat, chat.chat_stream),
    "/completions": _streamable(chat.completion, chat.completion_stream),
    "/messages": _streamable(chat.message, chat.message_stream),
    "/messages/count_tokens": lambda asked: _json(chat.token_count(asked)),
    "/embeddings": _embeddings,
    "/moderations": _moderation,
    "/images/generations": _images,
    "/audio/speech": _speech,
    "/rerank": _rerank,
}


class _Server(EndingHttpServer):
    def __init__(self, provider: ModelProvider, port: int) -> None:
        self.provider = provider
        super().__init__(port, _Handler)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a question."""
        self._serve()

    def do_POST(self) -> None:
        """Answer a call."""
        self._serve()

    def do_DELETE(self) -> None:
        """Delete what is stored."""
        self._serve()

    def _serve(self) -> None:
        target = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.provider.answer(
            SeenRequest(
                self.command, target.path, headers, self._body(), time.monotonic(), query=target.query
            )
        )
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if isinstance(reply.body, bytes):
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in reply.body:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # a trailer
        return body

    def log_message(self, *_args: object, **_kwargs: object) -> None:
        """Keep the test's output clean."""
