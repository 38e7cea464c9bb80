"""The use case: a request goes to a model, and everything about that is counted, logged and traced."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

from opentelemetry import trace
from opentelemetry.trace import Span

from service.cache.coalescing import Flights
from service.cache.control import ANY
from service.cache.entries import Entry, tokens_of
from service.cache.response_cache import ResponseCache, Ticket
from service.config.settings import Settings
from service.errors import UpstreamTimeoutError
from service.recording.record import CallRecord
from service.services.call_report import Call, CallReport
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry import names
from service.telemetry.providers import SCOPE, Telemetry
from service.upstream.client import LlmClient
from service.upstream.errors import CONNECTION
from service.upstream.messages import PATHS, Completion, LlmRequest, ModelList, Operation, Reply
from service.upstream.stream import LlmStream, Relay, StreamEvent, StreamLimits
from service.utils.deadline import Deadline
from service.utils.retry import Attempt, Progress, RetryBudget, RetryPolicy, retrying

BREAKER = "litellm"


class Generation:
    """Answers requests: breaker around each attempt, attempts within one deadline.

    One call is one of two: ``forward`` gives the whole answer, ``stream`` hands it on in pieces.

    Args:
        llm: The models' side.
        telemetry: Where spans and counts go.
        settings: The default model, and the numbers of retry, breaker and streams.
        on_unreachable: Called when no connection to the models' side could be made.
        on_ended: Called with each call that has ended, before its answer's last byte goes out.
        cache: Answers what was answered before; None where that is off.
        flights: Lets equal calls at the same time share one; None where they do not.
        clock: For durations, in seconds.
    """

    def __init__(  # noqa: PLR0913 - seams and a clock
        self,
        llm: LlmClient,
        telemetry: Telemetry,
        settings: Settings,
        *,
        on_unreachable: Callable[[], None] = lambda: None,
        on_ended: Callable[[CallRecord], None] = lambda _record: None,
        cache: ResponseCache | None = None,
        flights: Flights | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._llm = llm
        self._clock = clock
        self._on_unreachable = on_unreachable
        self._cache = cache
        self._flights = flights
        self._report = CallReport(
            telemetry.instruments, llm.known, on_ended, capture=settings.captures_content
        )
        self.default_model = settings.default_model
        self.timeout_s = settings.llm_timeout_s
        self._limits = StreamLimits.from_settings(settings)
        self._tracer = telemetry.tracer_provider.get_tracer(SCOPE)
        self._breaker = CircuitBreaker(
            BREAKER, settings.breaker_failure_threshold, settings.breaker_timeout_s, telemetry.instruments
        )
        policy = RetryPolicy(settings.retry_max, settings.retry_base_delay_s, settings.retry_jitter)
        # One budget for all that ask the same upstream.
        budget = RetryBudget(
            settings.retry_budget_ratio, settings.retry_budget_floor, settings.retry_budget_window_s
        )

        def breaker_open() -> bool:
            return self._breaker.state == "open"

        self._ask: dict[Operation, Attempt[[LlmRequest, Call], Reply]] = {
            operation: retrying(operation, policy, budget, telemetry.instruments, breaker_open=breaker_open)(
                self._attempt
            )
            for operation in PATHS
        }
        self._open = retrying("chat", policy, budget, telemetry.instruments, breaker_open=breaker_open)(
            self._begin
        )

    async def models(self) -> ModelList:
        """The models on offer; raises as the client does."""
        return await self._llm.models()

    def recall(self, call: Call) -> Reply | None:
        """The answer, where it is in this process's memory; None where the call has to be made.

        A hit takes less time than watching for the caller to leave. What comes of it is reported here.
        """
        if self._cache is None:
            return None
        call.ticket = self._cache.ticket(call)
        entry = self._cache.recall(call, call.ticket) if call.ticket else None
        if entry is None:
            return None
        with self._reported(call):
            reply = self._from_cache(call, entry.reply(), entry)
            call.completion = reply.completion
        return reply

    async def forward(self, call: Call) -> Reply:
        """Ask the model, again where that helps; the call's ``progress`` tells how it went, in any case.

        ``recall`` comes first: without it the call passes the cache by.

        Raises:
            CircuitOpenError: The upstream keeps failing, and was not asked.
            ServiceError: As ``LlmClient.ask`` says; the last attempt's.
        """
        ticket, entry = await self._look_up(call)
        with self._reported(call) as span:
            if entry is not None:
                reply = self._from_cache(call, entry.reply(), entry)
            elif ticket is not None and self._flights is not None and ticket.wish == ANY:
                reply = await self._share(call, ticket, self._flights)
            else:
                reply = await self._fetch(call, ticket, span)
            call.completion = reply.completion
        return reply

    async def stream(self, call: Call, relay: Relay) -> Completion:
        """Ask the model, and hand its answer on, piece by piece; what it came to when it is over.

        Another attempt is made until the first piece is there, and none after it has been handed on. A stored
        answer is handed on in the same way. Streams are not shared between callers: each reads at their own
        pace, and one who does not read would hold up the others.

        Raises:
            CircuitOpenError: The upstream keeps failing, and was not asked.
            UpstreamTimeoutError: There came nothing for too long, or too much for too long.
            ServiceError: As ``LlmClient.stream`` says; the last attempt's.
        """
        ticket = call.ticket = self._cache.ticket(call) if self._cache else None
        entry = self._cache.recall(call, ticket) if self._cache and ticket else None
        if entry is None:
            ticket, entry = await self._look_up(call, sharing=False)
        with self._reported(call) as span:
            if entry is not None:
                call.completion = self._from_cache(call, entry.reply(), entry).completion
                self._report.answering(call)
                await self._limits.hand_on(_in_turn(entry), relay, spent_s=call.clock() - call.started_s)
                return call.completion
            assembler = None if self._cache is None or ticket is None else self._cache.assembler()
            events, held = await self._open(call.progress, call.deadline, call.as_request(), call)
            async with held, self._keeping_count(events, call):
                self._report.answering(call)
                tapped = relay if assembler is None else assembler.tap(relay)
                await self._limits.hand_on(events, tapped, spent_s=call.clock() - call.started_s)
            completion = events.completion()
            reply = assembler.reply(completion) if assembler is not None else None
            if reply is not None and self._cache is not None and ticket is not None:
                self._cache.keep(call, ticket, reply, span.get_span_context())
        return completion

    async def _look_up(self, call: Call, *, sharing: bool = True) -> tuple[Ticket | None, Entry | None]:
        """The call's ticket for the cache, and the stored answer; None for each where there is none."""
        ticket = call.ticket
        if self._cache is None or ticket is None or not ticket.wish.read:
            return ticket, None
        flights = self._flights if sharing else None
        try:
            in_flight = _nothing if flights is None or ticket.wish != ANY else flights.__contains__
            return ticket, await self._cache.look_up(call, ticket, in_flight)
        except BaseException:
            # A call that ends here has begun, and ended, like every other.
            with self._reported(call):
                raise

    def _from_cache(self, call: Call, reply: Reply, entry: Entry) -> Reply:
        call.cached = True
        call.cache.saved_tokens = entry.saved_tokens
        call.cache.saved_cost = entry.completion.cost
        return reply

    async def _share(self, call: Call, ticket: Ticket, flights: Flights) -> Reply:
        """The answer of an equal call that is under way; made here where there is none."""
        here = trace.get_current_span()
        if call.cache.shared:
            # It is a hit when the answer is there.
            call.cache.result = "miss"
        reply, pays = await flights.share(
            ticket.key.digest, call.deadline, call.progress, lambda: self._fetch(call, ticket, here)
        )
        if pays:
            return reply
        call.cached = True
        call.cache.result = "hit"
        call.cache.saved_tokens = tokens_of(reply.completion)
        call.cache.saved_cost = reply.completion.cost
        return Reply(reply.content, replace(reply.completion, cost=0.0))

    async def _fetch(self, call: Call, ticket: Ticket | None, span: Span) -> Reply:
        reply = await self._ask[call.operation](call.progress, call.deadline, call.as_request(), call)
        if ticket is not None and self._cache is not None:
            self._cache.keep(call, ticket, reply, span.get_span_context())
        return reply

    @contextmanager
    def _reported(self, call: Call) -> Iterator[Span]:
        """The ``llm call`` span; says that the call began, and once how it ended."""
        with self._tracer.start_as_current_span(
            names.SPAN_LLM_CALL,
            attributes={names.ATTR_LLM_DEADLINE: round(call.deadline.left_s, 3)},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            self._report.started(call)
            try:
                yield span
            except BaseException as error:
                self._report.ended(span, call, completion=call.completion, error=error)
                raise
            self._report.ended(span, call, completion=call.completion)

    @asynccontextmanager
    async def _keeping_count(self, events: LlmStream, call: Call) -> AsyncIterator[None]:
        try:
            yield
        finally:
            call.completion = events.completion()

    async def _attempt(
        self, progress: Progress, deadline: Deadline, request: LlmRequest, call: Call
    ) -> Reply:
        with self._breaker.attempt(), self._timed(progress, call):
            return await self._llm.ask(request, deadline)

    async def _begin(
        self, progress: Progress, deadline: Deadline, request: LlmRequest, call: Call
    ) -> tuple[LlmStream, AsyncExitStack]:
        """One attempt up to the first piece; the stack holds the rest of it, and decides how it ended."""
        async with AsyncExitStack() as stack:
            stack.enter_context(self._breaker.attempt())
            with self._timed(progress, call):
                events = await stack.enter_async_context(self._llm.stream(request, deadline))
            return events, stack.pop_all()

    @contextmanager
    def _timed(self, progress: Progress, call: Call) -> Iterator[None]:
        progress.attempts += 1
        started = self._clock()
        try:
            yield
        except UpstreamTimeoutError as error:
            if error.label == CONNECTION:
                self._on_unreachable()
            raise
        finally:
            call.llm_s += self._clock() - started


async def _in_turn(entry: Entry) -> AsyncIterator[StreamEvent]:
    for event in entry.events():
        yield event


def _nothing(_digest: object) -> bool:
    return False
