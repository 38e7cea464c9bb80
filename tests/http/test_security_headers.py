"""What browsers and proxies must not do with an answer, said on every one of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest
from tests.http.support import module_app, raw

CHAT = {"messages": [{"role": "user", "content": "x"}]}
PRIVATE: dict[str, tuple[str, str, Any, int]] = {
    "sign-in": ("POST", "/auth/login", {"username": "user", "password": "x"}, 401),
    "not an object": ("POST", "/auth/login", [], 422),
    "the caller": ("GET", "/auth/me", None, 200),
    "models": ("GET", "/llm/models", None, 200),
    "a model": ("GET", "/v1/models/demo", None, 200),
    "no such model": ("GET", "/v1/models/nope", None, 404),
    "a call": ("POST", "/llm/generate", {"prompt": "x"}, 200),
    "a stream": ("POST", "/llm/generate", {"prompt": "x", "stream": True}, 200),
    "OpenAI's call": ("POST", "/v1/chat/completions", CHAT, 200),
    "OpenAI's stream": ("POST", "/v1/chat/completions", {**CHAT, "stream": True}, 200),
    "no such field": ("POST", "/llm/generate", {"x": 1}, 422),
    "the cache": ("GET", "/llm/cache/stats", None, 200),
    "not permitted": ("DELETE", "/llm/cache", None, 403),
    "no such route": ("GET", "/nowhere", None, 404),
    "no such method": ("PUT", "/llm/generate", None, 405),
    "too large": ("POST", "/llm/generate", {"prompt": "x" * 2_000_000}, 413),
    "a bug": ("GET", "/test/bug", None, 500),
    "health": ("GET", "/health", None, 200),
}
PUBLIC = ("/", "/docs", "/openapi.json", "/docs-assets/swagger-ui.css")


def _bug(app: Any) -> None:
    @app.get("/test/bug")  # type: ignore[untyped-decorator]
    async def bug() -> None:
        raise RuntimeError


@pytest.fixture(scope="module")
def app() -> Iterator[AppUnderTest]:
    with FakeUpstream() as upstream, module_app(_bug, litellm_url=upstream.url) as served:
        yield served


def assert_safe(answer: Answer) -> None:
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("case", PRIVATE)
def test_what_is_for_one_caller_is_stored_nowhere(app: AppUnderTest, case: str) -> None:
    method, path, body, status = PRIVATE[case]
    answer = app.call(method, path, body=body, token=app.token())
    assert answer.status == status
    assert answer.headers["cache-control"] == "no-store"
    assert_safe(answer)


@pytest.mark.parametrize("path", ["/auth/me", "/llm/generate", "/v1/chat/completions"])
def test_so_is_the_answer_to_a_stranger(app: AppUnderTest, path: str) -> None:
    answer = app.call("GET" if path == "/auth/me" else "POST", path, body=None)
    assert answer.status == 401
    assert answer.headers["cache-control"] == "no-store"
    assert_safe(answer)


def test_so_is_the_answer_to_what_is_no_request(app: AppUnderTest) -> None:
    answer = raw(app.port, b"GET / HTTP/9\r\n\r\n").answer
    assert answer.status == 400
    assert_safe(answer)


@pytest.mark.parametrize("path", PUBLIC)
def test_the_documentation_may_be_stored(app: AppUnderTest, path: str) -> None:
    answer = app.call("GET", path)
    assert answer.status in {200, 307}
    assert "no-store" not in answer.headers.get("cache-control", "")
    assert_safe(answer)
