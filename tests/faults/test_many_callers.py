"""Many callers, one of whom means harm: what the others still get, against the real process."""

import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from tests.fakes.streams import EndlessStream
from tests.fakes.upstream import Answer, FakeUpstream, Silent
from tests.harness import ServiceProcess
from tests.http.support import eventually

pytestmark = pytest.mark.e2e

PLACES = 8
GENERATE = {"prompt": "What is a trace?"}


@contextmanager
def serving(upstream: FakeUpstream, **variables: str) -> Iterator[ServiceProcess]:
    given = {"LITELLM_URL": upstream.url, "MAX_IN_FLIGHT": f"{PLACES}", **variables}
    with ServiceProcess(given) as process:
        process.wait_ready()
        yield process


def unfinished(
    port: int, path: str, *fields: str, method: str = "POST", address: str = "127.0.0.1"
) -> socket.socket:
    """A connection on which a request's head was sent, and never its body."""
    connection = socket.create_connection(("127.0.0.1", port), 10, (address, 0))
    lines = (f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 90")
    connection.sendall("\r\n".join((*lines, *fields, "", "")).encode())
    return connection


def test_one_callers_silent_calls_leave_half_of_the_places_to_others(upstream: FakeUpstream) -> None:
    with serving(upstream, LLM_TIMEOUT_S="5", RETRY_MAX="0") as process:
        one, other = process.token(), process.token("admin")
        upstream.default = Silent()
        with ThreadPoolExecutor(2 * PLACES) as pool:
            calls = [
                pool.submit(process.call, "POST", "/llm/generate", body=GENERATE, token=one)
                for _ in range(2 * PLACES)
            ]
            upstream.wait_for(lambda fake: len(fake.chat_requests) == PLACES // 2)
            upstream.default = Answer()
            assert process.call("POST", "/llm/generate", body=GENERATE, token=other).status == 200
            assert process.call("GET", "/auth/me", token=one).status == 200
            assert process.token()
            statuses = Counter(call.result().status for call in calls)
        assert statuses == {504: PLACES // 2, 503: 2 * PLACES - PLACES // 2}


def test_unfinished_bodies_of_strangers_take_nothing_from_anybody(upstream: FakeUpstream) -> None:
    with serving(upstream) as process, ExitStack() as held:
        token = process.token()
        for _ in range(100):
            held.enter_context(unfinished(process.port, "/llm/generate"))
            held.enter_context(unfinished(process.port, "/auth/login"))
        assert process.call("POST", "/llm/generate", body=GENERATE, token=token).status == 200
        assert process.call("GET", "/llm/models", token=token).status == 200


def test_a_body_without_a_token_is_refused_before_it_is_sent(upstream: FakeUpstream) -> None:
    with serving(upstream) as process, unfinished(process.port, "/v1/chat/completions") as connection:
        answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in answer.lower()


def test_many_sign_ins_at_once_leave_model_calls_alone(upstream: FakeUpstream) -> None:
    with serving(upstream) as process:
        token = process.token()
        wrong = {"username": "user", "password": "not the password"}
        with ThreadPoolExecutor(60) as pool:
            attempts = [pool.submit(process.call, "POST", "/auth/login", body=wrong) for _ in range(120)]
            answers = [
                process.call("POST", "/llm/generate", body=GENERATE, token=token).status for _ in range(10)
            ]
            statuses = {attempt.result().status for attempt in attempts}
        assert answers == [200] * 10
        assert statuses <= {401, 429, 503}


def test_one_callers_reads_leave_half_of_their_places_to_others(upstream: FakeUpstream) -> None:
    with serving(upstream, MAX_IN_FLIGHT="200") as process, ExitStack() as held:
        one, other = f"Authorization: Bearer {process.token()}", process.token("admin")
        # Each is answered, and waits for a body that does not come, so that the answer is not lost.
        for _ in range(60):
            held.enter_context(unfinished(process.port, "/auth/me", one, method="GET"))
        assert process.call("GET", "/auth/me", token=other).status == 200
        assert process.call("GET", "/llm/models", token=other).status == 200


def test_unfinished_sign_ins_from_many_addresses_leave_room_for_known_ones(upstream: FakeUpstream) -> None:
    with serving(upstream) as process, ExitStack() as held:
        assert process.token()
        for number in range(400):
            address = f"127.0.9.{1 + number % 20}"
            held.enter_context(unfinished(process.port, "/auth/login", address=address))
        assert process.token()


def test_a_reader_who_takes_nothing_is_let_go(upstream: FakeUpstream) -> None:
    endless = EndlessStream(content="x" * 10_000)
    with serving(upstream, STREAM_WRITE_TIMEOUT_S="0.5") as process:
        token = process.token()
        upstream.script(endless)
        with socket.create_connection(("127.0.0.1", process.port), timeout=10) as connection:
            body = b'{"prompt": "x", "stream": true}'
            lines = ("POST /llm/generate HTTP/1.1", "Host: x", f"Authorization: Bearer {token}")
            more = ("Content-Type: application/json", f"Content-Length: {len(body)}", "", "")
            connection.sendall("\r\n".join((*lines, *more)).encode() + body)
            upstream.wait_for(lambda fake: fake.disconnects == 1)
            eventually(lambda: "The caller did not read" in process.text() or _cancelled(process), "the end")
        ended = [line for line in process.lines() if line["message"] == "llm_request_failed"]
        assert [line["outcome"] for line in ended] == ["cancelled"]
        assert not [line for line in process.lines() if line["level"] == "ERROR"]


def _cancelled(process: ServiceProcess) -> bool:
    time.sleep(0.05)
    return "llm_request_failed" in process.text()
