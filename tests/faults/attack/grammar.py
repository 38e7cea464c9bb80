"""Conversations that an attacker has with the service: valid, malformed and damaged requests in packets."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hypothesis import strategies as st

from tests.faults.attack.wire import AMBIGUOUS_FRAMING, BROKEN_CHUNKS, PROMPT, UPGRADES

MARK: Final = "bad0bad0"
"""The start of the trace ids of requests that stand in bodies: no answer and no log line may have one."""

TRAP_BYTES: Final = b'\r\n\0 :,;aF0159\xff\x80{}[]"\\'
EXTRA_FIELDS: Final = (
    "X-Request-ID: mine",
    "X-Forwarded-For: 10.0.0.1",
    "Origin: http://other.test",
    "Cookie: a=b; c=d",
    "X-Empty:",
    "X-Space: \t a \t",
    "X-Latin: \xe9\xff",
    "Accept-Encoding: gzip, br",
    "Expect: 100-continue",
    "Range: bytes=0-10",
    "Content-Encoding: identity",
    "If-None-Match: *",
    "TE: trailers",
    "Trailer: X-Sum",
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "Connection: keep-alive",
    "X-HTTP-Method-Override: DELETE",
    "baggage: a=b",
    "tracestate: a=b",
)
ENDINGS: Final = ("valid", "valid", "unread", "stranger", "malformed", "truncated", "damaged", "damaged")
TRAILERS: Final = (
    "X-Sum: 1",
    "Authorization: Bearer x",
    "Content-Length: 5",
    "X-Empty:",
    "Origin: http://x.test",
)
EXTENSIONS: Final = ("", ";a=b", ';a="b;c"', ";" + "e" * 100)
GETS: Final = (
    "/auth/me",
    "/health",
    "/nothing",
    "/llm/models",
    "/docs",
    "/openapi.json",
    "/v1/x?y=%00",
    "/%zz",
    "//",
)
BAD_LINES: Final = (
    "GET  /auth/me HTTP/1.1",
    "GET /auth/me HTTP/1.2",
    "GET /auth/me HTTP/2.0",
    "GET /auth/me",
    " GET /auth/me HTTP/1.1",
    "X /auth/me HTTP/1.1",
    "G\x00T /auth/me HTTP/1.1",
    "CONNECT 127.0.0.1:1 HTTP/1.1",
    "PRI * HTTP/2.0",
    "GET /a b HTTP/1.1",
    "\x16\x03\x01\x02\x00",
)
BAD_FIELDS: Final = (
    "X-Folded: a\r\n b",
    "X-Null: a\x00b",
    "X-Bare: a\rb",
    "X-Feed: a\nb",
    "no colon",
    ": no name",
    "X Space: a",
    "X-Long: " + "a" * 70_000,
    *("\r\n".join(f"X-{number}: a" for number in range(101)),),
)


@dataclass(frozen=True)
class Sent:
    """What is sent on one connection.

    ``valid``: every request is understood and answered, with these statuses.
    """

    data: bytes
    cuts: tuple[int, ...]
    traps: tuple[str, ...]
    valid: tuple[frozenset[int], ...] | None

    @property
    def packets(self) -> list[bytes]:
        """The bytes, cut into packets."""
        ends = [*self.cuts, len(self.data)]
        return [self.data[start:end] for start, end in zip([0, *self.cuts], ends, strict=True)]


@dataclass
class Callers:
    """Tokens, and the places where requests are built with them."""

    user: str
    admin: str

    def trace(self) -> str:
        """A trace context that nobody has used."""
        return f"traceparent: 00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"

    def trap(self) -> tuple[bytes, str]:
        """A whole request to stand in a body, that would do harm, and its trace id."""
        trace_id = MARK + secrets.token_hex(12)
        lines = (
            "DELETE /llm/cache HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {self.admin}",
            f"traceparent: 00-{trace_id}-{secrets.token_hex(8)}-01",
        )
        return "\r\n".join((*lines, "", "")).encode(), trace_id


class Requests:
    """Builds the requests of one conversation, from what Hypothesis draws."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any], callers: Callers) -> None:
        self._draw = draw
        self._callers = callers
        self.traps: list[str] = []

    def one_of(self, *choices: Any) -> Any:
        """Draw one of the values."""
        return self._draw(st.sampled_from(choices))

    def valid(self) -> tuple[bytes, frozenset[int]]:
        """A request that is answered, and the connection lives on; with the statuses it may have."""
        kind = self.one_of("get", "prompt", "trap", "sign-in", "chunked", "chunked trap")
        if kind == "get":
            method, path = (
                self.one_of("GET", "GET", "HEAD", "OPTIONS", "PUT", "PATCH", "TRACE"),
                self.one_of(*GETS),
            )
            return self.head(method, path), frozenset({200, 204, 307, 400, 404, 405})
        body, statuses = (PROMPT, {200}) if "trap" not in kind else (self.trap(), {422})
        if kind == "sign-in":
            body, statuses = self.trap(), {422}
        path = "/auth/login" if kind == "sign-in" else "/llm/generate"
        if "chunked" in kind:
            return self.head("POST", path, "Transfer-Encoding: chunked") + self.chunks(body), frozenset(
                statuses
            )
        return self.head("POST", path, f"Content-Length: {len(body)}") + body, frozenset(statuses)

    def stranger(self) -> bytes:
        """A request with a body and without a token, which is refused."""
        body = self.trap()
        return self.head("POST", "/llm/generate", f"Content-Length: {len(body)}", token=False) + body

    def unread(self) -> bytes:
        """A request whose body nobody reads; the connection ends with its answer."""
        body = self.trap()
        return self.head(self.one_of("GET", "DELETE"), "/auth/me", f"Content-Length: {len(body)}") + body

    def malformed(self) -> bytes:
        """Something that is no request, or could be read as two."""
        kind = self.one_of("framing", "chunks", "line", "field", "length")
        if kind == "framing":
            return self.head("POST", "/llm/generate", *self.one_of(*AMBIGUOUS_FRAMING)) + PROMPT
        if kind == "chunks":
            chunks: bytes = self.one_of(*BROKEN_CHUNKS)
            return self.head("POST", "/llm/generate", "Transfer-Encoding: chunked") + chunks
        if kind == "length":
            return self.head(
                "POST", "/llm/generate", f"Content-Length: {self.one_of('-1', '1e1', '', '9' * 30)}"
            )
        if kind == "line":
            line: str = self.one_of(*BAD_LINES)
            return f"{line}\r\nHost: x\r\n{self._callers.trace()}\r\n\r\n".encode("latin-1")
        return self.head("GET", "/auth/me", self.one_of(*BAD_FIELDS))

    def trap(self) -> bytes:
        """A body that is a request."""
        trap, trace_id = self._callers.trap()
        self.traps.append(trace_id)
        before: bytes = self.one_of(b"", b"\r\n", b"0\r\n\r\n", b"x")
        return before + trap

    def head(self, method: str, path: str, *framing: str, token: bool = True) -> bytes:
        """A head with its fields in any order, in any letters."""
        fields = ["Host: 127.0.0.1", "Content-Type: application/json", self._callers.trace(), *framing]
        if token:
            fields.append(f"Authorization: Bearer {self._callers.user}")
        fields += self._draw(st.lists(st.sampled_from(EXTRA_FIELDS), max_size=3))
        if self._draw(st.integers(0, 3)) == 0:
            fields += [
                "Connection: Upgrade",
                f"Upgrade: {self.one_of(*UPGRADES)}",
                "HTTP2-Settings: AAMAAABkAAQ",
            ]
        fields = self._draw(st.permutations(fields))
        if self._draw(st.booleans()):
            fields = [
                name.swapcase() + colon + value for name, colon, value in (f.partition(":") for f in fields)
            ]
        empty_lines = "\r\n" * self._draw(st.integers(0, 1))
        return "\r\n".join((f"{empty_lines}{method} {path} HTTP/1.1", *fields, "", "")).encode("latin-1")

    def chunks(self, body: bytes) -> bytes:
        """A body in chunks, with extensions and trailers."""
        written = b""
        while body:
            size = min(self._draw(st.integers(1, 40)), len(body))
            number: str = self.one_of(f"{size:x}", f"{size:X}", f"000{size:x}")
            written += f"{number}{self.one_of(*EXTENSIONS)}\r\n".encode() + body[:size] + b"\r\n"
            body = body[size:]
        trailers = self._draw(st.lists(st.sampled_from(TRAILERS), max_size=2))
        return written + "\r\n".join(("0", *trailers, "", "")).encode()


@st.composite
def conversations(draw: Callable[[st.SearchStrategy[Any]], Any], callers: Callers) -> Sent:
    """Draw a conversation: pipelined requests, of which the last may be damaged, in packets."""
    requests = Requests(draw, callers)
    good = [requests.valid() for _ in range(draw(st.integers(0, 4)))]
    data = b"".join(request for request, _ in good)
    ending = draw(st.sampled_from(ENDINGS))
    if ending == "stranger":
        data += requests.stranger()
    elif ending == "unread":
        data += requests.unread()
    elif ending == "malformed":
        data += requests.malformed()
    last = requests.head("GET", "/auth/me", "Connection: close")
    data += last
    if ending == "truncated":
        data = data[: draw(st.integers(1, len(data)))]
    elif ending == "damaged":
        data = damaged(draw, data)
    cuts = draw(st.lists(st.integers(1, max(1, len(data) - 1)), max_size=4, unique=True))
    valid = (*(statuses for _, statuses in good), frozenset({200})) if ending == "valid" else None
    return Sent(data, tuple(sorted(cut for cut in cuts if cut < len(data))), tuple(requests.traps), valid)


def damaged(draw: Callable[[st.SearchStrategy[Any]], Any], data: bytes) -> bytes:
    """Change a few bytes: delete, insert, overwrite, or repeat some."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 20))
        trap = bytes([draw(st.sampled_from(TRAP_BYTES))])
        changed: Sequence[bytes] = (
            data[:at] + data[at + length :],
            data[:at] + trap + data[at:],
            data[:at] + trap + data[at + 1 :],
            data[: at + length] + data[at:],
        )
        data = changed[draw(st.integers(0, 3))] or trap
    return data
