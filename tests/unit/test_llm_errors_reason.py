"""What of an upstream's reason a caller may read: never the prompt, never what the upstream is made of."""

import random
import secrets
import string
from typing import Any

import pytest

from service.errors import BadRequestError
from service.upstream.errors import translate
from tests.unit.llm_answers import sdk_error, translated

GENERAL = "The model refused the request."
PIECE = 16

LITELLM_UNKNOWN = (
    "/chat/completions: Invalid model name passed in model=nope. "
    "Call `/v1/models` to view available models for your key."
)
LITELLM_NO_DEPLOYMENT = (
    "litellm.BadRequestError: You passed in model=nope. There are no healthy deployments for this model\n\n"
    "LiteLLM: model group 'nope' failed with the error above. No fallback was attempted."
)
OPENAI_UNKNOWN = "The model `nope` does not exist or you do not have access to it."


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize(
    "message", [LITELLM_UNKNOWN, LITELLM_NO_DEPLOYMENT, OPENAI_UNKNOWN, "model not found"]
)
def test_an_unknown_model_is_the_callers_and_is_named(status: int, message: str) -> None:
    error = translated(status, message, model="nope", known_model=False)
    assert isinstance(error, BadRequestError)
    assert error.message == "Model 'nope' not found"
    assert not error.retryable


def test_an_unknown_model_is_known_by_its_code_too() -> None:
    error = translated(404, "no", code="model_not_found", model="nope", known_model=False)
    assert error.message == "Model 'nope' not found"


def test_a_known_model_without_a_deployment_is_the_upstreams_failure() -> None:
    message = LITELLM_NO_DEPLOYMENT.replace("nope", "demo")
    error = translated(400, message, known_model=True)
    assert (error.name, error.status, error.retryable) == ("UpstreamError", 502, True)
    assert "no healthy deployment at the moment" in error.message


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("max_tokens is too large: 99", "max_tokens is too large: 99"),
        ("  max_tokens is too large\n\nmore that nobody needs", "max_tokens is too large"),
        ("litellm.BadRequestError: temperature must be at most 1", "temperature must be at most 1"),
        ("litellm.BadRequestError: OpenAIException - bad value", "bad value"),
        ("/chat/completions: bad value", "bad value"),
        ("litellm.ContextWindowExceededError: litellm.BadRequestError: too long", "too long"),
        ("ValueError: bad value", "bad value"),
    ],
)
def test_a_plain_reason_comes_through_cleaned(message: str, reason: str) -> None:
    messages = [{"role": "user", "content": "What is a trace?"}]
    assert translated(400, message, messages=messages).message == f"The model refused the request: {reason}"


def test_a_long_reason_is_cut() -> None:
    message = translated(400, " ".join(["word"] * 1_000)).message
    assert len(message) <= 300 + len(GENERAL) + 1


INSIDE = [
    "connect to http://10.1.2.3:8080/v1 failed",
    "see HTTPS://internal.example",
    "Traceback (most recent call last):",
    "in /usr/lib/python3/site-packages/x",
    "file main.py, line 3",
    "Incorrect API key provided",
    "bad api_key",
    "wrong api-key header",
    "Authorization: Bearer canary",
    "key sk-canary is not valid",
]


@pytest.mark.parametrize("inside", INSIDE)
def test_internals_never_appear(inside: str) -> None:
    for message in (inside, f"bad value: {inside} and so on", f"litellm.BadRequestError: {inside}"):
        assert translated(400, message).message == GENERAL


def test_a_traceback_below_the_first_line_never_appears() -> None:
    traceback = "bad value\nTraceback (most recent call last):\n  File /srv/canary.py"
    assert translated(400, traceback).message == "The model refused the request: bad value"


PROMPT = "my grandmother's maiden name is Quetzalcoatl"

PLACES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": PROMPT}],
    [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Hello there, machine"}],
    [{"role": "user", "content": "Hello there, machine"}, {"role": "assistant", "content": PROMPT}],
    [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "text", "text": PROMPT}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PROMPT}}]}],
    [{"role": "user", "name": PROMPT, "content": "Hello there, machine"}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": PROMPT}}]}],
]


@pytest.mark.parametrize("messages", PLACES)
@pytest.mark.parametrize(
    "echo",
    [
        PROMPT,
        f"cannot answer {PROMPT!r}",
        f"cannot answer {PROMPT[:20]}...",
        f"...{PROMPT[7:27]}... is too long",
        f"litellm.BadRequestError: refused: {PROMPT}",
        f"cannot parse {{'messages': [{{'content': '{PROMPT}'}}]}}",
    ],
)
def test_an_echo_of_any_part_of_the_messages_never_appears(messages: list[dict[str, Any]], echo: str) -> None:
    assert translated(400, echo, messages=messages).message == GENERAL


UNSUPPORTED = "Unsupported parameter: 'max_tokens' is not supported with this model."


@pytest.mark.parametrize(
    "more",
    [
        *(
            {"messages": [{"role": "user", "content": word}]}
            for word in ("hi", "a", "ok", "minimal", "model")
        ),
        {"messages": [{"role": "user", "content": "parameter"}]},
        {"messages": [{"role": "user", "content": "call get_context_window now"}]},
        {"tools": [{"type": "function", "function": {"name": "is not supported with this model"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": UNSUPPORTED}}]},
        {"messages": [{"role": "tool", "name": "not_supported_with_this_model", "content": "x"}]},
        {"reasoning_effort": UNSUPPORTED, "user": UNSUPPORTED, "metadata": {"a": UNSUPPORTED}},
    ],
)
def test_short_words_names_and_parameters_hide_no_reason(more: dict[str, Any]) -> None:
    request = {"model": "demo", "messages": [{"role": "user", "content": "x"}], **more}
    fields = {"message": UNSUPPORTED, "param": "max_tokens", "code": "unsupported_parameter"}
    error = translate(sdk_error(400, {"error": fields}), request, known_model=True)
    assert error.message == f"The model refused the request: {UNSUPPORTED}"
    assert (error.param, error.code) == ("max_tokens", "unsupported_parameter")


@pytest.mark.parametrize("field", ["prompt", "input", "instructions", "system"])
def test_an_echo_of_text_in_any_field_never_appears(field: str) -> None:
    error = sdk_error(400, {"error": {"message": f"cannot answer {PROMPT!r}"}})
    for text in (PROMPT, [PROMPT], [{"type": "text", "text": PROMPT}]):
        assert translate(error, {"model": "demo", field: text}, known_model=True).message == GENERAL


def test_a_code_and_a_field_of_openais_pass_whatever_the_prompt_says() -> None:
    words = "context_length_exceeded in messages[0].content and in response_format.json_schema.name"
    messages = [{"role": "user", "content": words}]
    for param in ("messages[0].content", "response_format.json_schema.name", "messages.0.tool_calls[3].id"):
        error = translated(400, "no", messages=messages, code="context_length_exceeded", param=param)
        assert (error.code, error.param) == ("context_length_exceeded", param)
    error = translated(
        400, "no", messages=[{"content": "a.secret_plan_of_mine"}], param="a.secret_plan_of_mine"
    )
    assert error.param is None


def test_a_text_that_is_nobodys_prompt_comes_through() -> None:
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": None}]
    error = translated(400, "temperature is out of range", messages=messages)
    assert error.message == "The model refused the request: temperature is out of range"


def test_a_models_own_key_in_a_message_never_appears() -> None:
    key = f"sk-{secrets.token_hex(16)}"
    assert key not in translated(400, f"the key {key} is out of quota").message


def _text(rng: random.Random, longest: int) -> str:
    alphabet = rng.choice(
        [string.ascii_letters + " ", string.printable, "абвгдежз ", "日本語テキスト", "ab", "🙂é'\"\\{}:\n"]
    )
    return "".join(rng.choices(alphabet, k=rng.randint(0, longest)))


def test_no_random_prompt_ever_leaks_a_piece() -> None:
    rng = random.Random(20_260_115)  # noqa: S311 - a repeatable run, nothing secret
    shown = 0
    for _ in range(3_000):
        texts = [_text(rng, 120) for _ in range(rng.randint(1, 4))]
        messages = [{"role": rng.choice(["system", "user"]), "content": text} for text in texts]
        echoed = rng.choice(texts)
        start = rng.randint(0, len(echoed))
        echoed = echoed[start : start + rng.randint(0, 80)]
        upstream = _text(rng, 330) + rng.choice(["", " ", ": '", "\n"]) + echoed + _text(rng, 60)
        message = translated(rng.choice([400, 422]), upstream, messages=messages).message
        reason = message.removeprefix(GENERAL.rstrip("."))
        shown += message != GENERAL
        for text in texts:
            leaked = [text[at : at + PIECE] for at in range(len(text) - PIECE + 1)]
            assert not any(piece in reason for piece in leaked), (upstream, texts)
    # Hiding everything would pass too.
    assert shown > 100
