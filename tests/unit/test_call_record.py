"""A record and its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.recording.record import MAX_TRIES, TRACE_ID, AttemptRecord, CallRecord, read_records
from tests.unit.recording import lines, make_record, number_of

ANY_TEXT = st.text(st.sampled_from('a\u00e9\U0001f600\ud800\0\n\u2028"\\'), max_size=8)
"""Half characters too."""


ATTEMPTS = st.builds(
    AttemptRecord,
    started_s=st.floats(0, 100),
    duration_s=st.floats(0, 100),
    error=st.none() | ANY_TEXT,
    cause=st.none() | ANY_TEXT,
    status=st.none() | st.integers(100, 599),
    wait_s=st.floats(0, 100),
)


@given(
    user=ANY_TEXT,
    prompt=st.none() | ANY_TEXT,
    cost=st.none() | st.floats(0, 1e6),
    tokens=st.none() | st.integers(0, 10**300),
    streamed=st.booleans(),
)
def test_a_record_survives_its_line(
    user: str,
    prompt: str | None,
    cost: float | None,
    tokens: int | None,
    *,
    streamed: bool,
) -> None:
    record = make_record(
        user=user,
        prompt=prompt,
        cost=cost,
        prompt_tokens=tokens,
        streamed=streamed,
        shared=streamed,
        error=prompt,
    )
    line = record.as_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert CallRecord.from_line(line) == record


def test_none_is_left_out_and_fields_of_a_later_version_are_ignored() -> None:
    written = json.loads(make_record().as_line())
    assert "prompt" not in written
    assert "error" not in written
    assert "tries" not in written
    line = json.dumps({**written, "colour": "blue", "cost": 0.5}).encode()
    assert CallRecord.from_line(line) == make_record(cost=0.5)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5_000,
    ],
    ids=lambda line: repr(line[:8]),
)
def test_an_invalid_line_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        CallRecord.from_line(line)


@pytest.mark.parametrize(
    "changes",
    [
        {"trace_id": "abc"},
        {"trace_id": 5},
        {"trace_id": "4b f92f3577b34da6a3ce929d0e0e4736a"},
        {"span_id": "x" * 16},
        {"started_ns": "now"},
        {"started_ns": None},
        {"started_ns": -1},
        {"duration_s": "long"},
        {"duration_s": float("nan")},
    ],
)
def test_ids_and_times_are_required(changes: dict[str, Any]) -> None:
    written = json.loads(make_record().as_line())
    line = json.dumps({**written, **changes}).encode()
    with pytest.raises(ValueError, match="no record"):
        CallRecord.from_line(line)


@given(tries=st.lists(ATTEMPTS, max_size=3).map(tuple))
def test_attempts_survive_the_line(tries: tuple[AttemptRecord, ...]) -> None:
    record = make_record(tries=tries)
    assert CallRecord.from_line(record.as_line()) == record


LATER: list[object] = ["UpstreamError", None, 503, 1.5, "of a later version", {}]


def test_an_attempt_is_as_short_as_what_it_says_and_may_say_more_in_a_later_version() -> None:
    failed = AttemptRecord(
        started_s=0.25, duration_s=0.5, error="UpstreamError", cause="reset", status=503, wait_s=1.5
    )
    record = make_record(tries=(failed, AttemptRecord(started_s=2.25, duration_s=0.125)))
    written = json.loads(record.as_line())
    assert written["tries"] == [[0.25, 0.5, "UpstreamError", "reset", 503, 1.5], [2.25, 0.125]]
    read = CallRecord.from_line(json.dumps({**written, "tries": [[0.25, 0.5, *LATER]]}).encode())
    assert read.tries == (
        AttemptRecord(started_s=0.25, duration_s=0.5, error="UpstreamError", status=503, wait_s=1.5),
    )


def test_only_so_many_attempts_are_read() -> None:
    line = json.dumps({**json.loads(make_record().as_line()), "tries": [[0, 1]] * 10_000}).encode()
    assert len(CallRecord.from_line(line).tries) == MAX_TRIES


@pytest.mark.parametrize(
    "tries",
    [
        None,
        5,
        {},
        "text",
        [5],
        [None],
        ["text"],
        [{}],
        [[]],
        [[0.5]],
        [["now", 1]],
        [[0.5, -1]],
        [[float("nan"), 1]],
        [[0.5, 1, None, None, None, "long"]],
    ],
    ids=repr,
)
def test_a_line_with_attempts_of_another_shape_holds_no_record(tries: Any) -> None:
    line = json.dumps({**json.loads(make_record().as_line()), "tries": tries}).encode()
    with pytest.raises(ValueError, match=r"^no"):
        CallRecord.from_line(line)


EARLIER = (
    b'{"trace_id":"4bf92f3577b34da6a3ce929d0e0e0000","span_id":"0000000000000001","operation":"chat",'
    b'"started_ns":1760000000000000000,"duration_s":0.25,"user":"user","model":"demo","outcome":"success",'
    b'"attempts":2,"estimated":false,"streamed":false,"cache":"miss","continued":false}'
)


def test_a_line_of_an_earlier_version_is_a_record_without_attempts() -> None:
    assert CallRecord.from_line(EARLIER) == make_record(attempts=2, cache="miss")


def test_invalid_lines_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    torn = lines(9)[:-20]
    path.write_bytes(lines(1, 2) + b"invalid\n" + lines(3) + torn)
    records, invalid = read_records(path)
    assert [number_of(record) for record in records] == [1, 2, 3]
    # The call of a line that a crash cut off was never answered.
    assert invalid == 1


def test_a_last_line_without_its_line_feed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(lines(1, 2)[:-1])
    records, invalid = read_records(path)
    assert ([number_of(record) for record in records], invalid) == ([1, 2], 0)


def test_a_record_of_the_services_own_trace_has_its_id_and_of_a_callers_one_for_each_call() -> None:
    own = make_record()
    assert own.record_id == own.trace_id
    calls = [make_record(continued=True, span_id=f"{number:016x}") for number in range(1, 100)]
    ids = {call.record_id for call in calls}
    assert len(ids) == 99
    assert own.trace_id not in ids
    assert all(TRACE_ID.fullmatch(each) for each in ids)
    # A record that is sent again, or by another process, is the same one.
    assert {CallRecord.from_line(call.as_line()).record_id for call in calls} == ids


def test_a_record_of_an_earlier_version_keeps_the_id_under_which_it_may_have_been_sent() -> None:
    written = json.loads(make_record().as_line())
    written.pop("continued", None)
    record = CallRecord.from_line(json.dumps(written).encode())
    assert record.record_id == make_record().trace_id
