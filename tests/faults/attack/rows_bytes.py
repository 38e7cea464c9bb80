"""Bytes and connections: no byte is read as another request, and none costs memory without bound."""

import itertools
import secrets
import socket
import time
from contextlib import suppress

from tests.faults.attack.rows import Finding, Rows
from tests.faults.attack.target import MIB, Target, wait_for
from tests.faults.attack.wire import (
    AMBIGUOUS_FRAMING,
    BROKEN_CHUNKS,
    PROMPT,
    UPGRADES,
    chunked,
    connection,
    head,
)

BYTES: Rows[Target] = Rows()
FLOOD_BYTES = 64 * MIB
HELD_BYTES = 16 * MIB
"""More than the kernel's buffers and a few requests take; far less than is sent."""


def flood(made: socket.socket, piece: bytes, most: int = FLOOD_BYTES) -> int:
    """Send the same bytes until the service ends the connection, or takes no more for a second."""
    made.settimeout(1)
    sent = 0
    with suppress(OSError):
        while sent < most:
            sent += made.send(piece)
    return sent


@BYTES.row(
    "trailers without end",
    "no token: POST /auth/login, chunked, 0\\r\\n, then X: b\\r\\n for ever",
    "400 and close; a few MB taken, none kept",
)
def _(target: Target, found: Finding) -> None:
    before = target.gauges.resident_bytes()
    with connection(target.port, "127.0.0.3") as made:
        made.sendall(head("POST", "/auth/login", fields=("Transfer-Encoding: chunked",)) + b"0\r\n")
        sent = flood(made, b"X: b\r\n" * 1_000)
    grown = target.gauges.resident_bytes() - before
    target.tally.add(1, ["closed"])
    found.say(f"{sent / MIB:.1f} MiB taken, memory +{grown / MIB:.1f} MiB")
    found.expect(sent < HELD_BYTES, "the service goes on reading")
    found.expect(grown < HELD_BYTES, "the memory grows")


@BYTES.row(
    "trailers are no header fields",
    "Authorization, X-Forwarded-For and Origin as trailers; 8,000 and 8,400 bytes of trailers",
    "401, no CORS field; 200 up to 8,192 bytes, 400 beyond",
)
def _(target: Target, found: Finding) -> None:
    body = b"%x\r\n%b\r\n0\r\n" % (len(PROMPT), PROMPT)
    start = head("POST", "/llm/generate", fields=("Transfer-Encoding: chunked", "Connection: close"))
    trailers = (
        f"Authorization: Bearer {target.token}\r\nX-Forwarded-For: 1.2.3.4\r\nOrigin: http://x.test\r\n\r\n"
    )
    answers = target.talk(start + body + trailers.encode()).answers
    found.say(f"{[answer.status for answer in answers]}")
    found.expect([answer.status for answer in answers] == [401], "a trailer is believed")
    found.expect(
        not any(name.startswith("access-control") for answer in answers for name in answer.headers),
        "Origin in a trailer is believed",
    )
    own = head("POST", "/llm/generate", target.token, ("Transfer-Encoding: chunked",), close=True)
    sizes = {}
    for size in (8_000, 8_400):
        sizes[size] = target.talk(own + body + b"X: " + b"a" * (size - 5) + b"\r\n\r\n").statuses
    found.say(f"{sizes}")
    found.expect(sizes == {8_000: [200], 8_400: [400]}, "the limit of trailers does not hold")


@BYTES.row(
    "offers to upgrade are ignored",
    "Upgrade: h2c, websocket, anything on POST; one packet, two, chunked; first and later requests",
    "200 for each request",
)
def _(target: Target, found: Finding) -> None:
    wrong = []
    for protocol, framed, apart in itertools.product(UPGRADES, (False, True), (False, True)):
        offer = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAMAAABkAAQ")
        framing = "Transfer-Encoding: chunked" if framed else f"Content-Length: {len(PROMPT)}"
        body = chunked(PROMPT) if framed else PROMPT
        start = head("POST", "/llm/generate", target.token, (*offer, framing))
        packets = [start, body, start, body] if apart else [(start + body) * 2]
        statuses = target.talk(*packets, target.last(), inputs=3).statuses
        if statuses != [200, 200, 200]:
            wrong.append(f"{protocol} {framed=} {apart=}: {statuses}")
    found.say("12 conversations of 3 requests")
    found.problems += wrong


@BYTES.row(
    "a body behind an offer to upgrade is no request",
    "a user's POST with Upgrade; in the next packet, as its body, an administrator's DELETE /llm/cache",
    "422 for the POST, nothing for the body, 200 for what follows",
)
def _(target: Target, found: Finding) -> None:
    for protocol in UPGRADES:
        smuggled = head("DELETE", "/llm/cache", target.admin)
        offer = ("Connection: Upgrade", f"Upgrade: {protocol}", f"Content-Length: {len(smuggled)}")
        first = head("POST", "/llm/generate", target.token, offer)
        statuses = target.talk(first, smuggled, target.last(), inputs=2).statuses
        found.say(f"{protocol}: {statuses}")
        found.expect(statuses == [422, 200], f"{protocol}: {statuses}")


@BYTES.row(
    "framing that can be read in two ways",
    "two lengths, length and chunks, gzip, signs, bare line feeds, wrong sizes; another request behind it",
    "400 and close, one packet or two; nothing for what follows",
)
def _(target: Target, found: Finding) -> None:
    start = chunked_head(target)
    inputs = [head("POST", "/llm/generate", target.token, framing) + PROMPT for framing in AMBIGUOUS_FRAMING]
    inputs += [start + body for body in BROKEN_CHUNKS]
    for sent in inputs:
        for packets in ((sent + target.last(),), (sent, target.last())):
            seen = target.talk(*packets)
            found.expect(seen.statuses == [400] and seen.closed, f"{sent[:300]!r}: {seen.statuses}")
    found.say(f"{2 * len(inputs)} conversations")


def chunked_head(target: Target) -> bytes:
    """The head of a model call in chunks."""
    return head("POST", "/llm/generate", target.token, ("Transfer-Encoding: chunked",))


@BYTES.row(
    "a second head while an answer is under way",
    "a call that LiteLLM does not answer, then 64 MiB of another request's head",
    "reading pauses: a few MB taken by the kernel, none by the service",
)
def _(target: Target, found: Finding) -> None:
    before = target.gauges.resident_bytes()
    with connection(target.port, "127.0.0.3") as made:
        body = b'{"prompt": "h", "model": "silent"}'
        made.sendall(head("POST", "/llm/generate", target.token, (f"Content-Length: {len(body)}",)) + body)
        time.sleep(0.1)
        made.sendall(b"GET /auth/me HTTP/1.1\r\n")
        sent = flood(made, b"X: " + b"a" * 65_536)
    grown = target.gauges.resident_bytes() - before
    target.tally.add(2, ["none"])
    found.say(f"{sent / MIB:.1f} MiB taken, memory +{grown / MIB:.1f} MiB")
    found.expect(sent < FLOOD_BYTES, "the service goes on reading")
    found.expect(grown < HELD_BYTES, "the memory grows")


@BYTES.row(
    "heads beyond their limits",
    "100 kB or 10,000 header fields, 101 fields, a folded line; in one read and in two",
    "400 and close",
)
def _(target: Target, found: Finding) -> None:
    fields = (
        ("X-Long: " + "a" * 100_000,),
        tuple(f"X-{number}: a" for number in range(10_000)),
        tuple(f"X-{number}: a" for number in range(101)),
        ("X-Folded: a\r\n b",),
    )
    for one in fields:
        sent = head("GET", "/auth/me", target.token, one)
        half = len(sent) // 2
        for packets in ((sent,), (sent[:half], sent[half:])):
            seen = target.talk(*packets)
            found.expect(seen.statuses == [400] and seen.closed, f"{one[0][:20]}: {seen.statuses}")
    found.say("8 conversations")


@BYTES.row(
    "a reset behind many pipelined requests",
    "no token: 40 requests for the documentation's files, then a reset; ten times",
    "no ERROR, no stack trace, one WARN at most",
)
def _(target: Target, found: Finding) -> None:
    before = len(target.process.lines())
    for _round in range(10):
        with connection(target.port, "127.0.0.3") as made:
            made.sendall(head("GET", "/docs-assets/swagger-ui-bundle.js") * 40)
            time.sleep(0.02)
        target.tally.add(40, ["none"])
    wait_for(lambda: target.process.call("GET", "/health").status == 200)
    time.sleep(0.3)
    lines = target.process.lines()[before:]
    loud = [line for line in lines if line["level"] in {"WARNING", "ERROR", "CRITICAL"}]
    found.say(f"{len(loud)} lines of WARNING or more")
    found.expect(len(loud) <= 1, f"{loud[:2]}")
    found.expect(not any("exception.stacktrace" in line for line in lines), "a stack trace")


@BYTES.row(
    "the answer to a malformed request is a trace of its own",
    "a request, and pipelined behind it one that is malformed",
    "400 with another id than the first request's",
)
def _(target: Target, found: Finding) -> None:
    trace_id = secrets.token_hex(16)
    first = head("GET", "/auth/me", target.token, (f"traceparent: 00-{trace_id}-{'1' * 16}-01",))
    for behind in (b"GET /auth/me\r\nHost: x\r\n\r\n", head("POST", "/x", fields=("Content-Length: 1e1",))):
        seen = target.talk(first + behind, inputs=2)
        ids = [answer.request_id for answer in seen.answers]
        found.say(f"{seen.statuses}")
        found.expect(seen.statuses == [200, 400] and seen.closed, f"{behind!r}: {seen.statuses}")
        found.expect(ids[:1] == [trace_id] and trace_id not in ids[1:], f"{behind!r}: the ids are {ids}")


@BYTES.row(
    "an empty line before a request in pieces",
    "\\r, then \\n, then a request",
    "200",
)
def _(target: Target, found: Finding) -> None:
    seen = target.talk(b"\r", b"\n", target.last())
    found.say(f"{seen.statuses}")
    found.expect(seen.statuses == [200], f"{seen.statuses}")
