"""LlamaIndex, which takes any server that is like OpenAI's."""

import os

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from openai import BadRequestError

from tests.e2e.clients.python.checks import QUESTION, TEXT, Checks, fails

check = Checks()
ACCESS = {
    "api_base": os.environ["OPENAI_BASE_URL"],
    "api_key": os.environ["OPENAI_API_KEY"],
    "max_retries": 0,
}
chat = OpenAILike(model="gpt-5.4", is_chat_model=True, is_function_calling_model=True, **ACCESS)
completions = OpenAILike(model="gpt-3.5-turbo-instruct", is_chat_model=False, **ACCESS)


def get_weather(location: str) -> str:
    """The weather at a place."""
    return f"21 in {location}"


@check("chat")
def _chat() -> None:
    assert chat.chat([ChatMessage(content=QUESTION)]).message.content == TEXT


@check("chat stream")
def _chat_stream() -> None:
    *_, last = chat.stream_chat([ChatMessage(content=QUESTION)])
    assert last.message.content == TEXT


@check("tools")
def _tools() -> None:
    answer = chat.predict_and_call([FunctionTool.from_defaults(get_weather)], QUESTION)
    assert str(answer) == "21 in Bern"


@check("completions")
def _completions() -> None:
    assert completions.complete(QUESTION).text == TEXT


@check("completions stream")
def _completions_stream() -> None:
    *_, last = completions.stream_complete(QUESTION)
    assert last.text == TEXT


@check("embeddings")
def _embeddings() -> None:
    library = OpenAILikeEmbedding(model_name="text-embedding-3-small", **ACCESS)
    assert library.get_text_embedding_batch(["a", "b"]) == [[0.25, -0.5]] * 2


@check("async")
async def _async() -> None:
    assert (await chat.achat([ChatMessage(content=QUESTION)])).message.content == TEXT
    assert (await completions.acomplete(QUESTION)).text == TEXT


@check("errors")
def _errors() -> None:
    unknown = OpenAILike(model="nope", is_chat_model=True, **ACCESS)
    fails(BadRequestError, lambda: unknown.chat([ChatMessage(content=QUESTION)]))


if __name__ == "__main__":
    check.run()
