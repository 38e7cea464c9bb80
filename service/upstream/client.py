"""The one client of the LiteLLM proxy: whole answers, streams, the list of models, pings."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Collection, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any, Final

import cachetools
import httpx2
from openai import APIError, APIStatusError
from opentelemetry.instrumentation.utils import suppress_instrumentation

from service.config.settings import Settings
from service.errors import Cause, ServiceError, UpstreamError
from service.telemetry.client import instrument_client
from service.telemetry.names import OTHER_MODEL
from service.telemetry.providers import Telemetry
from service.upstream.errors import cause_of, timed_out, translate
from service.upstream.messages import (
    MAX_CONTENT_CHARS,
    LlmRequest,
    ModelList,
    Reply,
    read_answer,
    read_models,
)
from service.upstream.offered_models import WILDCARD, OfferedModels
from service.upstream.operations import OPERATIONS
from service.upstream.reasons import load_rules
from service.upstream.sdk import PreparedOpenAI
from service.upstream.spans import AttemptSpan, AttemptSpans
from service.upstream.stream import (
    EVENT_STREAM,
    AnswerEvents,
    ByteStream,
    LlmStream,
    Reading,
    media_type_of,
)
from service.upstream.transport import UpstreamClient, UpstreamTransport
from service.upstream.upload import Upload
from service.utils.deadline import Deadline

MAX_LISTED_MODELS = 200
"""How many of the models that the upstream lists are values of ``model`` on a metric."""

MAX_UNLISTED_MODELS = 40
"""How many models are values of ``model`` because they answered, though the list does not name them.

Callers can fill these places where the upstream answers to any name. They cannot take those of the list."""

SPARE_CONNECTIONS = 8
"""Connections for what no caller's request causes: the list of models, the health checks."""

READERS = 2
"""Threads that read large answers. Reading one holds the interpreter's lock, so more would not be faster."""

NO_KEY = "none"
"""Sent where no key is configured, because the SDK requires one."""


STREAM_OPTIONS: Final = re.compile(r"stream_options|include_usage", re.IGNORECASE)
"""What the refusal of token counts at the end of a stream says, in its message or as a field at fault."""

REFUSALS: Final = frozenset({400, 422})
MAX_WITHOUT_USAGE: Final = 1_024
"""How many models that refuse ``stream_options`` are remembered; the others are asked with it again."""

logger = logging.getLogger(__name__)


class FieldRefusedError(Exception):
    """The upstream refused a field that this service has added to the request."""


@asynccontextmanager
async def open_llm(settings: Settings, telemetry: Telemetry) -> AsyncIterator["LlmClient"]:
    """Open the process's one pooled client, and close it at the end of the block; nothing is sent yet."""
    # One connection for each request that may be in flight: waiting for a connection would be a hidden queue.
    max_connections = settings.max_in_flight + SPARE_CONNECTIONS
    # Without redirects and without proxies from the environment: the key goes to the configured proxy only.
    http = UpstreamClient(UpstreamTransport(max_connections, settings.llm_max_answer_bytes))
    instrument_client(http, telemetry)
    load_rules()
    root = settings.litellm_url.rstrip("/").removesuffix("/v1")
    sdk = PreparedOpenAI(settings.litellm_api_key.get_secret_value() or NO_KEY, f"{root}/v1", http)
    async with sdk:
        with ThreadPoolExecutor(READERS, "answers") as readers:
            yield LlmClient(sdk, root, telemetry, settings, readers)


class LlmClient:
    """Asks the models behind LiteLLM, one attempt for each call; made by ``open_llm``.

    Args:
        sdk: The SDK's client.
        root: The proxy's URL, without ``/v1``.
        telemetry: The providers of spans and metrics.
        settings: The time limits, the default model, and whether content is captured.
        readers: Where large answers are read.
    """

    def __init__(
        self, sdk: PreparedOpenAI, root: str, telemetry: Telemetry, settings: Settings, readers: Executor
    ) -> None:
        self._sdk = sdk
        self._root = root
        # Absolute, so that the SDK does not join its base URL and the path for each request.
        self._urls = {name: f"{root}/v1{operation.path}" for name, operation in OPERATIONS.items()}
        self._timeout_s = settings.llm_timeout_s
        self._connect_timeout_s = settings.llm_connect_timeout_s
        self._asks_for_usage = settings.stream_usage == "auto"
        self._without_usage: cachetools.LRUCache[str, bool] = cachetools.LRUCache(MAX_WITHOUT_USAGE)
        keep_chars = MAX_CONTENT_CHARS if settings.captures_content else 0
        self._reading = Reading(readers, settings.llm_max_answer_bytes, keep_chars)
        self._instruments = telemetry.instruments
        self._spans = AttemptSpans(telemetry, settings, self.known)
        self._offered = OfferedModels(self._read_offered)
        self._known: set[str] = set()
        self._unlisted: set[str] = set()
        self._keep_listed([settings.default_model])

    async def ask(self, request: LlmRequest, deadline: Deadline) -> Reply:
        """Ask for a whole answer, in one attempt.

        Args:
            request: What is asked.
            deadline: When the whole answer must have arrived.

        Raises:
            BadRequestError: The upstream refused the request.
            RateLimitError: The upstream limits the rate.
            UpstreamError: It failed, sent an invalid answer, or refused this service's credentials.
            UpstreamTimeoutError: It did not answer within the time limit, or could not be reached.
        """
        with self._spans.attempt(request) as span:
            response = await self._send(self._url_of(request), deadline, request)
            read = partial(
                read_answer,
                response.content,
                response.headers,
                request,
                known_model=request.model in self._known,
            )
            try:
                reply = await self._reading.run(len(response.content), read)
            except UpstreamError as error:
                if error.upstream_status is None:
                    error.upstream_status = response.status_code
                raise
            span.completion = reply.completion
            if request.model not in self._known:
                # A model that answers exists, even if the list does not name it, as with a wildcard.
                self._remember(request.model)
        return reply

    @asynccontextmanager
    async def stream(self, request: LlmRequest, deadline: Deadline) -> AsyncIterator[AnswerEvents]:
        """Ask for an answer as a stream, in one attempt; the block begins when the first event is there.

        The attempt's span lasts until the end of the block, and fails with what the block raises. Leaving the
        block before the end of the answer closes the connection, which stops the upstream's work.

        Args:
            request: What is asked; the fields that ask for a stream are added here.
            deadline: When the first event must have arrived.

        Raises:
            ServiceError: As ``ask``; iterating the stream raises the same.
        """
        # A stream of bytes is not asked for: it is how such an answer is passed on.
        asks = OPERATIONS[request.operation].answer_body == "json"
        with self._spans.attempt(request, stream=asks) as span:
            try:
                events = await self._open_stream(request, deadline, span)
            except ServiceError as error:
                raise _after_upload(error, request) from None
            try:
                self._remember(request.model)
                span.suspend()
                async with nullcontext() if request.upload is None else request.upload.raising_failure():
                    yield events
            finally:
                await events.aclose()
                span.completion = events.completion()

    async def _open_stream(self, request: LlmRequest, deadline: Deadline, span: AttemptSpan) -> AnswerEvents:
        """Ask for a stream with token counts at its end, and without them where the model refuses that."""
        asks = (
            self._asks_for_usage
            and OPERATIONS[request.operation].asks_for_usage
            and request.model not in self._without_usage
        )
        if not asks or request.asks_for_usage:
            return await self._begin_stream(request, deadline, span, with_usage=False)
        try:
            return await self._begin_stream(request, deadline, span, with_usage=True)
        except FieldRefusedError:
            events = await self._begin_stream(request, deadline, span, with_usage=False)
        # Not before this has succeeded: a caller can have the field named by what is refused for another
        # reason, and would take the token counts from everybody.
        self._without_usage[request.model] = True
        logger.warning(
            "The model refuses stream_options; from now on its streams come without token counts",
            extra={"model": request.model},
        )
        return events

    async def _begin_stream(
        self, request: LlmRequest, deadline: Deadline, span: AttemptSpan, *, with_usage: bool
    ) -> AnswerEvents:
        """Wait for a stream's first event; ``FieldRefusedError`` where the token counts are refused."""
        refusal_of = STREAM_OPTIONS if with_usage else None
        asks = OPERATIONS[request.operation].answer_body == "json"
        response = await self._send(
            self._url_of(request),
            deadline,
            request.streamed(with_usage=with_usage) if asks else request,
            stream=True,
            refusal_of=refusal_of,
        )
        known_model = request.model in self._known
        events: AnswerEvents
        if asks or media_type_of(response.headers) == EVENT_STREAM:
            events = LlmStream(response, request, span, self._reading, known_model=known_model)
        else:
            events = ByteStream(response, request, span, self._reading, known_model=known_model)
        try:
            async with asyncio.timeout(deadline.left_s):
                await events.first()
        except BaseException as error:
            await events.aclose()
            if isinstance(error, TimeoutError):
                raise timed_out(deadline.limit_s, Cause.READ_TIMEOUT) from None
            # Some refuse in the first event of a 200, which need not have a status.
            if (
                with_usage
                and isinstance(error, ServiceError)
                and STREAM_OPTIONS.search(events.error.decode("utf-8", "replace"))
            ):
                raise FieldRefusedError from None
            raise
        return events

    async def models(self) -> ModelList:
        """The models that the upstream lists now, in its order; raises as ``ask``."""
        listed = await self._list()
        self._offered.learn(listed.names)
        return listed

    async def learn_models(self) -> bool:
        """Learn which models may be asked for, and stand on a metric; whether that succeeded."""
        return await self._offered.refresh()

    async def check_model(self, request: LlmRequest, deadline: Deadline) -> None:
        """Raise ``BadRequestError`` for a model that the upstream does not offer, as far as that is known."""
        if not OPERATIONS[request.operation].stored:
            await self._offered.check(request.model, deadline)

    def _url_of(self, request: LlmRequest) -> str:
        return self._urls[request.operation] if request.path is None else f"{self._root}/v1{request.path}"

    async def _read_offered(self) -> None:
        # Without a span or metric: no caller asked for it.
        with suppress_instrumentation():
            # LiteLLM puts the models that it knows in the place of a wildcard, unless it is asked for both.
            listed = await self._list("?return_wildcard_routes=true")
        wildcards = [name for name in listed.names if WILDCARD in name]
        self._offered.learn(listed.names, wildcards)

    async def _list(self, query: str = "") -> ModelList:
        response = await self._send(f"{self._root}/v1/models{query}", Deadline.after(self._timeout_s))
        listed = await self._reading.run(len(response.content), partial(read_models, response.content))
        self._keep_listed([name for name in listed.names if WILDCARD not in name])
        return listed

    async def ping(self) -> None:
        """Ask LiteLLM whether it is alive and ready; no model is called. Raises as ``ask``."""
        for path in ("/health/liveliness", "/health/readiness"):
            await self._send(self._root + path, Deadline.after(self._timeout_s))

    def known(self, model: str) -> str:
        """The value for a model's name on a metric."""
        return model if model in self._known else OTHER_MODEL

    def _keep_listed(self, models: Collection[str]) -> None:
        """Give the models of the list places, in alphabetical order, as far as they go; they are kept."""
        for model in sorted(models):
            if model in self._known and model not in self._unlisted:
                continue
            if len(self._known) - len(self._unlisted) >= MAX_LISTED_MODELS:
                break
            self._unlisted.discard(model)
            self._know(model)

    def _remember(self, model: str) -> None:
        """Give a model that has answered a place, if one is left for those that are not listed."""
        if model not in self._known and len(self._unlisted) < MAX_UNLISTED_MODELS:
            self._unlisted.add(model)
            self._know(model)

    def _know(self, model: str) -> None:
        self._known.add(model)
        self._instruments.start_model_at_zero(model)

    async def _send(
        self,
        url: str,
        deadline: Deadline,
        request: LlmRequest | None = None,
        *,
        stream: bool = False,
        refusal_of: re.Pattern[str] | None = None,
    ) -> httpx2.Response:
        """Send the request, or get the URL where there is none; raises this service's errors only.

        The response's body has been read, except for a stream's. ``FieldRefusedError`` is raised where the
        upstream refuses the request with a text that matches ``refusal_of``.
        """
        left_s = deadline.left_s
        # A stream's reads are limited by its reader.
        limits = httpx2.Timeout(None if stream else left_s, connect=min(self._connect_timeout_s, left_s))
        body: Mapping[str, Any] = {} if request is None else request.body
        try:
            # The limits of the transport apply to each read: a slow trickle would never reach them.
            async with asyncio.timeout(left_s) as limit:
                if request is None:
                    return await self._sdk.exchange("GET", url, limits)
                method, upload = OPERATIONS[request.operation].method, request.upload
                if upload is not None:
                    with upload.pausing(limit, deadline):
                        return await self._sdk.exchange(
                            method,
                            url,
                            limits,
                            content=upload.content(),
                            fields=_fields_of(request, upload),
                            stream=stream,
                        )
                content = request.content if method == "POST" else None
                return await self._sdk.exchange(
                    method, url, limits, content=content, fields=request.headers, stream=stream
                )
        except TimeoutError as error:
            # The cancellation by the time limit carries a cause where it ended the attempt to connect.
            raise timed_out(deadline.limit_s, cause_of(error.__cause__) or Cause.READ_TIMEOUT) from None
        except APIError as error:
            if refusal_of is not None and isinstance(error, APIStatusError) and _refuses(error, refusal_of):
                raise FieldRefusedError from None
            # Not chained: the SDK's error holds the request, with its key and prompt.
            raise translate(error, body, known_model=body.get("model") in self._known) from None


def _refuses(error: APIStatusError, field: re.Pattern[str]) -> bool:
    """Whether an answer refuses the request because of a field; the whole of its body counts."""
    return error.status_code in REFUSALS and field.search(error.response.text) is not None


def _fields_of(request: LlmRequest, upload: Upload) -> Mapping[str, str]:
    """The header fields of a request that is passed on as it arrives."""
    size = {} if upload.size is None else {"content-length": str(upload.size)}
    return {**request.headers, "content-type": upload.content_type, **size}


def _after_upload(error: ServiceError, request: LlmRequest) -> ServiceError:
    """The error of an attempt whose request may be a body that is passed on as it arrives."""
    upload = request.upload
    if upload is None:
        return error
    if upload.failure is not None:
        # The upstream saw a connection that broke; this is why.
        return upload.failure
    if upload.is_spent:
        # Only the caller can send it again.
        error.transient = False
    return error
