"""A sampled answer is not the answer: which calls the cache answers, and which share a call under way."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.streams import Gate
from tests.fakes.upstream import Answer as Reply
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import eventually
from tests.http.test_cache_sharing import Gated

CHAT, GENERATE = "/v1/chat/completions", "/llm/generate"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "What is a trace?"}]},
    GENERATE: {"prompt": "What is a trace?"},
}
DETERMINISTIC: dict[str, list[dict[str, Any]]] = {
    CHAT: [{"temperature": 0}, {"temperature": -0.0}, {"seed": 7}, {"seed": 0, "temperature": 1}],
    GENERATE: [{"temperature": 0}, {"temperature": 0.0}],
}
SAMPLED: dict[str, list[dict[str, Any]]] = {
    CHAT: [{}, {"temperature": None}, {"temperature": 0.1}, {"temperature": 1, "seed": None}, {"seed": True}],
    GENERATE: [{}, {"temperature": 0.7}],
}
ANSWERED = {
    "never": {"deterministic"},
    "ask": {"deterministic", "max-age"},
    "generate": {"deterministic", "max-age", GENERATE},
    "always": {"deterministic", "max-age", GENERATE, CHAT},
}
"""What is answered from the cache at each value of the setting."""


def ask(app: AppUnderTest, token: str, path: str, control: str = "", **more: Any) -> Answer:
    headers = {"Cache-Control": control} if control else {}
    answer = app.call("POST", path, body=BODIES[path] | more, token=token, headers=headers)
    assert answer.status == 200, answer.body
    return answer


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("sampled", ANSWERED)
def test_the_setting_decides_which_calls_the_cache_answers(
    upstream: FakeUpstream, sampled: str, *, stream: bool
) -> None:
    more: dict[str, Any] = {"cache_sampled": sampled}
    with running_app(litellm_url=upstream.url, cache_enabled=True, **more) as app:
        token, admin = app.token(), app.token("admin")

        def results(path: str, control: str, **fields: Any) -> list[str]:
            assert app.call("DELETE", "/llm/cache", token=admin).status == 200
            answers = [ask(app, token, path, control, **fields, stream=stream) for _ in range(2)]
            return [answer.headers["x-cache"] for answer in answers]

        for path in (CHAT, GENERATE):
            for fields in DETERMINISTIC[path]:
                assert results(path, "", **fields) == ["MISS", "HIT"], (path, fields)
            for fields in SAMPLED[path]:
                expected = ["MISS", "HIT"] if path in ANSWERED[sampled] else ["BYPASS", "BYPASS"]
                assert results(path, "", **fields) == expected, (path, fields)
                asked = {path, "max-age"} & ANSWERED[sampled]
                expected = ["MISS", "HIT"] if asked else ["BYPASS", "BYPASS"]
                assert results(path, "max-age=60", **fields) == expected, (path, fields)


def test_regenerating_regenerates(upstream: FakeUpstream) -> None:
    upstream.script(Reply("one"), Reply("two"), Reply("three"))
    with running_app(litellm_url=upstream.url, cache_enabled=True) as app:
        token = app.token()
        answers = [ask(app, token, CHAT) for _ in range(3)]

        found = [answer.json["choices"][0]["message"]["content"] for answer in answers]
        assert found == ["one", "two", "three"]
        assert {answer.headers["x-cache"] for answer in answers} == {"BYPASS"}
        assert app.value("llmops.cache.lookups", kind="exact", result="bypass") == 3
        stats = app.call("GET", "/llm/cache/stats", token=token).json
        assert (stats["bypassed"], stats["entries"]) == (3, 0)
        # Nothing was left for those who ask for it either.
        assert ask(app, token, CHAT, "max-age=60").headers["x-cache"] == "MISS"


def test_the_largest_age_is_obeyed(upstream: FakeUpstream) -> None:
    upstream.script(Reply("one"), Reply("two"))
    with running_app(litellm_url=upstream.url, cache_enabled=True) as app:
        token = app.token()
        ask(app, token, CHAT, "max-age=60")
        hit = ask(app, token, CHAT, "max-age=60")
        assert (hit.headers["x-cache"], hit.headers["age"]) == ("HIT", "0")
        eventually(
            lambda: int(ask(app, token, CHAT, "max-age=60").headers["age"]) >= 1, "an answer older than 1 s"
        )
        # A second old is too old by any rounding of this one.
        newer = ask(app, token, CHAT, "max-age=1")
        assert (newer.headers["x-cache"], newer.json["choices"][0]["message"]["content"]) == ("MISS", "two")
        # No older answer than asked for: it is asked of the model, and stored for the next.
        assert ask(app, token, CHAT, "max-age=0").headers["x-cache"] == "BYPASS"


@pytest.mark.parametrize(
    ("path", "more", "control", "shared"),
    [
        (CHAT, {}, "", False),
        (CHAT, {"temperature": 0.7}, "", False),
        (CHAT, {"temperature": 0}, "", True),
        (CHAT, {"seed": 1}, "", True),
        (CHAT, {}, "max-age=60", True),
        (CHAT, {"temperature": 0}, "no-cache", False),
        (CHAT, {"temperature": 0}, "no-store", False),
        (GENERATE, {}, "", True),
    ],
)
def test_only_calls_that_the_cache_is_for_share_one_under_way(
    upstream: FakeUpstream, path: str, more: dict[str, Any], control: str, *, shared: bool
) -> None:
    gate, callers = Gate(), 5
    upstream.default = Gated(gate, Reply())
    with (
        running_app(litellm_url=upstream.url, cache_enabled=True) as app,
        ThreadPoolExecutor(callers) as pool,
    ):
        token = app.token()
        asking = [pool.submit(ask, app, token, path, control, **more) for _ in range(callers)]
        eventually(
            lambda: sum(line["message"] == "llm_request_started" for line in app.lines()) == callers,
            "their calls to begin",
        )
        upstream.wait_for(lambda fake: len(fake.chat_requests) == (1 if shared else callers))
        gate.allow(callers)
        results = sorted(future.result().headers["x-cache"] for future in asking)

    assert len(upstream.chat_requests) == (1 if shared else callers)
    if shared:
        assert results == ["HIT"] * (callers - 1) + ["MISS"]
    else:
        assert "HIT" not in results


def test_an_answer_of_our_own_protocol_is_there_for_who_asks(upstream: FakeUpstream) -> None:
    with running_app(litellm_url=upstream.url, cache_enabled=True) as app:
        token = app.token()
        ask(app, token, GENERATE)
        assert ask(app, token, CHAT).headers["x-cache"] == "BYPASS"
        assert ask(app, token, CHAT, "max-age=60").headers["x-cache"] == "HIT"
        assert len(upstream.chat_requests) == 2
