"""OpenAI's own library: every API that the service has, blocking and asynchronous."""

import json
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

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
# Plain mappings, as people write them, and not the library's types of them.
client: Any = OpenAI(max_retries=0)
MODEL = "gpt-5.4"
USER = {"role": "user", "content": QUESTION}
CHAT_TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": LOCATION}}
TOOL = {"type": "function", "name": "get_weather", "parameters": LOCATION, "strict": True}


class Person(BaseModel):
    """What the model must answer with."""

    name: str
    age: int


@check("chat")
def _chat() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=[USER])
    assert answer.choices[0].message.content == TEXT
    assert answer.usage
    assert (answer.usage.total_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (30, 4)
    assert answer._request_id  # noqa: SLF001 - the library's documented name for it


@check("chat stream")
def _chat_stream() -> None:
    pieces = list(
        client.chat.completions.create(
            model=MODEL, messages=[USER], stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == TEXT
    assert pieces[-1].usage
    assert pieces[-1].usage.total_tokens == 30


@check("chat tools")
def _chat_tools() -> None:
    called = client.chat.completions.create(model=MODEL, messages=[USER], tools=[CHAT_TOOL])
    call = called.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"location": "Bern"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
    messages = [USER, called.choices[0].message, result]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[CHAT_TOOL])
    assert answer.choices[0].message.content == TOOL_SAYS


@check("chat schema")
def _chat_schema() -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=[USER], response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)


@check("chat picture")
def _chat_picture() -> None:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    message = {"role": "user", "content": [{"type": "text", "text": QUESTION}, picture]}
    answer = client.chat.completions.create(model=MODEL, messages=[message])
    assert answer.choices[0].message.content == PICTURE


@check("responses")
def _responses() -> None:
    answer = client.responses.create(model=MODEL, input=QUESTION)
    assert (answer.output_text, answer.status) == (TEXT, "completed")
    assert (answer.usage.total_tokens, answer.usage.input_tokens_details.cached_tokens) == (30, 4)
    assert answer._request_id  # noqa: SLF001 - as above


@check("responses stream")
def _responses_stream() -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, reasoning={"effort": "low"}) as events:
        seen = list(events)
        final = events.get_final_response()
    assert final.output_text == TEXT
    assert final.output[0].summary[0].text == THOUGHT
    assert [event.sequence_number for event in seen] == sorted(event.sequence_number for event in seen)
    assert "".join(e.delta for e in seen if e.type == "response.output_text.delta") == TEXT


@check("responses tools")
def _responses_tools() -> None:
    called = client.responses.create(model=MODEL, input=QUESTION, tools=[TOOL])
    (call,) = (item for item in called.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"location": "Bern"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    answer = client.responses.create(
        model=MODEL, input=[result], tools=[TOOL], previous_response_id=called.id
    )
    assert answer.output_text == TOOL_SAYS


@check("responses streamed tools")
def _responses_streamed_tools() -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, tools=[TOOL]) as events:
        final = events.get_final_response()
    assert json.loads(final.output[0].arguments) == {"location": "Bern"}


@check("responses schema")
def _responses_schema() -> None:
    parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Person)
    assert parsed.output_parsed == Person(name="Ada", age=36)


@check("responses encrypted reasoning")
def _encrypted_reasoning() -> None:
    answer = client.responses.create(
        model=MODEL,
        input=QUESTION,
        store=False,
        reasoning={"effort": "low"},
        include=["reasoning.encrypted_content"],
    )
    thought, message = answer.output
    assert thought.encrypted_content
    more = [{"role": "user", "content": QUESTION}, thought, message, {"role": "user", "content": QUESTION}]
    again = client.responses.create(model=MODEL, input=more, store=False)
    assert again.output_text == AGAIN


@check("responses previous_response_id")
def _previous() -> None:
    first = client.responses.create(model=MODEL, input=QUESTION)
    again = client.responses.create(model=MODEL, input=QUESTION, previous_response_id=first.id)
    assert again.output_text == AGAIN


@check("completions")
def _completions() -> None:
    asked = {"model": "gpt-3.5-turbo-instruct", "prompt": QUESTION}
    assert client.completions.create(**asked).choices[0].text == TEXT
    pieces = client.completions.create(**asked, stream=True)
    # LiteLLM leaves the text out of the last pieces.
    assert "".join(piece.choices[0].text or "" for piece in pieces if piece.choices) == TEXT


@check("embeddings")
def _embeddings() -> None:
    # Without a format the library asks for base64, and decodes it.
    for more in ({}, {"encoding_format": "float"}):
        found = client.embeddings.create(model="text-embedding-3-small", input=["a", "b"], **more)
        assert [entry.embedding for entry in found.data] == [[0.25, -0.5]] * 2


@check("moderations")
def _moderations() -> None:
    found = client.moderations.create(input=["How to kill a process?", "How to start one?"])
    assert [result.flagged for result in found.results] == [True, False]
    assert found.results[0].categories.violence


@check("images")
def _images() -> None:
    made = client.images.generate(model="gpt-image-1", prompt="A trace", n=2)
    assert [image.b64_json for image in made.data] == [PNG] * 2


@check("speech")
def _speech() -> None:
    spoken = client.audio.speech.create(model="tts-1", voice="alloy", input="A trace")
    assert len(spoken.content) == 16_388
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input="A trace", response_format="wav"
    ) as streamed:
        assert streamed.headers["content-type"] == "audio/wav"
        assert sum(map(len, streamed.iter_bytes())) == 16_388


@check("transcriptions")
def _transcriptions() -> None:
    sound = ("a.wav", b"RIFF" * 50_000, "audio/wav")
    heard = client.audio.transcriptions.create(model="whisper-1", file=sound)
    assert heard.text == "I heard 200000 bytes."
    text = client.audio.transcriptions.create(model="whisper-1", file=sound, response_format="text")
    # LiteLLM answers with JSON whatever format is asked for.
    assert json.loads(text)["text"].strip() == "I heard 200000 bytes."


@check("models of other vendors")
def _other() -> None:
    claude = "claude-sonnet-5-5"
    answer = client.chat.completions.create(model=claude, messages=[USER], tools=[CHAT_TOOL])
    call = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"location": "Bern"}
    with client.responses.stream(model=claude, input=QUESTION) as events:
        assert events.get_final_response().output_text == TEXT
    called = client.responses.create(model=claude, input=QUESTION, tools=[TOOL])
    (call,) = (item for item in called.output if item.type == "function_call")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    items = [{"role": "user", "content": QUESTION}, call, result]
    assert client.responses.create(model=claude, input=items, tools=[TOOL]).output_text == TOOL_SAYS


@check("models")
def _models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check("errors")
def _errors() -> None:
    calls = {
        "chat": lambda: client.chat.completions.create(model="nope", messages=[USER]),
        "responses": lambda: client.responses.create(model="nope", input=QUESTION),
        "embeddings": lambda: client.embeddings.create(model="nope", input="a"),
    }
    for name, call in calls.items():
        error = fails(openai.BadRequestError, call)
        assert (error.code, bool(error.request_id)) == ("model_not_found", True), name
    stranger = client.with_options(api_key="wrong")
    fails(openai.AuthenticationError, lambda: stranger.responses.create(model=MODEL, input=QUESTION))
    broken = fails(
        openai.InternalServerError, lambda: client.responses.create(model="gpt-broken", input=QUESTION)
    )
    assert broken.status_code == 502


@check("async")
async def _async() -> None:
    library: Any
    async with AsyncOpenAI(max_retries=0) as library:
        answer = await library.chat.completions.create(model=MODEL, messages=[USER])
        assert answer.choices[0].message.content == TEXT
        response = await library.responses.create(model=MODEL, input=QUESTION)
        assert response.output_text == TEXT
        async with library.responses.stream(model=MODEL, input=QUESTION) as events:
            assert (await events.get_final_response()).output_text == TEXT
        vectors = await library.embeddings.create(model="text-embedding-3-small", input="a")
        assert vectors.data[0].embedding == [0.25, -0.5]
        assert not (await library.moderations.create(input="How to start?")).results[0].flagged


if __name__ == "__main__":
    check.run()
