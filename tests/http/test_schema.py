"""The documentation is valid, and the service does what it says: it answers what it documents."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from tests.fakes.upstream import FakeUpstream
from tests.harness import AppUnderTest
from tests.http.support import module_app

EXAMPLES = 25
MUCH = "1000000/minute"


@pytest.fixture(scope="module")
def app() -> Iterator[AppUnderTest]:
    with FakeUpstream() as upstream:
        # Whatever name is made up, the model is there: its absence is no matter of the schema.
        upstream.unknown_model_error = False
        with module_app(
            litellm_url=upstream.url,
            rate_limit=MUCH,
            login_failures_per_name=MUCH,
            login_failures_per_address=MUCH,
        ) as served:
            yield served


def test_the_document_is_valid(app: AppUnderTest) -> None:
    validate(app.call("GET", "/openapi.json").json)


def test_every_body_has_an_example(app: AppUnderTest) -> None:
    document = app.call("GET", "/openapi.json").json
    schemas = document["components"]["schemas"]

    def has_example(content: dict[str, Any]) -> bool:
        name = content["schema"].get("$ref", "").rsplit("/", 1)[-1]
        fields = schemas.get(name, {}).get("properties", {}).values()
        return "example" in content or any("examples" in field or "$ref" in field for field in fields)

    for path in (
        "/llm/generate",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model}",
    ):
        for operation in document["paths"][path].values():
            contents = [answer["content"] for answer in operation["responses"].values()]
            contents += [operation["requestBody"]["content"]] if "requestBody" in operation else []
            for content in contents:
                assert all(has_example(media) for media in content.values()), (path, content)


@pytest.mark.timeout(180)
def test_the_service_keeps_to_the_document(app: AppUnderTest, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{app.port}/openapi.json"),
        *("--checks", "all", "--max-examples", str(EXAMPLES), "--continue-on-failure", "--no-color"),
        *("--header", f"Authorization: Bearer {app.token()}"),
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170, check=False)

    assert ended.returncode == 0, ended.stdout[-8_000:] + ended.stderr[-2_000:]
    tested = re.search(r"Tested: (\d+)", ended.stdout)
    assert tested is not None
    assert int(tested[1]) == len(
        [method for methods in app.call("GET", "/openapi.json").json["paths"].values() for method in methods]
    )
    assert app.value("http.server.request.duration", error__type="InternalError") == 0
