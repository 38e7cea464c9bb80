"""The use case: a prompt goes to a model, and everything about that is counted, logged and traced."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import Span, Status, StatusCode

from service.clients.llm import Completion, LlmClient
from service.config.settings import Settings
from service.errors import ServiceError
from service.telemetry import names
from service.telemetry.providers import SCOPE, Telemetry

logger = logging.getLogger(__name__)


class Generation:
    """Answers prompts.

    Args:
        llm: The models' side.
        telemetry: Where spans and counts go.
        settings: The default model and the time limit.
    """

    def __init__(self, llm: LlmClient, telemetry: Telemetry, settings: Settings) -> None:
        self._llm = llm
        self.default_model = settings.default_model
        self._timeout_s = settings.llm_timeout_s
        self._tracer = telemetry.tracer_provider.get_tracer(SCOPE)
        self._instruments = telemetry.instruments

    async def models(self) -> tuple[str, ...]:
        """The models on offer; raises as the client does."""
        return await self._llm.models()

    async def generate(self, body: Mapping[str, Any], user: str) -> Completion:
        """Ask the model, once.

        Args:
            body: The request in OpenAI's shape; without ``model``, the default one is asked.
            user: Who asks; stands in the log lines.

        Raises:
            ServiceError: As ``LlmClient.complete`` says.
        """
        request = {**body, "model": body.get("model") or self.default_model}
        fields = {"user": user, "model": request["model"]}
        started = time.perf_counter()
        with self._tracer.start_as_current_span(
            names.SPAN_LLM_CALL,
            attributes={
                names.ATTR_LLM_DEADLINE: self._timeout_s,
                names.ATTR_LLM_ATTEMPTS: 1,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            logger.info("llm_request_started", extra=fields)
            try:
                completion = await self._llm.complete(request)
            except asyncio.CancelledError:
                self._count(span, request["model"], "cancelled")
                logger.warning(
                    "llm_request_failed", extra={**fields, "outcome": "cancelled", **_duration(started)}
                )
                raise
            except Exception as error:
                name = error.name if isinstance(error, ServiceError) else "InternalError"
                self._count(span, request["model"], "error", name)
                logger.warning(
                    "llm_request_failed",
                    extra={**fields, "outcome": "error", "error": name, **_duration(started)},
                )
                raise
            self._count(span, request["model"], "success")
            if completion.cost is not None:
                self._instruments.llm_cost.add(completion.cost, {"model": self._llm.known(request["model"])})
            logger.info(
                "llm_request_completed",
                extra={**fields, "outcome": "success", **_usage(completion), **_duration(started)},
            )
            return completion

    def _count(self, span: Span, model: str, outcome: str, error: str | None = None) -> None:
        attributes = {"model": self._llm.known(model), "outcome": outcome}
        span.set_attribute(names.ATTR_LLM_OUTCOME, outcome)
        if error is not None:
            attributes[ERROR_TYPE] = error
            span.set_attribute(ERROR_TYPE, error)
        if outcome != "success":
            span.set_status(Status(StatusCode.ERROR))
        self._instruments.llm_calls.add(1, attributes)


def _duration(started: float) -> dict[str, float]:
    return {"duration_s": round(time.perf_counter() - started, 6)}


def _usage(completion: Completion) -> dict[str, float]:
    reported = {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "total_tokens": completion.total_tokens,
        "cost": completion.cost,
    }
    return {name: value for name, value in reported.items() if value is not None}
