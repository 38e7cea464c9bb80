"""Starting and stopping: the process serves, or says in JSON what is wrong and leaves."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.ports import unused_port
from service.config.env_validator import REQUIRED
from tests.e2e.support import decoded, generate, listens, run, stopped
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess, new_secrets
from tests.http.support import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.covered]

JWT_LINE = "Error: JWT_SECRET_KEY must be set and different from default"
EMPTY = {"PATH": os.environ["PATH"]}
COMPLETE = {**EMPTY, **{name.upper(): value for name, value in new_secrets().items()}}


def test_an_empty_environment_is_refused_with_every_problem_at_once(tmp_path: Path) -> None:
    port = unused_port()
    ended = run(tmp_path, {**EMPTY, "PORT": str(port)}, "-m", "service")

    assert ended.returncode == 1
    lines = decoded(ended.stdout)
    assert lines[0]["message"] == JWT_LINE
    assert [line["message"].split(" ")[1] for line in lines] == list(REQUIRED)
    assert {line["level"] for line in lines} == {"ERROR"}
    assert not ended.stderr
    assert not listens(port)


def test_check_says_the_same_and_exits(tmp_path: Path) -> None:
    refused = run(tmp_path, {**EMPTY, "CORS_ORIGINS": "*", "PORT": "many"}, "-m", "service")
    checked = run(tmp_path, {**EMPTY, "CORS_ORIGINS": "*", "PORT": "many"}, "-m", "service", "check")

    assert (checked.returncode, refused.returncode) == (1, 1)
    messages = [line["message"] for line in decoded(checked.stdout)]
    assert messages == [line["message"] for line in decoded(refused.stdout)]
    for name in (*REQUIRED, "CORS_ORIGINS", "PORT"):
        assert any(message.startswith(f"Error: {name}") for message in messages), name
    assert not checked.stderr


def test_check_of_a_valid_environment_exits_with_0_and_opens_nothing(tmp_path: Path) -> None:
    port = unused_port()
    ended = run(tmp_path, {**COMPLETE, "PORT": str(port)}, "-m", "service", "check")

    assert ended.returncode == 0
    assert [line["level"] for line in decoded(ended.stdout)] == ["INFO"]
    assert not ended.stderr
    assert not listens(port)


def test_no_line_of_a_refusal_repeats_a_value(tmp_path: Path) -> None:
    values = {name: f"canary{number}" for number, name in enumerate(REQUIRED)}
    ended = run(tmp_path, {**EMPTY, **values, "LLM_TIMEOUT_S": "canary"}, "-m", "service", "check")

    assert ended.returncode == 1
    assert "canary" not in ended.stdout + ended.stderr


def test_a_misspelt_variable_is_pointed_out(tmp_path: Path) -> None:
    ended = run(tmp_path, {**COMPLETE, "LITELM_URL": "http://127.0.0.1:1"}, "-m", "service", "check")

    assert ended.returncode == 0
    warnings = [line["message"] for line in decoded(ended.stdout) if line["level"] == "WARNING"]
    assert warnings == ["Warning: LITELM_URL is not a setting. Did you mean LITELLM_URL?"]


def test_check_warns_of_limits_that_each_worker_counts(tmp_path: Path) -> None:
    several = {**COMPLETE, "WORKERS": "2", "QDRANT_URL": "http://127.0.0.1:1"}
    ended = run(tmp_path, several, "-m", "service", "check")

    assert ended.returncode == 0
    (warning,) = [line["message"] for line in decoded(ended.stdout) if line["level"] == "WARNING"]
    assert warning.startswith("Warning: WORKERS=2 processes count by themselves.")
    assert "RATE_LIMIT" in warning


@pytest.mark.parametrize("arguments", [("-m", "service"), ("-m", "service", "check")])
def test_trust_in_every_proxy_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    port = unused_port()
    ended = run(tmp_path, {**COMPLETE, "FORWARDED_ALLOW_IPS": "*", "PORT": str(port)}, *arguments)

    assert ended.returncode == 1
    (line,) = decoded(ended.stdout)
    assert line["message"].startswith("Error: FORWARDED_ALLOW_IPS must not contain '*': ")
    assert not listens(port)


@pytest.mark.parametrize(("argument", "status"), [("swerve", 2), ("--swerve", 2), ("--help", 0)])
def test_the_command_line_speaks_json_too(tmp_path: Path, argument: str, status: int) -> None:
    ended = run(tmp_path, EMPTY, "-m", "service", argument)

    assert ended.returncode == status
    (line,) = decoded(ended.stdout + ended.stderr)
    assert "serve" in line["message"] or argument in line["message"]
    assert line["level"] == ("INFO" if status == 0 else "ERROR")


def test_an_env_file_in_the_working_directory_is_read(tmp_path: Path) -> None:
    lines = [f"{name.upper()}='{value}'" for name, value in new_secrets().items()]
    Path(tmp_path, ".env").write_text("\n".join(lines), encoding="utf-8")

    assert run(tmp_path, EMPTY, "-m", "service", "check").returncode == 0
    # The environment goes before the file.
    ended = run(tmp_path, {**EMPTY, "JWT_SECRET_KEY": "too short"}, "-m", "service", "check")
    assert ended.returncode == 1
    assert decoded(ended.stdout)[0]["message"].startswith(JWT_LINE)


def test_an_env_file_that_is_no_text_is_one_problem_in_json(tmp_path: Path) -> None:
    Path(tmp_path, ".env").write_bytes(b"JWT_SECRET_KEY=\xff\xfe")
    ended = run(tmp_path, COMPLETE, "-m", "service", "check")

    assert ended.returncode == 1
    assert [line["message"][:11] for line in decoded(ended.stdout)] == ["Error: .env"]
    assert not ended.stderr


def test_a_port_in_use_ends_the_process_with_json_lines() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        variables = {"PORT": str(taken.getsockname()[1])}
        with ServiceProcess(variables) as process:
            assert process.process
            assert process.process.wait(30) != 0
            lines = decoded(process.text())
    assert any(line["level"] == "ERROR" and "address" in line["message"] for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_signal_ends_the_process_in_order(upstream: FakeUpstream, number: signal.Signals) -> None:
    with ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        assert generate(process, process.token()).status == 200
        assert process.stop(number) == 0
        lines = decoded(process.text())

    assert lines[-1]["message"].startswith(("Graceful shutdown completed in ", "Finished server process"))
    assert any(line["message"].startswith("Graceful shutdown completed in ") for line in lines)
    assert not [line for line in lines if line["level"] in {"ERROR", "CRITICAL"}]
    assert not listens(process.port)


def test_two_workers_serve_and_stop(upstream: FakeUpstream) -> None:
    variables = {"WORKERS": "2", "QDRANT_URL": "http://127.0.0.1:6333", "LITELLM_URL": upstream.url}
    with ServiceProcess(variables) as process:
        process.wait_ready()
        eventually(lambda: process.text().count("Application startup complete") == 2, "both workers")
        token = process.token()
        answers = [generate(process, token) for _ in range(6)]
        lines = stopped(process)

    assert {answer.status for answer in answers} == {200}
    assert len({answer.request_id for answer in answers}) == len(answers)
    started = {line["message"] for line in lines if line["message"].startswith("Started server process")}
    assert len(started) == 2, "two process ids"
    assert sum(line["message"].startswith("Graceful shutdown completed") for line in lines) == 2
    assert not [line for line in lines if line["level"] in {"ERROR", "CRITICAL"}]
    assert not listens(process.port)


def test_several_workers_without_a_vector_store_of_their_own_are_refused(tmp_path: Path) -> None:
    ended = run(tmp_path, {**COMPLETE, "WORKERS": "2"}, "-m", "service")

    assert ended.returncode == 1
    (line,) = decoded(ended.stdout)
    assert line["message"].startswith("Error: WORKERS=2 needs a Qdrant server")


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_BSP_MAX_QUEUE_SIZE": "100"},
        {"OTEL_METRIC_EXPORT_INTERVAL": "0"},
        {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "abc"},
        {"OTEL_PROPAGATORS": "b3"},
    ],
)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_variable_that_the_sdk_refuses_is_refused(variables: dict[str, str], command: str) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", **variables}
    with ServiceProcess(variables, arguments=("-m", "service", command)) as process:
        assert process.process is not None
        assert process.process.wait(20) == 1
        assert process.lines()[-1]["level"] in {"ERROR", "CRITICAL"}


def test_a_credential_in_a_header_variable_that_is_wrong_is_not_quoted(upstream: FakeUpstream) -> None:
    variables = {
        "LITELLM_URL": upstream.url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_HEADERS": "Authorization: Bearer canary",
    }
    with ServiceProcess(variables) as process:
        process.wait_ready()
        assert process.stop() == 0
        process.lines()
        assert "canary" not in process.text()


def test_a_reader_of_stdout_that_stops_reading_stops_nobody_else(upstream: FakeUpstream) -> None:
    process = ServiceProcess({"LITELLM_URL": upstream.url})
    stuck, written = os.pipe()
    try:
        process.process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            env=process.environment,
            cwd=process.folder,
            stdout=written,
            stderr=subprocess.DEVNULL,
        )
        process.wait_ready()
        token = process.token()
        answers = {process.call("GET", "/auth/me", token=token).status for _ in range(600)}
        assert answers == {200}
        assert process.stop() == 0
    finally:
        os.close(stuck)
        os.close(written)
        process.__exit__()
