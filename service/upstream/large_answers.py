"""Reading large answers: only the fields that this service needs become objects.

A parser that makes an object of each number in an answer of 30 MB takes about half a second, in which the
process does nothing else: it holds the interpreter's lock, in a thread too. ``msgspec`` checks the syntax of
what it skips and makes no object of it; that takes a few tens of milliseconds.
"""

import codecs
import json
import re
from typing import Any, Final

import msgspec

from service.upstream.errors import invalid_answer

LARGE_BYTES: Final = 262_144
"""Larger bodies are read with ``read_large``, in a thread."""

MAX_FIELD_BYTES: Final = 65_536
"""The largest ``usage`` or name that is read: a larger one says nothing."""

SLICE_BYTES: Final = 1_048_576

ESCAPES: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)
"""Escapes in JSON; those in the group are a surrogate without its other half."""

ABSENT: Final = msgspec.Raw(b"null")


class _Answer(msgspec.Struct):
    id: msgspec.Raw = ABSENT
    model: msgspec.Raw = ABSENT
    usage: msgspec.Raw = ABSENT
    data: msgspec.Raw = ABSENT
    choices: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT
    object: msgspec.Raw = ABSENT
    type: msgspec.Raw = ABSENT


class _Choice(msgspec.Struct):
    index: msgspec.Raw = ABSENT
    message: msgspec.Raw = ABSENT
    finish_reason: msgspec.Raw = ABSENT


class _Message(msgspec.Struct):
    content: msgspec.Raw = ABSENT
    refusal: msgspec.Raw = ABSENT
    tool_calls: msgspec.Raw = ABSENT
    function_call: msgspec.Raw = ABSENT


_ANSWER: Final = msgspec.json.Decoder(_Answer)
_CHOICE: Final = msgspec.json.Decoder(_Choice)
_MESSAGE: Final = msgspec.json.Decoder(_Message)
_LIST: Final = msgspec.json.Decoder(list[msgspec.Raw])


def read_large(content: bytes, max_choices: int) -> dict[str, Any]:
    """Read what this service needs of a large answer; ``UpstreamError`` if it is no JSON object in UTF-8.

    Args:
        content: The answer.
        max_choices: How many choices are read.

    Returns:
        The answer's ``id``, ``model`` and ``usage``, and the fields that make it an error, where they are
        there; ``data`` as an empty list if it is a list; of ``choices``, each one's ``index``,
        ``finish_reason``, and the texts and calls of its ``message``; true for calls that are large.
    """
    try:
        _check_utf8(content)
        return _read(_decode(content), max_choices)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        raise invalid_answer() from None


def _check_utf8(content: bytes) -> None:
    """Raise ``UnicodeDecodeError`` for what is not UTF-8."""
    # A slice at a time: the text itself is not wanted.
    decode = codecs.getincrementaldecoder("utf-8")().decode
    for start in range(0, len(content), SLICE_BYTES):
        decode(content[start : start + SLICE_BYTES])
    decode(b"", final=True)


def _decode(content: bytes) -> _Answer:
    try:
        return _ANSWER.decode(content)
    except msgspec.DecodeError:
        # A model may cut an emoji in half. Such a surrogate is valid JSON, and msgspec refuses it.
        whole = ESCAPES.sub(lambda found: b"?" if found[1] else found[0], content)
        if whole == content:
            raise
        return _ANSWER.decode(whole)


def _read(answer: _Answer, max_choices: int) -> dict[str, Any]:
    read = {name: _small(getattr(answer, name)) for name in ("id", "model", "usage", "object", "type")}
    read["error"] = _small(answer.error, otherwise=True)
    if _begins(answer.data, b"["):
        read["data"] = []
    if _begins(answer.choices, b"["):
        choices = _LIST.decode(answer.choices)[:max_choices]
        read["choices"] = [_choice(choice) for choice in choices]
    return read


def _choice(raw: msgspec.Raw) -> dict[str, Any] | None:
    if not _begins(raw, b"{"):
        return None
    choice = _CHOICE.decode(raw)
    read = {"index": _small(choice.index), "finish_reason": _small(choice.finish_reason)}
    if _begins(choice.message, b"{"):
        message = _MESSAGE.decode(choice.message)
        read["message"] = {
            "content": _text(message.content),
            "refusal": _text(message.refusal),
            "tool_calls": _small(message.tool_calls, otherwise=True),
            "function_call": _small(message.function_call, otherwise=True),
        }
    return read


def _text(raw: msgspec.Raw) -> Any:  # noqa: ANN401 - a decoded JSON value
    return msgspec.json.decode(raw, type=str) if _begins(raw, b'"') else _small(raw, otherwise=True)


def _small(raw: msgspec.Raw, *, otherwise: bool | None = None) -> Any:  # noqa: ANN401 - a decoded JSON value
    """The value of a field, or another one in its place where it is large."""
    return json.loads(bytes(raw)) if len(memoryview(raw)) <= MAX_FIELD_BYTES else otherwise


def _begins(raw: msgspec.Raw, with_byte: bytes) -> bool:
    return bytes(memoryview(raw)[:1]) == with_byte
