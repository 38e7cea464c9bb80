"""The use case of a stream without the app around it: what is recorded, once, and what the breaker learns."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from service.cache.coalescing import NoCoalescing
from service.cache.response_cache import NoCache
from service.errors import CircuitOpenError, ServiceError, UpstreamError, UpstreamTimeoutError
from service.recording.record import CallRecord
from service.services.call_report import CallSpec
from service.services.generation import Generation
from service.shared.leases import NoLeases
from service.telemetry.providers import Exporters, build_telemetry
from service.upstream.client import open_llm
from service.upstream.messages import LlmRequest, to_json
from service.upstream.stream import StreamEvent
from service.utils.deadline import Deadline
from tests.fakes.streams import DONE, EndlessStream, RawStream, chunk, text, usage
from tests.fakes.upstream import Behaviour, FakeUpstream, Silent, Status
from tests.harness import make_settings

if TYPE_CHECKING:
    from service.recording.recorder import CallRecorder

WHOLE = (text("a "), text("trace"), chunk(reason="stop"), usage(), DONE)


@dataclass
class Bench:
    """A use case, and what came of its calls."""

    generation: Generation
    records: list[CallRecord]
    handed_on: list[bytes] = field(default_factory=list)
    records_at_hand_on: list[int] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def relay(self, event: StreamEvent) -> None:
        """Take what the caller would get."""
        self.handed_on.append(event.raw)
        self.records_at_hand_on.append(len(self.records))
        self.begun.set()

    async def stream(
        self, relay: Callable[[StreamEvent], Awaitable[None]] | None = None, content: str = "hello"
    ) -> None:
        """Make one streamed call."""
        body = {"model": "demo", "messages": [{"content": content}]}
        request = LlmRequest("chat", "demo", body, to_json(body))
        spec = CallSpec(request, "user", Deadline.after(1.0), streamed=True)
        async with self.generation.stream(spec) as events:
            async for event in events:
                await (relay or self.relay)(event)


@dataclass
class KeptRecords:
    """A recorder that keeps what it is given."""

    records: list[CallRecord]

    def record(self, record: CallRecord) -> None:
        """Keep the record."""
        self.records.append(record)

    async def written(self) -> None:
        """Return at once."""


@asynccontextmanager
async def opened(upstream: FakeUpstream, **values: object) -> AsyncIterator[Bench]:
    settings = make_settings(
        litellm_url=upstream.url,
        llm_timeout_s=1.0,
        stream_chunk_timeout_s=0.3,
        stream_timeout_s=1.0,
        **values,
    )
    telemetry = build_telemetry(settings, Exporters())
    records: list[CallRecord] = []
    async with open_llm(settings, telemetry) as llm:
        generation = Generation(
            llm,
            telemetry,
            settings,
            cache=NoCache(),
            coalescing=NoCoalescing(),
            leases=NoLeases(),
            recorder=cast("CallRecorder", KeptRecords(records)),
        )
        yield Bench(generation, records)
    for _ in range(10):
        # The libraries' generators that were left in the middle are closed by tasks of a moment.
        await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left


def run(upstream: FakeUpstream, behaviour: Behaviour) -> tuple[Bench, ServiceError | None]:
    """One streamed call, to its end."""

    async def main() -> tuple[Bench, ServiceError | None]:
        async with opened(upstream) as bench:
            upstream.script(behaviour)
            try:
                await bench.stream()
            except ServiceError as error:
                return bench, error
            return bench, None

    return asyncio.run(main())


def test_a_whole_stream_is_recorded_once_before_anything_says_that_it_is_over(upstream: FakeUpstream) -> None:
    bench, error = run(upstream, RawStream(WHOLE))
    assert error is None
    assert bench.handed_on == list(WHOLE[:-1])
    assert set(bench.records_at_hand_on) == {0}
    (record,) = bench.records
    assert (record.outcome, record.streamed, record.operation, record.estimated) == (
        "success",
        True,
        "chat",
        False,
    )
    assert (record.prompt_tokens, record.completion_tokens, record.total_tokens) == (10, 20, 30)
    assert record.first_chunk_s is not None
    assert 0 < record.first_chunk_s <= record.duration_s
    assert (record.prompt, record.answer) == (None, None)


@pytest.mark.parametrize(
    ("behaviour", "kind", "tokens"),
    [
        (RawStream((text("a "), text("b")), "cut"), UpstreamError, 2),
        (RawStream((text("a "),), "silence"), UpstreamTimeoutError, 1),
        (RawStream((), "silence"), UpstreamTimeoutError, None),
        (Status(500), UpstreamError, None),
        (RawStream((text("a"), usage(3, 4)), "cut"), UpstreamError, 4),
        (RawStream((text("a") + text("b") + b"data: oops\n\n",)), UpstreamError, 2),
    ],
)
def test_a_stream_that_fails_is_recorded_once_with_what_was_seen(
    upstream: FakeUpstream, behaviour: Behaviour, kind: type[ServiceError], tokens: int | None
) -> None:
    bench, error = run(upstream, behaviour)
    assert isinstance(error, kind)
    (record,) = bench.records
    assert (record.outcome, record.error, record.completion_tokens) == ("error", kind.__name__, tokens)
    assert record.estimated == (tokens in {1, 2})


@pytest.mark.parametrize(("behaviour", "tokens"), [(EndlessStream(0.01), True), (Silent(), False)])
def test_a_stream_that_is_cancelled_is_recorded_once(
    upstream: FakeUpstream, behaviour: Behaviour, *, tokens: bool
) -> None:
    async def main() -> None:
        async with opened(upstream) as bench:
            upstream.script(behaviour)
            task = asyncio.create_task(bench.stream())
            await asyncio.to_thread(upstream.wait_for, lambda fake: bool(fake.chat_requests))
            if tokens:
                await bench.begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            (record,) = bench.records
            assert (record.outcome, record.error) == ("cancelled", None)
            assert record.estimated is tokens
            assert (record.completion_tokens is not None) is tokens
            assert record.completion_tokens in {None, len(bench.handed_on), len(bench.handed_on) + 1}

    asyncio.run(main())
    upstream.wait_for(lambda fake: fake.disconnects == 1)


def test_what_goes_wrong_with_the_caller_is_no_mark_against_the_upstream(upstream: FakeUpstream) -> None:
    async def broken(_event: StreamEvent) -> None:
        raise RuntimeError("a bug of ours")

    async def main() -> None:
        async with opened(upstream, breaker_failure_threshold=1) as bench:
            upstream.script(RawStream(WHOLE), RawStream(WHOLE))
            with pytest.raises(RuntimeError):
                await bench.stream(broken)
            assert bench.records[0].error == "InternalError"
            await bench.stream()

    asyncio.run(main())


def test_the_breaker_learns_once_from_a_stream_and_when_it_is_over(upstream: FakeUpstream) -> None:
    async def main() -> None:
        async with opened(upstream, breaker_failure_threshold=2) as bench:
            cut = RawStream((text("a"),), "cut")
            # A stream that ends well sets the count back; two that break in a row open the circuit.
            upstream.script(cut, RawStream(WHOLE), cut, cut)
            for fails in (True, False, True, True):
                try:
                    await bench.stream()
                except UpstreamError:
                    assert fails
            with pytest.raises(CircuitOpenError):
                await bench.stream()
            assert len(bench.records) == 5

    asyncio.run(main())
    assert len(upstream.chat_requests) == 4


def test_a_slow_relay_is_not_the_upstreams_silence(upstream: FakeUpstream) -> None:
    async def main() -> None:
        async with opened(upstream) as bench:
            upstream.script(RawStream(WHOLE))

            async def slow(event: StreamEvent) -> None:
                await bench.relay(event)
                if len(bench.handed_on) == 1:
                    await asyncio.sleep(0.4)

            await bench.stream(slow)
            assert bench.records[0].outcome == "success"

    asyncio.run(main())


def test_a_connection_is_used_again_after_a_stream(upstream: FakeUpstream) -> None:
    async def main() -> None:
        async with opened(upstream) as bench:
            for _ in range(5):
                upstream.script(RawStream(WHOLE))
                await bench.stream()

    asyncio.run(main())
    assert upstream.connections == 1


def test_what_came_in_one_packet_with_the_failure_goes_out_before_it(upstream: FakeUpstream) -> None:
    bench, error = run(upstream, RawStream((text("a") + text("b") + b"data: oops\n\n",)))
    assert isinstance(error, UpstreamError)
    assert bench.handed_on == [text("a"), text("b")]


def test_what_was_said_is_kept_only_where_content_is_captured(upstream: FakeUpstream) -> None:
    async def main(setting: str) -> CallRecord:
        async with opened(upstream, otel_instrumentation_genai_capture_message_content=setting) as bench:
            upstream.script(RawStream(WHOLE))
            await bench.stream(content="half \ud83d")
            (record,) = bench.records
            return record

    kept, bare = asyncio.run(main("SPAN_ONLY")), asyncio.run(main("NO_CONTENT"))
    assert (kept.prompt, kept.answer) == ('[{"content": "half ?"}]', "a trace")
    assert (bare.prompt, bare.answer) == (None, None)
