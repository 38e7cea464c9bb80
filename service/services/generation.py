"""The use case: a prompt goes to a model, and everything about that is counted, logged and traced."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import Span, Status, StatusCode

from service.clients.llm import Completion, LlmClient
from service.clients.llm_errors import CONNECTION
from service.config.logging import current_request
from service.config.settings import Settings
from service.errors import ServiceError, UpstreamTimeoutError
from service.services.circuit_breaker import CircuitBreaker
from service.telemetry import names
from service.telemetry.providers import SCOPE, Telemetry
from service.utils.deadline import Deadline
from service.utils.retry import Progress, RetryPolicy, retrying
from service.utils.retry_budget import RetryBudget

OPERATION = "chat"
BREAKER = "litellm"

logger = logging.getLogger(__name__)


@dataclass
class Call:
    """One prompt on its way: what is asked, by whom, until when, and how far it has come.

    Args:
        body: The request in OpenAI's shape; without ``model``, the default one is asked.
        user: Who asks; stands in the log lines.
        deadline: When the answer must be there.
    """

    body: Mapping[str, Any]
    user: str
    deadline: Deadline
    progress: Progress = field(default_factory=Progress)
    llm_s: float = 0.0


class Generation:
    """Answers prompts: breaker around each attempt, attempts within one deadline.

    Args:
        llm: The models' side.
        telemetry: Where spans and counts go.
        settings: The default model, and the numbers of retry and breaker.
        on_unreachable: Called when no connection to the models' side could be made.
        clock: For durations, in seconds.
    """

    def __init__(
        self,
        llm: LlmClient,
        telemetry: Telemetry,
        settings: Settings,
        on_unreachable: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._llm = llm
        self._clock = clock
        self._on_unreachable = on_unreachable
        self.default_model = settings.default_model
        self.timeout_s = settings.llm_timeout_s
        self._tracer = telemetry.tracer_provider.get_tracer(SCOPE)
        self._instruments = telemetry.instruments
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
        request = {**call.body, "model": call.body.get("model") or self.default_model}
        fields = {"user": call.user, "model": request["model"]}
        started = self._clock()
        with self._tracer.start_as_current_span(
            names.SPAN_LLM_CALL,
            attributes={names.ATTR_LLM_DEADLINE: round(call.deadline.left_s, 3)},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            logger.info("llm_request_started", extra=fields)
            try:
                completion = await self._ask(call.progress, call.deadline, request, call)
            except asyncio.CancelledError:
                self._end(span, call, request["model"], "cancelled")
                logger.warning(
                    "llm_request_failed",
                    extra={**fields, "outcome": "cancelled", **self._effort(call, started)},
                )
                raise
            except Exception as error:
                name, reason = "InternalError", "Bug"
                if isinstance(error, ServiceError):
                    name, reason = error.name, error.label
                self._end(span, call, request["model"], "error", name)
                logger.warning(
                    "llm_request_failed",
                    extra={
                        **fields,
                        "outcome": "error",
                        "error": name,
                        "reason": reason,
                        **self._effort(call, started),
                    },
                )
                raise
            self._end(span, call, request["model"], "success")
            if completion.cost is not None:
                self._instruments.llm_cost.add(completion.cost, {"model": self._llm.known(request["model"])})
            logger.info(
                "llm_request_completed",
                extra={
                    **fields,
                    "outcome": "success",
                    **_usage(completion),
                    **self._effort(call, started),
                },
            )
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

    def _end(self, span: Span, call: Call, model: str, outcome: str, error: str | None = None) -> None:
        attributes = {"model": self._llm.known(model), "outcome": outcome}
        span.set_attributes(
            {
                names.ATTR_LLM_OUTCOME: outcome,
                names.ATTR_LLM_ATTEMPTS: call.progress.attempts,
                names.ATTR_LLM_DEADLINE_LEFT: round(call.deadline.left_s, 3),
            }
        )
        if call.progress.ended and outcome == "error":
            span.set_attribute(names.ATTR_RETRY_OUTCOME, call.progress.ended)
        if error is not None:
            attributes[ERROR_TYPE] = error
            span.set_attribute(ERROR_TYPE, error)
        if outcome != "success":
            span.set_status(Status(StatusCode.ERROR))
        self._instruments.llm_calls.add(1, attributes)
        answer = current_request.get()
        if answer is not None:
            answer.headers["X-LLM-Attempts"] = str(call.progress.attempts)
            answer.timings_s["auth"] = answer.auth_s
            answer.timings_s["llm"] = call.llm_s
            if call.progress.waited_s:
                answer.timings_s["retry"] = call.progress.waited_s

    def _effort(self, call: Call, started: float) -> dict[str, float]:
        return {"attempts": call.progress.attempts, "duration_s": round(self._clock() - started, 6)}


def _usage(completion: Completion) -> dict[str, float]:
    reported = {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "total_tokens": completion.total_tokens,
        "cost": completion.cost,
    }
    return {name: value for name, value in reported.items() if value is not None}
