"""What is checked of a running stack: one function each, which says what it saw or raises AssertionError."""

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any, Final, NamedTuple

from deploy.api import experiment_of, sign_in
from deploy.env_file import COMPOSE
from tests.compose import images
from tests.compose.engine import lines_of, until
from tests.compose.stack import SLOW_S, Stack, is_reachable, kill, seconds
from tests.stack.sampling import in_share

_SPANS: Final = ("tempo-data", "blocks/spans.jsonl")
_LINES: Final = ("loki-data", "chunks/lines.jsonl")


class Called(NamedTuple):
    """A model call as its caller saw it."""

    status: int
    body: Any
    request_id: str


def call(stack: Stack, token: str, model: str = "demo") -> Called:
    """One chat completion."""
    question = {"model": model, "messages": [{"role": "user", "content": secrets.token_hex(8)}]}
    connection = HTTPConnection("127.0.0.1", stack.port("PORT"), timeout=60)
    try:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(question), headers)
        answer = connection.getresponse()
        return Called(answer.status, json.loads(answer.read()), answer.headers["X-Request-ID"])
    finally:
        connection.close()


def token_of(stack: Stack) -> str:
    """Sign in."""
    return sign_in(stack.port("PORT"), "user", stack.settings["AUTH_USER_PASSWORD"])


def users_and_rights(stack: Stack) -> str:
    """Each process has the numeric user of its image, no capability, no way to one, and bounded memory."""
    wanted = images.users(stack.services)
    for name in running(stack):
        process = stack.engine.process(stack.container(name))
        assert process.uids == {wanted[name]}, f"{name}: user {sorted(process.uids)}, not {wanted[name]}"
        assert process.capabilities == 0, f"{name}: capabilities {process.capabilities:x}"
        assert process.no_new_privileges, f"{name} may get new privileges"
        host = stack.engine.inspect(stack.container(name))["HostConfig"]
        assert host["Memory"] > 0, f"{name} has all memory"
    return ", ".join(f"{name} {wanted[name]}" for name in running(stack))


def roots(stack: Stack) -> str:
    """Where the file says so, the container's root is mounted read-only."""
    read_only = [name for name in running(stack) if stack.services[name].get("read_only")]
    for name in running(stack):
        found = stack.engine.process(stack.container(name)).root_is_read_only
        assert found == (name in read_only), f"{name}: read-only root {found}"
    return f"read-only: {', '.join(read_only)}"


def volumes(stack: Stack) -> str:
    """Each named volume can be written to by its service, and what it holds is the service's."""
    said = []
    for name in running(stack):
        for volume in stack.services[name].get("volumes", ()):
            if volume.startswith("./"):
                continue
            path = stack.volume(volume.split(":")[0])
            uid = images.users(stack.services)[name]
            if volume.startswith("mlflow-data:"):
                # Only artifacts come here, which no record has: the folder's owner has to do.
                assert path.stat().st_uid == uid, f"{name} may not write to its volume"
            else:
                until(lambda path=path: any(path.iterdir()), f"a file of {name}", 20)
            wrong = [found for found in path.iterdir() if found.stat().st_uid != uid]
            assert not wrong, f"{name}: {wrong[0].name} is not its own"
            said.append(f"{volume.split(':')[0]} {path.stat().st_uid}")
    return ", ".join(said)


def running(stack: Stack) -> list[str]:
    """The services that go on running."""
    return [name for name in stack.order() if name != "check"]


def ports(stack: Stack) -> str:
    """Published ports answer on the loopback address, and nowhere else."""
    published: dict[str, list[str]] = {}
    for name in running(stack):
        for found in stack.engine.inspect(stack.container(name))["HostConfig"]["PortBindings"].values():
            if found:  # else it is only a port that the image names
                published.setdefault(name, []).extend(one["HostIp"] for one in found)
    expected = {"api", "mlflow", "grafana"} & set(stack.services)
    assert set(published) == expected, f"published: {sorted(published)}"
    assert {ip for ips in published.values() for ip in ips} == {"127.0.0.1"}
    names = {"api": "PORT", "mlflow": "MLFLOW_PORT", "grafana": "GRAFANA_PORT"}
    outside = _own_address()
    for name in expected:
        port = stack.port(names[name])
        assert is_reachable("127.0.0.1", port), f"{name} does not answer"
        assert not is_reachable(outside, port), f"{name} answers on another address"
    return f"{', '.join(sorted(expected))} on 127.0.0.1, not on the machine's own address"


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


def kept(stack: Stack, volume: str, path: str) -> list[dict[str, Any]]:
    """What a stand-in has got so far."""
    file = stack.volume(volume) / path
    return lines_of(file.read_text(encoding="utf-8").splitlines()) if file.exists() else []


def signed_in_call(stack: Stack) -> str:
    """Signed in, the model answers; without a token, nobody does."""
    begun = time.monotonic()
    made = call(stack, token_of(stack))
    took_ms = (time.monotonic() - begun) * 1e3
    assert made.status == 200, made
    assert made.body["choices"][0]["message"]["content"]
    assert call(stack, "no-token").status == 401
    return f"200 in {took_ms:.0f} ms with signing in; 401 without a token"


def trace(stack: Stack) -> str:
    """One trace, with spans of the API and of LiteLLM, gets through the collector to where Tempo is."""
    token = token_of(stack)
    made = call(stack, token)
    while not in_share(made.request_id):  # the collector keeps one trace in five of those that went well
        made = call(stack, token)
    volume, path = _SPANS

    def found() -> set[str]:
        spans = kept(stack, volume, path)
        return {span["resource"]["service.name"] for span in spans if span["trace_id"] == made.request_id}

    both = {"llmops-api", "litellm"}
    took_s = until(lambda: found() >= both, "spans of the API and LiteLLM in one trace", 60)
    return f"spans of llmops-api and litellm under the call's id after {took_s:.0f} s"


def lines(stack: Stack) -> str:
    """The call's lines are on stdout and where Loki is, under its id."""
    made = call(stack, token_of(stack))
    own = [
        line
        for line in lines_of(stack.engine.logs(stack.container("api")))
        if line.get("request_id") == made.request_id
    ]
    assert own, "no line on stdout"
    volume, path = _LINES

    def found() -> int:
        records = kept(stack, volume, path)
        return sum(record["trace_id"] == made.request_id for record in records)

    until(lambda: found() >= len(own), f"{len(own)} records in Loki's place", 30)
    return f"{len(own)} on stdout, {found()} records in Loki's place"


def metrics(stack: Stack) -> str:
    """Prometheus has the call, by way of the collector, and scrapes everybody."""

    def value(query: str) -> list[float]:
        arguments = ("promtool", "query", "instant", "--format=json", "http://127.0.0.1:9090", query)
        said = stack.engine.podman(
            "exec", stack.container("prometheus"), f"/bin/{arguments[0]}", *arguments[1:], check=False
        )
        try:
            return [float(one["value"][1]) for one in json.loads(said)]
        except ValueError:
            return []

    query = 'sum(http_server_request_duration_seconds_count{http_route="/v1/chat/completions"})'
    until(lambda: sum(value(query)) >= 1, "the calls in Prometheus", 60)
    until(lambda: (up := value("up")) and min(up) == 1, "everybody scraped", 60)
    return f"{sum(value(query)):.0f} calls; {len(value('up'))} targets, all up"


def record(stack: Stack) -> str:
    """MLflow has the call's record."""
    made = call(stack, token_of(stack))
    took_s = until(lambda: experiment_of(stack.port("MLFLOW_PORT"), made.request_id), "the call's record", 30)
    page = HTTPConnection("127.0.0.1", stack.port("MLFLOW_PORT"), timeout=10)
    page.request("GET", "/")
    assert b"<div id=" in page.getresponse().read(), "MLflow's page is empty"
    page.close()
    return f"tr-<request id> after {took_s:.1f} s; its page is served"


def ask_postgresql(stack: Stack, user: str, password: str, database: str, query: str) -> str:
    """What the server says to a user who comes over the network with a password."""
    url = f"postgresql://{user}:{password}@postgres:5432/{database}"
    said = stack.engine.podman("exec", stack.container("postgres"), "psql", "-Atqc", query, url, check=False)
    return said.strip()


def databases(stack: Stack) -> str:
    """The API and MLflow have a database each; Grafana's user reads what was spent, and no hash of a key."""
    secret = stack.settings
    api, mlflow, grafana = (secret[f"POSTGRES_{name}_PASSWORD"] for name in ("API", "MLFLOW", "GRAFANA"))
    version = ask_postgresql(stack, "llmops", api, "llmops", "SELECT version_num FROM llmops_schema_version")
    assert version.isdigit(), version
    assert not list(stack.volume("api-data").glob("*.db")), "the API has a file, too"
    traces = ask_postgresql(stack, "mlflow", mlflow, "mlflow", "SELECT count(*) FROM trace_info")
    assert int(traces) >= 1, traces
    usage = ask_postgresql(stack, "grafana", grafana, "llmops", "SELECT sum(calls) FROM usage_by_day")
    assert int(usage) >= 1, usage
    keys = ask_postgresql(stack, "grafana", grafana, "llmops", "SELECT * FROM api_key_secrets")
    assert "permission denied" in keys, keys
    for user, password, database in (
        ("grafana", api, "llmops"),
        ("grafana", grafana, "mlflow"),
        ("mlflow", mlflow, "llmops"),
        ("llmops", api, "mlflow"),
        ("postgres", "postgres", "postgres"),
    ):
        said = ask_postgresql(stack, user, password, database, "SELECT 1")
        assert "FATAL" in said, f"{user} reads {database}: {said}"
    return (
        f"schema {version}, {usage} calls booked, {traces} traces; the hashes of keys are closed to Grafana"
    )


def without_postgresql(stack: Stack) -> str:
    """While PostgreSQL is away calls are answered, and their records are in MLflow when it is back."""
    token = token_of(stack)
    stack.engine.podman("stop", stack.container("postgres"))
    try:
        made = [call(stack, token) for _ in range(3)]
    finally:
        stack.engine.podman("start", stack.container("postgres"))
        stack.wait_healthy("postgres")
    assert {one.status for one in made} == {200}, made
    stack.wait_healthy("mlflow")
    port = stack.port("MLFLOW_PORT")
    took_s = until(
        lambda: all(experiment_of(port, one.request_id) for one in made), "the records in MLflow", 60
    )
    return f"3 calls got 200; all 3 in MLflow {took_s:.1f} s after it was back"


def stop_during_a_call(stack: Stack) -> str:
    """A call in flight is answered; the container then ends by itself, with 0."""
    token = token_of(stack)
    answers: list[Called] = []
    caller = threading.Thread(target=lambda: answers.append(call(stack, token, "slow")))
    caller.start()
    time.sleep(SLOW_S / 5)  # so that it is with the model; how far it is does not matter
    begun = time.monotonic()
    try:
        said = stack.compose("stop", "api")
        took_s = time.monotonic() - begun
        caller.join()
        state = stack.engine.inspect(stack.container("api"))["State"]
    finally:
        stack.engine.podman("start", stack.container("api"))
        stack.wait_healthy("api")
    limit_s = seconds(stack.services["api"]["stop_grace_period"])
    assert answers, "the call got no answer"
    assert answers[0].status == 200, answers
    assert state["ExitCode"] == 0, f"exit status {state['ExitCode']}; {said[-300:]}"
    assert took_s < limit_s, f"{took_s:.1f} s of {limit_s:.0f}"
    assert took_s > SLOW_S / 2, f"it did not wait for the call: {took_s:.1f} s"
    return f"the call got 200, the container ended with 0 after {took_s:.1f} s of {limit_s:.0f}"


def kill_and_replay(stack: Stack) -> str:
    """What was answered while MLflow was away and the process was killed is in MLflow in the end."""
    token = token_of(stack)
    stack.engine.podman("stop", stack.container("mlflow"))
    made = [call(stack, token) for _ in range(5)]
    assert {one.status for one in made} == {200}, made
    spool = stack.volume("api-data") / "spool"
    waiting = "".join(path.read_text() for path in spool.glob("*.jsonl"))
    assert all(one.request_id in waiting for one in made), "not every record waits on the volume"
    before = stack.engine.inspect(stack.container("api"))["State"]["Pid"]
    kill(stack.child_pid("api"))

    def restarted() -> bool:
        state = stack.engine.inspect(stack.container("api"))["State"]
        return bool(state["Running"] and state["Pid"] != before)

    until(restarted, "the engine to start the API again", 30)
    assert not stack.engine.succeeds("healthcheck", "run", stack.container("api")), "ready without MLflow"
    stack.engine.podman("start", stack.container("mlflow"))
    stack.wait_healthy("mlflow")
    stack.wait_healthy("api")
    port = stack.port("MLFLOW_PORT")
    took_s = until(
        lambda: all(experiment_of(port, one.request_id) for one in made), "the records in MLflow", 60
    )
    until(lambda: not list(spool.glob("*.jsonl")), "an empty spool", 30)
    return f"5 calls without MLflow, killed, started again by the engine; all 5 there {took_s:.1f} s later"


def litellm_is_quiet(stack: Stack) -> str:
    """Where nobody collects spans, LiteLLM prints none."""
    container = stack.container("litellm")
    before = len(stack.engine.logs(container))
    assert call(stack, token_of(stack)).status == 200
    time.sleep(6)  # longer than its batches wait
    after = stack.engine.logs(container)[before:]
    spans = [line for line in after if '"trace_id"' in line or '"span_id"' in line]
    assert not spans, f"{len(after)} lines after one call, {len(spans)} of them with ids of spans"
    return f"{len(after)} lines after one call"


def refuses_a_missing_secret(stack: Stack) -> str:
    """Without a required value podman-compose, like compose, does not begin."""
    for name in COMPOSE:
        if name == "COMPOSE_PROFILES" or f"${{{name}:?" not in json.dumps(stack.services):
            continue
        done = stack.engine.compose(stack.file, stack.project, {name: ""}, "config")
        assert done.returncode, f"{name} was not missed"
        assert f"Error: {name} must be set" in done.stdout, done.stdout[-300:]
    return "each by its name"


def refuses_a_published_secret(stack: Stack) -> str:
    """The check that runs before the API ends with 1 and says why."""
    environment = {
        **stack.settings,
        "JWT_SECRET_KEY": "change-me-in-production-change-me-in-production",
        "AUTH_USER_PASSWORD": "password",
    }
    names = [name for name in environment if name.startswith(("JWT", "AUTH", "LITELLM"))]
    given = [argument for name in names for argument in ("--env", f"{name}={environment[name]}")]
    image = stack.services["check"]["image"]
    arguments = (
        "run",
        "--rm",
        "--network",
        "none",
        "--read-only",
        "--cap-drop",
        "ALL",
        *given,
        f"localhost/{image}",
    )
    assert not stack.engine.succeeds(*arguments, "check"), "accepted"
    said = stack.engine.podman(*arguments, "check", check=False)
    for expected in ("JWT_SECRET_KEY must be set and different from default", "AUTH_USER_PASSWORD"):
        assert expected in said, said[-500:]
    return "published JWT_SECRET_KEY and password, each with its sentence"


Check = Callable[[Stack], str]
COMMON: Final[dict[str, Check]] = {
    "numeric users, no capabilities, bounded memory": users_and_rights,
    "read-only roots": roots,
    "who owns the volumes": volumes,
    "ports": ports,
    "a signed-in call": signed_in_call,
    "its record in MLflow": record,
    "users and databases of PostgreSQL": databases,
}
FULL: Final[dict[str, Check]] = {
    **COMMON,
    "its trace through the collector": trace,
    "its log lines": lines,
    "its metrics": metrics,
    "stop during a call": stop_during_a_call,
    "kill and replay": kill_and_replay,
    "PostgreSQL away": without_postgresql,
    "a missing secret is refused": refuses_a_missing_secret,
    "a published secret is refused": refuses_a_published_secret,
}
LITE: Final[dict[str, Check]] = {**COMMON, "LiteLLM prints no spans": litellm_is_quiet}
