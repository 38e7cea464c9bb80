"""The use case: a prompt goes to a model, and everything about that is counted, logged and traced."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from service.clients.call_record import CallRecord
from service.clients.llm import Completion, LlmClient
from service.clients.llm_errors import CONNECTION
from service.config.settings import Settings
from service.errors import UpstreamTimeoutError
from service.services.call_report import OPERATION, Call, CallReport
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry import names
from service.telemetry.providers import SCOPE, Telemetry
from service.utils.deadline import Deadline
from service.utils.retry import Progress, RetryPolicy, retrying
from service.utils.retry_budget import RetryBudget

BREAKER = "litellm"


class Generation:
    """Answers prompts: breaker around each attempt, attempts within one deadline.

    Args:
        llm: The models' side.
        telemetry: Where spans and counts go.
        settings: The default model, and the numbers of retry and breaker.
        on_unreachable: Called when no connection to the models' side could be made.
        on_ended: Called with each call that has ended, however it did, before its answer goes out.
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
        self._tracer = telemetry.tracer_provider.get_tracer(SCOPE)
        self._breaker = CircuitBreaker(
            BREAKER, settings.breaker_failure_threshold, settings.breaker_timeout_s, telemetry.instruments
        )
        self._ask = retrying(
            OPERATION,
            RetryPolicy(settings.retry_max, settings.retry_base_delay_s, settings.retry_jitter),
            RetryBudget(
                settings.retry_budget_ratio, settings.retry_budget_floor, settings.retry_budget_window_s
            ),
            telemetry.instruments,
            hopeless=lambda: self._breaker.state == "open",
        )(self._attempt)

    async def models(self) -> tuple[str, ...]:
        """The models on offer; raises as the client does."""
        return await self._llm.models()

    async def generate(self, call: Call) -> Completion:
        """Ask the model, again where that helps; the call's ``progress`` tells how it went, in any case.

        Raises:
            CircuitOpenError: The upstream keeps failing, and was not asked.
            ServiceError: As ``LlmClient.complete`` says; the last attempt's.
        """
        request = {**call.body, "model": call.model}
        with self._tracer.start_as_current_span(
            names.SPAN_LLM_CALL,
            attributes={names.ATTR_LLM_DEADLINE: round(call.deadline.left_s, 3)},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            self._report.started(call)
            try:
                completion = await self._ask(call.progress, call.deadline, request, call)
            except BaseException as error:
                self._report.ended(span, call, error=error)
                raise
            self._report.ended(span, call, completion=completion)
            return completion

    async def _attempt(
        self, progress: Progress, deadline: Deadline, request: Mapping[str, Any], call: Call
    ) -> Completion:
        with self._breaker.attempt():
            progress.attempts += 1
            started = self._clock()
            try:
                return await self._llm.complete(request, deadline)
            except UpstreamTimeoutError as error:
                if error.label == CONNECTION:
                    self._on_unreachable()
                raise
            finally:
                call.llm_s += self._clock() - started
