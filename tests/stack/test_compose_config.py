"""docker-compose.yml as compose's own library reads it."""

import json
import subprocess
from typing import Any

import pytest

from deploy import env_file
from deploy.backends import BINARIES, ROOT

pytestmark = pytest.mark.stack

SECRETS = {name: f"{name.lower()}-of-a-test" for name in env_file.COMPOSE if name != "COMPOSE_PROFILES"}
LITE = {"api", "check", "litellm", "mlflow", "qdrant", "valkey", "postgres"}
FULL = LITE | {"collector", "tempo", "loki", "prometheus", "grafana"}


def config(*profiles: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `docker compose config` would say."""
    return subprocess.run(
        [str(BINARIES / "compose-config"), *profiles],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def loaded(*profiles: str, **variables: str) -> dict[str, Any]:
    """The project."""
    done = config(*profiles, **SECRETS, **variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_is_accepted_in_both_profiles() -> None:
    assert set(loaded("full")["services"]) == FULL
    assert set(loaded("lite")["services"]) == LITE
    assert set(loaded(COMPOSE_PROFILES="full")["services"]) == FULL


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_it_does_not_start_without_a_secret(name: str) -> None:
    done = config("full", **(SECRETS | {name: ""}))
    assert done.returncode == 1
    assert f"Error: {name} must be set" in done.stderr
    if name == "JWT_SECRET_KEY":
        assert "Error: JWT_SECRET_KEY must be set and different from default" in done.stderr


def test_a_setting_of_the_shell_reaches_the_service_and_others_stay_unset() -> None:
    environment = loaded("full", RATE_LIMIT="7/minute")["services"]["api"]["environment"]
    assert environment["RATE_LIMIT"] == "7/minute"
    assert environment["RETRY_MAX"] is None


def test_the_databases_are_the_containers_unless_others_are_given() -> None:
    services = loaded("lite")["services"]
    assert services["api"]["environment"]["DATABASE_URL"] == (
        "postgresql://llmops:postgres_api_password-of-a-test@postgres:5432/llmops"
    )
    assert services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"] == (
        "postgresql://mlflow:postgres_mlflow_password-of-a-test@postgres:5432/mlflow"
    )
    own = {"DATABASE_URL": "sqlite:////app/data/llmops.db", "MLFLOW_BACKEND_STORE_URI": "sqlite:////var/x.db"}
    given = loaded("lite", **own)["services"]
    assert given["api"]["environment"]["DATABASE_URL"] == own["DATABASE_URL"]
    assert given["check"]["environment"]["DATABASE_URL"] == own["DATABASE_URL"]
    assert given["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"] == own["MLFLOW_BACKEND_STORE_URI"]


def test_nothing_is_exported_where_nobody_listens() -> None:
    services = loaded("lite", OTEL_EXPORTER_OTLP_ENDPOINT="")["services"]
    assert services["api"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == ""
    litellm = services["litellm"]["environment"]
    assert litellm["OTEL_EXPORTER_OTLP_ENDPOINT"] == ""
    # Without an address LiteLLM's exporter is the console.
    assert litellm["OTEL_SDK_DISABLED"] == "true"
    given = loaded("full")["services"]["api"]["environment"]
    assert given["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"


@pytest.mark.parametrize("endpoint", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://elsewhere:4318"}])
def test_litellm_makes_spans_where_somebody_listens_unless_told_otherwise(endpoint: dict[str, str]) -> None:
    given = loaded("full", **endpoint)["services"]["litellm"]["environment"]
    assert given["OTEL_SDK_DISABLED"] != "true"
    told = loaded("full", OTEL_SDK_DISABLED="true", **endpoint)["services"]["litellm"]["environment"]
    assert told["OTEL_SDK_DISABLED"] == "true"


def test_the_flag_wins_over_the_profile_that_make_env_wrote() -> None:
    assert set(loaded("lite", COMPOSE_PROFILES="full")["services"]) == LITE
