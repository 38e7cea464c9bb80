"""What must not differ between two questions that are to count as the same, however alike their vectors are.

An embedding hardly sees a number, a negation, a name, a unit or a direction: "raise it by 5 %" and "lower it
by 15 %" lie close together. A list of the words that matter never ends, so it is the other way round: of each
question a few harmless words and ways to ask are left out, the rest is brought to its stems, and it must be
equal, in its order. That is hashed, and the store compares the hashes. Where there is doubt there is a
difference: a rule that sees too much costs a hit, one that sees too little would cost a wrong answer.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator

from service.services.guard_words import HARMLESS, LANGUAGES, PHRASES, SAME, TURNING

QUOTED = re.compile(r"```.*?```|`[^`]+`|\"[^\"]+\"|\u201c[^\u201d]+\u201d|\u00ab[^\u00bb]+\u00bb", re.DOTALL)
CODE = re.compile(r"[_\\/@#=<>{}\[\]()|~^&*+$\u20ac\u00a3%]|\w\.\w|[a-z][A-Z]|::")
"""What makes a word one that is compared letter by letter: code, a path, an amount."""

TOKEN = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)*|[^\w\s.,!?;:'\"-]")
DRESS = tuple((re.compile(pattern), plain) for pattern, plain in PHRASES)
ALTERNATIVES = re.compile(r"\b(\w+) (?:and|or|vs|versus) (?:(?:a|an|the) )?(\w+)\b")
ASKED: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("when", re.compile(r"\bwhen\b|\bwhat (?:time|date|year|day)\b|\bwhich (?:year|day|date)\b")),
    ("where", re.compile(r"\bwhere\b|\bwhat (?:place|location)\b")),
    ("who", re.compile(r"\bwho(?:m|se|'s)?\b")),
    ("why", re.compile(r"\bwhy\b")),
)
"""What kind of answer is asked for, where a word says it; such words are harmless otherwise."""

SHORTEST_STEM = 3


def guard_of(text: str) -> str:
    """A hash of what must not differ; it says nothing of the text to who does not know the text.

    Args:
        text: A question.
    """
    features = json.dumps(list(_features(unicodedata.normalize("NFKC", text))), ensure_ascii=True)
    return hashlib.sha256(features.encode()).hexdigest()


def _features(text: str) -> Iterator[str]:
    text = text.replace("\u2019", "'")
    quoted = QUOTED.findall(text)
    # Word by word: a pattern around the whole word would take long for a long one.
    words = QUOTED.sub(" ", text).split()
    plain = " ".join(word for word in words if not CODE.search(word)).casefold()
    for name, pattern in ASKED:
        if pattern.search(plain):
            yield f"asked:{name}"
    yield f"language:{language_of(text)}"
    for exact in (*quoted, *(word for word in words if CODE.search(word))):
        yield f"exact:{exact.strip('.,;:!?')}"
    yield from _stems(plain)


def _stems(text: str) -> list[str]:
    """The words that count, in their order; two that are only set side by side in that of the alphabet."""
    for pattern, plain in DRESS:
        text = pattern.sub(plain, text)
    text = ALTERNATIVES.sub(lambda pair: " ".join(sorted((pair[1], pair[2]))), text)
    parts: list[list[str]] = [[]]
    for found in TOKEN.finditer(text):
        # "France's capital", like "the capital of France".
        word = found[0].replace(",", "").removesuffix("'s")
        if word in TURNING:
            parts.append([])
        elif word not in HARMLESS:
            parts[-1].append(stem_of(SAME.get(word, word)))
    return [stem for part in reversed(parts) for stem in part]


def stem_of(word: str) -> str:
    """The word without the ending of its plural or of its form as a verb, roughly."""
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("es", ""), ("s", "")):
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < SHORTEST_STEM or (ending == "s" and stem[-1] in "sui"):
            continue
        if ending in {"ing", "ed"} and stem[-1] == stem[-2] and stem[-1] not in "lsz":
            stem = stem[:-1]
        return (stem + instead).removesuffix("e") if not instead else stem + instead
    return word.removesuffix("e") if len(word) > SHORTEST_STEM else word


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
