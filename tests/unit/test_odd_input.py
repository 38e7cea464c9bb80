"""Odd input at every door: logs, the upstream's words, the environment."""

import asyncio
import gc
import io
import json
import logging
import secrets
from collections.abc import Callable

import pytest

from service.config.logging import configure_logging
from service.context import RequestContext, current_request
from service.upstream.errors import retry_after
from tests.unit.conftest import Lines, Read
from tests.unit.llm_answers import translated

logger = logging.getLogger("test")
GENERAL = "The model refused the request."


def test_in_a_request_a_part_raised_again_out_of_its_group_is_logged(lines: Lines) -> None:
    """The everyday ``except* / raise group.exceptions[0]``: the part's context is the group that holds it."""
    token = current_request.set(RequestContext("1" * 32, "inc_" + "2" * 16))
    try:
        try:
            raise ExceptionGroup("can" + "ary", [ValueError("can" + "ary")])  # noqa: TRY301 - the group's own frame is what is shown
        except ExceptionGroup as group:
            raise group.exceptions[0]  # noqa: B904 - the implicit chain is what is shown
    except ValueError:
        logger.exception("it_failed")
    finally:
        current_request.reset(token)
    assert lines.one["exception.type"] == "ValueError"
    assert "ExceptionGroup\n" in lines.one["exception.stacktrace"]
    assert "canary" not in lines.text


@pytest.mark.parametrize(
    "value",
    ["Thu, 15 Jan 2026 10:30:09 +99999999999999", "Thu, 99999999999999999999 Jan 2026 10:30:09 GMT"],
)
def test_a_retry_after_with_huge_numbers_says_nothing(value: str) -> None:
    assert retry_after(value) is None


def _written(say: Callable[[], None], encoding: str = "utf-8") -> list[dict[str, object]]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    configure_logging("DEBUG", stream=stream)
    say()
    return [json.loads(line) for line in raw.getvalue().decode().splitlines()]


def _circular() -> dict[str, object]:
    found: dict[str, object] = {}
    found["again"] = found
    return found


@pytest.mark.parametrize(
    ("say", "encoding"),
    [
        (lambda: logger.info("a file named \udcff"), "utf-8"),
        (lambda: logger.info("said", extra={"name_": "\ud800"}), "utf-8"),
        (lambda: logger.info("a few … dots"), "latin-1"),
        (lambda: logger.info("a few … dots"), "ascii"),
        (lambda: logger.info("line\u2028separator \x85"), "utf-8"),
        (lambda: logger.info("said", extra={"circle": _circular()}), "utf-8"),
        (lambda: logger.info("%d apples", "many"), "utf-8"),
        (lambda: logger.info("said", "too much"), "utf-8"),  # noqa: PLE1205 - the mistake is the point
    ],
    ids=["surrogate", "surrogate in extra", "latin-1", "ascii", "U+2028", "circle", "wrong args", "too many"],
)
def test_a_line_is_never_lost(say: Callable[[], None], encoding: str) -> None:
    (line,) = _written(say, encoding)
    assert {"timestamp", "level", "message", "logger"} <= set(line)


def test_an_extra_too_deep_for_json_does_not_reach_who_logged(lines: Lines) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    logger.info("said", extra={"deep": deep})
    assert lines.one["message"] == "said"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_has_not_is_no_broken_line(lines: Lines, number: float) -> None:
    logger.info("said", extra={"number": number, "inside": [number]})
    assert lines.one["message"] == "said"


def test_an_extra_field_cannot_take_a_required_fields_place(lines: Lines) -> None:
    logger.info("said", extra={"level": "x", "timestamp": "x", "logger": "x"})
    line = lines.one
    assert (line["level"], line["logger"]) == ("INFO", "test")
    assert line["timestamp"].endswith("Z")


def test_a_long_text_inside_an_extra_field_is_cut_too(lines: Lines) -> None:
    logger.info("said", extra={"inside": ["x" * 1_000_000]})
    assert len(lines.text) < 100_000


def test_a_lost_task_of_a_request_does_not_show_its_exceptions_message(lines: Lines) -> None:
    async def fail() -> None:
        raise ValueError("prompt " + "canary")

    async def main() -> None:
        current_request.set(RequestContext("1" * 32, "inc_" + "2" * 16))
        task = asyncio.create_task(fail())
        await asyncio.wait([task])
        del task
        gc.collect()

    asyncio.run(main())
    assert "Task exception was never retrieved" in lines.text
    assert "prompt canary" not in lines.text


@pytest.mark.parametrize("name", ["JWT_SECRET_KEY", "AUTH_USER_PASSWORD"])
def test_a_variable_that_is_not_utf8_is_a_problem_with_a_name(
    read: Read, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    value = b"".join(bytes([0x80 + number]) for number in range(40)).decode(errors="surrogateescape")
    (error,) = read(**{name: value}).errors
    assert error.startswith(f"{name} ")


@pytest.mark.parametrize("value", ["0/minute", "0 per hour"])
def test_a_rate_that_lets_nobody_in_is_refused(read: Read, value: str) -> None:
    assert len(read(LOGIN_FAILURES_PER_NAME=value).errors) == 1


@pytest.mark.parametrize("value", ["10/minute;5/hour", "10/minute,5/hour"])
def test_two_rates_are_refused_rather_than_one_of_them_dropped(read: Read, value: str) -> None:
    assert len(read(LOGIN_FAILURES_PER_NAME=value).errors) == 1


@pytest.mark.parametrize("cut", [1, 5, 20, 43])
def test_a_hash_that_was_cut_short_is_refused(read: Read, cheap_hash: Callable[[str], str], cut: int) -> None:
    (error,) = read(AUTH_USER_PASSWORD=cheap_hash(secrets.token_hex(8))[:-cut]).errors
    assert "is not a complete argon2 hash" in error


@pytest.mark.parametrize("tail", [" ", "!!!", "\n"])
def test_a_hash_with_something_behind_it_is_refused(
    read: Read, cheap_hash: Callable[[str], str], tail: str
) -> None:
    (error,) = read(AUTH_USER_PASSWORD=cheap_hash(secrets.token_hex(8)) + tail).errors
    assert "is not a complete argon2 hash" in error


def test_a_hash_that_the_shell_has_eaten_is_refused(read: Read) -> None:
    (error,) = read(AUTH_USER_PASSWORD="=19=65536,t=3,p=4").errors  # noqa: S106 - the rest of a hash
    assert error.startswith("AUTH_USER_PASSWORD ")


@pytest.mark.parametrize(
    "value",
    [
        "my-super-secret-jwt-key-0123456789",
        "TODO-set-a-real-secret-here-before-prod",
        "default-secret-key-for-everybody-01",
    ],
)
def test_more_placeholders_are_refused(read: Read, value: str) -> None:
    assert read(JWT_SECRET_KEY=value).settings is None


@pytest.mark.parametrize(
    "value", ["http://h\x7f", "http://exa\u00admple", "http://h?x=1", "http://h#x", "http://@h", "http://-"]
)
def test_more_that_is_no_base_url_is_refused(read: Read, value: str) -> None:
    assert len(read(LITELLM_URL=value).errors) == 1


@pytest.mark.parametrize("value", ["http://a:99999", "http://a:0", "https://a..b", "http://[::::]"])
def test_more_that_is_no_origin_is_refused(read: Read, value: str) -> None:
    assert len(read(CORS_ORIGINS=value).errors) == 1


@pytest.mark.parametrize(
    "inside",
    [
        "Cannot connect to host 10.2.3.4:443 ssl:default",
        "upstream litellm.internal.corp:4000 refused",
        "redis://cache:6379 is down",
        "postgresql+psycopg://db is down",
        "file C:\\app\\config.yaml",
        "<object at 0x7f3a5b>",
        "Authorization: Basic YTpi",
        "gsk_abcdef0123456789 is invalid",
        "key=AIzaSyabcdef",
        "password=hunter2",
    ],
)
def test_more_internals_never_appear(inside: str) -> None:
    assert translated(400, f"bad value: {inside}").message == GENERAL


@pytest.mark.parametrize(
    "text", ["bad \x1b[31mvalue", "bad\rvalue", "bad\u2028value", "bad\x00value", "bad\u202evalue"]
)
def test_a_reason_has_no_control_characters(text: str) -> None:
    assert translated(400, text).message.isprintable()


def test_an_escaped_echo_never_appears() -> None:
    prompt = "привет мир, это моя тайна"
    messages = [{"role": "user", "content": prompt}]
    assert translated(400, f"cannot answer {json.dumps(prompt)}", messages=messages).message == GENERAL


def test_an_empty_text_in_a_message_does_not_hide_the_reason() -> None:
    messages = [{"role": "assistant", "content": ""}, {"role": "user", "content": "What is a trace, please?"}]
    error = translated(400, "temperature is out of range", messages=messages)
    assert error.message == "The model refused the request: temperature is out of range"


def test_something_else_that_does_not_exist_is_no_unknown_model() -> None:
    error = translated(400, "The model's tool 'x' does not exist", known_model=True)
    assert error.message == "The model refused the request: The model's tool 'x' does not exist"
