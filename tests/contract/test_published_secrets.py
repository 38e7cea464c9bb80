"""No secret that stands somewhere in this repository is accepted by the service."""

import re
import subprocess
from pathlib import Path

import pytest

from service.config.env_validator import problems
from tests.harness import make_settings

ROOT = Path(__file__).parents[2]
SHOWN = re.compile(
    r"""(?P<name>JWT_SECRET_KEY|AUTH_ADMIN_PASSWORD|AUTH_USER_PASSWORD)["']?\s*[:=]\s*["']?(?P<value>[^\s"'`$<{(),\[\]]+)""",
    re.IGNORECASE,
)


def _shown() -> list[tuple[str, str]]:
    """Every value written beside one of the names, in any file that git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = set()
    for name in listed:
        path = ROOT / name
        # What is code is no value: an expression after the name is not shown to anybody as a secret.
        if path.suffix != ".py" and path.is_file():
            found |= {
                (match["name"].lower(), match["value"])
                for match in SHOWN.finditer(path.read_text(errors="replace"))
            }
    return sorted(found)


def test_the_search_finds_what_it_is_for() -> None:
    match = SHOWN.search('JWT_SECRET_KEY: "a-value-that-somebody-wrote-down"')
    assert match is not None
    assert match["value"] == "a-value-that-somebody-wrote-down"


@pytest.mark.parametrize(("field", "value"), _shown() or [("jwt_secret_key", "changeme")])
def test_a_shown_value_is_refused(field: str, value: str) -> None:
    assert field.upper() in {name for name, _ in problems(make_settings(**{field: value}))}
