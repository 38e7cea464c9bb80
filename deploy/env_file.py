"""The `.env` of the demo and of compose: missing values are appended, existing ones are never changed.

`python -m deploy.env_file` (`make env`) writes the values that docker-compose.yml requires.
"""

import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

REQUIRED: Final[Mapping[str, Callable[[], str]]] = {
    "JWT_SECRET_KEY": lambda: secrets.token_urlsafe(48),
    "AUTH_ADMIN_PASSWORD": lambda: secrets.token_urlsafe(18),
    "AUTH_USER_PASSWORD": lambda: secrets.token_urlsafe(18),
    "LITELLM_API_KEY": lambda: f"sk-{secrets.token_urlsafe(32)}",
}

COMPOSE: Final[Mapping[str, Callable[[], str]]] = {
    **REQUIRED,
    "GRAFANA_ADMIN_PASSWORD": lambda: secrets.token_urlsafe(18),
    # Of these alphabets alone: they are parts of URLs.
    "POSTGRES_PASSWORD": lambda: secrets.token_urlsafe(24),
    "POSTGRES_API_PASSWORD": lambda: secrets.token_urlsafe(24),
    "POSTGRES_MLFLOW_PASSWORD": lambda: secrets.token_urlsafe(24),
    "POSTGRES_GRAFANA_PASSWORD": lambda: secrets.token_urlsafe(24),
    "COMPOSE_PROFILES": lambda: "full",
}
"""The values that compose requires; the profile is not a secret, and is written so that it can be edited."""

ROOT: Final = Path(__file__).resolve().parents[1]

_ASSIGNMENT: Final = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)")
_QUOTED: Final = re.compile(r"""(['"])(.*?)\1""")


def read(path: Path) -> dict[str, str]:
    """Return the values that the file sets, the last one of a repeated name; none if there is no file."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {match[1]: _value(match[2]) for line in lines if (match := _ASSIGNMENT.match(line))}


def complete(
    path: Path, names: Mapping[str, Callable[[], str]] = REQUIRED, added_by: str = "make demo"
) -> list[str]:
    """Append a new secret for each name that is missing or empty in the file, and return these names.

    A file that it writes is then readable by its owner only.
    """
    values = read(path)
    missing = [name for name in names if not values.get(name)]
    if missing:
        _append(path, [f"# Added by `{added_by}`", *(f"{name}={names[name]()}" for name in missing)])
    return missing


def _value(text: str) -> str:
    quoted = _QUOTED.match(text)
    return quoted[2] if quoted else re.sub(r"(^|\s+)#.*", "", text).rstrip()


def _append(path: Path, lines: list[str]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a+", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o600)
        file.seek(0)
        written = file.read()
        end = "" if not written or written.endswith("\n") else "\n"
        file.write(end + "".join(f"{line}\n" for line in lines))


def main() -> int:
    """Complete the file for compose, and print the names that were written."""
    added = complete(ROOT / ".env", COMPOSE, "make env")
    print(f"Wrote to .env: {', '.join(added)}" if added else ".env has all that compose needs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
