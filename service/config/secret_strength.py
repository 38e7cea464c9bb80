"""Estimates whether a signing key was generated at random, or made up by a person.

A key from a random generator is as long as it is strong. One that a person made up consists of words, dates,
rows of keys and repetitions: zxcvbn finds those, and estimates the guesses that they take. It knows common
English words and names only; text in another language, and rare words, show in the frequencies of their pairs
of letters, which come from the same word lists.
"""

import base64
import binascii
import functools
import itertools
import math
import string
from collections.abc import Iterator, Mapping

from zxcvbn import zxcvbn
from zxcvbn.frequency_lists import FREQUENCY_LISTS

MAX_CHARS = 64
"""Number of characters that are estimated. zxcvbn takes 60 ms for them, and quadratically more for more."""

MIN_GUESSES_PER_CHAR = 0.78
"""Decimal orders of magnitude of the guesses, per character. zxcvbn gives 1 to a character that it sees no
pattern in."""

MAX_BITS_PER_PAIR = 4.4
"""Mean information of a pair of letters in text. English, French and German have 3.4 to 4.2, random letters
6.9 on average."""

MIN_PAIRS = 0.75
"""Minimum fraction of a text's pairs of characters that are pairs of letters; random base64 has a half."""

CORPUS_WORDS = 8_000


def is_guessable(secret: str) -> bool:
    """Whether a person could have thought of the secret; also where it is the hex or base64 form of text."""
    return any(_is_pattern(text[:MAX_CHARS]) or _is_text(text[:MAX_CHARS]) for text in _readings(secret))


def _readings(secret: str) -> Iterator[str]:
    """Yield the secret, and the text that it encodes if it encodes text."""
    yield secret
    padded = secret.rstrip("=") + "=" * (-len(secret.rstrip("=")) % 4)
    for decode, encoded in ((binascii.unhexlify, secret), (base64.urlsafe_b64decode, padded)):
        try:
            text = decode(encoded.translate(str.maketrans("+/", "-_"))).decode("ascii").rstrip()
        except ValueError:
            continue
        if text.isprintable() and text:
            yield text


def _is_pattern(text: str) -> bool:
    guesses = zxcvbn(text, max_length=MAX_CHARS)["guesses"]
    return math.log10(guesses) < MIN_GUESSES_PER_CHAR * len(text)


def _is_text(text: str) -> bool:
    """Whether the pairs of letters have the frequencies of text; what separates words is ignored."""
    characters = [character for character in text if character.isalnum()]
    # Text has an upper-case letter after a lower-case one where words are joined, and rarely otherwise.
    pairs = [
        (first + second).lower()
        for first, second in itertools.pairwise(characters)
        if not (first.islower() and second.isupper())
    ]
    bits = [_pair_bits()[pair] for pair in pairs if pair in _pair_bits()]
    if len(bits) < MIN_PAIRS * (len(characters) - 1) or not bits:
        return False
    return sum(bits) / len(bits) < MAX_BITS_PER_PAIR


@functools.cache
def _pair_bits() -> Mapping[str, float]:
    """The information of each pair of letters: of the second, where the first is known, in bits."""
    letters = string.ascii_lowercase
    counts = {first + second: 1 for first in letters for second in letters}
    for corpus in ("english_wikipedia", "us_tv_and_film"):
        for word in FREQUENCY_LISTS[corpus][:CORPUS_WORDS]:
            for first, second in itertools.pairwise(word):
                if first + second in counts:
                    counts[first + second] += 1
    totals = {first: sum(counts[first + second] for second in letters) for first in letters}
    return {pair: -math.log2(count / totals[pair[0]]) for pair, count in counts.items()}
