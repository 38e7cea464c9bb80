"""The `.env` of the demo: made when absent, completed when it lacks a value, never rewritten."""

import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

REQUIRED: Final[Mapping[str, Callable[[], str]]] = {
    "JWT_SECRET_KEY": lambda: secrets.token_urlsafe(48),
    "AUTH_ADMIN_PASSWORD": lambda: secrets.token_urlsafe(18),
    "AUTH_USER_PASSWORD": lambda: secrets.token_urlsafe(18),
    "LITELLM_API_KEY": lambda: f"sk-{secrets.token_urlsafe(32)}",
}

_ASSIGNMENT: Final = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)")
_QUOTED: Final = re.compile(r"""(['"])(.*?)\1""")


def read(path: Path) -> dict[str, str]:
    """Return the values that the file sets; none when it does not exist, and of a name set twice the last."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {match[1]: _value(match[2]) for line in lines if (match := _ASSIGNMENT.match(line))}


def complete(path: Path) -> list[str]:
    """Append a new secret for each required name that the file lacks or leaves empty; return those names.

    Whatever it writes to, it leaves readable by the owner alone.
    """
    values = read(path)
    missing = [name for name in REQUIRED if not values.get(name)]
    if missing:
        _append(path, ["# Added by `make demo`", *(f"{name}={REQUIRED[name]()}" for name in missing)])
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
