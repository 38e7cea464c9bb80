"""The GenAI span and metrics of each attempt."""

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
from service.telemetry.events import upstream_fields
from service.telemetry.names import ATTR_LLM_COST, ATTR_LLM_ESTIMATED, LLM_PROVIDER
from service.telemetry.providers import Telemetry
from service.upstream.messages import Completion, LlmRequest


class AttemptSpan:
    """The span of one attempt; ``completion`` is what is known of the answer when the attempt ends."""

    def __init__(self, invocation: InferenceInvocation | EmbeddingInvocation) -> None:
        self._invocation = invocation
        self.completion: Completion | None = None

    def record_chunk(self) -> None:
        """Measure the time to an event of a streamed answer, from the start or from the event before."""
        self._invocation.record_stream_chunk()

    def suspend(self) -> None:
        """Make the span that was current before this one current again; this one goes on."""
        self._invocation.suspend()


class AttemptSpans:
    """Starts and ends the spans of attempts.

    Args:
        telemetry: The providers of spans and metrics.
        settings: Says which server is asked.
        known: Maps a model's name to the value that may stand on a metric.
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
        """The span of the block; it fails with what the block raises."""
        invocation = self._start(request, stream=stream)
        span = AttemptSpan(invocation)
        failure: SpanError | None = SpanError(None, "InternalError")
        try:
            yield span
            failure = None
        except ServiceError as error:
            failure = SpanError(error.message, error.name)
            invocation.attributes.update(upstream_fields(error))
            raise
        except asyncio.CancelledError:
            failure = SpanError(None, "cancelled")
            raise
        finally:
            if span.completion is not None:
                self._describe(invocation, span.completion)
            if failure is None:
                invocation.stop()
            else:
                invocation.fail(failure)

    def _start(self, request: LlmRequest, *, stream: bool) -> InferenceInvocation | EmbeddingInvocation:
        invocation: InferenceInvocation | EmbeddingInvocation
        if request.operation == "embeddings":
            invocation = self._handler.embedding(
                LLM_PROVIDER,
                request_model=request.model,
                server_address=self._address,
                server_port=self._port,
            )
        else:
            invocation = self._handler.inference(
                LLM_PROVIDER,
                request_model=request.model,
                server_address=self._address,
                server_port=self._port,
            )
            temperature = request.body.get("temperature")
            if isinstance(temperature, (int, float)) and not isinstance(temperature, bool):
                # A double, as the conventions have it: OTLP cannot encode an integer of more than 64 bits.
                invocation.temperature = float(temperature)
            max_tokens = request.body.get("max_tokens")
            if type(max_tokens) is int:
                invocation.max_tokens = max_tokens
            if stream:
                invocation.request_stream = True
        invocation.metric_attributes[gen_ai.GEN_AI_REQUEST_MODEL] = self._known(request.model)
        return invocation

    def _describe(
        self, invocation: InferenceInvocation | EmbeddingInvocation, completion: Completion
    ) -> None:
        """Put on the span what is known of the answer, which may be incomplete."""
        invocation.response_model_name = completion.model
        # Set again: the answer may have made the name known.
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
            # An estimate stands on the span only: ``output_tokens`` would put it into the metrics too.
            invocation.attributes[gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS] = completion.completion_tokens
            invocation.attributes[ATTR_LLM_ESTIMATED] = True
        else:
            invocation.output_tokens = completion.completion_tokens
