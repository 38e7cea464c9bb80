"""What a request costs in function calls, which no busy machine changes: the guard of what was measured.

The numbers are written down as they were counted on Python 3.11. Where one changes by more than a fifth,
either way, look at why, and write the new one down together with what `make bench` says then.
"""

import asyncio
import statistics
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.app import create_app
from service.config.lifespan import lifespan_of
from service.config.logging import configure_logging
from service.telemetry.providers import Exporters, build_telemetry
from tests.bench.overhead import one_call
from tests.fakes.upstream import FakeUpstream
from tests.harness import make_settings, memory_log_exporter

if TYPE_CHECKING:
    from collections.abc import MutableMapping

CALLS = 15
WARM_UP = 10
FUNCTION_CALLS = {"asked": 8_163, "hit": 4_532}
"""Python's and C's, of one call of POST /llm/generate with all telemetry on, in the event loop's thread."""

MARGIN = 0.2


async def counted(url: str, *, cached: bool) -> float:
    """The median of the function calls of one call."""
    settings = make_settings(litellm_url=url, cache_enabled=cached, rate_limit="1000000/minute")
    exporters = Exporters(InMemorySpanExporter(), InMemoryMetricReader(), memory_log_exporter())
    telemetry = build_telemetry(settings, exporters)
    configure_logging("INFO", telemetry.logger_provider, _Nowhere())  # type: ignore[arg-type]  # a stream's half
    app = create_app(settings, telemetry)
    seen = []
    async with lifespan_of(settings, telemetry)(app) as state:
        session = await state["auth"].login("user", settings.auth_user_password.get_secret_value(), "test")
        values: MutableMapping[str, Any] = dict(state)
        for number in range(WARM_UP + CALLS):
            calls = 0

            def count(_frame: FrameType, event: str, _argument: object) -> None:
                nonlocal calls
                calls += event in {"call", "c_call"}

            sys.setprofile(count)
            try:
                await one_call(app, values, session.token)
            finally:
                sys.setprofile(None)
            if number >= WARM_UP:
                seen.append(calls)
    return statistics.median(seen)


class _Nowhere:
    def write(self, text: str) -> None:
        """Take it."""

    def flush(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("kind", FUNCTION_CALLS)
def test_a_call_costs_as_many_function_calls_as_are_written_down(kind: str, upstream: FakeUpstream) -> None:
    calls = asyncio.run(counted(upstream.url, cached=kind == "hit"))
    ratio = calls / FUNCTION_CALLS[kind]
    assert abs(ratio - 1) < MARGIN, f"{calls:.0f} instead of {FUNCTION_CALLS[kind]}"
