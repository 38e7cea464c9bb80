"""The pieces of `make demo`: its .env, its ports, the processes it starts, the log lines it shows."""

import shlex
import socket
import sys
from pathlib import Path

import pytest

from deploy import env_file
from deploy.api import HOST, curl_line, is_up
from deploy.child import Child, DemoError
from deploy.demo import free_port, litellm_environment, log_lines


def test_an_absent_env_file_is_made_with_every_secret_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / ".env"

    added = env_file.complete(path)

    values = env_file.read(path)
    assert added == list(env_file.REQUIRED) == list(values)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(values["JWT_SECRET_KEY"].encode()) >= 32
    assert values["LITELLM_API_KEY"].startswith("sk-")


def test_secrets_differ_from_file_to_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    env_file.complete(one)
    env_file.complete(other)

    assert not set(env_file.read(one).values()) & set(env_file.read(other).values())


def test_a_complete_env_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    env_file.complete(path)
    path.chmod(0o640)
    before = path.read_bytes()

    assert env_file.complete(path) == []
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("end", ["\n", ""])
def test_only_what_is_missing_is_appended(tmp_path: Path, end: str) -> None:
    path = tmp_path / ".env"
    written = f"# mine\nAUTH_USER_PASSWORD='my own'\nJWT_SECRET_KEY=\nGROQ_API_KEY=gsk{end}"
    path.write_text(written, encoding="utf-8")

    added = env_file.complete(path)

    values = env_file.read(path)
    assert added == ["JWT_SECRET_KEY", "AUTH_ADMIN_PASSWORD", "LITELLM_API_KEY"]
    assert path.read_text(encoding="utf-8").startswith(written)
    assert values["AUTH_USER_PASSWORD"] == "my own"  # noqa: S105 - the value written above
    assert values["GROQ_API_KEY"] == "gsk"
    assert values["JWT_SECRET_KEY"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_compose_needs_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("RATE_LIMIT=7/minute\nCOMPOSE_PROFILES=lite\n", encoding="utf-8")
    added = env_file.complete(path, env_file.COMPOSE, "make env")
    assert set(added) == set(env_file.COMPOSE) - {"COMPOSE_PROFILES"}
    values = env_file.read(path)
    assert values["RATE_LIMIT"] == "7/minute"
    assert values["COMPOSE_PROFILES"] == "lite"
    assert all(values[name] for name in env_file.COMPOSE)
    assert path.stat().st_mode & 0o777 == 0o600
    assert env_file.complete(path, env_file.COMPOSE, "make env") == []


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=b", "b"),
        ("  export A = b  ", "b"),
        ("A='b # c'", "b # c"),
        ('A="b" # c', "b"),
        ("A=b#c # d", "b#c"),
        ("A= # nothing", ""),
        ("A=b\nA=c", "c"),
    ],
)
def test_a_value_is_read_without_its_quotes_and_comment(tmp_path: Path, line: str, value: str) -> None:
    path = tmp_path / ".env"
    path.write_text(f"#A=no\n\n{line}\n", encoding="utf-8")

    assert env_file.read(path) == {"A": value}


def test_an_absent_env_file_sets_nothing(tmp_path: Path) -> None:
    assert env_file.read(tmp_path / ".env") == {}


def test_a_free_port_is_kept() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]

    assert free_port(port) == port


def test_another_port_is_chosen_when_one_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server((HOST, 0)) as server:
        taken = server.getsockname()[1]
        chosen = free_port(taken)

    assert chosen != taken
    assert capsys.readouterr().out == f"Port {taken} is taken; using {chosen}\n"


def test_nothing_is_up_on_a_port_without_a_server() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]

    assert not is_up(port, "/health")


def test_litellm_gets_the_keys_and_the_proxy_but_not_the_rest_of_the_shell() -> None:
    settings = {
        "DATABASE_URL": "another program's",
        "GROQ_API_KEY": "gsk",
        "HTTPS_PROXY": "http://proxy",
        "JWT_SECRET_KEY": "the service's",
        "NO_PROXY": "internal",
        "PATH": "/bin",
    }

    environment = litellm_environment(settings)

    assert environment.keys() & settings.keys() == {"GROQ_API_KEY", "HTTPS_PROXY", "NO_PROXY", "PATH"}
    assert environment["NO_PROXY"] == environment["no_proxy"] == "internal,127.0.0.1"


def test_the_curl_line_is_one_command_for_a_shell() -> None:
    words = shlex.split(curl_line(8123, "a.b.c"))

    assert words[:3] == ["curl", "-si", "http://127.0.0.1:8123/llm/generate"]
    assert "Authorization: Bearer a.b.c" in words
    assert words[-1] == '{"prompt": "Say hello in one sentence."}'


def test_the_log_lines_of_one_request_are_shown_as_they_stand(tmp_path: Path) -> None:
    mine, other = "4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32
    first = f'{{"message": "llm_request_started", "request_id": "{mine}"}}'
    last = f'{{"request_id":"{mine}","message":"llm_request_completed"}}'
    log = tmp_path / "service.log"
    log.write_text(
        "\n".join(
            [
                '{"message": "started"}',
                first,
                f'{{"request_id": "{other}", "message": "about {mine}"}}',
                f"not JSON: {mine}",
                '["a list"]',
                last,
                f'{{"request_id": "{mine}", "unfinish',
            ]
        ),
        encoding="utf-8",
    )

    assert log_lines(log, mine) == [first, last]


def test_a_process_that_ends_early_is_told_with_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import sys; print(*range(30), sep='\\n'); sys.exit(3)"
    with Child("It", [sys.executable, "-c", code], env={}, log=log, stop_timeout_s=30) as child:
        child.wait(30)
        with pytest.raises(DemoError, match=r"It ended with status 3\.") as failure:
            child.raise_if_ended()

    assert str(failure.value).endswith("\n  29")
    assert "\n  9\n" not in str(failure.value)


def test_a_command_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="It cannot be started"):
        Child("It", [str(tmp_path / "absent")], env={}, log=tmp_path / "log", stop_timeout_s=30)


@pytest.mark.parametrize(
    ("first", "stop_timeout_s", "status"),
    [
        ("", 30, -15),
        ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); ", 0.2, -9),
    ],
    ids=["asked", "killed"],
)
def test_leaving_stops_the_process(tmp_path: Path, first: str, stop_timeout_s: float, status: int) -> None:
    log = tmp_path / "log"
    code = f"{first}import time; print('up', flush=True); time.sleep(60)"
    with Child("It", [sys.executable, "-c", code], env={}, log=log, stop_timeout_s=stop_timeout_s) as child:
        while "up" not in log.read_text(encoding="utf-8"):
            child.raise_if_ended()

    assert child.wait(0) == status
