"""What keeps two questions apart, and how well that goes on labelled pairs with a real model's vectors."""

import pytest

from service.cache.semantic import guard_of, language_of
from tests.harness import make_settings
from tests.semantic.curve import quality, strangers
from tests.semantic.pairs import pairs

DEFAULT = make_settings().cache_similarity


def test_the_default_threshold_is_precise_on_the_labelled_pairs() -> None:
    assert len(pairs()) >= 200
    found = quality(DEFAULT)

    assert found.precision >= 0.99
    assert found.recall >= 0.7


def test_the_pairs_that_were_held_out_are_no_worse() -> None:
    found = quality(DEFAULT, file="held_out")

    assert found.precision >= 0.99
    assert found.recall >= 0.5


def test_without_the_guard_no_threshold_would_do() -> None:
    assert quality(DEFAULT, guarded=False).precision < 0.8
    assert quality(0.98, guarded=False).precision < 0.95


def test_questions_of_different_pairs_are_not_taken_for_one_another() -> None:
    assert strangers(DEFAULT) == [("List 3 benefits of exercise.", "List three benefits of exercise.")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Is 5 more than 7?", "Is 7 more than 5?"),
        ("Do sharks eat whales?", "Do whales eat sharks?"),
        ("Flights from Rome to Oslo", "Flights from Oslo to Rome"),
        ("Is it safe?", "Is it unsafe?"),
        ("Use `a` there", "Use `b` there"),
        ("What is x_1?", "What is x_2?"),
        ("Pay $5", "Pay \u20ac5"),
        ("Say \u201cyes\u201d", "Say \u201cno\u201d"),
        ("Is a < b?", "Is a > b?"),
        ("What is 1,000 km?", "What is 1.000 km?"),
        ("", "What?"),
        ("Привет мир", "Hello world"),
    ],
)
def test_these_are_kept_apart(first: str, second: str) -> None:
    assert guard_of(first) != guard_of(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is the capital of France?", "what's france's capital"),
        ("How do I boil rice?", "Please tell me how to boil rice!"),
        ("List three fruits", "List 3 fruits"),
        ("Compare A and B", "Compare B and A"),
        ("What\u2019s a trace?", "What's a trace?"),
    ],
)
def test_these_are_compared(first: str, second: str) -> None:
    assert guard_of(first) == guard_of(second)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital?", "en"),
        ("Wie setze ich das Passwort zurück?", "de"),
        ("Quelle est la capitale de la France", "fr"),
        ("Что это", "CYRILLIC"),
        ("12345", ""),
        ("hello", "en"),
    ],
)
def test_a_text_has_a_language(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_guard_says_nothing_of_the_text() -> None:
    assert len(guard_of("secret")) == 64
    assert "secret" not in guard_of("secret")
