"""The latest requests of this process, in memory: their calls, and those that failed without a call.

It answers who asks what became of an id. It holds no prompt and no answer, is bounded in count and in bytes,
and nobody can fill it for others: a holder has at most half of a shelf.
"""

import json
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

from service.errors import ErrorFacts, Fault
from service.recording.record import CallRecord
from service.recording.request_key import RequestKey

MAX_REQUESTS: Final = 5_000
MAX_BYTES: Final = 4_194_304
"""Limits of the calls, and, apart from them, of the failed requests."""

STRANGERS_PART: Final = 8
"""Failed requests of nobody who is known have this part of the room, on a shelf of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRequest:
    """A request that was answered with an error, or whose caller left.

    Args:
        request_id: The trace id.
        incident_id: ``inc_`` and the server span's id.
        continued: Whether the trace is the caller's.
        started_ns: Unix time in nanoseconds.
        duration_s: Seconds from its arrival to the end of its answer.
        method: The HTTP method.
        route: The route's path; None where no route was found.
        status: The status that was sent; None where none was.
        error: What the answer said.
        auth_s: Seconds spent on authentication.
        called: Whether a model call was made.
        user: The caller; None where nothing proved who it was.
        team: The caller's team.
        key_id: The id of the caller's API key.
    """

    request_id: str
    incident_id: str
    continued: bool
    started_ns: int
    duration_s: float
    method: str
    route: str | None
    status: int | None
    error: ErrorFacts
    auth_s: float = 0.0
    called: bool = False
    user: str | None = None
    team: str | None = None
    key_id: str | None = None

    def as_line(self) -> bytes:
        """The request as JSON."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Parse what ``as_line`` has written."""
        read: dict[str, Any] = json.loads(line)
        error = read.pop("error")
        facts = {**error, "fault": Fault(error["fault"]), "fields": tuple(error["fields"])}
        return cls(error=ErrorFacts(**facts), **read)


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is known of one request: its call, that it failed, or both."""

    call: CallRecord | None
    failed: FailedRequest | None

    @property
    def user(self) -> str | None:
        """Whose request it was; None where nobody knows."""
        if self.call is not None:
            return self.call.user
        return self.failed.user if self.failed is not None else None

    @property
    def trace_id(self) -> str:
        """The request id."""
        if self.failed is not None:
            return self.failed.request_id
        return self.call.trace_id if self.call is not None else ""

    @property
    def continued(self) -> bool:
        """Whether other requests may have the same id."""
        return any(part.continued for part in (self.call, self.failed) if part is not None)

    @property
    def started_ns(self) -> int:
        """When it began, in Unix time."""
        return min(part.started_ns for part in (self.call, self.failed) if part is not None)


class RecentRequests:
    """The memory, used on the event loop only. It keeps lines of JSON, which no garbage collector visits.

    Args:
        max_requests: The most calls, and the most failed requests.
        max_bytes: The most bytes of each of the two.
    """

    def __init__(self, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES) -> None:
        self._calls = _Shelf(max_requests, max_bytes, max(1, max_requests // 2), max_bytes // 2)
        self._failed = _Shelf(max_requests, max_bytes, max(1, max_requests // 2), max_bytes // 2)
        of_strangers = max(1, max_requests // STRANGERS_PART), max_bytes // STRANGERS_PART
        self._strangers = _Shelf(*of_strangers, *of_strangers)

    def keep_call(self, record: CallRecord, line: bytes) -> None:
        """Keep a call that has ended.

        Args:
            record: The call.
            line: The record's line, which is kept as it is where it holds no prompt and no answer.
        """
        if record.prompt is not None or record.answer is not None:
            line = replace(record, prompt=None, answer=None).as_line()
        record_id = record.record_id
        self._calls.put(record.incident_id or record_id, record.trace_id, record_id, record.user, line)

    def keep_failed(self, failed: FailedRequest) -> None:
        """Keep a request that has failed."""
        shelf = self._strangers if failed.user is None else self._failed
        shelf.put(
            failed.incident_id, failed.request_id, failed.request_id, failed.user or "", failed.as_line()
        )

    def find(self, key: RequestKey) -> list[Remembered]:
        """All that is remembered of an id, oldest first."""
        calls = {incident: CallRecord.from_line(line) for incident, line in self._calls.find(key)}
        failed = {
            incident: FailedRequest.from_line(line)
            for shelf in (self._strangers, self._failed)
            for incident, line in shelf.find(key)
        }
        if key.kind == "record":
            # A failed request is found by its call, which alone has a record.
            failed = {incident: found for incident, found in failed.items() if incident in calls} | {
                incident: FailedRequest.from_line(line)
                for incident in calls.keys() - failed.keys()
                for line in self._failed.lines(incident)
            }
        found = [Remembered(calls.get(incident), failed.get(incident)) for incident in {**calls, **failed}]
        return sorted(found, key=lambda one: one.started_ns)


class _Shelf:
    """Lines by incident, of which the oldest make room for new ones.

    Args:
        max_lines: The most lines.
        max_bytes: The most bytes of them.
        holder_lines: The most lines of one holder.
        holder_bytes: The most bytes of one holder.
    """

    def __init__(self, max_lines: int, max_bytes: int, holder_lines: int, holder_bytes: int) -> None:
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._holder_lines = holder_lines
        self._holder_bytes = holder_bytes
        # By incident: the request id, the record id, the holder, the line.
        self._kept: OrderedDict[str, tuple[str, str, str, bytes]] = OrderedDict()
        self._by_request: dict[str, list[str]] = {}
        self._by_record: dict[str, str] = {}
        self._incidents: dict[str, deque[str]] = {}
        self._bytes: dict[str, int] = {}
        self._all_bytes = 0

    def put(self, incident: str, request_id: str, record_id: str, holder: str, line: bytes) -> None:
        """Keep a line; one that is larger than a holder's room is not kept."""
        if len(line) > self._holder_bytes or incident in self._kept:
            return
        own = self._incidents.setdefault(holder, deque())
        while own and (
            len(own) >= self._holder_lines or self._bytes.get(holder, 0) + len(line) > self._holder_bytes
        ):
            self._drop(own[0])
            own = self._incidents.setdefault(holder, deque())
        while self._kept and (
            len(self._kept) >= self._max_lines or self._all_bytes + len(line) > self._max_bytes
        ):
            self._drop(next(iter(self._kept)))
        self._kept[incident] = request_id, record_id, holder, line
        self._by_request.setdefault(request_id, []).append(incident)
        self._by_record[record_id] = incident
        self._incidents.setdefault(holder, deque()).append(incident)
        self._bytes[holder] = self._bytes.get(holder, 0) + len(line)
        self._all_bytes += len(line)

    def _drop(self, incident: str) -> None:
        """Forget a line, which is the oldest of its holder."""
        request_id, record_id, holder, line = self._kept.pop(incident)
        self._all_bytes -= len(line)
        self._bytes[holder] -= len(line)
        self._incidents[holder].popleft()
        if not self._incidents[holder]:
            del self._incidents[holder], self._bytes[holder]
        same = self._by_request[request_id]
        same.remove(incident)
        if not same:
            del self._by_request[request_id]
        if self._by_record.get(record_id) == incident:
            del self._by_record[record_id]

    def find(self, key: RequestKey) -> list[tuple[str, bytes]]:
        """The lines of an id, each with its incident, oldest first."""
        incidents: list[str]
        match key.kind:
            case "incident":
                incidents = [key.text]
            case "record":
                incidents = [self._by_record[key.digits]] if key.digits in self._by_record else []
            case _:
                incidents = self._by_request.get(key.digits, [])
        return [(incident, line) for incident in incidents for line in self.lines(incident)]

    def lines(self, incident: str) -> list[bytes]:
        """The line of an incident, if it is kept."""
        return [self._kept[incident][3]] if incident in self._kept else []
