"""Reads forms with files as they arrive: what they may hold, and where the model is named.

A form is passed on to the upstream piece by piece, and each piece is read first: what must not reach the
upstream ends the request before the form is complete there, and an incomplete form is not processed.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import CallerLeftError, UnsupportedMediaTypeError
from service.middleware.request_limits import pass_body_on
from service.routers.bodies import refuse
from service.routers.schemas import MODEL_NAME
from service.upstream.control_fields import control_field
from service.upstream.upload import Upload

FORM: Final = b"multipart/form-data"
UTF_8: Final = frozenset({b"utf-8", b"utf8"})
FIELD_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}(\[[A-Za-z0-9_.-]{0,100}\])?")
BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{1,256}")
"""RFC 2046, section 5.1.1, with more characters than its 70: some clients have longer ones."""

MAX_PARTS: Final = 100
MAX_HEADER_BYTES: Final = 8_192
MAX_FIELD_BYTES: Final = 262_144
"""The largest text of all fields that are no files; what is asked beside a recording has a few hundred."""

MODEL: Final = "model"
_MODEL_NAME: Final = re.compile(MODEL_NAME)


class FormReader:
    """Reads a form piece by piece, strictly; what it refuses is a ``ValidationError``.

    Args:
        boundary: The form's.
        passed: Fields of LiteLLM's own that may be sent.
        file: The field that must be a file.
    """

    def __init__(self, boundary: bytes, passed: AbstractSet[str], file: str) -> None:
        self._passed = passed
        self._file = file
        self._boundary = b"--" + boundary
        self._boundaries = 0
        self._field_bytes = 0
        self._name = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._field = ""
        self._is_file = False
        self._text = bytearray()
        self._has_file = False
        self.ended = False
        """Whether the form is complete."""
        self.fields: dict[str, str] = {}
        """The fields that are no files, as far as they were read; of several of one name, the last."""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._take_name,
                "on_header_value": self._take_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._take_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    @property
    def model(self) -> str | None:
        """The model that the form names; None while it has not."""
        return self.fields.get(MODEL)

    def feed(self, data: bytes) -> None:
        """Read the next piece of the form."""
        # What looks like a boundary and is none costs the parser 50 ms for each MB.
        self._boundaries += data.count(self._boundary)
        if self._boundaries > MAX_PARTS + 1:
            refuse("body", f"must not have more than {MAX_PARTS} parts")
        try:
            self._parser.write(data)
        except FormParserError:
            self._unreadable()

    def finish(self) -> None:
        """Check that the form is complete."""
        if not self.ended:
            self._unreadable()
        if not self._has_file:
            refuse(self._file, "must be a file")

    def _unreadable(self) -> None:
        refuse("body", "cannot be read as multipart/form-data", kind="form_invalid")

    def _begin_part(self) -> None:
        self._headers, self._header_bytes = {}, 0
        self._name = self._value = b""
        self._text.clear()

    def _take_name(self, data: bytes, start: int, end: int) -> None:
        self._name += self._header_piece(data, start, end)

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._header_piece(data, start, end)

    def _header_piece(self, data: bytes, start: int, end: int) -> bytes:
        self._header_bytes += end - start
        if self._header_bytes > MAX_HEADER_BYTES:
            refuse("body", f"must not have a part with more than {MAX_HEADER_BYTES:,} bytes of header fields")
        return data[start:end]

    def _end_header(self) -> None:
        name = self._name.lower()
        if name in self._headers:
            refuse("body", "must not have a part with a header field twice")
        self._headers[name] = self._value
        self._name = self._value = b""

    def _begin_content(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if disposition != b"form-data" or FIELD_NAME.fullmatch(name) is None:
            refuse("body", "must have a simple name for each part, in Content-Disposition: form-data")
        base = name.partition("[")[0]
        field = control_field((name, base), self._passed)
        if field is not None:
            refuse(field, "is LiteLLM's own, and not permitted here")
        self._field, self._is_file = name, b"filename" in options
        if base == MODEL and (self._is_file or name != MODEL or MODEL in self.fields):
            refuse(MODEL, "must be one text")
        if self._is_file is not (name == self._file):
            refuse(name, "must be a file" if name == self._file else "must not be a file")
        if self._is_file and self._has_file:
            refuse(name, "is there twice")
        self._has_file = self._has_file or self._is_file

    def _take_content(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            return
        self._field_bytes += end - start
        if self._field_bytes > MAX_FIELD_BYTES:
            refuse(self._field, f"must not have more than {MAX_FIELD_BYTES:,} bytes with the other texts")
        self._text += data[start:end]

    def _end_part(self) -> None:
        if self._is_file:
            return
        try:
            text = self._text.decode()
        except UnicodeDecodeError:
            refuse(self._field, "is not valid UTF-8")
        if self._field == MODEL and _MODEL_NAME.fullmatch(text) is None:
            refuse(MODEL, "must be the name of one model: up to 200 printable ASCII characters, no comma")
        self.fields[self._field] = text

    def _end(self) -> None:
        self.ended = True


@dataclass(frozen=True)
class Form:
    """A form, read as far as its model.

    Args:
        model: The model that it names.
        fields: The fields that were read so far and are no files.
        upload: All of it, for the upstream.
    """

    model: str
    fields: Mapping[str, str]
    upload: Upload


async def read_form(
    request: Request, passed: AbstractSet[str], *, file: str = "file", default_model: str | None = None
) -> Form:
    """Read a form until its model is known; all of it where that stands last, or is not named.

    Clients of OpenAI write the fields in the order in which they were given, so the file may come first: then
    all of the form is held, as a body in JSON is.

    Args:
        request: The request.
        passed: Fields of LiteLLM's own that may be sent.
        file: The field that must be a file.
        default_model: The model of a form that names none; added to the form.

    Raises:
        UnsupportedMediaTypeError: Its header fields announce something else; then nothing of it is read.
        ValidationError: It is no form, or holds what it must not, as far as it was read.
        CallerLeftError: The caller left.
    """
    content_type, boundary = _check_form_type(request)
    reader = FormReader(boundary, passed, file)
    arriving = _arriving(request, reader)
    start: list[bytes] = []
    rest: AsyncIterator[bytes] | None = arriving
    async for piece in arriving:
        start.append(piece)
        if reader.model is not None and not reader.ended:
            break
    else:
        rest = None
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdigit() else None
    model = reader.model or default_model
    if model is None:
        refuse(MODEL, "must name a model")
    if reader.model is None:
        added = (
            b"--" + boundary + b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
            + model.encode() + b"\r\n"
        )  # fmt: skip
        # What stands before the first boundary would be a part of the model's name.
        start = [added + b"".join(start).lstrip(b"\r\n")]
        size = len(start[0])
    pass_body_on(request.scope)
    return Form(model, dict(reader.fields), Upload(content_type, start, rest, size))


def _check_form_type(request: Request) -> tuple[str, bytes]:
    """The form's ``Content-Type`` and boundary."""
    values = request.headers.getlist("content-type")
    codings = request.headers.getlist("content-encoding")
    kind, options = parse_options_header(values[0] if len(values) == 1 else b"")
    boundary = options.get(b"boundary", b"")
    # LiteLLM would read the names with another character set than this service.
    charset = options.get(b"charset", b"utf-8").lower()
    is_form = kind == FORM and BOUNDARY.fullmatch(boundary) is not None and charset in UTF_8
    if not is_form or set(codings) - {"", "identity"}:
        raise UnsupportedMediaTypeError(
            "The body must be a form with a file, with Content-Type: multipart/form-data and its boundary,"
            " and without Content-Encoding.",
            headers={"Accept": "multipart/form-data"},
        )
    return values[0], boundary


async def _arriving(request: Request, reader: FormReader) -> AsyncGenerator[bytes, None]:
    """The pieces of the body, each after it was read; the last one only where the form is complete."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise CallerLeftError
        piece: bytes = message.get("body", b"")
        reader.feed(piece)
        more = message.get("more_body", False)
        if not more:
            reader.finish()
        if piece:
            yield piece
        if not more:
            return
