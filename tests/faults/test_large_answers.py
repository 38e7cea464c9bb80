"""Large answers from the upstream, while others use the service."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.upstream import Status
from tests.faults.bench import Bench
from tests.harness import Answer

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

INPUTS = 1_947
DIMENSIONS = 768
CALLS = 8


def embeddings() -> bytes:
    """OpenAI's answer to so many inputs, of about 30 MB."""
    vector = [(-1) ** at * (at + 1) / 7919 for at in range(DIMENSIONS)]
    vectors = [{"object": "embedding", "index": at, "embedding": vector} for at in range(INPUTS)]
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    return json.dumps({"object": "list", "model": "demo", "data": vectors, "usage": usage}).encode()


def chat() -> bytes:
    """A chat completion with the log probabilities of many tokens, of about 30 MB."""
    top = [{"token": f"t{at}", "logprob": -at / 7, "bytes": [116, 48 + at]} for at in range(20)]
    tokens = [{"token": "t", "logprob": -0.5, "bytes": [116], "top_logprobs": top}] * 20_000
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Said at length."},
        "finish_reason": "stop",
        "logprobs": {"content": tokens},
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 20_000, "total_tokens": 20_005}
    return json.dumps({"id": "c", "model": "demo", "choices": [choice], "usage": usage}).encode()


EMBEDDINGS, CHAT = embeddings(), chat()


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text("ascii"))
    assert found is not None
    return int(found[1]) * 1_024


@pytest.mark.parametrize(
    ("path", "asked", "content"),
    [
        ("/v1/embeddings", {"model": "demo", "input": ["a"] * INPUTS}, EMBEDDINGS),
        (
            "/v1/chat/completions",
            {"model": "demo", "messages": [{"role": "user", "content": "a"}], "logprobs": True},
            CHAT,
        ),
    ],
    ids=["embeddings", "chat"],
)
def test_large_answers_hold_up_nobody(path: str, asked: dict[str, Any], content: bytes) -> None:
    started_s = time.perf_counter()
    json.loads(content)
    parse_s = time.perf_counter() - started_s

    with Bench({"CACHE_ENABLED": "false"}) as bench:
        bench.upstream.script(*[Status(200, content)] * (CALLS + 1))
        assert bench.process.process is not None
        pid = bench.process.process.pid
        before = peak_bytes(pid)

        def ask(_number: int) -> Answer:
            return bench.process.call("POST", path, body=asked, token=bench.token)

        waits_s: list[float] = []
        with ThreadPoolExecutor(CALLS) as callers:
            calls = [callers.submit(ask, number) for number in range(CALLS)]
            while not all(call.done() for call in calls):
                probe = bench.process.call("GET", "/health")
                assert probe.status == 200
                waits_s.append(probe.seconds)
            answers = [call.result() for call in calls]
        held = peak_bytes(pid) - before

    assert {answer.status for answer in answers} == {200}
    assert all(answer.body == content for answer in answers)
    # To parse one of them whole takes this long, in which nothing else happens.
    assert max(waits_s) < CALLS / 2 * parse_s
    # Each is held in pieces, then whole, then until its caller has it.
    assert held < 2 * CALLS * len(content)


@pytest.mark.parametrize("status", [400, 500])
def test_a_large_error_costs_no_more_than_a_small_one(status: int) -> None:
    started_s = time.perf_counter()
    json.loads(CHAT)
    parse_s = time.perf_counter() - started_s
    variables = {"RETRY_MAX": "0", "BREAKER_FAILURE_THRESHOLD": "1000"}
    with Bench(variables) as bench:
        bench.upstream.script(*[Status(status, CHAT)] * CALLS)
        answers = bench.generate_often(CALLS)
    assert {answer.status for answer in answers} == {400 if status == 400 else 502}
    assert max(answer.seconds for answer in answers) < parse_s
