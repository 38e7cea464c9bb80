"""Which of several media types a caller prefers (RFC 9110, section 12.5.1)."""

import re
from typing import Final

QUALITY: Final = re.compile(r"q=([01](?:\.[0-9]{0,3})?)")


def preferred(accept: str, default: str, *others: str) -> str:
    """The media type that a request's ``Accept`` prefers; the default where it does not say.

    Args:
        accept: The field's value.
        default: What is sent unless another type is preferred to it.
        others: The other types that can be sent.
    """
    quality = dict.fromkeys((default, *others), 0.0)
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        found = next((QUALITY.fullmatch(one) for one in parameters if one.startswith("q=")), None)
        for media_type in quality:
            if name in {media_type, media_type.partition("/")[0] + "/*"}:
                quality[media_type] = max(quality[media_type], float(found[1]) if found else 1.0)
    best = max(quality, key=lambda media_type: quality[media_type])
    return best if quality[best] > quality[default] else default
