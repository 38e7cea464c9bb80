"""Which client libraries can be tried here; with ``CI=true`` none may be missing."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Script:
    """A client library's script, and what runs it.

    Args:
        name: The library's.
        command: What to run; empty when this machine has not got the runtime.
        needs: The runtime that is missing then.
    """

    name: str
    command: tuple[str, ...]
    needs: str


def scripts() -> list[Script]:
    """Every script; ``make test`` installs the runtimes and names them in the environment."""
    python, node = os.environ.get("CLIENTS_PYTHON", ""), shutil.which("node") or ""
    installed = (FOLDER / "node/node_modules/openai").is_dir()
    return [
        Script("openai-python", (sys.executable, str(FOLDER / "python_sdk.py")), ""),
        Script(
            "langchain-openai",
            (python, str(FOLDER / "langchain_client.py")) if python else (),
            "CLIENTS_PYTHON, which make test sets",
        ),
        Script(
            "openai-node",
            (node, str(FOLDER / "node/sdk.mjs")) if node and installed else (),
            "node and npm",
        ),
    ]


def runnable() -> list[Script]:
    """The scripts that are tried; in CI all of them, so that a missing runtime is a failure."""
    return [script for script in scripts() if script.command or os.environ.get("CI")]


def left_out() -> list[Script]:
    """The scripts that are not."""
    return [script for script in scripts() if script not in runnable()]
