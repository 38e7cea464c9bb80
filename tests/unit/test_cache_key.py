"""Equal meaning, equal key; anything else, another key; and no tenant reaches another's."""

import copy
import hashlib
import json
import random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.cache.keys import DEFAULTS, key_of, scope_of, tenant_of

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}),
    min_size=1,
    max_size=3,
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2) | st.integers(0, 2),
        "top_p": st.floats(0, 1),
        "max_tokens": st.integers(1, 10_000),
        "seed": st.integers(0, 2**31),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=2),
        "tools": st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=2), max_size=2),
        "response_format": st.just({"type": "json_object"}),
        "anything_new": JSON,
    },
)
BODIES = st.builds(lambda messages, parameters: {"messages": messages, **parameters}, MESSAGES, PARAMETERS)
TENANT = tenant_of("user")


def digest(body: dict[str, Any], model: str = "demo", tenant: str = TENANT) -> str:
    return key_of(tenant, model, body).digest


def respelled(value: Any, shuffle: random.Random) -> Any:
    """The same JSON with its keys in another order and each number in another spelling."""
    if isinstance(value, dict):
        names = list(value)
        shuffle.shuffle(names)
        return {name: respelled(value[name], shuffle) for name in names}
    if isinstance(value, list):
        return [respelled(inner, shuffle) for inner in value]
    if type(value) is int and abs(value) < 2**53:
        return float(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


@given(BODIES, st.randoms(use_true_random=False))
def test_order_and_spelling_change_nothing(body: dict[str, Any], shuffle: random.Random) -> None:
    again = respelled(copy.deepcopy(body), shuffle)

    assert digest(again) == digest(body)
    assert digest(json.loads(json.dumps(again))) == digest(body)


@given(BODIES)
def test_an_absent_parameter_is_its_default(body: dict[str, Any]) -> None:
    bare = {name: value for name, value in body.items() if name not in DEFAULTS}

    assert digest({**DEFAULTS, **bare}) == digest(bare)
    assert digest({**dict.fromkeys(DEFAULTS), **bare}) == digest(bare)


@given(BODIES, st.booleans())
def test_how_the_answer_is_handed_over_changes_nothing(body: dict[str, Any], stream: bool) -> None:  # noqa: FBT001 - drawn
    assert digest({**body, "stream": stream, "stream_options": {"include_usage": stream}}) == digest(body)


@given(BODIES, BODIES)
def test_any_other_change_is_another_key(first: dict[str, Any], second: dict[str, Any]) -> None:
    assume(meaning(first) != meaning(second))

    assert digest(first) != digest(second)


def meaning(body: dict[str, Any]) -> str:
    """What the key has to tell apart, said in another way than there: text, sorted, with the defaults in."""
    whole = {**DEFAULTS, **{name: value for name, value in body.items() if value is not None}}
    return json.dumps(respelled_to_int(whole), sort_keys=True)


def respelled_to_int(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: respelled_to_int(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [respelled_to_int(inner) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"n": 1}, {"n": True}),
        ({"logprobs": False}, {"logprobs": 0}),
        ({"seed": 0}, {"seed": None}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"max_tokens": 5}, {"max_completion_tokens": 5}),
        ({"user": "a"}, {"user": "b"}),
    ],
)
def test_what_looks_alike_is_told_apart(first: dict[str, Any], second: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "Hi"}]

    assert digest({"messages": messages, **first}) != digest({"messages": messages, **second})


def test_model_and_headers_are_part_of_it() -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    keys = {
        digest(body),
        digest(body, model="other"),
        key_of(TENANT, "demo", body, {"openai-beta": "x"}).digest,
        digest({**body, "messages": [{"role": "system", "content": "Hi"}]}),
    }

    assert len(keys) == 4


@settings(max_examples=1_000)
@given(st.text(), st.text(), BODIES)
def test_no_tenant_reaches_another(first: str, second: str, body: dict[str, Any]) -> None:
    assume(first != second)
    ones, others = tenant_of(first), tenant_of(second)

    assert ones != others
    assert tenant_of(None) not in {ones, others}
    assert digest(body, tenant=ones) != digest(body, tenant=others)
    assert scope_of(ones, "demo", body, "") != scope_of(others, "demo", body, "")
    assert key_of(ones, "demo", body).point_id != key_of(others, "demo", body).point_id


@given(st.text(), st.text(), st.text(), st.text(), BODIES)
def test_a_name_cannot_run_into_the_model(
    user: str, model: str, other_user: str, other_model: str, body: dict[str, Any]
) -> None:
    assume((user, model) != (other_user, other_model))

    assert digest(body, model, tenant_of(user)) != digest(body, other_model, tenant_of(other_user))


def test_the_same_name_in_another_realm_is_somebody_else() -> None:
    assert len({tenant_of(user, realm) for user in ("user", None) for realm in ("", "a", "b")}) == 6


@pytest.mark.parametrize("schema", [1, 2])
def test_an_entry_of_an_earlier_version_is_not_found(schema: int) -> None:
    """Schema 2 held streamed answers that were put together wrongly."""
    messages = [{"role": "user", "content": "Hi"}]
    parts = [schema, "answer", TENANT, "demo", {}, {"messages": messages}]
    earlier = hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    assert digest({"messages": messages}) != earlier
