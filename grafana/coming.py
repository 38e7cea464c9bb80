"""Metrics of the contract that `service/telemetry/names.py` may not declare yet; where it does, it counts."""

from typing import Final

from service.telemetry import names
from service.telemetry.names import Metric

_KINDS: Final = ("exact", "semantic")
_RESULTS: Final = ("hit", "miss", "bypass", "error")
_CONTRACT: Final = (
    Metric(
        "llmops.cache.lookups",
        "counter",
        "{lookup}",
        "Look-ups in the response cache by how they ended",
        {"kind": _KINDS, "result": _RESULTS},
    ),
    Metric("llmops.cache.lookup.duration", "histogram", "s", "How long look-ups took", {"kind": _KINDS}),
    Metric(
        "llmops.cache.similarity",
        "histogram",
        "1",
        "Likeness of the nearest entry to what was asked, 1 for the same",
        {"kind": _KINDS},
    ),
    Metric("llmops.cache.saved_tokens", "counter", "{token}", "Tokens not paid for again", {"kind": _KINDS}),
)
_DECLARED: Final = {metric.name: metric for metric in names.METRICS}

CACHE_LOOKUPS, CACHE_LOOKUP_DURATION, CACHE_SIMILARITY, CACHE_SAVED_TOKENS = (
    _DECLARED.get(metric.name, metric) for metric in _CONTRACT
)
COMING: Final = tuple(metric for metric in _CONTRACT if metric.name not in _DECLARED)
