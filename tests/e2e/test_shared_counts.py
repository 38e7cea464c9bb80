"""Replicas that share a Valkey server count as one, and go on without it."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.identity.database import prepare_database
from tests.e2e.recording import until
from tests.e2e.support import generate, to_collector
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess, make_settings, new_secrets
from tests.valkey import Valkey

pytestmark = pytest.mark.e2e

REPLICAS = 3
ALLOWED = 25
RATE = f"{ALLOWED}/hour"
BREAKER_LIMIT_S = 30.0


@dataclass
class Replicas:
    """Processes that share everything but their memory."""

    processes: list[ServiceProcess]
    admin: str

    def change(self, method: str, path: str, body: dict[str, Any]) -> Any:
        """Change something as the administrator."""
        answer = self.processes[0].call(method, path, body=body, token=self.admin)
        assert answer.status in {200, 201}, answer.body
        return answer.json

    def key(self, owner: str, **more: Any) -> str:
        """Make a key for a user."""
        return str(self.change("POST", "/keys", {"name": "client", "owner": owner, **more})["key"])

    def statuses(self, *keys: str) -> Counter[int]:
        """Call three times as often as is allowed, in all processes at once."""
        with ThreadPoolExecutor(12) as pool:
            made = [
                pool.submit(generate, self.processes[number % REPLICAS], keys[number // REPLICAS % len(keys)])
                for number in range(3 * ALLOWED)
            ]
            return Counter(call.result().status for call in made)

    def know(self, key: str) -> None:
        """Wait until all know the rate of the key's user or team."""
        for process in self.processes:
            until(
                lambda process=process: (  # type: ignore[misc]  # a default that binds
                    process.call("GET", "/auth/me", token=key).json["rate"]["limit"] == RATE
                ),
                "the change to be known",
            )


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    file = Path(tmp_path_factory.mktemp("shared"), "llmops.db")
    prepare_database(make_settings(database_url=f"sqlite:///{file}"))
    with FakeUpstream() as upstream, Valkey() as valkey, ExitStack() as stack:
        variables = {
            **{name.upper(): value for name, value in new_secrets().items()},
            "LITELLM_URL": upstream.url,
            "DATABASE_URL": f"sqlite:///{file}",
            "VALKEY_URL": valkey.url,
            # A busy machine must not make a process count by itself.
            "VALKEY_TIMEOUT_S": "10",
            "LOGIN_FAILURES_PER_NAME": "6/hour",
            "LOGIN_FAILURES_PER_ADDRESS": "12/hour",
            "FORWARDED_ALLOW_IPS": "127.0.0.1",
        }
        processes = [stack.enter_context(ServiceProcess(variables)) for _ in range(REPLICAS)]
        for process in processes:
            process.wait_ready()
        yield Replicas(processes, processes[0].token("admin"))
        for process in processes:
            assert process.stop() == 0
            lines = process.lines()
            assert [line for line in lines if line["logger"] == "service.shared.exchange"] == []
            assert "Closing Valkey connections..." in [line["message"] for line in lines]
            assert valkey.url not in process.text()


def test_a_users_rate_is_one_for_all_replicas(replicas: Replicas) -> None:
    replicas.change("PUT", "/users/anna", {"rate": RATE})
    keys = [replicas.key("anna") for _ in range(2)]
    replicas.know(keys[0])
    assert replicas.statuses(*keys) == {200: ALLOWED, 429: 2 * ALLOWED}


def test_a_teams_rate_is_one_for_all_replicas(replicas: Replicas) -> None:
    replicas.change("PUT", "/teams/blue", {"rate": RATE})
    for user in ("bert", "cora"):
        replicas.change("PUT", f"/users/{user}", {"team": "blue"})
    keys = [replicas.key(user) for user in ("bert", "cora")]
    for key in keys:
        replicas.know(key)
    assert replicas.statuses(*keys) == {200: ALLOWED, 429: 2 * ALLOWED}


def test_a_keys_rate_is_one_for_all_replicas_and_refused_calls_cost_its_user_nothing(
    replicas: Replicas,
) -> None:
    key, other = replicas.key("dora", rate=RATE), replicas.key("dora")
    assert replicas.statuses(key) == {200: ALLOWED, 429: 2 * ALLOWED}
    left = [
        process.call("GET", "/auth/me", token=other).json["rate"]["left"] for process in replicas.processes
    ]
    assert left == [6_000 - ALLOWED] * REPLICAS


def test_sign_ins_from_an_address_are_one_for_all_replicas(replicas: Replicas) -> None:
    def attempt(number: int) -> int:
        return (
            replicas.processes[number % REPLICAS]
            .call(
                "POST",
                "/auth/login",
                body={"username": f"nobody{number}", "password": "wrong"},
                headers={"X-Forwarded-For": "192.0.2.7"},
            )
            .status
        )

    with ThreadPoolExecutor(6) as pool:
        assert Counter(pool.map(attempt, range(30))) == {401: 12, 429: 18}


def test_failed_sign_ins_to_a_name_are_one_for_all_replicas(replicas: Replicas) -> None:
    found = [
        replicas.processes[number % REPLICAS]
        .call(
            "POST",
            "/auth/login",
            body={"username": "user", "password": "wrong"},
            headers={"X-Forwarded-For": "192.0.2.8"},
        )
        .status
        for number in range(9)
    ]
    assert found == [401] * 6 + [429] * 3


def test_the_process_goes_on_without_the_server_and_comes_back(
    upstream: FakeUpstream, receiver: OtlpReceiver
) -> None:
    with Valkey() as valkey:
        variables = {
            **to_collector(receiver),
            "LITELLM_URL": upstream.url,
            "VALKEY_URL": valkey.url,
            "VALKEY_TIMEOUT_S": "2",
            "HEALTH_INTERVAL_S": "0.5",
            "RATE_LIMIT": "1000/hour",
        }

        def is_up() -> bool:
            answer = process.call("GET", "/health/detailed")
            assert answer.json["details"]["valkey"]["required"] is False
            return bool(answer.json["checks"]["valkey"])

        with ServiceProcess(variables) as process:
            process.wait_ready()
            token = process.token()
            until(is_up, "Valkey to be seen")
            assert generate(process, token).headers["ratelimit"] == '"per-user";r=999;t=3600'
            receiver.wait_for(lambda it: it.value("llmops.shared.fallback") == 0)
            valkey.kill()
            answers = [generate(process, token) for _ in range(10)]
            assert [answer.status for answer in answers] == [200] * 10
            # What was counted there is counted here.
            assert answers[-1].headers["ratelimit"].startswith('"per-user";r=989;')
            receiver.wait_for(lambda it: it.value("llmops.shared.fallback") == 1)
            until(lambda: not is_up(), "the outage to be seen")
            assert process.call("POST", "/auth/login", body={"username": "x", "password": "y"}).status == 401
            valkey.start()
            until(is_up, "the recovery to be seen")
            until(
                lambda: generate(process, token).headers["ratelimit"] == '"per-user";r=999;t=3600',
                "the server to count",
                BREAKER_LIMIT_S,
            )
            receiver.wait_for(lambda it: it.value("llmops.shared.fallback") == 0)
            assert process.stop() == 0
            told = [
                (line["level"], line["event"])
                for line in process.lines()
                if line["logger"] == "service.shared.exchange"
            ]
        assert told == [
            ("WARNING", "llmops.shared.fallback.started"),
            ("INFO", "llmops.shared.fallback.ended"),
        ]
        (fallen,) = [log for log in receiver.logs() if "Valkey fails" in str(log)]
        (span,) = [one for one in receiver.spans(fallen.trace_id) if one.name == "POST /llm/generate"]
        assert "llmops.shared.fallback.started" in [event.name for event in span.events]
