"""The command line ``llm``, which reads of a server like OpenAI's from a file."""

import json
import os
import subprocess
from pathlib import Path

MODELS_FILE = """\
- model_id: here
  model_name: {model}
  api_base: "{base_url}"
  api_key_name: here
  supports_tools: true
  supports_schema: true
"""


def ask_llm(
    base_url: str, key: str, folder: Path, model: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Ask a model what a trace is.

    Args:
        base_url: Of the service, with /v1.
        key: For the service.
        folder: Where the program has its files.
        model: The model's name.
        arguments: Further ones of the program.
    """
    python = os.environ.get("CLIENTS_PYTHON")
    assert python, (
        "CLIENTS_PYTHON must name the clients' Python; `make test` installs it and sets the variable"
    )
    models = folder / "extra-openai-models.yaml"
    models.write_text(MODELS_FILE.format(model=model, base_url=base_url))
    (folder / "keys.json").write_text(json.dumps({"here": key}))
    return subprocess.run(
        [python, "-m", "llm", "prompt", "-m", "here", "--no-log", "What is a trace?", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LLM_USER_PATH": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
