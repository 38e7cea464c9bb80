"""Stored responses through a real LiteLLM proxy, which gives them ids of its own."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

import openai
import pytest

from deploy.ports import unused_port
from tests.e2e.servers import Server
from tests.fakes.operations import ITEM, RESPONSE, STARTED, named
from tests.fakes.streams import RawStream
from tests.fakes.upstream import FakeUpstream, Status
from tests.harness import ServiceProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.e2e

# LiteLLM parses what the provider says, and wants all that OpenAI's schema requires.
MORE: dict[str, Any] = {
    "created_at": 1_700_000_000,
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "temperature": 1.0,
    "top_p": 1.0,
    "metadata": {},
    "instructions": None,
}
MADE: dict[str, Any] = {
    **RESPONSE,
    **MORE,
    "output": [{**ITEM, "status": "completed", "content": RESPONSE["output"][1]["content"]}],  # type: ignore[index]
}
QUEUED: dict[str, Any] = {**MADE, "status": "queued", "output": [], "usage": None}


@pytest.fixture(scope="module")
def provider() -> Iterator[FakeUpstream]:
    """The provider behind LiteLLM."""
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, provider: FakeUpstream) -> Iterator[ServiceProcess]:
    folder: Path = tmp_path_factory.mktemp("litellm")
    key, port = f"sk-{secrets.token_hex(16)}", unused_port()
    model = {"model": "openai/scripted", "api_key": "none", "api_base": f"{provider.url}/v1"}
    entry = {"model_name": "demo", "litellm_params": {**model, "max_retries": 0}}
    config = {
        "model_list": [entry],
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
        "general_settings": {"master_key": key},
    }
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps(config))
    proxy = Server(
        "LITELLM",
        ["--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)],
        ready="/health/liveliness",
        port=port,
        folder=folder,
        environment={},
    )
    variables = {"LITELLM_URL": f"http://127.0.0.1:{port}", "LITELLM_API_KEY": key}
    with proxy, ServiceProcess(variables) as process:
        yield process.wait_ready()


@pytest.fixture
def owner(service: ServiceProcess) -> Iterator[openai.OpenAI]:
    yield from _client(service, "user")


@pytest.fixture
def other(service: ServiceProcess) -> Iterator[openai.OpenAI]:
    yield from _client(service, "admin")


def _client(service: ServiceProcess, user: str) -> Iterator[openai.OpenAI]:
    url, key = f"http://127.0.0.1:{service.port}/v1", service.token(user)
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        yield client


def _asked(provider: FakeUpstream) -> list[tuple[str, str]]:
    seen = [(one.method, one.path) for one in provider.requests if "/responses" in one.path]
    provider.clear()
    return seen


def test_a_response_in_the_background_is_polled_continued_and_deleted(
    provider: FakeUpstream, owner: openai.OpenAI, other: openai.OpenAI
) -> None:
    provider.script(Status(200, QUEUED))
    made = owner.responses.create(model="demo", input="What is a trace?", background=True)
    assert made.status == "queued"
    provider.clear()
    first = made.id
    for state in (QUEUED, {**QUEUED, "status": "in_progress"}, MADE):
        for client_of_another in (other.responses.retrieve, other.responses.cancel, other.responses.delete):
            with pytest.raises(openai.NotFoundError):
                client_of_another(made.id)
        assert _asked(provider) == []
        provider.script(Status(200, state))
        # As OpenAI's documentation polls: with the id that the last answer has.
        made = owner.responses.retrieve(made.id)
        assert made.status == state["status"]
        assert _asked(provider) == [("GET", "/v1/responses/resp_1")]
    assert made.id != first, "LiteLLM's ids stay the same now: their aliases need not be kept any more"
    assert owner.responses.input_items.list(made.id).data[0].id == "msg_1"

    provider.clear()
    provider.script(Status(200, MADE))
    more = owner.responses.create(model="demo", input="And a span?", previous_response_id=first)
    assert more.output_text
    (sent,) = [one for one in provider.requests if one.path == "/v1/responses"]
    assert sent.json["previous_response_id"] == "resp_1"
    with pytest.raises(openai.BadRequestError) as raised:
        other.responses.create(model="demo", input="What was said?", previous_response_id=first)
    assert raised.value.code == "previous_response_not_found"

    provider.clear()
    owner.responses.delete(first)
    assert _asked(provider) == [("DELETE", "/v1/responses/resp_1")]
    with pytest.raises(openai.NotFoundError):
        owner.responses.retrieve(first)
    # The provider's own id, which LiteLLM tells in the answer, is nobody's.
    with pytest.raises(openai.NotFoundError):
        owner.responses.retrieve("resp_1")
    assert _asked(provider) == []


def test_what_the_provider_does_not_have_is_not_found(provider: FakeUpstream, owner: openai.OpenAI) -> None:
    provider.script(Status(200, MADE))
    made = owner.responses.create(model="demo", input="What is a trace?")
    error = {"message": "Response with id 'resp_1' not found.", "type": "invalid_request_error"}
    provider.script(Status(404, {"error": {**error, "param": None, "code": None}}))
    with pytest.raises(openai.NotFoundError) as raised:
        owner.responses.retrieve(made.id)
    assert "There is no such response." in raised.value.message


def test_a_streamed_response_belongs_to_its_owner(
    provider: FakeUpstream, owner: openai.OpenAI, other: openai.OpenAI
) -> None:
    begun = {**STARTED, **MORE}
    provider.script(
        RawStream(
            (
                named("response.created", response=begun, sequence_number=0),
                named("response.completed", response=MADE, sequence_number=1),
            )
        )
    )
    events = list(owner.responses.create(model="demo", input="What is a trace?", stream=True))
    told = {event.response.id for event in events if hasattr(event, "response")}
    assert told
    for made in told:
        provider.script(Status(200, MADE))
        assert owner.responses.retrieve(made).status == "completed"
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(made)
