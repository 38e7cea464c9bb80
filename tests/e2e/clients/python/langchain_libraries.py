"""LangChain's models of OpenAI, with both of its APIs, and of Anthropic."""

import anthropic
import openai
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from tests.e2e.clients.python.checks import (
    AGAIN,
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
PROMPT = HumanMessage(QUESTION)
MODELS = {
    "chat": ChatOpenAI(model="gpt-5.4", max_retries=0),
    "responses": ChatOpenAI(model="gpt-5.4", max_retries=0, use_responses_api=True),
    "messages": ChatAnthropic(model="claude-sonnet-5-5", max_retries=0, max_tokens=2_000),
}


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool  # type: ignore[untyped-decorator]  # the library is not in the type checker's environment
def get_weather(location: str) -> str:
    """The weather at a place."""
    assert location == "Bern"
    return "21"


@check("invoke")
def _invoke() -> None:
    for name, model in MODELS.items():
        answer = model.invoke([PROMPT])
        assert (answer.text, answer.usage_metadata["total_tokens"]) == (TEXT, 30), name


@check("stream")
def _stream() -> None:
    for name, model in MODELS.items():
        assert "".join(str(piece.text) for piece in model.stream([PROMPT])) == TEXT, name


@check("tools")
def _tools() -> None:
    for name, model in MODELS.items():
        bound = model.bind_tools([get_weather])
        called = bound.invoke([PROMPT])
        (call,) = called.tool_calls
        result = get_weather.invoke(call)
        assert isinstance(result, ToolMessage)
        assert bound.invoke([PROMPT, called, result]).text == TOOL_SAYS, name


@check("streamed tools")
def _streamed_tools() -> None:
    for name, model in MODELS.items():
        first, *more = model.bind_tools([get_weather]).stream([PROMPT])
        for piece in more:
            first += piece
        assert first.tool_calls[0]["args"] == {"location": "Bern"}, name


@check("schema")
def _schema() -> None:
    for name, model in MODELS.items():
        assert model.with_structured_output(Person).invoke([PROMPT]) == Person(name="Ada", age=36), name


@check("conversation")
def _conversation() -> None:
    for name, model in MODELS.items():
        assert model.invoke([PROMPT, model.invoke([PROMPT]), PROMPT]).text == AGAIN, name


@check("picture")
def _picture() -> None:
    picture = {"type": "image", "base64": PNG, "mime_type": "image/png"}
    prompt = HumanMessage([{"type": "text", "text": QUESTION}, picture])
    for name, model in MODELS.items():
        assert model.invoke([prompt]).text == PICTURE, name


@check("thinking")
def _thinking() -> None:
    model = ChatAnthropic(model="claude-sonnet-5-5", max_retries=0, thinking={"type": "adaptive"})
    thought, text = model.invoke([PROMPT]).content
    assert (thought["thinking"], text["text"]) == (THOUGHT, TEXT)


@check("previous_response_id")
def _previous() -> None:
    model = ChatOpenAI(model="gpt-5.4", max_retries=0, use_responses_api=True, use_previous_response_id=True)
    first = model.invoke([PROMPT])
    assert model.invoke([PROMPT, first, PROMPT]).text == AGAIN


@check("embeddings")
def _embeddings() -> None:
    # Its default sends tokens instead of texts, for which it would need a tokenizer's file from the network.
    vectors = OpenAIEmbeddings(model="text-embedding-3-small", check_embedding_ctx_length=False)
    assert vectors.embed_documents(["a", "b"]) == [[0.25, -0.5]] * 2


@check("async")
async def _async() -> None:
    for name, model in MODELS.items():
        assert (await model.ainvoke([PROMPT])).text == TEXT, name
        assert "".join([str(piece.text) async for piece in model.astream([PROMPT])]) == TEXT, name


@check("errors")
def _errors() -> None:
    fails(openai.BadRequestError, lambda: ChatOpenAI(model="nope", max_retries=0).invoke([PROMPT]))
    stranger = ChatAnthropic(model="claude-sonnet-5-5", api_key="wrong", max_retries=0)
    fails(anthropic.AuthenticationError, lambda: stranger.invoke([PROMPT]))


if __name__ == "__main__":
    check.run()
