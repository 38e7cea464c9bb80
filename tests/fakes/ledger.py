"""A ledger in memory."""

from collections.abc import Sequence

from service.recording.delivery import NotBookedError
from service.recording.record import CallRecord


class FakeLedger:
    """Keeps what is taken and booked; refuses to book while ``fails``."""

    def __init__(self) -> None:
        self.taken: list[CallRecord] = []
        self.booked: dict[str, CallRecord] = {}
        self.fails = False

    def take(self, record: CallRecord) -> None:
        """Keep a record that was taken."""
        self.taken.append(record)

    def book(self, records: Sequence[CallRecord]) -> None:
        """Keep records that were booked."""
        if self.fails:
            raise NotBookedError
        self.booked.update({record.record_id: record for record in records})
