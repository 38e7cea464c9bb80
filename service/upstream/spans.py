"""The GenAI span and metrics of each attempt."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final
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
from service.upstream.operations import MAX_NAME_CHARS, OPERATIONS

MAX_TOKENS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Where the protocols have the limit of an answer's tokens."""

MAX_STOPS: Final = 8
MAX_STOP_CHARS: Final = 64
MAX_SHOWN_ID_CHARS: Final = 512
"""How much of a caller's values stands on a span. LiteLLM's ids of responses have some 400 characters."""


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
        if OPERATIONS[request.operation].genai == "embeddings":
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
                operation_name=OPERATIONS[request.operation].genai,
                conversation_id=_conversation_of(request.body),
            )
            _describe_request(invocation, request.body)
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
        invocation.cache_read_input_tokens = completion.cache_read_tokens
        invocation.cache_write_input_tokens = completion.cache_write_tokens
        invocation.thinking_tokens = completion.reasoning_tokens
        if completion.finish_reasons:
            invocation.finish_reasons = completion.finish_reasons
        if completion.estimated and completion.completion_tokens is not None:
            # An estimate stands on the span only: ``output_tokens`` would put it into the metrics too.
            invocation.attributes[gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS] = completion.completion_tokens
            invocation.attributes[ATTR_LLM_ESTIMATED] = True
        else:
            invocation.output_tokens = completion.completion_tokens


def _describe_request(invocation: InferenceInvocation, body: Mapping[str, Any]) -> None:
    """Put on the span what was asked for, in the conventions' names, whichever protocol names it."""
    invocation.temperature = _double(body.get("temperature"))
    invocation.top_p = _double(body.get("top_p"))
    invocation.frequency_penalty = _double(body.get("frequency_penalty"))
    invocation.presence_penalty = _double(body.get("presence_penalty"))
    limits = (_integer(body.get(name)) for name in MAX_TOKENS)
    invocation.max_tokens = next((limit for limit in limits if limit is not None), None)
    invocation.seed = _integer(body.get("seed"))
    invocation.top_k = _integer(body.get("top_k"))
    choices = _integer(body.get("n"))
    # The conventions leave the usual number out.
    invocation.request_choice_count = None if choices == 1 else choices
    stop = body.get("stop", body.get("stop_sequences"))
    sequences = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    kept = [_encodable(one[:MAX_STOP_CHARS]) for one in sequences[:MAX_STOPS] if isinstance(one, str)]
    invocation.stop_sequences = kept or None
    reasoning = body.get("reasoning")
    effort = body.get("reasoning_effort") or (
        reasoning.get("effort") if isinstance(reasoning, dict) else None
    )
    if isinstance(effort, str):
        invocation.data.request_reasoning_level = _encodable(effort[:MAX_NAME_CHARS])
    previous = body.get("previous_response_id")
    if isinstance(previous, str):
        invocation.data.request_previous_response_id = _encodable(previous[:MAX_SHOWN_ID_CHARS])


def _conversation_of(body: Mapping[str, Any]) -> str | None:
    """The id of the conversation that a response belongs to."""
    given = body.get("conversation")
    name = given.get("id") if isinstance(given, dict) else given
    return _encodable(name[:MAX_SHOWN_ID_CHARS]) if isinstance(name, str) and name else None


def _encodable(text: str) -> str:
    """A text that the exporters can encode: JSON may hold half a surrogate pair, and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def _double(value: object) -> float | None:
    """A number as a double, as the conventions have it; None for anything else, and for what is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _integer(value: object) -> int | None:
    """An integer of 64 bits, as OTLP encodes it; None for anything else."""
    return value if type(value) is int and -(2**63) <= value < 2**63 else None
