"""A thousand pairs of tenants with hostile names in one store: nobody gets another's answer."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NoOpTracer

from service.cache.embedded import EmbeddedStore
from service.cache.entries import EntryMemory
from service.cache.keys import tenant_of
from service.cache.response_cache import ResponseCache
from service.cache.store import CacheStore, Vectors
from service.cache.sweeper import CacheSweeper
from service.cache.writer import CacheWriter
from service.services.call_report import Call
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry.instruments import Instruments
from service.upstream.messages import Completion, Reply
from service.utils.deadline import Deadline
from tests.harness import make_settings

HOSTILE = st.sampled_from(
    [
        "*",
        "",
        "admin",
        "user",
        "../user",
        'user"}],"should":[{"key":"tenant"',
        "user\x00admin",
        "' OR 1=1",
        "tenant",
        '["tenant","shared"]',
    ]
)
NAMES = HOSTILE | st.text(max_size=12)


@pytest.fixture(scope="module")
def store() -> Iterator[EmbeddedStore]:
    embedded = EmbeddedStore(":memory:")
    asyncio.run(embedded.open())
    yield embedded
    asyncio.run(embedded.close())


def cache_on(store: EmbeddedStore) -> ResponseCache:
    """A cache without a memory of its own: what comes back comes from the store."""
    instruments = Instruments(MeterProvider().get_meter("test"))
    vectors = Vectors(embedded=store)
    tracer = NoOpTracer()
    kept = CacheStore(vectors, CircuitBreaker("qdrant", 3, 10, instruments), tracer, 5.0)
    return ResponseCache(
        kept,
        EntryMemory(0, None),
        CacheWriter(kept, instruments, tracer, 1_000_000),
        CacheSweeper(kept, vectors, 1_000_000, tracer),
        None,
        make_settings(),
        instruments,
        tracer,
    )


def call_of(user: str, model: str, prompt: str) -> Call:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    return Call(body, model, user, Deadline.after(30))


async def ask(cache: ResponseCache, user: str, model: str, prompt: str) -> str | None:
    """What the cache has for the question; where it has nothing, the answer is stored."""
    call = call_of(user, model, prompt)
    ticket = cache.ticket(call)
    assert ticket is not None
    entry = await cache.look_up(call, ticket, lambda _digest: False)
    if entry is not None:
        return entry.completion.text
    answer = tenant_of(user)
    content = f'{{"choices": [{{"message": {{"content": "{answer}"}}, "finish_reason": "stop"}}]}}'
    completion = Completion(answer, model, finish_reasons=("stop",))
    cache.keep(call, ticket, Reply(content.encode(), completion), INVALID_SPAN_CONTEXT)
    await cache.writer.flush(5)
    return None


@settings(max_examples=1_000, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(NAMES, NAMES, NAMES, st.text(max_size=10))
def test_no_pair_of_users_sees_each_others_answers(
    store: EmbeddedStore, first: str, second: str, model: str, question: str
) -> None:
    assume(first != second)

    async def both() -> None:
        cache = cache_on(store)
        for user in (first, second):
            assert await ask(cache, user, model, question) in {None, tenant_of(user)}
        for user in (first, second):
            assert await ask(cache, user, model, question) == tenant_of(user)

    asyncio.run(both())
