"""The documents name only targets, files, modules, settings and links that exist."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.backends import ROOT
from tests.contract.test_env_example import SHOWN

DOCUMENTS = ("README.md", "IMPLEMENTATION.md", "otel/README.md", "grafana/README.md", "deploy/README.md")
README_LINES = 250

MADE = re.compile(r"\.demo/|\.venv|\.env$|data/")
"""What a command makes, and git ignores."""

NOT_SETTINGS = {
    "LLMOPS_URL": "which service the command explain asks",
    "LLMOPS_TOKEN": "with what it proves who is asking",
    "LITELLM_BIN": "a program, for the benches",
    "MALLOC_ARENA_MAX": "the C library's",
    "MALLOC_TRIM_THRESHOLD": "the C library's, with an underscore at its end",
    "ANTHROPIC_API_KEY": "Anthropic's clients read it",
    "ANTHROPIC_AUTH_TOKEN": "Anthropic's clients read it",
    "ANTHROPIC_BASE_URL": "Anthropic's clients read it",
    "LITELLM_OTEL_V2": "LiteLLM reads it",
    "MAX_ATTRIBUTE_CHARS": "a constant of the service",
    "MAX_TEXT": "a constant of the service",
    "OPENAI_API_KEY": "OpenAI's clients read it",
    "OPENAI_BASE_URL": "OpenAI's clients read it",
    "MLFLOW_SERVER_ALLOWED_HOSTS": "the MLflow server reads it",
}

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
SUFFIXES = r"(?:py|md|ya?ml|json|toml|lock|in|mod|sum|png|tsv|npz|mjs)"
A_PATH = re.compile(rf"[\w.-]+(?:/[\w.*-]+)*(?:/|\.{SUFFIXES})")
BELOW_A_FOLDER = re.compile(r"(?<![\w./-])(?:service|tests|otel|grafana|deploy)/[\w./*-]*[\w*/]")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)

Check = Callable[[str, Path], list[str]]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _code(text: str) -> list[str]:
    """Return the code blocks, then the code spans."""
    blocks = FENCE.findall(text)
    return [*blocks, *SPAN.findall(FENCE.sub("", text))]


def unknown_targets(text: str, _folder: Path) -> list[str]:
    """Return the ``make`` targets that the Makefile does not have."""
    known = set(re.findall(r"^([a-z-]+):(?!=)", _text("Makefile"), re.MULTILINE))
    named = {name for code in _code(text) for name in re.findall(r"\bmake ([a-z][a-z-]*)", code)}
    return sorted(named - known)


def missing_files(text: str, folder: Path) -> list[str]:
    """Return the paths that exist neither below the repository nor below the document's folder."""
    named = {path for code in _code(text) for path in BELOW_A_FOLDER.findall(code)}
    named |= {code for code in _code(text) if A_PATH.fullmatch(code)}
    return sorted(
        path
        for path in named
        if not MADE.match(path) and not any(any(base.glob(path)) for base in (ROOT, folder))
    )


def missing_modules(text: str, _folder: Path) -> list[str]:
    """Return the modules that ``python -m`` cannot run."""
    named = {name for code in _code(text) for name in re.findall(r"(?:python|PYTHON) -m ([\w.]+)", code)}
    ours = {name: ROOT / name.replace(".", "/") for name in named}
    return sorted(
        name
        for name, path in ours.items()
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file()
    )


def unknown_settings(text: str, _folder: Path) -> list[str]:
    """Return the variables that neither ``.env.example`` nor the list above has."""
    named = {
        name for code in _code(text) for name in re.findall(r"(?<![\w=])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+", code)
    }
    return sorted(named - SHOWN.keys() - NOT_SETTINGS.keys())


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Return the links to files or headings that do not exist; links to other hosts are not looked at."""

    def leads_somewhere(target: str) -> bool:
        name, _, anchor = target.partition("#")
        if name and not (folder / name).exists():
            return False
        return not anchor or anchor in anchors((folder / name).read_text("utf-8") if name else text)

    inside = [target for target in LINK.findall(FENCE.sub("", text)) if not re.match(r"https?://", target)]
    return [target for target in inside if not leads_somewhere(target)]


CHECKS: tuple[Check, ...] = (unknown_targets, missing_files, missing_modules, unknown_settings, broken_links)


def test_the_readme_is_short() -> None:
    assert len(_text("README.md").splitlines()) < README_LINES


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_only_what_exists(name: str, check: Check) -> None:
    assert check(_text(name), (ROOT / name).parent) == []


@pytest.mark.parametrize(
    ("check", "text", "found"),
    [
        (unknown_targets, "`make tests` and `make test`", ["tests"]),
        (missing_files, "`service/errors.py`, `service/error.py`", ["service/error.py"]),
        (missing_files, "```\n$ make test ARGS=tests/e2e/test_none.py\n```", ["tests/e2e/test_none.py"]),
        (missing_files, "`otel/rules/*.yaml`, `otel/rules/*.json`", ["otel/rules/*.json"]),
        (missing_modules, "`python -m tests.bench.none`, `python -m service check`", ["tests.bench.none"]),
        (unknown_settings, "`LLM_TIMEOUT_S` and `LLM_TIMEOUT`", ["LLM_TIMEOUT"]),
        (
            broken_links,
            "[a](README.md#use) [b](README.md#abuse) [c](NONE.md)",
            ["README.md#abuse", "NONE.md"],
        ),
    ],
)
def test_what_does_not_exist_is_found(check: Check, text: str, found: list[str]) -> None:
    assert check(text, ROOT) == found


def test_a_readme_lists_the_files_beside_it() -> None:
    """A file that is added to one of these folders gets a line in its README."""
    for folder in ("otel", "grafana", "deploy"):
        readme = _text(f"{folder}/README.md")
        beside = {
            path.name
            for path in (ROOT / folder).iterdir()
            if path.is_file() and path.name not in {"README.md", "__init__.py", "__main__.py"}
        }
        assert {name for name in beside if f"`{name}`" not in readme} == set(), folder
