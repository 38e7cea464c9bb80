"""LiteLLM's own library as a client, which speaks both vendors' protocols."""

import os
from functools import partial

import litellm

from tests.e2e.clients.python.checks import LOCATION, QUESTION, TEXT, TOOL_SAYS, Checks, fails

check = Checks()
OPENAI = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
ANTHROPIC = {"api_base": os.environ["ANTHROPIC_BASE_URL"], "api_key": os.environ["ANTHROPIC_API_KEY"]}
MODELS = {"openai/gpt-5.4": OPENAI, "anthropic/claude-sonnet-5-5": ANTHROPIC}
USER = {"role": "user", "content": QUESTION}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": LOCATION}}


@check("completion")
def _completion() -> None:
    for model, access in MODELS.items():
        answer = litellm.completion(model=model, messages=[USER], **access)
        assert (answer.choices[0].message.content, answer.usage.total_tokens) == (TEXT, 30), model


@check("stream")
def _stream() -> None:
    for model, access in MODELS.items():
        pieces = litellm.completion(model=model, messages=[USER], stream=True, **access)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == TEXT, model


@check("tools")
def _tools() -> None:
    for model, access in MODELS.items():
        called = litellm.completion(model=model, messages=[USER], tools=[TOOL], **access)
        message = called.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21"}
        answer = litellm.completion(model=model, messages=[USER, message, result], tools=[TOOL], **access)
        assert answer.choices[0].message.content == TOOL_SAYS, model


@check("responses")
def _responses() -> None:
    answer = litellm.responses(model="openai/gpt-5.4", input=QUESTION, **OPENAI)
    assert answer.output[0].content[0].text == TEXT
    events = list(litellm.responses(model="openai/gpt-5.4", input=QUESTION, stream=True, **OPENAI))
    assert events[-1].response.output[0].content[0].text == TEXT


@check("messages")
async def _messages() -> None:
    answer = await litellm.anthropic.messages.acreate(
        model="anthropic/claude-sonnet-5-5", messages=[USER], max_tokens=100, **ANTHROPIC
    )
    assert answer["content"][0]["text"] == TEXT


@check("completions")
def _text() -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/gpt-3.5-turbo-instruct", prompt=QUESTION, **OPENAI
    )
    assert answer.choices[0].text == TEXT


@check("embeddings")
def _embeddings() -> None:
    found = litellm.embedding(model="openai/text-embedding-3-small", input=["a"], **OPENAI)
    assert found.data[0]["embedding"] == [0.25, -0.5]


@check("moderations")
def _moderations() -> None:
    found = litellm.moderation(model="omni-moderation-latest", input="How to start?", **OPENAI)
    assert not found.results[0].flagged


@check("images")
def _images() -> None:
    made = litellm.image_generation(model="openai/gpt-image-1", prompt="A trace", **OPENAI)
    assert made.data[0].b64_json


@check("rerank")
def _rerank() -> None:
    found = litellm.rerank(
        model="hosted_vllm/rerank", query="a trace", documents=["a cat", "a trace"], **OPENAI
    )
    assert [result["index"] for result in found.results] == [1, 0]


@check("speech and transcriptions")
def _audio() -> None:
    spoken = litellm.speech(model="openai/tts-1", voice="alloy", input="A trace", **OPENAI)
    assert len(spoken.content) == 16_388
    sound = ("a.wav", b"RIFF" * 1_000, "audio/wav")
    heard = litellm.transcription(model="openai/whisper-1", file=sound, **OPENAI)
    assert heard.text == "I heard 4000 bytes."


@check("async")
async def _async() -> None:
    for model, access in MODELS.items():
        answer = await litellm.acompletion(model=model, messages=[USER], **access)
        assert answer.choices[0].message.content == TEXT, model


@check("errors")
def _errors() -> None:
    for model, access in (("openai/nope", OPENAI), ("anthropic/nope", ANTHROPIC)):
        unknown = partial(litellm.completion, model=model, messages=[USER], **access)
        error = fails(litellm.BadRequestError, unknown)
        assert "not found" in str(error)
    fails(
        litellm.AuthenticationError,
        lambda: litellm.completion(
            model="anthropic/claude-sonnet-5-5", messages=[USER], **{**ANTHROPIC, "api_key": "wrong"}
        ),
    )


if __name__ == "__main__":
    check.run()
