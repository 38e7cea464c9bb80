"""What is left of the embedded cache when its process ends, well or badly."""

import signal
import threading
from pathlib import Path

from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, Client, ServiceProcess
from tests.http.support import eventually


def process(upstream: FakeUpstream, folder: Path) -> ServiceProcess:
    return ServiceProcess(
        {
            "LITELLM_URL": upstream.url,
            "CACHE_ENABLED": "true",
            "QDRANT_PATH": str(folder),
            # The folder is read before the first question; a loaded machine takes its time.
            "CACHE_TIMEOUT_S": "5",
        }
    )


def ask(service: Client, token: str, prompt: str = "What?") -> Answer:
    answer = service.call("POST", "/llm/generate", body={"prompt": prompt}, token=token)
    assert answer.status == 200, answer.body
    return answer


def test_an_answer_given_just_before_the_stop_is_there_after_the_restart(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    with process(upstream, tmp_path) as first:
        first.wait_ready()
        token = first.token()
        assert ask(first, token).headers["x-cache"] == "MISS"
        assert first.stop() == 0
        said = [line["message"] for line in first.lines()]
        steps = ["Flushing cache...", "Closing Qdrant connections...", "Finalizing MLflow run..."]
        assert [message for message in said if message in steps] == steps
    with process(upstream, tmp_path) as second:
        second.wait_ready()
        answer = ask(second, second.token())

    assert (answer.headers["x-cache"], answer.json["response"]) == ("HIT", "Hello from the fake.")
    assert int(answer.headers["age"]) >= 0
    assert len(upstream.chat_requests) == 1


def test_a_killed_process_leaves_a_store_that_is_whole(upstream: FakeUpstream, tmp_path: Path) -> None:
    with process(upstream, tmp_path) as first:
        first.wait_ready()
        token = first.token()
        ask(first, token, "the first")
        eventually(
            lambda: first.call("GET", "/llm/cache/stats", token=token).json["waiting"] == 0, "the write"
        )
        stop = threading.Event()

        def keep_asking() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    ask(first, token, f"question {number}")
                except OSError:
                    return

        asking = threading.Thread(target=keep_asking)
        asking.start()
        upstream.wait_for(lambda fake: len(fake.chat_requests) > 50, 30)
        assert first.process is not None
        first.stop(signal.SIGKILL)
        stop.set()
        asking.join()
    asked = len(upstream.chat_requests)
    with process(upstream, tmp_path) as second:
        second.wait_ready()
        token = second.token()
        assert ask(second, token, "the first").headers["x-cache"] == "HIT"
        eventually(
            lambda: second.call("GET", "/health/detailed").json["checks"]["qdrant"], "the store to be up"
        )
        entries = second.call("GET", "/llm/cache/stats", token=token).json["entries"]
        assert not [line for line in second.lines() if line["level"] in {"ERROR", "CRITICAL"}]

    # What was waiting is lost, and no more: the queue of one caller is a question or two.
    assert asked - 10 <= entries <= asked
