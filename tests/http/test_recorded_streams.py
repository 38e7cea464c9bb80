"""Recorded streams of Responses and Messages reach the caller byte for byte, and clients read them."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes.operations import SAMPLES
from tests.fakes.recordings import Recording, recordings
from tests.fakes.streams import RawStream
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest
from tests.http.support import attributes, module_app, server_span, trace_of

RESPONSES, MESSAGES = recordings("responses"), recordings("messages")
ALL = [*RESPONSES, *MESSAGES]
ENDS = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})
BOM = b"\xef\xbb\xbf"
LINE = re.compile(rb"[^\r\n]+(?:\r\n|\n|\r)")
BLOCK = re.compile(rb"(?:[^\r\n]+(?:\r\n|\n|\r))+(?:\r\n|\n|\r)")
CHUNKS = "gen_ai.client.operation.time_per_output_chunk"
SCRIPT = Path(__file__).parents[1] / "e2e/clients/recorded_messages.py"
INT64 = 2**63
MAX_NAME_CHARS = 256
"""What is kept of a name at least; LiteLLM's ids of responses are longer."""

DIFFERENT = {
    "comments": "comments show that the upstream is alive, and the service sends its own",
    "byte-order-mark": "it is of the HTTP body, and not of an event",
    "many-empty-lines": "one of them ends an event",
    "done-at-the-end": "an event has ended the stream",
    "ping-first": "the head is sent with the first event of the answer",
    "no-final-empty-line": "without it, the last event would not reach the caller's program",
    "no-final-line-end-but-one": "without it, the last event would not reach the caller's program",
}
"""Where the caller's bytes are others than the upstream's, and why."""

DONE_OF_LITELLM = b"data: [DONE]\n\n"
"""LiteLLM writes it behind the last event of a response; it is none of the protocol."""

ONE_BYTE_AT_A_TIME = frozenset({"crlf", "cr", "byte-order-mark", "text", "cut-within-a-character"})


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=fake.url, stream_keep_alive_s=15.0) as served:
        yield served


@pytest.fixture(scope="module")
def token(app: AppUnderTest) -> str:
    return app.token()


@pytest.fixture(scope="module")
def client(app: AppUnderTest, token: str) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{app.port}/v1"
    with openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client:
        yield client


def in_pieces(recording: Recording) -> RawStream:
    """The recording, cut at odd places; the connection breaks where the recording is cut off."""
    content = recording.content
    size = 1 if recording.name in ONE_BYTE_AT_A_TIME else 7 + len(content) // 150
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    return RawStream(pieces, "cut" if recording.end == "cut" else "end")


def ask(app: AppUnderTest, token: str, protocol: str) -> Answer:
    sample = SAMPLES[protocol]
    return app.call("POST", f"/v1{sample.path}", body={**sample.request, "stream": True}, token=token)


def data_of(block: bytes) -> bytes:
    lines = [line.strip() for line in LINE.findall(block)]
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))


def parsed(block: bytes) -> dict[str, Any] | None:
    """The data of an event; None where it is none of the protocol."""
    try:
        found = json.loads(data_of(block))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def passed_on(recording: Recording) -> list[bytes]:
    """The events that must reach the caller: all up to the one that ends the answer, or says why it fails."""
    found: list[bytes] = []
    content = recording.content.removeprefix(BOM)
    if recording.name.startswith("no-final"):
        content = content.rstrip(b"\n") + b"\n\n"
    for block in BLOCK.findall(content):
        event = parsed(block)
        if (data_of(block) and event is None) or (event or {}).get("type") == "error":
            break
        if event is None or (not found and event["type"] == "ping"):
            continue
        found.append(block)
        if event["type"] in ENDS:
            break
    return found


@pytest.mark.parametrize("recording", ALL, ids=str)
def test_a_recorded_stream_reaches_the_caller_in_the_upstreams_bytes(
    app: AppUnderTest, token: str, fake: FakeUpstream, recording: Recording
) -> None:
    chunks_before = app.value(CHUNKS)
    fake.script(in_pieces(recording))
    answer = ask(app, token, recording.protocol)
    events = passed_on(recording)
    content = b"".join(events)
    assert answer.status == 200
    assert answer.body.startswith(content)
    if recording.end == "complete" and recording.name not in DIFFERENT:
        assert content == recording.content.removesuffix(DONE_OF_LITELLM)
    elif recording.name not in DIFFERENT:
        assert recording.content.startswith(content)

    rest = answer.body.removeprefix(content)
    error = {"complete": "", "cut": "UpstreamError"}.get(recording.end, recording.error)
    told = events and (parsed(events[-1]) or {})["type"] == "response.failed"
    if error and not told:
        check_error_event(recording, answer, rest, error, len(events))
    else:
        assert rest == b""
    check_telemetry(app, recording, answer, error, [parsed(block) or {} for block in events])
    answer_events = sum((parsed(block) or {})["type"] != "ping" for block in events)
    assert app.value(CHUNKS) - chunks_before == max(0, answer_events - 1)


def check_error_event(recording: Recording, answer: Answer, event: bytes, error: str, number: int) -> None:
    """One event of this service ends a stream that failed, in the protocol's form."""
    name, _, content = event.partition(b"\ndata: ")
    said = json.loads(content)
    assert (name, said["type"]) == (b"event: error", "error")
    inner = said["error"]
    assert inner["request_id"] == answer.request_id
    if recording.protocol == "messages":
        assert (inner["name"], said["request_id"]) == (error, answer.request_id)
    else:
        assert (inner["type"], said["sequence_number"]) == (error, number)
        assert isinstance(said["code"], str)
        assert said["message"] == inner["message"]


def check_telemetry(
    app: AppUnderTest, recording: Recording, answer: Answer, error: str, events: list[dict[str, Any]]
) -> None:
    """The attempt's span has what the stream says of itself."""
    (chat,) = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
    server = server_span(app, answer.request_id)
    for span in (chat, server):
        assert attributes(span).get("error.type", "") == error
    found = dict(attributes(chat))
    usage, reason, identity = facts_of(recording, events)
    assert found.get("gen_ai.response.id") in {identity, identity[:MAX_NAME_CHARS]}
    if reason:
        assert found["gen_ai.response.finish_reasons"] == (reason,)
    if usage is not None:
        assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == usage
    (line,) = [
        one
        for one in app.lines(answer.request_id)
        if one["message"] in {"llm_request_completed", "llm_request_failed"}
    ]
    assert line.get("error", "") == error


def facts_of(
    recording: Recording, events: list[dict[str, Any]]
) -> tuple[tuple[int, int] | None, str | None, str]:
    """The counts, where they can be true, the finish reason, and the id that a stream says."""
    if recording.protocol == "responses":
        last: dict[str, Any] = events[-1].get("response") or {}
        counts = last.get("usage") or {}
        pair = counts.get("input_tokens"), counts.get("output_tokens")
        reason = None
        if events[-1]["type"] in ENDS:
            reason = (last.get("incomplete_details") or {}).get("reason") or last["status"]
        first = next(event["response"] for event in events if "response" in event)
        return _believed(pair), reason, first["id"]
    counts, reason = dict(events[0]["message"]["usage"]), None
    for event in events:
        if event["type"] == "message_delta":
            counts.update(event["usage"])
            reason = event["delta"]["stop_reason"]
    cached = sum(counts.get(f"cache_{what}_input_tokens") or 0 for what in ("read", "creation"))
    pair = counts["input_tokens"] + cached, counts["output_tokens"]
    return _believed(pair), reason, events[0]["message"]["id"]


def _believed(pair: tuple[Any, Any]) -> tuple[int, int] | None:
    return pair if all(isinstance(number, int) and number < INT64 for number in pair) else None


@pytest.mark.parametrize("recording", RESPONSES, ids=str)
def test_openais_library_reads_a_recorded_response(
    client: openai.OpenAI, fake: FakeUpstream, recording: Recording
) -> None:
    fake.script(in_pieces(recording))
    wanted = [parsed(block) or {} for block in passed_on(recording)]
    seen: list[Any] = []
    raised: openai.APIError | None = None
    try:
        with client.responses.create(model="demo", input="x", stream=True) as events:
            seen.extend(events)
    except openai.APIError as error:
        raised = error
    assert [event.type for event in seen] == [event["type"] for event in wanted]
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert text == "".join(
        event["delta"] for event in wanted if event["type"] == "response.output_text.delta"
    )
    if wanted[-1]["type"] in ENDS:
        assert raised is None
        assert seen[-1].response.status == wanted[-1]["response"]["status"]
    else:
        assert isinstance(raised, openai.APIError)
        assert isinstance(raised.body, dict)
        assert raised.body["type"] == (recording.error or "UpstreamError")


def test_anthropics_library_reads_the_recorded_messages(
    app: AppUnderTest, token: str, fake: FakeUpstream
) -> None:
    python = os.environ.get("CLIENTS_PYTHON")
    assert python, "CLIENTS_PYTHON must name a Python with the clients' libraries; `make test` sets it"
    fake.script(*map(in_pieces, MESSAGES))
    url = f"http://127.0.0.1:{app.port}"
    done = subprocess.run(
        [python, str(SCRIPT), url, token, str(len(MESSAGES))],
        env={"PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines()]
    for recording, found in zip(MESSAGES, read, strict=True):
        # The library passes over events without a name, and keeps pings and those that it does not know.
        named = [block for block in passed_on(recording) if b"event:" in block]
        wanted = [parsed(block) or {} for block in named]
        assert [kind for kind in found["types"] if kind in READ] == [
            event["type"] for event in wanted if event["type"] in READ
        ], recording
        deltas = [event["delta"] for event in wanted if event["type"] == "content_block_delta"]
        assert found["text"] == "".join(one["text"] for one in deltas if one["type"] == "text_delta")
        if recording.end == "complete":
            assert found["error"] is None, (recording, found)
        else:
            said = ERRORS[recording.error or "UpstreamError"]
            assert (found["error"], found["body"]["error"]["type"]) == said, (recording, found)
            assert found["body"]["error"]["name"] == (recording.error or "UpstreamError")


READ = frozenset(
    {
        *("message_start", "message_delta", "message_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop"),
    }
)
ERRORS = {
    "UpstreamError": ("APIStatusError", "api_error"),
    "RateLimitError": ("APIStatusError", "rate_limit_error"),
    "BadRequestError": ("APIStatusError", "invalid_request_error"),
}
"""What the library raises for a stream that failed, whose status was 200, and the type that it finds."""


def test_there_are_enough_of_each() -> None:
    for protocol in (RESPONSES, MESSAGES):
        assert len(protocol) >= 30
        assert {one.source for one in protocol} == {"litellm", "written"}
        assert {one.end for one in protocol} == {"complete", "cut", "failed"}
