"""A thousand pairs of tenants with hostile names in one store: nobody gets another's answer."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from opentelemetry.trace import INVALID_SPAN_CONTEXT

from service.cache.control import NO_DIRECTIVES
from service.cache.embedded import EmbeddedStore
from service.cache.keys import tenant_of
from service.cache.response_cache import ResponseCache
from service.cache.store import Guard, GuardedStore
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry.providers import build_telemetry
from service.upstream.messages import Completion, LlmRequest, Reply
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
def new_cache() -> Iterator[Callable[[], ResponseCache]]:
    """Makes caches on one store; without entries in memory, what they return comes from the store."""
    store = EmbeddedStore(":memory:")
    asyncio.run(store.open())
    telemetry = build_telemetry(make_settings(otel_sdk_disabled=True))
    tracer = telemetry.tracer_provider.get_tracer("test")

    def breaker(name: str) -> CircuitBreaker:
        return CircuitBreaker(name, 3, 10, telemetry.instruments)

    yield lambda: ResponseCache(
        GuardedStore(store, Guard(breaker), tracer, 5), make_settings(cache_memory_bytes=0), telemetry
    )
    telemetry.shutdown(1)
    asyncio.run(store.close())


async def ask(cache: ResponseCache, user: str, model: str, prompt: str) -> str | None:
    """The stored answer to the question; where there is none, one is stored."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    request = LlmRequest("chat", model, body, b"")
    found = await cache.lookup(request, user, NO_DIRECTIVES, Deadline.after(30), lambda _digest: False)
    assert found.slot is not None
    if found.entry is not None:
        return found.entry.completion.text
    answer = tenant_of(user)
    content = f'{{"choices": [{{"message": {{"content": "{answer}"}}, "finish_reason": "stop"}}]}}'
    completion = Completion(answer, model, finish_reasons=("stop",))
    cache.store(found, Reply(content.encode(), completion), model, INVALID_SPAN_CONTEXT)
    await cache.writer.flush(5)
    return None


@settings(max_examples=1_000, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(NAMES, NAMES, NAMES, st.text(max_size=10))
def test_no_pair_of_users_sees_each_others_answers(
    new_cache: Callable[[], ResponseCache], first: str, second: str, model: str, question: str
) -> None:
    assume(first != second)

    async def both() -> None:
        cache = new_cache()
        for user in (first, second):
            assert await ask(cache, user, model, question) in {None, tenant_of(user)}
        for user in (first, second):
            assert await ask(cache, user, model, question) == tenant_of(user)

    asyncio.run(both())
