"""Instructor, which makes models answer with objects, in each of its ways of asking for them."""

import instructor
from instructor import Mode
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.e2e.clients.python.checks import QUESTION, Checks

check = Checks()
USER = {"role": "user", "content": QUESTION}
ASKED = {"model": "gpt-5.4", "messages": [USER], "max_retries": 0}


class Person(BaseModel):
    """What the model must answer with."""

    name: str
    age: int


ADA = {"name": "Ada", "age": 36}


@check("tools")
def _tools() -> None:
    client = instructor.from_openai(OpenAI(max_retries=0))
    assert client.chat.completions.create(response_model=Person, **ASKED).model_dump() == ADA


@check("schema")
def _schema() -> None:
    client = instructor.from_openai(OpenAI(max_retries=0), mode=Mode.JSON_SCHEMA)
    assert client.chat.completions.create(response_model=Person, **ASKED).model_dump() == ADA


@check("responses")
def _responses() -> None:
    client = instructor.from_openai(OpenAI(max_retries=0), mode=Mode.RESPONSES_TOOLS)
    found = client.responses.create(model="gpt-5.4", input=QUESTION, response_model=Person, max_retries=0)
    assert found.model_dump() == ADA


@check("from a name")
def _provider() -> None:
    client = instructor.from_provider("openai/gpt-5.4")
    assert client.chat.completions.create(response_model=Person, messages=[USER]).model_dump() == ADA


@check("partial")
def _partial() -> None:
    client = instructor.from_openai(OpenAI(max_retries=0))
    *_, last = client.chat.completions.create_partial(response_model=Person, **ASKED)
    assert (last.name, last.age) == ("Ada", 36)


@check("list")
def _list() -> None:
    client = instructor.from_openai(OpenAI(max_retries=0))
    found = client.chat.completions.create_iterable(response_model=Person, **ASKED)
    assert [person.model_dump() for person in found] == [ADA]


@check("async")
async def _async() -> None:
    client = instructor.from_openai(AsyncOpenAI(max_retries=0))
    assert (await client.chat.completions.create(response_model=Person, **ASKED)).model_dump() == ADA


if __name__ == "__main__":
    check.run()
