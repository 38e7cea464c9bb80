"""The words that may differ between two questions that mean the same, and those that count as one."""

from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _classes(text: str) -> dict[str, str]:
    """Each word after a colon, by the name before it."""
    lines = (line.split(":") for line in text.strip().splitlines())
    return {word: name for name, words in lines for word in words.split()}


TURNING: Final = _words("of in on at for about using via within behind")
"""Between two things these may be turned round: the symptoms of the flu are flu symptoms."""

HARMLESS: Final = _words("""
a an the this that these those it its with through as
and is are am be do does what what's whats which who whom whose when where why how
i i'm i'd me my mine we us our you your they them their one there there's here
can could would will please kindly hi hello hey thanks thank ok
explain describe tell show give provide define definition meaning mean means meant called
way ways exactly actually really just basically
term terms concept idea purpose role use used work works working look like
another person people someone somebody to
""")
"""Left out before two questions are compared. Whatever word is not here, and is in one of them only, keeps
them apart: a list of the words that matter would never be complete."""

SAME: Final = _classes("""
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
"""Spellings and words for the same thing."""

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
"""How questions are dressed: taken off before they are compared."""

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
"""A few of each language's commonest words."""
