"""What a secret must be: set, not published anywhere, long, and not one pattern repeated."""

import re
from collections.abc import Iterator

import argon2
from pydantic import SecretStr

JWT_PROBLEM = "JWT_SECRET_KEY must be set and different from default"
MIN_SECRET_BYTES = 32
MIN_SECRET_DISTINCT = 8
MIN_PASSWORD_CHARS = 8

PUBLISHED_SECRETS = frozenset(
    {
        # FastAPI's security tutorial, jwt.io's front page, and the literals of widely copied examples.
        "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
        "a-string-secret-at-least-256-bits-long",
        "your-256-bit-secret",
        "django-insecure-key",
        "super-secret-jwt-token-with-at-least-32-characters-long",
        "thisisasecretkeythatshouldbechanged",
    }
)
PLACEHOLDER = re.compile(
    r"change(me|this|it|in|before)|replace(me|this|with|in)|your(super|own|jwt|very|app)?secret|placeholder|"
    r"(my|super|default)secret|^todo|insecure|donotuse|notforproduction|^<.*>$"
)
PUBLISHED_PASSWORDS = frozenset(
    {
        "admin",
        "admin123",
        "administrator",
        "adminadmin",
        "adminpass",
        "adminpassword",
        "default",
        "letmein",
        "letmein123",
        "password",
        "password1",
        "password123",
        "passw0rd",
        "p@ssw0rd",
        "qwerty",
        "qwerty123",
        "qwertyuiop",
        "root",
        "secret",
        "secret123",
        "secretpassword",
        "test",
        "test1234",
        "testtest",
        "user",
        "user123",
        "userpass",
        "userpassword",
        "useruser",
        "welcome",
        "welcome1",
        "12345678",
        "123456789",
        "1234567890",
    }
)
HASH = re.compile(r"\$argon2(id|i|d)\$v=\d+\$m=\d+,t=\d+,p=\d+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+")
HASH_SIZES = frozenset({16, 20, 24, 32, 48, 64})
EATEN_HASH = re.compile(r"=\d+=\d+,t=\d+,p=\d+")
"""What a shell, or compose, leaves of an argon2 hash in double quotes."""


def is_utf8(text: str) -> bool:
    """Whether the text can be encoded; bytes of the environment that are no UTF-8 come as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def secret_problems(secret: SecretStr) -> Iterator[tuple[str, str]]:
    """Each problem of the signing secret, as the variable's name and a sentence."""
    value = secret.get_secret_value()
    how = "Make one with: openssl rand -hex 32"
    reason = ""
    if not is_utf8(value):
        return
    if not value.strip() or value.strip().lower() in PUBLISHED_SECRETS or PLACEHOLDER.search(_plain(value)):
        yield "JWT_SECRET_KEY", JWT_PROBLEM
        return
    if (size := len(value.encode())) < MIN_SECRET_BYTES:
        reason = f"it is {size} bytes long and needs at least {MIN_SECRET_BYTES}"
    elif _repeats(value) or len(set(value)) < MIN_SECRET_DISTINCT:
        reason = "it repeats one pattern"
    if reason:
        yield "JWT_SECRET_KEY", f"{JWT_PROBLEM}: {reason}. {how}"


def _plain(value: str) -> str:
    return re.sub(r"[-_ .]", "", value.lower())


def _repeats(value: str) -> bool:
    """Whether the value is one shorter piece, written at least twice (the last time perhaps cut short)."""
    return any(
        value == (value[:size] * (len(value) // size + 1))[: len(value)]
        for size in range(1, len(value) // 2 + 1)
    )


def _is_hash(value: str) -> bool:
    """Whether it is a whole argon2 hash; a tag of an odd length is one that was cut short."""
    try:
        parameters = argon2.extract_parameters(value)
    except argon2.exceptions.InvalidHashError:
        return False
    return bool(HASH.fullmatch(value)) and parameters.hash_len in HASH_SIZES


def password_problems(name: str, secret: SecretStr) -> Iterator[tuple[str, str]]:
    """Each problem of a password, as the variable's name and a sentence."""
    value = secret.get_secret_value()
    if EATEN_HASH.match(value):
        yield name, f"{name} is an argon2 hash without its $ parts. Put it in single quotes in a shell."
    elif not value.strip():
        yield name, f"{name} must be set: a password of your own, or its argon2 hash."
    elif value.startswith("$argon2"):
        if not _is_hash(value):
            yield name, f"{name} starts like an argon2 hash and is none. Put it in single quotes in a shell."
    elif value.strip().lower() in PUBLISHED_PASSWORDS or PLACEHOLDER.search(_plain(value)):
        yield name, f"{name} must be different from published defaults: choose a password of your own."
    elif len(value) < MIN_PASSWORD_CHARS:
        yield name, f"{name} is too short: it needs at least {MIN_PASSWORD_CHARS} characters."
