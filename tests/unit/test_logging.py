"""What a line on stdout looks like, and that everything the process says becomes one."""

import asyncio
import enum
import gc
import json
import logging
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_span_id, format_trace_id

from service.config.logging import MAX_TEXT_CHARS, REQUEST_LOGGERS, timestamp
from service.context import RequestContext, current_request
from tests.unit.conftest import Lines

logger = logging.getLogger("somewhere.deep")


def test_a_line_has_the_required_fields_first(lines: Lines) -> None:
    logger.info("it_happened")
    assert list(lines.one) == ["timestamp", "level", "message", "logger"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines.one["timestamp"])
    assert (lines.one["level"], lines.one["message"], lines.one["logger"]) == (
        "INFO",
        "it_happened",
        "somewhere.deep",
    )


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (0.9999, "1970-01-01T00:00:00.999Z"),
        (1_768_471_800.25, "2026-01-15T10:10:00.250Z"),
        (951_782_400.007, "2000-02-29T00:00:00.007Z"),
    ],
)
def test_a_timestamp_is_utc_with_milliseconds(seconds: float, written: str) -> None:
    assert timestamp(seconds) == written


def test_a_timestamp_of_no_moment_is_now() -> None:
    before = timestamp()
    assert before <= timestamp() < "2200"


@pytest.mark.parametrize("name", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_levels_have_pythons_names(lines: Lines, name: str) -> None:
    logger.log(logging.getLevelNamesMapping()[name], "said")
    assert lines.one["level"] == name


@pytest.mark.parametrize(("level", "written"), [("INFO", 4), ("WARNING", 3), ("ERROR", 2)])
def test_what_is_below_the_level_is_not_written(level: str, written: int) -> None:
    lines = Lines()
    lines.configure(level)
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        logger.log(number, "said")
    assert len(lines.all) == written


def test_one_call_is_one_line_whatever_is_in_it(lines: Lines) -> None:
    logger.info("first\nsecond\r\nthird \x00 \x1b[31m %s", "ünï\ncode", extra={"where": "a\nb"})
    assert lines.text.count("\n") == 1
    assert lines.one["message"] == "first\nsecond\r\nthird \x00 \x1b[31m ünï\ncode"
    assert lines.one["where"] == "a\nb"


class _Colour(enum.IntEnum):
    RED = 3


def test_extra_fields_stand_in_the_line_in_their_order(lines: Lines) -> None:
    logger.info(
        "said",
        extra={"z": 1, "a": 2.5, "flag": True, "none": None, "list": [1, {"b": "c"}], "c": _Colour.RED},
    )
    assert list(lines.one.items())[4:] == [
        ("z", 1),
        ("a", 2.5),
        ("flag", True),
        ("none", None),
        ("list", [1, {"b": "c"}]),
        ("c", 3),
    ]


def test_what_json_cannot_hold_is_named_by_its_type_and_not_shown(lines: Lines) -> None:
    class Shy:
        def __repr__(self) -> str:
            return "canary"

    logger.info("said", extra={"bytes": b"canary", "shy": Shy(), "set": {1}, "inside": {"path": Path("x")}})
    line = lines.one
    assert (line["bytes"], line["shy"], line["set"]) == ("<bytes>", "<Shy>", "<set>")
    assert line["inside"]["path"] == "<PosixPath>"
    assert "canary" not in lines.text


def test_very_long_texts_are_cut(lines: Lines) -> None:
    logger.info("x" * 50_000, extra={"long": "y" * 50_000, "short": "z"})
    assert lines.one["message"] == "x" * MAX_TEXT_CHARS
    assert lines.one["long"] == "y" * MAX_TEXT_CHARS
    assert lines.one["short"] == "z"


def test_the_span_at_hand_is_in_the_line(lines: Lines) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    logger.info("outside")
    with tracer.start_as_current_span("outer") as span:
        logger.info("inside")
    context = span.get_span_context()
    outside, inside = lines.all
    assert "trace_id" not in outside
    assert inside["trace_id"] == format_trace_id(context.trace_id)
    assert inside["span_id"] == format_span_id(context.span_id)


def test_a_requests_facts_are_in_each_of_its_lines(lines: Lines) -> None:
    context = RequestContext("1" * 32, "inc_" + "2" * 16, client_request_id="theirs")
    token = current_request.set(context)
    logger.info("before the user is known")
    context.user = "somebody"
    logger.info("after")
    logger.info("of another", extra={"user": "another"})
    current_request.reset(token)
    logger.info("outside")

    before, after, other, outside = lines.all
    assert {line["request_id"] for line in (before, after, other)} == {"1" * 32}
    assert {line["incident_id"] for line in (before, after, other)} == {"inc_" + "2" * 16}
    assert {line["client_request_id"] for line in (before, after, other)} == {"theirs"}
    assert "user" not in before
    assert (after["user"], other["user"]) == ("somebody", "another")
    assert not {"request_id", "incident_id", "user", "client_request_id"} & set(outside)


@pytest.mark.parametrize("name", [name for name in REQUEST_LOGGERS if "." not in name])
def test_a_quiet_library_is_heard_from_warning_on(lines: Lines, name: str) -> None:
    for library in (logging.getLogger(name), logging.getLogger(f"{name}.inner")):
        level = library.level
        library.setLevel(logging.DEBUG)
        try:
            library.debug("body")
            library.info("url")
            library.warning("trouble")
        finally:
            library.setLevel(level)
    assert [(line["logger"], line["message"]) for line in lines.all] == [
        (name, "trouble"),
        (f"{name}.inner", "trouble"),
    ]


@pytest.mark.usefixtures("lines")
def test_no_record_is_made_of_what_no_line_shows() -> None:
    """To make one takes as long as to write it."""
    assert not any(logging.getLogger(f"{name}.inner").isEnabledFor(logging.INFO) for name in REQUEST_LOGGERS)
    record = logger.makeRecord("x", logging.INFO, "file", 1, "it_happened", (), None)
    assert (record.thread, record.process) == (None, None)


def test_a_library_with_a_similar_name_is_not_quiet(lines: Lines) -> None:
    logging.getLogger("httpx3").info("heard")
    assert lines.one["message"] == "heard"


def test_python_warnings_are_lines(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        lines.configure()  # inside, since catch_warnings takes the hook away
        warnings.warn("this is old", DeprecationWarning, stacklevel=1)
    assert (lines.one["logger"], lines.one["level"]) == ("py.warnings", "WARNING")
    assert "DeprecationWarning: this is old" in lines.one["message"]


def test_an_uncaught_exception_in_a_thread_is_a_line(lines: Lines) -> None:
    def fail() -> None:
        raise ValueError("broken in a thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert (lines.one["level"], lines.one["message"]) == ("ERROR", "Uncaught exception in a thread")
    assert lines.one["exception.type"] == "ValueError"
    assert "broken in a thread" in lines.one["exception.stacktrace"]


def test_a_thread_that_exits_is_no_line(lines: Lines) -> None:
    thread = threading.Thread(target=sys.exit, args=(3,))
    thread.start()
    thread.join()
    assert lines.all == []


def test_an_exception_in_a_finaliser_is_a_line(lines: Lines) -> None:
    class Bad:
        def __del__(self) -> None:
            raise ValueError("broken in a finaliser")

    Bad()
    gc.collect()
    assert (lines.one["level"], lines.one["exception.type"]) == ("ERROR", "ValueError")
    assert "broken in a finaliser" in lines.one["exception.stacktrace"]


def test_a_tasks_exception_that_nobody_took_is_a_line(lines: Lines) -> None:
    async def fail() -> None:
        raise ValueError("broken in a task")

    async def main() -> None:
        task = asyncio.create_task(fail())
        await asyncio.wait([task])
        del task
        gc.collect()

    asyncio.run(main())
    (line,) = [line for line in lines.all if line["level"] == "ERROR"]
    assert line["logger"] == "asyncio"
    assert line["message"].startswith("Task exception was never retrieved")
    assert line["exception.type"] == "ValueError"


def test_an_uncaught_exception_ends_the_process_with_a_line(folder: Path) -> None:
    program = (
        "from service.config.logging import configure_logging\n"
        "configure_logging()\n"
        "raise ValueError('broken to the end')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=folder,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == b""
    line = json.loads(ended.stdout)
    assert (line["level"], line["exception.type"]) == ("CRITICAL", "ValueError")
    assert "broken to the end" in line["exception.stacktrace"]
