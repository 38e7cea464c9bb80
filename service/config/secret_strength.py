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
import os
import re
import string
from collections.abc import Iterator, Mapping

MAX_CHARS = 64
"""Number of characters that are estimated."""

PIECE_CHARS = 16
"""Number of characters that zxcvbn gets at a time. Its time grows exponentially with the characters that may
stand for a letter, as $ for s: it takes 10 s for 64 of them, and 0.05 s for four pieces of 16."""

MIN_GUESSES_PER_CHAR = 0.78
"""Decimal orders of magnitude of the guesses, per character. zxcvbn gives 1 to a character that it sees no
pattern in."""

MAX_BITS_PER_PAIR = 4.4
"""Mean information of a pair of letters in text. English, French and German have 3.4 to 4.2, random letters
6.9 on average."""

MIN_PAIRS = 0.8
"""Minimum fraction of a text's pairs of characters that are pairs of letters; random base64 has a half."""

STRONG, GUESSABLE, FAILED = 0, 10, 11
"""What the child process's exit status says."""

CORPUS_WORDS = 8_000
WORD_START = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")


def is_guessable(secret: str) -> bool:
    """Whether a person could have thought of the secret; also where it is the hex or base64 form of text."""
    return any(_is_pattern(text[:MAX_CHARS]) or _is_text(text[:MAX_CHARS]) for text in _readings(secret))


@functools.cache
def is_guessable_apart(secret: str) -> bool:
    """``is_guessable`` in a child process, which takes zxcvbn's 12 MB of words with it when it ends.

    For a process that has no other threads yet. Where there can be no child, the answer is found here.
    """
    try:
        child = os.fork()
    except OSError:
        return is_guessable(secret)
    if not child:
        # Nothing but this may be run in the child, not even the handlers of an exception.
        status = FAILED
        try:
            status = GUESSABLE if is_guessable(secret) else STRONG
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status == GUESSABLE if status in {STRONG, GUESSABLE} else is_guessable(secret)


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
    # Imported here, as only a child process needs it.
    from zxcvbn import zxcvbn  # noqa: PLC0415 - as said

    pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
    guesses = sum(math.log10(zxcvbn(piece)["guesses"]) for piece in pieces)
    return guesses < MIN_GUESSES_PER_CHAR * len(text)


def _is_text(text: str) -> bool:
    """Whether the pairs of letters have the frequencies of text; what separates words is ignored."""
    characters = "".join(character for character in text if character.isalnum())
    # Text has an upper-case letter after a lower-case one where words are joined, and nowhere else.
    spaced = WORD_START.sub(" ", characters)
    pairs = [pair for first, second in itertools.pairwise(spaced) if " " not in (pair := first + second)]
    bits = [
        _pair_bits()[pair.lower()]
        for pair in pairs
        if pair.lower() in _pair_bits() and not (pair[0].islower() and pair[1].isupper())
    ]
    if not bits or len(bits) < MIN_PAIRS * len(pairs):
        return False
    return sum(bits) / len(bits) < MAX_BITS_PER_PAIR


@functools.cache
def _pair_bits() -> Mapping[str, float]:
    """The information of each pair of letters: of the second, where the first is known, in bits."""
    from zxcvbn.frequency_lists import FREQUENCY_LISTS  # noqa: PLC0415 - as in ``_is_pattern``

    letters = string.ascii_lowercase
    counts = {first + second: 1 for first in letters for second in letters}
    for corpus in ("english_wikipedia", "us_tv_and_film"):
        for word in FREQUENCY_LISTS[corpus][:CORPUS_WORDS]:
            for first, second in itertools.pairwise(word):
                if first + second in counts:
                    counts[first + second] += 1
    totals = {first: sum(counts[first + second] for second in letters) for first in letters}
    return {pair: -math.log2(count / totals[pair[0]]) for pair, count in counts.items()}
