"""Pydantic AI with its defaults: OpenAI's Responses API for `openai:`, and Anthropic's Messages."""

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, capture_run_messages
from pydantic_ai.exceptions import ModelHTTPError

from tests.e2e.clients.python.checks import AGAIN, PICTURE, PNG, QUESTION, TEXT, TOOL_SAYS, Checks

check = Checks()
MODELS = ("openai:gpt-5.4", "openai-chat:gpt-5.4", "openai-responses:gpt-5.4", "anthropic:claude-sonnet-5-5")


class Person(BaseModel):
    """What an agent must answer with."""

    name: str
    age: int


def get_weather(location: str) -> str:
    """The weather at a place."""
    assert location == "Bern"
    return "21"


@check("run")
async def _run() -> None:
    for model in MODELS:
        result = await Agent(model).run(QUESTION)
        assert (result.output, result.usage.output_tokens) == (TEXT, 20), model


@check("tools")
async def _tools() -> None:
    for model in MODELS:
        assert (await Agent(model, tools=[get_weather]).run(QUESTION)).output == TOOL_SAYS, model


@check("stream")
async def _stream() -> None:
    for model in MODELS:
        async with Agent(model, tools=[get_weather]).run_stream(QUESTION) as streamed:
            pieces = [piece async for piece in streamed.stream_text(delta=True)]
        assert "".join(pieces) == TOOL_SAYS, model


@check("schema")
async def _schema() -> None:
    for model in MODELS:
        result = await Agent(model, output_type=Person).run(QUESTION)
        assert result.output == Person(name="Ada", age=36), model


@check("schema and tools")
async def _schema_and_tools() -> None:
    for model in MODELS:
        with capture_run_messages() as messages:
            result = await Agent(model, output_type=Person, tools=[get_weather]).run(QUESTION)
        assert result.output == Person(name="Ada", age=36), model
        assert "21" in str(messages), model


@check("conversation")
async def _conversation() -> None:
    for model in MODELS:
        agent = Agent(model)
        first = await agent.run(QUESTION)
        assert (await agent.run(QUESTION, message_history=first.all_messages())).output == AGAIN, model


@check("picture")
async def _picture() -> None:
    picture = BinaryContent.from_data_uri(f"data:image/png;base64,{PNG}")
    for model in MODELS:
        assert (await Agent(model).run([QUESTION, picture])).output == PICTURE, model


@check("errors")
async def _errors() -> None:
    for model in ("openai:nope", "openai-chat:nope", "anthropic:nope"):
        try:
            await Agent(model).run(QUESTION)
        except ModelHTTPError as error:
            assert error.status_code == 400, model
        else:
            raise AssertionError(f"{model} should have failed")


if __name__ == "__main__":
    check.run()
