"""An upstream's answer as the real SDK turns it into an exception, without a socket."""

import json
from collections.abc import Mapping
from typing import Any

import httpx2
import openai
import pytest

from service.errors import ServiceError
from service.upstream.errors import translate


def sdk_error(status: int, body: Any, headers: Mapping[str, str] | None = None) -> openai.APIError:
    """What the SDK raises for an answer; a body that is text or bytes is sent as it is."""
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, headers=headers, content=content, request=request)

    return failing(answer)


def failing(answer: Any) -> openai.APIError:
    """What the SDK raises when its transport behaves so."""
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with openai.OpenAI(api_key="none", base_url="http://upstream/v1", max_retries=0, http_client=http) as sdk:
        with pytest.raises(openai.APIError) as caught:
            sdk.chat.completions.create(model="demo", messages=[])
        return caught.value


def translated(  # noqa: PLR0913 - all but the status have defaults
    status: int,
    message: Any = "no",
    *,
    messages: Any = (),
    model: str = "demo",
    known_model: bool = True,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> ServiceError:
    """The service's error for an answer in OpenAI's shape with this message and these fields beside it."""
    error = sdk_error(status, {"error": {"message": message, **fields}}, headers)
    request = {"model": model, "messages": list(messages)}
    return translate(error, request, known_model=known_model)
