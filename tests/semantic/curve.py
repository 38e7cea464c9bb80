"""Precision and recall on the labelled pairs, with and without guard: `python -m tests.semantic.curve`."""

from dataclasses import dataclass
from itertools import combinations

from service.cache.guard import guard_of
from tests.semantic.pairs import FILES, Pair, pairs, questions, similarity, vectors

DEFAULT = 0.9
THRESHOLDS = (-1.0, 0.75, 0.8, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98)


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


def quality(threshold: float, *, guarded: bool = True, file: str | None = None) -> Quality:
    """How a threshold does on the labelled pairs, or on one of the files of them.

    Args:
        threshold: The least similarity of a hit; with -1 the guard decides alone.
        guarded: Whether the guard is asked.
        file: One of the files; None for all.
    """
    of = [pair for pair in pairs() if file in {None, pair.file}]
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
    for file in (*FILES, None):
        for threshold in THRESHOLDS:
            good = quality(threshold, file=file)
            bare = quality(threshold, guarded=False, file=file)
            print(  # noqa: T201
                f"| {'none' if threshold < 0 else f'{threshold:.2f}'} | {file or 'all'} "
                f"| {good.precision:.3f} | {good.recall:.3f} | {bare.precision:.3f} | {bare.recall:.3f} |"
            )
    for pair in pairs():
        # Those held out are counted, not shown: the guard must not be changed with them in view.
        if pair.file != "held_out" and accepted(pair, DEFAULT) != pair.same:
            print("wrong" if not pair.same else "missed", pair)  # noqa: T201
    print("strangers", strangers(DEFAULT))  # noqa: T201


if __name__ == "__main__":
    main()
