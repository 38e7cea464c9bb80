"""What a capable model would answer, by what it is asked: for client libraries that check what they get."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.fakes.behaviours import Answer, Behaviour, Status
from tests.fakes.streams import DONE, RawStream, chunk, text, usage

if TYPE_CHECKING:
    from tests.fakes.wire import Exchange

MODELS = ["demo", "broken", "busy-once", "breaks-off", "text-embedding-demo"]
PERSON = {"name": "Ada", "age": 36}
ARGUMENTS = '{"location": "Bern"}'
FUNCTION = {"name": "get_weather", "arguments": ARGUMENTS}
CALL = {"id": "call_1", "type": "function", "function": FUNCTION}


class CapableModel:
    """Answers chat completions: text, tool calls, JSON by a schema, streams; some models always fail."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def forget(self) -> None:
        """Be as new: nobody has asked the busy model yet."""
        self._busy.clear()

    async def play(self, exchange: Exchange) -> None:
        """Answer."""
        asked = exchange.request.json
        await self._choose(asked).play(exchange)

    def _choose(self, asked: dict[str, Any]) -> Behaviour:
        model = asked["model"]
        if model == "broken":
            return Status(500)
        prompt = json.dumps(asked["messages"])
        if model == "busy-once" and prompt not in self._busy:
            self._busy.add(prompt)
            return Status(429, headers={"Retry-After": "1"})
        if model == "breaks-off":
            return RawStream((text("Half an "),), "cut")
        message, pieces = self._answer(asked)
        if not asked.get("stream"):
            reason = "tool_calls" if "tool_calls" in message else "stop"
            choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
            return Answer(extra={"choices": [choice]})
        return RawStream((*pieces, usage(), DONE))

    def _answer(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        """The message, and the same in pieces."""
        if asked.get("tools") and asked["messages"][-1]["role"] == "user":
            start = {"index": 0, **CALL, "function": {**FUNCTION, "arguments": ""}}
            halves = [ARGUMENTS[:7], ARGUMENTS[7:]]
            rest = [{"tool_calls": [{"index": 0, "function": {"arguments": half}}]} for half in halves]
            deltas: list[dict[str, Any]] = [
                {"role": "assistant", "content": None, "tool_calls": [start]},
                *rest,
            ]
            return {"content": None, "tool_calls": [CALL]}, [
                *(chunk(delta) for delta in deltas),
                chunk(reason="tool_calls"),
            ]
        schema = asked.get("response_format", {}).get("type") == "json_schema"
        words = [json.dumps(PERSON)] if schema else ["A trace is ", "the path of ", "one request."]
        first = chunk({"role": "assistant", "content": ""})
        return {"content": "".join(words)}, [first, *map(text, words), chunk(reason="stop")]
