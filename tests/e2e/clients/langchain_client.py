"""LangChain's ChatOpenAI, with nothing changed but base URL and key."""

import json

import openai
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

TEXT = "A trace is the path of one request."


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool  # type: ignore[untyped-decorator]  # the library is not in the type checker's environment
def get_weather(location: str) -> str:
    """The weather at a place."""
    return location


def passed(check: str) -> None:
    """Say that a check is done."""
    print(json.dumps({"check": check}), flush=True)  # noqa: T201 - read by the test


def main() -> None:
    """Everything."""
    model = ChatOpenAI(model="demo", max_retries=0)
    prompt = [HumanMessage("What is a trace?")]
    answer = model.invoke(prompt)
    assert answer.content == TEXT
    assert answer.usage_metadata["total_tokens"] == 30
    passed("chat")
    pieces = list(model.stream(prompt))
    assert "".join(piece.content for piece in pieces) == TEXT
    passed("stream")
    called = model.bind_tools([get_weather]).invoke(prompt)
    assert called.tool_calls[0]["args"] == {"location": "Bern"}
    passed("tools")
    assert model.with_structured_output(Person).invoke(prompt) == Person(name="Ada", age=36)
    passed("schema")
    vectors = OpenAIEmbeddings(model="text-embedding-demo", check_embedding_ctx_length=False)
    assert vectors.embed_documents(["a", "b"]) == [[0.25, -0.5]] * 2
    passed("embeddings")
    for name, kind in (("nope", openai.BadRequestError), ("broken", openai.InternalServerError)):
        try:
            ChatOpenAI(model=name, max_retries=0).invoke(prompt)
        except kind:
            passed(kind.__name__)
    try:
        ChatOpenAI(model="demo", api_key="wrong", max_retries=0).invoke(prompt)
    except openai.AuthenticationError:
        passed("AuthenticationError")


if __name__ == "__main__":
    main()
