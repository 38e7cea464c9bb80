"""OpenAI's Responses API with its store, as the provider writes it."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any, Final

from tests.fakes.provider_chat import CACHED, CREATED, choice_of, last_question, named, pictures_in, text_in
from tests.fakes.thinker import Conversation, Tool, Turn, think

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ENCRYPTED: Final = "ZW5jcnlwdGVkLXRob3VnaHQ="
ECHOED: Final[Mapping[str, Any]] = {
    "instructions": None,
    "max_output_tokens": None,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "metadata": {},
    "background": False,
}


class UnknownResponseError(LookupError):
    """There is no such response."""


class Responses:
    """Answers, and keeps what it is not told not to keep.

    A response in the background is ``queued`` at first, and ``completed`` when it is asked for.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._kept: dict[str, dict[str, Any]] = {}
        self._items: dict[str, list[dict[str, Any]]] = {}

    def create(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A response; queued, if it is one for the background."""
        response = self._complete(asked)
        if not asked.get("background"):
            return response
        return {**response, "status": "queued", "output": [], "usage": None}

    def get(self, identifier: str) -> dict[str, Any]:
        """A kept response."""
        if identifier not in self._kept:
            raise UnknownResponseError(identifier)
        return self._kept[identifier]

    def delete(self, identifier: str) -> dict[str, Any]:
        """Forget a response."""
        self.get(identifier)
        del self._kept[identifier], self._items[identifier]
        return {"id": identifier, "object": "response", "deleted": True}

    def cancel(self, identifier: str) -> dict[str, Any]:
        """End a response in the background."""
        response = self.get(identifier)
        if response["background"]:
            response |= {"status": "cancelled", "output": [], "usage": None}
        return response

    def input_items(self, identifier: str) -> dict[str, Any]:
        """What a kept response answers."""
        self.get(identifier)
        items = [{"id": f"in_{at}", **item} for at, item in enumerate(self._items[identifier])]
        return {"object": "list", "data": items, "has_more": False, "first_id": None, "last_id": None}

    def stream(self, asked: Mapping[str, Any]) -> Iterator[bytes]:
        """A response as typed events."""
        numbers = itertools.count()
        response = self._complete(asked)
        started = {**response, "status": "in_progress", "output": [], "usage": None}

        def event(name: str, /, **fields: Any) -> bytes:
            return named(name, sequence_number=next(numbers), **fields)

        yield event("response.created", response=started)
        yield event("response.in_progress", response=started)
        for index, item in enumerate(response["output"]):
            for name, fields in _item_events(item):
                yield event(name, output_index=index, **fields)
        yield event("response.completed", response=response)

    def _complete(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        previous = asked.get("previous_response_id")
        before = [] if previous is None else [*self._items_of(previous), *self.get(previous)["output"]]
        given = asked["input"]
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        turn = _turn(asked, [*before, *items])
        number = next(self._numbers)
        response = {
            "id": f"resp_{number:08}",
            "object": "response",
            "created_at": CREATED,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "model": asked["model"],
            **{name: asked.get(name, value) for name, value in ECHOED.items()},
            "reasoning": asked.get("reasoning") or {"effort": None, "summary": None},
            "output": _output(turn, number, encrypted=_wants_encrypted(asked)),
            "usage": {
                "input_tokens": 10,
                "input_tokens_details": {"cached_tokens": CACHED},
                "output_tokens": 20,
                "output_tokens_details": {"reasoning_tokens": 5 if turn.thought else 0},
                "total_tokens": 30,
            },
        }
        if asked.get("store", True) is not False:
            self._kept[response["id"]], self._items[response["id"]] = response, [*before, *items]
        return response

    def _items_of(self, identifier: str) -> list[dict[str, Any]]:
        self.get(identifier)
        return self._items[identifier]


def _wants_encrypted(asked: Mapping[str, Any]) -> bool:
    return "reasoning.encrypted_content" in (asked.get("include") or ())


def _turn(asked: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> Turn:
    place, question = last_question(items)
    since = items[place + 1 :]
    shape = (asked.get("text") or {}).get("format") or {}
    outputs = [item["output"] for item in since if item.get("type") == "function_call_output"]
    return think(
        Conversation(
            prompt=text_in(question),
            tools=[
                Tool(tool["name"], tool.get("parameters") or {})
                for tool in asked.get("tools") or ()
                if tool.get("type") == "function"
            ],
            choice=choice_of(asked.get("tool_choice")),
            called=[item["name"] for item in since if item.get("type") == "function_call"],
            results=[text_in(output) for output in outputs],
            schema=shape.get("schema"),
            pictures=pictures_in(question),
            again=any(item.get("role") == "assistant" for item in items[: max(place, 0)]),
            thinks=bool((asked.get("reasoning") or {}).get("effort")),
        )
    )


def _output(turn: Turn, number: int, *, encrypted: bool) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if turn.thought:
        thought: dict[str, Any] = {
            "type": "reasoning",
            "id": f"rs_{number}",
            "summary": [{"type": "summary_text", "text": turn.thought}],
        }
        items.append({**thought, "encrypted_content": ENCRYPTED} if encrypted else thought)
    if turn.call:
        name, arguments = turn.call
        call = {"id": f"fc_{number}", "call_id": f"call_{number}", "name": name, "arguments": arguments}
        items.append({"type": "function_call", "status": "completed", **call})
    else:
        part = {"type": "output_text", "text": turn.text, "annotations": [], "logprobs": []}
        message = {"id": f"msg_{number}", "status": "completed", "role": "assistant", "content": [part]}
        items.append({"type": "message", **message})
    return items


def _item_events(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of one item of the output: it appears, grows, and is done."""
    inside: dict[str, Any] = {"item_id": item["id"]}
    match item["type"]:
        case "reasoning":
            yield "response.output_item.added", {"item": {**item, "summary": []}}
            yield from _reasoning_events(item["summary"][0], {**inside, "summary_index": 0})
        case "function_call":
            yield "response.output_item.added", {"item": {**item, "arguments": "", "status": "in_progress"}}
            given = item["arguments"]
            for half in (given[:7], given[7:]):
                yield "response.function_call_arguments.delta", {**inside, "delta": half}
            yield (
                "response.function_call_arguments.done",
                {**inside, "arguments": given, "name": item["name"]},
            )
        case _:
            yield "response.output_item.added", {"item": {**item, "content": [], "status": "in_progress"}}
            yield from _text_events(item["content"][0], {**inside, "content_index": 0})
    yield "response.output_item.done", {"item": item}


def _reasoning_events(
    part: Mapping[str, Any], inside: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    empty = {**part, "text": ""}
    yield "response.reasoning_summary_part.added", {**inside, "part": empty}
    yield "response.reasoning_summary_text.delta", {**inside, "delta": part["text"]}
    yield "response.reasoning_summary_text.done", {**inside, "text": part["text"]}
    yield "response.reasoning_summary_part.done", {**inside, "part": part}


def _text_events(part: Mapping[str, Any], inside: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "response.content_part.added", {**inside, "part": {**part, "text": ""}}
    for piece in Turn(part["text"]).pieces:
        yield "response.output_text.delta", {**inside, "delta": piece, "logprobs": []}
    yield "response.output_text.done", {**inside, "text": part["text"], "logprobs": []}
    yield "response.content_part.done", {**inside, "part": part}


def unknown(identifier: str) -> bytes:
    """The error for a response that there is not."""
    message = f"Response with id '{identifier}' not found."
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return json.dumps({"error": error}).encode()
