"""OpenAI's Agents SDK with its defaults: the Responses API, and the model that it chooses."""

import asyncio

from agents import Agent, ModelSettings, Runner, SQLiteSession, function_tool, handoff, set_tracing_disabled
from openai.types.shared import Reasoning
from pydantic import BaseModel

from tests.e2e.clients.python.checks import AGAIN, QUESTION, TEXT, TOOL_SAYS, Checks

check = Checks()
set_tracing_disabled(True)  # it would send its traces to OpenAI


class Person(BaseModel):
    """What an agent must answer with."""

    name: str
    age: int


@function_tool  # type: ignore[untyped-decorator]  # the library is not in the type checker's environment
def get_weather(location: str) -> str:
    """The weather at a place."""
    assert location == "Bern"
    return "21"


@check("run")
async def _run() -> None:
    assert (await Runner.run(Agent(name="one"), QUESTION)).final_output == TEXT


@check("tools")
async def _tools() -> None:
    result = await Runner.run(Agent(name="one", tools=[get_weather]), QUESTION)
    assert result.final_output == TOOL_SAYS


@check("stream")
async def _stream() -> None:
    streamed = Runner.run_streamed(Agent(name="one", tools=[get_weather]), QUESTION)
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert streamed.final_output == TOOL_SAYS
    assert "".join(deltas) == TOOL_SAYS


@check("schema")
async def _schema() -> None:
    result = await Runner.run(Agent(name="one", output_type=Person), QUESTION)
    assert result.final_output == Person(name="Ada", age=36)


@check("session")
async def _session() -> None:
    session = SQLiteSession("a session")
    assert (await Runner.run(Agent(name="one"), QUESTION, session=session)).final_output == TEXT
    assert (await Runner.run(Agent(name="one"), QUESTION, session=session)).final_output == AGAIN


@check("previous response")
async def _previous() -> None:
    first = await Runner.run(Agent(name="one"), QUESTION)
    again = await Runner.run(Agent(name="one"), QUESTION, previous_response_id=first.last_response_id)
    assert again.final_output == AGAIN


@check("reasoning")
async def _reasoning() -> None:
    settings = ModelSettings(reasoning=Reasoning(effort="low", summary="auto"))
    result = await Runner.run(Agent(name="one", model_settings=settings, tools=[get_weather]), QUESTION)
    assert result.final_output == TOOL_SAYS


@check("handoff")
async def _handoff() -> None:
    # The first agent's one tool is to hand over, which the model therefore does.
    second = Agent(name="second")
    result = await Runner.run(Agent(name="first", handoffs=[handoff(second)]), QUESTION)
    assert result.last_agent is second


@check("many")
async def _many() -> None:
    runs = [Runner.run(Agent(name="one", tools=[get_weather]), QUESTION) for _ in range(10)]
    assert {result.final_output for result in await asyncio.gather(*runs)} == {TOOL_SAYS}


if __name__ == "__main__":
    check.run()
