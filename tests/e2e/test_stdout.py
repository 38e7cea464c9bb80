"""Every line that the process ever writes, on either stream, is one JSON object."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import GENERATE, decoded, generate, stopped
from tests.fakes.upstream import FakeUpstream, Garbage, Silent, Status
from tests.harness import ServiceProcess
from tests.http.support import raw

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

BAD_SERVICE = Path(__file__).with_name("bad_service.py")
ROOT = Path(__file__).parents[2]


def test_a_whole_life_is_json_lines(upstream: FakeUpstream) -> None:
    variables = {
        "LITELLM_URL": upstream.url,
        "LLM_TIMEOUT_S": "0.5",
        "LLM_CONNECT_TIMEOUT_S": "0.2",
        "LOG_LEVEL": "DEBUG",
        "PYTHONPATH": str(ROOT),
        "PYTHONASYNCIODEBUG": "1",
        "PYTHONDEVMODE": "1",
    }
    with ServiceProcess(variables, arguments=(str(BAD_SERVICE),)) as process:
        process.wait_ready()
        token = process.token()
        upstream.script(Status(500), Garbage(), Silent())
        statuses = [generate(process, token).status for _ in range(4)]
        statuses += [
            process.call("GET", path).status
            for path in ("/nowhere", "/auth/me", "/docs", "/test/bug", "/test/warning", "/test/forgotten")
        ]
        statuses += [process.call("GET", path).status for path in ("/test/thread", "/test/finaliser")]
        raw(process.port, b"\x00\xff\r\n\r\n")
        raw(process.port, b"POST /auth/login HTTP/1.1\r\nContent-Length: 9\r\n\r\n{", limit_s=0.2)
        lines = stopped(process)

    assert statuses == [502, 502, 504, 200, 404, 401, 200, 500, 200, 200, 200, 200]
    assert one(lines, "Unhandled exception")["exception.type"] == "LookupError"
    assert "a warning\nin two lines" in one(lines, "a warning")["message"]
    assert one(lines, "a warning")["logger"] == "py.warnings"
    forgotten = one(lines, "Task exception was never retrieved")
    assert (forgotten["logger"], forgotten["exception.type"]) == ("asyncio", "LookupError")
    assert one(lines, "Uncaught exception in a thread")["exception.type"] == "ZeroDivisionError"
    assert one(lines, "Exception ignored")["exception.type"] == "LookupError"
    assert one(lines, "Graceful shutdown completed")


def one(lines: list[dict[str, Any]], message: str) -> dict[str, Any]:
    (found,) = [line for line in lines if message in line["message"]]
    return found


def test_what_breaks_outside_a_request_is_one_line_too() -> None:
    code = (
        "import sys; sys.argv = ['x', 'check'];"
        "from service.config.logging import configure_logging; configure_logging();"
        "import warnings; warnings.warn('early');"
        "raise SystemError('not caught\\nby anybody')"
    )
    with ServiceProcess(arguments=("-c", code)) as process:
        assert process.process
        assert process.process.wait(30) == 1
        lines = decoded(process.text())

    assert [line["level"] for line in lines] == ["WARNING", "CRITICAL"]
    assert lines[1]["exception.type"] == "SystemError"
    assert "not caught" in lines[1]["exception.stacktrace"]


def test_lines_of_one_request_have_its_ids(upstream: FakeUpstream) -> None:
    with ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        answer = generate(process, process.token(), headers={"X-Request-ID": "order-4711"}, body=GENERATE)
        lines = [line for line in stopped(process) if line.get("request_id") == answer.request_id]

    assert [line["message"] for line in lines] == [
        "llm_request_started",
        "llm_request_completed",
        "http_request_completed",
    ]
    for line in lines:
        assert line["trace_id"] == answer.request_id
        assert len(line["span_id"]) == 16
        assert (line["user"], line["client_request_id"]) == ("user", "order-4711")
