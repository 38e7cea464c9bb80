"""Makes pictures of the pages of `GET /requests/{id}`: `python -m tests.e2e.request_pages FOLDER`.

`retries.png` is otel/request.png, which README.md shows.

It needs Debian's `chromium`. The calls go through the service to the fake upstream; MLflow is down, so that
all records wait on disk.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.behaviours import Answer, Status, Stream
from tests.fakes.upstream import FakeUpstream, refusing_port
from tests.harness import AppUnderTest, running_app
from tests.http.streaming import calling

WIDTH = 1_040
HEIGHT = 870
HEIGHTS = {"left": 920, "refused": 970, "failed": 1_110}
LIMIT_S = 10.0


def main() -> None:
    """Write a page and a picture for each case."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.request_pages", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with pages() as made:
        for name, page in made.items():
            path = folder / f"{name}.html"
            path.write_bytes(page)
            photograph(path, folder / f"{name}.png", HEIGHTS.get(name, HEIGHT))


def photograph(page: Path, picture: Path, height: int) -> None:
    """Let Chromium draw a page."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={profile}", f"--window-size={WIDTH},{height}"),
                *(f"--screenshot={picture}", page.resolve().as_uri()),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


@contextmanager
def pages() -> Iterator[dict[str, bytes]]:
    """The page of each case."""
    with tempfile.TemporaryDirectory() as spool, FakeUpstream() as upstream, refusing_port() as port:
        settings: dict[str, Any] = {
            "litellm_url": upstream.url,
            "mlflow_tracking_uri": f"http://127.0.0.1:{port}",
            "spool_path": spool,
            "grafana_url": "http://localhost:3000",
            "retry_max": 3,
            "retry_base_delay_s": 0.4,
            "cache_enabled": True,
            "breaker_failure_threshold": 2,
        }
        with running_app(**settings) as app:
            yield {name: page_of(app, request_id) for name, request_id in _cases(app, upstream).items()}


def page_of(app: AppUnderTest, request_id: str) -> bytes:
    """The page of a request, for an administrator."""
    answer = app.call(
        "GET", f"/requests/{request_id}", token=app.token("admin"), headers={"Accept": "text/html"}
    )
    assert answer.status == 200, answer.body
    return answer.body


def _cases(app: AppUnderTest, upstream: FakeUpstream) -> dict[str, str]:
    """Make the requests; the id of each case."""
    token = app.token()

    def ask(prompt: str, **body: object) -> str:
        return app.call("POST", "/llm/generate", body={"prompt": prompt, **body}, token=token).request_id

    found: dict[str, str] = {}
    upstream.script(Status(503), Status(429), Answer(delay_s=0.6))
    found["retries"] = ask("What is a trace?")
    found["hit"] = ask("What is a trace?")
    upstream.script(Stream(interval_s=0.3, chunks=("A ", "trace ", "is ", "a ", "path.")))
    body = {"messages": [{"role": "user", "content": "Tell me."}], "stream": True}
    with calling(app, token, body) as caller:
        found["left"] = caller.request_id
        caller.event()
        caller.event()
        caller.event()
    _wait_for_line(app, found["left"])
    found["422"] = ask("", temperature="hot")
    for _ in range(2):
        upstream.script(*[Status(500)] * 4)
        failed = ask("What is a span?")
    found["failed"] = failed
    found["refused"] = ask("What is a span?")
    return found


def _wait_for_line(app: AppUnderTest, request_id: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not [line for line in app.lines(request_id) if line["message"] == "http_request_completed"]:
        assert time.monotonic() < end
        time.sleep(0.01)


if __name__ == "__main__":
    main()
