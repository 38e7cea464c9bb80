"""The one client of the LiteLLM proxy: open, ask, list models, close; the only importer of ``openai``."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any, Final, TypeVar, cast

import httpx2
from openai import APIError, AsyncOpenAI, AsyncStream, Omit
from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor
from opentelemetry.instrumentation.utils import suppress_instrumentation

from service.config.settings import Settings
from service.errors import ServiceError
from service.telemetry.names import OTHER_MODEL
from service.telemetry.providers import Telemetry
from service.upstream.errors import timed_out, translate
from service.upstream.messages import (
    MAX_CONTENT_CHARS,
    PATHS,
    LlmRequest,
    ModelList,
    Reply,
    read_answer,
    read_models,
)
from service.upstream.spans import AttemptSpan, AttemptSpans
from service.upstream.stream import LlmStream
from service.upstream.transport import UpstreamClient, UpstreamTransport
from service.utils.deadline import Deadline

MAX_KNOWN_MODELS = 200
"""A metric gets at most so many values of ``model``, however many the upstream lists."""

SPARE_CONNECTIONS = 8
"""For what no request asks for: the list of models, the health checks."""

NO_KEY = "none"
"""Sent where no key is configured: the SDK insists on one."""

NO_STAINLESS: Final = {"x-stainless-retry-count": Omit(), "x-stainless-read-timeout": Omit()}
"""What the SDK would tell of each request; no model needs to know."""

T = TypeVar("T")


class _Client(AsyncOpenAI):
    """The SDK's client, whose header fields are the same for every request, and put together once."""

    @cached_property
    def default_headers(self) -> dict[str, str | Omit]:
        """Without what the SDK tells of this machine and of itself (``X-Stainless-*``)."""
        fields = super().default_headers
        return {name: value for name, value in fields.items() if not name.lower().startswith("x-stainless-")}


@asynccontextmanager
async def open_llm(settings: Settings, telemetry: Telemetry) -> AsyncIterator["LlmClient"]:
    """Open the process's one pooled client; nothing is sent until it is asked, and leaving closes it."""
    # A connection for each request that may be in flight: waiting for one would be a hidden queue.
    most = settings.max_in_flight + SPARE_CONNECTIONS
    # No redirects: the key goes to the configured proxy and nowhere else. No proxies from the environment.
    http = UpstreamClient(UpstreamTransport(most, settings.llm_max_answer_bytes))
    HTTPX2ClientInstrumentor.instrument_client(
        cast("Any", http),  # annotated for httpx, made for httpx2 too
        tracer_provider=telemetry.tracer_provider,
        meter_provider=telemetry.meter_provider,
    )
    base_url = settings.litellm_url.rstrip("/").removesuffix("/v1") + "/v1"
    client = _Client(
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
        self._keep_chars = MAX_CONTENT_CHARS if settings.captures_content else 0
        self._instruments = telemetry.instruments
        self._spans = AttemptSpans(telemetry, settings, self.known)
        self._root = settings.litellm_url.rstrip("/").removesuffix("/v1")
        # Whole, so that the SDK does not put its base before it anew each time.
        self._urls = {operation: f"{self._root}/v1{path}" for operation, path in PATHS.items()}
        self._known: set[str] = set()
        self._remember((settings.default_model,))

    async def ask(self, request: LlmRequest, deadline: Deadline) -> Reply:
        """Ask for one whole answer, in one attempt.

        Args:
            request: What is asked.
            deadline: When the answer must be there, whole.

        Raises:
            BadRequestError: The upstream refused the request.
            RateLimitError: The upstream limits the rate.
            UpstreamError: It failed, answered nonsense, or refused this service's credentials.
            UpstreamTimeoutError: No answer within the time limit, or it could not be reached.
        """
        with self._spans.attempt(request) as span:
            sending = self._post(request, self._limits(deadline))
            response = await self._guard(sending, deadline, request.body)
            reply = read_answer(response.content, response.headers, request)
            span.completion = reply.completion
            # A model that answers is offered, whether the list names it (a wildcard does not) or not.
            self._remember((request.model,))
        return reply

    @asynccontextmanager
    async def stream(self, request: LlmRequest, deadline: Deadline) -> AsyncIterator[LlmStream]:
        """Ask for one answer in pieces, in one attempt; the block begins when the first piece is there.

        The attempt's span lasts until the block's end, and fails with what the block raises. Leaving it
        before the end of the answer closes the connection, which stops the upstream's work.

        Args:
            request: What is asked; that the answer comes in pieces is added here.
            deadline: When the first piece must be there.

        Raises:
            ServiceError: As ``ask`` does; iterating raises the same.
        """
        asked = request.streamed()
        with self._spans.attempt(asked, stream=True) as span:
            stream: LlmStream | None = None
            try:
                stream = await self._guard(self._begin(asked, span, deadline), deadline, asked.body)
                self._remember((request.model,))
                span.step_aside()
                yield stream
            finally:
                if stream is not None:
                    await stream.aclose()
                    span.completion = stream.completion()

    async def _begin(self, request: LlmRequest, span: AttemptSpan, deadline: Deadline) -> LlmStream:
        # Between two pieces nobody knows what is long: who iterates has the time limits.
        limits = httpx2.Timeout(None, connect=min(self._connect_timeout_s, deadline.left_s))
        response = await self._post(request, limits, stream=True)
        known_model = request.model in self._known
        stream = LlmStream(response, request, span, known_model=known_model, keep_chars=self._keep_chars)
        try:
            await stream.first()
        except BaseException:
            await stream.aclose()
            raise
        return stream

    async def _post(
        self, request: LlmRequest, limits: httpx2.Timeout, *, stream: bool = False
    ) -> httpx2.Response:
        answer = await self._client.post(
            self._urls[request.operation],
            content=request.content,
            cast_to=httpx2.Response,
            options={"timeout": limits, "headers": {**NO_STAINLESS, **request.headers}},
            stream=stream,
            stream_cls=AsyncStream[Any],
        )
        return cast("httpx2.Response", answer)

    async def models(self) -> ModelList:
        """The models that the upstream lists now, in its order; raises as ``ask`` does."""
        asking = self._client.get("/models", cast_to=httpx2.Response, options={"headers": NO_STAINLESS})
        response = await self._guard(asking, Deadline.after(self._timeout_s), {})
        listed = read_models(response.content)
        self._remember(listed.names)
        return listed

    async def learn_models(self) -> bool:
        """Learn which names may stand on a metric; whether that worked. Leaves no span and no metric."""
        with suppress_instrumentation():
            try:
                await self.models()
            except ServiceError:
                return False
        return True

    async def ping(self) -> None:
        """Ask LiteLLM whether it lives and is ready; raises as ``ask`` does. No model is called."""
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
                self._instruments.start_model_at_zero(name)

    async def _guard(self, work: Awaitable[T], deadline: Deadline, body: Mapping[str, Any]) -> T:
        """Await the SDK until the deadline; what it raises comes out as this service's errors."""
        try:
            # The SDK's own limits are for each read: a drip of one byte a second never reaches them.
            async with asyncio.timeout(deadline.left_s):
                return await work
        except TimeoutError:
            raise timed_out(deadline.limit_s) from None
        except APIError as error:
            # The SDK's error holds the request, with its key and prompt: it is not chained on.
            raise translate(error, body, known_model=body.get("model") in self._known) from None

    def _limits(self, deadline: Deadline) -> httpx2.Timeout:
        left_s = deadline.left_s
        return httpx2.Timeout(left_s, connect=min(self._connect_timeout_s, left_s))
