"""Recordings and their texts: bytes that arrive in pieces, and events where the upstream sends them."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, IncompleteRead
from typing import Any

import pytest

from service import protocol
from tests.fakes.operations import FORM, SAMPLES, named
from tests.fakes.streams import RawStream
from tests.fakes.upstream import FakeUpstream, Status
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import attributes, eventually, module_app, server_span, trace_of

AUDIO = {"Content-Type": "audio/mpeg"}
LIMIT = 100_000
SPEECH, TRANSCRIPTIONS = SAMPLES["speech"], SAMPLES["transcriptions"]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    limits: dict[str, Any] = {
        "llm_max_answer_bytes": LIMIT,
        "llm_timeout_s": 2.0,
        "stream_chunk_timeout_s": 0.5,
        "retry_max": 1,
        "retry_base_delay_s": 0.01,
        "breaker_failure_threshold": 1_000,
    }
    with module_app(litellm_url=fake.url, **limits) as served:
        yield served


@pytest.fixture(autouse=True)
def _nothing_is_left(fake: FakeUpstream) -> Iterator[None]:
    yield
    fake.clear()


def ask(app: AppUnderTest, name: str, **fields: Any) -> Answer:
    """Send the operation's sample."""
    content, content_type = SAMPLES[name].encoded(**fields)
    headers = {"Content-Type": content_type}
    return app.call("POST", f"/v1{SAMPLES[name].path}", body=content, token=app.token(), headers=headers)


def failed(app: AppUnderTest, request_id: str) -> dict[str, Any]:
    """The line of a call that failed."""
    (line,) = eventually(
        lambda: [one for one in app.lines(request_id) if one["message"] == "llm_request_failed"],
        "the call to be reported",
    )
    return line


def test_a_recording_is_passed_on_as_it_arrives(app: AppUnderTest, fake: FakeUpstream) -> None:
    fake.script(RawStream([b"ID3", b"\x00\xff" * 500], then="silence", headers=AUDIO))
    connection = HTTPConnection("127.0.0.1", app.port, timeout=20)
    body, content_type = SPEECH.encoded()
    headers = {"Content-Type": content_type, "Authorization": f"Bearer {app.token()}"}
    connection.request("POST", "/v1/audio/speech", body, headers)
    response = connection.getresponse()
    assert (response.status, response.headers["Content-Type"]) == (200, "audio/mpeg")
    # The upstream has not ended its answer when the caller has these, and never will.
    assert response.read(1_003) == b"ID3" + b"\x00\xff" * 500
    with pytest.raises(IncompleteRead):
        response.read()
    connection.close()
    request_id = response.headers["X-Request-ID"]
    assert failed(app, request_id)["error"] == "UpstreamTimeoutError"
    assert attributes(server_span(app, request_id))["error.type"] == "UpstreamTimeoutError"


@pytest.mark.parametrize("then", ["cut", "reset"])
def test_a_recording_that_breaks_off_is_seen_to_break_off(
    app: AppUnderTest, fake: FakeUpstream, then: Any
) -> None:
    fake.script(RawStream([b"ID3"], then=then, headers=AUDIO))
    with pytest.raises(IncompleteRead):
        ask(app, "speech")
    (line,) = eventually(
        lambda: [one for one in app.lines() if one.get("llmops.upstream.cause") == "reset"][-1:],
        "the failure",
    )
    assert line["error"] == "UpstreamError"


def test_a_client_that_does_not_read_loses_its_connection_with_what_broke_off(
    fake: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "CUT_TIMEOUT_S", 0.2)
    pieces = [b"x" * 10_000] * 100
    fake.script(RawStream(pieces, then="cut", headers=AUDIO))
    with running_app(litellm_url=fake.url) as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.settimeout(20)
        client.connect(("127.0.0.1", served.port))
        body, content_type = SPEECH.encoded()
        client.sendall(
            f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.token()}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        # The client takes what lets the upstream's cut be seen, and then nothing more.
        while not [one for one in served.lines() if one["message"] == "llm_request_failed"]:
            assert client.recv(20_000)
        eventually(lambda: _is_gone(client), "the end of the connection")


def _is_gone(client: socket.socket) -> bool:
    """Whether what a client sends is answered with a reset: an open connection would take it."""
    try:
        client.send(b"x")
    except OSError:
        return True
    return False


def test_a_recording_is_bounded(app: AppUnderTest, fake: FakeUpstream) -> None:
    fake.script(RawStream([b"x" * 10, b"x" * LIMIT], headers=AUDIO, interval_s=0.1))
    try:
        found = ask(app, "speech")
    except IncompleteRead:
        return
    # All of it has arrived at once.
    assert (found.status, found.json["error"]["type"]) == (502, "UpstreamError")


@pytest.mark.parametrize(
    ("name", "answer", "error"),
    [
        ("speech", Status(200, "<html>", content_type="text/html"), (502, "UpstreamError")),
        ("speech", Status(200, '{"text": "x"}'), (502, "UpstreamError")),
        ("speech", Status(200, {"error": {"message": "x", "code": 429}}), (429, "RateLimitError")),
        ("speech", Status(200, b"", content_type="audio/mpeg"), (502, "UpstreamError")),
        ("speech", Status(200, b"ID3", content_type="audio/\xe9"), (502, "UpstreamError")),
        ("speech", Status(200, b"ID3", content_type=f"audio/{'x' * 300}"), (502, "UpstreamError")),
        (
            "speech",
            Status(200, b"\x1f\x8b", {"Content-Encoding": "gzip"}, "audio/mpeg"),
            (502, "UpstreamError"),
        ),
        ("transcriptions", Status(200, "<html>", content_type="text/html"), (502, "UpstreamError")),
        ("transcriptions", Status(200, b"ID3", content_type="audio/mpeg"), (502, "UpstreamError")),
        ("transcriptions", Status(200, {"error": {"message": "x", "code": 400}}), (400, "BadRequestError")),
        ("transcriptions", Status(200, b"x" * (LIMIT + 1)), (502, "UpstreamError")),
    ],
)
def test_what_is_not_an_answer_is_not_passed_on(
    app: AppUnderTest, fake: FakeUpstream, name: str, answer: Status, error: tuple[int, str]
) -> None:
    fake.script(answer, answer)
    found = ask(app, name)
    assert (found.status, found.json["error"]["type"]) == error


@pytest.mark.parametrize("media", ["text/plain; charset=utf-8", "text/vtt", "application/x-subrip"])
def test_a_text_of_any_format_is_passed_on(app: AppUnderTest, fake: FakeUpstream, media: str) -> None:
    content = "WEBVTT\n\n00:00.000 --> 00:01.000\nEin Pfad 🙂\n".encode()
    fake.script(Status(200, content, content_type=media))
    found = ask(app, "transcriptions", response_format="vtt")
    assert (found.status, found.body, found.headers["content-type"]) == (200, content, media)


STREAMS = {
    "speech": [
        named("speech.audio.delta", audio="AAAA"),
        named("speech.audio.done", usage={"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}),
    ],
    "transcriptions": [
        named("transcript.text.delta", delta="Ein "),
        named("transcript.text.delta", delta="Pfad"),
        named(
            "transcript.text.done",
            text="Ein Pfad",
            usage={"input_tokens": 5, "output_tokens": 7, "total_tokens": 12},
        ),
    ],
}


@pytest.mark.parametrize("name", STREAMS)
def test_events_of_audio_pass_byte_for_byte(app: AppUnderTest, fake: FakeUpstream, name: str) -> None:
    fake.script(RawStream(STREAMS[name]))
    found = ask(app, name, stream=True) if name == "transcriptions" else ask(app, name, stream_format="sse")
    assert (found.status, found.body) == (200, b"".join(STREAMS[name]))
    assert found.headers["content-type"] == "text/event-stream"
    (attempt,) = [span for span in trace_of(app, found.request_id) if span.name.endswith(" demo")]
    counted = attributes(attempt)
    assert (counted["gen_ai.usage.input_tokens"], counted["gen_ai.usage.output_tokens"]) == (5, 7)


@pytest.mark.parametrize("name", STREAMS)
def test_events_of_audio_that_break_off_end_with_an_error_event(
    app: AppUnderTest, fake: FakeUpstream, name: str
) -> None:
    fake.script(RawStream(STREAMS[name][:1], then="cut"))
    found = ask(app, name)
    assert found.body.startswith(STREAMS[name][0] + b"event: error\n")
    said = json.loads(found.body.rpartition(b"data: ")[2])
    assert (said["type"], said["error"]["type"]) == ("error", "UpstreamError")
    assert failed(app, found.request_id)["error"] == "UpstreamError"


def test_openais_form_of_a_request_is_documented(app: AppUnderTest) -> None:
    documented = app.call("GET", "/openapi.json").json["paths"]
    transcription = documented["/v1/audio/transcriptions"]["post"]
    assert list(transcription["requestBody"]["content"]) == [FORM.partition(";")[0]]
    speech = documented["/v1/audio/speech"]["post"]["responses"]["200"]["content"]
    assert speech["audio/*"]["schema"]["format"] == "binary"
