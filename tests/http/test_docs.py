"""Liveness, and documentation that is complete and needs no other host."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.fakes.upstream import FakeUpstream
from tests.harness import AppUnderTest
from tests.http.support import module_app

EVERYWHERE = {405, 500}
ERRORS = {
    ("post", "/auth/login"): {401, 408, 413, 415, 422, 429, 503},
    ("get", "/auth/me"): {401, 503},
    ("post", "/auth/logout"): {401, 403, 503},
    ("post", "/keys"): {401, 403, 408, 413, 415, 422, 503},
    ("get", "/keys"): {401, 403, 422, 503},
    ("delete", "/keys/{key_id}"): {401, 403, 404, 422, 503},
    ("post", "/keys/{key_id}/rotate"): {401, 403, 404, 408, 413, 415, 422, 503},
    ("put", "/teams/{name}"): {401, 403, 408, 413, 415, 422, 503},
    ("get", "/teams"): {401, 403, 422, 503},
    ("put", "/users/{name}"): {401, 403, 408, 413, 415, 422, 503},
    ("get", "/users"): {401, 403, 422, 503},
    ("get", "/usage"): {401, 403, 422, 503},
    ("get", "/requests/{request_id}"): {401, 404, 422, 503},
    ("post", "/llm/generate"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("get", "/llm/models"): {400, 401, 429, 502, 503, 504},
    ("get", "/llm/cache/stats"): {401, 422, 503},
    ("delete", "/llm/cache"): {401, 403, 422, 502, 503},
    ("post", "/v1/chat/completions"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/embeddings"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/completions"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/responses"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("get", "/v1/responses/{response_id}"): {400, 401, 404, 422, 429, 502, 503, 504},
    ("delete", "/v1/responses/{response_id}"): {400, 401, 404, 422, 429, 502, 503, 504},
    ("post", "/v1/responses/{response_id}/cancel"): {
        *(400, 401, 404, 408, 413, 415, 422, 429, 502, 503, 504),
    },
    ("get", "/v1/responses/{response_id}/input_items"): {400, 401, 404, 422, 429, 502, 503, 504},
    ("post", "/v1/messages"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/messages/count_tokens"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/moderations"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/audio/speech"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/audio/transcriptions"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/images/generations"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("post", "/v1/rerank"): {400, 401, 403, 408, 413, 415, 422, 429, 502, 503, 504},
    ("get", "/v1/models"): {400, 401, 429, 502, 503, 504},
    ("get", "/v1/models/{model}"): {400, 401, 404, 422, 429, 502, 503, 504},
    ("get", "/health"): set[int](),
    ("get", "/health/detailed"): {503},
    ("get", "/"): set[int](),
}


@pytest.fixture(scope="module")
def app() -> Iterator[AppUnderTest]:
    with FakeUpstream() as upstream, module_app(litellm_url=upstream.url) as served:
        yield served


@pytest.fixture(scope="module")
def schema(app: AppUnderTest) -> dict[str, Any]:
    found: dict[str, Any] = app.call("GET", "/openapi.json").json
    return found


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_root_leads_to_the_documentation(app: AppUnderTest, method: str) -> None:
    # Claude Code asks with HEAD whether anybody is there.
    answer = app.call(method, "/")
    assert (answer.status, answer.headers["location"]) == (307, "/docs")


@pytest.mark.parametrize(("method", "body"), [("GET", b'{"status":"alive"}'), ("HEAD", b"")])
def test_health_answers_while_the_process_serves(app: AppUnderTest, method: str, body: bytes) -> None:
    answer = app.call(method, "/health")

    assert (answer.status, answer.body) == (200, body)
    assert re.fullmatch(r"[0-9a-f]{32}", answer.request_id)
    assert not app.spans(answer.request_id), "a probe leaves no span"


def test_the_page_and_all_that_it_loads_come_from_here(app: AppUnderTest) -> None:
    page = app.call("GET", "/docs")

    assert page.status == 200
    text = page.body.decode()
    assert not re.findall(r"""(?:https?:)?//[^"'\s<>]+""", text)
    loaded = re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    assert len(loaded) == 3
    for path in loaded:
        asset = app.call("GET", path)
        assert (asset.status, bool(asset.body)) == (200, True), path
        assert asset.request_id


class Scripts(HTMLParser):
    """Collects a page's scripts, inline and loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: list[str] = []
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.handlers += [name for name in given if name.startswith("on")]
        if tag == "script":
            source = given.get("src")
            self._inside = source is None
            if source is not None:
                self.loaded.append(source)

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.inline.append(data)

    def handle_endtag(self, _tag: str) -> None:
        self._inside = False


def test_the_policy_of_the_page_permits_its_scripts_and_no_others(app: AppUnderTest) -> None:
    page = app.call("GET", "/docs")
    scripts = Scripts()
    scripts.feed(page.body.decode())
    sources = dict(
        directive.strip().split(" ", 1) for directive in page.headers["content-security-policy"].split(";")
    )
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts.inline
    ]
    assert len(hashes) == 1
    assert sources["script-src"].split() == ["'self'", *hashes]
    assert all(source.startswith("/") for source in scripts.loaded)
    assert not scripts.handlers
    for directive in ("default-src", "frame-ancestors", "base-uri", "form-action"):
        assert sources[directive] == "'none'"
    # Its style sheet, its favicon and the document of the API.
    for directive in ("style-src", "img-src", "connect-src"):
        assert "'self'" in sources[directive]


def test_every_route_is_documented(schema: dict[str, Any]) -> None:
    documented = {(method, path) for path, methods in schema["paths"].items() for method in methods}

    assert documented == set(ERRORS)


@pytest.mark.parametrize(("method", "path"), ERRORS)
def test_every_error_of_a_route_is_documented_with_its_body(
    schema: dict[str, Any], method: str, path: str
) -> None:
    responses = schema["paths"][path][method]["responses"]
    errors = {int(status) for status in responses if int(status) >= 400}

    assert errors == ERRORS[method, path] | EVERYWHERE
    for status in errors:
        content = responses[str(status)]["content"]["application/json"]
        body = "OpenAiErrorBody" if path.startswith("/v1/") else "ErrorBody"
        body = "AnthropicErrorBody" if path.startswith("/v1/messages") else body
        body = "DetailedHealth" if (path, status) == ("/health/detailed", 503) else body
        assert content["schema"] == {"$ref": f"#/components/schemas/{body}"}
        assert responses[str(status)]["description"]


def test_the_error_body_is_described(schema: dict[str, Any]) -> None:
    body = schema["components"]["schemas"]["ErrorBody"]

    assert set(body["required"]) == {"error", "message", "incident_id", "request_id", "timestamp"}
    assert "HTTPValidationError" not in schema["components"]["schemas"]
