"""The labelled pairs of questions, the recorded vectors, and what the cache would make of both."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
FILES = ("pairs", "hard", "held_out")
"""``pairs`` are plain questions. ``hard`` and ``held_out`` are one list, written to break the guard and
divided by chance before the guard was changed: with the first half in view, and measured on the second."""

VECTORS = FOLDER / "vectors.npz"


@dataclass(frozen=True)
class Pair:
    """Two questions, and whether one's answer would do for the other."""

    same: bool
    file: str
    kind: str
    first: str
    second: str


@cache
def pairs() -> tuple[Pair, ...]:
    """All pairs, as written down."""
    return tuple(
        Pair(label == "same", name, kind, first, second)
        for name in FILES
        for line in (FOLDER / f"{name}.tsv").read_text().splitlines()
        for label, kind, first, second in [line.split("\t")]
    )


@cache
def questions() -> list[str]:
    """Each question once, in the order of the files."""
    return list(dict.fromkeys(question for pair in pairs() for question in (pair.first, pair.second)))


@cache
def vectors() -> dict[str, Any]:
    """Each question's vector, as the model gave it, of length 1."""
    kept = np.load(VECTORS)["vectors"].astype(np.float32)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    return dict(zip(questions(), kept, strict=True))


def similarity(first: str, second: str) -> float:
    """The cosine of two questions."""
    return float(vectors()[first] @ vectors()[second])
