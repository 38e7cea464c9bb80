"""Which models may be asked for, and have a name on a metric: those of the upstream's list."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.fakes.upstream import Behaviour, FakeUpstream, NotJson, Status
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import attributes, eventually, trace_of

COST = "llmops.llm.cost"
CALLS = "llmops.llm.calls"


@contextmanager
def app_of(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    upstream.unknown_model_error = False
    with running_app(litellm_url=upstream.url, rate_limit="100000/minute") as app:
        yield app


def models_on(app: AppUnderTest, name: str = CALLS) -> set[str]:
    return {str((point.attributes or {})["model"]) for point in app.points(name)}


def asker(app: AppUnderTest) -> Callable[[str], None]:
    token = app.token()

    def ask(model: str) -> None:
        answer = app.call("POST", "/llm/generate", body={"prompt": "x", "model": model}, token=token)
        assert answer.status == 200

    return ask


def test_names_that_callers_invent_take_no_place_of_a_listed_model(upstream: FakeUpstream) -> None:
    upstream.models = ["demo"]
    with app_of(upstream) as app:
        ask = asker(app)
        for number in range(210):
            ask(f"invented-{number:03}")
        invented = models_on(app) - {"demo", "other"}
        assert invented == {f"invented-{number:03}" for number in range(40)}
        # The list is longer the next time: each new name has its own cost at once.
        upstream.models = [f"real-{number:03}" for number in range(199)]
        assert app.call("GET", "/v1/models", token=app.token()).status == 200
        ask("real-198")
        assert app.value(COST, model="real-198") == 0.00042
        assert models_on(app) == {"demo", "other", *invented, *upstream.models}


def test_a_model_that_is_listed_later_leaves_its_place_to_another_that_is_not(upstream: FakeUpstream) -> None:
    upstream.models = ["demo"]
    with app_of(upstream) as app:
        ask = asker(app)
        for number in range(40):
            ask(f"wildcard/{number:02}")
        upstream.models = ["demo", "wildcard/07"]
        assert app.call("GET", "/v1/models", token=app.token()).status == 200
        ask("wildcard/40")
        ask("wildcard/41")
        names = {f"wildcard/{number:02}" for number in range(41)}
        assert models_on(app) == {"demo", "other", *names}


def test_a_list_beyond_the_limit_has_the_same_names_in_any_order(upstream: FakeUpstream) -> None:
    names = [f"model-{number:04}" for number in range(300)]
    upstream.models = names[::-1]
    with app_of(upstream) as app:
        # The default model has a place too.
        eventually(lambda: len(models_on(app)) == 200, "the list to be known")
        kept = {"demo", *names[:199]}
        assert models_on(app) == kept
        ask = asker(app)
        # Callers who ask for the others get the places for models that are not listed, and no more.
        for name in names[199:]:
            ask(name)
            assert app.call("GET", "/v1/models", token=app.token("admin")).status == 200
        assert models_on(app) == {"other", *kept, *names[199:239]}


CHAT = {"messages": [{"role": "user", "content": "x"}]}
PATHS = ("/llm/generate", "/v1/chat/completions", "/v1/embeddings")


def body_of(path: str, model: str) -> dict[str, object]:
    given = {"/llm/generate": {"prompt": "x"}, "/v1/embeddings": {"input": "x"}}
    return {"model": model, **given.get(path, CHAT)}


def lists_read(upstream: FakeUpstream) -> int:
    return len([request for request in upstream.requests if request.path == "/v1/models"])


@contextmanager
def knowing_app(upstream: FakeUpstream) -> Iterator[AppUnderTest]:
    """An app that has read the list."""
    with running_app(litellm_url=upstream.url, rate_limit="100000/minute") as app:
        eventually(lambda: lists_read(upstream) == 1, "the list to be read")
        token = app.token()
        eventually(lambda: unknown(app, token).headers["x-llm-attempts"] == "0", "the list to be known")
        upstream.clear()
        yield app


def unknown(app: AppUnderTest, token: str, path: str = "/llm/generate", **more: object) -> Answer:
    return app.call("POST", path, body={**body_of(path, "nope"), **more}, token=token)


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_is_not_listed_never_reaches_the_upstream(upstream: FakeUpstream, path: str) -> None:
    with knowing_app(upstream) as app:
        token = app.token()
        for more in ({}, {"stream": True}) if path != "/v1/embeddings" else ({},):
            answer = unknown(app, token, path, **more)
            assert (answer.status, answer.headers["x-llm-attempts"]) == (400, "0")
            assert answer.headers["x-should-retry"] == "false"
            error = answer.json["error"] if path.startswith("/v1") else {"message": answer.json["message"]}
            assert error["message"] == "Model 'nope' not found"
            if path.startswith("/v1"):
                assert (error["code"], error["param"]) == ("model_not_found", "model")
            (call,) = [span for span in trace_of(app, answer.request_id) if span.name == "llm call"]
            assert attributes(call)["error.type"] == "BadRequestError"
            assert attributes(call)["llmops.llm.attempts"] == 0
        # Nor do many such calls have the list read again and again: it is young.
        assert {unknown(app, token).status for _ in range(30)} == {400}
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("wildcard", "model", "offered"),
    [
        ("openai/*", "openai/gpt-x", True),
        ("openai/*", "azure/gpt-x", False),
        ("*/mini", "any/mini", True),
        ("*/mini", "any/minister", False),
        ("a.b/*", "aXb/c", False),
    ],
)
def test_a_wildcard_of_the_list_offers_what_it_matches(
    upstream: FakeUpstream,
    wildcard: str,
    model: str,
    *,
    offered: bool,
) -> None:
    upstream.wildcards = [wildcard]
    with knowing_app(upstream) as app:
        upstream.unknown_model_error = False
        answer = app.call("POST", "/v1/chat/completions", body=body_of("", model), token=app.token())
        assert answer.status == (200 if offered else 400)


@pytest.mark.parametrize("listed", [Status(500), Status(404), Status(200, {"data": []}), NotJson()])
def test_where_no_list_can_be_had_every_name_passes(upstream: FakeUpstream, listed: Behaviour) -> None:
    upstream.models_behaviour = listed
    upstream.unknown_model_error = False
    with running_app(litellm_url=upstream.url) as app:
        eventually(lambda: lists_read(upstream) == 1, "the list to be asked for")
        assert unknown(app, app.token()).status == 200


def test_a_stored_answer_outlives_its_models_place_on_the_list(upstream: FakeUpstream) -> None:
    with running_app(litellm_url=upstream.url, cache_enabled=True) as app:
        token = app.token()
        body = {"prompt": "x", "model": "other-model"}
        assert app.call("POST", "/llm/generate", body=body, token=token).headers["x-cache"] == "MISS"
        upstream.models = ["demo"]
        assert app.call("GET", "/llm/models", token=token).status == 200

        def hit() -> bool:
            answer = app.call("POST", "/llm/generate", body=body, token=token)
            return answer.headers["x-cache"] == "HIT"

        eventually(hit, "the answer to be stored")
