"""Forms with files go on to the upstream as they arrive, and what must not get there does not."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ValidationError
from service.routers.forms import MAX_FIELD_BYTES, MAX_PARTS, FormReader
from tests.fakes.http_server import EndingHttpServer
from tests.fakes.operations import BOUNDARY, FORM, form, part
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import attributes, eventually, module_app, server_span, trace_of, value_of

PATH = "/v1/audio/transcriptions"
HELD, LIMIT = 200_000, 3_000_000
END = f"--{BOUNDARY}--\r\n".encode()
LARGE = b"RIFF" + bytes(range(256)) * 8_000
AGAIN = b"\r\nContent-Disposition: form-data; name=y\r\n\r\n"
MODEL = part("model", "demo")
FILE = part("file", LARGE)
SETTINGS: dict[str, Any] = {
    "max_v1_body_bytes": HELD,
    "max_upload_bytes": LIMIT,
    "llm_timeout_s": 1.0,
    "request_body_timeout_s": 3.0,
    "retry_max": 2,
    "retry_base_delay_s": 0.01,
    "retry_budget_floor": 10_000,
    "breaker_failure_threshold": 1_000,
}


@dataclass
class Provider:
    """A provider that notes the bytes of forms as they arrive."""

    status: int = 200
    stalls_at: int | None = None
    answers_at: int | None = None
    answers_slowly: bool = False
    breaks_at: int | None = None
    received: list[bytearray] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    def forget(self) -> None:
        """Be as new."""
        self.status, self.stalls_at, self.answers_at, self.breaks_at = 200, None, None, None
        self.answers_slowly = False
        self.received, self.complete = [], []
        self.go_on = threading.Event()

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        """Read a form, and answer."""
        seen = bytearray()
        self.received.append(seen)
        self.complete.append(False)
        answered = False
        for data in pieces_of(handler):
            seen += data
            if self.stalls_at is not None and len(seen) >= self.stalls_at:
                self.go_on.wait(20)
            if self.breaks_at is not None and len(seen) >= self.breaks_at:
                handler.close_connection = True
                return
            if self.answers_at is not None and len(seen) >= self.answers_at:
                if self.answers_slowly:
                    self.begin_answer(handler)
                    return
                # As a server that lingers: the rest is read, and thrown away.
                answer(handler, self.status)
                handler.close_connection = True
                self.answers_at = None
                answered = True
        self.complete[-1] = seen.endswith(END)
        if self.complete[-1] and not answered:
            answer(handler, self.status)

    def begin_answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer with the beginning of a text, and go on with it when the test is over."""
        handler.send_response(200)
        handler.send_header("Content-Type", "text/plain")
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"A path")
        handler.wfile.flush()
        self.go_on.wait(20)
        handler.close_connection = True


def pieces_of(handler: BaseHTTPRequestHandler) -> Iterator[bytes]:
    """A request's body, as it arrives."""
    if handler.headers.get("Transfer-Encoding") == "chunked":
        while size := int(handler.rfile.readline() or b"0", 16):
            yield handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return
    left = int(handler.headers["Content-Length"])
    while left and (data := handler.rfile.read1(min(left, 65_536))):
        left -= len(data)
        yield data


def answer(handler: BaseHTTPRequestHandler, status: int) -> None:
    """Answer with a text, or with an error."""
    body = json.dumps({"text": "A path."} if status == 200 else {"error": {"message": "no"}}).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    given = Provider()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps({"data": [{"id": "demo"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            given.take(self)

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    server = EndingHttpServer(0, Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    given.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield given
    server.shutdown()
    thread.join()
    given.go_on.set()
    server.drop_connections()
    server.server_close()


@pytest.fixture(scope="module")
def app(provider: Provider) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=provider.url, **SETTINGS) as served:  # type: ignore[attr-defined]
        yield served


@pytest.fixture(autouse=True)
def _as_new(provider: Provider) -> Iterator[None]:
    yield
    provider.go_on.set()
    provider.forget()


class Sender:
    """A caller who sends a form piece by piece."""

    def __init__(self, app: AppUnderTest, *, size: int | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", app.port), timeout=20)
        self._chunked = size is None
        length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
        self.socket.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {app.token()}\r\n"
            f"Content-Type: {FORM}\r\n{length}\r\n\r\n".encode()
        )

    def send(self, data: bytes) -> None:
        """Send a piece of the form."""
        self.socket.sendall(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """End a form in chunks."""
        self.socket.sendall(b"0\r\n\r\n")

    def answer(self) -> Answer:
        """Read the answer."""
        with self.socket:
            whole = b""
            while data := self.socket.recv(65_536):
                whole += data
                head, end, body = whole.partition(b"\r\n\r\n")
                if end and (body.endswith(b"0\r\n\r\n") or _is_whole(head, body)):
                    break
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        if headers.get("transfer-encoding") == "chunked":
            body = body.partition(b"\r\n")[2].rpartition(b"\r\n0\r\n")[0]
        return Answer(int(lines[0].split()[1]), headers, body, 0.0)


def _is_whole(head: bytes, body: bytes) -> bool:
    length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
    return length.isdigit() and len(body) >= int(length)


def send(app: AppUnderTest, content: bytes, content_type: str = FORM, **options: Any) -> Answer:
    """Send a form at once."""
    headers = {"Content-Type": content_type, **options.pop("headers", {})}
    return app.call("POST", PATH, body=content, token=app.token(), headers=headers, **options)


def error_of(answer: Answer) -> tuple[int, str]:
    """The status and the name of an error."""
    return answer.status, answer.json["error"]["type"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_goes_on_while_it_arrives(app: AppUnderTest, provider: Provider, *, chunked: bool) -> None:
    whole = MODEL + FILE + END
    assert len(whole) > HELD
    sender = Sender(app, size=None if chunked else len(whole))
    sender.send(whole[:300_000])
    eventually(
        lambda: provider.received and len(provider.received[0]) == 300_000, "the first bytes to arrive"
    )
    sender.send(whole[300_000:])
    if chunked:
        sender.end()
    found = sender.answer()
    assert (found.status, found.json) == (200, {"text": "A path."})
    assert (bytes(provider.received[0]), provider.complete) == (whole, [True])
    (attempt,) = [span for span in trace_of(app, found.request_id) if span.name == "transcription demo"]
    assert attributes(attempt)["gen_ai.request.model"] == "demo"


def test_a_form_whose_model_comes_last_is_held_up_to_a_limit(app: AppUnderTest, provider: Provider) -> None:
    small = part("file", LARGE[: HELD // 2]) + MODEL + END
    assert send(app, small).status == 200
    assert bytes(provider.received[0]) == small
    found = send(app, FILE + MODEL + END)
    assert error_of(found) == (413, "PayloadTooLargeError")
    assert "before the field model" in found.json["error"]["message"]
    assert len(provider.received) == 1


def test_a_form_over_the_limit_is_refused_at_once_where_it_is_declared(
    app: AppUnderTest, provider: Provider
) -> None:
    sender = Sender(app, size=LIMIT + 1)
    found = sender.answer()
    assert error_of(found) == (413, "PayloadTooLargeError")
    assert "MAX_UPLOAD_BYTES" in found.json["error"]["message"]
    assert provider.received == []


def test_a_form_over_the_limit_is_refused_as_it_arrives(app: AppUnderTest, provider: Provider) -> None:
    sender = Sender(app)
    sender.send(MODEL + part("file", b"x" * (LIMIT - 1_000)))
    sender.send(b"x" * 2_000)
    found = sender.answer()
    assert error_of(found) == (413, "PayloadTooLargeError")
    assert found.headers["connection"] == "close"
    eventually(lambda: provider.received, "the request to arrive upstream")
    assert provider.complete == [False]
    assert value_of(app, "llmops.requests.rejected", {"reason": "too_large"}) >= 1


@pytest.mark.parametrize(
    "late",
    [
        pytest.param(part("api_base", "http://127.0.0.1:1"), id="LiteLLM's own field"),
        pytest.param(part("metadata[tags]", "x"), id="one in brackets"),
        pytest.param(part("model", "other"), id="a second model"),
        pytest.param(part("file", b"x"), id="a second file"),
        pytest.param(part("other", b"x"), id="a file that none is"),
        pytest.param(part("x", "y").replace(b"form-data", b"attachment"), id="another disposition"),
        pytest.param(part("x", "y").replace(b'name="x"', b"name*=UTF-8''api_base"), id="an encoded name"),
        pytest.param(part("a b", "y"), id="a name with a space"),
        pytest.param(part("x", "y").replace(b"\r\n\r\n", AGAIN), id="two dispositions"),
        pytest.param(b"--" + BOUNDARY.encode() + b"\r\n\r\nx\r\n", id="no disposition"),
        pytest.param(b"--" + BOUNDARY.encode() + b"\r\nX" * 20_000, id="endless header fields"),
        pytest.param(part("x", "y" * (MAX_FIELD_BYTES + 1)), id="too much text"),
        pytest.param(part("x", "y") * MAX_PARTS, id="too many parts"),
        pytest.param(f"--{BOUNDARY}?\r\n".encode() * 1_000, id="what is no boundary"),
    ],
)  # fmt: skip
def test_what_must_not_go_on_ends_the_form_before_it_is_complete(
    app: AppUnderTest, provider: Provider, late: bytes
) -> None:
    found = send(app, MODEL + FILE + late + END)
    assert error_of(found) == (422, "ValidationError")
    assert not any(provider.complete)
    eventually(
        lambda: [one for one in app.lines(found.request_id) if one["message"] == "llm_request_failed"],
        "the call to be reported",
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(MODEL + END, id="no file"),
        pytest.param(MODEL + part("file", "text") + END, id="a file that is a text"),
        pytest.param(part("file", b"x") + END, id="no model"),
        pytest.param(part("model", "a,b") + part("file", b"x") + END, id="two models"),
        pytest.param(part("model", b"demo") + part("file", b"x") + END, id="a model that is a file"),
        pytest.param(part("model[]", "demo") + part("file", b"x") + END, id="a list of models"),
        pytest.param(MODEL + part("file", b"x"), id="no end"),
        pytest.param(b"{}", id="JSON"),
        pytest.param(MODEL.replace(b"demo", b"\xff") + part("file", b"x") + END, id="no UTF-8"),
    ],
)
def test_what_is_no_form_is_refused(app: AppUnderTest, provider: Provider, content: bytes) -> None:
    found = send(app, content)
    assert error_of(found) == (422, "ValidationError")
    assert not any(provider.complete)
    assert not [line for line in app.lines(found.request_id) if line["logger"].startswith("python_multipart")]


@pytest.mark.parametrize(
    ("content_type", "headers"),
    [
        ("application/json", {}),
        ("multipart/form-data", {}),
        ("multipart/mixed; boundary=x", {}),
        ("multipart/form-data; boundary=", {}),
        (f"{FORM}; charset=utf-7", {}),
        (f"multipart/form-data; boundary={'x' * 300}", {}),
        (FORM, {"Content-Encoding": "gzip"}),
    ],
)
def test_what_is_not_announced_as_a_form_is_not_read(
    app: AppUnderTest, content_type: str, headers: dict[str, str]
) -> None:
    found = send(app, MODEL + part("file", b"x") + END, content_type, headers=headers)
    assert error_of(found) == (415, "UnsupportedMediaTypeError")
    assert "multipart/form-data" in found.json["error"]["message"]


def test_the_callers_time_is_not_the_upstreams(app: AppUnderTest, provider: Provider) -> None:
    # The pause is longer than the whole deadline of the call.
    sender = Sender(app)
    sender.send(MODEL + FILE[:300_000])
    time.sleep(SETTINGS["llm_timeout_s"] * 1.5)
    sender.send(FILE[300_000:] + END)
    sender.end()
    found = sender.answer()
    assert (found.status, found.headers["x-llm-attempts"]) == (200, "1")
    assert provider.complete == [True]


def test_a_caller_who_stops_sending_is_told(app: AppUnderTest, provider: Provider) -> None:
    sender = Sender(app)
    sender.send(MODEL + FILE[:300_000])
    found = sender.answer()
    assert error_of(found) == (408, "RequestTimeoutError")
    assert provider.complete == [False]
    assert attributes(server_span(app, found.request_id))["error.type"] == "RequestTimeoutError"


def test_an_upstream_that_takes_nothing_more_is_at_fault(app: AppUnderTest, provider: Provider) -> None:
    provider.stalls_at = 1
    # More than the buffers of the connections between them hold.
    found = send(app, MODEL + part("file", b"x" * (LIMIT - 10_000)) + END)
    assert error_of(found) == (504, "UpstreamTimeoutError")
    assert found.headers["x-llm-attempts"] == "1"


def test_the_upstreams_time_is_not_the_callers(provider: Provider) -> None:
    provider.stalls_at = 1
    limits = {
        **SETTINGS,
        "llm_timeout_s": 20.0,
        "request_body_timeout_s": 0.5,
        "max_upload_bytes": 20_000_000,
    }
    with running_app(litellm_url=provider.url, **limits) as served:  # type: ignore[attr-defined]
        # The pause is longer than the time limit of the body, and there is more than the buffers hold.
        resuming = threading.Timer(1.0, provider.go_on.set)
        resuming.start()
        found = send(served, MODEL + part("file", b"x" * 15_000_000) + END)
        resuming.join()
    assert (found.status, provider.complete) == (200, [True])


@pytest.mark.parametrize(
    ("change", "status", "name"),
    [
        ({"breaks_at": 300_000}, 502, "UpstreamError"),
        ({"answers_at": 300_000, "status": 400}, 400, "BadRequestError"),
        ({"status": 500}, 502, "UpstreamError"),
    ],
    ids=["breaks off", "refuses in the middle", "fails at the end"],
)
def test_a_form_that_went_on_is_not_sent_again(
    app: AppUnderTest, provider: Provider, change: dict[str, Any], status: int, name: str
) -> None:
    vars(provider).update(change)
    found = send(app, MODEL + FILE + END)
    assert error_of(found) == (status, name)
    assert (len(provider.received), found.headers["x-llm-attempts"]) == (1, "1")
    # Only the caller has the file, and may send it again where that can help.
    assert ("x-should-retry" in found.headers) is (status == 400)


def test_a_form_that_is_refused_while_it_is_answered_fails_the_call(
    app: AppUnderTest, provider: Provider
) -> None:
    def failures() -> int:
        lines = (one for one in app.lines() if one["message"] == "llm_request_failed")
        return sum(one["error"] == "ValidationError" for one in lines)

    before = failures()
    provider.answers_at, provider.answers_slowly = 300_000, True
    sender = Sender(app)
    sender.send(MODEL + FILE[:400_000])
    assert sender.socket.recv(12) == b"HTTP/1.1 200"
    # The upstream is still answering, and the caller sends what must not be sent.
    sender.send(b"\r\n" + part("api_base", "x") + END)
    sender.end()
    eventually(lambda: failures() > before, "the call to fail")
    rest = b""
    while data := sender.socket.recv(65_536):
        rest += data
    sender.socket.close()
    assert not rest.endswith(b"0\r\n\r\n")
    assert provider.complete == [False]


def test_a_small_form_is_sent_again(app: AppUnderTest, provider: Provider) -> None:
    provider.status = 500
    found = send(app, MODEL + part("file", b"x") + END)
    assert error_of(found) == (502, "UpstreamError")
    assert (provider.complete, found.headers["x-llm-attempts"]) == ([True] * 3, "3")


def test_a_caller_who_leaves_stops_the_upload(app: AppUnderTest, provider: Provider) -> None:
    sender = Sender(app)
    sender.send(MODEL + FILE[:300_000])
    eventually(lambda: provider.received and len(provider.received[0]) > 1_000, "the first bytes to arrive")
    sender.socket.close()
    (line,) = eventually(
        lambda: [one for one in app.lines() if one.get("outcome") == "cancelled"], "the call to be reported"
    )
    assert line["message"] == "llm_request_failed"
    eventually(lambda: value_of(app, "llmops.requests.in_flight", {}) == 0, "the place to be given back")
    assert provider.complete == [False]


def test_azures_deployment_is_added_to_a_form_without_a_model(app: AppUnderTest, provider: Provider) -> None:
    path = "/openai/deployments/demo/audio/transcriptions?api-version=2025-01-01"
    content = part("file", b"RIFF") + END
    # What stands before the first boundary would become a part of the name.
    found = app.call(
        "POST", path, body=b"\r\n" + content, headers={"api-key": app.token(), "Content-Type": FORM}
    )
    assert found.status == 200
    assert bytes(provider.received[0]) == MODEL + content


def test_memory_does_not_grow_with_the_file(provider: Provider) -> None:
    """Eight forms at once would exceed the memory for bodies if they were held."""
    limits = {**SETTINGS, "max_body_bytes": 1_000}
    with running_app(litellm_url=provider.url, **limits) as served:  # type: ignore[attr-defined]
        senders = [Sender(served) for _ in range(8)]
        for sender in senders:
            sender.send(MODEL + FILE[:1_000])
        eventually(lambda: len(provider.received) == len(senders), "all of them to go on")
        for sender in senders:
            sender.send(FILE[1_000:] + END)
            sender.end()
        assert [sender.answer().status for sender in senders] == [200] * 8


def test_a_form_needs_a_place_before_it_goes_on(provider: Provider) -> None:
    with running_app(litellm_url=provider.url, **SETTINGS, max_in_flight=2) as served:  # type: ignore[attr-defined]
        first = Sender(served)
        first.send(MODEL + FILE[:300_000])
        eventually(lambda: provider.received, "the first form to go on")
        second = send(served, MODEL + FILE + END)
        assert error_of(second) == (503, "OverloadedError")
        first.send(FILE[300_000:] + END)
        first.end()
        assert first.answer().status == 200


def test_a_connection_serves_another_request_after_a_form(app: AppUnderTest) -> None:
    connection = HTTPConnection("127.0.0.1", app.port, timeout=20)
    headers = {"Content-Type": FORM, "Authorization": f"Bearer {app.token()}"}
    for _ in range(3):
        connection.request("POST", PATH, MODEL + FILE + END, headers)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b'{"text": "A path."}')
    connection.close()


CASES = [
    MODEL + part("file", b"a\r\n--" + BOUNDARY.encode()[:-1] + b"\r\n") + part("prompt", "é") + END,
    MODEL + part("file", b"") + part("api_base", "x") + END,
    part("file", b"x") + MODEL + MODEL + END,
    MODEL + part("file", b"x"),
    MODEL + END,
]


def _read(content: bytes, cuts: list[int]) -> tuple[str, dict[str, str]]:
    reader = FormReader(BOUNDARY.encode(), frozenset(), "file")
    places = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    try:
        for start, end in pairwise(places):
            reader.feed(content[start:end])
        reader.finish()
    except ValidationError as error:
        return error.message, {}
    return "", reader.fields


@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 2_000), max_size=40))
def test_a_form_is_read_the_same_however_it_is_cut(case: bytes, cuts: list[int]) -> None:
    assert _read(case, cuts) == _read(case, [])


def test_a_form_is_read_as_it_is_meant() -> None:
    assert _read(CASES[0], []) == ("", {"model": "demo", "prompt": "é"})
    assert [bool(_read(case, [])[0]) for case in CASES] == [False, True, True, True, True]
    assert form({"model": "demo", "file": b"x"}) == MODEL + part("file", b"x") + END
