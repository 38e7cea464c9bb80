"""The one client of the LiteLLM proxy: open, ask, list models, close; the only importer of ``openai``."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2
from openai import APIError, AsyncOpenAI
from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.util.genai.handler import TelemetryHandler
from opentelemetry.util.genai.invocation import InferenceInvocation
from opentelemetry.util.genai.types import Error as SpanError

from service.clients.bounded_transport import BoundedTransport
from service.clients.llm_errors import nonsense, read_json, timed_out, translate
from service.config.settings import Settings
from service.errors import ServiceError
from service.telemetry.names import ATTR_LLM_COST, OTHER_MODEL
from service.telemetry.providers import Telemetry
from service.utils.deadline import Deadline

PROVIDER = "litellm"
MAX_KNOWN_MODELS = 200
"""A metric gets at most so many values of ``model``, however many the upstream lists."""

MAX_NAME_CHARS = 256
MAX_COUNT = 2**53
MAX_COST = 1e9
COST_HEADERS = ("x-litellm-response-cost", "x-litellm-response-cost-original")
SPARE_CONNECTIONS = 8
"""For what no request asks for: the list of models, the health checks."""

NO_KEY = "none"
"""Sent where no key is configured: the SDK insists on one."""


@dataclass(frozen=True)
class Completion:
    """A model's answer; the counts, and the cost in US dollars, are None where the upstream named none."""

    text: str
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    cost: float | None


@asynccontextmanager
async def open_llm(settings: Settings, telemetry: Telemetry) -> AsyncIterator["LlmClient"]:
    """Open the process's one pooled client; nothing is sent until it is asked, and leaving closes it."""
    # A connection for each request that may be in flight: waiting for one would be a hidden queue.
    most = settings.max_in_flight + SPARE_CONNECTIONS
    limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
    # No redirects: the key goes to the configured proxy and nowhere else. No proxies from the environment.
    transport = BoundedTransport(
        httpx2.AsyncHTTPTransport(limits=limits, trust_env=False), settings.llm_max_answer_bytes
    )
    http = httpx2.AsyncClient(
        transport=transport,
        headers={"Accept-Encoding": "identity"},
        follow_redirects=False,
        trust_env=False,
    )
    HTTPX2ClientInstrumentor.instrument_client(
        cast("Any", http),  # annotated for httpx, made for httpx2 too
        tracer_provider=telemetry.tracer_provider,
        meter_provider=telemetry.meter_provider,
    )
    base_url = settings.litellm_url.rstrip("/").removesuffix("/v1") + "/v1"
    client = AsyncOpenAI(
        api_key=settings.litellm_api_key.get_secret_value() or NO_KEY,
        base_url=base_url,
        timeout=httpx2.Timeout(settings.llm_timeout_s, connect=settings.llm_connect_timeout_s),
        max_retries=0,
        http_client=http,
    )
    async with client:
        yield LlmClient(client, telemetry, settings)


class LlmClient:
    """Asks the models behind LiteLLM, one attempt a call; made by ``open_llm``."""

    def __init__(self, client: AsyncOpenAI, telemetry: Telemetry, settings: Settings) -> None:
        self._client = client
        self._timeout_s = settings.llm_timeout_s
        self._connect_timeout_s = settings.llm_connect_timeout_s
        self._instruments = telemetry.instruments
        self._spans = TelemetryHandler(
            telemetry.tracer_provider, telemetry.meter_provider, instrumentation_scope_name=__name__
        )
        self._root = settings.litellm_url.rstrip("/").removesuffix("/v1")
        url = urlsplit(settings.litellm_url)
        self._address = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._known: set[str] = set()
        self._remember((settings.default_model,))

    async def complete(self, body: Mapping[str, Any], deadline: Deadline) -> Completion:
        """Ask for one chat completion, in one attempt.

        Args:
            body: The request in OpenAI's shape, with ``model`` and ``messages``.
            deadline: When the answer must be there, whole.

        Raises:
            BadRequestError: The upstream refused the request.
            RateLimitError: The upstream limits the rate.
            UpstreamError: It failed, answered nonsense, or refused this service's credentials.
            UpstreamTimeoutError: No answer within the time limit, or it could not be reached.
        """
        model = str(body["model"])
        span = self._start(model, body)
        try:
            response = await self._guard(
                self._client.post(
                    "/chat/completions",
                    body=body,
                    cast_to=httpx2.Response,
                    options={"timeout": self._limits(deadline)},
                ),
                deadline,
                body,
            )
            payload = read_json(response)
            completion = _completion(payload, model, response.headers)
        except ServiceError as error:
            span.fail(SpanError(error.message, error.name))
            raise
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            span.fail(SpanError(None, "cancelled" if cancelled else "InternalError"))
            raise
        # A model that answers is offered, whether the list names it (a wildcard does not) or not.
        self._remember((model,))
        self._finish(span, payload, completion)
        return completion

    async def models(self) -> tuple[str, ...]:
        """The models that the upstream lists now, in its order; raises as ``complete`` does."""
        deadline = Deadline.after(self._timeout_s)
        payload = read_json(
            await self._guard(self._client.get("/models", cast_to=httpx2.Response), deadline, {})
        )
        entries = payload.get("data")
        if not isinstance(entries, list):
            raise nonsense()
        names = tuple(
            entry["id"][:MAX_NAME_CHARS]
            for entry in entries
            if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        )
        self._remember(names)
        return names

    async def learn_models(self) -> bool:
        """Learn which names may stand on a metric; whether that worked. Leaves no span and no metric."""
        with suppress_instrumentation():
            try:
                await self.models()
            except ServiceError:
                return False
        return True

    async def ping(self) -> None:
        """Ask LiteLLM whether it lives and is ready; raises as ``complete`` does. No model is called."""
        for path in ("/health/liveliness", "/health/readiness"):
            asking = self._client.get(self._root + path, cast_to=httpx2.Response)
            await self._guard(asking, Deadline.after(self._timeout_s), {})

    def known(self, model: str) -> str:
        """The model's name as it may stand on a metric."""
        return model if model in self._known else OTHER_MODEL

    def _remember(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self._known and len(self._known) < MAX_KNOWN_MODELS:
                self._known.add(name)
                self._instruments.expect_model(name)

    async def _guard(
        self, sending: Awaitable[httpx2.Response], deadline: Deadline, body: Mapping[str, Any]
    ) -> httpx2.Response:
        """Await the SDK until the deadline; what it raises comes out as this service's errors."""
        try:
            # The SDK's own limits are for each read: a drip of one byte a second never reaches them.
            async with asyncio.timeout(deadline.left_s):
                return await sending
        except TimeoutError:
            raise timed_out(deadline.limit_s) from None
        except APIError as error:
            # The SDK's error holds the request, with its key and prompt: it is not chained on.
            raise translate(error, body, known_model=body.get("model") in self._known) from None

    def _limits(self, deadline: Deadline) -> httpx2.Timeout:
        left_s = deadline.left_s
        return httpx2.Timeout(left_s, connect=min(self._connect_timeout_s, left_s))

    def _start(self, model: str, body: Mapping[str, Any]) -> InferenceInvocation:
        span = self._spans.inference(
            PROVIDER, request_model=model, server_address=self._address, server_port=self._port
        )
        span.temperature = body.get("temperature")
        span.max_tokens = body.get("max_tokens")
        span.metric_attributes[gen_ai.GEN_AI_REQUEST_MODEL] = self.known(model)
        return span

    def _finish(self, span: InferenceInvocation, payload: Mapping[str, Any], completion: Completion) -> None:
        identifier = payload.get("id")
        if isinstance(identifier, str):
            span.response_id = identifier[:MAX_NAME_CHARS]
        reason = payload["choices"][0].get("finish_reason")
        if isinstance(reason, str):
            span.finish_reasons = [reason[:MAX_NAME_CHARS]]
        span.response_model_name = completion.model
        span.input_tokens = completion.prompt_tokens
        span.output_tokens = completion.completion_tokens
        if completion.cost is not None:
            span.attributes[ATTR_LLM_COST] = completion.cost
        span.metric_attributes[gen_ai.GEN_AI_REQUEST_MODEL] = self.known(str(span.request_model))
        span.metric_attributes[gen_ai.GEN_AI_RESPONSE_MODEL] = self.known(completion.model)
        span.stop()


def _completion(payload: Mapping[str, Any], model: str, headers: httpx2.Headers) -> Completion:
    """The answer in a response's body; ``UpstreamError`` where there is none."""
    choices = payload.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise nonsense()
    text = message.get("content")
    if text is None:
        # A refusal, or a call of tools, which has no text.
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise nonsense()
    answered = payload.get("model")
    usage = payload.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Completion(
        text=text,
        model=answered[:MAX_NAME_CHARS] if isinstance(answered, str) and answered else model,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
        total_tokens=_count(counts.get("total_tokens")),
        cost=_cost(headers),
    )


def _count(value: object) -> int | None:
    # One number beyond what OTLP can encode would end the export of all metrics for good.
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def _cost(headers: httpx2.Headers) -> float | None:
    """The call's price as LiteLLM reports it; a free model's comes in the second field only."""
    for name in COST_HEADERS:
        try:
            cost = float(headers.get(name, ""))
        except ValueError:
            continue
        if 0 <= cost <= MAX_COST:
            return cost
    return None
