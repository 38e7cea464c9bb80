"""The HTTP calls of the demo: to the loopback address only, without a proxy."""

import json
import shlex
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any, Final, NamedTuple

from deploy.child import DemoError

HOST: Final = "127.0.0.1"
PROMPT: Final = "Say hello in one sentence."

_TIMEOUT_S: Final = 60  # longer than the service's own deadline of 30 s


class Answer(NamedTuple):
    """A decoded answer and its request id."""

    body: Any
    request_id: str


def is_up(port: int, path: str) -> bool:
    """Return whether a GET of the path is answered with 200."""
    connection = HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == HTTPStatus.OK
    except (HTTPException, OSError):
        return False
    finally:
        connection.close()


def sign_in(port: int, username: str, password: str) -> str:
    """Return an access token."""
    token: str = _post(port, "/auth/login", {"username": username, "password": password}).body["access_token"]
    return token


def generate(port: int, token: str) -> Answer:
    """Make the demo's one model call."""
    return _post(port, "/llm/generate", {"prompt": PROMPT}, token)


def curl_line(port: int, token: str) -> str:
    """Return the same call as a shell command."""
    return shlex.join(
        [
            *("curl", "-si", f"http://{HOST}:{port}/llm/generate"),
            *("-H", f"Authorization: Bearer {token}"),
            *("-H", "Content-Type: application/json"),
            *("-d", json.dumps({"prompt": PROMPT})),
        ]
    )


def make_key(port: int, token: str) -> str:
    """Make an API key, and return it."""
    key: str = _post(port, "/keys", {"name": "demo"}, token).body["key"]
    return key


def openai_lines(port: int, key: str) -> str:
    """Return how OpenAI's client library makes a call with a key."""
    return "\n".join(
        (
            f"export OPENAI_BASE_URL=http://{HOST}:{port}/v1 OPENAI_API_KEY={key}",
            "",
            "from openai import OpenAI",
            f'messages = [{{"role": "user", "content": {json.dumps(PROMPT)}}}]',
            'print(OpenAI().chat.completions.create(model="demo", messages=messages).choices[0].message)',
        )
    )


def experiment_of(port: int, request_id: str) -> str | None:
    """Return the id of the MLflow experiment with this call, or None while MLflow does not have the call."""
    connection = HTTPConnection(HOST, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", f"/api/3.0/mlflow/traces/tr-{request_id}")
        response = connection.getresponse()
        body = response.read()
        if response.status != HTTPStatus.OK:
            return None
        location = json.loads(body)["trace"]["trace_info"]["trace_location"]
        return str(location["mlflow_experiment"]["experiment_id"])
    except (HTTPException, OSError, ValueError, KeyError):
        return None
    finally:
        connection.close()


def trace_page(port: int, experiment: str, request_id: str) -> str:
    """Return the URL of the call's record in MLflow."""
    return f"http://{HOST}:{port}/#/experiments/{experiment}/traces?selectedEvaluationId=tr-{request_id}"


def request_page(port: int, token: str, request_id: str) -> bytes:
    """Return the page about a request."""
    path = f"/requests/{request_id}"
    connection = HTTPConnection(HOST, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}", "Accept": "text/html"})
        response = connection.getresponse()
        page = response.read()
    except (HTTPException, OSError) as error:
        raise DemoError(f"GET {path} failed: {error}") from error
    finally:
        connection.close()
    if response.status != HTTPStatus.OK:
        raise DemoError(f"GET {path} was answered with {response.status}")
    return page


def explain_line(port: int, token: str, request_id: str) -> str:
    """Return the shell command that prints what became of a request."""
    variables = f"LLMOPS_URL=http://{HOST}:{port} LLMOPS_TOKEN={token}"
    return f"{variables} .venv/bin/python -m service explain {request_id}"


def _post(port: int, path: str, body: object, token: str | None = None) -> Answer:
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = HTTPConnection(HOST, port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
        if response.status not in {HTTPStatus.OK, HTTPStatus.CREATED}:
            raise DemoError(f"POST {path} was answered with {response.status}: {text}")
        return Answer(json.loads(text), response.headers["X-Request-ID"])
    except (HTTPException, OSError, ValueError) as error:
        raise DemoError(f"POST {path} failed: {error}") from error
    finally:
        connection.close()
