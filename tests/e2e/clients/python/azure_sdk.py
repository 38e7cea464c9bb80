"""OpenAI's library with Azure's client: its own paths, and its own header for the key."""

import os
from typing import Any

import openai
from openai import AzureOpenAI, OpenAI

from tests.e2e.clients.python.checks import QUESTION, TEXT, Checks, fails

check = Checks()
URL = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
KEY = os.environ["OPENAI_API_KEY"]
del os.environ["OPENAI_BASE_URL"]  # the library refuses it beside an endpoint
# Plain mappings, as people write them, and not the library's types of them.
client: Any = AzureOpenAI(azure_endpoint=URL, api_key=KEY, api_version="2025-04-01-preview", max_retries=0)
MODEL = "gpt-5.4"
USER = {"role": "user", "content": QUESTION}


@check("chat")
def _chat() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=[USER])
    assert (answer.choices[0].message.content, answer.model) == (TEXT, MODEL)


@check("stream")
def _stream() -> None:
    pieces = client.chat.completions.create(model=MODEL, messages=[USER], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == TEXT


@check("responses")
def _responses() -> None:
    assert client.responses.create(model=MODEL, input=QUESTION).output_text == TEXT


@check("embeddings")
def _embeddings() -> None:
    found = client.embeddings.create(model="text-embedding-3-small", input="a")
    assert found.data[0].embedding == [0.25, -0.5]


@check("a deployment in the client")
def _deployment() -> None:
    bound: Any = AzureOpenAI(
        azure_endpoint=URL, azure_deployment=MODEL, api_key=KEY, api_version="2025-04-01-preview"
    )
    assert bound.chat.completions.create(model=MODEL, messages=[USER]).choices[0].message.content == TEXT


@check("images and speech")
def _images() -> None:
    assert client.images.generate(model="gpt-image-1", prompt="A trace").data[0].b64_json
    assert client.audio.speech.create(model="tts-1", voice="alloy", input="A trace").content


@check("the newer base URL")
def _newer() -> None:
    library: Any = OpenAI(base_url=f"{URL}/openai/v1/", api_key=KEY, max_retries=0)
    assert library.chat.completions.create(model=MODEL, messages=[USER]).choices[0].message.content == TEXT
    assert library.responses.create(model=MODEL, input=QUESTION).output_text == TEXT


@check("errors")
def _errors() -> None:
    fails(openai.BadRequestError, lambda: client.chat.completions.create(model="nope", messages=[USER]))
    stranger: Any = AzureOpenAI(azure_endpoint=URL, api_key="wrong", api_version="2024-10-21", max_retries=0)
    fails(
        openai.AuthenticationError,
        lambda: stranger.chat.completions.create(model=MODEL, messages=[USER]),
    )


if __name__ == "__main__":
    check.run()
