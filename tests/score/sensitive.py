"""Finds what looks like a person's data or a secret, as the Instrumentation Score describes it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

PATTERNS: Final = {
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[A-Za-z]{2,}"),
    "a social security number": re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"),
    "a credential": re.compile(
        r"[Bb]earer [\w.~+/-]{8,}|\bsk-[\w-]{8,}|\bAKIA[A-Z0-9]{12,}|\beyJ[\w-]{8,}\."
        r"|\bllmops_\w{8,}_[\w-]{30,}"
    ),
    "a secret in a pair": re.compile(r"(?i)\b\w*(password|passwd|secret|api_?key|token)\s*[=:]\s*\S+"),
    "a person's health": re.compile(r"(?i)\b(diagnosis|patient_id|insurance_id)\s*[=:]\s*\S+"),
}
CARD: Final = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
KEYS: Final = frozenset(
    {"password", "passwd", "secret", "token", "api_key", "apikey", "ssn", "authorization", "cookie"}
)
"""The last word of a key under which each value counts as a secret."""


def sensitive_in(record: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """What looks sensitive in a record, also in lists and maps within it, without the value itself."""
    for key, value in record.items():
        where = f"{path}{key}"
        if str(key).rpartition(".")[2].lower() in KEYS and value:
            yield f"{where} is named like a secret"
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, Mapping):
                yield from sensitive_in(one, f"{where}.")
            elif isinstance(one, (str, int)) and not isinstance(one, bool):
                yield from (f"{where} has {what}" for what in _kinds(str(one)))


def _kinds(text: str) -> Iterator[str]:
    yield from (what for what, pattern in PATTERNS.items() if pattern.search(text))
    if any(_luhn(re.sub(r"[ -]", "", found[0])) for found in CARD.finditer(text)):
        yield "the number of a card"


def _luhn(digits: str) -> bool:
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0
