"""Ten thousand questions, a few of them often and most of them rarely: `python -m tests.bench.cache_replay`.

The questions are drawn by Zipf's law from a catalogue, and asked by a few callers at once, with the cache and
without; the upstream takes its time for each answer.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

from service.config.settings import prepare_environment
from tests.fakes.upstream import Answer, FakeUpstream
from tests.harness import ServiceProcess


def draw(number: int, catalogue: int, exponent: float) -> list[int]:
    """So many questions, the n-th of the catalogue in proportion to 1 / n ** exponent."""
    weights = [1 / rank**exponent for rank in range(1, catalogue + 1)]
    return random.Random(7).choices(range(catalogue), weights, k=number)  # noqa: S311 - no secret


def replay(service: ServiceProcess, questions: list[int], callers: int) -> dict[str, list[float]]:
    """Ask them; the seconds that each took, by what ``X-Cache`` said."""
    token = service.token()
    fields = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    left = iter(questions)
    turn = itertools.count()
    found: dict[str, list[float]] = {"HIT": [], "MISS": [], "BYPASS": []}

    def ask_some() -> None:
        connection = HTTPConnection("127.0.0.1", service.port)
        while next(turn) < len(questions):
            body = json.dumps({"prompt": f"Question {next(left)}"})
            started = time.perf_counter()
            connection.request("POST", "/llm/generate", body, fields)
            response = connection.getresponse()
            response.read()
            found[response.getheader("X-Cache", "")].append(time.perf_counter() - started)
        connection.close()

    with ThreadPoolExecutor(callers) as pool:
        for caller in [pool.submit(ask_some) for _ in range(callers)]:
            caller.result()
    return found


def median_ms(taken: list[float]) -> str:
    """The median in milliseconds."""
    return f"{statistics.median(taken) * 1_000:.1f}" if taken else "-"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--catalogue", type=int, default=2_000)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.8, 1.0, 1.2])
    arguments = parser.parse_args()
    prepare_environment()
    print("| exponent | cache | upstream calls | saved | hit p50 ms | miss p50 ms |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    for exponent, cache in itertools.product(arguments.exponents, ("false", "true")):
        questions = draw(arguments.questions, arguments.catalogue, exponent)
        if cache == "false":
            # Without a cache each call is like the others: a tenth of them says what one takes.
            questions = questions[: len(questions) // 10]
        with FakeUpstream() as upstream:
            upstream.default = Answer(delay_s=arguments.delay_ms / 1_000)
            variables = {
                "LITELLM_URL": upstream.url,
                "CACHE_ENABLED": cache,
                "RATE_LIMIT": "1000000/minute",
                "LOG_LEVEL": "WARNING",
            }
            with ServiceProcess(variables) as service:
                service.wait_ready()
                found = replay(service, questions, arguments.callers)
            calls = len(upstream.chat_requests)
        missed = found["MISS"] + found["BYPASS"]
        print(  # noqa: T201 - what it is for
            f"| {exponent} | {'on' if cache == 'true' else 'off'} | {calls:,} of {len(questions):,} "
            f"| {1 - calls / len(questions):.1%} | {median_ms(found['HIT'])} | {median_ms(missed)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
