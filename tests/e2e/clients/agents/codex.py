"""Codex without its screen, with the model that it chooses; it speaks Responses."""

import os
from pathlib import Path
from typing import Any

from tests.e2e.clients.agents.run import QUESTION, TEXT, events_of, installed, passed, run_agent

CODEX = installed("@openai/codex/bin/codex.js")
CONFIG = """\
model_provider = "here"

[model_providers.here]
name = "here"
base_url = "{base_url}"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
"""
PROOF = Path("proof.txt")
ORDER = f'call exec_command {{"cmd": "echo was here | tee {PROOF}"}}'


def ask(*arguments: str, fails: bool = False) -> list[dict[str, Any]]:
    """Run it with a prompt; its events."""
    # Its sandbox needs privileges that a test has not got; the only command that it runs is the one below.
    options = ("--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    return events_of(run_agent(CODEX, "exec", *options, *arguments, fails=fails))


def texts(events: list[dict[str, Any]], kind: str = "agent_message") -> list[str]:
    """What the agent said."""
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == kind]


def main() -> None:
    """Everything."""
    folder = Path.home() / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(CONFIG.format(base_url=os.environ["OPENAI_BASE_URL"]))

    events = ask(QUESTION)
    assert texts(events) == [TEXT]
    assert texts(events, "reasoning")
    assert events[-1]["usage"]["output_tokens"] == 20
    passed("answer")

    assert texts(ask("resume", "--last", "And now?")) == [f"As I said: {TEXT}"]
    passed("conversation")

    # To a model that it knows, it sends the tools within the input, where the provider does not look.
    events = ask("--model", "gpt-5.4", ORDER)
    ran = [event["item"] for event in events if event.get("item", {}).get("type") == "command_execution"]
    assert (ran[-1]["exit_code"], ran[-1]["aggregated_output"]) == (0, "was here\n")
    assert texts(events)[-1].startswith("The tool says: ")
    assert PROOF.read_text() == "was here\n"
    passed("tools")

    failed = ask("--model", "nope", QUESTION, fails=True)[-1]
    assert (failed["type"], failed["error"]["message"]) == ("turn.failed", "Model 'nope' not found")
    passed("errors")


if __name__ == "__main__":
    main()
