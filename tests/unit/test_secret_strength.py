"""Signing keys that people think of are refused, and keys from a random generator are accepted."""

import base64
import secrets
import subprocess
import sys
import time
from collections.abc import Callable

import argon2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config.env_validator import JWT_PROBLEM
from service.config.secret_strength import MAX_CHARS, PIECE_CHARS, is_guessable
from tests.unit.conftest import Read

GUESSABLE = "it consists of words or patterns that can be guessed"


@pytest.mark.parametrize(
    "value",
    [
        "your-secure-random-key-at-least-32-characters-long",
        "jwt-secret-key-minimum-32-characters-long",
        "insert-your-key-here-and-make-it-a-long-one",
        "insert_your_key_here_0123456789abcdef",
        "abcdefghijklmnopqrstuvwxyz123456",
        "0123456789abcdefghijklmnopqrstuvwxyz",
        "qwertyuiopasdfghjklzxcvbnm1234567890",
        "1q2w3e4r5t6y7u8i9o0p1q2w3e4r5t6z",
        "aaaaaaaabbbbbbbbccccccccddddddddeeeeeeeeffffffffgggggggghhhhhhhh",
        "correct-horse-battery-staple-and-more-words",
        "To be or not to be, that is the question",
        "MyCompanyName2024SecretKeyForProduction!",
        "supercalifragilisticexpialidocious",
        "Lorem ipsum dolor sit amet consectetur adipiscing",
        "Die Wuerde des Menschen ist unantastbar",
        "ceci-est-une-cle-secrete-tres-longue",
        "nobody reads this to its end because it goes on and on, longer than what is estimated",
    ],
)
def test_what_a_person_thinks_of_is_refused_with_its_reason(read: Read, value: str) -> None:
    (error,) = read(JWT_SECRET_KEY=value).errors
    assert error == f"{JWT_PROBLEM}: {GUESSABLE}. Make one with: openssl rand -hex 32"


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.b16encode])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_encoding_of_text_is_refused(read: Read, encode: Callable[[bytes], bytes], end: bytes) -> None:
    value = encode(b"the secret that nobody shall know" + end).decode()
    assert read(JWT_SECRET_KEY=value).errors[0].startswith(f"{JWT_PROBLEM}: {GUESSABLE}.")
    assert read(JWT_SECRET_KEY=value.rstrip("=")).errors[0].startswith(f"{JWT_PROBLEM}: {GUESSABLE}.")


ENCODINGS: tuple[Callable[[bytes], str], ...] = (
    bytes.hex,
    lambda data: data.hex().upper(),
    lambda data: base64.b64encode(data).decode(),
    lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
    lambda data: base64.b32encode(data).decode(),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(24, 96), st.sampled_from(ENCODINGS))
def test_random_bytes_are_accepted_in_every_encoding(size: int, encode: Callable[[bytes], str]) -> None:
    # The bytes are not Hypothesis's: those are not random, and include every pattern.
    secret = encode(secrets.token_bytes(size))
    assert not is_guessable(secret), secret


@settings(max_examples=50, deadline=None)
@given(st.sampled_from((secrets.token_hex, secrets.token_urlsafe)))
def test_the_shortest_random_secrets_are_accepted(make: Callable[[int], str]) -> None:
    secret = make(24)[:32]
    assert not is_guessable(secret), secret


@pytest.mark.parametrize("costly", ["a1" * 500_000, "4@8({[<369&#!1/|0$5+7%2" * 40])
@pytest.mark.alone
def test_a_costly_secret_takes_no_more_time_than_its_beginning(costly: str) -> None:
    """Zxcvbn's own time for the first is minutes, for the second it has no end."""

    def seconds(secret: str) -> float:
        started = time.process_time()
        is_guessable(secret)
        return time.process_time() - started

    piece = min(seconds(costly[:PIECE_CHARS]) for _ in range(3))
    assert seconds(costly) < 20 * MAX_CHARS / PIECE_CHARS * piece + 1


def test_equal_passwords_are_refused(read: Read, cheap_hash: Callable[[str], str]) -> None:
    password, other = secrets.token_hex(8), secrets.token_hex(8)
    hashed = cheap_hash(password)
    for admin, user in ((password, password), (hashed, password), (password, hashed), (hashed, hashed)):
        report = read(AUTH_ADMIN_PASSWORD=admin, AUTH_USER_PASSWORD=user)
        (error,) = report.errors
        assert error.startswith("AUTH_USER_PASSWORD must be different from AUTH_ADMIN_PASSWORD")
        assert password not in error
        assert report.settings is None
    for admin, user in ((password, other), (hashed, other), (other, hashed), (hashed, cheap_hash(other))):
        assert read(AUTH_ADMIN_PASSWORD=admin, AUTH_USER_PASSWORD=user).errors == ()


def test_a_hash_that_needs_more_memory_than_there_is_does_not_stop_the_check(read: Read) -> None:
    parameters = "m=4294967295,t=1,p=1"
    hashed = argon2.PasswordHasher(1, 8, 1).hash("x").replace("m=8,t=1,p=1", parameters)
    assert read(AUTH_ADMIN_PASSWORD=hashed).errors == ()


def test_a_child_process_finds_the_same_and_takes_the_words_with_it() -> None:
    strong, words = secrets.token_hex(32), "correct horse battery staple and some more"
    program = (
        "import sys\n"
        "from service.config.secret_strength import is_guessable_apart\n"
        f"found = [is_guessable_apart(secret) for secret in ({strong!r}, {words!r})]\n"
        "print(found, 'zxcvbn' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[0] == "[False, True] False", ran
