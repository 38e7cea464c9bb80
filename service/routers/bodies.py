"""Reads JSON bodies: what they may hold, and what reading one may cost.

Every JSON body of every route is read here. The limits keep the work for one body, validation included, under
50 ms of processor time on the machine where they were measured.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from service.errors import UnsupportedMediaTypeError, ValidationError

MAX_DEPTH: Final = 100
"""Deepest permitted nesting of a request; the JSON schema of a tool needs a few dozen."""

MAX_CONTAINERS: Final = 20_000
"""Most objects and arrays in one body. A conversation of 1,000 messages with tools has a few thousand."""

MAX_FIELDS: Final = 200
"""Most fields of the outermost object; OpenAI's chat completion has about 40."""


JSON: Final = re.compile(
    r"application/([\w.-]+\+)?json[ \t]*(;.*)?",
    re.IGNORECASE | re.DOTALL,
)
CHARSET: Final = re.compile(r";[ \t]*charset[ \t]*=[ \t]*\"?([^\s;\"]*)", re.IGNORECASE)
UTF_8: Final = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
BOM: Final = b"\xef\xbb\xbf"
MAGIC: Final = (
    ((b"\x1f\x8b", b"\x28\xb5\x2f\xfd"), "is compressed; send it without a content coding"),
    ((b"\xff\xfe", b"\xfe\xff", b"\x00", b"{\x00", b"[\x00"), "is UTF-16 or UTF-32; JSON is UTF-8"),
)
"""How a body begins that its header fields do not describe, and what to say about it."""


def refuse(field: str, problem: str, kind: str = "value_error") -> NoReturn:
    """Raise the ``ValidationError`` for one field."""
    message = f"The request is not valid: {field}: {problem}"
    raise ValidationError(message, details=[{"field": field, "message": problem, "type": kind}])


async def json_content(request: Request) -> bytes:
    """Read the body of a request that must be JSON, without a byte order mark.

    A request without a ``Content-Type`` is taken for JSON.

    Raises:
        UnsupportedMediaTypeError: Its header fields announce something else; then nothing of it is read.
        ValidationError: It is compressed, or not in UTF-8.
    """
    check_media_type(request.headers)
    return plain(await request.body())


def check_media_type(headers: Headers) -> None:
    """Raise ``UnsupportedMediaTypeError`` where a body is announced that is not JSON in UTF-8."""
    if any(coding.strip().lower() not in {"", "identity"} for coding in headers.getlist("content-encoding")):
        raise UnsupportedMediaTypeError(
            "The body must be sent as it is, without Content-Encoding.",
            headers={"Accept-Encoding": "identity"},
        )
    for value in filter(None, headers.getlist("content-type")):
        charsets = CHARSET.findall(value)
        if not JSON.fullmatch(value) or any(charset.lower() not in UTF_8 for charset in charsets):
            raise UnsupportedMediaTypeError(headers={"Accept": "application/json"})


def plain(content: bytes) -> bytes:
    """The body without a byte order mark; ``ValidationError`` where it is compressed, or not UTF-8."""
    for beginnings, problem in MAGIC:
        if content.startswith(beginnings):
            refuse("body", problem, kind="json_invalid")
    return content.removeprefix(BOM)


def read_json(content: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """Parse a body, strictly.

    Raises:
        ValidationError: It is not JSON in UTF-8, names a field of an object twice, holds a number that is not
            finite, is nested too deep, or holds too many values.
    """
    try:
        return _parse(content)
    except UnicodeDecodeError:
        _not_utf_8()
    except (ValueError, RecursionError):
        refuse("body", "cannot be read as JSON", kind="json_invalid")


def _not_utf_8() -> NoReturn:
    refuse("body", "is not valid UTF-8", kind="json_invalid")


def _parse(content: bytes) -> Any:  # noqa: ANN401 - any JSON value
    value = json.loads(
        content.decode(),
        parse_constant=_no_number,
        parse_float=_finite,
        object_pairs_hook=_Objects().from_pairs,
    )
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        refuse("body", f"must not have more than {MAX_FIELDS} fields")
    _check_containers(value)
    return value


class _Objects:
    """Makes the objects of one body, and counts them."""

    def __init__(self) -> None:
        self._count = 0

    def from_pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count += 1
        if self._count > MAX_CONTAINERS:
            _too_many()
        made = dict(pairs)
        if len(made) != len(pairs):
            names = Counter(name for name, _ in pairs)
            refuse(names.most_common(1)[0][0][:100], "is there twice")
        return made


def _too_many() -> NoReturn:
    refuse("body", f"must not hold more than {MAX_CONTAINERS:,} objects and lists")


def _check_containers(value: object) -> None:
    """Refuse a value that is nested too deep, or of too many objects and lists."""
    level = [value] if isinstance(value, (dict, list)) else []
    count = 0
    for _ in range(MAX_DEPTH):
        if not level:
            return
        inner: list[dict[str, Any] | list[Any]] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            inner += [child for child in children if isinstance(child, (dict, list))]
            if count + len(inner) > MAX_CONTAINERS:
                _too_many()
        count += len(inner)
        level = inner
    if level:
        refuse("body", f"must not be nested more than {MAX_DEPTH} deep")


def _no_number(text: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's parser accepts and JSON does not have."""
    raise ValueError(text)


def _finite(text: str) -> float:
    """Parse a number; refuse one that overflows to infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


class _JsonRequest(Request):
    """A request whose body is read by ``read_json``."""

    async def json(self) -> Any:  # noqa: ANN401 - as Starlette's
        """Read the body."""
        if not hasattr(self, "_json"):
            content = plain(await self.body())
            try:
                self._json = _parse(content)
            except json.JSONDecodeError:
                # FastAPI's answer to it names the place.
                raise
            except UnicodeDecodeError:
                _not_utf_8()
            except (ValueError, RecursionError):
                refuse("body", "cannot be read as JSON", kind="json_invalid")
        return self._json


class JsonRoute(APIRoute):
    """A route whose JSON body is read by ``read_json`` before FastAPI validates it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with another request."""
        handler = super().get_route_handler()
        has_body = self.body_field is not None

        async def handle(request: Request) -> Response:
            if has_body:
                check_media_type(request.headers)
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle
