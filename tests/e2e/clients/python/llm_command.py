"""The command line ``llm``."""

import json
import os
import sys
from pathlib import Path

from tests.e2e.clients.llm_program import ask_llm
from tests.e2e.clients.python.checks import TEXT, Checks

check = Checks()
# It is installed beside the Python that runs this.
os.environ["CLIENTS_PYTHON"] = sys.executable
URL, KEY = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
MODEL = "gpt-5.4"


def ask(*arguments: str) -> str:
    """What it writes."""
    ended = ask_llm(URL, KEY, Path.cwd(), MODEL, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.strip()


@check("chat")
def _chat() -> None:
    assert ask("--no-stream") == TEXT


@check("stream")
def _stream() -> None:
    assert ask() == TEXT


@check("schema")
def _schema() -> None:
    assert json.loads(ask("--schema", "name, age int")) == {"name": "Ada", "age": 36}


if __name__ == "__main__":
    check.run()
