"""How much a JSON body may hold: values are counted before they are parsed, and texts count as one each."""

import json
import time

import pytest

from service.errors import ValidationError
from service.routers.bodies import MAX_DEPTH, MAX_INPUT_VALUES, MAX_VALUES, read_json


def listed(unit: bytes, number: int) -> bytes:
    return b"[" + b",".join([unit] * number) + b"]"


@pytest.mark.parametrize(
    ("unit", "values"),
    [(b"1", 1), (b"null", 1), (b'""', 1), (b"-0.5e-7", 1), (b"[1]", 2), (b'{"a":1,"b":2}', 3)],
)
def test_values_are_limited(unit: bytes, values: int) -> None:
    # The list itself is one.
    most = (MAX_VALUES - 1) // values
    assert len(read_json(listed(unit, most))) == most
    with pytest.raises(ValidationError, match="20,000 values"):
        read_json(listed(unit, most + 1))


def test_the_fields_of_inner_objects_count() -> None:
    inner = {f"f{number}": number for number in range(MAX_VALUES)}
    with pytest.raises(ValidationError, match="20,000 values"):
        read_json(json.dumps({"x": inner}).encode())


@pytest.mark.parametrize("text", ["[,{", '",[', "\\\\,", '\\"[', "\\", "é,"])
def test_what_stands_in_a_text_does_not_count(text: str) -> None:
    value = {"a": text * MAX_VALUES, "b": [text, text * MAX_VALUES]}
    assert read_json(json.dumps(value).encode()) == value


def test_lists_of_tokens_may_be_longer_but_not_of_lists() -> None:
    tokens = listed(b"12345", MAX_INPUT_VALUES - 1)
    assert len(read_json(tokens, MAX_INPUT_VALUES)) == MAX_INPUT_VALUES - 1
    with pytest.raises(ValidationError, match="300,000 values, 20,000 objects and lists"):
        read_json(listed(b"12345", MAX_INPUT_VALUES), MAX_INPUT_VALUES)
    with pytest.raises(ValidationError, match="300,000 values, 20,000 objects and lists"):
        read_json(listed(b"[1]", MAX_VALUES), MAX_INPUT_VALUES)


@pytest.mark.parametrize(("opened", "closed"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_is_limited(opened: bytes, closed: bytes) -> None:
    def nested(depth: int) -> bytes:
        return opened * depth + (b"1" if b"a" in opened else b"") + closed * depth

    read_json(nested(MAX_DEPTH))
    with pytest.raises(ValidationError, match="100 deep"):
        read_json(nested(MAX_DEPTH + 1))


@pytest.mark.alone
@pytest.mark.parametrize("unit", [b"[]", b"1", b"[1]"])
def test_a_body_of_too_many_values_costs_less_than_to_parse_it(unit: bytes) -> None:
    content = listed(unit, 1_000_000 // (len(unit) + 1))

    def cost_s(parsed: bool) -> float:  # noqa: FBT001 - one of the two that are compared
        started_s = time.thread_time()
        if parsed:
            json.loads(content)
        else:
            with pytest.raises(ValidationError):
                read_json(content)
        return time.thread_time() - started_s

    assert min(cost_s(parsed=False) for _ in range(5)) < min(cost_s(parsed=True) for _ in range(5))
