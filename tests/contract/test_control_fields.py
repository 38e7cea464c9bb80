"""The fields that steer LiteLLM, compared with those of the installed LiteLLM."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from openai.types import embedding_create_params
from openai.types.chat import completion_create_params

from service.upstream.control_fields import control_field

LISTED = """
import inspect, json, litellm
from litellm.types import utils
names = set(utils.all_litellm_params)
for function in (litellm.completion, litellm.embedding):
    names |= set(inspect.signature(function).parameters)
print(json.dumps(sorted(names)))
"""
OPENAI = frozenset(
    name
    for kind in (
        completion_create_params.CompletionCreateParamsBase,
        completion_create_params.CompletionCreateParamsStreaming,
        embedding_create_params.EmbeddingCreateParams,
    )
    for name in kind.__annotations__
)
"""The fields of OpenAI's requests, which are not LiteLLM's own; of them ``metadata`` steers it."""

THE_MODELS = frozenset({"thinking", "self"})
"""Of LiteLLM's signatures: a field for the model, and a parameter that no request can set."""


@pytest.fixture(scope="module")
def own() -> list[str]:
    python = Path(os.environ["LITELLM_BIN"]).with_name("python")
    environment = {"PATH": os.environ["PATH"], "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    made = subprocess.run(
        [python, "-c", LISTED], env=environment, capture_output=True, check=True, text=True, timeout=100
    )
    found: list[str] = json.loads(made.stdout.splitlines()[-1])
    return [name for name in found if name not in OPENAI - {"metadata"} and name not in THE_MODELS]


def test_every_field_that_litellm_calls_its_own_is_refused(own: list[str]) -> None:
    assert len(own) > 300
    assert [name for name in own if control_field([name], frozenset()) is None] == []


@pytest.mark.parametrize("name", [*sorted(OPENAI - {"metadata"}), "thinking", "reasoning", "x_1"])
def test_a_field_for_the_model_passes(name: str) -> None:
    assert control_field([name], frozenset()) is None


def test_a_permitted_field_passes_and_no_other() -> None:
    assert control_field(["metadata", "tags"], frozenset({"metadata"})) == "tags"
