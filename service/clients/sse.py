"""Server-sent events as bytes: where one ends, and what it carries (HTML standard, section 9.2)."""

import re
from collections.abc import Iterator

MAX_EVENT_BYTES = 4_194_304
"""Largest single event; a stream without an end of line would be kept whole otherwise."""

END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n|\r\n\n")
LINE_END = re.compile(rb"\r\n|\n|\r")
LONGEST_END = 4


class EventTooLargeError(ValueError):
    """An event is larger than anybody's."""


class EventDecoder:
    """Cuts a stream of bytes into whole events; what is cut off in the middle never comes out."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what has arrived; each event that is whole now, with the empty line that ends it.

        Raises:
            EventTooLargeError: An event does not end.
        """
        seen = max(0, len(self._rest) - LONGEST_END + 1)
        buffer = self._rest + data if self._rest else data
        start = 0
        while found := END_OF_EVENT.search(buffer, max(seen, start)):
            yield buffer[start : found.end()]
            start = found.end()
        self._rest = buffer[start:]
        if len(self._rest) > self._max_event_bytes:
            raise EventTooLargeError


def data_of(event: bytes) -> bytes:
    """The event's data: its ``data`` lines, joined; empty for a comment."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2:
        # One line and the empty one: nearly every event there is.
        return event[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in LINE_END.split(event) if line.startswith(b"data:")]
    return b"\n".join(lines).strip()


def comment(text: str) -> bytes:
    """A line that keeps a connection busy and that no reader takes for an event."""
    return b": " + text.encode() + b"\n\n"


def event(data: bytes, name: str | None = None) -> bytes:
    """One event; the data is one line."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"
