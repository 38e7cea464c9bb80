"""What must not differ between two questions that are to count as the same, however alike their vectors are.

An embedding hardly sees a number, a negation, a name, a unit, a direction or a language change: "raise it by
5 %" and "lower it by 15 %" lie close together. Those things are picked out by rules, in their order, and
hashed; the store compares the hashes. A rule that sees too much costs a hit; one that sees too little would
cost a wrong answer, so where there is doubt there is a difference.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator

from service.services.guard_words import (
    DATES,
    LANGUAGES,
    NAMES,
    NEGATIONS,
    NUMBERS,
    OPENERS,
    SENSES,
    UNITS,
)

QUOTED = re.compile(r"```.*?```|`[^`]+`|\"[^\"]+\"|“[^”]+”|«[^»]+»|(?<!\w)'[^']+'(?!\w)", re.DOTALL)
NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
CODE = re.compile(r"\S*(?:[_\\/@#=<>{}\[\]()|~^&*+$€£%]|\w\.\w|[a-z][A-Z]|::)\S*")
TOKEN = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
SENTENCE_END = re.compile(r"[.!?:;\n]\s*$")
ASKED: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("count", re.compile(r"\bhow (?:many|much)\b|\bnumber of\b|\bpopulation\b|\bcost\b|\bprice\b")),
    ("when", re.compile(r"\bwhen\b|\bwhat (?:time|date|year|day)\b|\bwhich (?:year|day|date)\b")),
    ("where", re.compile(r"\bwhere\b|\bwhat (?:place|location)\b")),
    ("who", re.compile(r"\bwho(?:m|se|'s)?\b")),
    ("howlong", re.compile(r"\bhow (?:long|often|far|old|tall|big|fast|high|deep)\b")),
)
"""What kind of answer is asked for, where a word says it."""


def guard_of(text: str) -> str:
    """A hash of what must not differ; it says nothing of the text to who does not know the text.

    Args:
        text: A question.
    """
    features = json.dumps(list(_features(unicodedata.normalize("NFKC", text))), ensure_ascii=True)
    return hashlib.sha256(features.encode()).hexdigest()


def _features(text: str) -> Iterator[str]:
    for found in QUOTED.finditer(text):
        yield f"quote:{found[0].strip().casefold()}"
    rest = QUOTED.sub(" ", text)
    for found in CODE.finditer(rest):
        yield f"code:{found[0].strip('.,;:!?')}"
    for found in NUMBER.finditer(rest):
        yield f"number:{found[0].replace(',', '')}"
    negations = 0
    for word, is_name in _words(rest):
        kind = _kind_of(word, is_name=is_name)
        negations += kind == "not"
        if kind and kind != "not":
            yield kind
    yield f"not:{negations}"
    lowered = rest.casefold()
    for name, pattern in ASKED:
        if pattern.search(lowered):
            yield f"asked:{name}"
    yield f"language:{language_of(text)}"


def _words(text: str) -> Iterator[tuple[str, bool]]:
    """Each word in small letters, and whether it is written as a name."""
    for found in TOKEN.finditer(text):
        word = found[0].replace("\u2019", "'")
        before = text[: found.start()]
        opens = not before.strip() or SENTENCE_END.search(before) is not None
        small = word.casefold()
        acronym = len(word) > 1 and word.isupper()
        capital = word[:1].isupper() and not word.startswith("I'") and word != "I"
        named = acronym or (capital and not (opens and small in OPENERS))
        yield small.removesuffix("'s"), named


def _kind_of(word: str, *, is_name: bool) -> str:
    """What a word must be equal in; empty for a word that may differ."""
    if word in NEGATIONS or word.endswith("n't"):
        return "not"
    if word in DATES:
        return f"date:{word}"
    for prefix, words in (("number", NUMBERS), ("unit", UNITS), ("sense", SENSES)):
        if word in words:
            return f"{prefix}:{words[word]}"
    if is_name or word in NAMES:
        return f"name:{word}"
    return ""


def language_of(text: str) -> str:
    """The text's script, and where that is Latin the language whose commonest words are in it most."""
    scripts: dict[str, int] = {}
    for letter in text:
        if letter.isalpha():
            script = unicodedata.name(letter, "?").split(" ")[0]
            scripts[script] = scripts.get(script, 0) + 1
    script = max(scripts, key=lambda name: scripts[name], default="")
    if script != "LATIN":
        return script
    words = {found[0].casefold() for found in TOKEN.finditer(text)}
    votes = {name: len(words & common) for name, common in LANGUAGES.items()}
    best = max(votes, key=lambda name: votes[name])
    # Too few words to tell: the same for all, so that they are compared with each other.
    return best if votes[best] > votes["en"] else "en"
