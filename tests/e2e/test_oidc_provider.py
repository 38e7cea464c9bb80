"""Sign-in with the tokens of a real OpenID Connect provider: oidc-provider-mock, on Authlib and Flask.

Each start of it makes a new key, so a restart is a rotation. Its tokens do not name their key.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from deploy.ports import unused_port
from tests.e2e.support import stopped
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, ServiceProcess
from tests.http.support import eventually

pytestmark = pytest.mark.e2e

CLIENT = "llm-api"
BACK = "http://127.0.0.1:9/signed-in"
USERS = (
    {"sub": "alice", "groups": ["staff"], "team": "red"},
    {"sub": "olga", "groups": ["staff", "llm-admins"], "team": "ops"},
)
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}


class Provider:
    """The provider, on one port for all of its starts.

    Args:
        folder: Where its output is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._port = unused_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The issuer."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and wait until it serves."""
        users = [part for user in USERS for part in ("--user-claims", json.dumps(user))]
        with (self._folder / "provider").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "oidc_provider_mock", "--port", str(self._port), *users],
                cwd=self._folder,
                env={"PATH": os.environ["PATH"], "HOME": str(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        eventually(self._serves, "the provider to serve", 60)

    def stop(self) -> None:
        """Stop it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _serves(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "provider").read_text()
        try:
            return self._ask("GET", "/.well-known/openid-configuration")[0] == 200
        except ConnectionError:
            return False

    def _ask(self, method: str, path: str, form: dict[str, str] | None = None) -> tuple[int, str, bytes]:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            fields = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
            connection.request(method, path, urlencode(form) if form else None, fields)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Location", ""), answer.read()
        finally:
            connection.close()

    def sign_in(self, user: str, client: str = CLIENT) -> str:
        """Sign a user in for a client, as a browser and the client do it; the ID token."""
        asked = {
            "client_id": client,
            "redirect_uri": BACK,
            "response_type": "code",
            "scope": "openid profile",
        }
        status, location, body = self._ask("POST", f"/oauth2/authorize?{urlencode(asked)}", {"sub": user})
        assert status == 302, body
        (code,) = parse_qs(urlsplit(location).query)["code"]
        grant = {"grant_type": "authorization_code", "code": code, "redirect_uri": BACK, "client_id": client}
        status, _, body = self._ask("POST", "/oauth2/token", {**grant, "client_secret": "any"})
        assert status == 200, body
        return str(json.loads(body)["id_token"])


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    with Provider(tmp_path_factory.mktemp("provider")) as running:
        yield running


@pytest.fixture
def variables(upstream: FakeUpstream, provider: Provider) -> dict[str, str]:
    return {
        "LITELLM_URL": upstream.url,
        "OIDC_ISSUERS": provider.url,
        "OIDC_AUDIENCE": CLIENT,
        "OIDC_TEAM_CLAIM": "team",
        "OIDC_ADMIN_CLAIM": "groups",
        "OIDC_ADMIN_VALUES": "owners,llm-admins",
        # So that a failed fetch is repeated after half a second, and not after ten.
        "OIDC_JWKS_MAX_STALE_S": "1",
        "HEALTH_INTERVAL_S": "0.2",
    }


def me(process: ServiceProcess, token: str) -> Answer:
    return process.call("GET", "/auth/me", token=token)


def health(process: ServiceProcess) -> Any:
    return process.call("GET", "/health/detailed").json["checks"]


def test_users_of_the_provider_sign_in(variables: dict[str, str], provider: Provider) -> None:
    with ServiceProcess(variables) as process:
        process.wait_ready()
        alice, olga = provider.sign_in("alice"), provider.sign_in("olga")
        assert me(process, alice).json["username"] == f"{provider.url}#alice"
        assert [me(process, token).json["role"] for token in (alice, olga)] == ["user", "admin"]
        assert process.call("POST", "/v1/chat/completions", body=CHAT, token=alice).status == 200
        assert [process.call("DELETE", "/llm/cache", token=one).status for one in (alice, olga)] == [403, 200]
        assert health(process)["oidc"] is True

        # Of the same provider and the same user, for another program.
        refused = me(process, provider.sign_in("alice", "another-service"))
        assert refused.status == 401
        assert "another audience" in refused.json["message"]
        assert me(process, alice[:-4] + "AAAA").status == 401

        assert process.call("POST", "/auth/logout", token=alice).status == 204
        assert me(process, alice).status == 401
        assert me(process, provider.sign_in("alice")).status == 200
        lines = stopped(process)
    assert not [line for line in lines if line["level"] == "ERROR"]
    assert not any(alice.rpartition(".")[2] in json.dumps(line) for line in lines)


def test_a_provider_that_stops_and_comes_back_with_a_new_key(
    variables: dict[str, str], provider: Provider
) -> None:
    with ServiceProcess({**variables, "OIDC_JWKS_MAX_STALE_S": "3"}) as process:
        process.wait_ready()
        old = provider.sign_in("alice")
        assert me(process, old).status == 200
        provider.stop()
        assert me(process, old).status == 200
        eventually(lambda: health(process)["oidc"] is False, "the provider to be down", 30)
        eventually(lambda: me(process, old).status == 503, "its keys to be too old", 30)
        assert me(process, process.token("user")).status == 200
        provider.start()
        new = provider.sign_in("alice")
        eventually(lambda: me(process, new).status == 200, "the new key to be taken", 30)
        # The key that signed it is gone.
        assert me(process, old).status == 401
        eventually(lambda: health(process)["oidc"] is True, "the provider to be up", 30)
        lines = stopped(process)
    told = [line["event"] for line in lines if str(line.get("event")).startswith("llmops.identity.issuer")]
    assert told == ["llmops.identity.issuer.failed", "llmops.identity.issuer.recovered"]


def test_a_rotated_key_is_asked_for_at_once(variables: dict[str, str], provider: Provider) -> None:
    # Only a token of the new key makes the service ask: by itself it would in five minutes.
    with ServiceProcess({**variables, "OIDC_JWKS_MAX_STALE_S": "3600"}) as process:
        process.wait_ready()
        old = provider.sign_in("alice")
        assert me(process, old).status == 200
        provider.stop()
        provider.start()
        assert me(process, provider.sign_in("alice")).status == 200
        assert me(process, old).status == 401


def test_the_service_starts_before_the_provider(variables: dict[str, str], provider: Provider) -> None:
    token = provider.sign_in("alice")
    provider.stop()
    with ServiceProcess(variables) as process:
        process.wait_ready()
        assert process.call("GET", "/health").status == 200
        refused = me(process, token)
        assert (refused.status, refused.json["error"]) == (503, "DependencyUnavailableError")
        provider.start()
        eventually(lambda: me(process, provider.sign_in("alice")).status == 200, "tokens to be accepted", 30)
