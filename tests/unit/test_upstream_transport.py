"""The transport to the upstream: what it sends, what it says went wrong, and what it lets pass."""

import asyncio
import errno
import gc
import json
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from service.errors import Cause
from service.upstream.errors import cause_of
from service.upstream.transport import AnswerTooLargeError, UpstreamTransport
from tests.fakes.streams import RawStream
from tests.fakes.tls import self_signed
from tests.fakes.upstream import (
    Answer,
    Behaviour,
    Endless,
    FakeUpstream,
    Garbage,
    NotJson,
    Reset,
    Silent,
    WrongLength,
    refusing_port,
)
from tests.fakes.wire import Exchange

MAX_BYTES = 10_000
BODY = json.dumps({"model": "demo", "messages": []}).encode()
LIMITS = httpx2.Timeout(0.5, connect=0.25)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
COUNTED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
UNFRAMED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


@dataclass(frozen=True)
class Segments:
    """Bytes that are sent one after the other; then the connection stays, is reset, or nothing more comes."""

    parts: tuple[bytes, ...]
    reset: bool = False
    hangs: bool = False

    async def play(self, exchange: Exchange) -> None:
        """Write them."""
        for part in self.parts:
            await exchange.send(part)
            await asyncio.sleep(0.05)
        if self.hangs:
            await asyncio.Event().wait()
        exchange.complete = True
        if self.reset:
            exchange.reset()


def ask(url: str, *, times: int = 1, limits: httpx2.Timeout = LIMITS, **fields: str) -> list[httpx2.Response]:
    """Post to the upstream, one request after the other, over one transport."""

    async def main() -> list[httpx2.Response]:
        transport = UpstreamTransport(4, MAX_BYTES)
        async with httpx2.AsyncClient(transport=transport, timeout=limits, headers=fields) as client:
            return [await client.post(f"{url}/v1/chat/completions", content=BODY) for _ in range(times)]

    return asyncio.run(main())


SECRET = b"HTTP/1.1 200 OK\r\nsecret prompt and key\r\n\r\n"


@pytest.mark.parametrize(
    ("behaviour", "kind", "cause"),
    [
        (Silent(), httpx2.ReadTimeout, Cause.READ_TIMEOUT),
        (Segments((CHUNKED, b"2\r\n{}\r\n"), hangs=True), httpx2.ReadTimeout, Cause.READ_TIMEOUT),
        (Garbage(), httpx2.RemoteProtocolError, Cause.PROTOCOL),
        (Garbage(SECRET), httpx2.RemoteProtocolError, Cause.PROTOCOL),
        (Garbage(b""), httpx2.RemoteProtocolError, Cause.RESET),
        (Garbage(b"HTTP/1.1 200 OK\r\nX-Secret: secret"), httpx2.RemoteProtocolError, Cause.RESET),
        (Reset(), httpx2.ReadError, Cause.RESET),
        (Reset("headers"), httpx2.ReadError, Cause.RESET),
        (Reset("body"), httpx2.ReadError, Cause.RESET),
        (WrongLength(), httpx2.ReadError, Cause.RESET),
        (NotJson(b"x" * (MAX_BYTES + 1)), AnswerTooLargeError, None),
        (
            Segments((CHUNKED, b"2\r\n{}\r\n", b"secret prompt\r\nno chunk")),
            httpx2.ReadError,
            Cause.PROTOCOL,
        ),
        (Segments((CHUNKED, b"2\r\n{}\r\n"), reset=True), httpx2.ReadError, Cause.RESET),
        (Segments((UNFRAMED, b'{"a":'), reset=True), httpx2.ReadError, Cause.RESET),
    ],
    ids=repr,
)
def test_what_goes_wrong_has_its_class_and_cause_and_quotes_nothing(
    upstream: FakeUpstream,
    caplog: pytest.LogCaptureFixture,
    behaviour: Behaviour,
    kind: type[httpx2.TransportError],
    cause: Cause | None,
) -> None:
    caplog.set_level("DEBUG", logger="service")
    upstream.script(behaviour)
    with pytest.raises(httpx2.TransportError) as caught:
        ask(upstream.url)
    assert type(caught.value) is kind
    assert str(caught.value) in {kind.__name__, f"more than {MAX_BYTES} bytes"}
    assert cause_of(caught.value) is cause
    if cause is not None:
        (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("service")]
        assert line.startswith(f"Exchange with the upstream failed: {cause}: ")
    assert "secret" not in caplog.text


@pytest.mark.parametrize("writes", [1, 2, MAX_BYTES + 1])
def test_what_is_within_the_limit_on_an_answer_arrives_before_its_error(
    upstream: FakeUpstream, writes: int
) -> None:
    content = bytes(index % 251 for index in range(MAX_BYTES + 1))
    size = len(content) // writes
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    upstream.script(RawStream(pieces))
    arrived = bytearray()

    async def main() -> None:
        async with (
            httpx2.AsyncClient(transport=UpstreamTransport(4, MAX_BYTES), timeout=LIMITS) as client,
            client.stream("POST", f"{upstream.url}/v1/chat/completions", content=BODY) as answer,
        ):
            async for data in answer.aiter_raw():
                arrived.extend(data)

    with pytest.raises(AnswerTooLargeError):
        asyncio.run(main())
    assert arrived == content[:MAX_BYTES]


@pytest.mark.parametrize(
    ("host", "cause", "text"),
    [
        ("127.0.0.1", Cause.REFUSED, "Connect call failed"),
        ("localhost", Cause.REFUSED, "Connect call failed"),
        ("no-such-host.invalid", Cause.DNS, "Cannot connect to host no-such-host.invalid"),
        ("x" * 70, Cause.DNS, "label too long"),
    ],
)
def test_a_host_that_cannot_be_reached_is_told_from_a_broken_connection(
    caplog: pytest.LogCaptureFixture, host: str, cause: Cause, text: str
) -> None:
    caplog.set_level("DEBUG", logger="service")
    with refusing_port() as port, pytest.raises(httpx2.ConnectError, match=r"^ConnectError$") as caught:
        # A resolver may take its time.
        ask(f"http://{host}:{port}", limits=httpx2.Timeout(60.0))
    assert cause_of(caught.value) is cause
    (record,) = caplog.records
    assert record.levelname == "DEBUG"
    assert text in record.getMessage()


def _with_tls(listener: socket.socket, folder: Path) -> None:
    connection, _ = listener.accept()
    with connection, suppress(OSError), self_signed(folder).wrap_socket(connection, server_side=True):
        pass


def _without_tls(listener: socket.socket, _folder: Path) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.recv(65_536)


def _resetting(listener: socket.socket, _folder: Path) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("serve", [_with_tls, _without_tls, _resetting])
def test_a_failed_handshake_is_told_from_a_refused_connection(
    tmp_path: Path, serve: Callable[[socket.socket, Path], None]
) -> None:
    async def main(listener: socket.socket) -> None:
        serving = asyncio.create_task(asyncio.to_thread(serve, listener, tmp_path))
        transport = UpstreamTransport(4, MAX_BYTES)
        url = f"https://localhost:{listener.getsockname()[1]}"
        request = httpx2.Request("POST", url, extensions={"timeout": httpx2.Timeout(5.0).as_dict()})
        with pytest.raises(httpx2.ConnectError) as caught:
            await transport.handle_async_request(request)
        assert cause_of(caught.value) is Cause.TLS
        await transport.aclose()
        await serving

    with socket.create_server(("127.0.0.1", 0)) as listener:
        asyncio.run(main(listener))


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ECONNREFUSED, Cause.REFUSED),
        (errno.EHOSTUNREACH, Cause.REFUSED),
        (errno.ENETUNREACH, Cause.REFUSED),
        (errno.ETIMEDOUT, Cause.CONNECT_TIMEOUT),
    ],
)
def test_the_operating_systems_error_decides_why_there_is_no_connection(number: int, cause: Cause) -> None:
    def fail(_address: object) -> socket.socket:
        raise OSError(number, "as the kernel says")

    async def main() -> None:
        transport = UpstreamTransport(4, MAX_BYTES, socket_factory=fail)
        request = httpx2.Request("GET", "http://127.0.0.1:1")
        with pytest.raises(httpx2.ConnectError) as caught:
            await transport.handle_async_request(request)
        assert cause_of(caught.value) is cause
        await transport.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("whole", [False, True], ids=["the connect limit", "the whole call's limit"])
def test_a_connection_that_is_not_accepted_is_a_connect_timeout(*, whole: bool) -> None:
    async def main(port: int) -> Cause | None:
        transport = UpstreamTransport(4, MAX_BYTES)
        limits = httpx2.Timeout(30.0, connect=30.0 if whole else 0.25)
        url = f"http://127.0.0.1:{port}"
        request = httpx2.Request("POST", url, extensions={"timeout": limits.as_dict()})
        try:
            async with asyncio.timeout(0.25 if whole else 30.0):
                await transport.handle_async_request(request)
        except httpx2.ConnectTimeout as error:
            return cause_of(error)
        except TimeoutError as error:
            return cause_of(error.__cause__)
        finally:
            await transport.aclose()
        return None

    # The listener never accepts, and its backlog is full: the next connection hangs.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.settimeout(0)
            one.connect_ex(("127.0.0.1", port))
        try:
            assert asyncio.run(main(port)) is Cause.CONNECT_TIMEOUT
        finally:
            for one in waiting:
                one.close()


def test_what_cannot_be_sent_is_our_own_fault(upstream: FakeUpstream) -> None:
    with pytest.raises(httpx2.LocalProtocolError, match=r"^LocalProtocolError$") as caught:
        ask(upstream.url, Beta="a\r\nInjected: b")
    assert cause_of(caught.value) is Cause.PROTOCOL
    assert not upstream.requests
    # The fake must have accepted and closed the connection before it is stopped.
    upstream.wait_for(lambda fake: fake.connections == 1)
    asyncio.run(none_is_open(upstream))


def test_it_sends_what_it_is_given_and_nothing_else(upstream: FakeUpstream) -> None:
    ask(upstream.url, Authorization="Bearer key")
    (seen,) = upstream.chat_requests
    assert seen.body == BODY
    assert seen.headers["authorization"] == "Bearer key"
    # What httpx2's own client puts there; aiohttp adds nothing to it.
    assert seen.headers["user-agent"].startswith("python-httpx2/")
    assert seen.headers.keys() == {
        *("host", "accept", "accept-encoding", "connection", "user-agent", "content-length", "authorization")
    }


def test_connections_are_used_again_and_cookies_are_not_kept(upstream: FakeUpstream) -> None:
    upstream.default = Answer(headers={"Set-Cookie": "session=1"})

    async def main() -> None:
        transport = UpstreamTransport(4, MAX_BYTES)
        for _ in range(3):
            # By a name: nobody keeps cookies for a bare address.
            response = await transport.handle_async_request(post(upstream, host="localhost"))
            assert await response.aread()
            await response.aclose()
        await transport.aclose()

    asyncio.run(main())
    assert upstream.connections == 1
    assert not any("cookie" in seen.headers for seen in upstream.chat_requests)


def test_a_proxy_of_the_environment_is_not_used(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (answer,) = ask(upstream.url)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "behaviour",
    [
        Segments((CHUNKED + b"2\r\n{}\r\n", b"ZZZ\r\nnot a chunk")),
        Segments((CHUNKED + b"2\r\n{}\r\n",), reset=True),
    ],
    ids=["garbage", "reset"],
)
def test_what_breaks_while_nobody_reads_is_told_to_who_reads_next(
    upstream: FakeUpstream, behaviour: Behaviour
) -> None:
    async def main() -> None:
        transport = UpstreamTransport(4, MAX_BYTES)
        upstream.script(behaviour)
        pieces = (await transport.handle_async_request(post(upstream))).aiter_raw()
        assert await anext(pieces) == b"{}"
        await none_is_open(upstream)
        with pytest.raises(httpx2.TransportError):
            async with asyncio.timeout(5):
                await anext(pieces)
        await transport.aclose()

    asyncio.run(main())


def test_closing_it_ends_an_answer_that_is_being_read(upstream: FakeUpstream) -> None:
    async def main() -> None:
        transport = UpstreamTransport(4, MAX_BYTES)
        upstream.script(Segments((CHUNKED + b"2\r\n{}\r\n",) + (b"",) * 40))
        pieces = (await transport.handle_async_request(post(upstream))).aiter_raw()
        assert await anext(pieces) == b"{}"
        reading = asyncio.create_task(anext(pieces))
        await asyncio.sleep(0)
        await transport.aclose()
        with pytest.raises(httpx2.TransportError):
            async with asyncio.timeout(5):
                await reading

    asyncio.run(main())


def test_an_answer_that_nobody_asked_for_is_nobodys(upstream: FakeUpstream) -> None:
    async def main() -> None:
        transport = UpstreamTransport(4, MAX_BYTES)
        upstream.script(Segments((COUNTED + b"{}", COUNTED + b"[]")))
        first = await transport.handle_async_request(post(upstream))
        assert await first.aread() == b"{}"
        await first.aclose()
        # So that it has come: the fake has written it, and this loop has seen it.
        await asyncio.to_thread(upstream.wait_for, _one_is_complete)
        await asyncio.sleep(0.1)
        upstream.script(Segments((COUNTED + b"{}",)))
        second = await transport.handle_async_request(post(upstream))
        assert await second.aread() == b"{}"
        await second.aclose()
        await transport.aclose()

    asyncio.run(main())
    assert upstream.connections == 2


def test_a_large_body_goes_out_whole_and_with_its_length(upstream: FakeUpstream) -> None:
    async def main() -> None:
        transport = UpstreamTransport(4, MAX_BYTES)
        content = json.dumps({"model": "demo", "messages": ["x" * 3_000_000]}).encode()
        response = await transport.handle_async_request(post(upstream, content))
        await response.aread()
        await transport.aclose()
        (seen,) = upstream.chat_requests
        assert seen.body == content
        assert seen.headers["content-length"] == str(len(content))
        assert "transfer-encoding" not in seen.headers

    asyncio.run(main())


def test_a_connection_that_breaks_while_idle_is_nobodys_error(
    upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        transport = UpstreamTransport(4, MAX_BYTES)
        for _ in range(3):
            upstream.script(Segments((CHUNKED, b"2\r\n{}\r\n0\r\n\r\n"), reset=True))
            response = await transport.handle_async_request(post(upstream))
            assert await response.aread() == b"{}"
            await response.aclose()
            await none_is_open(upstream)
            await asyncio.sleep(0.05)
        await transport.aclose()

    asyncio.run(main())
    gc.collect()
    assert not caplog.records


def test_an_answer_that_is_left_closes_its_connection(upstream: FakeUpstream) -> None:
    async def main() -> None:
        transport = UpstreamTransport(4, 10**9)
        upstream.script(Endless(interval_s=0.01))
        response = await transport.handle_async_request(post(upstream))
        pieces = response.aiter_raw()
        assert await anext(pieces)
        await pieces.aclose()
        await response.aclose()
        await asyncio.to_thread(upstream.wait_for, _one_has_left)
        await transport.aclose()

    asyncio.run(main())


def post(upstream: FakeUpstream, content: bytes = BODY, host: str = "127.0.0.1") -> httpx2.Request:
    """A request to the upstream."""
    extensions = {"timeout": LIMITS.as_dict()}
    url = f"http://{host}:{upstream.port}/v1/chat/completions"
    return httpx2.Request("POST", url, content=content, extensions=extensions)


async def none_is_open(upstream: FakeUpstream) -> None:
    """Wait until the upstream has no connection any more."""
    async with asyncio.timeout(5):
        while upstream.open_connections:  # noqa: ASYNC110 - the fake is on another loop
            await asyncio.sleep(0.01)


def _one_is_complete(fake: FakeUpstream) -> bool:
    return len(fake.chat_requests) == 1


def _one_has_left(fake: FakeUpstream) -> bool:
    return fake.disconnects == 1


def test_packed_bytes_are_handed_on_as_they_are(upstream: FakeUpstream) -> None:
    upstream.script(Answer(headers={"Content-Encoding": "gzip"}))
    (answer,) = ask(upstream.url)
    assert answer.json()["object"] == "chat.completion"
    assert "content-encoding" not in answer.headers


def test_one_that_was_asked_nothing_closes() -> None:
    asyncio.run(UpstreamTransport(1, 1).aclose())
