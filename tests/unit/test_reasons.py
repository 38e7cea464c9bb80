"""Which reasons of an upstream are shown: those without secrets, internals, or pieces of the prompt."""

import base64
import json
import random
import secrets
import string
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.upstream.reasons import ECHO_CHARS, CallersText, plain_name, reason_of

HELD_BACK = "The model refused the request."
NOTHING = CallersText({})
BASE62 = string.ascii_letters + string.digits


def chosen(alphabet: str, number: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(number))


def encoded(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def made_up_secrets() -> dict[str, str]:
    """What looks like a secret of each kind; none has ever been one."""
    hexadecimal = string.digits + "abcdef"
    capitals = string.ascii_uppercase + "234567"
    return {
        "aws": "AK" + "IA" + chosen(capitals, 16),
        "aws temporary": "AS" + "IA" + chosen(capitals, 16),
        "github": "gh" + "p_" + chosen(BASE62, 36),
        "github fine-grained": "github" + "_pat_" + chosen(BASE62, 22) + "_" + chosen(BASE62, 59),
        "gitlab": "gl" + "pat-" + chosen(BASE62, 20),
        "jwt": f"{encoded({'alg': 'HS256'})}.{encoded({'sub': 'x'})}.{chosen(BASE62, 43)}",
        "openai": "s" + "k-" + chosen(BASE62, 20) + "T3Blbk" + "FJ" + chosen(BASE62, 20),
        "openai project": "s" + "k-proj-" + chosen(BASE62, 40),
        "anthropic": "s" + "k-ant-api03-" + chosen(BASE62, 90),
        "google": "AI" + "za" + chosen(BASE62, 35),
        "hugging face": "h" + "f_" + chosen(string.ascii_letters, 34),
        "slack": "xo" + "xb-" + chosen(string.digits, 12) + "-" + chosen(BASE62, 24),
        "stripe": "s" + "k_live_" + chosen(BASE62, 24),
        "sendgrid": "S" + "G." + chosen(BASE62, 22) + "." + chosen(BASE62, 43),
        "twilio": "A" + "C" + chosen(hexadecimal, 32),
        "mailchimp": chosen(hexadecimal, 32) + "-us" + "12",
        "telegram": chosen("123456789", 9) + ":" + chosen(BASE62, 35),
        "npm": "np" + "m_" + chosen(BASE62, 36),
        "pypi": "py" + "pi-AgEIcHlwaS5vcmc" + chosen(BASE62, 80),
        "private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
        "basic auth": "http" + f"://user:{chosen(BASE62, 12)}@proxy",
        "azure storage": "Account" + "Key=" + chosen(BASE62, 86) + "==",
        "of no known kind": chosen(hexadecimal, 64),
        "base64": base64.b64encode(secrets.token_bytes(48)).decode(),
    }


@pytest.mark.parametrize("kind", made_up_secrets())
def test_a_secret_is_never_shown(kind: str) -> None:
    for _ in range(20):
        secret = made_up_secrets()[kind]
        for reason in (secret, f"bad value: {secret} is refused", f"the value '{secret}'", f"x={secret}, y"):
            assert reason_of(reason, NOTHING) == HELD_BACK, reason


@pytest.mark.parametrize("cut", range(2, 20))
def test_a_secret_at_the_end_of_what_is_shown_is_not_shown_in_part(cut: int) -> None:
    secret = made_up_secrets()["aws"]
    assert secret[:cut] not in reason_of(("word " * 60)[: 300 - cut] + secret, NOTHING)


@pytest.mark.parametrize(
    "inside",
    [
        "see https://example.com/x",
        "no answer from db-07.prod.internal",
        "no answer from api.openai.com",
        "no answer from gateway.corp",
        "no answer from qdrant:6333",
        "no answer from ip-10-0-3-17",
        "no answer from 10.1.2.3",
        "no answer from fe80::1ff:fe23:4567:890a",
        "no answer from ::1",
        "no answer from [2001:db8::8a2e:370:7334]",
        "device 00:1a:2b:3c:4d:5e failed",
        "ask jane.doe@example.org",
        "ask root@localhost",
        "cannot open /etc/passwd",
        "cannot open /srv/app/x.bin",
        "cannot open '/tmp'",
        "cannot open ~/models",
        "cannot open C:\\models",
        "cannot open \\\\share\\models",
        'File "x", line 3, in run',
        "at com.acme.Server.run(Server.java)",
        "at handler (index.js)",
        "Traceback (most recent call last)",
        "object at 0x7f00",
        "role arn:aws:iam::1:x",
        "the password: hunter2",
    ],
)
def test_what_the_models_side_is_made_of_is_never_shown(inside: str) -> None:
    for reason in (inside, f"bad value: {inside} and so on", f"'{inside}'"):
        assert reason_of(reason, NOTHING) == HELD_BACK


@pytest.mark.parametrize(
    "reason",
    [
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens.",
        "Invalid value: 'foo'. Supported values are: 'low', 'medium'",
        "Invalid value: 'foo'. Supported values are: 'low', 'medium', and 'high'.",
        "max_tokens is too large: 100000",
        "max_tokens is too large: 100000. This model supports at most 16384 completion tokens.",
        "The model gpt-4o-mini-2024-07-18 does not support this.",
        "meta-llama/Llama-3.1-8B does not support tools",
        "anthropic.claude-3-5-sonnet-20241022-v2:0 does not support tools",
        "accounts/fireworks/models/llama-v3p1-405b-instruct does not support tools",
        "mistralai/Mixtral-8x7B-Instruct-v0.1 does not support tools",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B does not support tools",
        "Invalid 'tools[0].function.name': string does not match pattern '^[a-zA-Z0-9_-]+$'.",
        "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
        "Invalid type for 'messages[1].content[0].text': expected a string, but got an integer instead.",
        "messages.1.content: Field required",
        "tools.0.function.name: Field required",
        "temperature: Input should be less than or equal to 1 (e.g. 0.7), i.e. at most 1.0",
        "This model is only supported in v1/responses and not in v1/chat/completions.",
        "Expecting value: line 1 column 1 (char 0)",
        "stream_options can only be defined when stream=true, image/png and/or application/json",
        "'response_format.json_schema.name' is missing at 12:30:45",
    ],
)
def test_an_ordinary_reason_is_shown_unchanged(reason: str) -> None:
    asked = {
        "model": "meta-llama/Llama-3.1-8B",
        "reasoning_effort": "foo",
        "messages": [{"role": "user", "content": "What is a trace, and what is a span?"}],
    }
    assert reason_of(reason, CallersText(asked)) == f"The model refused the request: {reason}"


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        ("messages[0].content", True),
        ("context_length_exceeded", True),
        ("tools[0].function.name", True),
        ("not a name", False),
        ("db.prod.internal", False),
        (5, False),
    ],
)
def test_a_name_or_code_is_shown_if_it_is_one(given_name: object, *, shown: bool) -> None:
    assert plain_name(given_name, NOTHING) == (given_name if shown else None)


def lowered(text: str) -> str:
    """Small letters in ASCII, and one kind of white space."""
    return "".join(" " if char in "\t\n\r\v\f" else char.lower() if char.isascii() else char for char in text)


def echoes_plainly(said: str, texts: list[str]) -> bool:
    """The obvious test for an echo: every run of a text against every place of what is said."""
    said = lowered(said)
    return any(
        text[at : at + ECHO_CHARS] in said
        for text in map(lowered, texts)
        for at in range(len(text) - ECHO_CHARS + 1)
    )


FEW = st.text(alphabet="aAé \t日", min_size=0, max_size=60)


@given(FEW, FEW, FEW, st.integers(0, 60), st.integers(0, 60))
@example("x" * 15, "a", "", 0, 60)
@example("0123456789abcdef", "", "", 0, 60)
def test_an_echo_is_seen_wherever_it_begins(
    text: str, before: str, after: str, start: int, size: int
) -> None:
    said = before + text[start : start + size] + after
    texts = [text, "another text of the caller"]
    asked = {"messages": [{"role": "user", "content": content} for content in texts]}
    assert CallersText(asked).is_echoed_in(said) == echoes_plainly(said, texts)


WAYS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "JSON": json.dumps,
    "JSON in JSON": lambda text: json.dumps(json.dumps(text)),
    "JSON with escaped slashes": lambda text: json.dumps(text).replace("/", "\\/"),
    "Python": repr,
    "ASCII": ascii,
    "HTML": lambda text: text.replace("&", "&amp;").replace("<", "&lt;").replace("é", "&#233;"),
    "URL": lambda text: "%" + text.encode().hex("%").upper(),
    "capitals": lambda text: "".join(char.upper() if char.isascii() else char for char in text),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "prompt",
    [
        "plain words that say something",
        'quoted "words" & <more> of that/this',
        "crème brûlée à la carte était",
        "日本語のテキストがここにありますので読んで",
        "emoji 🙂🙂🙂🙂🙂🙂 all the way 🙂🙂🙂",
        "C:\\new\\table\\uabcd and \\x41 more of it",
    ],
)
def test_an_echo_is_seen_however_it_is_written(prompt: str, way: str) -> None:
    asked = {"messages": [{"role": "user", "content": f"Tell me: {prompt} Now."}]}
    assert CallersText(asked).is_echoed_in(f"refused: {WAYS[way](prompt)}")


MANY: dict[str, Any] = {
    "209,000 texts": ["é"] * 209_000,
    "one text": "é" * 500_000,
    "random": "".join(random.Random(5).choices(string.ascii_letters + " ", k=1_000_000)),  # noqa: S311
    "lists": [[]] * 333_000,
    "objects": [{}] * 333_000,
    "short texts": [format(number, "x") for number in range(49_000)],
    "pieces of the reason": ("supporte" + "values a") * 62_500,
    "keys": [{str(number): "a" for number in range(45_000)}],
}


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.alone
def test_no_request_makes_a_reason_expensive(kind: str) -> None:
    asked = {"messages": MANY[kind]}
    reason = ("Invalid value: 'foo'. Supported values are: 'low', 'medium', é, and what else there is. " * 4)[
        :300
    ]
    reason_of(reason, NOTHING)
    # What a plain pass over a text of 1 MB takes, a letter at a time.
    started_s = time.thread_time()
    for letter in "a" * 1_000_000:
        letter.isalnum()
    pass_s = time.thread_time() - started_s

    taken_s = []
    for _ in range(3):
        started_s = time.thread_time()
        reason_of(reason, CallersText(asked))
        taken_s.append(time.thread_time() - started_s)
    assert min(taken_s) < 3 * pass_s
