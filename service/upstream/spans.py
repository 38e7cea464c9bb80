"""One GenAI span for each attempt, with its metrics: how it begins, and how it ends."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.util.genai.handler import TelemetryHandler
from opentelemetry.util.genai.invocation import EmbeddingInvocation, InferenceInvocation
from opentelemetry.util.genai.types import Error as SpanError

from service.config.settings import Settings
from service.errors import ServiceError
from service.telemetry.names import ATTR_LLM_COST, ATTR_LLM_ESTIMATED
from service.telemetry.providers import Telemetry
from service.upstream.messages import Completion, LlmRequest

PROVIDER = "litellm"


class AttemptSpan:
    """The span of one attempt, and what is learnt on the way."""

    def __init__(self, invocation: InferenceInvocation | EmbeddingInvocation) -> None:
        self._invocation = invocation
        self.completion: Completion | None = None

    def chunk(self) -> None:
        """Note that a piece of a streamed answer has come: time to the first, and time for each further."""
        self._invocation.record_stream_chunk()

    def step_aside(self) -> None:
        """Let what happens from here on belong to the call again; the span goes on."""
        self._invocation.suspend()


class AttemptSpans:
    """Makes the spans.

    Args:
        telemetry: Where they go.
        settings: Who is asked.
        known: A model's name as it may stand on a metric.
    """

    def __init__(self, telemetry: Telemetry, settings: Settings, known: Callable[[str], str]) -> None:
        self._handler = TelemetryHandler(
            telemetry.tracer_provider, telemetry.meter_provider, instrumentation_scope_name=__name__
        )
        self._known = known
        url = urlsplit(settings.litellm_url)
        self._address = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)

    @contextmanager
    def attempt(self, request: LlmRequest, *, stream: bool = False) -> Iterator[AttemptSpan]:
        """The span of what the block does; it ends with the block, well or with the block's error."""
        invocation = self._start(request, stream=stream)
        span = AttemptSpan(invocation)
        try:
            yield span
        except ServiceError as error:
            self._describe(invocation, span.completion)
            invocation.fail(SpanError(error.message, error.name))
            raise
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            self._describe(invocation, span.completion)
            invocation.fail(SpanError(None, "cancelled" if cancelled else "InternalError"))
            raise
        self._describe(invocation, span.completion)
        invocation.stop()

    def _start(self, request: LlmRequest, *, stream: bool) -> InferenceInvocation | EmbeddingInvocation:
        invocation: InferenceInvocation | EmbeddingInvocation
        if request.operation == "embeddings":
            invocation = self._handler.embedding(
                PROVIDER, request_model=request.model, server_address=self._address, server_port=self._port
            )
        else:
            invocation = self._handler.inference(
                PROVIDER, request_model=request.model, server_address=self._address, server_port=self._port
            )
            invocation.temperature = _number(request.body.get("temperature"))
            invocation.max_tokens = _whole(request.body.get("max_tokens"))
            if stream:
                invocation.request_stream = True
        invocation.metric_attributes[gen_ai.GEN_AI_REQUEST_MODEL] = self._known(request.model)
        return invocation

    def _describe(
        self, invocation: InferenceInvocation | EmbeddingInvocation, completion: Completion | None
    ) -> None:
        """Put on the span what is known of the answer, which may be a part of one."""
        if completion is None:
            return
        invocation.response_model_name = completion.model
        # Once more: an answer may have made the name known.
        invocation.metric_attributes[gen_ai.GEN_AI_REQUEST_MODEL] = self._known(str(invocation.request_model))
        invocation.metric_attributes[gen_ai.GEN_AI_RESPONSE_MODEL] = self._known(completion.model)
        invocation.input_tokens = completion.prompt_tokens
        if completion.cost is not None:
            invocation.attributes[ATTR_LLM_COST] = completion.cost
        if isinstance(invocation, EmbeddingInvocation):
            return
        invocation.response_id = completion.id
        if completion.finish_reasons:
            invocation.finish_reasons = completion.finish_reasons
        if completion.estimated and completion.completion_tokens is not None:
            # On the span, for whoever reads it; an estimate is no count, so it is in no metric.
            invocation.attributes[gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS] = completion.completion_tokens
            invocation.attributes[ATTR_LLM_ESTIMATED] = True
        else:
            invocation.output_tokens = completion.completion_tokens


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None
