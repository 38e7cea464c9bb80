"""Many callers who connect at the same moment: none waits while others have several turns."""

from dataclasses import replace

import pytest

from tests.bench.http_load import Load, Plan
from tests.bench.upstream import upstream
from tests.harness import ServiceProcess

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

CALLERS = 128
SECONDS = 2.0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_burst_of_connections_is_taken_at_once(workers: int) -> None:
    """Where one connection is taken each time around the loop, the last ones wait for two seconds."""
    with upstream() as port, Load() as load:
        url = f"http://127.0.0.1:{port}"
        variables = {
            "LITELLM_URL": url,
            "WORKERS": f"{workers}",
            "QDRANT_URL": url,
            "RATE_LIMIT": "1000000/minute",
            "MAX_IN_FLIGHT": "300",
        }
        with ServiceProcess(variables) as process:
            process.wait_ready()
            headers = [{"Authorization": f"Bearer {process.token()}"}]
            plan = Plan(process.port, "POST", "/llm/generate", headers, '{"prompt": "x"}', CALLERS, SECONDS)
            warm = load.measure(plan)
            # A slow machine gets the time for as many calls as a fast one makes.
            seconds = SECONDS * max(1.0, 8 * CALLERS / max(warm.calls, 1))
            measured = load.measure(replace(plan, seconds=seconds))
            assert process.stop() == 0
    assert not measured.failures
    assert measured.calls > 2 * CALLERS
    assert measured.p99_s < 5 * measured.p50_s
