"""``.env.example`` and the settings say the same, both ways."""

import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.config.env_validator import PER_PROCESS, REQUIRED, problems
from service.config.settings import PASSED_THROUGH, Settings
from tests.harness import make_settings

ROOT = Path(__file__).parents[2]
LINES = (ROOT / ".env.example").read_text().splitlines()
VARIABLE = re.compile(r"(?P<off># )?(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*)")
SHOWN = {match["name"]: match for line in LINES if (match := VARIABLE.fullmatch(line))}
FIELDS = {name.upper(): field for name, field in Settings.model_fields.items()}


COMPOSE_ONLY = (
    *("COMPOSE_PROFILES", "GRAFANA_ADMIN_PASSWORD", "ALERT_WEBHOOK_URL", "GRAFANA_PORT", "MLFLOW_PORT"),
    *("QDRANT__SERVICE__API_KEY", "MLFLOW_EXPERIMENT_ID", "MLFLOW_BACKEND_STORE_URI"),
    *("POSTGRES_PASSWORD", "POSTGRES_API_PASSWORD", "POSTGRES_MLFLOW_PASSWORD", "POSTGRES_GRAFANA_PASSWORD"),
    *("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GROQ_API_KEY", "GEMINI_API_KEY"),
)
"""What docker-compose.yml reads, and the service does not."""


def test_every_setting_is_listed_and_nothing_else() -> None:
    assert set(SHOWN) == set(FIELDS) | set(PASSED_THROUGH) | set(COMPOSE_ONLY)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_default_shown_is_the_default(name: str) -> None:
    default = FIELDS[name].get_default(call_default_factory=True)
    shown = SHOWN[name]["value"]
    if default in {None, ()} or isinstance(default, SecretStr):
        assert not shown
    else:
        parsed = make_settings(**{name.lower(): shown})
        assert getattr(parsed, name.lower()) == default


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_each_variable_has_its_meaning_above_it(name: str) -> None:
    at = LINES.index(SHOWN[name].string)
    while VARIABLE.fullmatch(LINES[at]):
        at -= 1
    assert LINES[at].startswith("# ")


def test_only_what_is_required_is_left_to_fill_in() -> None:
    assert [name for name, match in SHOWN.items() if not match["off"]] == list(REQUIRED)


def test_the_example_as_it_stands_is_refused() -> None:
    values = {name.lower(): match["value"] for name, match in SHOWN.items() if not match["off"]}
    assert {name for name, _ in problems(make_settings(**values))} == set(REQUIRED)


@pytest.mark.parametrize("name", PER_PROCESS)
def test_a_limit_that_is_counted_per_process_says_so(name: str) -> None:
    paragraph = next(
        part for part in "\n".join(LINES).split("\n\n") if re.search(rf"^(# )?{name}=", part, re.MULTILINE)
    )
    assert "per process" in paragraph.replace("\n# ", " ")


def test_what_says_that_it_is_counted_per_process_is_warned_about() -> None:
    for part in "\n".join(LINES).split("\n\n"):
        names = re.findall(r"^(?:# )?([A-Z][A-Z0-9_]*)=", part, re.MULTILINE)
        if "per process" in part.replace("\n# ", " ") and names != ["WORKERS"]:
            assert set(names) <= set(PER_PROCESS), names
