"""The use case: a request goes to a model, within one deadline, and every call is reported once.

A whole answer and a stream take the same path: cache look-up, then the attempts (each behind the circuit
breaker) within the deadline, then the report. They differ in how the answer is taken.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, ParamSpec, Self, TypeVar

from opentelemetry.trace import Span

from service.cache.assembly import Assembler
from service.cache.coalescing import Coalescing, NoCoalescing
from service.cache.control import applied
from service.cache.entries import Entry, tokens_of
from service.cache.response_cache import AnswerCache, Lookup, Slot
from service.config.settings import Settings
from service.errors import UNREACHABLE, CallerLeftError, Cause, ServiceError, UpstreamTimeoutError
from service.recording.record import MAX_TRIES, AttemptRecord
from service.recording.recorder import CallRecorder
from service.services.call_report import CallOutcome, CallReport, CallSpec, Outcome
from service.services.circuit_breaker import ConnectionBreaker
from service.services.circuits import Circuits, Passage
from service.shared.leases import Leases, LeaseTimeoutError
from service.telemetry import names
from service.telemetry.events import failure_fields
from service.telemetry.providers import SCOPE, Telemetry
from service.upstream.client import LlmClient
from service.upstream.errors import timed_out
from service.upstream.messages import Completion, ModelList, Reply
from service.upstream.operations import OPERATIONS, OperationName
from service.upstream.stream import ALIVE, EVENT_STREAM, AnswerEvents, StreamEvent
from service.utils.deadline import Deadline
from service.utils.retry import Attempt, Progress, RetryBudget, RetryPolicy, Tried, retrying

BREAKER: Final = "litellm"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer to a call, and how the call ended."""

    reply: Reply
    outcome: CallOutcome


class AnswerStream:
    """The events of one answer, to be iterated once; made by ``Generation.stream``.

    ``completion`` and ``outcome`` are set when the call has ended, which is after the block of
    ``Generation.stream``.

    Args:
        events: The events, from the upstream or from the cache.
        assembler: Puts the pieces together for the cache.
        limit: The limit around the whole block.
        silence_s: Seconds that the upstream may be silent between two events.
        end_s: When the whole stream must be over, on the event loop's clock.
    """

    completion: Completion
    outcome: CallOutcome

    def __init__(
        self,
        events: "AnswerEvents | _StoredStream",
        assembler: Assembler,
        limit: asyncio.Timeout,
        silence_s: float,
        end_s: float,
    ) -> None:
        self.content_type = events.content_type
        self._events = events
        self._assembler = assembler
        self._limit = limit
        self._silence_s = silence_s
        self._end_s = end_s
        self._now = asyncio.get_running_loop().time
        self._handed_on: StreamEvent | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        # The caller has the last event by now: this is not on its time.
        if self._handed_on is not None:
            self._assembler.take(self._handed_on)
        event: StreamEvent | None = ALIVE
        while event is ALIVE:
            # The time that the caller takes to read an event does not count as the upstream's silence.
            self._limit.reschedule(min(self._end_s, self._now() + self._silence_s))
            event = await anext(self._events, None)
        self._handed_on = event
        self._limit.reschedule(self._end_s)
        if event is None:
            raise StopAsyncIteration
        return event


@dataclass(slots=True)
class _Call:
    """The state of one call while it runs; nothing outside this module sees it."""

    spec: CallSpec
    clock: Callable[[], float]
    started_ns: int
    started_s: float
    lookup: Lookup = field(default_factory=Lookup)
    passage: Passage | None = None
    progress: Progress = field(default_factory=Progress)
    cached_from: Completion | None = None
    completion: Completion | None = None
    llm_s: float = 0.0
    first_chunk_s: float | None = None
    streams: bool = False
    ended: CallOutcome = field(init=False)

    def outcome(self, error: BaseException | None = None) -> CallOutcome:
        """Freeze the call as it is now."""
        cached = self.cached_from
        outcome: Outcome = "success" if cached is None else "cached"
        name = reason = code = None
        status: int | None = None
        if isinstance(error, (asyncio.CancelledError, CallerLeftError)):
            outcome = "cancelled"
        elif error is not None:
            outcome, name, reason = "error", "InternalError", "Bug"
            if isinstance(error, ServiceError):
                name, reason = error.name, error.label
                status, code = error.upstream_status, error.upstream_code
        seen = self.lookup.seen
        if cached is not None:
            seen = "hit"
        elif seen == "hit":
            # An equal call was under way, and its answer is not there, or was left for this call to pay.
            seen = "miss"
        now_s = self.clock()
        return CallOutcome(
            outcome=outcome,
            error=name,
            reason=reason,
            completion=self.completion,
            lookup=self.lookup,
            cache=seen,
            saved_tokens=0 if cached is None else tokens_of(cached),
            saved_cost=None if cached is None else cached.cost,
            attempts=self.progress.attempts,
            tries=self._tries(now_s, error),
            retry_ended=self.progress.ended,
            retry_s=self.progress.waited_s,
            llm_s=self.llm_s,
            first_chunk_s=self.first_chunk_s,
            started_ns=self.started_ns,
            duration_s=round(now_s - self.started_s, 6),
            failure=failure_fields(error),
            upstream_status=status,
            upstream_code=code,
        )

    def _tries(self, now_s: float, error: BaseException | None) -> tuple[AttemptRecord, ...]:
        """The attempts until now, the first ones where there are too many."""
        tried, waits_s = self.progress.tried[:MAX_TRIES], self.progress.waits_s
        if self.streams and tried:
            # The attempt goes on after its first piece, and ends as the stream does.
            started_s = tried[-1].started_s
            tried[-1] = Tried(started_s, now_s) if error is None else Tried.failed(started_s, now_s, error)
        # One that was taken over from an equal call began before this call did.
        began_s = self.started_s
        return tuple(
            AttemptRecord(
                started_s=round(max(each.started_s - began_s, 0.0), 6),
                duration_s=round(max(each.ended_s - max(each.started_s, began_s), 0.0), 6),
                error=each.error,
                cause=each.cause,
                status=each.status,
                wait_s=round(waits_s[number], 6) if number < len(waits_s) else 0.0,
            )
            for number, each in enumerate(tried)
        )


class Generation:
    """Answers model calls.

    Args:
        llm: The client of the models' side.
        cache: Finds stored answers and takes new ones.
        coalescing: Lets equal calls at the same time share one upstream call.
        leases: Let them share one with those of other processes.
        recorder: Takes the record of each call that has ended, before the last byte of its answer is sent.
        telemetry: Where spans and counts go.
        settings: The default model, and the numbers of retry, breaker and streams.
        on_unreachable: Called when no connection to the upstream could be made.
        clock: Monotonic, in seconds.
    """

    def __init__(  # noqa: PLR0913 - the collaborators of the use case
        self,
        llm: LlmClient,
        telemetry: Telemetry,
        settings: Settings,
        *,
        cache: AnswerCache,
        coalescing: Coalescing | NoCoalescing,
        leases: Leases,
        recorder: CallRecorder,
        on_unreachable: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        instruments = telemetry.instruments
        self.default_model = settings.default_model
        self.timeout_s = settings.llm_timeout_s
        self._llm = llm
        self._cache = cache
        self._cache_sampled = settings.cache_sampled
        self._coalescing = coalescing
        self._leases = leases
        self._on_unreachable = on_unreachable
        self._clock = clock
        self._recorder = recorder
        self._report = CallReport(instruments, llm.known, recorder.record, capture=settings.captures_content)
        self._silence_s = settings.stream_chunk_timeout_s
        # Never shorter than the wait for the first piece.
        self._stream_s = max(settings.stream_timeout_s, settings.llm_timeout_s)
        self._tracer = telemetry.tracer_provider.get_tracer(SCOPE)
        opens = settings.breaker_failure_threshold, settings.breaker_timeout_s
        self.connections = ConnectionBreaker(BREAKER, *opens, instruments)
        """Whether LiteLLM can be reached."""
        self.circuits = Circuits(*opens, instruments, llm.known, time.monotonic)
        """Which models are asked for which callers."""
        policy = RetryPolicy(settings.retry_max, settings.retry_base_delay_s, settings.retry_jitter)
        # One budget for all operations: they ask the same upstream.
        budget = RetryBudget(
            settings.retry_budget_ratio, settings.retry_budget_floor, settings.retry_budget_window_s
        )

        def retried(operation: OperationName, attempt: Attempt[P, T]) -> Attempt[P, T]:
            return retrying(operation, policy, budget, instruments, breaker_open=self._breaker_open)(attempt)

        self._whole = {operation: retried(operation, self._attempt) for operation in OPERATIONS}
        self._open = {operation: retried(operation, self._attempt_stream) for operation in OPERATIONS}

    def _breaker_open(self, call: _Call, *_held: object) -> bool:
        return self.connections.state == "open" or (call.passage is not None and call.passage.last_attempt)

    async def models(self) -> ModelList:
        """List the models on offer; raises as ``LlmClient.models`` does."""
        return await self._llm.models()

    async def answer(self, spec: CallSpec) -> Answer:
        """Answer a call whole: from the cache, from an equal call under way, or from the model.

        Raises:
            CircuitOpenError: The upstream keeps failing, and was not asked.
            ServiceError: As ``LlmClient.ask`` says; the last attempt's.
        """
        async with self._call(spec) as (call, span):
            entry, slot = call.lookup.entry, call.lookup.slot
            if entry is not None:
                reply, call.cached_from = entry.reply(), entry.completion
            elif slot is not None and slot.control.shares:
                reply, pays = await self._coalescing.share(
                    slot.key.digest, spec.deadline, call.progress, partial(self._ask_once, call, slot, span)
                )
                if not pays:
                    call.cached_from = reply.completion
                    reply = Reply(reply.content, replace(reply.completion, cost=0.0))
            else:
                reply, _stored = await self._ask(call, span)
            call.completion = reply.completion
        return Answer(reply, call.ended)

    @asynccontextmanager
    async def stream(self, spec: CallSpec) -> AsyncIterator[AnswerStream]:
        """Answer a call in pieces; the block begins when the first piece is there.

        Attempts are made until then, and none afterwards. The block ends the call: leaving it early stops the
        upstream's work. A stored answer comes in the same way. A stream is not shared between callers: each
        reads at its own pace, and one that does not read would hold up the others.

        Raises:
            CircuitOpenError: The upstream keeps failing, and was not asked.
            UpstreamTimeoutError: The upstream was silent, or the stream went on, for too long.
            ServiceError: As ``LlmClient.stream`` says; the last attempt's.
        """
        async with self._call(spec, shares=False) as (call, span), AsyncExitStack() as held:
            entry, assembler = call.lookup.entry, self._cache.assembler(call.lookup)
            events: AnswerEvents | _StoredStream
            if entry is not None:
                call.cached_from = entry.completion
                events = _StoredStream(entry)
            else:
                await self._llm.check_model(spec.request, spec.deadline)
                passage = call.passage = held.enter_context(self.circuits.call(spec.request.model, spec.user))
                events = await self._open[spec.request.operation](call.progress, spec.deadline, call, held)
                passage.answered()
                call.streams = True
            call.first_chunk_s = round(self._clock() - call.started_s, 6)
            self._report.answering(spec, call.outcome())
            end_s = asyncio.get_running_loop().time() + self._stream_s - (self._clock() - call.started_s)
            try:
                async with asyncio.timeout_at(end_s) as limit:
                    stream = AnswerStream(events, assembler, limit, self._silence_s, end_s)
                    yield stream
            except TimeoutError:
                if not limit.expired():
                    raise
                # Timers fire a little early, so the clock does not tell which limit it was.
                raise self._stream_too_long() if limit.when() == end_s else self._silence() from None
            finally:
                completion = call.completion = events.completion()
            if entry is None:
                origin = span.get_span_context()
                self._cache.store_streamed(call.lookup, assembler, completion, spec.request.model, origin)
        stream.completion, stream.outcome = completion, call.ended

    def _stream_too_long(self) -> UpstreamTimeoutError:
        # The upstream was still sending, so this does not count against it.
        return UpstreamTimeoutError(
            f"The answer was not complete within {self._stream_s:g} s.",
            retryable=False,
            label="Stream too long",
        )

    def _silence(self) -> UpstreamTimeoutError:
        return UpstreamTimeoutError(
            f"The model said nothing for {self._silence_s:g} s. Try again.",
            label="Silence",
            cause=Cause.READ_TIMEOUT,
        )

    @asynccontextmanager
    async def _call(self, spec: CallSpec, *, shares: bool = True) -> AsyncIterator[tuple[_Call, Span]]:
        """Look the answer up, then run the block in the ``llm call`` span; report the call once."""
        call = _Call(spec, self._clock, time.time_ns(), self._clock())
        control = applied(
            spec.cache_control, spec.request.body, self._cache_sampled, own_protocol=spec.own_protocol
        )
        stopped: BaseException | None = None
        try:
            call.lookup = await self._cache.lookup(
                spec.request,
                spec.user,
                control,
                spec.deadline,
                self._coalescing.in_flight if shares and control.shares else _never,
            )
        except BaseException as error:  # noqa: BLE001 - a caller who leaves now has made a call all the same
            stopped = error
        with self._tracer.start_as_current_span(
            names.SPAN_LLM_CALL,
            attributes={names.ATTR_LLM_DEADLINE: round(spec.deadline.left_s, 3)},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            self._report.started(spec)
            try:
                if stopped is not None:
                    raise stopped  # noqa: TRY301 - so that it is reported like what the block raises
                yield call, span
            except BaseException as error:
                self._report.ended(span, spec, call.outcome(error))
                if isinstance(error, Exception):
                    await self._recorder.written()
                raise
            call.ended = call.outcome()
            self._report.ended(span, spec, call.ended)
            await self._recorder.written()

    async def _ask_once(self, call: _Call, slot: Slot, span: Span) -> tuple[Reply, bool]:
        """Ask the model, or take the answer of another process that asks the same; whether it is billed."""
        deadline = call.spec.deadline
        try:
            async with self._leases.lease(slot.key.digest, deadline, span.get_span_context()) as lease:
                if lease.answer is not None and lease.origin is not None:
                    entry = self._cache.accept(slot, lease.answer, followed=lease.followed)
                    if entry is not None:
                        # The span has ended where its caller has left.
                        if span.is_recording():
                            span.add_link(lease.origin)
                            span.set_attribute(names.ATTR_CACHE_SHARED, True)  # noqa: FBT003 - a value
                        return Reply(entry.content, entry.completion), False
                reply, stored = await self._ask(call, span)
                if stored is not None:
                    lease.made = stored.as_json
                return reply, True
        except LeaseTimeoutError:
            raise timed_out(deadline.limit_s) from None

    async def _ask(self, call: _Call, span: Span) -> tuple[Reply, Entry | None]:
        """Ask the model for a whole answer, with retries, and store it; the answer, and what is stored."""
        spec = call.spec
        await self._llm.check_model(spec.request, spec.deadline)
        with self.circuits.call(spec.request.model, spec.user) as call.passage:
            reply = await self._whole[spec.request.operation](call.progress, spec.deadline, call)
        return reply, self._cache.store(call.lookup, reply, spec.request.model, span.get_span_context())

    async def _attempt(self, progress: Progress, deadline: Deadline, call: _Call) -> Reply:
        """Make one attempt at a whole answer."""
        with self.connections.attempt(), self._timed(progress, call):
            return await self._llm.ask(call.spec.request, deadline)

    async def _attempt_stream(
        self, progress: Progress, deadline: Deadline, call: _Call, held: AsyncExitStack
    ) -> AnswerEvents:
        """Make one attempt, up to the first piece; ``held`` keeps it open, and decides how it ended."""
        async with AsyncExitStack() as attempt:
            attempt.enter_context(self.connections.attempt())
            with self._timed(progress, call):
                events = await attempt.enter_async_context(self._llm.stream(call.spec.request, deadline))
            await held.enter_async_context(attempt.pop_all())
        return events

    @contextmanager
    def _timed(self, progress: Progress, call: _Call) -> Iterator[None]:
        progress.attempts += 1
        started_s = self._clock()
        try:
            yield
        except BaseException as error:
            ended_s = self._clock()
            progress.tried.append(Tried.failed(started_s, ended_s, error))
            if isinstance(error, ServiceError) and error.cause in UNREACHABLE:
                self._on_unreachable()
            raise
        else:
            ended_s = self._clock()
            progress.tried.append(Tried(started_s, ended_s))
        finally:
            call.llm_s += ended_s - started_s


class _StoredStream:
    """A stored answer as a stream."""

    content_type = EVENT_STREAM

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._events = iter(entry.events())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        for event in self._events:
            return event
        raise StopAsyncIteration

    def completion(self) -> Completion:
        """The whole answer, which costs nothing this time."""
        return self._entry.reply().completion


def _never(_digest: str) -> bool:
    return False
