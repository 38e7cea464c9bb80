"""Bytes on a connection, against the real process: one answer a request, and no memory without bound.

Framing is RFC 9112: a message that is not understood ends its connection, and what follows is never a
request.
"""

import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.upstream import FakeUpstream, Silent
from tests.faults.attack.wire import AMBIGUOUS_FRAMING, BROKEN_CHUNKS, PROMPT, UPGRADES, chunked, head
from tests.harness import ServiceProcess

pytestmark = pytest.mark.e2e

STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) ")
MIB = 2**20


@dataclass
class Service:
    """The process, and who can sign in to it."""

    process: ServiceProcess
    user: str
    admin: str

    @property
    def resident_bytes(self) -> int:
        """The process's resident memory."""
        assert self.process.process is not None
        status = Path(f"/proc/{self.process.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1_024

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """A connection; nothing is sent on it."""
        with socket.create_connection(("127.0.0.1", self.process.port), timeout=10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection

    def answers(self, *packets: bytes) -> list[int]:
        """Send the packets apart from each other, then nothing; the statuses that come until the end."""
        with self.connection() as connection:
            for packet in packets:
                try:
                    connection.sendall(packet)
                except OSError:
                    break
                # The next packet is a read of its own.
                time.sleep(0.05)
            with_end = b""
            try:
                connection.settimeout(3)
                while data := connection.recv(65_536):
                    with_end += data
            except OSError:
                pass
        return [int(status) for status in STATUS_LINE.findall(with_end)]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with FakeUpstream() as upstream, ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        yield Service(process, process.token(), process.token("admin"))
        stacks = [line for line in process.lines() if "exception.stacktrace" in line]
        assert not stacks


@pytest.mark.parametrize("protocol", UPGRADES)
@pytest.mark.parametrize("packets", ["one", "two", "chunked", "chunked in two"])
def test_an_offer_to_upgrade_is_ignored_on_every_request_of_a_connection(
    service: Service, protocol: str, packets: str
) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAMAAABkAAQ")
    framing = "Transfer-Encoding: chunked" if "chunked" in packets else f"Content-Length: {len(PROMPT)}"
    body = chunked(PROMPT) if "chunked" in packets else PROMPT
    request = head("POST", "/llm/generate", service.user, (*offer, framing))
    sent = (request, body) if "two" in packets else (request + body,)
    assert service.answers(*sent, *sent, head("GET", "/auth/me", service.user, close=True)) == [200, 200, 200]


@pytest.mark.parametrize("protocol", UPGRADES)
def test_a_body_behind_an_offer_to_upgrade_is_never_a_request(service: Service, protocol: str) -> None:
    smuggled = head("DELETE", "/llm/cache", service.admin)
    offer = ("Connection: Upgrade", f"Upgrade: {protocol}", f"Content-Length: {len(smuggled)}")
    first = head("POST", "/llm/generate", service.user, offer)
    assert service.answers(first, smuggled, head("GET", "/auth/me", service.user, close=True)) == [422, 200]


def test_an_empty_line_before_a_request_may_come_in_pieces(service: Service) -> None:
    request = head("GET", "/auth/me", service.user, close=True)
    assert service.answers(b"\r", b"\n", request) == service.answers(b"\r\n" + request) == [200]


@pytest.mark.parametrize(
    "behind",
    [
        b"GET /auth/me\r\nHost: x\r\n\r\n",
        b"GET /auth/me HTTP/0.9\r\nHost: x\r\n\r\n",
        b"GET /auth/me HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET /auth/me HTTP/1.1\r\n\r\n",
        b"GET /auth/me HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 1e1\r\n\r\n",
    ],
)
def test_a_malformed_request_behind_another_is_a_trace_of_its_own(service: Service, behind: bytes) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    first = head("GET", "/auth/me", service.user, (f"traceparent: 00-{trace_id}-00f067aa0ba902b7-01",))
    with service.connection() as connection:
        connection.sendall(first + behind)
        data = b""
        while piece := connection.recv(65_536):
            data += piece
    assert [int(status) for status in STATUS_LINE.findall(data)] == [200, 400]
    ids = re.findall(rb"(?i)x-request-id: ([0-9a-f]{32})", data)
    assert ids[0].decode() == trace_id
    assert ids[1] != ids[0]


def test_http_1_0_needs_no_host(service: Service) -> None:
    assert service.answers(b"GET /health HTTP/1.0\r\n\r\n") == [200]


def test_pipelined_requests_get_their_answers_in_order(service: Service) -> None:
    post = head("POST", "/llm/generate", service.user, (f"Content-Length: {len(PROMPT)}",)) + PROMPT
    get = head("GET", "/nothing", service.user)
    last = head("GET", "/auth/me", service.user, close=True)
    assert service.answers(post + get + post + last) == [200, 404, 200, 200]


def test_trailers_without_end_are_refused_and_cost_no_memory(service: Service) -> None:
    before = service.resident_bytes
    sent = 0
    with service.connection() as connection:
        connection.sendall(head("POST", "/auth/login", fields=("Transfer-Encoding: chunked",)) + b"0\r\n")
        try:
            while sent < 64 * MIB:
                sent += connection.send(b"X: b\r\n" * 1_000)
        except OSError:
            pass
    assert sent < 16 * MIB
    assert service.resident_bytes - before < 16 * MIB


@pytest.mark.parametrize("size", [8_000, 8_400])
def test_trailers_are_taken_up_to_eight_kilobytes(service: Service, size: int) -> None:
    request = head("POST", "/llm/generate", service.user, ("Transfer-Encoding: chunked", "Connection: close"))
    trailers = b"X-Trailer: " + b"a" * (size - 13) + b"\r\n"
    sent = request + b"%x\r\n%b\r\n0\r\n" % (len(PROMPT), PROMPT) + trailers + b"\r\n"
    assert service.answers(sent) == ([200] if size <= 8_192 else [400])


def test_a_trailer_is_no_header_field(service: Service) -> None:
    request = head("POST", "/llm/generate", fields=("Transfer-Encoding: chunked", "Connection: close"))
    trailer = f"Authorization: Bearer {service.user}\r\n\r\n".encode()
    assert service.answers(request + b"%x\r\n%b\r\n0\r\n" % (len(PROMPT), PROMPT) + trailer) == [401]


@pytest.mark.parametrize(
    "fields",
    [
        ("X-Long: " + "a" * 100_000,),
        tuple(f"X-{number}: a" for number in range(10_000)),
        tuple(f"X-{number}: a" for number in range(101)),
        ("X-Folded: a\r\n b",),
    ],
)
def test_a_head_beyond_its_limits_is_refused_in_one_read_and_in_many(
    service: Service, fields: tuple[str, ...]
) -> None:
    request = head("GET", "/auth/me", service.user, fields)
    assert service.answers(request) == [400]
    half = len(request) // 2
    assert service.answers(request[:half], request[half:]) == [400]


@pytest.mark.parametrize("framing", AMBIGUOUS_FRAMING)
def test_framing_that_could_be_read_in_two_ways_ends_the_connection(
    service: Service, framing: tuple[str, ...]
) -> None:
    request = head("POST", "/llm/generate", service.user, framing) + PROMPT
    following = head("GET", "/auth/me", service.user)
    assert service.answers(request + following) == [400]
    assert service.answers(request, following) == [400]


@pytest.mark.parametrize("body", BROKEN_CHUNKS)
def test_broken_chunks_end_the_connection(service: Service, body: bytes) -> None:
    request = head("POST", "/llm/generate", service.user, ("Transfer-Encoding: chunked",))
    following = head("GET", "/auth/me", service.user)
    assert len(PROMPT) == 15
    assert service.answers(request + body + following) == [400]
    assert service.answers(request, body, following) == [400]


def test_a_request_cut_at_every_byte_is_the_same_request(service: Service) -> None:
    request = head("POST", "/llm/generate", service.user, ("Transfer-Encoding: chunked",)) + chunked(PROMPT)
    last = head("GET", "/auth/me", service.user, close=True)
    with service.connection() as connection:
        for cut in range(1, len(request), 7):
            connection.sendall(request[:cut])
            time.sleep(0.002)
            connection.sendall(request[cut:])
            assert b"HTTP/1.1 200" in read_answer(connection)
        connection.sendall(last)
        assert b"HTTP/1.1 200" in read_answer(connection)


def read_answer(connection: socket.socket) -> bytes:
    """One answer with a Content-Length, whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65_536)
        assert piece, data
        data += piece
    length = re.search(rb"(?i)content-length: (\d+)", data)
    assert length is not None
    end = data.index(b"\r\n\r\n") + 4 + int(length[1])
    while len(data) < end:
        data += connection.recv(65_536)
    return data


def test_what_comes_while_an_answer_is_under_way_is_bounded() -> None:
    """A second head without end: the service stops reading, and sending blocks."""
    with FakeUpstream() as stalled, ServiceProcess({"LITELLM_URL": stalled.url}) as process:
        stalled.default = Silent()
        process.wait_ready()
        second = Service(process, process.token(), "")
        before = second.resident_bytes
        with second.connection() as connection:
            post = head("POST", "/llm/generate", second.user, (f"Content-Length: {len(PROMPT)}",)) + PROMPT
            connection.sendall(post + b"GET /auth/me HTTP/1.1\r\n")
            connection.settimeout(1)
            sent = 0
            try:
                while sent < 128 * MIB:
                    sent += connection.send(b"X: " + b"a" * 65_536)
            except OSError:
                pass
            assert sent < 64 * MIB
            assert second.resident_bytes - before < 16 * MIB


def test_a_reset_behind_many_pipelined_requests_is_no_error(service: Service) -> None:
    with service.connection() as connection:
        connection.sendall(head("GET", "/docs-assets/swagger-ui-bundle.js") * 40)
        time.sleep(0.2)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.5)
    lines = [line for line in service.process.lines() if line["level"] in {"WARNING", "ERROR", "CRITICAL"}]
    assert [line for line in lines if line["level"] != "WARNING"] == []
