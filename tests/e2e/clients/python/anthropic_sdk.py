"""Anthropic's own library, blocking and asynchronous."""

import anthropic
from anthropic import Anthropic, AsyncAnthropic

from tests.e2e.clients.python.checks import (
    AGAIN,
    LOCATION,
    PICTURE,
    PNG,
    QUESTION,
    TEXT,
    THOUGHT,
    TOOL_SAYS,
    Checks,
    fails,
)

check = Checks()
client = Anthropic(max_retries=0)
MODEL = "claude-sonnet-5-5"
USER = {"role": "user", "content": QUESTION}
ASKED = {"model": MODEL, "max_tokens": 2_000, "messages": [USER]}
TOOL = {"name": "get_weather", "input_schema": LOCATION}
THINKING = {"type": "enabled", "budget_tokens": 1_024}


@check("messages")
def _messages() -> None:
    answer = client.messages.create(**ASKED, system="Be short.")
    assert (answer.content[0].text, answer.stop_reason) == (TEXT, "end_turn")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (10, 20)
    assert answer._request_id  # noqa: SLF001 - the library's documented name for it


@check("stream")
def _stream() -> None:
    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == TEXT
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 20)
    kinds = [event.type for event in client.messages.create(**ASKED, stream=True)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


@check("tools")
def _tools() -> None:
    called = client.messages.create(**ASKED, tools=[TOOL])
    (call,) = called.content
    assert (call.type, call.input, called.stop_reason) == ("tool_use", {"location": "Bern"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "21"}
    messages = [USER, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(**{**ASKED, "messages": messages}, tools=[TOOL])
    assert answer.content[0].text == TOOL_SAYS


@check("streamed tools")
def _streamed_tools() -> None:
    with client.messages.stream(**ASKED, tools=[TOOL]) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == {"location": "Bern"}


@check("thinking")
def _thinking() -> None:
    answer = client.messages.create(**ASKED, thinking=THINKING)
    thought, text = answer.content
    assert (thought.thinking, bool(thought.signature), text.text) == (THOUGHT, True, TEXT)
    with client.messages.stream(**ASKED, thinking=THINKING) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].signature == thought.signature
    messages = [USER, {"role": "assistant", "content": answer.content}, USER]
    again = client.messages.create(**{**ASKED, "messages": messages}, thinking=THINKING)
    assert again.content[1].text == AGAIN


@check("picture")
def _picture() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PNG}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    answer = client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": content}]})
    assert answer.content[0].text == PICTURE


@check("prompt caching")
def _caching() -> None:
    system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    answer = client.messages.create(**ASKED, system=system)
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (6, 4)
    with client.messages.stream(**ASKED, system=system) as stream:
        assert stream.get_final_message().usage.cache_read_input_tokens == 4


@check("count_tokens")
def _count() -> None:
    assert client.messages.count_tokens(model=MODEL, messages=[USER]).input_tokens > 0


@check("beta")
def _beta() -> None:
    answer = client.beta.messages.create(**ASKED, betas=["interleaved-thinking-2025-05-14"])
    assert answer.content[0].text == TEXT


@check("metadata")
def _metadata() -> None:
    assert client.messages.create(**ASKED, metadata={"user_id": "u1"}).content[0].text == TEXT


@check("models of other vendors")
def _other() -> None:
    assert client.messages.create(**{**ASKED, "model": "gpt-5.4"}).content[0].text == TEXT


@check("errors")
def _errors() -> None:
    error = fails(anthropic.BadRequestError, lambda: client.messages.create(**{**ASKED, "model": "nope"}))
    assert error.body["error"]["type"] == "invalid_request_error"
    assert error.request_id
    fails(
        anthropic.AuthenticationError, lambda: client.with_options(api_key="wrong").messages.create(**ASKED)
    )
    broken = {**ASKED, "model": "claude-broken"}
    assert fails(anthropic.InternalServerError, lambda: client.messages.create(**broken)).status_code == 502
    fails(anthropic.UnprocessableEntityError, lambda: client.messages.create(**{**ASKED, "messages": "x"}))


@check("async")
async def _async() -> None:
    async with AsyncAnthropic(max_retries=0) as library:
        assert (await library.messages.create(**ASKED)).content[0].text == TEXT
        async with library.messages.stream(**ASKED) as stream:
            assert await stream.get_final_text() == TEXT


if __name__ == "__main__":
    check.run()
