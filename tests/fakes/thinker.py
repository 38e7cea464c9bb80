"""What a capable model would do with a conversation, whatever protocol it came in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TEXT: Final = "A trace is the path of one request."
AGAIN: Final = "As I said: "
PICTURE: Final = "I see a picture."
THOUGHT: Final = "They want a definition."
FEW_TOOLS: Final = 3
"""A request with more tools is a coding agent's, which would be confused by a call that nobody asked for."""

EXAMPLES: Final[Mapping[str, Any]] = {"name": "Ada", "age": 36}
SIMPLE: Final[Mapping[str, Any]] = {"string": "Bern", "integer": 3, "number": 21.5, "boolean": True}
MAX_DEPTH: Final = 8
"""How often schemas that refer to themselves are followed."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call, and the schema of its arguments."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What a model is asked.

    Args:
        prompt: The text of the last question.
        tools: What it may call.
        choice: ``auto``, ``none``, ``any``, or the name of the tool that it must call.
        called: The tools that were called since the last question.
        results: What they returned.
        schema: What the text must be JSON of; None where it is any text.
        pictures: How many pictures the last question holds.
        again: Whether there was a question before.
        thinks: Whether the model shall show its thoughts.
    """

    prompt: str
    tools: Sequence[Tool] = ()
    choice: str = "auto"
    called: Sequence[str] = ()
    results: Sequence[str] = ()
    schema: Mapping[str, Any] | None = None
    pictures: int = 0
    again: bool = False
    thinks: bool = False


@dataclass(frozen=True)
class Turn:
    """What the model does: it says a text or calls a tool, and may think before."""

    text: str = ""
    call: tuple[str, str] | None = None
    thought: str = ""

    @property
    def pieces(self) -> list[str]:
        """The text as it is streamed, word by word."""
        return self.text.replace(" ", " \0").split("\0")


def think(asked: Conversation) -> Turn:
    """Decide what to do.

    A prompt that says ``call NAME {"an": "argument"}`` gets that tool called. Otherwise the first tool is
    called where there are few; a tool's result is answered with a text, so that every loop ends.
    """
    thought = THOUGHT if asked.thinks else ""
    call = _call(asked)
    return Turn(call=call, thought=thought) if call else Turn(_text(asked), thought=thought)


def _call(asked: Conversation) -> tuple[str, str] | None:
    fresh = [tool for tool in asked.tools if tool.name not in asked.called]
    match asked.choice:
        case "none":
            return None
        case "auto":
            told = next((call for tool in fresh if (call := _told(asked.prompt, tool.name))), None)
            if told or asked.results or len(asked.tools) > FEW_TOOLS:
                return told
            chosen = fresh[:1]
        case "any":
            chosen = fresh[:1] or list(asked.tools[-1:])
        case name:
            chosen = [tool for tool in fresh if tool.name == name]
    return (chosen[0].name, json.dumps(example(chosen[0].schema))) if chosen else None


def _told(prompt: str, name: str) -> tuple[str, str] | None:
    """The call that the prompt spells out for this tool."""
    order = f"call {name} "
    _, found, rest = prompt.partition(order)
    if not found or not rest.startswith("{"):
        return None
    arguments, _ = json.JSONDecoder().raw_decode(rest)
    return name, json.dumps(arguments)


def _text(asked: Conversation) -> str:
    if asked.schema is not None:
        return json.dumps(example(asked.schema))
    if asked.results:
        return f"The tool says: {asked.results[-1]}"
    return (AGAIN if asked.again else "") + (PICTURE if asked.pictures else TEXT)


def example(schema: Mapping[str, Any]) -> Any:
    """A value of a JSON schema; of an object all fields."""
    return _example(schema, "", schema, 0)


def _example(schema: Mapping[str, Any], name: str, root: Mapping[str, Any], depth: int) -> Any:
    """A value of a part of the schema, under this name in its object."""
    inner = _inner(schema, root)
    if inner is not None:
        return None if depth > MAX_DEPTH else _example(inner, name, root, depth + 1)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        fields = schema.get("properties", {}).items()
        return {key: _example(field, key, root, depth + 1) for key, field in fields}
    if kind == "array":
        return [_example(schema.get("items", {}), name, root, depth + 1)]
    return EXAMPLES.get(name, SIMPLE.get(kind))


def _inner(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema that another one refers to, or offers first; None where it stands for itself."""
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target[part] if part else target
        return dict(target)
    offered = next((schema[key] for key in ("anyOf", "oneOf", "allOf") if schema.get(key)), None)
    return None if offered is None else dict(offered[0])
