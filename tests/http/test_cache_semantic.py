"""Questions that mean the same get the same answer: with a real model's vectors, as they were recorded."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.trace import SpanKind

from service.cache.semantic import collection_of
from service.cache.store import COLLECTION
from tests.fakes.qdrant import FakeQdrant
from tests.fakes.upstream import Answer as Reply
from tests.fakes.upstream import FakeUpstream, Silent, Status
from tests.fakes.wire import Exchange
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import attributes, eventually, trace_of
from tests.semantic.pairs import vectors

MODEL = "minilm"
FIRST, SAME = "What is the capital of France?", "What is France's capital?"
OTHER = "What is the capital of Germany?"


class Recorded:
    """The vectors that the real model gave."""

    def __init__(self, dimension: int = 384) -> None:
        self.dimension = dimension

    async def play(self, exchange: Exchange) -> None:
        """Answer with the text's vector; an exclamation mark does not move it."""
        text = exchange.request.json["input"]
        vector = [float(number) for number in vectors()[text.removesuffix("!")][: self.dimension]]
        body = {"object": "list", "model": MODEL, "data": [{"index": 0, "embedding": vector}]}
        await exchange.respond(200, {"Content-Type": "application/json"}, json.dumps(body).encode())


@pytest.fixture
def qdrant() -> Iterator[FakeQdrant]:
    with FakeQdrant().serving() as fake:
        yield fake


def settings(upstream: FakeUpstream, **more: Any) -> dict[str, Any]:
    upstream.embeddings_behaviour = Recorded()
    return {
        "litellm_url": upstream.url,
        "cache_enabled": True,
        "cache_semantic": True,
        "cache_timeout_s": 2.0,
        "cache_embedding_timeout_s": 2.0,
        "embedding_model": MODEL,
        **more,
    }


def ask(app: AppUnderTest, prompt: str, token: str, **more: Any) -> Answer:
    answer = app.call("POST", "/llm/generate", body={"prompt": prompt, **more}, token=token)
    assert answer.status == 200, answer.body
    return answer


def stored(app: AppUnderTest, entries: int = 2) -> None:
    """An answer and its question are two points."""
    eventually(lambda: app.value("llmops.cache.writes", outcome="stored") >= entries, "the points")


def embeddings(upstream: FakeUpstream) -> int:
    return sum(request.path.endswith("/embeddings") for request in upstream.requests)


@pytest.mark.parametrize("where", ["server", "embedded"])
def test_a_paraphrase_is_a_hit_and_says_so(upstream: FakeUpstream, qdrant: FakeQdrant, where: str) -> None:
    more = {"qdrant_url": qdrant.url} if where == "server" else {}
    with running_app(**settings(upstream, **more)) as app:
        token = app.token()
        first = ask(app, FIRST, token)
        stored(app)
        hit = ask(app, SAME, token)

        assert (first.headers["x-cache"], hit.headers["x-cache"]) == ("MISS", "HIT")
        assert 0.9 <= float(hit.headers["x-cache-similarity"]) <= 1
        assert (hit.json["cache"], hit.json["cache_kind"]) == ("hit", "semantic")
        assert len(upstream.chat_requests) == 1
        spans = trace_of(app, hit.request_id)
        lookup = next(span for span in spans if span.name == "cache lookup")
        assert attributes(lookup)["llmops.cache.kind"] == "semantic"
        assert attributes(lookup)["llmops.cache.result"] == "hit"
        assert attributes(lookup)["llmops.cache.similarity"] >= 0.9
        below = [span.name for span in spans if span.parent == lookup.context]
        collection = collection_of(MODEL, 384)
        assert below == [f"retrieve {COLLECTION}", f"embeddings {MODEL}", f"query {collection}"]
        assert {span.kind for span in spans if span.parent == lookup.context} == {SpanKind.CLIENT}
        assert app.value("llmops.cache.lookups", kind="semantic", result="hit") == 1
        assert app.value("llmops.cache.lookups", kind="semantic", result="miss") == 1
        assert app.value("llmops.cache.similarity", kind="semantic") == 1
        assert app.value("llmops.cache.saved_tokens", kind="semantic") == 30
        assert ask(app, FIRST, token).json["cache_kind"] == "exact"


def test_near_is_not_the_same(upstream: FakeUpstream, qdrant: FakeQdrant) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url, cache_similarity=0.1)) as app:
        token = app.token()
        ask(app, FIRST, token)
        stored(app)

        assert ask(app, OTHER, token).headers["x-cache"] == "MISS"
        assert ask(app, SAME, app.token("admin")).headers["x-cache"] == "MISS", "another user's"
        assert ask(app, SAME, token, system_prompt="Be brief.").headers["x-cache"] == "MISS"
        assert ask(app, SAME, token, temperature=0.5).headers["x-cache"] == "MISS"
        assert ask(app, SAME, token, model="other-model").headers["x-cache"] == "MISS"
        assert ask(app, SAME, token).headers["x-cache"] == "HIT"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("How much do I owe you?", "How much do you owe me?"),
        ("Recommend books about children.", "Recommend books for children."),
        ("Can people sue you?", "Can you sue people?"),
        ("Can you report me for this?", "Can I report you for this?"),
    ],
)
def test_who_does_what_decides(upstream: FakeUpstream, qdrant: FakeQdrant, first: str, second: str) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()
        ask(app, first, token)
        stored(app)

        assert ask(app, second, token).headers["x-cache"] == "MISS"
        assert ask(app, f"{first}!", token).json["cache_kind"] == "semantic", "the same but for a mark"


def test_a_store_whose_filter_fails_is_not_believed(upstream: FakeUpstream, qdrant: FakeQdrant) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url, cache_similarity=0.1)) as app:
        ask(app, FIRST, app.token())
        stored(app)
        (entry,) = qdrant.collections[COLLECTION].values()
        (question,) = qdrant.collections[collection_of(MODEL, 384)].values()
        assert set(question["payload"]) == {"key", "tenant", "scope", "model", "created", "expires"}
        assert question["payload"]["key"] == entry["payload"]["key"]
        qdrant.ignores_filters = True
        assert ask(app, SAME, app.token("admin")).headers["x-cache"] == "MISS"
        assert ask(app, OTHER, app.token()).headers["x-cache"] == "MISS"


@pytest.mark.parametrize("behaviour", [Silent(), Status(500), Status(200, {"data": []})], ids=str)
def test_a_failing_embedding_is_a_miss(upstream: FakeUpstream, qdrant: FakeQdrant, behaviour: Any) -> None:
    more = settings(upstream, qdrant_url=qdrant.url, cache_embedding_timeout_s=0.2)
    upstream.embeddings_behaviour = behaviour
    with running_app(**more) as app:
        token = app.token()
        answers = [ask(app, prompt, token) for prompt in (FIRST, SAME, OTHER, "Another?")]

        assert {answer.headers["x-cache"] for answer in answers} == {"MISS"}
        assert app.value("llmops.cache.lookups", kind="semantic", result="error") == 4
        assert embeddings(upstream) == 3, "then its breaker is open"
        assert ask(app, FIRST, token).headers["x-cache"] == "HIT"


def test_another_embedding_model_or_dimension_is_another_collection(
    upstream: FakeUpstream, qdrant: FakeQdrant
) -> None:
    for model, dimension in ((MODEL, 384), ("another", 384), (MODEL, 128)):
        more = settings(upstream, qdrant_url=qdrant.url, embedding_model=model, cache_similarity=0.5)
        upstream.embeddings_behaviour = Recorded(dimension)
        with running_app(**more) as app:
            token = app.token()
            assert ask(app, FIRST, token, max_tokens=dimension, system_prompt=model).status == 200
            stored(app)

    names = {collection_of(model, size) for model, size in ((MODEL, 384), ("another", 384), (MODEL, 128))}
    assert len(names) == 3
    assert names < set(qdrant.collections)


def test_a_collection_of_the_wrong_dimension_costs_a_hit_and_nothing_else(
    upstream: FakeUpstream, qdrant: FakeQdrant
) -> None:
    name = collection_of(MODEL, 384)
    qdrant.collections[name], qdrant.dimensions[name] = {}, 7
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()
        ask(app, FIRST, token)
        eventually(lambda: app.value("llmops.cache.writes", outcome="stored") >= 1, "the exact entry")
        assert ask(app, FIRST, token).headers["x-cache"] == "HIT"
        eventually(lambda: qdrant.dimensions[name] == 384, "the collection made anew", limit_s=20)
        eventually(lambda: qdrant.collections[name], "the question in it", limit_s=20)
        assert ask(app, SAME, token).json["cache_kind"] == "semantic"


def test_a_question_whose_answer_is_gone_is_forgotten(upstream: FakeUpstream, qdrant: FakeQdrant) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url, cache_memory_bytes=0)) as app:
        token = app.token()
        ask(app, FIRST, token)
        stored(app)
        qdrant.collections[COLLECTION].clear()
        (point_id,) = qdrant.collections[collection_of(MODEL, 384)]
        assert ask(app, SAME, token).headers["x-cache"] == "MISS"
        eventually(lambda: point_id not in qdrant.collections[collection_of(MODEL, 384)], "its end")


def test_a_conversation_is_compared_with_its_own_kind_only(
    upstream: FakeUpstream, qdrant: FakeQdrant
) -> None:
    upstream.default = Reply()
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()

        def chat(*messages: dict[str, Any]) -> str:
            body = {"messages": messages, "temperature": 0}
            answer = app.call("POST", "/v1/chat/completions", body=body, token=token)
            return answer.headers["x-cache"]

        before = {"role": "system", "content": "You are a guide."}
        assert chat(before, {"role": "user", "content": FIRST}) == "MISS"
        stored(app)
        assert chat({"role": "user", "content": SAME}) == "MISS"
        assert chat(before, {"role": "user", "content": [{"type": "text", "text": SAME}]}) == "HIT"
        assert chat(before, {"role": "assistant", "content": SAME}) == "MISS"
