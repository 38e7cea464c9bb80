"""A record and its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.recording.record import TRACE_ID, CallRecord, read_records
from tests.unit.recording import lines, make_record, number_of

ANY_TEXT = st.text(st.sampled_from('a\u00e9\U0001f600\ud800\0\n\u2028"\\'), max_size=8)
"""Half characters too."""


@given(
    user=ANY_TEXT,
    prompt=st.none() | ANY_TEXT,
    cost=st.none() | st.floats(0, 1e6),
    tokens=st.none() | st.integers(0, 10**300),
    streamed=st.booleans(),
)
def test_a_record_survives_its_line(
    user: str, prompt: str | None, cost: float | None, tokens: int | None, *, streamed: bool
) -> None:
    record = make_record(
        user=user, prompt=prompt, cost=cost, prompt_tokens=tokens, streamed=streamed, error=prompt
    )
    line = record.as_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert CallRecord.from_line(line) == record


def test_none_is_left_out_and_fields_of_a_later_version_are_ignored() -> None:
    written = json.loads(make_record().as_line())
    assert "prompt" not in written
    assert "error" not in written
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
    del written["continued"]
    record = CallRecord.from_line(json.dumps(written).encode())
    assert record.record_id == make_record().trace_id
