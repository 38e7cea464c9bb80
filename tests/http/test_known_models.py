"""Which models have a name on a metric: those of the upstream's list, whatever callers ask for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.fakes.upstream import FakeUpstream
from tests.harness import AppUnderTest, running_app
from tests.http.support import eventually

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
