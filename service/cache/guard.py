"""The guard of the look-up by meaning: two questions are compared only where their guards are equal.

Embeddings rate "How much do I owe you?" and "How much do you owe me?" as almost equal, so the guard decides
what a question asks and the vector only confirms it. A question is brought into one form by a closed list of
rewrites, each of which keeps the meaning, and the guard is a hash of that form. All other words stay, in
their order and with their capital letters: a list of the words that matter would never be complete. The
words of the rewrites are in ``service/cache/wording.py``.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable
from typing import Final

from service.cache.wording import (
    ACTIONS,
    CASELESS,
    ENGLISH,
    FIRST_WORDS,
    FOREIGN,
    FUNCTION_WORDS,
    INTERROGATIVES,
    KINDS,
    LANGUAGE_WORDS,
    LANGUAGES,
    MAKERS,
    NUMBERS,
    PROGRAMMING_LANGUAGES,
    RELATIONS,
    REQUESTS,
    SPELLINGS,
    SUPERLATIVES,
    SYSTEMS,
    THINGS,
    UNDEFINABLE,
    words_of,
)


def guard_of(text: str) -> str:
    """A hash of what must not differ between two questions that are compared by meaning.

    Args:
        text: A question; it cannot be read back from the hash.
    """
    return hashlib.sha256(canonical(text).encode("utf-8", "surrogatepass")).hexdigest()


def canonical(text: str) -> str:
    """The one form of all wordings of a question that are known to mean the same.

    Args:
        text: A question in any language; what is not English keeps all its words as they are.
    """
    text = unicodedata.normalize("NFC", text).translate(TYPOGRAPHY).strip()
    if len(text) > MAX_REWRITTEN_CHARS or any(mark in text for mark in "\n\r\t"):
        # Lines and columns are code, verse or data.
        return f"exact:{text}"
    if not is_english(text):
        return f"other:{_normalised(text)}"
    literal = is_literal(text)
    text = _fold_first(text)
    if TO_TRANSLATE.search(text):
        return f"en:{_without_end(text, literal=True)}"
    if not literal:
        text = _plain(text)
    text = _without_end(_without_politeness(text, literal=literal), literal=literal)
    for pattern, instead in FRAMES:
        text = pattern.sub(instead, text)
    return f"en:{text}"


def is_english(text: str) -> bool:
    """Whether common English words are in the majority among the common words of some languages."""
    words = [word.lower() for word in WORD.findall(text)]
    # Only the first word is a verb for certain.
    english = sum(word in ENGLISH for word in words) + bool(words and words[0] in VERBS)
    return english > sum(word in FOREIGN for word in words)


def is_literal(text: str) -> bool:
    """Whether single letters may matter: code, quotations, amounts of money, words about words."""
    return bool(LITERAL.search(text)) or any(word.lower() in LANGUAGE_WORDS for word in WORD.findall(text))


MAX_REWRITTEN_CHARS: Final = 2_000
"""A longer text is compared as it is: it holds more than one question."""

VERBS: Final = (ACTIONS | REQUESTS) - ENGLISH

TYPOGRAPHY: Final = str.maketrans(
    {
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u3000": " ",
        "\uff1f": "?",
        "\u061f": "?",
        "\uff01": "!",
        "\u3002": ".",
    }
)
"""Characters that differ in form only, and what they are replaced with."""

WORD: Final = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
LITERAL: Final = re.compile(
    r"[_\\/@#=<>{}\[\]()|~^&*+$\u20ac\u00a3\u00a5\u20b9`\":;\u2018\u201a\u201e\u00ab\u00bb\u2039\u203a\u300c-\u300f]"
    r"|(?<!\w)'|'(?!\w)|\w\.\w"
)
TO_TRANSLATE: Final = re.compile(rf"\b(?:in|into|to|from) (?:{'|'.join(sorted(LANGUAGES))})\b", re.IGNORECASE)
"""What comes before may be the text to translate: "How can I help you, in French?"."""
TWO_LETTERS: Final = re.compile(r"[^\W\d_]{2}$")
POLITE_PRONOUNS: Final = frozenset({"Sie", "Ihr", "Ihre", "Ihnen"})
"""In German these mean "you" with their capital letter, and "she" or "they" without."""
SPACES: Final = re.compile(r" {2,}")


def _normalised(text: str) -> str:
    """The text without what no language gives a meaning to: spaces, a final full stop, the first capital."""
    if LITERAL.search(text):
        return text
    words, marks = _split_end(SPACES.sub(" ", text).lstrip("\u00bf\u00a1"))
    # A question differs from the statement of the same words by its mark only, in many languages.
    text = words + ("?" if "?" in marks else "")
    return text if _first_word(text) in POLITE_PRONOUNS else text[:1].lower() + text[1:]


def _split_end(text: str) -> tuple[str, str]:
    """The text without its last punctuation marks, and the marks; 5! and n! are factorials and stay whole."""
    end = len(text.rstrip(" ?!."))
    if "!" in text[end:] and not TWO_LETTERS.search(text[:end]):
        end = text.rindex("!") + 1
    return text[:end], text[end:]


def _plain(text: str) -> str:
    """The text with one spelling for each word that has several, but not where words are the subject."""
    return WORD.sub(_one_spelling, SPACES.sub(" ", text))


def _one_spelling(found: re.Match[str]) -> str:
    word = found[0]
    lowered = word.lower()
    if lowered == "i":
        return "I"
    if "'" in word:
        return _expanded(found)
    if lowered in CASELESS:
        return SPELLINGS.get(lowered, lowered)
    if word in NUMBERS:
        return NUMBERS[word] if _counts(found) else word
    return SPELLINGS[word] if word in SPELLINGS and _is_used(found) else word


def _expanded(found: re.Match[str]) -> str:
    """A contraction in full, where it begins the question: elsewhere it may be quoted, or a name."""
    word = found[0]
    start, _, ending = word.partition("'")
    if ending == "s" and start.lower() in CASELESS:
        return f"{start.lower()}'s"
    begins = found.start() == 0 or BEFORE_CONTRACTION.fullmatch(found.string, 0, found.start())
    if not begins or not CLAUSE_NEXT.match(found.string, found.end()):
        return word
    if word.lower() in IRREGULAR:
        return IRREGULAR[word.lower()]
    if ending in ENDINGS:
        return f"{start} {ENDINGS[ending]}"
    if ending == "t" and start[-1:] == "n" and start[:-1].lower() in NEGATED:
        return f"{start[:-1]} not"
    return f"{start} is" if ending == "s" and start.lower() in BEFORE_IS else word


def _counts(found: re.Match[str]) -> bool:
    """Whether a number says how many are wanted: "give me three tips", "how do I merge two lists"."""
    before = _word_before(found)
    counts = before in COUNTED_AFTER or (before in ACTIONS and found.string.startswith("how "))
    return counts and NOUN_NEXT.match(found.string, found.end()) is not None


def _is_used(found: re.Match[str]) -> bool:
    """Whether a word stands for a thing: "Why does colour have a u?" asks about the word itself."""
    before = _word_before(found)
    if not before:
        return found.start() == 0
    if before in {"a", "an", "the", "my", "your", "their", "our"}:
        return True
    return before not in FUNCTION_WORDS | MENTIONED_AFTER and _first_word(found.string) in INTERROGATIVES


def _word_before(found: re.Match[str]) -> str:
    """The word before, in small letters; empty at the start of a sentence or a clause."""
    before = found.string[max(0, found.start() - LONGEST_BEFORE) : found.start()].rstrip(" ")
    last = before.rpartition(" ")[2].lower()
    return "" if last.endswith((".", "!", "?", ",")) else last


LONGEST_BEFORE: Final = 24
BEFORE_CONTRACTION: Final = re.compile(r"(?:why|I|[Yy]ou|[Hh]e|[Ss]he|[Ii]t|[Ww]e|[Tt]hey) ")
COUNTED_AFTER: Final = words_of("give me list name suggest recommend write draft generate")
MENTIONED_AFTER: Final = words_of("use uses using write writes type types prefer prefers say says")
NOUN_NEXT: Final = re.compile(r" [^\W\d_]")
CLAUSE_NEXT: Final = re.compile(r" (?!(?:or|and|vs|versus)\b)[^\W_]")
IRREGULAR: Final = {"can't": "cannot", "won't": "will not", "shan't": "shall not"}
ENDINGS: Final = {"m": "am", "re": "are", "ve": "have", "ll": "will"}
NEGATED: Final = words_of("is are was were do does did has have had would should could must need")
BEFORE_IS: Final = words_of("what who where when why how that there here it")


def _first_word(text: str) -> str:
    found = WORD.match(text)
    return found[0] if found else ""


def _fold_first(text: str) -> str:
    """The text without the capital letter of its first word, where that is known to be no name."""
    first = _first_word(text).partition("'")[0]
    if first != "I" and first[1:] == first[1:].lower() and first.lower() in FIRST_WORDS:
        return text[:1].lower() + text[1:]
    return text


def _starts_a_request(text: str) -> bool:
    first = _first_word(text).partition("'")[0].lower()
    return first in INTERROGATIVES or first in ACTIONS or first in REQUESTS or first in {"please", "kindly"}


def _without_politeness(text: str, *, literal: bool) -> str:
    """The question without greeting, please and thanks; only where a question or a request is left."""
    greeted = GREETING.match(text)
    if greeted and not literal and _starts_a_request(text[greeted.end() :]):
        text = text[greeted.end() :]
    text = WH_IS.sub(r"\1 is", _fold_first(text))
    if not literal:
        text = THANKS.sub("?", text)
        text = PLEASE_AT_END.sub(r"\1", text)
    for pattern in (PLEASE, PLEASE_YOU):
        asked = pattern.match(text)
        if asked and _starts_an_action(text[asked.end() :]):
            text = text[asked.end() :].rstrip("?")
    asked = CAN_YOU.match(text)
    if asked and (CERTAIN_REQUEST.match(text, asked.end()) or PURPOSEFUL_REQUEST.match(text, asked.end())):
        text = text[asked.end() :].rstrip("?")
    return _fold_first(text)


def _starts_an_action(text: str) -> bool:
    first = _first_word(text).lower()
    return first in ACTIONS or first in REQUESTS


GREETING: Final = re.compile(r"(?:[Hh]i|[Hh]ello|[Hh]ey)(?: there)?[,!.] +")
WH_IS: Final = re.compile(r"^(what|who|where|when|why|how)'s(?= (?!(?:or|and|vs|versus)\b)[^\W_])")
PLEASE: Final = re.compile(r"(?:please|kindly),? +")
PLEASE_YOU: Final = re.compile(r"(?:can|could|would|will) you (?:please|kindly) +")
PLEASE_AT_END: Final = re.compile(r", please([.!?]?)$")
THANKS: Final = re.compile(r"\? (?:[Tt]hanks|[Tt]hank you)(?: a lot| in advance| very much)?[.!]?$")

CAN_YOU: Final = re.compile(r"(?:can|could) you +")
CERTAIN_REQUEST: Final = re.compile(
    r"tell me (?:the|a|an|how|why|what|where|who|when|about|more) "
    r"|give me (?:(?!,)[^\W_]+ ){0,4}(?:recipe|recipes|example|examples|list|summary|overview|synonym"
    r"|synonyms|advice|idea|ideas|tip|tips|hint|explanation|definition|facts|outline)\b"
    r"|(?:explain|describe|define|list) (?:the|this|these|a|an|to me|how|why|what) "
    r"|(?:translate|summarize|rewrite|convert|fix) (?:this|these|the following)\b"
)
"""What is asked of the model after "can you". "Can you write Python?" asks for an ability."""
PURPOSEFUL_REQUEST: Final = re.compile(
    r"(?:suggest|recommend)(?: me)? (?:a|an|some|\d+) "
    r"|(?:write|draft|create)(?: me)? (?:a|an|some|\d+) .*\b(?:about|for|of|that|to|on)\b"
)


def _without_end(text: str, *, literal: bool) -> str:
    """The text without its last punctuation mark where the first word says the same."""
    if literal:
        first = _first_word(text).partition("'")[0]
        if first in INTERROGATIVES:
            return text.removesuffix("?").rstrip()
        return text.removesuffix(".") if first in REQUESTS and not LITERAL.search(text) else text
    words, marks = _split_end(text)
    return words if "?" not in marks or _starts_a_request(words) else f"{words}?"


def _of(words: frozenset[str]) -> str:
    return "|".join(sorted(words))


# Each regular expression is anchored or bounded, so that a long text costs no more than its length.
_ACTION = rf"(?:{_of(ACTIONS)})\b"
_NOT_VERB = (
    r"(?:(?!(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|not|that|if)\b)[^\W_]+)"
)
_NOUNS = rf"{_NOT_VERB}(?: {_NOT_VERB}){{0,4}}"
_SIDE = r"((?:(?:a|an|the) )?[^\W\d_]+(?: [^\W\d_]+)??)"
_ASKED = r"(?:tell me|explain to me|I(?: want| would like|'d like) to know)"
_CODE = r"(?:HTTP |status |error |exit |code )+\d+"
_TOOLS = r"\b(?:python|Python|git)\b"
_OBJECTS = r"(?:list|tuple|dictionary|dict|branch|branches|commit|commits|tag|tags)"
_TERM = r"\"?([^\W\d_]{2,})\"?"


def _sorted_sides(found: re.Match[str]) -> str:
    """Put "the difference between B and A" as "the difference between A and B"."""
    start, first, second = found.groups()
    if any(word in FUNCTION_WORDS for side in (first, second) for word in _content(side)):
        return found[0]
    return f"{start} {' and '.join(sorted((first, second)))}"


def _content(side: str) -> list[str]:
    words = side.split()
    return words[1:] if words[0] in {"a", "an", "the"} else words


def _of_term(name: str) -> Callable[[re.Match[str]], str]:
    """What makes ``name`` of one term out of a question for it; words with many meanings stay as they are."""

    def instead(found: re.Match[str]) -> str:
        term = found[1]
        # "What does Miller mean?" asks about a person.
        named = term[:1].isupper() and not term.isupper()
        return found[0] if named or term.lower() in UNDEFINABLE else f"{name} {term}"

    return instead


def _of_owner(found: re.Match[str]) -> str:
    """Put "France's capital" as "the capital of France"."""
    asked, owner, relation = found.groups()
    return found[0] if owner.lower() in FUNCTION_WORDS else f"{asked} the {relation} of {owner}"


def _of_maker(found: re.Match[str]) -> str:
    """Put "who is the author of Emma" as "who wrote Emma"."""
    return f"who {MAKERS[found[1]]} "


def _in_tool(found: re.Match[str]) -> str:
    """Put "how do I merge git branches" as "how do I merge branches in git"."""
    start, tool, thing, rest = found.groups()
    return f"{start}{thing}{rest} in {tool}"


_BETWEEN = r"(?:difference|differences|distance|similarities) between"
_MADE = r"discovered|invented|painted|composed|founded"
_AUXILIARY = r"is|are|was|were|do|does|did|has|have|had|will|would|could|should"
_SUBJECT = r"I|you|he|she|it|we|they|(?:my|your|his|her|our|their|the) [^\W\d_]+"
_LANGUAGES = _of(PROGRAMMING_LANGUAGES)
_RELATIONS = _of(RELATIONS)
_KINDS = _of(KINDS)
_SUPERLATIVES = _of(SUPERLATIVES)
_THINGS = _of(frozenset(THINGS))

FRAMES: Final[tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]] = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        # One word for what has two.
        (r"^is it (?:okay|ok) (?=to |if |for )", "is it OK "),
        (r"(?:(?<='s )|(?<=the ))capital city(?= of |$)", "capital"),
        # "What is X?", in other words.
        (r"^(what|who|where|why|how) (?:exactly|actually) (is|are|do|does)\b", r"\1 \2"),
        (rf"^{_ASKED} (what|who|where) ((?:a|an|the|my) {_NOUNS}) (is|are)$", r"\1 \3 \2"),
        (r"^tell me (the [a-z]+(?: [a-z]+)? of )", r"what is \1"),
        (rf"^((?:what|who) is) ((?:an? )?[^\W\d_]+)'s ({_RELATIONS})$", _of_owner),
        (rf"^(what is the (?:{_RELATIONS})) for ", r"\1 of "),
        (r"^what is the main idea behind ", "what is the main idea of "),
        (rf"^(?:which|what) ({_KINDS}) is the ({_SUPERLATIVES})\b", r"what is the \2 \1"),
        (rf"^(?:which|what) ({_KINDS}) (in [^\W\d_]+) is the ({_SUPERLATIVES})$", r"what is the \3 \1 \2"),
        (rf"^which ({_KINDS}) (is|are|was|were|do|does|did)\b", r"what \1 \2"),
        (r"^what currency does ([^\W\d_]+) use$", r"what is the currency of \1"),
        (r"^when is the (best|worst) time to\b", r"what is the \1 time to"),
        (r"^what do people use ([^\W\d_]+) for$", r"what is \1 used for"),
        (r"^what is the cause of ", "what causes "),
        (r"^what is another word for ", "what is a synonym for "),
        (rf"^what does (?:the word )?{_TERM} mean$", _of_term("meaning")),
        (rf"^what is the meaning of (?:the word )?{_TERM}$", _of_term("meaning")),
        (rf"^what does ({_CODE}) mean$", r"meaning \1"),
        (rf"^what is the meaning of ({_CODE})$", r"meaning \1"),
        (rf"^(?:define|what is the definition of) {_TERM}$", _of_term("definition")),
        (rf"^what is an? ({_THINGS})$", lambda found: f"what are {THINGS[found[1]]}"),
        # "Who made X?", in other words.
        (rf"^who (?:is|was) the ({_of(frozenset(MAKERS))}) of ", _of_maker),
        (
            rf"^(?:who|by whom) was ({_NOUNS}) (discovered|invented|painted|composed|founded) by$",
            r"who \2 \1",
        ),
        (rf"^by whom was ({_NOUNS}) (discovered|invented|painted|composed|founded)$", r"who \2 \1"),
        # "How do I do X?", in other words.
        (rf"^(?:(?:explain|describe|show me|tell me|teach me) )?how to (?={_ACTION})", "how do I "),
        (rf"^{_ASKED} how to (?={_ACTION})", "how do I "),
        (rf"^how (?:can I|can one|does one) (?={_ACTION})", "how do I "),
        (rf"^how can we (?={_ACTION})", "how do we "),
        (
            rf"^I (?:want|would like) to ({_ACTION}[^,.?!]*), how (?:do|can) I do (?:that|this|it)\??$",
            r"how do I \1",
        ),
        (rf"^(how do I .*) using ({_LANGUAGES})$", r"\1 in \2"),
        (rf"^(how do I .*) (?:in|on) ({_of(SYSTEMS)})$", r"\1 on \2"),
        (rf"^(how do I (?:(?!{_TOOLS}).)*)({_TOOLS}) ({_OBJECTS})\b((?:(?!{_TOOLS}).)*)$", _in_tool),
        (r"^how do I make (a|an|a new) (branch|tag|commit|folder|repository)\b", r"how do I create \1 \2"),
        # "How does X work?", in other words.
        (rf"^(?:explain|describe|{_ASKED}) how ({_NOUNS}) works$", r"how does \1 work"),
        (rf"^(?:explain|describe|{_ASKED}) how ({_NOUNS}) work$", r"how do \1 work"),
        (rf"^how does an? ({_THINGS}) work$", lambda found: f"how do {THINGS[found[1]]} work"),
        # "Why isn't X?", in other words.
        (
            rf"^why ({_AUXILIARY}) not ({_SUBJECT}) ",
            r"why \1 \2 not ",
        ),
        # Requests.
        (r"^(write|draft|give|suggest|recommend|tell) me (?=(?:a|an|some|\d+) )", r"\1 "),
        (r"^recommend\b(?= (?:a|an|some|\d+|[a-z]+s) )", "suggest"),
        # Both sides of these are equal in rank.
        (rf"\b({_BETWEEN}) {_SIDE} and {_SIDE}(?= (?:in|on|at) |$)", _sorted_sides),
        (rf"^(compare) {_SIDE} and {_SIDE}$", _sorted_sides),
    )
)
"""Frames of questions in the order in which they are looked for, and what they are replaced with."""
