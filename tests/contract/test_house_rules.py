"""The ways of this house that no linter checks."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "service").rglob("*.py"))
MOST_LINES = 300


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.name == "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_package_file_is_empty(path: Path) -> None:
    assert not path.read_text()


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("mlflow", {"clients/mlflow.py"}),
        ("openai", {"clients/llm.py", "clients/llm_errors.py"}),
        (
            "httpx2",
            {
                "clients/upstream_transport.py",
                "clients/llm.py",
                "clients/llm_errors.py",
                "clients/llm_stream.py",
            },
        ),
        ("purgatory", {"services/circuit_breaker.py"}),
        (
            "qdrant_client",
            {"clients/vectors.py", "clients/vectors_embedded.py", "clients/vectors_points.py"},
        ),
        ("tenacity", {"utils/retry.py"}),
    ],
)
def test_a_library_is_imported_at_its_border_only(library: str, homes: set[str]) -> None:
    importing = {
        str(path.relative_to(ROOT / "service"))
        for path in MODULES
        if any(
            line.startswith((f"import {library}", f"from {library}"))
            and line.split()[1].split(".")[0] == library
            for line in map(str.strip, path.read_text().splitlines())
        )
    }
    assert importing == homes
