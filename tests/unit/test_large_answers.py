"""A large answer is read as a small one is, in less time."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.errors import RateLimitError, UpstreamError
from service.upstream.large_answers import LARGE_BYTES
from service.upstream.messages import LlmRequest, Reply, read_answer, read_models
from service.upstream.operations import OperationName

# White space after the value belongs to JSON, and makes every answer a large one.
PADDING = b" " * LARGE_BYTES

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def often(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return usual | usual | usual | ANYTHING


MESSAGE = st.fixed_dictionaries(
    {}, optional={"content": often(st.text()), "refusal": often(st.none()), "tool_calls": ANYTHING}
)
CHOICE = st.fixed_dictionaries(
    {}, optional={"message": often(MESSAGE), "finish_reason": often(st.sampled_from(["stop", "length"]))}
)
COUNTS = st.dictionaries(
    st.sampled_from(["prompt_tokens", "completion_tokens", "total_tokens", "cost"]), often(st.integers(0, 99))
)
ANSWERS = st.fixed_dictionaries(
    {},
    optional={
        "id": often(st.text()),
        "model": often(st.text()),
        "usage": often(COUNTS),
        "data": often(st.lists(ANYTHING, max_size=2)),
        "choices": often(st.lists(often(CHOICE), max_size=3)),
        "error": st.none() | st.text() | st.dictionaries(st.just("message"), st.text()),
        "object": st.sampled_from(["chat.completion", "error"]),
        "other": ANYTHING,
    },
)


def outcome(content: bytes, operation: OperationName, *, verbatim: bool) -> Reply | str:
    """What comes of reading it; its bytes aside, which differ."""
    request = LlmRequest(operation, "asked", {}, b"", verbatim=verbatim)
    try:
        return Reply(b"", read_answer(content, {}, request, known_model=True).completion)
    except UpstreamError as error:
        return error.label


def saying(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}]}


@given(
    answer=ANSWERS,
    ascii_only=st.booleans(),
    operation=st.sampled_from(["chat", "embeddings"]),
    verbatim=st.booleans(),
)
@example(answer=saying("\ud83d cut"), ascii_only=True, operation="chat", verbatim=False)
@example(answer=saying("\\ud83d \ud83d\ude00 \udc00"), ascii_only=True, operation="chat", verbatim=False)
def test_a_large_answer_says_what_a_small_one_says(
    *, answer: dict[str, Any], ascii_only: bool, operation: OperationName, verbatim: bool
) -> None:
    content = json.dumps(answer, ensure_ascii=ascii_only).encode("utf-8", "replace")
    small = outcome(content, operation, verbatim=verbatim)
    assert outcome(content + PADDING, operation, verbatim=verbatim) == small


def test_a_byte_order_mark_is_not_a_part_of_it() -> None:
    content = json.dumps(saying("x")).encode("utf-8-sig")
    small = outcome(content, "chat", verbatim=False)
    assert isinstance(small, Reply)
    assert outcome(content + PADDING, "chat", verbatim=False) == small


def test_a_large_error_is_one() -> None:
    content = json.dumps({**saying("x"), "error": {"code": 429, "message": "x" * 1_000}}).encode() + PADDING
    with pytest.raises(RateLimitError):
        read_answer(content, {}, LlmRequest("chat", "asked", {}, b""), known_model=True)


WHOLE = json.dumps({"model": "é", "data": [[1.5, -2e3], "x\\y", None, True]}, ensure_ascii=False).encode()


@given(st.integers(0, len(WHOLE)), st.integers(0, 5), st.binary(max_size=3))
@example(0, 0, b"[")
@example(len(WHOLE), 0, b"x")
def test_what_is_no_json_is_no_answer_however_large(at: int, cut: int, put: bytes) -> None:
    content = WHOLE[:at] + put + WHOLE[at + cut :]
    small = outcome(content, "embeddings", verbatim=True)
    assert outcome(content + PADDING, "embeddings", verbatim=True) == small


def test_a_nested_answer_is_refused() -> None:
    content = b'{"data":' + b"[" * LARGE_BYTES + b"]" * LARGE_BYTES + b"}"
    assert outcome(content, "embeddings", verbatim=True) == "Invalid answer"


@pytest.mark.alone
def test_only_what_is_needed_becomes_objects() -> None:
    content = json.dumps({"model": "m", "data": [[0.1234567] * 1_000] * 500}).encode()

    def fastest_s(read: Any) -> float:
        taken = []
        for _ in range(3):
            started_s = time.thread_time()
            read()
            taken.append(time.thread_time() - started_s)
        return min(taken)

    request = LlmRequest("embeddings", "asked", {}, b"")
    whole_s = fastest_s(lambda: json.loads(content))
    assert fastest_s(lambda: read_answer(content, {}, request, known_model=True)) < whole_s / 3


def test_a_list_of_models_has_a_limit() -> None:
    listed = json.dumps({"data": [{"id": "x" * 1_000}] * 2_200}).encode()
    with pytest.raises(UpstreamError) as caught:
        read_models(listed)
    assert caught.value.label == "Answer too large"
