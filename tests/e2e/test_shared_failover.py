"""Replicas that count in a cluster, or behind sentinels: a master that is killed costs no request."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from service.shared.news import NEWS
from service.shared.valkey import PREFIX
from tests.e2e.recording import until
from tests.e2e.support import generate
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess, new_secrets
from tests.valkey import ValkeyCluster, ValkeySentinels

pytestmark = pytest.mark.e2e

ALLOWED = 10
FAILOVER_LIMIT_S = 90.0


@pytest.mark.parametrize("kind", [lambda: ValkeyCluster(3, 1), ValkeySentinels], ids=["cluster", "sentinels"])
def test_a_master_that_is_killed_costs_no_request(
    upstream: FakeUpstream, kind: Callable[[], ValkeyCluster | ValkeySentinels]
) -> None:
    with kind() as servers, ExitStack() as stack:
        variables = {
            **{name.upper(): value for name, value in new_secrets().items()},
            "LITELLM_URL": upstream.url,
            "VALKEY_URL": servers.url,
            # A busy machine must not make a process count by itself.
            "VALKEY_TIMEOUT_S": "5",
            "RATE_LIMIT": "100000/hour",
            "LOGIN_FAILURES_PER_NAME": f"{ALLOWED}/hour",
            "LOGIN_FAILURES_PER_ADDRESS": "1000/hour",
        }
        one, other = [stack.enter_context(ServiceProcess(variables)) for _ in range(2)]
        for process in (one, other):
            process.wait_ready()
        token = one.token()

        def left(process: ServiceProcess) -> int:
            answer = generate(process, token)
            assert answer.status == 200, answer.body
            return int(answer.headers["ratelimit"].partition("r=")[2].partition(";")[0])

        def together() -> bool:
            found = [left(process) for process in (one, other, one, other)]
            return found == list(range(found[0], found[0] - 4, -1))

        def attempt(number: int) -> int:
            body = {"username": "nobody", "password": "wrong"}
            return (one, other)[number % 2].call("POST", "/auth/login", body=body).status

        assert together()
        for master in {each.port: each for each in map(servers.master_of, (PREFIX, NEWS.key))}.values():
            master.kill()
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda at: generate((one, other)[at % 2], token).status, range(60)))
            assert answers == [200] * 60
            until(together, "the processes count together", FAILOVER_LIMIT_S)
        # Nobody has tried this name before, so all of its window is there.
        assert [attempt(number) for number in range(2 * ALLOWED)] == [401] * ALLOWED + [429] * ALLOWED
        assert one.call("POST", "/auth/logout", token=token).status == 204
        until(
            lambda: other.call("GET", "/auth/me", token=token).status == 401,
            "the token to be refused",
            FAILOVER_LIMIT_S,
        )
        for process in (one, other):
            assert process.stop() == 0
            assert servers.url not in process.text()
