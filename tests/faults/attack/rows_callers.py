"""Who can stop whom: what one caller, or a stranger, leaves to the others."""

import json
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

from tests.faults.attack.rows import Finding, Rows
from tests.faults.attack.target import MIB, SECOND_ADDRESS, Target, wait_for
from tests.faults.attack.wire import answers_in, head, reset_on_close

CALLERS: Rows[Target] = Rows()
STREAMS = 200
MAX_PER_STREAM = 4 * MIB
"""A stream holds what was not sent yet, and up to CACHE_MAX_ENTRY_BYTES (1 MiB) that may be stored."""

MAX_FAILED = 0.01
BOUND = 300
"""As many answers as the attacked process may store (CACHE_MAX_ENTRIES)."""


@contextmanager
def many(
    target: Target, requests: Sequence[bytes], addresses: Sequence[str] = ("127.0.0.4",)
) -> Iterator[list[socket.socket]]:
    """Open a connection for each request at the same time, and send it."""
    with ExitStack() as stack:
        opened = []
        for number, request in enumerate(requests):
            address = addresses[number % len(addresses)]
            made = socket.create_connection(("127.0.0.1", target.port), 10, (address, 0))
            stack.callback(made.close)
            stack.callback(reset_on_close, made)
            with suppress(OSError):
                made.sendall(request)
            opened.append(made)
        yield opened


def statuses_of(target: Target, opened: Sequence[socket.socket], limit_s: float) -> Counter[str]:
    """The status of the first answer on each connection, ``none`` where none comes in time."""
    end_s = time.monotonic() + limit_s
    found: Counter[str] = Counter()
    for made in opened:
        data = b""
        with suppress(OSError):
            made.settimeout(max(0.001, end_s - time.monotonic()))
            while not answers_in(data)[0] and (piece := made.recv(65_536)):
                data += piece
        answers, _ = answers_in(data)
        found[str(answers[0].status) if answers else "none"] += 1
    target.tally.add(len(opened), list(found.elements()))
    return found


def unharmed(target: Target, found: Finding) -> None:
    """The second user's call, made now, succeeds; so does the attacker's own, afterwards."""
    answer = target.call("POST", "/llm/generate", body={"prompt": secrets.token_hex(4)}, token=target.admin)
    found.expect(answer.status == 200, f"another user's call: {answer.status} {answer.body[:200]!r}")
    answer = target.call("GET", "/auth/me")
    found.expect(answer.status == 200, f"the caller's own GET: {answer.status}")


@CALLERS.row(
    "what LiteLLM says about a request counts for nobody",
    "ten calls that LiteLLM answers with 500 and litellm.BadRequestError",
    "400 each, asked once each, and the caller's next call is 200",
)
def _(target: Target, found: Finding) -> None:
    body = {"model": "refusing-as-500", "messages": [{"role": "user", "content": "h"}]}
    answers = [target.call("POST", "/v1/chat/completions", body=body) for _ in range(10)]
    statuses = Counter(answer.status for answer in answers)
    attempts = {answer.headers["x-llm-attempts"] for answer in answers}
    found.say(f"{dict(statuses)}, attempts {attempts}")
    found.expect(statuses == {400: 10}, "not the caller's error")
    found.expect(attempts == {"1"}, "retried")
    unharmed(target, found)


@CALLERS.row(
    "a broken model and a caller's time-outs",
    "twelve calls each to a model that answers 500, and to one that answers 408",
    "this caller's circuits for these models open; other models and other callers are answered",
)
def _(target: Target, found: Finding) -> None:
    for model in ("broken", "timing-out"):
        body = {"model": model, "messages": [{"role": "user", "content": "h"}]}
        answers = [target.call("POST", "/v1/chat/completions", body=body) for _ in range(12)]
        statuses = [answer.status for answer in answers]
        found.say(f"{model}: {dict(Counter(statuses))}")
        found.expect(503 in statuses, f"{model}: the caller's circuit does not open")
        found.expect(503 not in statuses[:5], f"{model}: fewer than five calls open it")
        other = target.call("POST", "/v1/chat/completions", body=body, token=target.admin)
        found.expect(other.status != 503, f"{model}: another caller is turned away")
        unharmed(target, found)
        embedded = target.call("POST", "/v1/embeddings", body={"model": "demo", "input": "h"})
        found.expect(embedded.status == 200, f"embeddings: {embedded.status}")


@CALLERS.row(
    "unfinished bodies without a token",
    "820 bodies of 90 bytes promised to /llm/generate, and 820 to /auth/login, from one address",
    "401 at once; a few sign-ins wait, the rest is refused; nobody else is",
)
def _(target: Target, found: Finding) -> None:
    for path in ("/llm/generate", "/auth/login"):
        with many(target, [head("POST", path, fields=("Content-Length: 90",))] * 820) as opened:
            unharmed(target, found)
            statuses = statuses_of(target, opened, 3)
        found.say(f"{path}: {dict(statuses)}")
        if path == "/llm/generate":
            found.expect(statuses == {"401": 820}, "not refused before the body")
        else:
            found.expect(set(statuses) <= {"503", "none"} and statuses["none"] <= 16, f"{statuses}")
    unharmed(target, found)


@CALLERS.row(
    "unfinished bodies of a signed-in caller",
    "900 bodies of 90 bytes promised with the caller's token",
    "the caller's share waits, the rest is 503; nobody else is refused",
)
def _(target: Target, found: Finding) -> None:
    with many(target, [head("POST", "/llm/generate", target.token, ("Content-Length: 90",))] * 900) as opened:
        unharmed(target, found)
        statuses = statuses_of(target, opened, 1)
    found.say(f"{dict(statuses)}")
    found.expect(statuses["503"] >= 400 and set(statuses) <= {"503", "none"}, f"{statuses}")
    unharmed(target, found)


@CALLERS.row(
    "wrong passwords for another user's name",
    "twelve wrong passwords for admin from an address that never signed in",
    "that address waits; the owner signs in from the usual address and from a new one",
)
def _(target: Target, found: Finding) -> None:
    body = json.dumps({"username": "admin", "password": "not the password"}).encode()
    wrong = head("POST", "/auth/login", fields=(f"Content-Length: {len(body)}",), close=True) + body
    statuses = [target.talk(wrong, address="127.0.3.1").statuses for _ in range(12)]
    found.say(f"{statuses[0]} ... {statuses[-1]}")
    found.expect(statuses[-1] == [429], "the address may go on")
    body = json.dumps({"username": "admin", "password": target.process.passwords["admin"]}).encode()
    right = head("POST", "/auth/login", fields=(f"Content-Length: {len(body)}",), close=True) + body
    for address in ("127.0.0.1", "127.0.3.2"):
        seen = target.talk(right, address=address)
        found.say(f"the owner from {address}: {seen.statuses}")
        found.expect(seen.statuses == [200], f"the owner is locked out at {address}")


@CALLERS.row(
    "many sign-ins at once",
    "250 wrong sign-ins from one address, 16 from each of 16 addresses, then 60 right ones of another user",
    "401, 429 or 503; model calls and the other user's sign-ins are not held up",
)
def _(target: Target, found: Finding) -> None:
    body = json.dumps({"username": "admin", "password": "not the password"}).encode()
    request = head("POST", "/auth/login", fields=(f"Content-Length: {len(body)}",)) + body
    one, several = ("127.0.1.1",), [f"127.0.2.{number}" for number in range(1, 17)]
    owner = json.dumps({"username": "admin", "password": target.process.passwords["admin"]}).encode()
    signing_in = head("POST", "/auth/login", fields=(f"Content-Length: {len(owner)}",), close=True) + owner
    own = json.dumps({"username": "user", "password": target.process.passwords["user"]}).encode()
    right = head("POST", "/auth/login", fields=(f"Content-Length: {len(own)}",)) + own
    for sent, addresses, number in (
        (request, one, 250),
        (request, several, 256),
        (right, ("127.0.0.1",), 60),
    ):
        with many(target, [sent] * number, addresses) as opened:
            for _again in range(3):
                unharmed(target, found)
                seen = target.talk(signing_in, address=SECOND_ADDRESS, timeout_s=20)
                found.expect(seen.statuses == [200], f"the owner's sign-in: {seen.statuses}")
            statuses = statuses_of(target, opened, 20)
        found.say(f"{len(addresses)} addresses: {dict(statuses)}")
        permitted = {"200", "503"} if sent is right else {"401", "429", "503"}
        found.expect(set(statuses) <= permitted, f"{statuses}")


@CALLERS.row(
    "one user's streams, never read",
    f"{STREAMS} streams without an end, of which nothing is read",
    "half of the places; the rest 503; let go after STREAM_WRITE_TIMEOUT_S; bounded memory",
)
def _(target: Target, found: Finding) -> None:
    body = b'{"prompt": "h", "model": "endless", "stream": true}'
    request = head("POST", "/llm/generate", target.token, (f"Content-Length: {len(body)}",)) + body
    before = target.gauges.resident_bytes()
    with many(target, [request] * STREAMS) as opened:
        unharmed(target, found)
        time.sleep(1)
        grown = target.gauges.resident_bytes() - before
        free = wait_for(lambda: target.call("POST", "/llm/generate", body={"prompt": "h"}).status == 200, 15)
        unharmed(target, found)
        del opened
    ended = [line for line in target.process.lines() if line["message"] == "llm_request_failed"]
    found.say(f"memory +{grown / MIB:.0f} MiB with all of them open")
    found.expect(free, "the places are not given back")
    found.expect(any(line.get("model") == "endless" for line in ended), "no stream was ended")
    found.expect(grown < STREAMS // 2 * MAX_PER_STREAM, "a stream holds too much")


@CALLERS.row(
    "one user's calls that are not answered",
    "150 calls to a model that says nothing",
    "half of the places; the rest is 503 at once; others are answered",
)
def _(target: Target, found: Finding) -> None:
    body = b'{"prompt": "%s", "model": "silent"}'
    requests = []
    for number in range(150):
        prompt = body % str(number).encode()
        requests.append(
            head("POST", "/llm/generate", target.token, (f"Content-Length: {len(prompt)}",)) + prompt
        )
    with many(target, requests) as opened:
        unharmed(target, found)
        statuses = statuses_of(target, opened, 2)
    found.say(f"{dict(statuses)}")
    # A place that the row before has not given back yet may be one of the caller's half.
    found.expect(set(statuses) <= {"none", "503"} and 90 <= statuses["none"] <= 100, f"{statuses}")


@CALLERS.row(
    "GET with a body",
    "300 GETs with a body that never comes, with the caller's token",
    "200 or 503, each at the end of its connection; counted like any",
)
def _(target: Target, found: Finding) -> None:
    with many(target, [head("GET", "/llm/models", target.token, ("Content-Length: 90",))] * 300) as opened:
        for path in ("/llm/models", "/auth/me"):
            answer = target.call("GET", path, token=target.admin)
            found.expect(answer.status == 200, f"another user's GET {path}: {answer.status}")
        statuses = statuses_of(target, opened, 5)
    found.say(f"{dict(statuses)}")
    wait_for(lambda: target.call("GET", "/auth/me").status == 200)
    unharmed(target, found)
    found.expect(set(statuses) <= {"200", "503"}, f"{statuses}")


@CALLERS.row(
    "the cache at its bound",
    f"{3 * BOUND} different prompts, with {BOUND} answers to be stored",
    "the bound holds, look-ups do not fail, no circuit opens",
)
def _(target: Target, found: Finding) -> None:
    before = target.call("GET", "/llm/cache/stats").json
    line = len(target.process.lines())

    def ask(number: int) -> int:
        return target.call(
            "POST", "/llm/generate", body={"prompt": f"{secrets.token_hex(8)} {number}"}
        ).status

    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(ask, range(3 * BOUND)))

    def entries() -> int:
        return int(target.call("GET", "/llm/cache/stats").json["entries"] or 0)

    wait_for(lambda: entries() <= BOUND, 10)
    after = target.call("GET", "/llm/cache/stats").json
    found.say(f"{dict(statuses)}, {after['entries']} entries, {after['errors'] - before['errors']} errors")
    found.expect(statuses == {200: 3 * BOUND}, f"{statuses}")
    found.expect(after["entries"] <= BOUND, "the bound is not enforced")
    failed = after["errors"] - before["errors"]
    # On a machine that does other work, a look-up may take longer than CACHE_TIMEOUT_S.
    found.expect(failed <= MAX_FAILED * 3 * BOUND, f"{failed} look-ups fail")
    opened = [said for said in target.process.lines()[line:] if "Circuit breaker closed" in said["message"]]
    found.expect(not opened, f"a circuit opens: {opened[:1]}")
