"""The tail sampling of `otel/collector.yaml`, once more: which traces it must keep, and which it may not."""

import re
from typing import Any, Final

import yaml

from deploy.backends import OTEL
from tests.fakes.otlp import Span
from tests.stack.ledger import Entry

_PROCESSOR: Final[dict[str, Any]] = yaml.safe_load((OTEL / "collector.yaml").read_text(encoding="utf-8"))[
    "processors"
]["tail_sampling"]
_POLICIES: Final = {policy["name"]: policy for policy in _PROCESSOR["policies"]}
_SHARE: Final = _POLICIES["share"]["probabilistic"]
_SLOW_MS: Final[int] = _POLICIES["slow"]["latency"]["threshold_ms"]
_EVENTS: Final = re.compile(
    _POLICIES["events"]["ottl_condition"]["spanevent"][0].split('"')[1].replace(r"\\", "\\")
)


def in_share(trace_id: str) -> bool:
    """Whether a trace belongs to the share of the rest: FNV-1a of salt and id, as the processor does."""
    value = 0xCBF29CE484222325
    for byte in _SHARE["hash_salt"].encode() + bytes.fromhex(trace_id):
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return bool(value <= int((2**64 - 1) * _SHARE["sampling_percentage"] / 100))


def must_keep(entry: Entry) -> bool:
    """Whether what the caller saw says that the trace is kept: failed, refused, slow, or tried again."""
    return bool(entry.error) or entry.attempts > 1 or entry.seconds * 1_000 > _SLOW_MS


def justified(spans: list[Span]) -> bool:
    """Whether any policy keeps a trace with these spans."""
    took_ms = (max(span.end_ns for span in spans) - min(span.start_ns for span in spans)) / 1e6
    return (
        any(span.status == "ERROR" for span in spans)
        or took_ms > _SLOW_MS
        or any(_EVENTS.search(event.name) for span in spans for event in span.events)
        or any(
            span.kind == "SERVER" and int(span.attributes.get("http.response.status_code", 0)) >= 400
            for span in spans
        )
        or in_share(spans[0].trace_id)
    )
