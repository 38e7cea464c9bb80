"""Puts a streamed answer together for the cache, and takes a stored answer apart into a stream.

Both ways hold what a client's library makes of the answer. The rules for pieces are those of OpenAI's library
(``openai.lib.streaming.chat``) with one difference: an identifier that comes with several pieces (a role, an
id, a name) is taken once, where that library appends it. An answer is not stored where its pieces follow no
rule that is known here, or where the library would make something else of the stored answer.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, Self

from service.upstream.large_answers import ESCAPES
from service.upstream.messages import SURROGATE, Completion, Reply
from service.upstream.operations import MAX_CHOICES
from service.upstream.stream import StreamEvent, event

CHUNK: Final = "chat.completion.chunk"
FIRST_COUNTS: Final = frozenset({"id", "created", "model"})
"""Fields of which OpenAI's library keeps the first event's value; some servers change them in each event."""

GROWING: Final = frozenset({"x_groq"})
"""Objects that a later event may repeat with more in them: Groq adds the token counts to the last one's."""

NOT_IN_HEAD: Final = frozenset({"choices", "usage", "object", "obfuscation"})
"""Fields of an event that have rules of their own; ``obfuscation`` is padding, which the library drops."""

OF_LAST_EVENT: Final = frozenset({"system_fingerprint", "moderation"})
"""Fields that the library takes from later events too."""

OF_CHOICE: Final = frozenset({"index", "delta", "message", "finish_reason", "logprobs"})
EVENTS_PER_ANSWER: Final = 64
"""Bytes of a stream's events for one byte of the answer, at most: a token of four letters comes in an event
of two or three hundred bytes."""


class NotAssembledError(ValueError):
    """Pieces of a stream follow no rule that is known."""


class Rule(Protocol):
    """How the pieces of one field are put together."""

    def add(self, piece: Any) -> None:  # noqa: ANN401 - any JSON value
        """Add a piece, which is not null; ``NotAssembledError`` if it does not fit."""

    def value(self) -> Any:  # noqa: ANN401 - any JSON value
        """The whole."""


class Identifier:
    """A text that is given once, or again with each piece; empty pieces say nothing."""

    def __init__(self) -> None:
        self._value = ""

    def add(self, piece: object) -> None:
        """Add a piece; another identifier does not fit."""
        if not isinstance(piece, str) or (piece and self._value not in {"", piece}):
            raise NotAssembledError
        self._value = self._value or piece

    def value(self) -> str:
        """The identifier."""
        return self._value


class Name:
    """The name of a function: given once, again with each piece, or in parts."""

    def __init__(self) -> None:
        self._value = ""
        self._repeated = False

    def add(self, piece: object) -> None:
        """Add a piece; one that may be a part as well as a repetition does not fit."""
        if not isinstance(piece, str):
            raise NotAssembledError
        if not piece:
            return
        if piece == self._value:
            self._repeated = True
        elif self._value and (self._repeated or self._value.endswith(piece) or piece.startswith(self._value)):
            raise NotAssembledError
        else:
            self._value += piece

    def value(self) -> str:
        """The name."""
        return self._value


class Text:
    """A text in parts."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def add(self, piece: object) -> None:
        """Append a piece."""
        if not isinstance(piece, str):
            raise NotAssembledError
        self._pieces.append(piece)

    def value(self) -> str:
        """The text."""
        return "".join(self._pieces)


class Items:
    """A list in parts."""

    def __init__(self) -> None:
        self._items: list[Any] = []

    def add(self, piece: object) -> None:
        """Append the items of a piece."""
        if not isinstance(piece, list):
            raise NotAssembledError
        self._items.extend(piece)

    def value(self) -> list[Any]:
        """All items."""
        return self._items


class Whole:
    """Any value that comes in one piece; beside it there may be empty ones of its type."""

    def __init__(self) -> None:
        self._value: Any = None

    def add(self, piece: object) -> None:
        """Take the piece; a second one that is not empty does not fit, since no rule joins them."""
        if self._value is not None and type(piece) is not type(self._value):
            raise NotAssembledError
        if self._value is None or self._value in ("", [], {}):
            if not is_list_for_stream(piece):
                raise NotAssembledError
            self._value = piece
        elif piece not in ("", [], {}):
            raise NotAssembledError

    def value(self) -> Any:  # noqa: ANN401 - any JSON value
        """The piece."""
        return self._value


class ThinkingBlocks:
    """Anthropic's blocks of thinking, as LiteLLM sends them: a signature ends a block."""

    def __init__(self) -> None:
        self._pieces: list[list[Any]] = []

    def add(self, piece: object) -> None:
        """Add a piece: a list of fragments of blocks."""
        if not isinstance(piece, list) or not is_list_for_stream(piece):
            raise NotAssembledError
        if piece or not self._pieces:
            self._pieces.append(piece)

    def value(self) -> list[Any]:
        """The blocks; where there was one piece, its list as it is."""
        pieces = [piece for piece in self._pieces if piece]
        if len(pieces) < 2:  # noqa: PLR2004 - nothing to be put together
            return pieces[0] if pieces else []
        blocks: list[dict[str, Any]] = []
        is_open = False
        for fragment in (fragment for piece in pieces for fragment in piece):
            kind, fields = _thinking_fields(fragment)
            if kind == "redacted_thinking":
                blocks.append(fields)
                is_open = False
                continue
            if not is_open:
                blocks.append({"type": "thinking", "thinking": ""})
            blocks[-1]["thinking"] += fields.get("thinking", "")
            is_open = not fields.get("signature")
            if not is_open:
                blocks[-1]["signature"] = fields["signature"]
        return blocks


def _thinking_fields(fragment: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(fragment, dict):
        raise NotAssembledError
    fields = {name: value for name, value in fragment.items() if value is not None}
    kind = fields.get("type")
    known = {"thinking": {"type", "thinking", "signature"}, "redacted_thinking": {"type", "data"}}
    if not isinstance(kind, str) or not all(isinstance(value, str) for value in fields.values()):
        raise NotAssembledError
    if not fields.keys() <= known.get(kind, set()):
        raise NotAssembledError
    return kind, fields


class Record:
    """An object whose fields have rules of their own.

    Args:
        rules: The rule of each known field; any other field is ``Whole``.
    """

    def __init__(self, rules: Mapping[str, Callable[[], Rule]]) -> None:
        self._rules = rules
        self._fields: dict[str, Rule | None] = {}

    @property
    def names(self) -> list[str]:
        """The fields that were given, null or not, in the order of their first pieces."""
        return list(self._fields)

    def add(self, piece: object) -> None:
        """Add a piece: an object with some of the fields."""
        if not isinstance(piece, dict):
            raise NotAssembledError
        for name, value in piece.items():
            known = self._fields.setdefault(name, None)
            if value is None:
                continue
            if known is None:
                known = self._fields[name] = self._rules.get(name, Whole)()
            known.add(value)

    def value(self) -> dict[str, Any]:
        """The object."""
        return {name: None if field is None else field.value() for name, field in self._fields.items()}


def _function() -> Record:
    return Record({"name": Name, "arguments": Text})


def _custom() -> Record:
    return Record({"name": Name, "input": Text})


def _call() -> Record:
    return Record({"id": Identifier, "type": Identifier, "function": _function, "custom": _custom})


class ToolCalls:
    """Calls of tools: each piece says by ``index`` which call it belongs to."""

    def __init__(self) -> None:
        self._calls: list[Record] = []

    def add(self, piece: object) -> None:
        """Add a list of pieces; one without an index, or out of order, does not fit."""
        if not isinstance(piece, list):
            raise NotAssembledError
        for part in piece:
            index = part.get("index") if isinstance(part, dict) else None
            if type(index) is not int or not 0 <= index <= len(self._calls):
                raise NotAssembledError
            if index == len(self._calls):
                self._calls.append(_call())
            self._calls[index].add({name: value for name, value in part.items() if name != "index"})

    def value(self) -> list[Any]:
        """The calls, without their indices."""
        return [call.value() for call in self._calls]


def _provider_fields() -> Record:
    return Record({"thinking_blocks": ThinkingBlocks})


def _message() -> Record:
    return Record(
        {
            "role": Identifier,
            "content": Text,
            "refusal": Text,
            "reasoning": Text,
            "reasoning_content": Text,
            "function_call": _function,
            "tool_calls": ToolCalls,
            "thinking_blocks": ThinkingBlocks,
            "provider_specific_fields": _provider_fields,
        }
    )


def _logprobs() -> Record:
    return Record({"content": Items, "refusal": Items})


class _Constants:
    """Fields that have one value in all events that give them one.

    Args:
        empty: The values that say nothing.
    """

    def __init__(self, *empty: object) -> None:
        self.values: dict[str, Any] = {}
        self._empty = empty

    def add(self, fields: Mapping[str, Any]) -> None:
        """Add an event's fields; a second value of one field does not fit."""
        for name, value in fields.items():
            known: Any = self.values.get(name)
            if name not in self.values or (known in self._empty and value not in self._empty):
                self.values[name] = value
            elif value in self._empty or value == known or name in FIRST_COUNTS:
                continue
            elif name in GROWING and known.items() <= value.items():
                self.values[name] = value
            else:
                raise NotAssembledError


class _Choice:
    """One choice of an answer while its pieces come."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        self.opening = opening
        self.message = _message()
        self.logprobs: Record | None = None
        self.finish_reason: str | None = None
        # Azure sends an empty object with each event that has nothing to report.
        self.more = _Constants(None, "", [], {})

    def add(self, given: Mapping[str, Any]) -> None:
        """Add a piece."""
        self.message.add(given.get("delta") or {})
        if given.get("logprobs") is not None:
            self.logprobs = self.logprobs or _logprobs()
            self.logprobs.add(given["logprobs"])
        reason = given.get("finish_reason") or self.finish_reason
        if given.get("message") is not None or not isinstance(reason, str | None):
            raise NotAssembledError
        self.finish_reason = reason
        self.more.add(_more(given))

    def whole(self, index: int) -> dict[str, Any]:
        """The choice as it is in an answer that is not streamed."""
        message = self.message.value()
        message = {"role": None, "content": None, **message}
        message["role"] = message["role"] or "assistant"
        return {
            "index": index,
            "message": message,
            "finish_reason": self.finish_reason,
            **({} if self.logprobs is None else {"logprobs": self.logprobs.value()}),
            **self.more.values,
        }


def _more(choice: Mapping[str, Any]) -> dict[str, Any]:
    """A choice's fields that are no part of the protocol."""
    return {name: value for name, value in choice.items() if name not in OF_CHOICE}


@dataclass(frozen=True, slots=True)
class Layout:
    """In which events of a stream the fields of an answer are.

    Libraries take some fields from the first event only, and others from the last.

    Args:
        first: The first event's fields, without its choices.
        last: Those of the last event that every caller gets.
        counts: Those of the event with the token counts; None where there is none.
        choices: Of each choice, the names in its deltas, and the further fields of its first event.
    """

    first: Mapping[str, Any]
    last: Mapping[str, Any]
    counts: Mapping[str, Any] | None
    choices: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """The layout for an answer that was not streamed: every field is in every event."""
        head = {name: value for name, value in answer.items() if name not in NOT_IN_HEAD}
        usage = answer.get("usage")
        return cls(
            head,
            head,
            {**head, "usage": usage} if isinstance(usage, dict) else None,
            tuple((_names(choice["message"]), _more(choice)) for choice in answer["choices"]),
        )

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """The layout that ``to_json`` wrote; ``ValueError`` or ``TypeError`` for anything else."""
        first, last, counts, choices = json.loads(text)
        if not all(isinstance(head, dict) for head in (first, last, {} if counts is None else counts)):
            raise TypeError("no layout")
        read = tuple((tuple(map(str, names)), dict(opening)) for names, opening in choices)
        return cls(first, last, counts, read)

    def to_json(self) -> bytes:
        """The layout as it is stored."""
        choices = [[names, opening] for names, opening in self.choices]
        return _to_json([self.first, self.last, self.counts, choices])

    def events(self, answer: Mapping[str, Any]) -> Iterator[StreamEvent]:
        """The answer as a stream: for each choice one event with all of it, and one with its end."""
        choices = answer["choices"]
        for index, (choice, (names, opening)) in enumerate(zip(choices, self.choices, strict=True)):
            message, logprobs = choice["message"], choice.get("logprobs")
            content = message.get("content")
            delta = _delta(message, names)
            begun = {"index": index, "delta": delta, "finish_reason": None, **opening}
            if index == 0:
                text = content if isinstance(content, str) else ""
                yield _chunk(self.first, {**begun, **({"logprobs": logprobs} if logprobs else {})}, text)
            else:
                yield _chunk(self.first, begun)
                if logprobs:
                    # OpenAI's library doubles those in the first event of a choice that is not the first one.
                    more = {"index": index, "delta": {}, "finish_reason": None, "logprobs": logprobs}
                    yield _chunk(self.first, more)
            ended = {"index": index, "delta": {}, "finish_reason": choice["finish_reason"], **_more(choice)}
            yield _chunk(self.last if index == len(choices) - 1 else self.first, ended)
        if self.counts is not None:
            yield replace(_chunk(self.counts, None), usage_only=True)


def _names(message: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a message that was not streamed which a delta has; role and content in any case."""
    more = (name for name, value in message.items() if value is not None)
    return tuple(dict.fromkeys(("role", "content", *more)))


def _delta(message: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A message as the only delta of a stream, where calls of tools have an index."""
    delta: dict[str, Any] = {name: message.get(name) for name in names}
    if "role" in delta:
        delta["role"] = delta["role"] or "assistant"
    if delta.get("tool_calls"):
        delta["tool_calls"] = [{**call, "index": place} for place, call in enumerate(delta["tool_calls"])]
    return delta


def _chunk(head: Mapping[str, Any], choice: Mapping[str, Any] | None, text: str = "") -> StreamEvent:
    payload = {**head, "object": CHUNK, "choices": [] if choice is None else [choice]}
    return StreamEvent(event(json.dumps(payload, separators=(",", ":")).encode()), text)


def _to_json(value: object) -> bytes:
    # NaN and infinity are no JSON: what stood for them cannot be given back.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def is_list_for_stream(value: object) -> bool:
    """Whether a library keeps this value as it is when it comes in a delta.

    Lists whose entries have an ``index`` are put together by it.
    """
    if not isinstance(value, list) or not any(
        isinstance(entry, dict) and "index" in entry for entry in value
    ):
        return True
    return all(
        isinstance(entry, dict) and type(entry.get("index")) is int and entry["index"] == place
        for place, entry in enumerate(value)
    )


def can_be_streamed(choice: Mapping[str, Any], place: int) -> bool:
    """Whether a choice of an answer that was not streamed is the same again when it is replayed as a stream.

    Args:
        choice: The choice, parsed.
        place: Its place among the answer's choices.
    """
    message = choice["message"]
    calls = message.get("tool_calls")
    return (
        choice.get("index") in {None, place}
        and (calls is None or (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)))
        and all(is_list_for_stream(value) for name, value in message.items() if name != "tool_calls")
    )


class Assembler:
    """Puts the events of one stream together into an answer.

    It gives up for good on events that it does not understand, and on an answer that is too large.

    Args:
        max_bytes: The largest answer that may be stored; 0 takes nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left_bytes = max_bytes * EVENTS_PER_ANSWER
        self._fields = _Constants(None)
        self._first: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        self._counts: dict[str, Any] | None = None
        self._seen_by_all: set[str] = set()
        self._usage: Mapping[str, Any] | None = None
        self._choices: dict[int, _Choice] = {}
        self._failed = max_bytes == 0

    def take(self, event: StreamEvent) -> None:
        """Take one event; raises nothing, whatever it contains."""
        if self._failed:
            return
        self._left_bytes -= len(event.raw)
        try:
            if event.payload is None or self._left_bytes < 0 or _has_half_character(event.raw):
                raise NotAssembledError
            self._add(event.payload, usage_only=event.usage_only)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
            self._failed = True
            self._choices.clear()

    def answer(self, completion: Completion) -> tuple[Reply, bytes] | None:
        """The answer as if it had not been streamed, and its layout; None where it must not be stored.

        The layout is empty where it is that of any other answer.

        Args:
            completion: What the stream knows of the answer.
        """
        if self._failed or not self._choices or set(self._choices) != set(range(len(self._choices))):
            return None
        if self._usage is not None and self._last_usage() is None:
            return None
        choices = [self._choices[index] for index in range(len(self._choices))]
        try:
            payload = {
                **self._fields.values,
                "object": "chat.completion",
                "choices": [choice.whole(index) for index, choice in enumerate(choices)],
                **({"usage": self._usage} if self._usage else {}),
            }
            content = _to_json(payload)
            layout = self._layout(choices)
            stored = b"" if layout == Layout.of(payload) else layout.to_json()
        except (ValueError, RecursionError):
            return None
        text = payload["choices"][0]["message"]["content"] or ""
        return Reply(content, replace(completion, text=text)), stored

    def _layout(self, choices: list[_Choice]) -> Layout:
        """Where the fields were; values that are neither in the first event nor in the last are put there."""
        first, last, counts = self._first or {}, self._last, self._counts
        only_between = {
            name: value
            for name, value in self._fields.values.items()
            if first.get(name) is None
            and last.get(name) is None
            and (name not in OF_LAST_EVENT or (name == "moderation" and name in self._seen_by_all))
        }
        return Layout(
            first,
            {**last, **only_between},
            counts,
            tuple((tuple(choice.message.names), choice.opening) for choice in choices),
        )

    def _last_usage(self) -> object:
        """The token counts in the stream's last event."""
        return (self._last if self._counts is None else self._counts).get("usage")

    def _add(self, payload: Mapping[str, Any], *, usage_only: bool) -> None:
        if payload.get("object", CHUNK) != CHUNK or (self._counts is not None and not usage_only):
            raise NotAssembledError
        head = {name: value for name, value in payload.items() if name not in NOT_IN_HEAD}
        self._fields.add(head)
        begins = self._first is None
        if begins:
            self._first = head
        usage = payload.get("usage")
        if usage:
            self._usage = dict(usage)
            head = {**head, "usage": usage}
        if usage_only:
            self._counts = head
        else:
            self._last = head
            self._seen_by_all.update(head)
        for given in payload.get("choices") or ():
            self._add_choice(given, begins=begins)

    def _add_choice(self, given: Mapping[str, Any], *, begins: bool) -> None:
        index = given["index"]
        if type(index) is not int or not 0 <= index < MAX_CHOICES:
            raise NotAssembledError
        choice = self._choices.get(index)
        if choice is None:
            if not begins and given.get("logprobs"):
                # OpenAI's library doubles these.
                raise NotAssembledError
            choice = self._choices[index] = _Choice(_more(given))
        choice.add(given)


def _has_half_character(raw: bytes) -> bool:
    """Whether an event has half of a character beyond U+FFFF; the other half may be in the next event."""
    return SURROGATE.search(raw) is not None and any(found[1] for found in ESCAPES.finditer(raw))
