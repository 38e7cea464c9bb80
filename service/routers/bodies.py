"""Reads JSON bodies: what they may hold, and what reading one may cost.

Every JSON body of every route is read here. The limits keep the work for a body of 1 MB, validation included,
under 50 ms of processor time on the machine where they were measured; a body of 30 MB took 0.2 s there.
"""

import json
import math
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from inspect import signature
from typing import Any, Final, NoReturn, cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import UnsupportedMediaTypeError, ValidationError

MAX_DEPTH: Final = 100
"""Deepest permitted nesting of a request; the JSON schema of a tool needs a few dozen."""

MAX_VALUES: Final = 20_000
"""Most values in one body: texts, numbers, objects and lists. A conversation of 1,000 messages with tools has
a few thousand."""

MAX_INPUT_VALUES: Final = 300_000
"""Most values in an embeddings request, whose inputs may be lists of tokens: OpenAI's limit of tokens."""

MAX_FIELDS: Final = 200
"""Most fields of the outermost object; OpenAI's chat completion has about 40."""

CONTAINERS: Final = frozenset({dict, list})
"""The types of values that hold others, as the parser makes them."""

JSON: Final = re.compile(r"application/([\w.-]+\+)?json[ \t]*(;.*)?", re.IGNORECASE | re.DOTALL)
"""The content types of JSON (RFC 6839, section 3.1)."""

CHARSET: Final = re.compile(r";[ \t]*charset[ \t]*=[ \t]*\"?([^\s;\"]*)", re.IGNORECASE)
UTF_8: Final = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
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
    return content.removeprefix(BOM_UTF8)


def read_json(content: bytes, max_values: int = MAX_VALUES) -> Any:  # noqa: ANN401 - any JSON value
    """Parse a body, strictly.

    Args:
        content: The body.
        max_values: Most values that it may hold; no more than ``MAX_VALUES`` of them objects and lists.

    Raises:
        ValidationError: It is not JSON in UTF-8, names a field of an object twice, holds a number that is not
            finite, is nested too deep, or holds too many values.
    """
    try:
        return _parse(content, max_values)
    except UnicodeDecodeError:
        _not_utf_8()
    except (ValueError, RecursionError):
        refuse("body", "cannot be read as JSON", kind="json_invalid")


def _not_utf_8() -> NoReturn:
    refuse("body", "is not valid UTF-8", kind="json_invalid")


def _parse(content: bytes, max_values: int = MAX_VALUES) -> Any:  # noqa: ANN401 - any JSON value
    _check_number_of_values(content, max_values)
    value = json.loads(
        content.decode(),
        parse_constant=_no_number,
        parse_float=_finite,
        object_pairs_hook=_object,
    )
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        refuse("body", f"must not have more than {MAX_FIELDS} fields")
    _check_depth(value)
    return value


def _check_number_of_values(content: bytes, max_values: int) -> None:
    """Refuse too many values before they are parsed, which takes 50 ms for 1 MB of short lists.

    Each value but the first of its object or list follows a comma.
    """
    opened, commas = _count(content)
    if opened <= MAX_VALUES and opened + commas < max_values:
        return
    # There may be brackets and commas in texts: they are counted again without the texts.
    content = content.replace(rb"\\", b"").replace(rb"\"", b"")
    # An object's entry has up to two texts.
    if content.count(b'"') <= 4 * max_values:
        opened, commas = _count(b"".join(content.split(b'"')[::2]))
        if opened <= MAX_VALUES and opened + commas < max_values:
            return
    limits = f"{max_values:,} values" + (f", {MAX_VALUES:,} objects and lists" * (max_values > MAX_VALUES))
    refuse("body", f"must not hold more than {limits}")


def _count(content: bytes) -> tuple[int, int]:
    """Return the numbers of objects and lists, and of commas."""
    return content.count(b"[") + content.count(b"{"), content.count(b",")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; refuse a field that is there twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = Counter(name for name, _ in pairs)
        refuse(names.most_common(1)[0][0][:100], "is there twice")
    return made


def _check_depth(value: object) -> None:
    """Refuse a value that is nested too deep."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            # A list of a hundred thousand tokens is passed over in a millisecond or two.
            if not CONTAINERS.isdisjoint(map(type, children)):
                inner += [child for child in children if isinstance(child, (dict, list))]
        if not inner:
            return
        level = inner
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


def read_fields_of(content: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """Parse a body that FastAPI validates; as ``read_json``, but the error names the place."""
    try:
        return _parse(content)
    except json.JSONDecodeError as error:
        refuse(f"body.{error.pos}", "JSON decode error", kind="json_invalid")
    except UnicodeDecodeError:
        _not_utf_8()
    except (ValueError, RecursionError):
        refuse("body", "cannot be read as JSON", kind="json_invalid")


class _JsonRequest(Request):
    """A request whose body is read by ``read_json``."""

    async def json(self) -> Any:  # noqa: ANN401 - as Starlette's
        """Read the body."""
        if not hasattr(self, "_json"):
            self._json = read_fields_of(plain(await self.body()))
        return self._json


class JsonRoute(APIRoute):
    """A route whose JSON body is read by ``read_json`` before FastAPI validates it."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401
        # A body without Content-Type is taken for JSON. FastAPI refuses it against forged requests, to which
        # browsers would add credentials; here these are in a field that no browser adds by itself.
        super().__init__(path, endpoint, **{**options, "strict_content_type": False})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with another request."""
        handler = super().get_route_handler()
        has_body = self.body_field is not None

        async def handle(request: Request) -> Response:
            if has_body:
                check_media_type(request.headers)
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class CallRoute(JsonRoute):
    """A route whose arguments are the request, the call, and a body or none; it is answered directly.

    FastAPI would solve the dependencies anew for each request, with two stacks for what they leave open and a
    second handler of errors, and validate the answer: as much work as all of this service's own for a hit.
    It still describes the route. One with other arguments is FastAPI's.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401
        super().__init__(path, endpoint, **options)
        if signature(endpoint).parameters.keys() <= {"request", "call", "body"}:
            self.app = self._answering(endpoint)

    def _answering(self, endpoint: Callable[..., Awaitable[Response]]) -> ASGIApp:
        calls = cast("Callable[[Request], Awaitable[object]]", self.dependant.dependencies[0].call)
        field = self.body_field

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            if field is None:
                response = await endpoint(request=request, call=await calls(request))
            else:
                check_media_type(request.headers)
                content = await request.body()
                # Read before the caller is admitted, and validated after.
                fields = read_fields_of(plain(content)) if content else None
                call = await calls(request)
                if not content:
                    refuse("body", "Field required", kind="missing")
                body, errors = field.validate(fields, loc=("body",))
                if errors:
                    raise RequestValidationError(errors)
                response = await endpoint(body=body, request=request, call=call)
            await response(scope, receive, send)

        return answer
