"""Questions with the same meaning: their vectors, and the guard against similar questions that differ.

Embeddings rate "Is 5 more than 7?" and "Is 7 more than 5?" as almost equal. So two questions are compared
only where their guards are equal, too: hashes of the words that decide the answer.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from service.cache.entries import Entry
from service.cache.keys import CacheKey, scope_of
from service.cache.store import COLLECTION, Breaker, Found, GuardedStore, Point, StoreError, equal_to
from service.config.settings import Settings
from service.errors import ServiceError, UpstreamError
from service.upstream.client import LlmClient
from service.upstream.messages import LlmRequest, to_json
from service.utils.deadline import Deadline


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _classes(text: str) -> dict[str, str]:
    """Each word after a colon, mapped to the name before it."""
    lines = (line.split(":") for line in text.strip().splitlines())
    return {word: name for name, words in lines for word in words.split()}


SWAPPING_PREPOSITIONS: Final = _words("of in on at for about using via within behind")
"""Their two sides can be swapped: the symptoms of the flu are flu symptoms."""

STOP_WORDS: Final = _words("""
a an the this that these those it its with through as
and is are am be do does what what's whats which who whom whose when where why how
i i'm i'd me my mine we us our you your they them their one there there's here
can could would will please kindly hi hello hey thanks thank ok
explain describe tell show give provide define definition meaning mean means meant called
way ways exactly actually really just basically
term terms concept idea purpose role use used work works working look like
another person people someone somebody to
""")
"""Left out of the guard. Any other word that is in one question only keeps the two apart: a list of the words
that matter would never be complete."""

SYNONYMS: Final = _classes("""
0: zero
1: one
2: two
3: three
4: four
5: five
6: six
7: seven
8: eight
9: nine
10: ten
11: eleven
12: twelve
13: thirteen
14: fourteen
15: fifteen
16: sixteen
17: seventeen
18: eighteen
19: nineteen
20: twenty
not: not no never n't cannot isn't aren't doesn't don't didn't can't won't wouldn't shouldn't couldn't
suggest: suggest recommend propose
create: create make making made
plane: airplane aeroplane airplanes planes
tire: tire tyre tires tyres
canceling: cancelling canceling
word: synonym word
leak: leaking leaky
color: color colour colors colours
center: center centre
""")
"""Words and spellings with the same meaning, by the one that stands for them."""

PHRASES: Final = (
    (r"\bhow long (?:does it take|do (?:i|you) (?:need|have)) to\b", "howlong "),
    (r"\bmeant by\b", " "),
    (r"\bhow (?:do|can|could|should|would|does|might) (?:i|you|we|one|they|people)\b(?: go about)?", " "),
    (r"\bhow to\b", " "),
    (r"\bi (?:want|need|would like|'d like) to\b", " "),
    (r"\b(?:can|could|would|will) you(?: please)?\b", " "),
    (r"\bwhat(?:'s| is| are) (?:the )?(?:best |right |good )?(?:way|ways) (?:to|of)\b", " "),
    (r"\b(\w+)-(\w+)\b", r"\1 \2"),
)
"""Phrases that do not change what is asked, and what they are replaced with."""

LANGUAGES: Final = {
    name: _words(words)
    for name, words in (
        ("de", "der die das und ist nicht wie was ich wer wo warum kann ein eine mit für auf den"),
        ("fr", "le la les est et une des que qui quel quelle comment pourquoi je pas dans pour du"),
        ("es", "el la los las es y una que qué cómo por para cuál dónde del está quién un"),
        ("it", "il lo gli è e una che come perché quale dove chi di della sono per un"),
        ("pt", "o os as é e uma que como qual onde quem não para por do da um"),
        ("nl", "de het een en is niet wat hoe waarom waar wie van voor met ik"),
        ("en", "the is are what how why where who of to and in a an do does can for i my with"),
    )
}
"""The most common words of some languages."""


QUOTED = re.compile(r"```.*?```|`[^`]+`|\"[^\"]+\"|\u201c[^\u201d]+\u201d|\u00ab[^\u00bb]+\u00bb", re.DOTALL)
CODE = re.compile(r"[_\\/@#=<>{}\[\]()|~^&*+$\u20ac\u00a3%]|\w\.\w|[a-z][A-Z]|::")
"""Matches in words that are compared letter by letter: code, paths, amounts of money."""

TOKEN = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)*|[^\w\s.,!?;:'\"-]")
COMPILED_PHRASES = tuple((re.compile(pattern), plain) for pattern, plain in PHRASES)
ALTERNATIVES = re.compile(r"\b(\w+) (?:and|or|vs|versus) (?:(?:a|an|the) )?(\w+)\b")
QUESTION_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("when", re.compile(r"\bwhen\b|\bwhat (?:time|date|year|day)\b|\bwhich (?:year|day|date)\b")),
    ("where", re.compile(r"\bwhere\b|\bwhat (?:place|location)\b")),
    ("who", re.compile(r"\bwho(?:m|se|'s)?\b")),
    ("why", re.compile(r"\bwhy\b")),
)
"""The kind of answer that is asked for, by the words that say it. They are stop words otherwise."""

MIN_STEM_CHARS = 3


def guard_of(text: str) -> str:
    """A hash of what must not differ between two questions that are compared by meaning.

    Args:
        text: A question; it cannot be read back from the hash.
    """
    features = json.dumps(list(_features(unicodedata.normalize("NFKC", text))), ensure_ascii=True)
    return hashlib.sha256(features.encode()).hexdigest()


def _features(text: str) -> Iterator[str]:
    text = text.replace("\u2019", "'")
    quoted = QUOTED.findall(text)
    # A pattern for whole words would backtrack in long ones.
    words = QUOTED.sub(" ", text).split()
    plain = " ".join(word for word in words if not CODE.search(word)).casefold()
    for name, pattern in QUESTION_KINDS:
        if pattern.search(plain):
            yield f"asked:{name}"
    yield f"language:{language_of(text)}"
    for exact in (*quoted, *(word for word in words if CODE.search(word))):
        yield f"exact:{exact.strip('.,;:!?')}"
    yield from _stems(plain)


def _stems(text: str) -> list[str]:
    """The stems of the words that matter, in order; alternatives ("A or B") are sorted."""
    for pattern, plain in COMPILED_PHRASES:
        text = pattern.sub(plain, text)
    text = ALTERNATIVES.sub(lambda pair: " ".join(sorted((pair[1], pair[2]))), text)
    parts: list[list[str]] = [[]]
    for found in TOKEN.finditer(text):
        # "France's capital" equals "the capital of France".
        word = found[0].replace(",", "").removesuffix("'s")
        if word in SWAPPING_PREPOSITIONS:
            parts.append([])
        elif word not in STOP_WORDS:
            parts[-1].append(stem_of(SYNONYMS.get(word, word)))
    return [stem for part in reversed(parts) for stem in part]


def stem_of(word: str) -> str:
    """The word without the ending of a plural or a verb form; an approximation."""
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("es", ""), ("s", "")):
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < MIN_STEM_CHARS or (ending == "s" and stem[-1] in "sui"):
            continue
        if ending in {"ing", "ed"} and stem[-1] == stem[-2] and stem[-1] not in "lsz":
            stem = stem[:-1]
        return (stem + instead).removesuffix("e") if not instead else stem + instead
    return word.removesuffix("e") if len(word) > MIN_STEM_CHARS else word


def language_of(text: str) -> str:
    """The language with the most common words in the text; for other scripts than Latin, the script."""
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
    # Texts too short to tell count as English, so that they are compared with each other.
    return best if votes[best] > votes["en"] else "en"


MAX_QUESTION_CHARS = 2_000
"""A longer text is more than one question, and embedding models read the first 256 or 512 tokens only."""

MAX_DEADLINE_SHARE = 0.1
"""Share of the call's remaining time that making a vector may take."""

MAX_DIMENSION = 16_384
CANDIDATES = 3


@dataclass(frozen=True, slots=True)
class Question:
    """A question that can be compared by meaning.

    Args:
        scope: A hash of all that must be equal beside the meaning; 64 hex digits.
        vector: The embedding of the last message.
        collection: The collection of this embedding model's vectors.
    """

    scope: str
    vector: Sequence[float]
    collection: str


@dataclass(frozen=True, slots=True)
class Match:
    """A stored question that counts as the same, and the key of its answer."""

    key: CacheKey
    similarity: float
    point_id: str
    collection: str


class SemanticIndex:
    """Finds stored questions by their meaning.

    Args:
        llm: Makes the vectors.
        store: Where they are stored.
        settings: The embedding model, the threshold, and the time limit.
        breaker: The circuit breaker of the embedding model.
    """

    def __init__(self, llm: LlmClient, store: GuardedStore, settings: Settings, breaker: Breaker) -> None:
        self._llm = llm
        self._store = store
        self._model = settings.embedding_model
        self._threshold = settings.cache_similarity
        self._timeout_s = settings.cache_embedding_timeout_s
        self._breaker = breaker

    async def question(
        self, tenant: str, model: str, body: Mapping[str, Any], deadline: Deadline
    ) -> Question | None:
        """The question in a request; None where it has none that can be compared by meaning.

        Raises:
            StoreError: The embedding model did not return its vector in time.
        """
        text = last_question(body)
        if text is None:
            return None
        scope = scope_of(tenant, model, body, guard_of(text))
        vector = await self._embed(text, deadline)
        return Question(scope, vector, collection_of(self._model, len(vector)))

    async def nearest(self, tenant: str, question: Question) -> list[Match]:
        """Stored questions over the threshold, the most similar first; raises ``StoreError``."""
        found = await self._store.search(
            question.collection,
            question.vector,
            equal_to({"tenant": tenant, "scope": question.scope}),
            self._threshold,
            CANDIDATES,
        )
        return [match for point in found if (match := self._match(point, tenant, question)) is not None]

    def _match(self, point: Found, tenant: str, question: Question) -> Match | None:
        """The match in a point that the store found; None where its payload is not what was asked for."""
        payload = point.payload
        digest = payload.get("key")
        if (payload.get("tenant"), payload.get("scope")) != (tenant, question.scope):
            return None
        if not isinstance(digest, str) or not self._threshold <= point.score <= 1 + 1e-3:
            return None
        return Match(CacheKey(digest, tenant), min(1.0, point.score), point.id, question.collection)

    async def _embed(self, text: str, deadline: Deadline) -> Sequence[float]:
        if self._breaker.rejects:
            raise StoreError("embeddings_circuit_open")
        timeout_s = min(self._timeout_s, deadline.left_s * MAX_DEADLINE_SHARE)
        body = {"model": self._model, "input": text, "encoding_format": "float"}
        request = LlmRequest("embeddings", self._model, body, to_json(body), verbatim=True)
        try:
            with self._breaker.attempt():
                reply = await self._llm.ask(request, Deadline.after(timeout_s))
                vector = vector_of(reply.content)
                if vector is None:
                    raise UpstreamError(label="no vector")
                return vector
        except ServiceError:
            raise StoreError("embedding_failed") from None


def question_point(entry: Entry, question: Question) -> Point:
    """A question as it is stored: its vector and the key of its answer, and no text."""
    payload = {
        "key": entry.key.digest,
        "tenant": entry.key.tenant,
        "scope": question.scope,
        "model": entry.model,
        "created": entry.created_at,
        "expires": entry.expires_at,
    }
    return Point(entry.key.point_id, payload, question.vector)


def vector_of(content: bytes) -> list[float] | None:
    """The vector in an answer of ``/embeddings``; None where there is none that can be compared."""
    try:
        vector = json.loads(content)["data"][0]["embedding"]
        numbers = [float(number) for number in vector]
    except (ValueError, KeyError, TypeError, IndexError, OverflowError):
        return None
    if not 0 < len(numbers) <= MAX_DIMENSION or not all(map(math.isfinite, numbers)):
        return None
    return numbers if any(numbers) else None


def collection_of(model: str, dimension: int) -> str:
    """The collection of one model's vectors of one dimension: others cannot be compared with them."""
    return f"{COLLECTION}_{hashlib.sha256(model.encode()).hexdigest()[:12]}_{dimension}"


def last_question(body: Mapping[str, Any]) -> str | None:
    """The text of the last message, if it is the user's and has nothing but text."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user" or not set(last) <= {"role", "content"}:
        return None
    content = last.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and set(part) == {"type", "text"} for part in content):
            return None
        content = "\n".join(str(part["text"]) for part in content)
    if not isinstance(content, str) or not content.strip() or len(content) > MAX_QUESTION_CHARS:
        return None
    return content
