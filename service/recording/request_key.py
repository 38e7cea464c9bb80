"""The ids by which people ask for a request."""

import re
from dataclasses import dataclass
from typing import Final, Literal, Self

from service.recording.record import CallRecord

FORMS: Final = re.compile(
    r"(?P<request>[0-9a-f]{32})|inc_(?P<incident>[0-9a-f]{16})|tr-(?P<record>[0-9a-f]{32})"
)
PATTERN: Final = r"^(?:[0-9a-f]{32}|inc_[0-9a-f]{16}|tr-[0-9a-f]{32})$"


@dataclass(frozen=True, slots=True)
class RequestKey:
    """An id that somebody holds.

    Args:
        kind: ``request``: the ``X-Request-ID``, of which continued traces have several requests;
            ``incident``: the ``incident_id`` of an error; ``record``: a trace id in MLflow.
        digits: Its hexadecimal digits.
    """

    kind: Literal["request", "incident", "record"]
    digits: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an id; raises ``ValueError`` where it has none of the three forms."""
        found = FORMS.fullmatch(text)
        if found is None:
            raise ValueError("must be 32 hex digits, inc_ and 16, or tr- and 32")
        return next(cls(kind, digits) for kind, digits in found.groupdict().items() if digits)  # type: ignore[arg-type]  # the groups' names

    @property
    def text(self) -> str:
        """The id as it is written."""
        return {"request": "", "incident": "inc_", "record": "tr-"}[self.kind] + self.digits

    def names(self, record: CallRecord) -> bool:
        """Whether it is an id of this call."""
        match self.kind:
            case "request":
                return record.trace_id == self.digits
            case "incident":
                return record.incident_id == self.text
            case _:
                return record.record_id == self.digits
