"""The use case: a request goes to a model, and everything about that is counted, logged and traced."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from service.clients.call_record import CallRecord
from service.clients.llm import LlmClient
from service.clients.llm_answers import Completion, ModelList, Reply
from service.clients.llm_errors import CONNECTION
from service.clients.llm_request import PATHS, LlmRequest, Operation
from service.clients.llm_stream import LlmStream
from service.config.settings import Settings
from service.errors import UpstreamTimeoutError
from service.services.call_report import Call, CallReport
from service.services.circuit_breaker import CircuitBreaker
from service.services.stream_limits import Relay, StreamLimits
from service.telemetry import names
from service.telemetry.providers import SCOPE, Telemetry
from service.utils.deadline import Deadline
from service.utils.retry import Attempt, Progress, RetryPolicy, retrying
from service.utils.retry_budget import RetryBudget

BREAKER = "litellm"


class Generation:
    """Answers requests: breaker around each attempt, attempts within one deadline.

    One call is one of three: ``generate`` gives what the answer says, ``forward`` the answer as it came,
    ``stream`` hands it on in pieces.

    Args:
        llm: The models' side.
        telemetry: Where spans and counts go.
        settings: The default model, and the numbers of retry, breaker and streams.
        on_unreachable: Called when no connection to the models' side could be made.
        on_ended: Called with each call that has ended, before its answer's last byte goes out.
        clock: For durations, in seconds.
    """

    def __init__(  # noqa: PLR0913 - two seams and a clock
        self,
        llm: LlmClient,
        telemetry: Telemetry,
        settings: Settings,
        *,
        on_unreachable: Callable[[], None] = lambda: None,
        on_ended: Callable[[CallRecord], None] = lambda _record: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._llm = llm
        self._clock = clock
        self._on_unreachable = on_unreachable
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

        def hopeless() -> bool:
            return self._breaker.state == "open"

        self._ask: dict[Operation, Attempt[[LlmRequest, Call], Reply]] = {
            operation: retrying(operation, policy, budget, telemetry.instruments, hopeless=hopeless)(
                self._attempt
            )
            for operation in PATHS
        }
        self._open = retrying("chat", policy, budget, telemetry.instruments, hopeless=hopeless)(self._begin)

    async def models(self) -> ModelList:
        """The models on offer; raises as the client does."""
        return await self._llm.models()

    async def generate(self, call: Call) -> Completion:
        """Ask the model, and read its answer; raises as ``forward`` does."""
        return (await self.forward(call)).completion

    async def forward(self, call: Call) -> Reply:
        """Ask the model, again where that helps; the call's ``progress`` tells how it went, in any case.

        Raises:
            CircuitOpenError: The upstream keeps failing, and was not asked.
            ServiceError: As ``LlmClient.ask`` says; the last attempt's.
        """
        with self._reported(call):
            reply = await self._ask[call.operation](call.progress, call.deadline, call.as_request(), call)
            call.completion = reply.completion
        return reply

    async def stream(self, call: Call, relay: Relay) -> Completion:
        """Ask the model, and hand its answer on, piece by piece; what it came to when it is over.

        Another attempt is made until the first piece is there, and none after it has been handed on.

        Raises:
            CircuitOpenError: The upstream keeps failing, and was not asked.
            UpstreamTimeoutError: There came nothing for too long, or too much for too long.
            ServiceError: As ``LlmClient.stream`` says; the last attempt's.
        """
        with self._reported(call):
            events, held = await self._open(call.progress, call.deadline, call.as_request(), call)
            async with held, self._keeping_count(events, call):
                self._report.answering(call)
                await self._limits.hand_on(events, relay, spent_s=call.clock() - call.started_s)
        return events.completion()

    @contextmanager
    def _reported(self, call: Call) -> Iterator[None]:
        """The ``llm call`` span; says that the call began, and once how it ended."""
        with self._tracer.start_as_current_span(
            names.SPAN_LLM_CALL,
            attributes={names.ATTR_LLM_DEADLINE: round(call.deadline.left_s, 3)},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            self._report.started(call)
            try:
                yield
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
