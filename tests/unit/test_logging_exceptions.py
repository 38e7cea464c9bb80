"""An exception in a line: whole outside a request, without anybody's input inside one."""

import logging
from collections.abc import Iterator

import pytest

from service.config.logging import MAX_TEXT_CHARS, exception_fields
from service.context import RequestContext, current_request
from service.errors import UpstreamError
from tests.unit.conftest import Lines

logger = logging.getLogger("test")


@pytest.fixture
def _in_a_request() -> Iterator[None]:
    token = current_request.set(RequestContext("1" * 32, "inc_" + "2" * 16))
    yield
    current_request.reset(token)


class _Logged:
    """Logs what its block raises."""

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> bool:
        logger.error("it_failed", exc_info=error)
        return True


def _choke(on: str) -> None:
    raise ValueError(f"cannot read {on!r}")


def test_outside_a_request_the_exception_is_whole(lines: Lines) -> None:
    with _Logged():
        _choke("the file")
    line = lines.one
    assert (line["level"], line["message"]) == ("ERROR", "it_failed")
    assert line["exception.type"] == "ValueError"
    assert "ValueError: cannot read 'the file'" in line["exception.stacktrace"]
    assert "in _choke" in line["exception.stacktrace"]


def test_a_type_outside_builtins_has_its_module(lines: Lines) -> None:
    with _Logged():
        raise UpstreamError
    assert lines.one["exception.type"] == "service.errors.UpstreamError"


@pytest.mark.usefixtures("_in_a_request")
def test_in_a_request_types_and_frames_stay_and_messages_go(lines: Lines) -> None:
    with _Logged():
        _choke("prompt " + "canary")
    line = lines.one
    assert line["exception.type"] == "ValueError"
    assert "in _choke" in line["exception.stacktrace"]
    assert 'raise ValueError(f"cannot read {on!r}")' in line["exception.stacktrace"]
    assert line["exception.stacktrace"].rstrip().endswith("ValueError")
    assert "prompt canary" not in lines.text


def _chained(*, explicitly: bool) -> None:
    try:
        _choke("can" + "ary")
    except ValueError as error:
        if explicitly:
            raise KeyError("can" + "ary") from error
        raise KeyError("can" + "ary")  # noqa: B904 - the implicit chain is what is shown


@pytest.mark.usefixtures("_in_a_request")
@pytest.mark.parametrize("explicitly", [True, False])
def test_in_a_request_the_chain_is_shown_without_messages(lines: Lines, explicitly: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    with _Logged():
        _chained(explicitly=explicitly)
    trace = lines.one["exception.stacktrace"]
    assert trace.index("in _choke") < trace.index("ValueError\n") < trace.index("KeyError\n")
    assert trace.count("in _chained") == 2
    assert "canary" not in lines.text


@pytest.mark.usefixtures("_in_a_request")
def test_in_a_request_a_cause_that_was_cut_off_stays_out(lines: Lines) -> None:
    with _Logged():
        try:
            _choke("x")
        except ValueError:
            raise KeyError("y") from None
    assert "in _choke" not in lines.one["exception.stacktrace"]


@pytest.mark.usefixtures("_in_a_request")
def test_in_a_request_a_group_is_shown_with_all_its_parts_without_messages(lines: Lines) -> None:
    parts: list[Exception] = []
    for fail in (_choke, lambda _text: _chained(explicitly=True)):
        try:
            fail("can" + "ary")
        except (ValueError, KeyError) as error:
            error.add_note("can" + "ary")
            parts.append(error)
    with _Logged():
        raise ExceptionGroup("can" + "ary", [ExceptionGroup("can" + "ary", parts), OSError("can" + "ary")])
    trace = lines.one["exception.stacktrace"]
    for expected in (
        "ExceptionGroup\n",
        "ValueError\n",
        "KeyError\n",
        "OSError\n",
        "in _choke",
        "in _chained",
    ):
        assert expected in trace
    assert "canary" not in lines.text


def test_a_very_long_trace_keeps_its_end() -> None:
    def recurse(depth: int) -> None:
        if depth:
            recurse(depth - 1)
        else:
            recurse_differently(150)

    def recurse_differently(depth: int) -> None:
        # Python folds a frame that repeats; two that take turns are written out.
        if depth:
            other(depth - 1)
        else:
            _choke("the end")

    def other(depth: int) -> None:
        recurse_differently(depth)

    with pytest.raises(ValueError, match="the end") as caught:
        recurse(3)
    for with_messages in (True, False):
        trace = exception_fields(caught.value, with_messages=with_messages)["exception.stacktrace"]
        assert len(trace) == MAX_TEXT_CHARS
        assert "in _choke" in trace


@pytest.mark.usefixtures("_in_a_request")
def test_exc_info_without_an_exception_is_no_field(lines: Lines) -> None:
    logger.error("said", exc_info=True)  # noqa: LOG014 - what a careless library does
    assert "exception.type" not in lines.one
    assert lines.one["message"] == "said"


def test_stack_info_is_a_field(lines: Lines) -> None:
    logger.info("said", stack_info=True)
    assert "test_stack_info_is_a_field" in lines.one["stack"]
