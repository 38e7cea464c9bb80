"""The ledger, MLflow and the callers count the same, whatever is killed in between."""

from pathlib import Path

import pytest

from tests.bench.money import run, table
from tests.e2e.recording import kill, variables
from tests.e2e.servers import MlflowServer
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, ServiceProcess

pytestmark = pytest.mark.e2e

TOKENS = 30
"""Of a call of the fake upstream."""


def test_a_budget_that_was_spent_before_a_kill_is_spent_after_it(
    upstream: FakeUpstream, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    """What a killed process had not yet booked counts for the first call of the next one."""

    def chat(process: ServiceProcess, key: str) -> Answer:
        body = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
        return process.call("POST", "/v1/chat/completions", body=body, token=key)

    mlflow.down()
    given = {
        **variables(upstream.url, mlflow.url, tmp_path / "spool"),
        "DATABASE_URL": f"sqlite:///{tmp_path}/own.db",
    }
    calls = 5
    with ServiceProcess(given) as first:
        first.wait_ready()
        budget = {"amount": calls * TOKENS, "unit": "tokens", "period": "month"}
        made = first.call(
            "POST", "/keys", body={"name": "app", "budget": budget}, token=first.token("admin")
        ).json
        assert [chat(first, made["key"]).status for _ in range(calls)] == [200] * calls
        kill(first)
    # The same secret: keys are hashed with it.
    again = {**given, "JWT_SECRET_KEY": first.environment["JWT_SECRET_KEY"]}
    with ServiceProcess(again) as second:
        second.wait_ready()
        refused = chat(second, made["key"])
        assert (refused.status, refused.json["error"]["type"]) == (429, "BudgetExceededError")
        usage = second.call("GET", "/usage", token=made["key"]).json["total"]
        assert usage["calls"] == calls


@pytest.mark.timeout(240)
def test_the_money_adds_up_over_a_kill(tmp_path: Path) -> None:
    """A small `make money`: callers, MLflow and the ledger have the same calls, tokens and costs."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    with MlflowServer(folder) as server:
        result = run(tmp_path, server, f"sqlite:///{tmp_path}/own.db", calls=400, kills=1, seed=0)
    assert result.problems == [], "\n".join(table(result))
