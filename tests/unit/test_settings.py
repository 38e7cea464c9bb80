"""Where settings come from, and the range of each number."""

import os
import secrets
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.config.settings import Settings, env_file_values, prepare_environment, variable_names
from tests.harness import make_settings
from tests.unit.conftest import Read

NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation in {int, float}]


def _outside(name: str) -> tuple[str, str]:
    """A number right under the field's range, and one right over it."""
    field = Settings.model_fields[name]
    step = 1 if field.annotation is int else 0.001
    under = over = ""
    for end in field.metadata:
        for kind in ("ge", "gt", "le", "lt"):
            bound = getattr(end, kind, None)
            match kind:
                case _ if bound is None:
                    continue
                case "ge":
                    under = str(bound - step)
                case "gt":
                    under = str(bound)
                case "le":
                    over = str(bound + step)
                case "lt":
                    over = str(bound)
    return under, over


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_range_and_is_refused_outside_of_it(read: Read, name: str) -> None:
    variable = name.upper()
    under, over = _outside(name)
    assert under, f"{variable} has no lower end"
    assert over, f"{variable} has no upper end"
    for value in (under, over, "many", "nan", "inf", "-inf", "1 2"):
        (error,) = read(**{variable: value}).errors
        assert error.startswith(f"{variable} is not valid: input should be "), value
        assert error.endswith(".")


@pytest.mark.parametrize(
    ("name", "under", "over"),
    [
        ("PORT", "-1", "65536"),
        ("WORKERS", "0", "65"),
        ("JWT_TTL_S", "59", "86401"),
        ("JWT_LEEWAY_S", "-1", "61"),
        ("LLM_TIMEOUT_S", "0", "3601"),
        ("OTEL_TRACES_SAMPLER_ARG", "-0.1", "1.1"),
    ],
)
def test_these_ranges_are_meant(read: Read, name: str, under: str, over: str) -> None:
    for value in (under, over):
        (error,) = read(**{name: value}).errors
        assert error.startswith(f"{name} is not valid: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOG_LEVEL", "LOUD"),
        ("TRUST_TRACEPARENT", "some"),
        ("OTEL_SDK_DISABLED", "perhaps"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_METRICS_EXPORTER", "prometheus"),
        ("OTEL_LOGS_EXPORTER", "console"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http"),
    ],
)
def test_a_value_outside_its_closed_set_is_refused(read: Read, name: str, value: str) -> None:
    (error,) = read(**{name: value}).errors
    assert error.startswith(f"{name} is not valid: input should be ")


def test_the_log_level_may_be_written_small(read: Read) -> None:
    settings = read(LOG_LEVEL="debug").settings
    assert settings is not None
    assert settings.log_level == "DEBUG"


def test_the_env_file_is_read_and_the_environment_wins_over_it(read: Read, folder: Path) -> None:
    (folder / ".env").write_text("PORT=1111\nDEFAULT_MODEL='from a file'\nHOST=\n", encoding="utf-8")
    settings = read(PORT="2222").settings
    assert settings is not None
    assert (settings.port, settings.default_model, settings.host) == (2222, "from a file", "127.0.0.1")


def test_an_empty_variable_counts_as_unset(read: Read) -> None:
    settings = read(PORT="", LITELLM_URL="").settings
    assert settings is not None
    assert (settings.port, settings.litellm_url) == (8000, "http://127.0.0.1:4000")


def test_a_variable_of_somebody_else_is_no_error(read: Read, folder: Path) -> None:
    (folder / ".env").write_text("GROQ_API_KEY=x\n", encoding="utf-8")
    assert read(SOMEBODY_ELSES="x").errors == ()


def test_settings_are_frozen() -> None:
    settings = make_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    assert settings.port == 8000


def test_settings_do_not_show_their_secrets() -> None:
    key = secrets.token_hex(8)
    settings = make_settings(litellm_api_key=key)
    shown = repr(settings) + str(settings) + settings.model_dump_json()
    for secret in (
        settings.litellm_api_key,
        settings.jwt_secret_key,
        settings.auth_admin_password,
        settings.auth_user_password,
    ):
        assert secret.get_secret_value() not in shown


def test_the_names_in_use_come_from_both_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".env").write_text("FROM_FILE=x\nEMPTY=\nBARE\n", encoding="utf-8")
    monkeypatch.setenv("FROM_ENVIRONMENT", "x")
    assert env_file_values() == {"FROM_FILE": "x"}
    assert {"FROM_FILE", "FROM_ENVIRONMENT"} <= variable_names()
    assert not {"EMPTY", "BARE"} & variable_names()


def test_what_the_otel_packages_read_themselves_is_put_into_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".env").write_text(
        "OTEL_EXPORTER_OTLP_HEADERS=from=file\nOTEL_BSP_SCHEDULE_DELAY=7\nLITELLM_URL=http://file\n",
        encoding="utf-8",
    )
    for name in ("OTEL_EXPORTER_OTLP_HEADERS", "GRPC_VERBOSITY", "LITELLM_URL"):
        monkeypatch.setenv(name, "remembered, so that it is put back")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http/dup")
    monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "remembered")
    monkeypatch.delenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "8")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "remembered")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")

    prepare_environment()

    assert os.environ["MALLOC_ARENA_MAX"] == "3"
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "131072"

    assert os.environ["OTEL_EXPORTER_OTLP_HEADERS"] == "from=file"
    assert os.environ["OTEL_BSP_SCHEDULE_DELAY"] == "8"
    assert os.environ["OTEL_SEMCONV_STABILITY_OPT_IN"] == "http/dup"
    assert os.environ["OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED"] == "true"
    assert os.environ["GRPC_VERBOSITY"] == "NONE"
    assert "OTEL_SDK_DISABLED" not in os.environ
    assert "LITELLM_URL" not in os.environ
