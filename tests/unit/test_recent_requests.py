"""The memory of recent requests: what it forgets first, and that nobody can fill it for others."""

import dataclasses
from typing import Any

import pytest

from service.errors import InternalError
from service.recording.recent import FailedRequest, RecentRequests
from service.recording.record import CallRecord
from service.recording.request_key import RequestKey


def call(number: int, user: str = "user", **values: Any) -> CallRecord:
    given = {"continued": False, "model": "demo", "outcome": "success", "duration_s": 0.1, **values}
    return CallRecord(
        trace_id=f"{number:032x}",
        span_id=f"{number:016x}",
        operation="chat",
        started_ns=number,
        user=user,
        incident_id=f"inc_{number:016x}",
        **given,
    )


def failed(number: int, user: str | None = "user", **values: Any) -> FailedRequest:
    return FailedRequest(
        request_id=f"{number:032x}",
        incident_id=f"inc_{number:016x}",
        continued=False,
        started_ns=number,
        duration_s=0.1,
        method="POST",
        route="/llm/generate",
        status=500,
        error=InternalError().facts(),
        user=user,
        **values,
    )


def keep(recent: RecentRequests, *records: CallRecord) -> None:
    for record in records:
        recent.keep_call(record, record.as_line())


def knows(recent: RecentRequests, number: int) -> bool:
    found = [recent.find(RequestKey.parse(form.format(number))) for form in ("{:032x}", "inc_{:016x}")]
    assert [bool(each) for each in found] in ([True, True], [False, False])
    return bool(found[0])


def test_the_oldest_are_forgotten_first() -> None:
    recent = RecentRequests(max_requests=4)
    keep(recent, *(call(number, f"user {number}") for number in range(1, 7)))
    assert [number for number in range(1, 7) if knows(recent, number)] == [3, 4, 5, 6]


def test_one_user_forgets_their_own_and_never_those_of_others() -> None:
    recent = RecentRequests(max_requests=10)
    keep(recent, call(1, "quiet"), *(call(number, "loud") for number in range(2, 100)))
    for number in range(100, 200):
        recent.keep_failed(failed(number, "loud"))
    recent.keep_failed(failed(300, "quiet"))
    assert knows(recent, 1)
    assert [number for number in range(2, 100) if knows(recent, number)] == [95, 96, 97, 98, 99]
    assert [number for number in range(100, 200) if knows(recent, number)] == [195, 196, 197, 198, 199]
    assert knows(recent, 300)


def test_strangers_take_nothing_from_users() -> None:
    recent = RecentRequests(max_requests=16)
    recent.keep_failed(failed(1))
    for number in range(2, 100):
        recent.keep_failed(failed(number, None))
    assert knows(recent, 1)
    assert [number for number in range(2, 100) if knows(recent, number)] == [98, 99]


def test_bytes_are_bounded() -> None:
    size = len(call(1).as_line())
    recent = RecentRequests(max_bytes=4 * size)
    keep(recent, *(call(number, f"{number:04}") for number in range(10)))
    assert [number for number in range(10) if knows(recent, number)] == [6, 7, 8, 9]
    # One that is larger than a user's share is not kept, and takes nobody's place.
    keep(recent, call(20, "20", model="m" * 10 * size))
    assert not knows(recent, 20)
    assert knows(recent, 6)


def test_prompt_and_answer_are_not_kept() -> None:
    recent = RecentRequests()
    record = call(1, prompt="a prompt", answer="an answer")
    keep(recent, record)
    (found,) = recent.find(RequestKey("request", record.trace_id))
    assert found.call == dataclasses.replace(record, prompt=None, answer=None)


@pytest.mark.parametrize("continued", [False, True])
def test_a_failed_call_is_one_request_by_each_of_its_ids(continued: bool) -> None:  # noqa: FBT001 - a case
    recent = RecentRequests()
    record = call(1, continued=continued, outcome="error", error="InternalError")
    keep(recent, record)
    recent.keep_failed(failed(1, called=True))
    for key in (record.trace_id, str(record.incident_id), f"tr-{record.record_id}"):
        (found,) = recent.find(RequestKey.parse(key))
        assert (found.call, found.failed) == (record, failed(1, called=True)), key
    assert (f"tr-{record.trace_id}" == f"tr-{record.record_id}") is not continued
    if continued:
        assert recent.find(RequestKey.parse(f"tr-{record.trace_id}")) == []
