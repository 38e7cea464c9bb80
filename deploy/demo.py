"""`make demo`: starts the service, a LiteLLM proxy and an MLflow server, and makes one model call."""

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NoReturn

from deploy import api, env_file
from deploy.api import HOST
from deploy.child import Child, DemoError
from deploy.ports import unused_port

ROOT: Final = Path(__file__).resolve().parents[1]
LOGS: Final = ROOT / ".demo"

_SIGNALS: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_START_LIMIT_S: Final = 120
_POLL_S: Final = 0.2
_TRACE_LIMIT_S: Final = 20
# LiteLLM and MLflow inherit only these variables from the shell: a DATABASE_URL or NUM_WORKERS for another
# program would change their behaviour.
_INHERITED: Final = {"HOME", "LANG", "PATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"}
_LITELLM_INHERITS_ENDING: Final = ("_API_KEY", "_PROXY", "_proxy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 after success or a stop signal, and 1 after a failure."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the one call")
    parser.add_argument("--port", type=int, help="the service's port, when free (default: PORT, or 8000)")
    arguments = parser.parse_args(argv)
    obey_signals()
    try:
        run(arguments.port, {}, lambda _request_id: None, once=arguments.once)
    except DemoError as error:
        print(f"\nThe demo failed: {error}\nThe logs are in .demo/", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the output is gone; discard what Python has still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def obey_signals() -> None:
    """Install signal handlers that end the demo through its context managers."""
    for number in _SIGNALS:
        signal.signal(number, _leave)


def _leave(*_: object) -> NoReturn:
    """Ignore further signals, and end the demo through its context managers, which stop the children."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


def run(
    port: int | None, telemetry: Mapping[str, str], show_more: Callable[[str], None], *, once: bool
) -> None:
    """Start all programs, make the call, show it, and wait.

    Args:
        port: The preferred port of the service.
        telemetry: More variables for the service and LiteLLM; ``LITELLM_CONFIG`` names another configuration.
        show_more: Called with the request id of the call.
        once: Whether to stop after the one call.
    """
    if added := env_file.complete(ROOT / ".env"):
        _say(f"Wrote new secrets to .env: {', '.join(added)}")
    settings = env_file.read(ROOT / ".env") | {name: value for name, value in os.environ.items() if value}
    if settings["AUTH_USER_PASSWORD"].startswith("$argon2"):
        settings["AUTH_USER_PASSWORD"] = env_file.REQUIRED["AUTH_USER_PASSWORD"]()
        _say(f"AUTH_USER_PASSWORD is a hash; for this run it is {settings['AUTH_USER_PASSWORD']}")
    settings["PORT"] = str(free_port(port or int(settings.get("PORT", "8000"))))
    litellm_port = free_port(4000)
    settings["LITELLM_URL"] = f"http://{HOST}:{litellm_port}"
    mlflow_port = free_port(5000)
    settings["MLFLOW_TRACKING_URI"] = settings["MLFLOW_UI_URL"] = f"http://{HOST}:{mlflow_port}"
    LOGS.mkdir(exist_ok=True)

    with ExitStack() as stack:
        _say(f"Starting LiteLLM on {settings['LITELLM_URL']} (about 10 seconds; log: .demo/litellm.log)")
        litellm = stack.enter_context(_litellm(settings, litellm_port, telemetry))
        _say(f"Starting MLflow on {settings['MLFLOW_TRACKING_URI']} (log: .demo/mlflow.log)")
        mlflow = stack.enter_context(_mlflow(settings, mlflow_port))
        _say(f"Starting the service on http://{HOST}:{settings['PORT']} (log: .demo/service.log)")
        service = stack.enter_context(_service(settings, telemetry))
        stack.callback(_say, "\nStopping the service, MLflow and LiteLLM")
        children = (service, mlflow, litellm)
        _wait_until_up(service, int(settings["PORT"]), "/health", children)
        _wait_until_up(litellm, litellm_port, "/health/readiness", children)
        _wait_until_up(mlflow, mlflow_port, "/health", children)
        port = int(settings["PORT"])
        token = api.sign_in(port, "user", settings["AUTH_USER_PASSWORD"])
        request_id = _show_one_call(port, token, service.log)
        _show_record(mlflow_port, request_id)
        _show_page(port, token, request_id)
        show_more(request_id)
        if not once:
            _say(f"\nAll routes: http://{HOST}:{settings['PORT']}/docs (passwords: .env)")
            _say("Running until Ctrl-C")
            while True:
                _look_at(children)
                time.sleep(_POLL_S)


def _litellm(settings: Mapping[str, str], port: int, telemetry: Mapping[str, str]) -> Child:
    config = telemetry.get("LITELLM_CONFIG", str(ROOT / "deploy/litellm/config.yaml"))
    command = [str(ROOT / ".venv-litellm/bin/litellm"), "--config", config]
    exporting = {"LITELLM_OTEL_V2": "true", "OTEL_SERVICE_NAME": "litellm", **telemetry} if telemetry else {}
    return Child(
        "LiteLLM",
        [*command, "--host", HOST, "--port", str(port)],
        env={**litellm_environment(settings), **exporting},
        log=LOGS / "litellm.log",
        stop_timeout_s=10,
    )


def _mlflow(settings: Mapping[str, str], port: int) -> Child:
    data = LOGS / "mlflow"
    data.mkdir(exist_ok=True)
    return Child(
        "MLflow",
        [
            *(str(ROOT / ".venv-mlflow/bin/mlflow"), "server", "--host", HOST, "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{data}/mlflow.db", "--workers", "1"),
            *("--default-artifact-root", str(data / "artifacts")),
        ],
        env={
            **{name: value for name, value in settings.items() if name in _INHERITED},
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Without the scheduler of evaluations, which is seven more processes.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        log=LOGS / "mlflow.log",
        stop_timeout_s=10,
    )


def _service(settings: Mapping[str, str], telemetry: Mapping[str, str]) -> Child:
    decided = {*env_file.REQUIRED, "LITELLM_URL", "MLFLOW_TRACKING_URI", "MLFLOW_UI_URL", "PORT"}
    return Child(
        "The service",
        [sys.executable, "-m", "service"],
        env={
            **os.environ,
            **_past_proxies(settings),
            **{name: settings[name] for name in decided},
            **{name: value for name, value in telemetry.items() if name != "LITELLM_CONFIG"},
            "HOST": HOST,
        },
        log=LOGS / "service.log",
        stop_timeout_s=40,  # it may wait 30 s for requests in progress
    )


def litellm_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return LiteLLM's environment: API keys, proxies, and its own settings."""
    return {
        **{
            name: value
            for name, value in settings.items()
            if name in _INHERITED or name.endswith(_LITELLM_INHERITS_ENDING)
        },
        **_past_proxies(settings),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # the package's price list, without a download
        "LITELLM_MODE": "PRODUCTION",  # in the other mode it reads the .env above its folder
    }


def _past_proxies(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that exempt the loopback address from proxies."""
    exceptions = settings.get("NO_PROXY") or settings.get("no_proxy")
    value = f"{exceptions},{HOST}" if exceptions else HOST
    return {"NO_PROXY": value, "no_proxy": value}


def free_port(preferred: int) -> int:
    """Return the preferred port of the loopback address, or an unused one if it is taken."""
    try:
        with socket.create_server((HOST, preferred)):
            return preferred
    except OSError:
        port = unused_port()
        _say(f"Port {preferred} is taken; using {port}")
        return port


def _wait_until_up(child: Child, port: int, path: str, children: Sequence[Child]) -> None:
    limit = time.monotonic() + _START_LIMIT_S
    while not api.is_up(port, path):
        _look_at(children)
        if time.monotonic() > limit:
            raise DemoError(f"{child.name} is not ready after {_START_LIMIT_S} s. {child.last_lines()}")
        time.sleep(_POLL_S)
    _say(f"{child.name} is ready")


def _look_at(children: Sequence[Child]) -> None:
    for child in children:
        child.raise_if_ended()


def _show_one_call(port: int, token: str, log: Path) -> str:
    """Make the call, show it, and return its request id."""
    _say(f"\nA call that you can make, signed in as `user`:\n\n{api.curl_line(port, token)}")
    key = api.make_key(port, token)
    _say(f"\nAn API key of `user`, and OpenAI's client library with it:\n\n{api.openai_lines(port, key)}")
    answer = api.generate(port, token)
    _say(f"\nIts answer, just now:\n\n{json.dumps(answer.body, indent=2, ensure_ascii=False)}")
    _say(f"\nX-Request-ID: {answer.request_id}\n\nThe service's log lines of that request:\n")
    _say("\n".join(_settled_log_lines(log, answer.request_id)))
    return answer.request_id


def _show_record(port: int, request_id: str) -> None:
    """Wait until MLflow has the record, which is sent after the answer, and show its URL."""
    limit = time.monotonic() + _TRACE_LIMIT_S
    while (experiment := api.experiment_of(port, request_id)) is None:
        if time.monotonic() > limit:
            raise DemoError(f"MLflow does not have the call {request_id} after {_TRACE_LIMIT_S} s.")
        time.sleep(_POLL_S)
    page = api.trace_page(port, experiment, request_id)
    _say(f"\nIts record in MLflow, a tree of its cache look-up and its attempts:\n\n{page}")


def _show_page(port: int, token: str, request_id: str) -> None:
    """Write the page about the call to a file, and show where it is, and the command that prints the same."""
    page = LOGS / "request.html"
    page.write_bytes(api.request_page(port, token, request_id))
    _say(f"\nWhat became of it, on one page with a time line:\n\n{page.as_uri()}")
    _say(f"\nThe same in a terminal, for any id:\n\n{api.explain_line(port, token, request_id)}")


def _settled_log_lines(log: Path, request_id: str) -> list[str]:
    """Return the log lines of a request when no more arrive; the last may be written after the answer."""
    lines: list[str] = []
    for _ in range(10):
        earlier, lines = lines, log_lines(log, request_id)
        if lines and lines == earlier:
            break
        time.sleep(_POLL_S)
    return lines


def log_lines(log: Path, request_id: str) -> list[str]:
    """Return the unchanged lines of a JSON log that belong to one request."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if _request_id(line) == request_id]


def _request_id(line: str) -> object:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record.get("request_id") if isinstance(record, dict) else None


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
