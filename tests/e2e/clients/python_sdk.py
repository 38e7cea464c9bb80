"""OpenAI's own Python library, sync and async, with nothing changed but base URL and key."""

import asyncio
import json
import os
import time

import openai
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

USER: ChatCompletionMessageParam = {"role": "user", "content": "What is a trace?"}
TEXT = "A trace is the path of one request."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}},
    },
}


class Person(BaseModel):
    """What the model must answer with."""

    name: str
    age: int


def passed(check: str) -> None:
    """Say that a check is done."""
    print(json.dumps({"check": check}), flush=True)  # noqa: T201 - read by the test


def sync_checks(client: OpenAI) -> None:
    """What the blocking client can do."""
    answer = client.chat.completions.create(model="demo", messages=[USER])
    assert answer.choices[0].message.content == TEXT
    assert answer.usage
    assert answer.usage.total_tokens == 30
    assert answer._request_id  # noqa: SLF001 - the library's documented name for it
    passed("chat")

    pieces = client.chat.completions.create(model="demo", messages=[USER], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == TEXT
    counted = client.chat.completions.create(
        model="demo", messages=[USER], stream=True, stream_options={"include_usage": True}
    )
    *_, last = counted
    assert last.usage
    assert (last.choices, last.usage.total_tokens) == ([], 30)
    passed("stream")

    called = client.chat.completions.create(
        model="demo",
        messages=[USER],
        tools=[WEATHER],  # type: ignore[list-item]  # a plain mapping, as people write it
    )
    assert called.choices[0].message.tool_calls
    call = called.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"location": "Bern"}  # type: ignore[union-attr]  # no custom one
    result = client.chat.completions.create(
        model="demo",
        messages=[
            USER,
            called.choices[0].message,  # type: ignore[list-item]  # as the library's guide does
            {"role": "tool", "tool_call_id": call.id, "content": "21"},
        ],
        tools=[WEATHER],  # type: ignore[list-item]  # as above
    )
    assert result.choices[0].message.content == TEXT
    passed("tools")

    parsed = client.chat.completions.parse(model="demo", messages=[USER], response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)
    passed("schema")

    vectors = client.embeddings.create(model="text-embedding-demo", input=["a", "b"], encoding_format="float")
    assert [entry.embedding for entry in vectors.data] == [[0.25, -0.5]] * 2
    passed("embeddings")

    assert "demo" in [model.id for model in client.models.list()]
    assert client.models.retrieve("demo").id == "demo"
    passed("models")


def error_checks(client: OpenAI) -> None:
    """Each error comes as the class that people catch."""

    def error_of(model: str, status: int, kind: type[openai.APIStatusError], name: str) -> None:
        try:
            client.chat.completions.create(model=model, messages=[USER])
        except kind as error:
            assert (error.status_code, error.type) == (status, name)
            assert error.request_id
        else:
            raise AssertionError(f"{model} should have failed")

    error_of("nope", 400, openai.BadRequestError, "BadRequestError")
    passed("BadRequestError")
    error_of("broken", 502, openai.InternalServerError, "UpstreamError")
    passed("InternalServerError")
    error_of("busy-once", 429, openai.RateLimitError, "RateLimitError")
    passed("RateLimitError")
    error_of("", 422, openai.UnprocessableEntityError, "ValidationError")
    passed("UnprocessableEntityError")

    try:
        client.with_options(api_key="wrong").models.list()
    except openai.AuthenticationError as error:
        assert (error.type, error.code) == ("AuthenticationError", "invalid_api_key")
    passed("AuthenticationError")
    try:
        client.models.retrieve("nope")
    except openai.NotFoundError as error:
        assert (error.type, error.code) == ("NotFoundError", "model_not_found")
    passed("NotFoundError")

    started = time.monotonic()
    other: ChatCompletionMessageParam = {"role": "user", "content": "Again, please."}
    client.with_options(max_retries=1).chat.completions.create(model="busy-once", messages=[other])
    assert time.monotonic() - started >= 1, "Retry-After was not obeyed"
    passed("Retry-After")

    got = ""
    try:
        for piece in client.chat.completions.create(model="breaks-off", messages=[USER], stream=True):
            got += piece.choices[0].delta.content or ""
    except openai.APIError as error:
        assert (got, error.type) == ("Half an ", "UpstreamError")
        passed("error within a stream")


async def async_checks() -> None:
    """What the asynchronous client can do."""
    async with AsyncOpenAI(max_retries=0) as client:
        answer = await client.chat.completions.create(model="demo", messages=[USER])
        assert answer.choices[0].message.content == TEXT
        passed("async chat")
        async with client.chat.completions.stream(model="demo", messages=[USER]) as pieces:
            final = await pieces.get_final_completion()
        assert final.choices[0].message.content == TEXT
        passed("async stream")
        async with client.chat.completions.stream(
            model="demo",
            messages=[USER],
            tools=[WEATHER],  # type: ignore[list-item]  # a plain mapping, as people write it
        ) as pieces:
            final = await pieces.get_final_completion()
        assert final.choices[0].message.tool_calls
        assert final.choices[0].message.tool_calls[0].function.arguments == '{"location": "Bern"}'
        passed("async streamed tools")
        many = [client.chat.completions.create(model="demo", messages=[USER]) for _ in range(20)]
        assert {found.choices[0].message.content for found in await asyncio.gather(*many)} == {TEXT}
        passed("async many")


if __name__ == "__main__":
    assert os.environ["OPENAI_BASE_URL"]
    with OpenAI(max_retries=0) as sdk:
        sync_checks(sdk)
        error_checks(sdk)
    asyncio.run(async_checks())
