"""The whole report: every problem at once, nothing secret in it, and a word about misspelt names."""

import secrets
from pathlib import Path

import pytest
from opentelemetry.sdk import environment_variables

from service.config.settings import PASSED_THROUGH, Settings
from tests.unit.conftest import Read


def test_everything_that_is_wrong_is_reported_at_once(read: Read) -> None:
    short = secrets.token_hex(6)
    key = secrets.token_hex(12)
    wrong = {
        "PORT": "99999",
        "LOG_LEVEL": "LOUD",
        "JWT_TTL_S": "soon",
        "CORS_ORIGINS": "*,nowhere",
        "LITELLM_URL": f"http://key:{key}@host",
        "QDRANT_URL": "qdrant",
        "LOGIN_FAILURES_PER_NAME": "often",
        "LLM_TIMEOUT_S": "3",
        "LLM_CONNECT_TIMEOUT_S": "4",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "collector",
        "OTEL_TRACES_SAMPLER_ARG": "7",
        "AUTH_ADMIN_PASSWORD": None,
        "AUTH_USER_PASSWORD": short[:7],
        "JWT_SECRET_KEY": short,
    }
    report = read(**wrong)

    assert report.settings is None
    assert report.errors[0].startswith(
        "JWT_SECRET_KEY must be set and different from default: it is 12 bytes"
    )
    blamed = [error.split(" ", 1)[0] for error in report.errors]
    assert blamed.count("CORS_ORIGINS") == 2
    assert set(blamed) == set(wrong) - {"LLM_TIMEOUT_S"}
    assert len(blamed) == len(set(blamed)) + 1
    text = "\n".join(report.errors + report.warnings)
    assert short[:7] not in text
    assert key not in text


def test_a_value_that_is_refused_is_not_shown(read: Read) -> None:
    secret = secrets.token_hex(8)
    report = read(PORT=secret, WORKERS=secret, LOG_LEVEL=secret, OTEL_TRACES_SAMPLER=secret)
    assert len(report.errors) == 4
    assert secret not in "".join(report.errors)


def test_a_setting_that_is_no_number_is_not_blamed_twice(read: Read) -> None:
    # Its default, 5 s, would be too long beside this limit for the whole call.
    report = read(LLM_CONNECT_TIMEOUT_S="short", LLM_TIMEOUT_S="3")
    assert [error.split(" ", 1)[0] for error in report.errors] == ["LLM_CONNECT_TIMEOUT_S"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("JWT_SECRET_KY", "JWT_SECRET_KEY"),
        ("JWT_SECRET_KEYY", "JWT_SECRET_KEY"),
        ("JWT_SERCET_KEY", "JWT_SECRET_KEY"),
        ("JWT_SCRET_KYE", "JWT_SECRET_KEY"),
        ("JVT_SECRET_KEX", "JWT_SECRET_KEY"),
        ("AUTH_USER_PASSWORT", "AUTH_USER_PASSWORD"),
        ("LITELM_URL", "LITELLM_URL"),
        ("QDRANT_URI", "QDRANT_URL"),
        ("CORS_ORIGIN", "CORS_ORIGINS"),
        ("WORKRES", "WORKERS"),
        ("HOSST", "HOST"),
        ("PROT", "PORT"),
        ("OTEL_SERVICENAME", "OTEL_SERVICE_NAME"),
        ("OTEL_EXPORTER_OTLP_ENDPOINTS", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ("OTEL_RESOURCE_ATTRIBUTE", "OTEL_RESOURCE_ATTRIBUTES"),
        ("litelm_url", "LITELLM_URL"),
    ],
)
def test_a_misspelt_name_is_pointed_out(read: Read, name: str, meant: str) -> None:
    report = read(**{name: "value"})
    assert report.settings is not None
    assert f"{name} is not a setting. Did you mean {meant}?" in report.warnings


def test_a_misspelt_name_in_the_env_file_is_pointed_out(read: Read, folder: Path) -> None:
    (folder / ".env").write_text("LITELM_URL=http://host\n", encoding="utf-8")
    assert "LITELM_URL is not a setting. Did you mean LITELLM_URL?" in read().warnings


ORDINARY = ["PATH", "HOME", "HOSTNAME", "PWD", "OLDPWD", "LANG", "SHLVL", "USER", "TERM", "SHELL", "LOGNAME"]


def test_known_and_unrelated_names_are_passed_over(
    read: Read, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ORDINARY:
        monkeypatch.setenv(name, str(folder))
    own = [name.upper() for name in Settings.model_fields]
    for name in (*PASSED_THROUGH, "jwt_issuer"):
        monkeypatch.setenv(name, "x")
    unsuspected = {*ORDINARY, *PASSED_THROUGH, *own, "jwt_issuer"}
    assert [warning for warning in read().warnings if warning.split(" ", 1)[0] in unsuspected] == []


def test_the_standard_otel_names_are_passed_over(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in vars(environment_variables).values() if str(name).startswith("OTEL_")]
    assert len(names) > 30
    accepted_as_they_are = {name.upper() for name in Settings.model_fields}
    for name in names:
        if name not in accepted_as_they_are:
            monkeypatch.setenv(name, "1")
    assert [warning for warning in read().warnings if warning.startswith("OTEL_")] == []


@pytest.mark.parametrize("content", [b"LITELLM_URL=http://\xff\n", "LITELLM_URL=http://h\n".encode("utf-16")])
def test_an_env_file_that_is_not_utf8_is_one_problem(read: Read, folder: Path, content: bytes) -> None:
    (folder / ".env").write_bytes(content)
    report = read()
    assert report.settings is None
    assert report.errors == (".env cannot be read: UnicodeDecodeError. Make it a UTF-8 file.",)


def test_an_env_file_that_cannot_be_read_is_one_problem(read: Read, folder: Path) -> None:
    # A file that is there and whose reading fails, for root too.
    (folder / ".env").symlink_to("/proc/self/mem")
    report = read()
    assert report.settings is None
    assert report.errors == (".env cannot be read: OSError. Make it a UTF-8 file.",)
