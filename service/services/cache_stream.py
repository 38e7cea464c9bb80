"""Puts the pieces of a streamed answer together again, into the form in which answers are kept."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from service.clients.llm_answers import Completion, Reply
from service.clients.llm_stream import StreamEvent
from service.services.cache_entry import HEAD

EVENTS_PER_ANSWER = 64
"""A token of four letters comes in an event of two or three hundred bytes."""


class Assembler:
    """Takes the events of one answer; gives up, for good, on what it does not understand or is too large.

    Args:
        max_bytes: The largest answer that is of use; its events may be so many times as large.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left_bytes = max_bytes * EVENTS_PER_ANSWER
        self._head: dict[str, Any] = {}
        self._usage: Mapping[str, Any] | None = None
        self._choices: dict[int, dict[str, Any]] = {}
        self._failed = False

    def tap(
        self, relay: Callable[[StreamEvent], Awaitable[None]]
    ) -> Callable[[StreamEvent], Awaitable[None]]:
        """Take each event once it is handed on."""

        async def hand_on(event: StreamEvent) -> None:
            await relay(event)
            self.take(event.payload, len(event.raw))

        return hand_on

    def take(self, payload: Mapping[str, Any] | None, size_bytes: int) -> None:
        """Take one event; raises nothing, whatever it holds."""
        self._left_bytes -= size_bytes
        if self._failed or payload is None or self._left_bytes < 0:
            self._failed = True
            self._choices.clear()
            return
        try:
            self._add(payload)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            self._failed = True

    def reply(self, completion: Completion) -> Reply | None:
        """The whole answer; None where there is none that could be given out again."""
        if self._failed or not self._choices:
            return None
        choices = [choice for _, choice in sorted(self._choices.items())]
        payload = {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            **({"usage": self._usage} if self._usage else {}),
        }
        text = choices[0]["message"].get("content") or ""
        if not isinstance(text, str):
            return None
        return Reply(json.dumps(payload, separators=(",", ":")).encode(), replace(completion, text=text))

    def _add(self, payload: Mapping[str, Any]) -> None:
        for name in HEAD:
            if payload.get(name) is not None:
                self._head.setdefault(name, payload[name])
        if isinstance(payload.get("usage"), dict):
            self._usage = payload["usage"]
        for given in payload.get("choices") or ():
            index = given.get("index", 0)
            if type(index) is not int:
                raise TypeError("an index that is no number")
            choice = self._choices.setdefault(
                index,
                {"index": index, "message": {"role": "assistant", "content": None}, "finish_reason": None},
            )
            _merge(choice["message"], given.get("delta") or {})
            if given.get("finish_reason") is not None:
                choice["finish_reason"] = given["finish_reason"]
            if isinstance(given.get("logprobs"), dict):
                _merge(choice.setdefault("logprobs", {}), given["logprobs"])


def _merge(whole: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add a piece: texts and lists go on, calls of tools by their places, the rest is taken as it is."""
    for name, value in piece.items():
        if value is None:
            whole.setdefault(name, None)
        elif name == "tool_calls":
            for call in value:
                _merge_call(whole, call)
        elif isinstance(value, str) and isinstance(whole.get(name), str) and name != "role":
            whole[name] += value
        elif isinstance(value, list) and isinstance(whole.get(name), list):
            whole[name] = [*whole[name], *value]
        elif isinstance(value, dict) and isinstance(whole.get(name), dict):
            _merge(whole[name], value)
        else:
            whole[name] = dict(value) if isinstance(value, dict) else value


def _merge_call(message: dict[str, Any], call: Mapping[str, Any]) -> None:
    place = call.get("index", 0)
    calls: list[dict[str, Any]] = message.setdefault("tool_calls", None) or []
    message["tool_calls"] = calls
    if type(place) is not int or place > len(calls):
        raise ValueError("a call of a tool out of its order")
    if place == len(calls):
        calls.append({})
    known = calls[place]
    for name, value in call.items():
        if name == "index" or value is None:
            continue
        if name == "function":
            function = known.setdefault("function", {"name": "", "arguments": ""})
            for part in ("name", "arguments"):
                function[part] += value.get(part) or ""
            function.update({n: v for n, v in value.items() if n not in {"name", "arguments"}})
        else:
            known.setdefault(name, value)
