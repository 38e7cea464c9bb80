"""Precision and recall on the labelled pairs, with and without guard: `python -m tests.semantic.curve`."""

from dataclasses import dataclass
from itertools import combinations

from service.cache.semantic import guard_of
from tests.semantic.pairs import Pair, pairs, questions, similarity, vectors

DEFAULT = 0.9
THRESHOLDS = (0.75, 0.8, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98)


@dataclass(frozen=True)
class Quality:
    """How a threshold does."""

    accepted: int
    wrong: int
    same: int

    @property
    def precision(self) -> float:
        """Right ones among the accepted."""
        return 1.0 if not self.accepted else (self.accepted - self.wrong) / self.accepted

    @property
    def recall(self) -> float:
        """Accepted ones among those that mean the same."""
        return (self.accepted - self.wrong) / self.same


def accepted(pair: Pair, threshold: float, *, guarded: bool = True) -> bool:
    """Whether the cache would answer the second question with the first one's answer."""
    if similarity(pair.first, pair.second) < threshold:
        return False
    return not guarded or guard_of(pair.first) == guard_of(pair.second)


def quality(threshold: float, *, guarded: bool = True, held_out: bool | None = None) -> Quality:
    """How a threshold does on the labelled pairs, or on one of the two files of them."""
    of = [pair for pair in pairs() if held_out in {None, pair.held_out}]
    taken = [pair for pair in of if accepted(pair, threshold, guarded=guarded)]
    return Quality(len(taken), sum(not pair.same for pair in taken), sum(pair.same for pair in of))


def strangers(threshold: float) -> list[tuple[str, str]]:
    """Of all questions of different rows, those that would be taken for the same."""
    family = {question: question for question in questions()}

    def root(question: str) -> str:
        while family[question] != question:
            question = family[question]
        return question

    for pair in pairs():
        if pair.same:
            family[root(pair.first)] = root(pair.second)
    guards = {question: guard_of(question) for question in questions()}
    known = vectors()
    return [
        (first, second)
        for first, second in combinations(questions(), 2)
        if guards[first] == guards[second]
        and float(known[first] @ known[second]) >= threshold
        and root(first) != root(second)
    ]


def main() -> None:
    """Print the table, and what goes wrong."""
    print("| threshold | pairs | precision | recall | without the guard: precision | recall |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    for held_out, name in ((False, "first"), (True, "held out"), (None, "all")):
        for threshold in THRESHOLDS:
            good = quality(threshold, held_out=held_out)
            bare = quality(threshold, guarded=False, held_out=held_out)
            print(  # noqa: T201
                f"| {threshold:.2f} | {name} | {good.precision:.3f} | {good.recall:.3f} "
                f"| {bare.precision:.3f} | {bare.recall:.3f} |"
            )
    for pair in pairs():
        if accepted(pair, DEFAULT) != pair.same:
            print("wrong" if not pair.same else "missed", pair)  # noqa: T201
    print("strangers", strangers(DEFAULT))  # noqa: T201


if __name__ == "__main__":
    main()
